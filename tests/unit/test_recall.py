"""The questions about a haystack, and the built-in model that answers them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import surgery
from surgery.builtin.recall import recall_prompts, recall_row, recall_sentences
from surgery.builtin.text import heldout_text, training_text

FOLDER = Path(surgery.__file__).parent / "builtin" / "recall"
TOKENIZER = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
BEGIN = 1


@cache
def encode(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text, add_special_tokens=False).ids)


def asked(**changes):
    return recall_prompts(encode, **{"length": 300, "pairs": 5, "questions": 3, "seed": 7, "begin": BEGIN} | changes)


def test_prompts_depend_on_the_seed_alone():
    assert asked() == asked()
    assert asked()[0].context != asked(seed=8)[0].context
    assert asked(heldout=False)[0].context != asked()[0].context


@pytest.mark.parametrize("begin", [None, BEGIN])
@pytest.mark.parametrize("length", [64, 299, 1024, 2048])
def test_contexts_have_the_length_that_was_asked_for(length, begin):
    prompts = asked(length=length, begin=begin)
    assert len(prompts) == 3
    assert len({prompt.name for prompt in prompts}) == 3
    assert {len(prompt.context) for prompt in prompts} == {length}
    assert len({prompt.context for prompt in prompts}) == 1
    assert (prompts[0].context[0] == BEGIN) is (begin is not None)


def test_a_context_may_be_nothing_but_its_sentences():
    sentence = len(encode("Dial string 48 31.\n"))
    assert len(asked(length=5 * sentence + 1)[0].context) == 5 * sentence + 1
    with pytest.raises(ValueError, match="do not fit"):
        asked(length=5 * sentence)


@pytest.mark.parametrize(("pairs", "questions"), [(5, 6), (5, 0), (257, 1)])
def test_numbers_that_make_no_sense_are_refused(pairs, questions):
    with pytest.raises(ValueError, match="do not fit"):
        asked(length=4096, pairs=pairs, questions=questions)


@pytest.mark.parametrize("seed", range(5))
def test_every_answer_stands_at_its_depth_after_its_question(seed):
    for prompt in asked(length=500, seed=seed, questions=5):
        at = round(prompt.depth * 500)
        assert prompt.context[at - len(prompt.question) : at] == prompt.question
        assert prompt.context[at : at + len(prompt.answer)] == prompt.answer
        assert TOKENIZER.decode(list(prompt.context)).count(f"\nDial {prompt.name} {prompt.value}.\n") == 1


def test_every_depth_is_asked_for():
    depths = [prompt.depth for seed in range(20) for prompt in asked(length=500, seed=seed, questions=5)]
    assert all(any(part <= depth * 10 < part + 1 for depth in depths) for part in range(10))


@pytest.mark.parametrize("heldout", [True, False])
def test_the_haystack_is_consecutive_lines_of_the_right_text(heldout):
    decoded = TOKENIZER.decode(list(asked(length=800, heldout=heldout)[0].context))
    lines = [line for line in decoded.splitlines(keepends=True) if not line.startswith("Dial ")]
    haystack = "".join(lines[1:])  # the first line lacks its beginning
    right, wrong = (heldout_text(), training_text()) if heldout else (training_text(), heldout_text())
    assert len(haystack) > 500
    assert haystack in right
    assert haystack not in wrong


def test_a_row_is_the_context_and_every_question_answered():
    prompts = asked()
    ids, answers = recall_row(encode, prompts)
    asked_text = "".join(f"Dial {prompt.name} {prompt.value}.\n" for prompt in prompts)
    assert tuple(ids) == prompts[0].context + encode(asked_text)
    marked = [token for token, is_answer in zip(ids, answers, strict=True) if is_answer]
    assert marked == [token for prompt in prompts for token in prompt.answer]


def test_names_and_numbers_are_single_tokens_of_the_built_in_model():
    assert {len(encode(sentence)) for sentence in recall_sentences()} == {5}
    assert len(set(recall_sentences())) == 256


@pytest.mark.slow
@torch.no_grad()
def test_the_built_in_model_answers_far_questions():
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    prompts = [prompt for seed in range(100, 105) for prompt in asked(length=1024, questions=4, seed=seed)]
    right = 0
    for prompt in prompts:
        given = torch.tensor([[*prompt.context, *prompt.question]])
        length = len(prompt.answer)
        written = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=length, do_sample=False)
        right += tuple(written[0, given.shape[1] :].tolist()) == prompt.answer
    assert right >= 0.9 * len(prompts)


def test_its_record_says_how_well_it_recalls():
    figures = json.loads(FOLDER.with_suffix(".json").read_text(encoding="utf-8"))
    assert figures["needle_accuracy_1024"] >= 0.95
