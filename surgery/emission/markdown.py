"""Markdown of text that others wrote: whatever is in it, it stays on its line, in its cell, and is no markup."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

MAX_TEXT = 400
MAX_CODE = 160
# White space, control characters, and those that change the direction of writing.
_UNPRINTABLE = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]+")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table, line by line. Cells are taken as they are: make them with `text`, `code` or `value`."""
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def text(words: str) -> str:
    """One line of prose; only code spans keep their meaning."""
    pieces = _one_line(words, MAX_TEXT).replace("|", r"\|").split("`")
    if len(pieces) % 2 == 0:  # an open code span would swallow what follows
        pieces = ["'".join(pieces)]
    return "`".join(piece if i % 2 else re.sub(r"([<>\[\]*~#!])", r"\\\1", piece) for i, piece in enumerate(pieces))


def code(words: str) -> str:
    """One line as a code span."""
    return "`" + _one_line(words, MAX_CODE).replace("`", "'").replace("|", r"\|") + "`"


def value(of: Any) -> str:
    """A setting's value as a code span; None is `not set`."""
    return "not set" if of is None else code(of if isinstance(of, str) else json.dumps(of))


def fenced(content: str, language: str) -> str:
    """A code block whose fence is longer than any inside it."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", content))])
    return f"{fence}{language}\n{content.strip(chr(10))}\n{fence}"


def _one_line(words: str, longest: int) -> str:
    line = _UNPRINTABLE.sub(" ", words).strip().replace("\\", "/")
    return line if len(line) <= longest else line[:longest] + "…"
