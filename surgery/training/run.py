"""What both stages of healing share: the pieces of a run, the optimizer, its rate, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgery.checkpoint.reader import Checkpoint
from surgery.errors import EnvironmentFailure, TrainingDiverged, UsageError
from surgery.planning import FLOAT32_LIMIT
from surgery.training.data import Corpus
from surgery.training.groups import Selection

if TYPE_CHECKING:
    from surgery.operations.base import Training
    from surgery.operations.heal import HealSettings

SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
# A loss that is this many times what it was at first has left what it should come back to.
DIVERGED = 3.0
# Nats below which a loss is good, whatever it was at first.
HARMLESS = 0.05
MUON_RMS = 0.2  # of an update's elements at rate 1, as torch's Muon adjusts it to resemble AdamW
RECENT = 10  # recorded losses over which the mean is taken before it is judged


@dataclass(frozen=True)
class Run:
    """One healing stage: what it may use, its settings, its text, its parameters, and accelerate's Accelerator."""

    training: Training
    settings: HealSettings
    corpus: Corpus
    selection: Selection
    accelerator: Any

    @property
    def folder(self) -> Path:
        """Where state is kept."""
        return self.training.folder

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def length(self) -> int:
        """Tokens in a window."""
        return int(self.corpus.train.shape[1])

    def steps(self, tokens: int) -> int:
        """Optimizer steps that see at least `tokens` tokens."""
        return max(1, math.ceil(tokens / (self.settings.batch_size * self.length)))

    def weights_dtype(self, checkpoint: Checkpoint) -> torch.dtype | None:
        """Type in which untrained weights are held: float32 without mixed precision, else as stored (None)."""
        small = checkpoint.parameter_count * 4 <= FLOAT32_LIMIT
        return torch.float32 if small or self.settings.precision == "fp32" else None


def optimizers(settings: HealSettings, parameters: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    """What steps the named parameters: Muon for the matrices of layers if it is asked for, AdamW for the others.

    One group a parameter; weight decay is for matrices alone, as it would only shrink norms and biases. The `scale` of
    a group is what its rate is multiplied by: with `scale_parameter` the parameter's size, else 1.
    """
    matrices: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for name, parameter in parameters.items():
        by_muon = settings.optimizer == "muon" and _is_inner(name, parameter)
        scale = 1.0
        if settings.scale_parameter:  # so that an update is about `rate` times the size of what it changes
            scale = _size(parameter) / (MUON_RMS if by_muon else 1.0)
        decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        (matrices if by_muon else others).append({"params": [parameter], "weight_decay": decay, "scale": scale})
    first, second = settings.betas
    found: list[torch.optim.Optimizer] = []
    if matrices:
        found.append(_muon(matrices))
    if others:
        found.append(torch.optim.AdamW(others, lr=0.0, betas=(first, second), eps=settings.eps))
    return found


def _is_inner(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix between hidden states; rows of embeddings and heads are one token each."""
    return parameter.ndim == 2 and not any(part in name for part in ("embed", "lm_head"))


def _muon(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise EnvironmentFailure(
            f"optimizer muon needs torch 2.9 or newer, this is {torch.__version__}", cause="older ones do not have it",
            remedy="pip install -U torch, or set heal.optimizer to adamw",
        )  # fmt: skip
    found: torch.optim.Optimizer = torch.optim.Muon(groups, lr=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return found


def _size(parameter: nn.Parameter) -> float:
    """The root mean square of a parameter's elements; of one that is zero, what it usually starts from."""
    found = float(parameter.detach().float().square().mean().sqrt())
    return found or float(parameter.shape[-1]) ** -0.5


def rate_factor(settings: HealSettings, steps: int) -> Callable[[int], float]:
    """The share of the peak rate at each step (from 0), by the schedulers of transformers.

    A function of the step alone, so that resuming needs no state of a scheduler, and processes cannot count it twice.
    """
    from transformers import get_scheduler

    idle = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    warmup = round(settings.warmup_ratio * steps)
    scheduler = get_scheduler(SCHEDULERS[settings.lr_scheduler], idle, warmup, steps)
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    # Without this the first step of a warm-up would have a rate of zero and be lost.
    return lambda step: factor(step + 1) if step < warmup else factor(step)


def set_rate(chosen: Sequence[torch.optim.Optimizer], rate: float) -> None:
    """Give every group of the optimizers the rate that its scale makes of `rate`."""
    for group in (group for one in chosen for group in one.param_groups):
        group["lr"] = rate * group["scale"]


def judge(losses: Sequence[float], where: str, last_good: str, harmless: float = HARMLESS) -> None:
    """Raise TrainingDiverged where the newest of `losses` is not finite, or the recent ones are far above the first."""
    newest, first = losses[-1], losses[0]
    recent = sum(losses[-RECENT:]) / len(losses[-RECENT:])
    if math.isfinite(newest) and recent <= max(DIVERGED * first, harmless):
        return
    found = f"the loss went from {first:.4g} to {recent:.4g}" if math.isfinite(newest) else f"the loss is {newest}"
    raise TrainingDiverged(
        f"training diverged at {where}: {found}", cause="the steps are too large for this model, data or precision",
        remedy=f"lower learning_rate (a third is a good try), which starts anew, or raise warmup_ratio; {last_good}",
    )  # fmt: skip


def divided(settings: HealSettings, processes: int) -> int:
    """Sequences that one process computes at once. Raises UsageError where the batch does not divide."""
    parts = processes * settings.gradient_accumulation_steps
    if settings.batch_size % parts:
        raise UsageError(
            f"batch_size {settings.batch_size} does not divide into {parts} parts",
            cause=f"there are {processes} processes and gradient_accumulation_steps is "
            f"{settings.gradient_accumulation_steps}",
            remedy=f"set heal.batch_size to a multiple of {parts}",
        )  # fmt: skip
    return settings.batch_size // parts
