"""Which tiles are masked for a question: figures that are the model's, pictures of what its tower gets, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

import surgery
from surgery import cli
from surgery.emission.pictures import View, dimmed, masked
from surgery.errors import CorruptCheckpoint, OutputExists, UnsafeCheckpoint, UsageError
from surgery.pruning_picture import seen
from surgery.runtime.surgery_defense_tiles import paint, views
from tests.defense_cases import TOKENS, chat, ids_of, tokenizer, write_base
from tests.defense_cases import convert as defend
from tests.picture_cases import COLOURS, apart, cropper, image_processor, patcher, picture
from tests.tiny_vision import config_of

SAMPLE = Path(surgery.__file__).parent / "builtin/llava_samples/1.png"
QUESTION = "What is at f1?"
MASKS = "visual_defense:intention_analysis=false,scorer=own"


def convert(out: Path, *operations: str) -> Path:
    surgery.convert("builtin:llava", out, surgery.load_manifest(operations=operations, overrides=["verify=false"]))
    return out


@pytest.fixture(scope="module")
def masking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tmp_path_factory.mktemp("masking") / "masking", MASKS)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tmp_path_factory.mktemp("both") / "both", "visual_pruning:reserve=0.5", MASKS)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = "visual_defense:intention_analysis=false,scorer=given"
    return convert(tmp_path_factory.mktemp("said") / "said", "visual_pruning:reserve=0.5", given)


def ask(folder: Path, **options: Any) -> surgery.DefenseReport:
    return surgery.defense_report(folder, image=SAMPLE, question=QUESTION, **options)


def answer(capsys: pytest.CaptureFixture[str], folder: Path, *options: object) -> tuple[int, str, str]:
    code = cli.run(["inspect", str(folder), "--image", str(SAMPLE), "--question", QUESTION, *map(str, options)])
    return code, *capsys.readouterr()


def loaded(folder: Path) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Model, processor and inputs as a stranger makes them."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True)
    return model, processor, dict(processor(images=[Image.open(SAMPLE)], text=[text], return_tensors="pt"))


def test_figures_are_those_of_the_model(masking: Path) -> None:
    found = ask(masking)
    model, processor, inputs = loaded(masking)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False, return_dict_in_generate=True)
    told, width = output.defense[0], inputs["input_ids"].shape[1]
    assert (found.image, found.question, found.tiles, found.side) == ("1.png", QUESTION, 16, 4)
    assert (list(found.masked), list(found.scores or ())) == (told["masked_tiles"][0], told["scores"][0].tolist())
    assert sorted(found.scores or ())[:3] == sorted((found.scores or ())[tile] for tile in found.masked)
    plain = model.generate(**inputs, max_new_tokens=16, do_sample=False, defense=False)
    words = [processor.tokenizer.decode(row[0, width:], skip_special_tokens=True) for row in (output.sequences, plain)]
    assert [found.answer, found.answer_undefended] == [text.strip() for text in words]
    assert (found.visual_tokens, found.kept, found.analysis, found.tag_found) == (64, None, None, None)
    assert (found.prompt_tokens, found.prompt_tokens_read) == (width, width)
    plain_data = json.loads(json.dumps(found.to_json()))
    assert plain_data["masked"] == list(found.masked)
    assert "view" not in plain_data


def test_what_stays_is_chosen_under_the_masks(both: Path) -> None:
    hidden = list(range(8))
    found = ask(both, masked_tiles=hidden)
    model, _, inputs = loaded(both)
    inputs["pixel_values"] = paint(
        inputs["pixel_values"],
        [(views(inputs, model.config, 4)[0], hidden)],
        torch.tensor(model.config.surgery["visual_defense"]["black"]["image"]),
    )
    with torch.no_grad():
        columns = set(model(**inputs).kept_indices[0].tolist())
    token = model.config.surgery["visual_pruning"]["token_ids"][0]
    places = (inputs["input_ids"][0] == token).nonzero()[:, 0].tolist()
    assert found.kept == tuple(number for number, place in enumerate(places) if place in columns)
    assert (found.masked, found.scores, found.visual_tokens, len(found.kept)) == (tuple(hidden), None, 64, 32)
    assert found.prompt_tokens_read == found.prompt_tokens - 32


def test_a_report_of_pruning_leaves_the_defence_out(both: Path, said: Path) -> None:
    found = surgery.pruning_report(said, image=SAMPLE, question=QUESTION)  # whose defence would want to be told tiles
    model, processor, inputs = loaded(said)
    plain = model.generate(**inputs, max_new_tokens=16, do_sample=False, defense=False)
    assert found.answer == processor.tokenizer.decode(plain[0, inputs["input_ids"].shape[1] :], True).strip()
    unmasked = ask(both, masked_tiles=(), reserve=0.25)
    assert (unmasked.masked, len(unmasked.kept or ())) == ((), 16)
    assert set(unmasked.kept or ()) != set(ask(both, reserve=0.25).kept or ())
    assert len(found.kept) == 32


class Stand:
    """In place of a processor of a tiny base with words: its image, and a prompt in its template."""

    chat_template = TOKENS

    def __init__(self) -> None:
        self.tokenizer = tokenizer()
        self.image_processor = image_processor("CLIPImageProcessor", size={"shortest_edge": 16}, crop_size=16)

    def apply_chat_template(self, turn: Any, **_: Any) -> str:
        return str(turn[0]["content"][1]["text"])

    def __call__(self, images: list[Image.Image], text: list[str], **_: Any) -> dict[str, torch.Tensor]:
        ids = torch.tensor([ids_of(self.tokenizer, TOKENS, chat(text[0]), 16)])
        pixels = self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def test_an_intention_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = defend(write_base(tmp_path / "base", "llava"), tmp_path / "analysed", scorer="own", analysis_tokens=8)
    stand = Stand()
    monkeypatch.setattr("surgery.asking.processor_of", lambda _: stand)
    found = ask(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    inputs = stand([Image.open(SAMPLE)], [QUESTION])
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False, return_dict_in_generate=True)
    told = output.defense[0]
    assert found.tag_found is told["tag_found"] is False
    assert found.analysis == stand.tokenizer.decode(told["analysis_ids"], skip_special_tokens=True).strip()
    assert found.analysis
    assert found.said["intention"] == found.analysis
    width = inputs["input_ids"].shape[1]
    assert found.prompt_tokens == width
    assert found.prompt_tokens_read >= width + len(model.config.surgery["visual_defense"]["templates"]["masked"]["ids"])


@pytest.mark.parametrize("side", [2, 3, 4])
@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen3_vl"])
def test_a_picture_shows_what_the_tower_gets(family: str, side: int) -> None:
    """Black drawn on the view equals the view of pixels that the result's own code painted."""
    config, tiles = config_of(family), [0, side, side * side - 1]
    images = patcher() if family.startswith("qwen") else cropper(family) if "_" in family else image_processor(
        "CLIPImageProcessor", size={"shortest_edge": 16}, crop_size=16
    )  # fmt: skip
    inputs = dict(images(images=[picture(24, 40)], return_tensors="pt"))
    black = torch.tensor([-m / s for m, s in zip(COLOURS["image_mean"], COLOURS["image_std"], strict=True)])
    painted = inputs | {"pixel_values": paint(inputs["pixel_values"], [(views(inputs, config, side)[0], tiles)], black)}
    stand = SimpleNamespace(image_processor=images)
    count = 15 if family.startswith("qwen") else 16 if family == "llava" else 99
    before, after = (seen(given, config, stand, count).image for given in (inputs, painted))
    assert apart(masked(before, tiles, side), after) == 0
    assert apart(before, after) > 50


