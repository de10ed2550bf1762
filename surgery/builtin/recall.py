"""Needles in a haystack: what the built-in model `recall` learned, and what it is asked.

A context is ordinary text into which sentences such as "Dial string 48 31." were put, each on a line of its own. The
names are common words of the text, so they stand in the haystack as well; a question is a sentence without its numbers,
which are the answer. Context, question and answer come apart, so that whoever compresses a cache decides whether the
question is there when it does, or is asked in a later turn.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from random import Random
from typing import TypeVar

from surgery.builtin.text import heldout_text, training_text

__all__ = ["Recall", "recall_prompts", "recall_row", "recall_sentences"]

NAMES, NUMBERS = 256, range(10, 100)
VERB, STOP = "Dial", ".\n"

Encode = Callable[[str], Sequence[int]]  # without special tokens
_Choice = TypeVar("_Choice")


@dataclass(frozen=True, slots=True)
class Recall:
    """A question about a context; all ids are those of tokens."""

    context: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]
    depth: float  # share of the context that stands before the answer
    name: str
    value: str


def recall_prompts(
    encode: Encode,
    *,
    length: int,
    pairs: int,
    questions: int,
    seed: int,
    heldout: bool = True,
    begin: int | None = None,
    domain: str = "docs",
) -> list[Recall]:
    """Return questions, in random order, about one context of exactly `length` tokens with `pairs` sentences in it.

    `encode` turns text into ids without special tokens, and gets the same few thousand lines again and again: cache it.
    `begin` is the id that the context begins with. The same arguments give the same prompts under one Python release.

    Raises ValueError if the context has no room for the sentences, or if there are more questions than sentences.
    """
    draw = Random(2 * seed + heldout)  # noqa: S311 - no secret
    names = _several(draw, _names(), pairs)
    values = [" ".join(str(number) for number in _several(draw, NUMBERS, 2)) for _ in names]
    starts = [(*encode(VERB), *encode(f" {name}")) for name in names]
    answers = [tuple(encode(f" {value}")) for value in values]
    stop = tuple(encode(STOP))
    sentences = [(*start, *answer, *stop) for start, answer in zip(starts, answers, strict=True)]
    ids = [] if begin is None else [begin]
    room = length - len(ids) - sum(map(len, sentences))
    if room < 0 or not 0 < questions <= pairs <= NAMES:
        raise ValueError(f"{pairs} sentences and {questions} questions do not fit a context of {length} tokens")

    lines = _haystack(draw, encode, room, _lines(domain, heldout))
    ends = [0, *accumulate(map(len, lines))]
    places: list[list[int]] = [[] for _ in ends]
    for number in range(pairs):
        wish = draw.random() * room  # every depth is as likely, whatever the lines
        places[min(range(len(ends)), key=lambda at: abs(ends[at] - wish))].append(number)
    found = {}
    for here, line in zip(places, [*lines, ()], strict=True):
        for number in here:
            found[number] = len(ids) + len(starts[number])
            ids += sentences[number]
        ids += line
    context = tuple(ids)
    return [
        Recall(context, starts[number], answers[number], found[number] / length, names[number], values[number])
        for number in _several(draw, range(pairs), questions)
    ]


def recall_row(encode: Encode, prompts: Sequence[Recall]) -> tuple[list[int], list[bool]]:
    """Return prompts about one context as one row, every question answered, and which tokens of it are answers."""
    ids = list(prompts[0].context)
    answers = [False] * len(ids)
    stop = encode(STOP)
    for prompt in prompts:
        ids += [*prompt.question, *prompt.answer, *stop]
        answers += [False] * len(prompt.question) + [True] * len(prompt.answer) + [False] * len(stop)
    return ids, answers


def recall_sentences() -> list[str]:
    """Return one sentence for every name, with every number in some: what a tokenizer has to know of recalls."""
    return [f"{VERB} {name} {NUMBERS[at % len(NUMBERS)]}{STOP}" for at, name in enumerate(_names())]


def _haystack(draw: Random, encode: Encode, room: int, lines: Sequence[str]) -> list[Sequence[int]]:
    """Return consecutive lines from anywhere, exactly `room` tokens; the first one may lack its beginning."""
    at, taken, total = int(draw.random() * len(lines)), [], 0
    while total < room:
        taken.append(encode(lines[at % len(lines)]))
        total += len(taken[-1])
        at += 1
    while taken and total - len(taken[0]) >= room:
        total -= len(taken.pop(0))
    if taken:
        taken[0] = taken[0][total - room :]
    return taken


def _several(draw: Random, choices: Sequence[_Choice], count: int) -> list[_Choice]:
    """Draw `count` different ones; only `random()` promises the same results in every Python."""
    return sorted(choices, key=lambda _: draw.random())[:count]


@lru_cache(maxsize=1)
def _names() -> tuple[str, ...]:
    """Return the commonest words of the training text that have four letters or more."""
    words = Counter(re.findall(r"(?<= )[a-z]{4,}\b", training_text()))
    return tuple(sorted(words, key=lambda word: (-words[word], word))[:NAMES])


@lru_cache(maxsize=6)
def _lines(domain: str, heldout: bool) -> tuple[str, ...]:
    """Return the lines of a domain's text."""
    return tuple((heldout_text if heldout else training_text)(domain).splitlines(keepends=True))
