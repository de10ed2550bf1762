"""The pictures with digits in them, and the built-in model that answers questions about them."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

import surgery
from surgery.builtin.pictures import picture, questions, visual_prompts, visual_words

FOLDER = Path(surgery.__file__).parent / "builtin" / "llava"
SAMPLES = FOLDER.with_name("llava_samples")
RECORD = FOLDER.with_suffix(".json")
IMAGE, UNKNOWN = "<image>", "<unk>"
SEEDS = range(20)


@cache
def processor():
    return AutoProcessor.from_pretrained(FOLDER)


@cache
def model():
    return AutoModelForImageTextToText.from_pretrained(FOLDER)


def asked(prompt):
    content = [*[{"type": "image"}] * len(prompt.images), {"type": "text", "text": prompt.question}]
    return processor().apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def answered(prompts):
    texts, images = [asked(prompt) for prompt in prompts], [list(prompt.images) for prompt in prompts]
    inputs = processor()(images=images, text=texts, padding=True, return_tensors="pt")
    written = model().generate(**inputs, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
    return processor().batch_decode(written, skip_special_tokens=True)


def share_right(prompts):
    return sum(map(str.__eq__, answered(prompts), [prompt.answer for prompt in prompts])) / len(prompts)


def test_a_picture_is_the_same_everywhere():
    shown = picture(3)
    assert shown.image.size == (64, 64)
    assert shown.image.mode == "RGB"
    assert (
        hashlib.sha256(shown.image.tobytes()).hexdigest()
        == "da0e221e9937b25c7aa4b44ccf40f5d6567b955ca347907cef46653df9292d73"
    )
    assert picture(3).glyphs == shown.glyphs
    assert picture(4).glyphs != shown.glyphs


@pytest.mark.parametrize("seed", SEEDS)
def test_cells_show_what_is_said_of_them(seed):
    shown = picture(seed)
    assert 4 <= len(shown.glyphs) <= 12
    for cell in range(64):
        row, column = divmod(cell, 8)
        corner = 8 * column, 8 * row
        brightest = max(high for _, high in shown.image.crop((*corner, corner[0] + 8, corner[1] + 8)).getextrema())
        assert (brightest > 150) is (cell in shown.glyphs)
        assert brightest < 50 or cell in shown.glyphs


@pytest.mark.parametrize("seed", SEEDS)
def test_every_question_has_one_answer(seed):
    shown = picture(seed)
    found = questions(shown)
    coloured = [glyph.colour for glyph in shown.glyphs.values() if glyph.colour != "white"]
    assert len({question.text for question in found}) == len(found) == 64 + len(coloured)
    assert len(set(coloured)) == len(coloured) >= 3
    for question in found:
        glyph = shown.glyphs.get(question.cell)
        assert question.answer == (glyph.digit if glyph else "blank")
        place = f"{'abcdefgh'[question.cell % 8]}{question.cell // 8 + 1}"
        assert question.text in {f"What is at {place}?", f"Which digit is {glyph and glyph.colour}?"}


def test_prompts_depend_on_their_arguments_alone():
    assert visual_prompts(8, seed=5) == visual_prompts(8, seed=5)
    assert visual_prompts(8, seed=5) != visual_prompts(8, seed=6)
    assert visual_prompts(8, seed=5) != visual_prompts(8, seed=5, heldout=False)


def test_no_picture_is_in_both_parts_or_twice_in_one():
    parts = [visual_prompts(50, seed=seed, heldout=heldout) for seed in range(3) for heldout in (True, False)]
    drawn = [prompt.images[0].tobytes() for prompts in parts for prompt in prompts]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("images", [1, 2])
def test_a_dialogue_stays_with_its_images_and_asks_nothing_twice(images):
    prompts = visual_prompts(24, seed=1, images=images, turns=12)
    assert [one.images is two.images for one, two in pairwise(prompts)] == [number != 11 for number in range(23)]
    for dialogue in (prompts[:12], prompts[12:]):
        assert len({prompt.question for prompt in dialogue}) == 12
        assert {prompt.asked for prompt in dialogue} == set(range(images))
        assert all(prompt.token == 64 * prompt.asked + prompt.cell for prompt in dialogue)
        ordinals = [("first", "second").index(prompt.question.split()[2]) for prompt in dialogue if images == 2]
        assert ordinals == [prompt.asked for prompt in dialogue if images == 2]


@pytest.mark.parametrize("wrong", [{"images": 0}, {"images": 3}, {"turns": 0}, {"turns": 3}, {"turns": 65}])
def test_numbers_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="cannot ask"):
        visual_prompts(10, seed=0, **wrong)


def test_the_folder_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(files.values()) <= 4_000_000
    assert files.keys() >= {"README.md", "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"}
    assert files.keys() >= {"generation_config.json", "preprocessor_config.json", "processor_config.json"}
    assert sum(path.stat().st_size for path in SAMPLES.iterdir()) <= 60_000


def test_weights_have_the_names_of_the_hub():
    with safe_open(FOLDER / "model.safetensors", "pt") as opened:
        names, metadata = set(opened.keys()), opened.metadata()
        parameters = sum(opened.get_tensor(name).numel() for name in names)
        assert {opened.get_tensor(name).dtype for name in names} == {torch.float32}
    assert metadata == {"format": "pt"}
    assert {name.split(".layers.")[0] for name in names if ".layers." in name} == {
        "vision_tower.vision_model.encoder",
        "language_model.model",
    }
    assert {"language_model.lm_head.weight", "multi_modal_projector.linear_1.weight"} < names
    assert parameters == json.loads(RECORD.read_text(encoding="utf-8"))["parameters"]


def test_every_parameter_is_in_the_file_and_nothing_else():
    _, info = AutoModelForImageTextToText.from_pretrained(FOLDER, output_loading_info=True)
    assert not any(info.values())


def test_the_tokenizer_knows_every_word():
    tokenizer = processor().tokenizer
    assert tokenizer.unk_token == UNKNOWN
    for word in visual_words():
        ids = tokenizer.encode(word, add_special_tokens=False)
        assert len(ids) == 1
        assert ids[0] != tokenizer.unk_token_id


@pytest.mark.parametrize("images", [1, 2])
def test_a_prompt_has_a_token_for_every_cell(images):
    prompt = visual_prompts(1, seed=0, images=images)[0]
    text = asked(prompt)
    assert text == "USER: " + "<image>\n" * images + prompt.question + " ASSISTANT:"
    inputs = processor()(images=list(prompt.images), text=text, return_tensors="pt")
    assert (inputs["input_ids"] == processor().tokenizer.convert_tokens_to_ids(IMAGE)).sum() == 64 * images
    assert UNKNOWN not in processor().tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])


def test_pixels_reach_the_model_as_they_were_drawn():
    shown = picture(3).image
    pixels = processor().image_processor(shown, return_tensors="pt")["pixel_values"]
    drawn = torch.frombuffer(bytearray(shown.tobytes()), dtype=torch.uint8).view(64, 64, 3).permute(2, 0, 1)
    torch.testing.assert_close(pixels[0], drawn / 127.5 - 1)


@torch.no_grad()
def test_the_model_answers_and_its_record_says_how_well():
    figures = json.loads(RECORD.read_text(encoding="utf-8"))
    assert figures["heldout_accuracy"] >= 0.95
    assert figures["chance"] <= 0.25
    assert share_right(visual_prompts(128, seed=1000)) >= figures["heldout_accuracy"] - 0.06
    assert share_right(visual_prompts(32, seed=1000, images=2)) >= figures["heldout_accuracy_of_two_images"] - 0.15


@torch.no_grad()
def test_it_takes_one_prompt_as_well_as_many_and_one_without_an_image():
    prompt = visual_prompts(1, seed=1)[0]
    alone = answered([prompt])
    assert answered(visual_prompts(4, seed=1))[:1] == alone
    text = processor().apply_chat_template([{"role": "user", "content": prompt.question}], add_generation_prompt=True)
    assert model().generate(**processor()(text=text, return_tensors="pt"), max_new_tokens=2).shape[1] > 0


def test_samples_are_held_out_pictures():
    lines = [json.loads(line) for line in (SAMPLES / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    drawn = visual_prompts(len(lines), seed=7)
    assert 4 <= len(lines) <= 8
    for line, prompt in zip(lines, drawn, strict=True):
        assert line.keys() == {"image", "question", "answer"}
        assert (line["question"], line["answer"]) == (prompt.question, prompt.answer)
        with Image.open(SAMPLES / line["image"]) as image:
            assert image.tobytes() == prompt.images[0].tobytes()
