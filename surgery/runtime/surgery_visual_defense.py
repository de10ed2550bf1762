# SPDX-License-Identifier: Apache-2.0
"""`generate` that paints over what a request does not need, and lets the model state the intention before it answers.

Method: AMIA (arXiv 2505.24519), in one generation and without training. The relevance of tiles, the wording and all
that the paper's abstract does not say are ours. A call of the model alone is that of the base.
"""

import inspect
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationMixin, StoppingCriteriaList

from .surgery_defense_attention import attended
from .surgery_defense_clip import ClipRelevance
from .surgery_defense_prompt import (
    NEW,
    Answered,
    AnswerStreamer,
    Owner,
    Parser,
    Prompt,
    eos_of,
    is_wrapped,
    limit_of,
    pad_of,
    padded,
    requests,
    setting,
    wrapped,
)  # fmt: skip
from .surgery_defense_tiles import (
    PIXELS,
    View,
    checked_tiles,
    least,
    own_relevance,
    paint,
    runs_of,
    tile_scores,
    token_grid,
    views,
    visual_tokens,
)  # fmt: skip

PLACED = "position_ids", "cache_position"  # what goes by places in a prompt
ENDS_ROWS = "assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"

_inside: ContextVar[bool] = ContextVar("surgery_defense_inside", default=False)


@dataclass(frozen=True)
class Masks:
    """The tiles of each image and clip that are painted black, and the scores [N] that say so."""

    views: list[View]
    tiles: list[list[int]]
    scores: list[Tensor | None]  # None where the caller said so, or nothing is asked
    rows: list[int]  # the prompt of each


