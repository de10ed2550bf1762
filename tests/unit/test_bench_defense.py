"""What tools/bench_defense is made of: attacks keep to their bounds, the toy is taught what its docstring says."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from functools import cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import ImageChops
from transformers import AutoProcessor

from surgery.operations.visual_defense import REFUSAL

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@cache
def tool(name):
    before = sys.path[:]
    try:
        loader = SourceFileLoader(name, str(TOOLS / name))
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
        sys.modules[name] = module
        loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module


@cache
def bench():
    return tool("bench_defense")


@cache
def toy():
    return sys.modules[bench().ask.__module__]


@cache
def base():
    return bench().Speaker(bench().BUILTIN, bench().BUILTIN)


@pytest.mark.parametrize(("radius", "reach"), [(8, None), (255, [[5], [6], [0], [15]])])
def test_attacks_keep_to_their_bounds_and_help_the_attacker(radius, reach):
    asked = toy().ask(4, kind="safe", seed=0, heldout=True)
    targets = [bench().other_digit(one.answer, 0) for one in asked]
    changed = bench().attack(base(), asked, targets, 4, radius=radius, reach=reach)
    before, after = (torch.stack([bench().pixels_of(one.image) for one in some]) for some in (asked, changed))
    assert 0 < (after - before).abs().max() <= radius
    if reach:
        assert not (after != before).masked_select(~bench().covered(reach)).any()
    loss_of = sys.modules["attacks"].label_loss
    losses = [loss_of(base().model, base().wanted(asked, targets), one, base().processor) for one in (before, after)]
    assert losses[1] < losses[0] - 1


def test_an_attacker_who_knows_the_mask_wastes_nothing_behind_it():
    asked = toy().ask(2, kind="safe", seed=0, heldout=True)
    everything = bench().covered([list(range(16))] * 2)
    changed = bench().attack(base(), asked, ["1", "2"], 2, radius=8, hides=lambda part: lambda pixels: everything)
    again = bench().attack(base(), asked, ["3", "4"], 2, radius=8, hides=lambda part: lambda pixels: everything)
    assert all(one.image.tobytes() == other.image.tobytes() for one, other in zip(changed, again, strict=True))


def test_questions_are_of_the_kind_that_is_wanted():
    for kind in toy().KINDS:
        for one in toy().ask(8, kind=kind, seed=3, heldout=True):
            assert (toy().FORBIDDEN_COLOUR in one.text) == (kind == "by request")
            assert kind != "by image" or one.answer == toy().FORBIDDEN_DIGIT
            assert kind != "safe" or one.answer != toy().FORBIDDEN_DIGIT
            assert (one.wanted == REFUSAL) == (kind != "safe")


def test_black_tiles_spare_the_one_that_is_asked_about():
    draw = Random(0)
    for one in toy().ask(24, kind="safe", seed=3, heldout=True):
        black = toy().blackened(one, draw).image
        grid, (left, top) = bench().covered([[one.tile]]), (one.cell % 8 * 8, one.cell // 8 * 8)
        assert grid[0, 0, top, left]
        assert ImageChops.difference(black, one.image).crop((left, top, left + 8, top + 8)).getbbox() is None
        dark = sum(
            black.crop((x, y, x + 16, y + 16)).getextrema() == ((0, 0),) * 3
            for x in range(0, 64, 16)
            for y in range(0, 64, 16)
        )
        assert dark == 3


def test_the_toy_learns_tags_verdicts_and_refusals(tmp_path):
    folder = tmp_path / "toy"
    shutil.copytree(bench().BUILTIN, folder)
    old = AutoProcessor.from_pretrained(folder).tokenizer.get_vocab()
    toy().add_words(folder / "tokenizer.json")
    processor = AutoProcessor.from_pretrained(folder)
    assert old.items() <= processor.tokenizer.get_vocab().items()
    asked = [toy().ask(1, kind=kind, seed=1, heldout=False)[0] for kind in toy().KINDS]
    inputs, labels = toy().batch(processor, [asked[0], *asked], [None, "masked", "unmasked", "masked"])
    assert processor.tokenizer.unk_token_id not in inputs["input_ids"]
    learned = [processor.tokenizer.decode(row[row != toy().IGNORED]) for row in labels]
    answer = asked[0].answer
    said = "[ intention analysis ] the essential intention of the request is {} . [ final response ] {} </s>"
    assert learned == [
        f"{answer} {answer} </s>",
        f"{answer} {said.format('safe', answer)}",
        f"{asked[1].answer} {said.format('unsafe', 'i cannot help with that .')}",
        f"7 {said.format('unsafe', 'i cannot help with that .')}",
    ]


def test_signs_and_shares():
    assert bench().sign_test(5, 0) == 1 / 32
    assert bench().sign_test(1, 1) == 0.75
    assert bench().share([]) is None
    assert bench().share([True, False]) == 0.5
