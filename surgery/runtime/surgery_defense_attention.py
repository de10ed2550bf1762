# SPDX-License-Identifier: Apache-2.0
"""How much a request attends to the tokens of an image: one pass of the model over its prompt says.

The kernel that runs is transformers' `sdpa`; beside it the weights of the rows that ask are computed, a few at a time,
so nothing is as large as a whole matrix of attention. Attention as the judge of an image's parts is ours, not AMIA's.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .surgery_defense_prompt import Owner, Prompt
from .surgery_defense_tiles import View, token_grid

ROWS = 128  # at a time
# Arguments of a model that say nothing of what a prompt shows.
UNREAD = frozenset({
    "input_ids", "attention_mask", "inputs_embeds", "past_key_values", "use_cache", "labels", "logits_to_keep",
    "output_attentions", "output_hidden_states", "return_dict", "visual_reserve", "position_ids", "cache_position",
})  # fmt: skip


@dataclass
class Look:
    """Columns of a row that ask and columns that show an image.

    `paid` [shown] is the attention that one pays to the other, a mean over heads and over what asks, summed over
    `layers`.
    """

    row: int
    asking: list[int]
    shown: list[int]
    paid: Any = 0.0
    layers: int = 0


_looks: ContextVar[Sequence[Look]] = ContextVar("surgery_defense_looks", default=())
# Under it transformers finds `_attend`; every checkpoint in a process brings a copy of this file, each with its own.
NAME = f"surgery_defense_attention_{id(_looks)}"


def attended(
    model: Any,
    seen: Sequence[View],
    owners: Sequence[Owner],
    prompts: Sequence[Prompt],
    ids: Tensor,
    kwargs: dict[str, Any],
) -> list[Tensor]:
    """The attention that visual tokens of each view get from the request of its owner [frames, rows, columns], float32.

    A mean over all layers and heads, and over the tokens of the request and those that end its turn. `model` is the one
    with the head; `kwargs` are what it would be called with on `ids` [B, L]. Raises NotImplementedError for attention
    that cannot be told apart, and ValueError where nothing stands behind an image.
    """
    if not seen:
        return []
    grids = [token_grid(view, kwargs, model.config) for view in seen]
    looks = [_look(model, *one) for one in zip(seen, owners, map(prod, grids), [prompts] * len(seen), strict=True)]
    inputs = {"input_ids": ids, **_inputs(model, prompts, ids, kwargs)}
    with _told(model.model.language_model, looks):
        model.model(**inputs, use_cache=False)
    if not all(one.layers for one in looks):
        raise NotImplementedError(
            "no layer of this model attends by the functions of transformers: pass masked_tiles, or convert with "
            "another scorer"
        )
    return [(one.paid / one.layers).unflatten(0, grid) for one, grid in zip(looks, grids, strict=True)]


def _inputs(model: Any, prompts: Sequence[Prompt], ids: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the model reads beside ids: all visual tokens, whatever pruning would drop, and places without padding."""
    names = inspect.signature(model.forward).parameters.keys()
    inputs = {name: value for name, value in kwargs.items() if name in names - UNREAD}
    inputs["attention_mask"] = mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        mask[row, prompt.columns] = 1
    if "image_grid_thw" not in names:  # these find places in three directions by themselves
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if "visual_reserve" in names:
        inputs["visual_reserve"] = 1.0
    return inputs


def _look(model: Any, view: View, owner: Owner, count: int, prompts: Sequence[Prompt]) -> Look:
    """What asks about a view: its request, and what ends that turn, where the answer is prepared."""
    settings, prompt, request = model.config.surgery["visual_defense"], prompts[owner.row], owner.request
    placeholder, first = prompt.ids[owner.at], _class_tokens(model) if view.kind == "image" else 0
    shown = [at for at, token in enumerate(prompt.ids) if token == placeholder and at >= owner.at]
    shown = shown[first : first + count]
    if len(shown) < count:
        raise ValueError(
            f"the {view.kind} in row {owner.row} has {count} tokens, and {len(shown)} places in the prompt: pass what "
            "the processor made"
        )
    end = min(request.end + len(settings["turn"]["close"]), len(prompt.ids))
    asking = [at for at in range(max(request.start, shown[-1]), end) if prompt.ids[at] not in settings["token_ids"]]
    if not asking:
        raise ValueError(
            f"nothing stands behind the {view.kind} in row {owner.row}: make the prompt with the base's chat template "
            "and add_generation_prompt=True, or pass defense=False"
        )
    return Look(owner.row, [prompt.columns[at] for at in asking], [prompt.columns[at] for at in shown])


def _class_tokens(model: Any) -> int:
    """How many tokens of an image stand for no place in it: the tower's first, where it has one that is kept."""
    if getattr(model.config, "vision_feature_select_strategy", None) != "full":
        return 0
    return sum("class_embedding" in name for name, _ in model.model.vision_tower.named_parameters())


@contextmanager
def _told(language_model: Any, looks: Sequence[Look]) -> Iterator[None]:
    """Inside, layers attend by `_attend`, which keeps what `looks` want."""
    found: list[Any] = [getattr(module, "config", None) for module in language_model.modules()]
    configs = list({id(config): config for config in found if hasattr(config, "_attn_implementation")}.values())
    before = [config._attn_implementation for config in configs]  # noqa: SLF001 - there is no other way to say it
    token = _looks.set(looks)
    try:
        for config in configs:
            config._attn_implementation = NAME  # noqa: SLF001
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name  # noqa: SLF001
        _looks.reset(token)


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """As `sdpa`: query [B, H, L, d], key and value [B, G, L, d]."""
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{type(module).__name__} has {name} in its attention, which is not told apart: pass masked_tiles, or "
                "convert with another scorer"
            )
    scaling = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
    for one in _looks.get():
        paid = _paid(query[one.row], key[one.row], _mask_of(attention_mask, one.row), one.asking, scaling)[one.shown]
        one.paid, one.layers = paid + (one.paid.to(paid.device) if one.layers else 0), one.layers + 1
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


def _mask_of(mask: Tensor | None, row: int) -> Tensor | None:
    """[L, L] of one row; None where a token simply sees what is before it."""
    return None if mask is None else mask[row if len(mask) > 1 else 0, 0]


def _paid(query: Tensor, key: Tensor, mask: Tensor | None, asking: list[int], scaling: float) -> Tensor:
    """Attention that the tokens `asking` pay to each [L], a mean over them and heads [H, L, d]; keys [G, L, d]."""
    keys, paid = key.float()[:, None].transpose(-1, -2), torch.zeros(key.shape[1], device=key.device)
    for rows in torch.tensor(asking, device=key.device).split(ROWS):
        weights = query[:, rows].float().unflatten(0, (len(key), -1)) @ keys * scaling
        seen = torch.arange(key.shape[1], device=key.device) <= rows[:, None] if mask is None else mask[rows]
        hidden = torch.zeros(seen.shape, device=key.device).masked_fill(~seen, float("-inf"))
        paid += (weights + hidden).softmax(-1).mean((0, 1)).sum(0)
    return paid / len(asking)


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