class VisualDefenseGeneration:
    """Stands before a native model with a language head among the bases of a class."""

    def __init__(self: Any, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        size = config.surgery["visual_defense"].get("clip")
        if size is not None:
            self.defense_clip = ClipRelevance(size)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As the native model. Raises ValueError where weights of CLIP are missing: they would be random numbers."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        missing = sorted(name for name in info["missing_keys"] if "defense_clip." in name)
        if missing:
            raise ValueError(f"the checkpoint lacks {len(missing)} tensors of its CLIP, such as {missing[0]}")
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def generate(
        self: Any,
        inputs: Any = None,
        generation_config: Any = None,
        *args: Any,
        defense: bool = True,
        masked_tiles: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As `generate` of transformers, defended; `defense=False` is the base exactly.

        `masked_tiles` has, for each image and then each clip of the batch, the tiles to paint black in place of those
        that the scorer would choose. Sequences are the prompt as it was given and the answer; the intention analysis
        before it is cut out, and max_new_tokens bounds the answer. With return_dict_in_generate the output has
        `defense`: for each sequence `analysis_ids`, `tag_found`, `masked_tiles`, `scores` and `request_empty`.
        """
        settings = self.config.surgery["visual_defense"]
        analysed = settings["intention_analysis"]
        masks = settings["masked_patches"] > 0 and any(kwargs.get(name) is not None for name in PIXELS.values())
        if not isinstance(defense, bool):
            raise ValueError(f"defense is {defense!r}, and must be True or False")  # noqa: TRY004
        if not defense and masked_tiles is not None:
            raise ValueError("masked_tiles are for a defended call: leave them out with defense=False")
        if _inside.get() or not defense or not (analysed or masks or masked_tiles is not None):
            return self._native(inputs, generation_config, *args, **kwargs)
        kwargs |= dict(zip([*inspect.signature(GenerationMixin.generate).parameters][3:], args, strict=False))
        ids = _checked(inputs if inputs is not None else kwargs.pop("input_ids", None), kwargs)
        kwargs.pop("input_ids", None)
        prompts = self._prompts(ids, kwargs, generation_config)
        found = Masks([], [], [], [])
        if masks or masked_tiles is not None:
            found = self._masks(ids, prompts, kwargs, masked_tiles)
            self._paint(found, kwargs)
        if not analysed:
            return self._told(self._native(ids, generation_config, **kwargs), found, prompts)
        return self._analysed(ids, prompts, found, generation_config, kwargs)

    def _analysed(
        self: Any, given: Tensor, prompts: list[Prompt], found: Masks, generation_config: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Generate with the analysis before the answer, and return the answer."""
        configs = [config for config in (generation_config, self.generation_config) if config is not None]
        parser = self._parser(limit_of(kwargs, configs, given.shape[1]), kwargs, configs)
        ids = self._wrap(given, prompts, found, kwargs, pad_of(kwargs, configs))
        self._fits(ids.shape[1], given.shape[1])
        count = parser.limit + self.config.surgery["visual_defense"]["analysis_tokens"]
        kwargs.pop("max_length", None)
        if generation_config is None:
            kwargs["max_new_tokens"] = count
        else:  # with settings beside it, some releases complain
            generation_config = copy(generation_config)
            generation_config.max_new_tokens = count
            kwargs.pop("max_new_tokens", None)
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = AnswerStreamer(kwargs["streamer"], given, parser)
        plain = setting(kwargs, configs, "num_beams") in {None, 1}
        if plain and not any(setting(kwargs, configs, name) for name in ENDS_ROWS):
            own = [*(kwargs.get("stopping_criteria") or []), Answered(parser, ids.shape[1])]
            kwargs["stopping_criteria"] = StoppingCriteriaList(own)
        output = self._native(ids, generation_config, **kwargs)
        return self._answered(output, ids.shape[1], given, parser, found, prompts, pad_of(kwargs, configs))

    def _native(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The base's `generate`, in which no further call is defended: drafts go on from a prompt as it is."""
        token = _inside.set(True)
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            _inside.reset(token)

    def set_defense_templates(self: Any, tokenizer: Any, templates: dict[str, str]) -> None:
        """Put other texts before requests: `masked`, `unmasked` and `text_only`, as many of them as are given.

        `tokenizer` is the model's. Raises ValueError for other names, and for texts without the final tag.
        """
        stored = self.config.surgery["visual_defense"]["templates"]
        tag = self.config.surgery["visual_defense"]["final_tag"]
        for name, text in templates.items():
            if name not in stored:
                raise ValueError(f"there is no template {name!r}: there are {', '.join(stored)}")
            if tag not in text:
                raise ValueError(f"template {name!r} does not ask for {tag}, by which the answer is found: add it")
            stored[name] = {"text": text, "ids": tokenizer(text, add_special_tokens=False)["input_ids"]}

    def _prompts(self: Any, ids: Tensor, kwargs: dict[str, Any], generation_config: Any) -> list[Prompt]:
        settings, mask = self.config.surgery["visual_defense"], kwargs.get("attention_mask")
        if mask is None:  # as transformers infers it
            configs = [config for config in (generation_config, self.generation_config) if config is not None]
            pad = pad_of(kwargs, configs)
            mask = ids != pad if pad is not None and pad not in eos_of(kwargs, configs) else torch.ones_like(ids)
        rows = []
        for row, valid in zip(ids.tolist(), mask.bool().tolist(), strict=True):
            columns = [column for column, there in enumerate(valid) if there]
            tokens = [row[column] for column in columns]
            rows.append(Prompt(tokens, columns, requests(tokens, settings["turn"], self._visual_ids())))
        return rows

    def _visual_ids(self: Any) -> frozenset[int]:
        return frozenset(self.config.surgery["visual_defense"]["token_ids"])

    def _masks(self: Any, ids: Tensor, prompts: list[Prompt], kwargs: dict[str, Any], given: Any) -> Masks:
        """Which tiles of which image are masked."""
        settings = self.config.surgery["visual_defense"]
        side, count = settings["side"], settings["masked_patches"]
        seen = views(kwargs, self.config, side)
        for view in seen:
            least_size, patch = min(view.sizes), self.config.vision_config.patch_size
            if least_size < side * patch:
                raise ValueError(
                    f"an image of {view.sizes[0]} x {view.sizes[1]} pixels has tiles smaller than a patch ({patch}): "
                    f"enlarge it, or pass defense=False; tiles are {side} x {side}"
                )
        owners = self._owners(seen, prompts, kwargs)
        rows = [owner.row for owner in owners]
        if given is not None:
            return Masks(seen, checked_tiles(given, len(seen), side * side), [None] * len(seen), rows)
        if settings["scorer"] == "given":
            raise ValueError("this model masks what the caller says: pass masked_tiles=[[...], ...], or defense=False")
        asked = [prompts[owner.row].text(owner.request, self._visual_ids()) for owner in owners]
        judged = [number for number, text in enumerate(asked) if text]
        shown = [seen[number] for number in judged]
        if settings["scorer"] == "attention":
            found = attended(self, shown, [owners[number] for number in judged], prompts, ids, kwargs)
        elif settings["scorer"] == "clip":
            found = [
                self.defense_clip(self.model.vision_tower, view, side, self._by_clip(asked[number]))
                for view, number in zip(shown, judged, strict=True)
            ]
        else:
            found = self._embedded(shown, [asked[number] for number in judged], kwargs)
        scores: list[Tensor | None] = [None] * len(seen)
        for number, relevance in zip(judged, found, strict=True):
            scores[number] = tile_scores(relevance.float().mean(0), side).cpu()
        return Masks(seen, [[] if score is None else least(score, count) for score in scores], scores, rows)

    def _by_clip(self: Any, text: list[int]) -> Tensor:
        found: Tensor = self.defense_clip.embedded(self.defense_clip.windows(text, self.config))
        return found

    def _embedded(self: Any, seen: list[View], asked: list[list[int]], kwargs: dict[str, Any]) -> list[Tensor]:
        """Relevance of visual tokens [frames, rows, columns] by their embeddings and those of what is asked."""
        settings, table, found = self.config.surgery["visual_defense"], self.get_input_embeddings(), []
        for view, text in zip(seen, asked, strict=True):
            tokens = visual_tokens(self.model, view, kwargs)
            words = table(torch.tensor(text, device=table.weight.device)).to(tokens.device)
            frames = [frame.flatten(0, 1) for frame in tokens]
            if settings["scorer"] == "own":
                mean = table.weight.mean(0).to(tokens.device)
                scores = [own_relevance(frame, words, mean) for frame in frames]
            else:
                scores = [self.model.visual_scorer(frame, words) for frame in frames]
            found.append(torch.stack(scores).unflatten(1, tokens.shape[1:3]))
        return found

    def _owners(self: Any, seen: list[View], prompts: list[Prompt], kwargs: dict[str, Any]) -> list[Owner]:
        """The owner of each view."""
        owners: list[Owner] = []
        tokens = self.config.surgery["visual_defense"]["token_ids"]
        for kind, token in zip(PIXELS, tokens, strict=False):
            of_kind = [view for view in seen if view.kind == kind]
            places = [(row, at) for row, prompt in enumerate(prompts) for at in runs_of(prompt.ids, token)]
            if kind == "video" or "image_grid_thw" in kwargs:
                places = self._by_size(of_kind, token, prompts, kwargs)
            if len(places) != len(of_kind):
                raise ValueError(
                    f"{len(of_kind)} {kind}s are given and the prompts show {len(places)}: pass what the processor "
                    "made, with text between images"
                )
            for row, at in places:
                turns = [request for request in prompts[row].requests if request.turn <= at]
                owners.append(Owner(row, at, turns[-1] if turns else prompts[row].requests[0]))
        return owners

    def _by_size(
        self: Any, seen: list[View], token: int, prompts: list[Prompt], kwargs: dict[str, Any]
    ) -> list[tuple[int, int]]:
        """Row and first token of each view, from how many tokens each has: a clip may be in several pieces."""
        ends_clips = "image_grid_thw" not in inspect.signature(self.forward).parameters  # with a token
        sizes = [prod(token_grid(view, kwargs, self.config)) + ends_clips for view in seen]
        shown = [(row, at) for row, prompt in enumerate(prompts) for at, one in enumerate(prompt.ids) if one == token]
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        return [shown[start] for start in starts] if sum(sizes) == len(shown) else []

    def _paint(self: Any, found: Masks, kwargs: dict[str, Any]) -> None:
        for kind, name in PIXELS.items():
            parts = [(view, tiles) for view, tiles in zip(found.views, found.tiles, strict=True) if view.kind == kind]
            if any(tiles for _, tiles in parts):
                black = torch.tensor(self.config.surgery["visual_defense"]["black"][kind])
                kwargs[name] = paint(kwargs[name], parts, black)

    def _wrap(
        self: Any, ids: Tensor, prompts: list[Prompt], found: Masks, kwargs: dict[str, Any], pad: int | None
    ) -> Tensor:
        """The prompts with the template before their last request, padded on the left; `kwargs` are brought in line."""
        settings, rows = self.config.surgery["visual_defense"], []
        templates = {name: template["ids"] for name, template in settings["templates"].items()}
        marks = [*settings["answer"]["final"], *settings["answer"]["analysis"], *settings["labels"]]
        for number, prompt in enumerate(prompts):
            masked = any(tiles for tiles, row in zip(found.tiles, found.rows, strict=True) if row == number)
            shown = not self._visual_ids().isdisjoint(prompt.ids)
            template = templates["masked" if masked else "unmasked" if shown else "text_only"]
            pairs = list(zip(prompt.ids, range(len(prompt.ids)), strict=True))
            if not is_wrapped(prompt.ids, prompt.requests[-1], list(templates.values())):
                pairs = wrapped(prompt.ids, prompt.requests[-1], template, marks, settings["separator"])
            rows.append([(token, NEW if at == NEW else prompt.columns[at]) for token, at in pairs])
        fill = pad if pad is not None and pad not in self._visual_ids() else settings["separator"]
        new = padded([[token for token, _ in row] for row in rows], fill, left=True).to(ids)
        source = padded([[at for _, at in row] for row in rows], NEW, left=True).to(ids.device)
        there = padded([[1] * len(row) for row in rows], 0, left=True).to(ids.device)
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and value.shape == ids.shape and name not in PIXELS.values():
                taken = value.gather(1, source.clamp(min=0).to(value.device))
                kwargs[name] = torch.where(source.to(value.device) == NEW, torch.zeros_like(taken), taken)
        mask = kwargs.get("attention_mask")
        kwargs["attention_mask"] = there if mask is None else there.to(mask)
        return new

    def _fits(self: Any, width: int, before: int) -> None:
        longest = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        room = self.config.surgery["visual_defense"]["analysis_tokens"]
        if longest is not None and width + room > longest:
            raise ValueError(
                f"the prompt has {before} tokens, {width} with the intention analysis, which takes {room} more, and "
                f"the model has places for {longest}: shorten the prompt, or pass defense=False"
            )

    def _parser(self: Any, limit: int, kwargs: dict[str, Any], configs: list[Any]) -> Parser:
        answer = self.config.surgery["visual_defense"]["answer"]
        return Parser(
            tuple(map(tuple, answer["final"])),
            tuple(map(tuple, answer["analysis"])),
            frozenset(answer["skipped"]),
            frozenset(answer["ends"]),
            self.config.surgery["visual_defense"]["on_missing"],
            tuple(answer["refusal"]),
            eos_of(kwargs, configs),
            limit,
        )

    def _answered(
        self: Any,
        output: Any,
        width: int,
        given: Tensor,
        parser: Parser,
        found: Masks,
        prompts: list[Prompt],
        pad: int | None,
    ) -> Any:
        """What `generate` returns: prompts as they were given, and answers padded on the right."""
        sequences = output if isinstance(output, Tensor) else output.sequences
        answers = [parser.parse(row) for row in sequences[:, width:].tolist()]
        fill = pad if pad is not None else min(parser.eos, default=0)
        tokens = padded([answer.tokens for answer in answers], fill, left=False).to(given)
        result = torch.cat([given.repeat_interleave(len(answers) // len(given), 0), tokens], 1)
        if isinstance(output, Tensor):
            return result
        output.sequences = result
        output = self._told(output, found, prompts)
        for told, answer in zip(output.defense, answers, strict=True):
            told |= {"analysis_ids": torch.tensor(answer.analysis, dtype=torch.long), "tag_found": answer.tag_found}
        return output

    def _told(self: Any, output: Any, found: Masks, prompts: list[Prompt]) -> Any:
        """The output with what was masked, where it can carry that."""
        if isinstance(output, Tensor):
            return output
        each = len(output.sequences) // len(prompts)
        output.defense = [
            {
                "masked_tiles": [tiles for tiles, owner in zip(found.tiles, found.rows, strict=True) if owner == row],
                "scores": [scores for scores, owner in zip(found.scores, found.rows, strict=True) if owner == row],
                "request_empty": not prompt.text(prompt.requests[-1], self._visual_ids()),
            }
            for row, prompt in enumerate(prompts)
            for _ in range(each)
        ]
        return output


def _checked(ids: Any, kwargs: dict[str, Any]) -> Tensor:
    """The ids of a prompt that can be defended. Raises for what hides pixels or text, or was read already."""
    for name in ("inputs_embeds", "mm_encoder_outputs"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{name} hide what is to be masked: pass pixels and input_ids, or defense=False")
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise NotImplementedError(
            "a prompt that is cached already cannot be defended: pass the whole conversation without past_key_values, "
            "or defense=False"
        )
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.shape[1]:
        raise ValueError("a prompt is needed as input_ids [batch, tokens]; pass defense=False to go on without")
    for name in PLACED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{name} are of the prompt before it is wrapped: leave them out")
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise NotImplementedError(f"an attention mask of {list(mask.shape)}: pass one of {list(ids.shape)}, or none")
    return ids
