"""Defended models of every vision-language family against the base, the processors, and references written out here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor

import surgery
from surgery.emission.lint import lint
from surgery.operations.visual_defense import TEMPLATES
from tests.defense_cases import MEAN, STD, TOKENS, WORDS, batch, chat, convert, load, tokenizer, write_base, write_clip
from tests.tiny_vision import COMPOSITES, END, FAMILIES, IMAGE, START, VIDEO, picture

TEMPLATE = dict.fromkeys(FAMILIES, TOKENS) | {"llava": WORDS, "llava_next": WORDS}
BLACK = torch.tensor([-mean / std for mean, std in zip(MEAN, STD, strict=True)])
QUESTIONS = "Where is the cat?", "How many are there, and which of them is nothing but white?"
ROOM = 40  # tokens for the analysis
TAGGED = "[INTENTION ANALYSIS] To see a cat.\n[Final Response]: There it is."


@cache
def made() -> Any:
    return tokenizer()


def ids(text: str) -> list[int]:
    return made()(text, add_special_tokens=False)["input_ids"]


class Place:
    """Bases and results, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cache  # noqa: B019 - there is one
    def base_folder(self, family: str) -> Path:
        return write_base(self.folder / "bases" / family, family, template=TEMPLATE[family])

    @cache  # noqa: B019
    def base(self, family: str) -> Any:
        return load(self.base_folder(family))

    @cache  # noqa: B019
    def watched(self, family: str) -> Any:
        """The base, with attention that can be seen."""
        return load(self.base_folder(family), attn_implementation="eager")

    @cache  # noqa: B019
    def judged(self, family: str, scorer: str) -> Any:
        """The result with another scorer in its config: nothing else of it differs."""
        model = deepcopy(self.model(family))
        model.config.surgery["visual_defense"]["scorer"] = scorer
        return model

    @cache  # noqa: B019
    def result(self, family: str, *operations: str, **settings: Any) -> Path:
        settings = {"analysis_tokens": ROOM, **settings}
        name = "-".join([family, *operations, *(f"{key}_{value}" for key, value in settings.items())])
        before = [{name: {"reserve": 0.5}} for name in operations]
        return convert(self.base_folder(family), self.folder / name, *before, **settings)

    @cache  # noqa: B019
    def clip_folder(self, family: str) -> Path:
        return write_clip(self.folder / f"{family}-clip", self.base_folder(family), end=9 if family == "llava" else 2)

    @cache  # noqa: B019
    def by_clip(self, family: str) -> Path:
        return self.result(family, scorer="clip", clip=str(self.clip_folder(family)))

    @cache  # noqa: B019
    def model(self, family: str, *operations: str, **settings: Any) -> Any:
        return load(self.result(family, *operations, **settings))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("defense"))


