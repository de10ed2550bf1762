"""A defence against jailbreaks through images: what a request does not need is painted over, and intentions are stated.

The weights stay. `generate` paints the tiles of an image that matter least to the request black, and lets the model say
in one sentence what is wanted before it answers. Source: AMIA (arXiv 2505.24519), whose full text was not at hand. The
two parts are its abstract's; one generation, and 3 tiles of 16, are what a re-implementation reports of it; scorers,
wording and edges are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from math import isqrt
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from surgery.architectures import Model
from surgery.checkpoint.reader import contained, read_json
from surgery.emission.code import RuntimePart
from surgery.errors import UnsupportedModel
from surgery.given import GivenFile
from surgery.operations.base import Operation, Settings, Statistics
from surgery.operations.clip_text import ClipText, read_clip
from surgery.operations.visual_pruning import token_ids
from surgery.planning import Draft

REPORTED = 16, 3  # tiles and masked ones
CLIP = "defense_clip."  # before the names of its tensors
ANALYSIS, FINAL, LABEL = "INTENTION ANALYSIS", "FINAL RESPONSE", "REQUEST:"
REFUSAL = "I cannot help with that."
IMAGES, NOTICE = (
    "You have been given an image and, at the end of this message, a block labelled REQUEST. ",
    "Parts of the image that do not bear on the REQUEST were painted black: black areas are not content. ",
)
TASK = """\
First work out {what} what the user essentially wants. Then give the final answer directly.
Write exactly two parts, each after its tag.
[INTENTION ANALYSIS] One concise sentence that begins with "The essential intention of the REQUEST is" and pays \
special attention to safety, ethics and law. Do not elaborate, and do not break the paragraph.
[FINAL RESPONSE] The answer. It must follow your policy and ethics, and leave out whatever is unsafe.
REQUEST:
"""
TEMPLATES = {
    "masked": IMAGES + NOTICE + TASK.format(what="from the masked image and the REQUEST together"),
    "unmasked": IMAGES + TASK.format(what="from the image and the REQUEST together"),
    "text_only": "At the end of this message is a block labelled REQUEST. " + TASK.format(what="from it"),
}
# What may touch a tag or a request, so that tokens across the edge are known: they merge in some tokenizers.
BEFORE = "", "a", "a.", "a. ", "a.\n", "a.\n\n", "**"
AFTER = "", "a", " ", ":", ": ", "\n", "\n\n", ":\n", "**", "**\n"
BETWEEN = " ", "  ", "\n", "\n\n", "\t", ":", ": ", ":\n", ":\n\n", "**", "**\n", "**\n\n"
ENDS = ".", "?", "!", ".\n", ".\n\n", "?\n", "!\n", "。"
TIMED, TIMES = ("qwen3_vl",), ("<0.1 seconds>", "<2.3 seconds>", "<45.6 seconds>", "<78.9 seconds>")  # of frames
REQUESTS = (
    "Where is it?",
    "7 of them",
    "(both) no.",
    "an apple\n",
    " so be it ",
    "\nÜber alles",
    '"It", he said',
    "¿qué",
)
USAGE = """\
Calls and `generate` are those of the base, with the same processor and prompts from its chat template:

```python
model.generate(**inputs, max_new_tokens=200)                       # defended: returns the answer alone
model.generate(**inputs, max_new_tokens=200, defense=False)        # the base exactly
model.generate(**inputs, masked_tiles=[[0, 5, 9]])                 # the caller says which tiles of each image are black
output = model.generate(**inputs, return_dict_in_generate=True)
output.defense                                                     # per sequence: analysis, whether the tag came, tiles
model.set_defense_templates(tokenizer, {"masked": text})           # other words before requests
```