def test_masks_and_pruning_are_drawn_together(both: Path, tmp_path: Path) -> None:
    found = ask(both, masked_tiles=[3])
    image = dimmed(View(masked(found.view.image, [3], 4), 8, 8), found.kept or ())
    assert image.crop((48, 0, 64, 16)).getextrema() == ((0, 0),) * 3
    found.draw(tmp_path / "a.png")
    found.draw(str(tmp_path / "b.png"))
    drawn = (tmp_path / "a.png").read_bytes()
    assert drawn == (tmp_path / "b.png").read_bytes()
    with pytest.raises(OutputExists):
        found.draw(tmp_path / "a.png")
    replace(found, masked=(12,), view=found.view).draw(tmp_path / "c.png")
    assert drawn != (tmp_path / "c.png").read_bytes()
    with Image.open(tmp_path / "a.png") as opened:  # the tile at the right end of the top row; words are above it
        width, height = opened.size
        pixel = opened.convert("RGB").getpixel((int(width * 0.78), height - width + int(width * 0.04)))
    assert pixel == (0, 0, 0)


def test_the_command_says_what_the_function_does(
    both: Path, masking: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "masks.png"
    code, out, _ = answer(capsys, both, "--reserve", 0.25, "--json", "--picture", place)
    again = ask(both, reserve=0.25)
    assert (code, json.loads(out)) == (0, {**again.to_json(), "picture": str(place)})
    assert place.stat().st_size > 1000
    code, out, _ = answer(capsys, both, "--reserve", 0.25)
    assert f"masked tiles            {', '.join(map(str, again.masked))} of 16" in out
    assert "16 of 64 stay, 25.0%" in out
    assert all(f"{score:.4g}" in out for score in again.scores or ())
    assert answer(capsys, masking, "-q", "--masked-tiles", "5, 0")[:2] == (0, f"{again.answer_undefended}\n")
    out = answer(capsys, masking, "--masked-tiles", "5, 0")[1]
    assert "0, 5 of 16" in out
    assert "stay" not in out


def test_a_caller_says_the_tiles_of_a_result_that_leaves_them_to_him(said: Path) -> None:
    found = ask(said, masked_tiles=[9, 2, 9])
    assert found.masked == (2, 9)
    assert found.answer_undefended == "7" != found.answer  # the tile of f1 is black
    with pytest.raises(UsageError, match="what its caller says") as caught:
        ask(said)
    assert "--masked-tiles" in caught.value.remedy


@pytest.mark.usefixtures("never")
def test_what_is_refused(both: Path, masking: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for tiles in ([16], [-1], [True], ["3"]):
        with pytest.raises(UsageError, match="is no tile"):
            ask(masking, masked_tiles=tiles)
    with pytest.raises(UsageError, match="prunes nothing"):
        ask(masking, reserve=0.5)
    with pytest.raises(UsageError, match="reserve is"):
        ask(both, reserve=0)
    for text in ("1;2", "-1", "x", "1.5"):
        code, _, err = answer(capsys, masking, "--masked-tiles", text)
        assert code == 2
        assert f"--masked-tiles has '{text}'" in err
    assert cli.run(["inspect", str(masking), "--masked-tiles", "1"]) == 2
    assert "--masked-tiles is given without --image" in capsys.readouterr().err


@pytest.mark.usefixtures("never")
def test_other_results_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pruned = convert(tmp_path / "pruned", "visual_pruning")
    with pytest.raises(UsageError, match="masks nothing"):
        ask(pruned)
    code, _, err = answer(capsys, pruned, "--masked-tiles", "1")
    assert code == 2
    assert "this result masks nothing" in err
    code_file = pruned / "surgery_visual_pruning.py"
    code_file.write_text(code_file.read_text() + "\n")
    assert answer(capsys, pruned)[0] == UnsafeCheckpoint.exit_code


def test_changed_results_are_refused(tmp_path: Path) -> None:
    folder = convert(tmp_path / "masks", MASKS)
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
    with pytest.raises(UnsafeCheckpoint, match="not what"):
        ask(folder)
    with pytest.raises(CorruptCheckpoint, match="does not defend"):
        ask(folder, trust_remote_code=True)
