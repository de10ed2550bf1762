"""One process or many: who leads, waiting for the others, and accelerate's Accelerator.

`accelerate launch -m surgery convert ...` starts the same command several times. The first process converts; the others
join it where something is trained. What the launcher set up (FSDP2, DeepSpeed, devices) accelerate reads by itself.
"""

from __future__ import annotations

import gc
import os
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from surgery.errors import EnvironmentFailure, MissingPackage

if TYPE_CHECKING:
    from pathlib import Path

    from surgery.operations.heal import HealSettings

# The first process may stream and calibrate for as long as it takes before the others are needed.
PATIENCE = timedelta(days=30)
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR")  # what torch's launchers set, and with them accelerate's


def several() -> bool:
    """Whether a launcher started this process as one of several."""
    return all(name in os.environ for name in _LAUNCHED) and int(os.environ["WORLD_SIZE"]) > 1


def leads() -> bool:
    """Whether this process converts; the others only help to train."""
    return not several() or int(os.environ["RANK"]) == 0


def wait_for_all(device: str, *, last: bool = False) -> None:
    """Return once every process has come here; after the `last` time none waits for another any more."""
    if several():
        from accelerate import PartialState

        state = PartialState(**_group(device))
        state.wait_for_everyone()
        if last:
            state.destroy_process_group()


def accelerator(settings: HealSettings, device: str, logs: Path) -> Any:
    """Accelerate's Accelerator for this process. Raises EnvironmentFailure for a precision that the device lacks."""
    from accelerate import Accelerator, DistributedType, PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import FullyShardedDataParallelPlugin

    if settings.precision == "fp16" and device == "cpu":
        raise EnvironmentFailure(
            "precision fp16 needs a GPU", cause="the processor computes it slowly and without loss scaling",
            remedy="set heal.precision to bf16 or fp32, or pass --device cuda",
        )  # fmt: skip
    if settings.tracker and find_spec(settings.tracker) is None:
        raise MissingPackage(
            f"heal.tracker is {settings.tracker}, which is not installed", cause="accelerate would log nowhere",
            remedy=f"pip install {settings.tracker}, or leave the tracker out",
        )  # fmt: skip
    if several():
        PartialState(**_group(device))
    precision = "no" if settings.precision == "fp32" else settings.precision
    # Accelerate keeps one state for the whole process, and a second stage may want another precision or device.
    AcceleratorState._reset_state(reset_partial_state=not several())  # noqa: SLF001
    made = Accelerator(
        cpu=device == "cpu" and not _deepspeed(),
        mixed_precision=precision,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        log_with=settings.tracker,
        project_dir=str(logs) if settings.tracker else None,
    )
    if device == "cpu" and several() and os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        # On processors accelerate (1.15) reads the launcher's FSDP settings but does not act on them.
        made.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        made.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        if made.mixed_precision != "no":
            made.state.fsdp_plugin.set_mixed_precision(made.mixed_precision)
    if _deepspeed():
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # or from_pretrained would divide the teacher too
    return made


def release(made: Any) -> None:
    """Let go of prepared models before the process group goes.

    A reducer of data parallelism that outlives its group can wait for ever (seen with torch 2.13 and gloo).
    """
    made.free_memory()
    gc.collect()


def _group(device: str) -> dict[str, Any]:
    backend = {"backend": "gloo"} if device == "cpu" and _deepspeed() else {}
    return {"cpu": device == "cpu" and not _deepspeed(), "timeout": PATIENCE, **backend}


def _deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
