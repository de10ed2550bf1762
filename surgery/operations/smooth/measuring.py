"""What `smooth` measures: the largest magnitude of each channel, in one pass over the text and one over weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from surgery.calibration.layers import decoder, input_device
from surgery.operations.base import Measuring, Statistics
from surgery.operations.smooth.folds import Fold, SmoothSettings, folds, unfit

BATCH = 4


def largest_magnitudes(measuring: Measuring, settings: SmoothSettings) -> Statistics:
    """The largest magnitude of each channel, of activations and of the weights that read it."""
    found = folds(measuring.model, settings)
    batches, done = measuring.windows.split(BATCH), 0
    tensors: dict[str, Tensor] = {}
    with _largest(measuring.network, found) as seen, torch.no_grad():
        for done, batch in enumerate(batches, start=1):
            decoder(measuring.network)(input_ids=batch.to(input_device(measuring.network)), use_cache=False)
            measuring.progress(done, len(batches) + len(found))
    for number, fold in enumerate(found, start=1):
        tensors[f"{fold.module}.inputs"] = _gathered(seen[fold.module], fold)
        weights = [_magnitude(measuring.tensor(name), axis) for name, axis in fold.read.items()]
        tensors[f"{fold.module}.weights"] = _gathered(torch.stack(weights).amax(0), fold)
        measuring.progress(done + number, len(batches) + len(found))
    return Statistics(tensors, {})


@contextmanager
def _largest(network: Any, found: Sequence[Fold]) -> Iterator[dict[str, Tensor]]:
    """While it is open: the largest magnitude so far of each measured channel, by module."""
    seen: dict[str, Tensor] = {}

    def note(fold: Fold, value: Tensor) -> None:
        new = _magnitude(value.flatten(0, -2), 1)
        seen[fold.module] = new.maximum(seen[fold.module]) if fold.module in seen else new

    def hooked(fold: Fold) -> Any:
        try:
            module = network.get_submodule(fold.module)
        except AttributeError as error:
            raise unfit(f"the installed transformers has no module {fold.module!r} in it") from error
        if fold.inputs:
            return module.register_forward_pre_hook(lambda _, entering: note(fold, entering[0]))
        return module.register_forward_hook(lambda _, __, out: note(fold, out))

    handles = [hooked(fold) for fold in found]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _magnitude(tensor: Tensor, axis: int) -> Tensor:
    """The largest magnitude along each channel of `axis`."""
    others = [other for other in range(tensor.ndim) if other != axis]
    return tensor.amax(others).maximum(-tensor.amin(others)).float().cpu()


def _gathered(largest: Tensor, fold: Fold) -> Tensor:
    """Of channels that are read several times, the largest."""
    return largest.view(-1, fold.repeats, fold.width).amax(1).flatten()
