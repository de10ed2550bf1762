"""Loading the model that is measured, offloaded to disk by accelerate where it does not fit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from surgery.architectures import find_family
from surgery.architectures.family import Vision
from surgery.checkpoint.reader import Checkpoint
from surgery.errors import EnvironmentFailure, UnsupportedModel, UsageError
from surgery.planning import FLOAT32_LIMIT, storage_dtype


@contextmanager
def loaded_model(checkpoint: Checkpoint, device: str, max_memory: int | None = None) -> Iterator[Any]:
    """The checkpoint as a transformers model in eval mode.

    `max_memory` is the bytes of weights that may be resident; None takes half of what the machine has free.
    """
    check_device(device)
    small = checkpoint.parameter_count * 4 <= FLOAT32_LIMIT
    dtype = torch.float32 if small else "auto"
    needed = checkpoint.parameter_count * 4 if small else checkpoint.tensor_bytes
    limit = max_memory if max_memory is not None else _free_memory() // 2
    settings: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="surgery-offload-") as folder:
        if device != "cpu":
            settings["device_map"] = {"": device}
        elif needed > limit:
            settings |= {"device_map": "auto", "max_memory": {"cpu": limit}, "offload_folder": folder}
        yield causal_lm(checkpoint, dtype, **settings).eval()


def measured_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The type in which a checkpoint is measured: float32 where that is small, else the stored one."""
    if checkpoint.parameter_count * 4 <= FLOAT32_LIMIT:
        return torch.float32
    stored: torch.dtype = getattr(torch, storage_dtype(checkpoint))
    return stored


def causal_lm(checkpoint: Checkpoint, dtype: torch.dtype | str, **settings: Any) -> Any:
    """The checkpoint as a transformers model, multimodal ones whole; `dtype` "auto" is the stored one."""
    from transformers import PretrainedConfig

    # The argument was renamed, with a warning, in the release in which configs got the attribute.
    name = "dtype" if hasattr(PretrainedConfig(), "dtype") else "torch_dtype"
    settings |= {name: dtype, "trust_remote_code": checkpoint.remote_code}
    return auto_class(checkpoint).from_pretrained(str(checkpoint.folder), **settings)


def auto_class(checkpoint: Checkpoint) -> Any:
    """The Auto class of transformers that loads the checkpoint."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if sees(checkpoint) is not None else AutoModelForCausalLM


def sees(checkpoint: Checkpoint) -> Vision | None:
    """Where images enter the model, if it sees any."""
    try:
        return find_family(checkpoint.config).vision
    except UnsupportedModel:  # of no family that is known, or of none any more
        return None


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer of a checkpoint. Raises UsageError where there is none that loads."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(checkpoint.folder), trust_remote_code=checkpoint.remote_code)
    except (OSError, ValueError) as error:
        raise UsageError(
            "the base has no tokenizer that loads", cause=f"{type(error).__name__}: {error}",
            remedy="set text: self in its section of the manifest, which needs none",
        ) from error  # fmt: skip


def check_device(device: str) -> None:
    """Raise EnvironmentFailure where torch cannot put anything on `device`."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise EnvironmentFailure(
            f"the device {device!r} cannot be used", cause=str(error).partition("\n")[0][:200],
            remedy="leave --device out, or install a torch that has it",
        ) from error  # fmt: skip


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
