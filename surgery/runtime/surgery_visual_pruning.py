# SPDX-License-Identifier: Apache-2.0
"""Visual tokens that a question does not need leave the prompt before the first layer of the language model.

The vision tower, the placeholders and what merges them are the base's. A hook stands before the language model inside,
drops columns of its input there, and remembers on the cache which; tokens that stay keep their positions, so the result
is that of the base with the dropped tokens masked. Source: CoViPAL (arXiv 2508.17243).
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StaticCache

from .surgery_visual_scorer import VisualScorer, best, diverse, reserved, runs

PIXELS = "pixel_values", "pixel_values_videos", "mm_encoder_outputs"
PRUNED = "surgery_visual_pruning"  # where a cache carries what was dropped from it
GROWING = None, "dynamic", "dynamic_full", "offloaded", "quantized"  # caches without a fixed size
IGNORED = -100  # a label that is none


@dataclass
class Call:
    """One call of the model: the share of visual tokens that stays, where they are, and what became of the columns."""

    reserve: float
    labels: Tensor | None = None
    visual: Tensor | None = None  # bool [B, L]
    kept: Tensor | None = None  # columns of the prompt [B, L'], -1 for padding
    pruned: "Pruned | None" = None  # for the cache


@dataclass(frozen=True)
class Pruned:
    """What calls that go on from a pruned cache have to know.

    `mask` [B, L'] is that of the columns that stayed, of `length` there were; a column of the cache stands `ahead` [B]
    places later than its number says. `parts` is how many rows positions have, where they have several.
    """

    mask: Tensor
    length: int
    ahead: Tensor
    parts: int


_call: ContextVar[Call | None] = ContextVar("surgery_visual_call", default=None)


@contextmanager
def _calling(call: Call) -> Iterator[Call]:
    token = _call.set(call)
    try:
        yield call
    finally:
        _call.reset(token)


def checked_reserve(value: Any) -> float:
    """A share of visual tokens. Raises ValueError where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(
            f"visual_reserve is {value!r}, and must be a number above 0 and at most 1; for no visual tokens leave the "
            "image out"
        )
    return float(value)


class _Whole:
    """Loads all of the scorer or nothing: transformers would fill what is missing with random numbers."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As the native model. Raises ValueError where weights of the scorer are missing."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        missing = sorted(name for name in info["missing_keys"] if "visual_scorer." in name)
        if missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} weights of its scorer of visual tokens, such as {missing[0]}"
            )
        return (model, info) if output_loading_info else model


class VisualPruning(_Whole):
    """Stands before a native model with vision tower and language model among the bases of a class."""

    def __init__(self: Any, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        settings = config.surgery["visual_pruning"]
        if settings["scorer"] is not None:
            self.visual_scorer = VisualScorer(config.get_text_config().hidden_size, **settings["scorer"])
        self.language_model.register_forward_pre_hook(self._prune, with_kwargs=True)

    def forward(self: Any, *args: Any, visual_reserve: float | None = None, **kwargs: Any) -> Any:
        """As the native model; the model with a head around it may have said how much to keep."""
        kwargs = _named(super().forward, args, kwargs)  # type: ignore[misc]
        reserve = self.config.surgery["visual_pruning"]["reserve"] if visual_reserve is None else visual_reserve
        call = _call.get() or Call(checked_reserve(reserve), visual=self.visual_tokens(kwargs))
        with _calling(call):
            output = super().forward(**kwargs)  # type: ignore[misc]
        if call.kept is None:
            return output
        for value in output if isinstance(output, tuple) else output.values():
            if isinstance(value, Cache):
                setattr(value, PRUNED, call.pruned)
        if not isinstance(output, tuple):
            output.kept_indices = call.kept
        return output

    def visual_tokens(self: Any, inputs: dict[str, Any]) -> Tensor | None:
        """Where placeholders are filled from pixels among `inputs`, bool [B, L]; None where nowhere.

        They are found by their ids, or by their embeddings where those are given instead.
        """
        if all(inputs.get(name) is None for name in PIXELS):
            return None
        input_ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        tokens = self.config.surgery["visual_pruning"]["token_ids"]
        if input_ids is not None:
            found = torch.isin(input_ids, torch.tensor(tokens, device=input_ids.device))
        elif embeds is None:
            return None
        else:
            rows = self.get_input_embeddings()(torch.tensor(tokens, device=embeds.device))
            found = (embeds[:, :, None] == rows).all(-1).any(-1)
        return found if bool(found.any()) else None

    def choose(self: Any, visual: Tensor, text: Tensor, reserve: float) -> Tensor:
        """Of an image's tokens [V, D], those that a text [T, D] needs: ascending indices."""
        settings = self.config.surgery["visual_pruning"]
        count = reserved(len(visual), reserve, settings["min_keep"])
        if count == len(visual):
            return torch.arange(count, device=visual.device)
        if settings["scorer"] is None:
            return diverse(visual, text, count)
        return best(self.visual_scorer(visual, text), count)

    @torch.no_grad()
    def _kept(self: Any, embeds: Tensor, visual: Tensor, text: Tensor, reserve: float) -> Tensor:
        """Which columns stay, bool [B, L]: no padding, all text, and of each image its share."""
        keep = torch.zeros_like(visual)
        for row in range(len(embeds)):
            for image in runs(visual[row]):
                chosen = self.choose(embeds[row, image], embeds[row, text[row]], reserve)
                keep[row, image[chosen]] = True
        return keep

    def _prune(self: Any, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the language model: go on from a pruned cache, or prune."""
        call, cache, embeds = _call.get(), kwargs.get("past_key_values"), kwargs.get("inputs_embeds")
        past = cache.get_seq_length() if cache is not None else 0
        if not past and getattr(cache, PRUNED, None) is not None:
            setattr(cache, PRUNED, None)  # it was emptied
        if (mark := getattr(cache, PRUNED, None)) is not None:
            if call is not None and call.visual is not None:
                raise NotImplementedError(
                    "visual tokens after a prompt that was pruned: pass the whole conversation without past_key_values"
                )
            if past < mark.mask.shape[1]:
                raise NotImplementedError("a pruned prompt cannot be cropped: pass the whole of it again")
            return args, _continued(mark, int(past), embeds, kwargs)
        if call is None or call.visual is None or embeds is None or call.reserve >= 1:
            return None
        if past:
            raise NotImplementedError(
                "an image after what is cached already cannot be pruned: pass visual_reserve=1.0, or the whole prompt"
            )
        if isinstance(cache, StaticCache) or getattr(cache, "is_compileable", False):
            raise NotImplementedError("a static cache has one size for all prompts: pass visual_reserve=1.0 with it")
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            raise NotImplementedError("visual tokens are pruned under a mask of [batch, tokens], or none")
        valid = torch.ones_like(call.visual) if mask is None else mask.bool()
        visual = call.visual & valid
        text = valid & ~visual
        if call.labels is not None:  # answers that are being learned must not choose
            asked = text & (call.labels == IGNORED)
            text = torch.where(asked.any(1, keepdim=True), asked, text)
        keep = valid & ~visual | self._kept(embeds, visual, text, call.reserve)
        call.kept = _columns(keep)
        return args, _compacted(call, valid, embeds, kwargs)


def _columns(keep: Tensor) -> Tensor:
    """Bool [B, L] -> the columns that stay in their order, padded on the left with -1: [B, L']."""
    width = int(keep.sum(1).max())
    order = keep.long().argsort(dim=1, stable=True)[:, -width:]
    return torch.where(keep.gather(1, order), order, -1)


def _compacted(call: Call, valid: Tensor, embeds: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the language model with only the columns that stay."""
    kept: Any = call.kept
    at, mask = kept.clamp(min=0), (kept >= 0).to(torch.long)
    position, length = kwargs.get("position_ids"), valid.shape[1]
    if position is None:
        position = torch.arange(length, device=embeds.device)[None]
    position = position.expand(*position.shape[:-2], len(kept), -1)
    places = position.masked_fill(~valid.to(position.device), 0)
    if position.ndim > 2:  # several rows: time, height and width, before which a row may count columns
        places = places[-3:].amax(0)
    ahead = places.amax(-1) + 1 - kept.shape[1]
    call.pruned = Pruned(mask, length, ahead, len(position) if position.ndim > 2 else 0)
    kwargs = {name: value for name, value in kwargs.items() if name != "cache_position"}
    kwargs |= {
        "inputs_embeds": embeds.gather(1, at[..., None].expand(-1, -1, embeds.shape[-1])),
        "attention_mask": mask,
        "position_ids": position.gather(-1, at.expand(*position.shape[:-2], -1, -1)),
    }
    if kwargs.get("visual_pos_masks") is not None:  # features that deeper layers add to visual tokens (DeepStack)
        visual: Any = call.visual
        stays = torch.zeros_like(visual).scatter_(1, at, kept >= 0)
        rows = stays[visual]
        kwargs["visual_pos_masks"] = visual.gather(1, at) & (kept >= 0)
        kwargs["deepstack_visual_embeds"] = [layer[rows] for layer in kwargs["deepstack_visual_embeds"]]
    return kwargs


def _continued(mark: Pruned, past: int, embeds: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the language model for tokens after a pruned prompt: places, and a mask as wide as the cache."""
    count, after = embeds.shape[1], past + embeds.shape[1] - mark.mask.shape[1]
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = mark.mask.new_ones(len(embeds), after)
    elif mask.ndim != 2 or mask.shape[1] not in {past + count, mark.length + after}:  # as generate, or one's own loop
        raise ValueError(
            f"the attention mask is {list(mask.shape)}: [batch, tokens] is wanted, of the {past + count} in the cache "
            f"or the {mark.length + after} there were"
        )
    mask = torch.cat([mark.mask, mask[:, mask.shape[1] - after :].to(mark.mask)], 1)
    position = torch.arange(past, past + count, device=embeds.device) + mark.ahead.to(embeds.device)[:, None]
    if mark.parts:
        position = position.expand(mark.parts, -1, -1)
    kwargs = {name: value for name, value in kwargs.items() if name != "cache_position"}
    return kwargs | {"attention_mask": mask, "position_ids": position}


def _named(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by their names."""
    return dict(**inspect.signature(function).bind_partial(*args).arguments, **kwargs) if args else kwargs


class VisualPruningGeneration(_Whole):
    """Stands before a native model with a language head among the bases of a class."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let `forward` name what the native one takes, as transformers looks its names up, and one more."""
        super().__init_subclass__(**kwargs)
        native: Any = super().forward  # type: ignore[misc]
        names = dict(inspect.signature(native).parameters)
        last = names.popitem() if list(names.values())[-1].kind is inspect.Parameter.VAR_KEYWORD else None
        names["visual_reserve"] = inspect.Parameter(
            "visual_reserve", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=float | None
        )

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return VisualPruningGeneration._forward(self, *args, **kwargs)

        forward.__doc__ = VisualPruningGeneration._forward.__doc__
        forward.__signature__ = inspect.Signature([*names.values(), *([last[1]] if last else [])])  # type: ignore[attr-defined]
        cls.forward = forward  # type: ignore[attr-defined]

    def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the native model; `visual_reserve` is the share of visual tokens that stays, 1.0 the base exactly.

        Logits are those of the columns that stay; `kept_indices` of the output says which (-1 for padding).
        """
        native: Any = super().forward  # type: ignore[misc]
        kwargs = _named(native, args, kwargs)
        labels, reserve = kwargs.get("labels"), kwargs.pop("visual_reserve", None)
        call = Call(checked_reserve(self.config.surgery["visual_pruning"]["reserve"] if reserve is None else reserve))
        call.labels, call.visual = labels, self.model.visual_tokens(kwargs)
        if call.reserve < 1 and call.visual is not None:
            kwargs.pop("labels", None)
            if isinstance(kwargs.get("logits_to_keep"), Tensor):
                raise NotImplementedError("columns move when tokens are pruned: give logits_to_keep as a number")
        with _calling(call):
            output = native(**kwargs)
        if call.kept is None:
            return output
        if labels is not None:
            kept = labels.gather(1, call.kept.clamp(min=0)).masked_fill(call.kept < 0, IGNORED)
            counted = {name: kwargs[name] for name in ("num_items_in_batch",) if name in kwargs}
            size = self.config.get_text_config().vocab_size
            loss = self.loss_function(logits=output[0], labels=kept, vocab_size=size, **counted)
            output = (loss, *output) if isinstance(output, tuple) else type(output)(loss=loss, **output)
        if not isinstance(output, tuple):
            output.kept_indices = call.kept
        return output

    def generate(self: Any, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As `generate` of transformers. Raises for what cannot follow a pruned prompt."""
        reserve = kwargs.get("visual_reserve")
        reserve = checked_reserve(self.config.surgery["visual_pruning"]["reserve"] if reserve is None else reserve)
        given = kwargs if inputs is None else kwargs | {"input_ids": inputs}
        cache: Any = kwargs.get("past_key_values")
        if getattr(cache, PRUNED, None) is not None and cache.get_seq_length():
            raise NotImplementedError(
                "generate cannot go on from a pruned cache: pass the whole conversation without past_key_values"
            )
        if reserve < 1 and self.model.visual_tokens(given) is not None:
            _refuse(kwargs, self.generation_config if generation_config is None else generation_config)
        return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]

    def _update_model_kwargs_for_generation(
        self: Any, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The mask of the columns that stayed takes the place of the prompt's."""
        cache = outputs.get("past_key_values")
        mark = getattr(cache, PRUNED, None)
        if mark is not None and cache.get_seq_length() == mark.mask.shape[1]:
            model_kwargs["attention_mask"] = mark.mask
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)  # type: ignore[misc]


def _refuse(kwargs: dict[str, Any], config: Any) -> None:
    """Raise for kinds of generation that count on every token of the prompt being cached."""
    if kwargs.get("assistant_model") is not None:  # it would be given visual_reserve too
        raise NotImplementedError(
            'assistant_model needs the whole prompt in the cache: set config.surgery["visual_pruning"]["reserve"] = 1.0'
        )
    for name in ("prompt_lookup_num_tokens", "assistant_early_exit", "prefill_chunk_size"):
        if kwargs.get(name, getattr(config, name, None)):
            raise NotImplementedError(f"{name} needs the whole prompt in the cache: pass visual_reserve=1.0 with it")
    if kwargs.get("use_cache", getattr(config, "use_cache", None)) is False:
        raise NotImplementedError("without a cache every new token would choose anew: pass visual_reserve=1.0 with it")
    kind = kwargs.get("cache_implementation", getattr(config, "cache_implementation", None))
    if kind not in GROWING:
        raise NotImplementedError(f"a {kind} cache has one size for all prompts: pass visual_reserve=1.0 with it")
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask[:, -1].bool().all()):
        raise ValueError("prompts are padded on the right: set padding_side of the tokenizer to left")