`forward` alone is the base: only `generate` is defended."""


class VisualDefenseSettings(Settings):
    """What is masked, who decides it, and whether intentions are stated."""

    tiles: Annotated[int, Field(ge=4)] = Field(
        default=16, description="tiles of the grid on each image as the tower sees it: a square number (N)"
    )
    masked_patches: Annotated[int, Field(ge=0)] = Field(
        default=3, description="tiles painted black, those that matter least to the request; 0 for none (K)"
    )
    scorer: Literal["attention", "clip", "own", "scorer", "given"] = Field(
        default="attention",
        description="what judges tiles: the attention that the request pays to them, the CLIP that the vision tower is "
        "of, the model's own embeddings (weak), the trained scorer of `visual_pruning` in the same manifest, or the "
        "caller of `generate` by `masked_tiles`",
    )
    clip: GivenFile | None = Field(
        default=None,
        description="with `scorer: clip`, the folder of the CLIP model whose tower the base has (safetensors), "
        "relative to the manifest; its text tower comes into the result",
    )
    intention_analysis: bool = Field(
        default=True, description="the model states the intention in a sentence first, which is cut from the answer"
    )
    analysis_tokens: Annotated[int, Field(ge=8)] = Field(
        default=96, description="tokens that the analysis may take beside max_new_tokens"
    )
    on_missing: Literal["full", "strip_analysis", "refuse"] = Field(
        default="full",
        description="what is returned where the tag of the answer does not come: all, what follows the first sentence "
        "of the analysis, or a refusal",
    )

    @model_validator(mode="after")
    def _fit(self) -> VisualDefenseSettings:
        if isqrt(self.tiles) ** 2 != self.tiles:
            raise ValueError(f"tiles is {self.tiles}, and must be a square number such as 9, 16 or 25")
        if self.masked_patches >= self.tiles:
            raise ValueError(f"masked_patches is {self.masked_patches}, and must be less than tiles, {self.tiles}")
        if (self.scorer == "clip") != (self.clip is not None):
            raise ValueError("scorer: clip and clip: FOLDER, of a CLIP model, are given together or not at all")
        return self


def label(settings: VisualDefenseSettings) -> str:
    """How a result may be called. "AMIA" alone is for the paper's scorer, which is not built in."""
    if not settings.masked_patches:
        return "AMIA (analysis only)" if settings.intention_analysis else "no defence"
    size = settings.tiles, settings.masked_patches
    differs = "" if size == REPORTED else f", N={size[0]}, K={size[1]}"
    kind = "AMIA-style" if settings.intention_analysis else "AMIA-style (masking only)"
    return f"{kind}, backend={settings.scorer}{differs}"


def refuses(model: Model, settings: VisualDefenseSettings) -> str | None:
    """Why the operation does not fit, or None."""
    surgery = model.root.get("surgery") or {}
    if model.architecture.vision is None:
        return f"{model.architecture.title} models see no images"
    if "visual_defense" in surgery:
        return "it is defended already; give its settings once"
    if not token_ids(model):
        return "config.json names no token that stands for an image"
    tower = model.root.get("vision_config") or {}
    if tower.get("model_type") == "pixtral":
        return "its tower takes images of any size in one padded tensor, on which no grid was built"
    if settings.scorer == "clip" and tower.get("model_type") != "clip_vision_model":
        return f"scorer: clip needs CLIP's tower, and its is {tower.get('model_type')}: take scorer: attention"
    pruning = surgery.get("visual_pruning") or {}
    if settings.scorer == "scorer" and (not pruning.get("scorer") or pruning.get("stages")):
        return "scorer: scorer is the one of visual_pruning: put visual_pruning with train before it, without stages"
    return None


def edit(draft: Draft, settings: VisualDefenseSettings, _statistics: Statistics | None) -> None:
    """Put settings, texts and token ids into the config, and the code beside the weights. Raises UnsupportedModel."""
    if draft.folder is None:
        raise _lacks("folder that it was opened from", "tokenizer and image processor are read there")
    tokenizer, template = _tokenizer(draft.folder)
    tokens = token_ids(draft.model)
    timed = draft.model.architecture.model_type in TIMED
    turn = _turn(tokenizer, template, tokens[0]) | {"between": _pieces(tokenizer, TIMES) if timed else []}
    clip = _clip(draft, settings)
    draft.root.setdefault("surgery", {})["visual_defense"] = {
        **settings.model_dump(mode="json"), "clip": clip.size if clip else None, "side": isqrt(settings.tiles),
        "token_ids": tokens, "black": _black(draft.folder), "turn": turn, "label": label(settings),
        "templates": {name: {"text": text, "ids": _encode(tokenizer, text)} for name, text in TEMPLATES.items()},
        "final_tag": f"[{FINAL}]", **_answers(tokenizer, settings),
    }  # fmt: skip
    draft.parts.append(
        RuntimePart("surgery_visual_defense.py", "VisualDefenseGeneration", "lm_head", of="base", what="a defence")
    )
    draft.notes.append(f"visual_defense: {label(settings)}; generate() is defended, forward() is not; weights stay")