@contextmanager
def seen() -> Iterator[dict[str, Any]]:
    """What the `generate` of transformers is called with: tensors alone."""
    found: dict[str, Any] = {}
    native = GenerationMixin.generate

    @wraps(native)
    def generate(self: Any, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        named = kwargs if inputs is None else {"input_ids": inputs, **kwargs}
        found.update({name: value.clone() for name, value in named.items() if isinstance(value, Tensor)})
        return native(self, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerationMixin, "generate", generate)
        yield found


class Scripted(LogitsProcessor):
    """Makes every sequence say what is written for its prompt, and then end."""

    def __init__(self, *texts: str) -> None:
        self.rows = [[*ids(text), 2] for text in texts]
        self.width: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.width = input_ids.shape[1] if self.width is None else self.width
        forced = torch.full_like(scores, -1e9)
        each = len(input_ids) // len(self.rows)
        for number in range(len(input_ids)):
            row = self.rows[number // each]
            forced[number, row[min(input_ids.shape[1] - self.width, len(row) - 1)]] = 0
        return forced


def inputs_of(family: str, texts: Any = QUESTIONS[0], counts: int | tuple[int, ...] = 1, seed: int = 0) -> Any:
    texts = [texts] if isinstance(texts, str) else texts
    counts = (counts,) if isinstance(counts, int) else counts
    chats = [chat(text, count) for text, count in zip(texts, counts, strict=True)]
    return batch(family, chats, counts, template=TEMPLATE[family], seed=seed)


def answer(output: Tensor, inputs: Any) -> list[str]:
    return [made().decode(row, skip_special_tokens=True).strip() for row in output[:, inputs["input_ids"].shape[1] :]]


# 1: what is the base


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_defence_it_is_the_base(place: Place, family: str) -> None:
    base, model = place.base(family), place.model(family)
    inputs = inputs_of(family, QUESTIONS, (1, 2))
    options = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
    mine, native = model.generate(**inputs, **options, defense=False), base.generate(**inputs, **options)
    assert torch.equal(mine.sequences, native.sequences)
    assert all(map(torch.equal, mine.logits, native.logits))
    assert torch.equal(model(**inputs).logits, base(**inputs).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_stay_as_they_were(place: Place, family: str) -> None:
    weights, ours = (
        load_file(folder / "model.safetensors") for folder in (place.base_folder(family), place.result(family))
    )
    short = {name.replace(".vision_model.", "."): tensor for name, tensor in ours.items()}
    assert short.keys() == {name.replace(".vision_model.", ".") for name in weights}
    for name, tensor in weights.items():
        assert torch.equal(short[name.replace(".vision_model.", ".")], tensor)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_both_parts_off_it_is_the_base(place: Place, family: str) -> None:
    model = place.model(family, masked_patches=0, intention_analysis=False)
    inputs = inputs_of(family, QUESTIONS, (1, 2))
    with seen() as ours:
        mine = model.generate(**inputs, max_new_tokens=8)
    with seen() as native:
        assert torch.equal(mine, place.base(family).generate(**inputs, max_new_tokens=8))
    assert ours.keys() == native.keys()
    assert all(torch.equal(ours[name], native[name]) for name in native)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_masks_only_ids_differ(place: Place, family: str) -> None:
    model, inputs = place.model(family, masked_patches=0), inputs_of(family, QUESTIONS, (1, 0))
    with seen() as ours:
        model.generate(**inputs, max_new_tokens=2)
    assert torch.equal(ours["pixel_values"], inputs["pixel_values"])
    shown, not_shown = (
        made().decode(row[mask == 1]) for row, mask in zip(ours["input_ids"], ours["attention_mask"], strict=True)
    )
    for text, name in ((shown, "unmasked"), (not_shown, "text_only")):
        assert TEMPLATES[name] in text
    assert "masked" not in shown


def test_it_does_not_load_without_trust(place: Place) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForImageTextToText.from_pretrained(place.result("llava"))


# 2 and 3: masks follow the processors


def processor(name: str, **settings: Any) -> Any:
    kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    return kind(image_mean=MEAN, image_std=STD, resample=0, **settings)


def processed(family: str, images: list[Image.Image]) -> dict[str, Tensor]:
    """What the family's own processor makes of images."""
    square = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    grids = {"image_grid_pinpoints": [[16, 16], [16, 32], [32, 16]]}
    if family == "llava":
        return dict(processor("CLIPImageProcessor", **square)(images, return_tensors="pt"))
    if family == "llava_next":
        return dict(processor("LlavaNextImageProcessor", **square, **grids)(images, return_tensors="pt"))
    if family == "llava_onevision":
        made_of = processor("LlavaOnevisionImageProcessor", size={"height": 16, "width": 16}, **grids)
        return dict(made_of([[image] for image in images], return_tensors="pt"))
    made_of = processor("Qwen2VLImageProcessor", patch_size=4, merge_size=2, min_pixels=64, max_pixels=100_000)
    return dict(made_of(images, return_tensors="pt"))


def blackened(image: Image.Image, tiles: list[int], side: int) -> Image.Image:
    pixels = np.array(image)
    height, width = pixels.shape[:2]
    for tile in tiles:
        row, column = divmod(tile, side)
        rows = slice(height * row // side, height * (row + 1) // side)
        pixels[rows, width * column // side : width * (column + 1) // side] = 0
    return Image.fromarray(pixels)


SIZES = {
    "llava": [(16, 16), (16, 16)], "llava_next": [(12, 32), (16, 16), (32, 8)],
    "llava_onevision": [(12, 32), (16, 16), (32, 8)],
}  # fmt: skip


def pictures(family: str) -> list[Image.Image]:
    """Images that their processor need not resize."""
    draw = np.random.default_rng(0)
    sizes = SIZES.get(family, [(32, 24), (16, 48)])
    return [Image.fromarray(draw.integers(1, 256, (height, width, 3), dtype=np.uint8)) for height, width in sizes]


@pytest.mark.parametrize("side", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_pixels_are_those_of_painted_images(place: Place, family: str, side: int) -> None:
    model = place.model(family, tiles=side**2, masked_patches=1, intention_analysis=False)
    images = pictures(family)
    tiles = [[0, side + 1], [side**2 - 1], [1]][: len(images)]
    given = processed(family, images)
    painted = processed(family, [blackened(*pair, side) for pair in zip(images, tiles, strict=True)])
    inputs = {**prompt_for(place.base(family), family, given), **given}
    with seen() as ours:
        model.generate(**inputs, max_new_tokens=1, masked_tiles=tiles)
    assert not torch.equal(given["pixel_values"], painted["pixel_values"])
    torch.testing.assert_close(ours["pixel_values"], painted["pixel_values"], atol=1e-5, rtol=0)
    same = given["pixel_values"] == painted["pixel_values"]
    assert torch.equal(ours["pixel_values"][same], given["pixel_values"][same])


def prompt_for(base: Any, family: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """A prompt with one turn that shows the images; how many tokens each becomes is what the base's features say."""
    count = len(given["image_grid_thw"] if "image_grid_thw" in given else given["pixel_values"])
    row: list[int] = [*ids("USER:" if TEMPLATE[family] == WORDS else "<|im_start|>user\n")]
    for number in range(count):
        row += [START, *[IMAGE] * feature_count(base, family, given, number), END]
    row += ids("Where? ASSISTANT:" if TEMPLATE[family] == WORDS else "Where?<|im_end|>\n<|im_start|>assistant\n")
    made_of = {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
    if family.startswith("qwen"):
        made_of["mm_token_type_ids"] = (made_of["input_ids"] == IMAGE).long()
    return made_of


def feature_count(base: Any, family: str, given: dict[str, Tensor], number: int) -> int:
    if family.startswith("qwen"):
        return int(given["image_grid_thw"][number].prod()) // 4
    if family == "llava":
        return 16
    pixels, sizes = given["pixel_values"][number : number + 1], given["image_sizes"][number : number + 1]
    found = base.model.get_image_features(pixels, image_sizes=sizes)
    return len(getattr(found, "pooler_output", found)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_so_many_tiles_turn_black(place: Place, family: str) -> None:
    model, inputs = place.model(family), inputs_of(family, QUESTIONS, (1, 1))
    with seen() as ours:
        output = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True)
    before, after = inputs["pixel_values"], ours["pixel_values"]
    changed = before != after
    per_row = BLACK.repeat_interleave(32) if before.ndim == 2 else BLACK[:, None, None]
    assert torch.equal(after[changed], per_row.expand_as(after)[changed])
    area = changed.float().mean() if family not in {"llava_next", "llava_onevision"} else changed[:, 0].float().mean()
    assert float(area) == pytest.approx(3 / 16, abs=1e-6)
    assert [len(tiles) for told in output.defense for tiles in told["masked_tiles"]] == [3, 3]


# 4: which tiles


def reference_scores(base: Any, family: str, inputs: dict[str, Tensor], asked: str, frames: int = 1) -> Tensor:
    """Of one image or clip: mean over each tile of what the language model's input says of its tokens."""
    found: dict[str, Tensor] = {}
    handle = base.model.language_model.register_forward_pre_hook(
        lambda _m, _a, kwargs: found.update(embeds=kwargs["inputs_embeds"][0]), with_kwargs=True
    )
    with torch.no_grad():
        base(**inputs)
    handle.remove()
    shown = found["embeds"][(inputs["input_ids"][0] == IMAGE) | (inputs["input_ids"][0] == VIDEO)]
    rows, columns = (4, 4) if family in COMPOSITES else (4, 3)
    table = base.get_input_embeddings().weight
    words = table[torch.tensor(ids(asked))] - table.mean(0)
    total = torch.zeros(rows, columns)
    for frame in range(frames):
        tokens = shown[frame * rows * columns : (frame + 1) * rows * columns]
        centred = tokens - tokens.mean(0)
        for number, one in enumerate(centred):
            total[number // columns, number % columns] += torch.cosine_similarity(one[None], words).max() / frames
    return tile_means(total)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_least_relevant_tiles_are_masked(place: Place, family: str) -> None:
    model, inputs = place.judged(family, "own"), inputs_of(family)
    output = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True)
    expected = reference_scores(place.base(family), family, inputs, QUESTIONS[0])
    (told,) = output.defense
    torch.testing.assert_close(told["scores"][0], expected, atol=1e-4, rtol=0)
    assert told["masked_tiles"] == [sorted(expected.sort(stable=True).indices[:3].tolist())]


def tile_means(tokens: Tensor) -> Tensor:
    """Means over 4 x 4 tiles [16] of what each of [rows, columns] has."""
    fine = tokens.repeat_interleave(4, 0).repeat_interleave(4, 1)  # tiles are whole numbers of these
    return fine.unflatten(0, (4, -1)).unflatten(2, (4, -1)).mean((1, 3)).flatten()


def attention_reference(
    base: Any, inputs: dict[str, Tensor], token: int, grids: list[tuple[int, int, int]], behind: int = 1
) -> list[Tensor]:
    """Of each image of one prompt: mean attention over layers and heads from all tokens of its last turn's text on.

    `behind` is how many tokens the template has between an image and text.
    """
    row = inputs["input_ids"][0].tolist()
    with torch.no_grad():
        weights = base(**inputs, output_attentions=True).attentions
    shown = [at for at, one in enumerate(row) if one == token]
    paid = torch.stack(weights).mean((0, 1, 2))[shown[-1] + 1 + behind :].mean(0)
    begins = [at for at in shown if row[at - 1] != token] if len(grids) > 1 else shown[:1]
    found = []
    for begin, (frames, rows, columns) in zip(begins, grids, strict=True):
        own = [at for at in shown if at >= begin][: frames * rows * columns]
        found.append(tile_means(paid[own].reshape(frames, rows, columns).mean(0)))
    return found


GRID = {family: (1, 4, 4) if family in COMPOSITES else (1, 4, 3) for family in FAMILIES}


@pytest.mark.parametrize("operations", [(), ("visual_pruning",)], ids=["alone", "pruned"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_least_attended_tiles_are_masked(place: Place, family: str, operations: tuple[str, ...]) -> None:
    model, watched = place.model(family, *operations), place.watched(family)
    implementation = model.config.get_text_config()._attn_implementation
    together = inputs_of(family, [QUESTIONS[0], "Hello", QUESTIONS[1]], (1, 0, 2))
    told = model.generate(**together, max_new_tokens=1, return_dict_in_generate=True).defense
    shown = [picture(family, seed=10 * number)[0] for number in range(3)]
    for row, text, pictures in ((0, QUESTIONS[0], shown[:1]), (2, QUESTIONS[1], shown[1:])):
        alone = inputs_of(family, text, len(pictures))
        alone |= {name: torch.cat([one[name] for one in pictures]) for name in pictures[0]}
        expected = attention_reference(watched, alone, IMAGE, [GRID[family]] * len(pictures))
        torch.testing.assert_close(told[row]["scores"], expected, atol=1e-6, rtol=1e-4)
        assert told[row]["masked_tiles"] == [sorted(one.sort().indices[:3].tolist()) for one in expected]
    assert model.config.get_text_config()._attn_implementation == implementation


def test_narrow_heads_and_coded_caches_give_their_attention(place: Place, tmp_path: Path) -> None:
    latent = {"kv_latent": {"method": "stride", "qk_dim": 8, "vo_dim": 8}}
    coded = {"codebook_kv": {"min_prompt": 8, "window": 6, "sinks": 2, "residual": 4}}
    out = convert(place.base_folder("llava"), tmp_path / "out", latent, coded, {"visual_pruning": {"reserve": 0.5}})
    inputs = inputs_of("llava")
    (told,) = load(out).generate(**inputs, max_new_tokens=1, return_dict_in_generate=True).defense
    watched = load(out, attn_implementation="eager")
    expected = attention_reference(watched, {**inputs, "visual_reserve": 1.0, "use_cache": False}, IMAGE, [(1, 4, 4)])
    torch.testing.assert_close(told["scores"], expected, atol=1e-6, rtol=1e-4)


def test_a_token_of_the_whole_image_is_no_place_in_it(place: Place) -> None:
    model, watched = (deepcopy(one) for one in (place.model("llava"), place.watched("llava")))
    for one in (model, watched):
        one.config.vision_feature_select_strategy = "full"
    inputs = inputs_of("llava")
    at = inputs["input_ids"][0].tolist().index(IMAGE)
    inputs |= {name: torch.cat([inputs[name][:, : at + 1], inputs[name][:, at:]], 1) for name in ("input_ids", "attention_mask")}
    (told,) = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True).defense
    with torch.no_grad():
        weights = torch.stack(watched(**inputs, output_attentions=True).attentions).mean((0, 1, 2))
    shown = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    paid = weights[int(shown[-1]) + 2 :].mean(0)[shown[1:]]
    torch.testing.assert_close(told["scores"][0], tile_means(paid.reshape(4, 4)), atol=1e-6, rtol=1e-4)


def clip_reference(clip: Any, pixels: Tensor, windows: list[list[int]]) -> Tensor:
    """Cosines of CLIP's own features: of each of 16 tiles [3, 16, 16], resized, to the mean of a text's windows."""

    def features(found: Any) -> Tensor:
        return torch.nn.functional.normalize(getattr(found, "pooler_output", found), dim=-1)

    with torch.no_grad():
        text = torch.cat([features(clip.get_text_features(torch.tensor([window]))) for window in windows]).mean(0)
        tiles = [pixels[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] for row in range(4) for column in range(4)]
        shown = torch.nn.functional.interpolate(torch.stack(tiles), (16, 16), mode="bicubic")
        return torch.cosine_similarity(features(clip.get_image_features(shown)), text[None])


LONG_QUESTION = "Where is the cat? What is shown here? How many are there, and which of them is nothing but white, and where?"


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_tiles_are_as_near_as_clip_finds_them(place: Place, family: str) -> None:
    clip = transformers.CLIPModel.from_pretrained(place.clip_folder(family)).eval()
    end, model = clip.config.text_config.eos_token_id, load(place.by_clip(family))
    inputs = inputs_of(family, [LONG_QUESTION, "Hello", "Where?"], (1, 0, 1))
    told = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True).defense
    for row, number, text in ((0, 0, LONG_QUESTION), (2, 1, "Where?")):
        tokens = ids(text)
        windows = [[1, *tokens[at : at + 18], end] for at in range(0, len(tokens), 18)]
        assert len(windows) == (1 if text == "Where?" else 2)
        pixels = inputs["pixel_values"][number]
        expected = clip_reference(clip, pixels[0] if family == "llava_next" else pixels, windows)
        torch.testing.assert_close(told[row]["scores"][0], expected, atol=1e-6, rtol=1e-5)
        assert told[row]["masked_tiles"] == [sorted(expected.sort().indices[:3].tolist())]


def test_clip_comes_beside_the_weights(place: Place) -> None:
    base, ours, clip = (
        load_file(folder / "model.safetensors")
        for folder in (place.base_folder("llava"), place.by_clip("llava"), place.clip_folder("llava"))
    )
    added = {name.removeprefix("defense_clip."): ours.pop(name) for name in [*ours] if name.startswith("defense_clip.")}
    short = {name.replace(".vision_model.", "."): tensor for name, tensor in ours.items()}
    assert short.keys() == {name.replace(".vision_model.", ".") for name in base}
    assert all(torch.equal(short[name.replace(".vision_model.", ".")], tensor) for name, tensor in base.items())
    assert added.pop("tokenizer").dtype == torch.uint8
    assert added.keys() == {name for name in clip if not name.startswith(("vision_model.", "logit_scale"))}
    assert all(torch.equal(tensor, clip[name]) for name, tensor in added.items())
    assert json.loads((place.by_clip("llava") / "config.json").read_text())["surgery"]["visual_defense"]["label"] == (
        "AMIA-style, backend=clip"
    )


def test_without_all_of_clip_it_does_not_load(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(place.by_clip("llava"), out)
    weights = load_file(out / "model.safetensors")
    del weights["defense_clip.text_model.final_layer_norm.bias"]
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors of its CLIP, such as .*final_layer_norm\.bias"):
        load(out)


def test_clip_needs_the_tokenizer_that_was_beside_the_model(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(place.by_clip("llava"), out)
    model = load(out)
    shutil.rmtree(out)
    with pytest.raises(RuntimeError, match=r"no fast tokenizer of this model at .*out"):
        model.generate(**inputs_of("llava"), max_new_tokens=1)


def test_given_scores_decide(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of("llava")
    scores = torch.tensor([1.0, 0, 0, 5, 0, 5, 5, 5, 5, 5, 5, 5, 5, 5, -1, 5])
    sets = []
    for count in (1, 2, 4, 5):
        model = place.model("llava", masked_patches=count, intention_analysis=False, scorer="own")
        monkeypatch.setattr(type(model), "_embedded", lambda *_: [scores.reshape(1, 4, 4)])
        told = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True).defense
        sets.append(told[0]["masked_tiles"][0])
    assert sets == [[14], [1, 14], [1, 2, 4, 14], [0, 1, 2, 4, 14]]


def test_the_scorer_of_pruning_may_judge(place: Place) -> None:
    model = deepcopy(place.model("qwen2_vl", "visual_pruning", intention_analysis=False))
    calls = []

    def scorer(visual: Tensor, text: Tensor) -> Tensor:
        calls.append((visual, text))
        return torch.arange(len(visual)).float()

    model.config.surgery["visual_defense"]["scorer"] = "scorer"
    model.model.visual_scorer = scorer
    told = model.generate(**inputs_of("qwen2_vl"), max_new_tokens=1, return_dict_in_generate=True).defense
    ((visual, text),) = calls
    assert torch.equal(text, model.get_input_embeddings().weight[torch.tensor(ids(QUESTIONS[0]))])
    assert visual.shape == (12, 64)
    fine = torch.arange(12.0).reshape(4, 3).repeat_interleave(4, 1)
    torch.testing.assert_close(told[0]["scores"][0], fine.unflatten(1, (4, 3)).mean(2).flatten())
    assert told[0]["masked_tiles"] == [[0, 1, 2]]


# 5: independence


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_mates_padding_and_order_change_nothing(place: Place, family: str) -> None:
    model = place.judged(family, "own")
    together = inputs_of(family, [QUESTIONS[0], "Hello", QUESTIONS[1]], (1, 0, 2))
    told = model.generate(**together, max_new_tokens=4, return_dict_in_generate=True).defense
    assert [len(one["masked_tiles"]) for one in told] == [1, 0, 2]
    shown = [picture(family, seed=10 * number)[0] for number in range(3)]

    def alone(text: str, order: list[int]) -> Any:
        inputs = inputs_of(family, text, len(order))
        inputs |= {name: torch.cat([shown[number][name] for number in order]) for name in shown[0]}
        return model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True).defense[0]

    for number, single in ((0, alone(QUESTIONS[0], [0])), (2, alone(QUESTIONS[1], [1, 2]))):
        assert single["masked_tiles"] == told[number]["masked_tiles"]
        assert all(map(torch.equal, single["scores"], told[number]["scores"]))
    turned = alone(QUESTIONS[1], [2, 1])
    assert turned["masked_tiles"] == told[2]["masked_tiles"][::-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_answers_as_its_rows_do(place: Place, family: str) -> None:
    model = place.model(family)
    together = inputs_of(family, [QUESTIONS[0], "Hello"], (1, 0))
    both = model.generate(**together, max_new_tokens=6)
    first = inputs_of(family, QUESTIONS[0], 1)
    second = inputs_of(family, "Hello", 0)
    for number, single in enumerate((first, second)):
        mine = model.generate(**single, max_new_tokens=6)[0, single["input_ids"].shape[1] :]
        assert both[number, together["input_ids"].shape[1] :][: len(mine)].tolist() == mine.tolist()


def test_padding_is_seen_without_a_mask_too(place: Place) -> None:
    model, inputs = place.model("llava"), inputs_of("llava", [QUESTIONS[0], "Hello"], (1, 0))
    options = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": 2}
    expected = model.generate(**inputs, **options)
    del inputs["attention_mask"]
    assert torch.equal(model.generate(**inputs, **options), expected)


# 6: wrapping


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_is_wrapped_and_padded_anew(place: Place, family: str) -> None:
    model = place.model(family)
    talk = ["What is shown here?", "A cat.", "Where is it?"]
    inputs = inputs_of(family, [talk, "Hello"], (1, 0))
    with seen() as ours:
        model.generate(**inputs, max_new_tokens=1)
    rows = [row[mask == 1].tolist() for row, mask in zip(ours["input_ids"], ours["attention_mask"], strict=True)]
    old = [row[mask == 1].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    for row, before, name, asked in zip(rows, old, ("masked", "text_only"), ("Where is it?", "Hello"), strict=True):
        template = ids(TEMPLATES[name])
        at = next(at for at in range(len(row)) if row[at : at + len(template)] == template)
        assert row[:at] + row[at + len(template) :] == before
        assert made().decode(row[at + len(template) :]).strip().startswith(asked)
        assert made().decode(row).count("[FINAL RESPONSE]") == 1
    assert bool(ours["attention_mask"][:, -1].all())
    if family.startswith("qwen"):
        assert torch.equal(ours["mm_token_type_ids"], (ours["input_ids"] == IMAGE).long())


def test_a_wrapped_prompt_is_not_wrapped_twice(place: Place) -> None:
    model = place.model("qwen2_vl")
    inputs = inputs_of("qwen2_vl", TEMPLATES["masked"] + "Where?")
    with seen() as ours:
        model.generate(**inputs, max_new_tokens=1)
    assert torch.equal(ours["input_ids"], inputs["input_ids"])


@pytest.mark.parametrize("mark", ["[FINAL RESPONSE]", "[Intention Analysis]", "REQUEST:"])
def test_what_a_user_writes_is_no_tag(place: Place, mark: str) -> None:
    model, inputs = place.model("qwen2_vl"), inputs_of("qwen2_vl", f"Where? {mark} here.")
    with seen() as ours:
        model.generate(**inputs, max_new_tokens=1)
    request = made().decode(ours["input_ids"][0]).rpartition("REQUEST:\n")[2]
    assert request.startswith("Where?")
    assert mark not in request
    assert inputs["input_ids"].shape[1] + len(ids(TEMPLATES["masked"])) + 1 == ours["input_ids"].shape[1]


@pytest.mark.parametrize("scorer", ["own", "attention"])
def test_a_mask_follows_the_turn_that_shows_the_image(place: Place, scorer: str) -> None:
    model = place.judged("llava_onevision", scorer)
    told = [
        model.generate(
            **inputs_of("llava_onevision", [text], 1), max_new_tokens=1, return_dict_in_generate=True
        ).defense[0]
        for text in (QUESTIONS[0], [QUESTIONS[0], "There.", "Why is nothing white?"])
    ]
    torch.testing.assert_close(told[0]["scores"][0], told[1]["scores"][0], atol=1e-6, rtol=1e-5)


def test_templates_can_be_edited(place: Place, tmp_path: Path) -> None:
    model = deepcopy(place.model("llava"))
    model.set_defense_templates(made(), {"masked": "Think, then write [FINAL RESPONSE]\n"})
    model.save_pretrained(tmp_path)
    for one in (model, load(tmp_path)):
        with seen() as ours:
            one.generate(**inputs_of("llava"), max_new_tokens=1)
        assert "Think, then write [FINAL RESPONSE]" in made().decode(ours["input_ids"][0])
    with pytest.raises(ValueError, match="no template 'other': there are masked"):
        model.set_defense_templates(made(), {"other": "x"})
    with pytest.raises(ValueError, match=r"does not ask for \[FINAL RESPONSE\]"):
        model.set_defense_templates(made(), {"masked": "x"})


def test_an_empty_request_is_not_masked_and_flagged(place: Place) -> None:
    model, inputs = place.model("qwen2_vl"), inputs_of("qwen2_vl", "")
    with seen() as ours:
        (told,) = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True).defense
    assert told["request_empty"]
    assert told["masked_tiles"] == [[]]
    assert torch.equal(ours["pixel_values"], inputs["pixel_values"])
    assert TEMPLATES["unmasked"] in made().decode(ours["input_ids"][0])


# 7 and 8: answers


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_answer_is_returned(place: Place, family: str) -> None:
    model, inputs = place.model(family), inputs_of(family, QUESTIONS, (1, 1))
    script = [Scripted(TAGGED, "[FINAL RESPONSE] Seven, and nothing else.")]
    output = model.generate(**inputs, max_new_tokens=30, logits_processor=script, return_dict_in_generate=True)
    width = inputs["input_ids"].shape[1]
    assert torch.equal(output.sequences[:, :width], inputs["input_ids"])
    assert answer(output.sequences, inputs) == ["There it is.", "Seven, and nothing else."]
    assert [told["tag_found"] for told in output.defense] == [True, True]
    assert made().decode(output.defense[0]["analysis_ids"]).strip() == "To see a cat."
    for row in output.sequences[:, width:].tolist():
        assert row.count(2) == 1
        assert set(row[row.index(2) + 1 :]) <= {0}


LONG = "[INTENTION ANALYSIS] To see a cat. [FINAL RESPONSE] one two three four five six seven eight nine ten eleven"


@pytest.mark.parametrize("how", ["max_new_tokens", "max_length", "generation_config", "config_length", "default"])
def test_the_callers_limit_bounds_the_answer(place: Place, how: str) -> None:
    model, inputs = place.model("llava"), inputs_of("llava")
    width, wanted = inputs["input_ids"].shape[1], 20 if how == "default" else 5
    options: dict[str, Any] = {
        "max_new_tokens": {"max_new_tokens": 5}, "max_length": {"max_length": width + 5}, "default": {},
        "generation_config": {"generation_config": GenerationConfig(max_new_tokens=5, eos_token_id=2, pad_token_id=0)},
        "config_length": {"generation_config": GenerationConfig(max_length=width + 5, eos_token_id=2, pad_token_id=0)},
    }[how]  # fmt: skip
    output = model.generate(**inputs, **options, logits_processor=[Scripted(LONG)])
    expected = ids(LONG)
    expected = expected[len(ids(LONG.partition(" one")[0])) :]
    assert output[0, width:].tolist() == expected[1 : wanted + 1] if expected[0] == ids(" ")[0] else expected[:wanted]


def test_a_long_analysis_leaves_its_tokens_to_nobody(place: Place) -> None:
    model, inputs = place.model("llava", analysis_tokens=8), inputs_of("llava")
    width = inputs["input_ids"].shape[1]
    output = model.generate(
        **inputs, max_new_tokens=3, logits_processor=[Scripted("x " * 50)], return_dict_in_generate=True
    )
    assert output.sequences.shape[1] == width + 3
    assert not output.defense[0]["tag_found"]


def test_generation_ends_with_the_answer(place: Place) -> None:
    model, inputs = place.model("llava"), inputs_of("llava")
    script = Scripted(LONG)
    steps = []
    script_call = script.__call__
    model.generate(
        **inputs, max_new_tokens=2,
        logits_processor=[lambda one, scores: (steps.append(1), script_call(one, scores))[1]],
    )  # fmt: skip
    assert len(steps) < len(ids(LONG)) - 8


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("full", "To see a cat. There it is."),
        ("strip_analysis", "There it is."),
        ("refuse", "I cannot help with that."),
    ],
)
def test_a_missing_tag_is_dealt_with(place: Place, policy: str, expected: str) -> None:
    model, inputs = place.model("llava", on_missing=policy), inputs_of("llava")
    script = [Scripted("[INTENTION ANALYSIS] To see a cat. There it is.")]
    output = model.generate(**inputs, max_new_tokens=60, logits_processor=script, return_dict_in_generate=True)
    assert answer(output.sequences, inputs)[0].removeprefix("[INTENTION ANALYSIS]").strip() == expected
    assert not output.defense[0]["tag_found"]


@pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beams": 3}, {"num_beams": 3, "do_sample": True}])
def test_every_returned_sequence_is_parsed(place: Place, options: dict[str, Any]) -> None:
    model, inputs = place.model("qwen2_vl"), inputs_of("qwen2_vl", QUESTIONS, (1, 1))
    count = 2 if "num_beams" not in options or options.get("do_sample") else 1
    output = model.generate(
        **inputs, **options, max_new_tokens=30, num_return_sequences=count, return_dict_in_generate=True,
        logits_processor=[Scripted(TAGGED, "[FINAL RESPONSE] Seven.")],
    )  # fmt: skip
    found = answer(output.sequences, inputs)
    assert len(found) == len(output.defense) == 2 * count
    assert found[0] == "There it is."
    assert found[count] == "Seven."
    prompts = output.sequences[:, : inputs["input_ids"].shape[1]]
    assert torch.equal(prompts, inputs["input_ids"].repeat_interleave(count, 0))
    assert [told["masked_tiles"] for told in output.defense[:count]] == [output.defense[0]["masked_tiles"]] * count


class Collected:
    def __init__(self) -> None:
        self.got: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.got.append(value)

    def end(self) -> None:
        self.got.append(torch.tensor([-1]))


@pytest.mark.parametrize("text", [TAGGED, LONG, "There is no tag."])
def test_what_is_streamed_is_what_is_returned(place: Place, text: str) -> None:
    model, inputs, target = place.model("llava"), inputs_of("llava"), Collected()
    output = model.generate(**inputs, max_new_tokens=6, streamer=target, logits_processor=[Scripted(text)])
    assert torch.equal(target.got[0], inputs["input_ids"])
    assert int(target.got[-1]) == -1
    assert [int(one) for one in target.got[1:-1]] == output[0, inputs["input_ids"].shape[1] :].tolist()


def test_positional_arguments_mean_what_they_mean_to_the_base(place: Place) -> None:
    model, inputs = place.model("llava"), inputs_of("llava")
    given = inputs.pop("input_ids")
    config = GenerationConfig(max_new_tokens=30, eos_token_id=2, pad_token_id=0)
    output = model.generate(given, config, [Scripted(TAGGED)], None, **inputs)
    assert made().decode(output[0, given.shape[1] :], skip_special_tokens=True).strip() == "There it is."
    assert config.max_new_tokens == 30


def test_drafts_go_on_from_the_wrapped_prompt(place: Place) -> None:
    model, inputs = place.model("llava"), inputs_of("llava", counts=0)
    plain = model.generate(**inputs, max_new_tokens=6)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, assistant_model=model), plain)
    again = model.generate(**inputs, max_new_tokens=6, assistant_model=model, defense=False)
    assert torch.equal(again, place.base("llava").generate(**inputs, max_new_tokens=6))
    with seen() as ours:
        model.generate(**inputs, max_new_tokens=1)
    assert ours["input_ids"].shape[1] > inputs["input_ids"].shape[1]


# Videos


def clip(family: str) -> tuple[dict[str, Tensor], list[int]]:
    """A clip of two frames, or pairs of frames, and the ids that stand for it."""
    draw = torch.Generator().manual_seed(5)
    if family == "llava_onevision":
        return {"pixel_values_videos": torch.randn(1, 2, 3, 16, 16, generator=draw)}, [VIDEO] * (2 * 4 + 1)
    shown = {
        "pixel_values_videos": torch.randn(96, 3 * 2 * 16, generator=draw), "video_grid_thw": torch.tensor([[2, 8, 6]]),
    }  # fmt: skip
    if family == "qwen3_vl":
        frame = [START, *[VIDEO] * 12, END]
        return shown, [*ids("<0.3 seconds>"), *frame, *ids("<1.3 seconds>"), *frame]
    return shown, [START, *[VIDEO] * 24, END]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in {"llava", "llava_next"}])
@pytest.mark.parametrize("scorer", ["own", "attention"])
def test_all_frames_of_a_clip_have_the_same_mask(place: Place, family: str, scorer: str) -> None:
    model = place.judged(family, scorer)
    shown, tokens = clip(family)
    row = [*ids("<|im_start|>user\n"), *tokens, *ids(f"{QUESTIONS[0]}<|im_end|>\n<|im_start|>assistant\n")]
    inputs = {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long), **shown}
    if family.startswith("qwen"):
        inputs["mm_token_type_ids"] = 2 * (inputs["input_ids"] == VIDEO).long()
    with seen() as ours:
        (told,) = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True).defense
    changed = ours["pixel_values_videos"] != inputs["pixel_values_videos"]
    frames = changed.unflatten(0, (2, -1)) if family.startswith("qwen") else changed[0]
    assert torch.equal(frames[0], frames[1])
    assert float(changed.float().mean()) == pytest.approx(3 / 16, abs=1e-6)
    if scorer == "attention":
        grid = (2, 2, 2) if family == "llava_onevision" else (2, 4, 3)
        behind = int(family.startswith("qwen"))
        expected = attention_reference(place.watched(family), inputs, VIDEO, [grid], behind)
        torch.testing.assert_close(told["scores"], expected, atol=1e-6, rtol=1e-4)
    elif family.startswith("qwen"):
        expected = [reference_scores(place.base(family), family, inputs, QUESTIONS[0], frames=2)]
        torch.testing.assert_close(told["scores"], expected, atol=1e-4, rtol=0)
    at = made().decode(ours["input_ids"][0]).index(TEMPLATES["masked"])
    assert made().decode(ours["input_ids"][0])[at + len(TEMPLATES["masked"]) :].startswith(QUESTIONS[0])


# With pruning


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_are_masked_before_tokens_are_pruned(place: Place, family: str) -> None:
    model, pruned = place.model(family, "visual_pruning"), pruned_alone(place, family)
    inputs = inputs_of(family, QUESTIONS, (1, 1))
    with seen() as ours:
        mine = model.generate(**inputs, max_new_tokens=6)
    names = [name for name in ours if name in inputs]
    wrapped = {name: ours[name] for name in names}
    native = pruned.generate(**wrapped, max_new_tokens=6 + ROOM)[:, wrapped["input_ids"].shape[1] :]
    assert mine[:, inputs["input_ids"].shape[1] :].tolist() == native[:, :6].tolist()
    whole = model.generate(**inputs, max_new_tokens=6, defense=False, visual_reserve=1.0)
    assert torch.equal(whole, place.base(family).generate(**inputs, max_new_tokens=6))


@cache
def pruned_alone(place: Place, family: str) -> Any:
    data = {"surgery": 1, "operations": [{"visual_pruning": {"reserve": 0.5}}], "verify": False}
    out = place.folder / f"{family}-pruned"
    return load(surgery.convert(str(place.base_folder(family)), out, surgery.manifest_from_dict(data)).out)


# Errors


def cached(model: Any) -> Any:
    return model(input_ids=torch.tensor([[1, 20, 21]]), use_cache=True).past_key_values


Change = Callable[[Any, dict[str, Any]], dict[str, Any]]
ERRORS: dict[str, tuple[type[Exception], str, Change]] = {
    "defense": (ValueError, "defense is 0", lambda _m, _i: {"defense": 0}),
    "undefended tiles": (ValueError, "leave them out", lambda _m, _i: {"defense": False, "masked_tiles": [[0]]}),
    "too few lists": (ValueError, "list of 1 lists", lambda _m, _i: {"masked_tiles": []}),
    "tile number": (ValueError, "from 0 to 15", lambda _m, _i: {"masked_tiles": [[16]]}),
    "tile kind": (ValueError, "whole numbers", lambda _m, _i: {"masked_tiles": [["a"]]}),
    "embeddings": (NotImplementedError, "inputs_embeds hide", lambda _m, _i: {"inputs_embeds": torch.zeros(1, 2, 64)}),
    "features": (NotImplementedError, "mm_encoder_outputs hide", lambda _m, _i: {"mm_encoder_outputs": {"image": 1}}),
    "cache": (NotImplementedError, "cached already", lambda m, _i: {"past_key_values": cached(m)}),
    "positions": (NotImplementedError, "position_ids are", lambda _m, i: {"position_ids": i["attention_mask"]}),
    "mask": (NotImplementedError, "an attention mask of", lambda _m, i: {"attention_mask": i["attention_mask"][None]}),
    "no prompt": (ValueError, "a prompt is needed", lambda _m, _i: {"input_ids": None}),
    "nan": (RuntimeError, "no score", lambda _m, i: {"pixel_values": i["pixel_values"] * float("nan")}),
    "small": (ValueError, "smaller than a patch", lambda _m, i: {"pixel_values": i["pixel_values"][..., :12]}),
    "images": (ValueError, "2 images are given and the prompts show 1", lambda _m, i: {
        "pixel_values": i["pixel_values"].repeat(2, 1, 1, 1)}),
    "nothing asks": (ValueError, "nothing stands behind the image in row 0", lambda _m, i: {
        "input_ids": torch.tensor([[*ids("USER: Where? ASSISTANT:"), *[IMAGE] * 16]]), "attention_mask": None}),
    "places": (ValueError, "the image in row 0 has 16 tokens, and 4 places", lambda _m, i: {
        "input_ids": torch.tensor([[*ids("USER:"), *[IMAGE] * 4, *ids("Where? ASSISTANT:")]]), "attention_mask": None}),
    "no turn": (ValueError, "no user turn is found", lambda _m, i: {
        "input_ids": i["input_ids"] * 0 + 20, "pixel_values": None}),
    "short": (ValueError, "raise it, or pass max_new_tokens", lambda _m, _i: {"max_length": 10}),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_defended_says_why(place: Place, name: str) -> None:
    model, inputs = place.model("llava"), inputs_of("llava")
    kind, said, change = ERRORS[name]
    with pytest.raises(kind, match=said) as caught:
        model.generate(**{**inputs, **change(model, inputs)})
    assert "\n" not in str(caught.value)


def test_a_prompt_that_grows_too_long_is_refused(place: Place, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llava", template=WORDS, max_position_embeddings=200)
    model, inputs = load(convert(base, tmp_path / "out")), inputs_of("llava")
    before = inputs["input_ids"].shape[1]
    with pytest.raises(ValueError, match=f"the prompt has {before} tokens, [0-9]+ with the intention analysis.*200"):
        model.generate(**inputs)


def test_a_caller_who_should_say_the_tiles_must(place: Place) -> None:
    model, inputs = place.model("llava", scorer="given"), inputs_of("llava")
    with pytest.raises(ValueError, match="pass masked_tiles"):
        model.generate(**inputs)
    with seen() as ours:
        model.generate(**inputs, masked_tiles=[[0]], max_new_tokens=1)
    assert torch.equal(ours["pixel_values"][0, :, :4, :4], BLACK[:, None, None].expand(3, 4, 4))


def test_the_label_is_in_the_plan_and_in_the_config(place: Place) -> None:
    config = json.loads((place.result("llava") / "config.json").read_text())
    assert config["surgery"]["visual_defense"]["label"] == "AMIA-style, backend=attention"
    assert config["model_type"] == "surgery_llava"
    assert lint({file.name: file.read_bytes() for file in place.result("llava").glob("*.py")}) == []
    card = (place.result("llava") / "README.md").read_text()
    assert "AMIA-style, backend=attention; generate() is defended, forward() is not; weights stay" in card


@pytest.mark.slow
def test_a_defended_result_passes_verification(place: Place) -> None:
    data = {"surgery": 1, "operations": [{"visual_defense": {}}], "verify": {"text": None}}
    base, out = place.base_folder("llava"), place.folder / "verified"
    done = surgery.convert(str(base), out, surgery.manifest_from_dict(data))
    assert done.verification is not None
    passed = {check.name for check in done.verification.checks if check.status == "pass"}
    assert passed >= {"greedy_equals_beam_1", "beam_4", "assisted_decoding", "left_padded_batch", "base_comparison"}
