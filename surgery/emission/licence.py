"""Under which licence the base is, read from files that anybody may have written."""

from __future__ import annotations

import re

import yaml

from surgery.checkpoint.reader import Checkpoint, contained
from surgery.errors import RefusedInput

MAX_BYTES = 65_536
_IDENTIFIER = re.compile(r"[a-z][a-z0-9.+-]{0,63}")
# Sentences that identify a text; all must be there.
_TEXTS = {
    "apache-2.0": ("Apache License", "Version 2.0, January 2004"),
    "mit": ("Permission is hereby granted, free of charge", 'THE SOFTWARE IS PROVIDED "AS IS"'),
}


def base_licence(base: Checkpoint) -> str | None:
    """The licence identifier of the base's card, else that of a well-known LICENSE text, else None."""
    try:
        # BaseLoader makes strings, lists and mappings and nothing else: no tags, no merge keys, no numbers, no dates.
        data = yaml.load(_front_matter(_beginning(base, "README.md")), Loader=yaml.BaseLoader)  # noqa: S506
    except (yaml.YAMLError, ValueError, RecursionError):
        data = None
    stated = data.get("license") if isinstance(data, dict) else None
    if isinstance(stated, str) and _IDENTIFIER.fullmatch(stated):
        return stated
    text = _beginning(base, "LICENSE")
    return next((name for name, marks in _TEXTS.items() if all(mark in text for mark in marks)), None)


def _beginning(base: Checkpoint, name: str) -> str:
    """The first bytes of a text file of the base; empty where it is missing or must not be read."""
    try:
        with contained(base.folder, name).open("rb") as file:
            return file.read(MAX_BYTES).decode(errors="replace")
    except (OSError, RefusedInput):
        return ""


def _front_matter(card: str) -> str:
    found = re.match(r"---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    return found.group(1) if found else ""