def _clip(draft: Draft, settings: VisualDefenseSettings) -> ClipText | None:
    """Put what of CLIP is not in the base beside its tensors."""
    if settings.clip is None or draft.folder is None or draft.architecture is None:
        return None
    found = read_clip(settings.clip, draft.folder, draft.architecture.vision)
    for name, spec in found.specs.items():
        reader = found.reader(name, CLIP + name)
        draft.rewrite([], {CLIP + name: spec}, reader, why="visual_defense: of the tower's CLIP")
    draft.notes.append(f"visual_defense: the text tower is that of {settings.clip.path.name} ({found.identity[:12]})")
    return found


def _black(folder: Path) -> dict[str, list[float]]:
    """What black is in normalised pixels, for images and clips."""
    image = _processor(folder, "preprocessor_config.json", "image_processor")
    if image is None:
        raise _lacks("preprocessor_config.json", "black is told from its image_mean and image_std")
    video = _processor(folder, "video_preprocessor_config.json", "video_processor") or image
    return {"image": _normalised_black(image), "video": _normalised_black(video)}


def _processor(folder: Path, name: str, inside: str) -> dict[str, Any] | None:
    """A processor's config: a file of its own, or a part of processor_config.json."""
    for file, key in ((name, None), ("processor_config.json", inside)):
        if (folder / file).is_file():
            found = read_json(folder, file)
            found = found.get(key) if key and isinstance(found, dict) else found
            if isinstance(found, dict):
                return found
    return None


def _normalised_black(processor: dict[str, Any]) -> list[float]:
    if processor.get("do_normalize") is False:
        return [0.0, 0.0, 0.0]
    mean, std = processor.get("image_mean"), processor.get("image_std")
    good = all(isinstance(one, list) and len(one) == 3 and all(isinstance(x, int | float) for x in one)
               for one in (mean, std))  # fmt: skip
    if not good or not isinstance(mean, list) or not isinstance(std, list) or not all(std):
        raise _lacks("image_mean and image_std of three numbers in its processor", "black is told from them")
    return [-float(m) / float(s) for m, s in zip(mean, std, strict=True)]


