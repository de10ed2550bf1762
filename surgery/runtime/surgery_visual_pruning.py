# SPDX-License-Identifier: Apache-2.0
"""Visual tokens that a question does not need leave the prompt before the first layer of the language model.

The vision tower, the placeholders and what merges them are the base's. A hook stands before the language model inside,
drops columns of its input there, and remembers on the cache which; tokens that stay keep their positions, so the result
is that of the base with the dropped tokens masked. Source: CoViPAL (arXiv 2508.17243). With `stages` tokens also leave
before deeper layers, chosen by what the layers so far made of them.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StaticCache

from .surgery_visual_scorer import VisualScorer, best, diverse, reserved, runs
from .surgery_visual_stages import RIDES, Descent, Left, at_columns, columns_of, refuse_layers, stand_before

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
    kept: Tensor | None = None  # columns of the prompt [B, L'], -1 for padding: those of the logits, in the end
    pruned: "Pruned | None" = None  # for the cache


@dataclass(frozen=True)
class Pruned:
    """What calls that go on from a pruned cache have to know.

    `mask` [B, L'] is that of the columns that stayed, of `length` there were; a column of the cache stands `ahead` [B]
    places later than its number says. `parts` is how many rows positions have, where they have several. `left` is what
    layers from a stage on cache.
    """

    mask: Tensor
    length: int
    ahead: Tensor
    parts: int
    left: dict[int, Left]


_call: ContextVar[Call | None] = ContextVar("surgery_visual_call", default=None)


@contextmanager
def _calling(call: Call) -> Iterator[Call]:
    token = _call.set(call)
    try:
        yield call
    finally:
        _call.reset(token)


def checked_reserve(value: Any, settings: dict[str, Any]) -> float:
    """A share of visual tokens, by default that of the settings. Raises ValueError where it is none."""
    if value is None:
        value = settings["reserve"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(
            f"visual_reserve is {value!r}, and must be a number above 0 and at most 1; for no visual tokens leave the "
            "image out"
        )
    if settings.get("stages") and value not in {settings["reserve"], 1}:
        raise ValueError(
            f"visual_reserve is {value!r}, and this model drops tokens layer by layer, down to {settings['reserve']}: "
            "leave it out, or pass 1.0 for all of them"
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
        settings, size = config.surgery["visual_pruning"], config.get_text_config().hidden_size
        stages = stages_of(settings)
        if settings["scorer"] is not None and stages:
            scorers = {str(stage): VisualScorer(size, **settings["scorer"]) for stage in stages}
            self.visual_scorer = torch.nn.ModuleDict(scorers)
        elif settings["scorer"] is not None:
            self.visual_scorer = VisualScorer(size, **settings["scorer"])
        self.language_model.register_forward_pre_hook(self._prune, with_kwargs=True)
        if deeper := tuple(stage for stage in stages if stage):
            stand_before(self.language_model.layers, deeper)

    def forward(self: Any, *args: Any, visual_reserve: float | None = None, **kwargs: Any) -> Any:
        """As the native model; the model with a head around it may have said how much to keep."""
        kwargs = _named(super().forward, args, kwargs)  # type: ignore[misc]
        reserve = checked_reserve(visual_reserve, self.config.surgery["visual_pruning"])
        call = _call.get() or Call(reserve, visual=self.visual_tokens(kwargs))
        with _calling(call):
            output = super().forward(**kwargs)  # type: ignore[misc]
        if call.kept is None or call.pruned is None:  # both or neither
            return output
        if left := call.pruned.left:
            last = left[max(left)].first.to(call.kept.device)
            call.kept = call.kept.gather(1, last.clamp(min=0)).masked_fill(last < 0, -1)
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

    def choose(self: Any, visual: Tensor, text: Tensor, count: int, layer: int = 0) -> Tensor:
        """Of an image's tokens [V, D] before a layer, the `count` that a text [T, D] needs: ascending indices."""
        settings = self.config.surgery["visual_pruning"]
        if count == len(visual):
            return torch.arange(count, device=visual.device)
        if settings["scorer"] is None:
            return diverse(visual, count)
        scorer = self.visual_scorer[str(layer)] if stages_of(settings) else self.visual_scorer
        return best(scorer(visual, text), count)

    @torch.no_grad()
    def _kept(
        self: Any,
        sizes: Sequence[Sequence[int]],
        reserve: float,
        layer: int,
        states: Tensor,
        visual: Tensor,
        text: Tensor,
    ) -> Tensor:
        """Which visual columns stay, bool [B, L]: of each image, which had so many tokens once, its share."""
        keep, least = torch.zeros_like(visual), self.config.surgery["visual_pruning"]["min_keep"]
        for row, sizes_here in enumerate(sizes):
            for image, size in zip(runs(visual[row]), sizes_here, strict=True):
                count = reserved(size, reserve, least)
                keep[row, image[self.choose(states[row, image], states[row, text[row]], count, layer)]] = True
        return keep

    def _prune(self: Any, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the language model: go on from a pruned cache, or prune."""
        call, cache = _call.get(), kwargs.get("past_key_values")
        embeds: Any = kwargs.get("inputs_embeds")
        past = int(cache.get_seq_length()) if cache is not None else 0
        if (mark := getattr(cache, PRUNED, None)) is not None:
            _whole(mark, cache, past)
        if not past and mark is not None:
            setattr(cache, PRUNED, None)  # it was emptied
        elif mark is not None:
            if call is not None and call.visual is not None:
                raise NotImplementedError(
                    "visual tokens after a prompt that was pruned: pass the whole conversation without past_key_values"
                )
            if mark.left:
                refuse_layers(self.language_model, past + embeds.shape[1])
            return args, _continued(mark, past, embeds, kwargs)
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
        stages = stages_of(self.config.surgery["visual_pruning"]) or {0: call.reserve}
        sizes = [[len(image) for image in runs(row)] for row in visual]
        keeps = {layer: partial(self._kept, sizes, share, layer) for layer, share in stages.items()}
        keep = keeps.pop(0)(embeds, visual, text) if 0 in keeps else visual
        kept = call.kept = columns_of(valid & ~visual | keep)
        kwargs = _compacted(call, valid, embeds, kwargs)
        if keeps:
            refuse_layers(self.language_model, kept.shape[1])
            pruned: Any = call.pruned
            visual, text = (part.gather(1, kept.clamp(min=0)) & (kept >= 0) for part in (visual, text))
            kwargs[RIDES] = Descent(tuple(keeps), kept.shape[1], pruned.left, 0, 0, keeps, kept < 0, visual, text)
        return args, kwargs


def stages_of(settings: dict[str, Any]) -> dict[int, float]:
    """The layers before which tokens leave, ascending, and the share that is left there; {} for the entry alone."""
    return {int(layer): share for layer, share in (settings.get("stages") or {}).items()}


def _whole(mark: Pruned, cache: Any, past: int) -> None:
    """Raise where columns of a pruned prompt were taken from the cache, or from some of its layers."""
    after = past - mark.mask.shape[1]
    expected = {0: mark.mask.shape[1], **{layer: left.first.shape[1] for layer, left in mark.left.items()}}
    found = {layer: int(cache.get_seq_length(layer)) for layer in expected}
    if any(found.values()) and (after < 0 or any(found[layer] != width + after for layer, width in expected.items())):
        raise NotImplementedError("a pruned prompt cannot be cropped: pass the whole of it again")


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
    call.pruned = Pruned(mask, length, ahead, len(position) if position.ndim > 2 else 0, {})
    kwargs = {name: value for name, value in kwargs.items() if name != "cache_position"}
    kwargs |= {
        "inputs_embeds": at_columns(embeds, kept, 1),
        "attention_mask": mask,
        "position_ids": at_columns(position, kept, -1),
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
    if mark.left:
        kwargs[RIDES] = Descent(tuple(mark.left), mark.mask.shape[1], mark.left, after, count)
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
        call = Call(checked_reserve(reserve, self.config.surgery["visual_pruning"]))
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
        reserve = checked_reserve(kwargs.get("visual_reserve"), self.config.surgery["visual_pruning"])
        given = kwargs if inputs is None else kwargs | {"input_ids": inputs}
        cache: Any = kwargs.get("past_key_values")
        if getattr(cache, PRUNED, None) is not None and cache.get_seq_length():
            raise NotImplementedError(
                "generate cannot go on from a pruned cache: pass the whole conversation without past_key_values"
            )
        if reserve < 1 and self.model.visual_tokens(given) is not None:
            _refuse(kwargs, self.generation_config if generation_config is None else generation_config)
        return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]


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
