# SPDX-License-Identifier: Apache-2.0
"""Visual tokens that leave between layers: the columns of a call grow fewer at the entry of some decoder layers.

Layers before such a stage cache more columns than those from it on, while a model makes one mask and one table of
positions for all. Hooks before the layers cut both to what is left. What they have to know rides in a keyword argument,
which language models hand through to their layers, so that threads and recomputed layers find their own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .surgery_compatibility import sliding_window

RIDES = "surgery_visual_stages"
TRIED = "eager", "sdpa"  # attention whose masks are known

# Which columns stay, bool [B, L], of states [B, L, D] before a layer, where [B, L] are visual and others text.
Keep = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Left:
    """What is left from a stage on, [B, W], -1 for padding: columns of the stage before, and of the first layer."""

    before: Tensor
    first: Tensor


@dataclass
class Descent:
    """One call on its way through the layers.

    The first layer has `width` columns of a prompt, whose `padding`, `visual` and `text` [B, width] are, and `after`
    columns of what came later, `new` of them in this call. A prompt's call fills `left` on the way, by `keeps`.
    """

    stages: tuple[int, ...]
    width: int
    left: dict[int, Left]
    after: int = 0
    new: int = 0
    keeps: Mapping[int, Keep] = field(default_factory=dict)
    padding: Any = None
    visual: Any = None
    text: Any = None
    made: dict[tuple[int, int], Any] = field(default_factory=dict)  # by stage and identity: an argument, and it cut

    def without(self, stage: int, states: Tensor) -> Tensor:
        """States [B, L, D] that come to a stage, but for those that leave there."""
        if stage not in self.left:  # layers that are computed again find what was chosen
            self.left[stage] = self._leave(stage, states)
        return at_columns(states, self.left[stage].before, 1)

    @torch.no_grad()
    def _leave(self, stage: int, states: Tensor) -> Left:
        earlier = [self.left[other].first for other in self.stages if other < stage]
        whole = torch.arange(self.width, device=self.padding.device).masked_fill(self.padding, -1)
        here = (earlier[-1] if earlier else whole).to(states.device)
        at, there = here.clamp(min=0), here >= 0
        visual, text = (part.to(states.device).gather(1, at) & there for part in (self.visual, self.text))
        before = columns_of(there & ~visual | self.keeps[stage](states, visual, text))
        return Left(before, here.gather(1, before.clamp(min=0)).masked_fill(before < 0, -1))

    def cut(self, stage: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a layer from `stage` on, for what is left there; caches that grow need no `cache_position`."""
        first = self.left[stage].first
        cuts: dict[str, Callable[[Any], Any]] = {
            "attention_mask": lambda mask: cut_mask(mask, first, self.width, self.after, self.new)
        }
        if not self.new:  # what is new brings places of its own
            cuts["position_embeddings"] = lambda both: tuple(at_columns(one, first, -2) for one in both)
            cuts["position_ids"] = lambda places: places if places is None else at_columns(places, first, -1)
        kwargs = {name: value for name, value in kwargs.items() if name != "cache_position"}
        return kwargs | {name: self._once(stage, kwargs[name], make) for name, make in cuts.items() if name in kwargs}

    def _once(self, stage: int, value: Any, make: Callable[[Any], Any]) -> Any:
        key = stage, id(value)
        if key not in self.made:
            self.made[key] = value, make(value)
        return self.made[key][1]


def columns_of(keep: Tensor) -> Tensor:
    """Bool [B, L] -> the columns that stay in their order, padded on the left with -1: [B, W]."""
    width = int(keep.sum(1).max())
    order = keep.long().argsort(dim=1, stable=True)[:, -width:]
    return torch.where(keep.gather(1, order), order, -1)


def at_columns(values: Tensor, columns: Tensor, dim: int, batch: int | None = None) -> Tensor:
    """Values [..., B, L, ...] at columns [B, W] of the dimension `dim`; that of the batch is by default before it.

    What stands at padding (-1) is the first column's.
    """
    dim = dim % values.ndim
    batch = dim - 1 if batch is None else batch
    sizes, view = list(values.shape), [1] * values.ndim
    sizes[batch], view[batch], view[dim] = len(columns), *columns.shape
    index = columns.clamp(min=0).to(values.device).view(view)
    values = values.expand(sizes)
    sizes[dim] = columns.shape[1]
    return values.gather(dim, index.expand(sizes))


def cut_mask(mask: Any, first: Tensor, width: int, after: int, new: int) -> Any:
    """A model's mask for the columns [B, W] that are left of `width` in its first layer, and `after` later ones.

    Masks are [B, H, queries, keys], bool or what is added to attention; None hides only what comes later. Queries are
    the prompt's columns, or the last `new` ones.
    """
    if mask is None and not bool((first < 0).any()):
        return None
    count = width + after
    if mask is None:
        mask = torch.ones(count, count, dtype=torch.bool, device=first.device).tril()[None, None, -(new or count) :]
    later = torch.arange(width, count, device=first.device).expand(len(first), -1)
    keys = torch.cat([first, later], 1).to(mask.device)
    mask = at_columns(mask, keys, 3, batch=0)
    hidden, shown = (False, True) if mask.dtype == torch.bool else (torch.finfo(mask.dtype).min, 0.0)
    mask = mask.masked_fill((keys < 0)[:, None, None], hidden)
    if new:
        return mask
    own = torch.eye(keys.shape[1], dtype=torch.bool, device=mask.device) & (keys < 0)[:, None, :, None]
    return at_columns(mask, keys, 2, batch=0).masked_fill(own, shown)  # padding that sees nothing would be nan


def stand_before(layers: Any, stages: tuple[int, ...]) -> None:
    """Put hooks before decoder layers, which cut what they are given from each stage on."""
    for index, layer in enumerate(layers):
        stage = max((stage for stage in stages if stage <= index), default=None)
        layer.register_forward_pre_hook(partial(_enter, index, stage), with_kwargs=True)


def _enter(index: int, stage: int | None, _layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    descent = kwargs.get(RIDES)
    kwargs = {name: value for name, value in kwargs.items() if name != RIDES}
    if descent is None or stage is None:
        return args, kwargs
    if index == stage and not descent.new:
        args = (descent.without(stage, args[0]), *args[1:])
    return args, descent.cut(stage, kwargs)


def refuse_layers(model: Any, count: int) -> None:
    """Raise NotImplementedError for a language model whose layers cannot differ in what they hold of `count` tokens."""
    used = model.config._attn_implementation  # noqa: SLF001
    if used not in TRIED:
        raise NotImplementedError(
            f"visual tokens leave between layers under {' or '.join(TRIED)} attention, and this is {used}: load with "
            'attn_implementation="sdpa", or pass visual_reserve=1.0'
        )
    layers = enumerate(model.layers)
    windows = [sliding_window(model.config, index, getattr(layer, "self_attn", None)) for index, layer in layers]
    window = min((window for window in windows if window is not None), default=count)
    if count > window:
        raise NotImplementedError(
            f"{count} tokens are more than the sliding window of {window}, in which layers that hold fewer of them "
            "see farther: pass visual_reserve=1.0"
        )