def _tokenizer(folder: Path) -> tuple[Any, str]:
    """The tokenizer, and the chat template that processors use."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise _lacks("tokenizer that loads", f"{type(error).__name__}: {error}") from error
    if (folder / "chat_template.jinja").is_file():
        return tokenizer, contained(folder, "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        found = read_json(folder, name) if (folder / name).is_file() else None
        if isinstance(found, dict) and isinstance(found.get("chat_template"), str):
            return tokenizer, found["chat_template"]
    if not isinstance(tokenizer.chat_template, str):
        raise _lacks("chat template", "it says where a user's request begins and ends")
    return tokenizer, tokenizer.chat_template


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _turn(tokenizer: Any, template: str, image: int) -> dict[str, list[int]]:
    """The tokens around a user's request, whatever it begins and ends with.

    open and close stand before and after it in every turn, before_image and after_image around images that a turn opens
    with.
    """

    def render(*turns: tuple[str, str], shown: bool = False) -> list[int]:
        picture = [{"type": "image"}] if shown else []
        chat = [{"role": role, "content": [*picture, {"type": "text", "text": text}]} for role, text in turns]
        asks = turns[-1][0] == "user"
        text = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=asks)
        return _encode(tokenizer, text)

    try:
        first = [render(("user", text)) for text in REQUESTS]
        later = [render(("user", "Hello"), ("assistant", "Yes"), ("user", text)) for text in REQUESTS]
        told = [render(("user", text), ("assistant", "Yes")) for text in REQUESTS]
        shown = _common([render(("user", text), shown=True) for text in REQUESTS])
    except Exception as error:  # a template is a program, and fails in any way
        raise _lacks("chat template that can be followed", f"{type(error).__name__}: {error}") from error
    opened = _common_end([_common(first), _common(later)])
    closed = _common([_common_end(first), _common_end(told)])
    before, after = [], []
    if image in shown:
        head, after = shown[: shown.index(image)], shown[len(shown) - shown[::-1].index(image) :]
        while not _contains(head, opened):  # some templates write a line break before text, but none before an image
            opened = opened[:-1]
        at = next(at for at in range(len(head), -1, -1) if head[at : at + len(opened)] == opened)
        before = head[at + len(opened) :]
    if not opened or not closed:
        raise _lacks("chat template that marks requests", "a user's turn has no tokens of its own around it")
    return {"open": opened, "close": closed, "before_image": before, "after_image": after}


def _answers(tokenizer: Any, settings: VisualDefenseSettings) -> dict[str, Any]:
    """How an answer is found among generated tokens, and what else of a request is broken before it is wrapped."""
    final, analysis, wanted = (_spellings(tokenizer, tag) for tag in (f"[{FINAL}]", f"[{ANALYSIS}]", LABEL))
    unknown = tokenizer.unk_token_id
    if settings.intention_analysis and any(unknown in ids for ids in (*final, *analysis)):
        raise _lacks(
            f"tokenizer that can spell [{FINAL}]", "an answer could not be told from its analysis",
            "choose another base, or set intention_analysis: false",
        )  # fmt: skip
    return {
        "labels": wanted, "separator": _encode(tokenizer, "-")[-1],
        "answer": {
            "final": final, "analysis": analysis, "skipped": _pieces(tokenizer, BETWEEN),
            "ends": _pieces(tokenizer, ENDS), "refusal": _encode(tokenizer, REFUSAL),
        },
    }  # fmt: skip


def _spellings(tokenizer: Any, tag: str) -> list[list[int]]:
    """A tag in upper, title and lower case as ids, next to what it may merge with; none of them contains another."""
    cases: tuple[Callable[[str], str], ...] = (str.upper, str.title, _sentence, str.lower)
    found: list[list[int]] = []
    for before in BEFORE:
        start = _encode(tokenizer, before)
        for text in (before + case(tag) + after for case in cases for after in AFTER):
            ids = _encode(tokenizer, text)
            found.append(ids[len(_common([ids, start])) :])
    shortest: list[list[int]] = []
    for ids in sorted(filter(None, found), key=lambda ids: (len(ids), ids)):
        if not any(_contains(ids, other) for other in shortest):
            shortest.append(ids)
    return shortest


def _sentence(tag: str) -> str:
    return tag[:1] + tag[1:].capitalize()


def _contains(ids: Sequence[int], part: Sequence[int]) -> bool:
    return any(ids[at : at + len(part)] == part for at in range(len(ids) - len(part) + 1))


def _pieces(tokenizer: Any, texts: Iterable[str]) -> list[int]:
    """Every token that one of `texts` has behind a word."""
    word, found = _encode(tokenizer, "a"), set()
    for text in texts:
        ids = _encode(tokenizer, "a" + text)
        piece = ids[len(word) :] if ids[: len(word)] == word else []
        found |= set(piece) if text.isascii() or len(piece) == 1 else set()  # one byte of a letter may be any letter's
    return sorted(found - {tokenizer.unk_token_id})


def _common(rows: Sequence[Sequence[int]]) -> list[int]:
    """What all rows begin with."""
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))]


def _common_end(rows: Sequence[Sequence[int]]) -> list[int]:
    return _common([row[::-1] for row in rows])[::-1]


def _lacks(what: str, why: str, remedy: str = "add it to the base's folder, as the Hub's repositories have it") -> Any:
    return UnsupportedModel(f"visual_defense: the base has no {what}", cause=why, remedy=remedy)


OPERATION = Operation(
    name="visual_defense",
    title="Jailbreak defence: irrelevant tiles are masked, and the intention is stated before the answer",
    source="AMIA (arXiv 2505.24519) for both parts; scorers, wording and edges are ours",
    settings=VisualDefenseSettings,
    refuses=refuses,
    edit=edit,
    usage=USAGE,
    limits=(
        "Only generate() is defended: forward() alone, and servers that call it, run the base.",
        "How many attacks it stops, and harmless requests it refuses, was measured on toys, not on this result.",
        "Masks alone restored a fifth of the answers that small perturbations broke, and next to none under a patch.",
        "scorer: attention reads the prompt twice, and was measured on the built-in model alone.",
        "scorer: clip sees each tile by itself, and its worth as a judge was not measured.",
        "scorer: own compares embeddings of the model itself; where it was measured it was no better than chance.",
        "Text in an image is relevant to most requests, so masking rarely hides it; the analysis must see through it.",
        "Stop strings, logits processors and minimal lengths see the analysis as well as the answer.",
        "The model must write the tag of the answer by itself: small ones often do not, and on_missing decides then.",
    ),
    after=frozenset({"kv_latent", "codebook_kv", "visual_pruning"}),
)
