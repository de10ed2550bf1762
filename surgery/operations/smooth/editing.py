"""How `smooth` changes a draft."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from surgery.checkpoint.expressions import Tensors
from surgery.errors import InternalError
from surgery.operations.base import Statistics
from surgery.operations.smooth.folds import Fold, SmoothSettings, folds
from surgery.planning import Draft

if TYPE_CHECKING:
    from torch import Tensor

# Scales stay within this and one over it.
WIDEST = 1e5
# Elements that are computed at once.
CHUNK = 1 << 18


def scales(inputs: Tensor, weights: Tensor, settings: SmoothSettings) -> Tensor:
    """The s of each channel; 1 where nothing comes in, or nothing reads it."""
    import torch

    found = (inputs.pow(settings.alpha) / weights.pow(1 - settings.alpha)).clamp(1 / WIDEST, WIDEST)
    if settings.powers_of_two:
        found = found.log2().round().exp2()
    return torch.where((inputs > 0) & (weights > 0), found, 1.0)


def edit(draft: Draft, settings: SmoothSettings, statistics: Statistics | None) -> None:
    """Multiply what reads and divide what makes each channel; each tensor is rounded once."""
    found = folds(draft.model, settings)
    changes: dict[str, list[_Change]] = {}
    for fold in found:
        for name, start in fold.divided.items():
            changes.setdefault(name, []).append(_Change(fold, 0, start, divides=True))
        for name, axis in fold.read.items():
            changes.setdefault(name, []).append(_Change(fold, axis, 0, divides=False))
    for name, of_tensor in changes.items():
        spec = draft.spec(name)
        # Computing by parts; afterwards, to see that all is finite, the whole.
        work = max(3 * 4 * max(CHUNK, math.prod(spec.shape[1:])), 4 * math.prod(spec.shape))
        function = _smoothed(name, of_tensor, settings, statistics)
        draft.rewrite([name], {name: spec}, function, why=f"smooth: alpha {settings.alpha:g}", work_bytes=work)
    if statistics is not None:
        draft.notes.append(_note(found, settings, statistics))


@dataclass(frozen=True)
class _Change:
    """What a fold does to a tensor, along `axis` from `start` on."""

    fold: Fold
    axis: int
    start: int
    divides: bool

    def factor(self, shape: tuple[int, ...], s: Tensor) -> Tensor:
        """What the tensor is multiplied by, or divided: as long as its axis, and broadcast over the others."""
        if not self.divides:
            s = s.view(-1, 1, self.fold.width).expand(-1, self.fold.repeats, -1).flatten()
        whole = s.new_ones(shape[self.axis])
        whole[self.start : self.start + len(s)] = s
        return whole.view([-1 if axis == self.axis else 1 for axis in range(len(shape))])


def _smoothed(
    name: str, changes: Sequence[_Change], settings: SmoothSettings, statistics: Statistics | None
) -> Callable[[Tensors], Tensors]:
    def function(tensors: Tensors) -> Tensors:
        import torch

        if statistics is None:
            raise InternalError(
                f"{name!r} was not measured", cause="a plan was evaluated as if it were a result",
                remedy="report this as a defect, with the manifest",
            )  # fmt: skip
        tensor = tensors[name]
        factors = [(c, c.factor(tuple(tensor.shape), _scales(c.fold, settings, statistics))) for c in changes]
        out = torch.empty_like(tensor)
        step = max(1, CHUNK // math.prod(tensor.shape[1:]))
        for start in range(0, len(tensor), step):
            part = tensor[start : start + step].float()
            for change, factor in factors:
                here = factor[start : start + step] if change.axis == 0 else factor
                part = part / here if change.divides else part * here
            out[start : start + step] = part.to(tensor.dtype)
        return {name: out}

    return function


def _scales(fold: Fold, settings: SmoothSettings, statistics: Statistics) -> Tensor:
    found = statistics.tensors
    return scales(found[f"{fold.module}.inputs"], found[f"{fold.module}.weights"], settings)


def _note(found: Sequence[Fold], settings: SmoothSettings, statistics: Statistics) -> str:
    """How far the largest activations came down."""
    inputs = [statistics.tensors[f"{fold.module}.inputs"] for fold in found]
    after = [x / _scales(fold, settings, statistics) for x, fold in zip(inputs, found, strict=True)]
    ratios = [
        float(y.max() / y.mean()) / float(x.max() / x.mean()) for x, y in zip(inputs, after, strict=True) if x.any()
    ]
    share = f"{median(ratios):.3g}" if ratios else "unknown"
    return f"smooth: the largest input over the mean channel's became x {share} (median of {len(found)} groups)"
