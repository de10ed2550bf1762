"""Texts as documents: plain files, jsonl, a dataset, or the text that every Python carries. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.builtin.text import heldout_text, training_text
from surgery.errors import MissingPackage, SourceUnavailable, UsageError

if TYPE_CHECKING:
    from surgery.manifest import Calibration

# What evaluation reads of a text at most; its windows are far fewer.
EVALUATION_CHARACTERS = 4_000_000


def read_documents(text: Any, field: str) -> tuple[Iterator[str], dict[str, Any]]:
    """The documents of a text as manifests name it (files, `builtin` or a dataset), and what identifies it."""
    if text == "builtin":
        content = training_text()
        return iter([content]), {"text": "builtin", "sha256": hashlib.sha256(content.encode()).hexdigest()}
    if isinstance(text, tuple | list):
        paths = [Path(path) for path in text]
        hashes = [_file_hash(path) for path in paths]
        files = [{"name": path.name, "sha256": found} for path, found in zip(paths, hashes, strict=True)]
        return (document for path in paths for document in _documents(path, field)), {"files": files}
    return _dataset(text, field), {"dataset": text.dataset, "split": text.split}


def _documents(path: Path, field: str) -> Iterator[str]:
    if path.suffix not in {".jsonl", ".json"}:
        # The separator that text dumps of language-model corpora use.
        yield from (document.strip() for document in _read(path).split("<|endoftext|>") if document.strip())
        return
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield str(json.loads(line)[field])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path.name}:{number} has no text under {field!r}", cause=f"{type(error).__name__}: {error}",
                remedy="each line must be a JSON object; set calibration.field to the key that holds the text",
            ) from error  # fmt: skip


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceUnavailable(
            f"{path} cannot be read as text", cause=f"{type(error).__name__}: {error}", remedy="give a UTF-8 text file"
        ) from error


def _file_hash(path: Path) -> str:
    return hashlib.sha256(_read(path).encode()).hexdigest()


def _dataset(source: Any, field: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingPackage(
            "a dataset was named but `datasets` is not installed", cause=str(error),
            remedy="pip install 'surgery[datasets]'",
        ) from error  # fmt: skip
    name, _, revision = source.dataset.partition("@")
    try:
        rows = load_dataset(name, split=source.split, revision=revision or None, streaming=True)
        for row in rows:
            yield str(row[field])
    except (OSError, ValueError, KeyError) as error:
        raise SourceUnavailable(
            f"the dataset {source.dataset} cannot be read", cause=f"{type(error).__name__}: {error}",
            remedy="check its name, split and calibration.field, and the connection",
        ) from error  # fmt: skip


def calibration_source(calibration: Calibration) -> dict[str, Any]:
    """What identifies the calibration text, by content where it is on this machine."""
    if calibration.text == "self":
        return {"text": "self"}
    return read_documents(calibration.text, calibration.field)[1]


def evaluation_text(text: Any) -> str:
    """The text to measure perplexity on; of `builtin` the part that nothing was trained or calibrated on."""
    if text == "builtin":
        return heldout_text()
    if text == "self":
        raise UsageError(
            "verify.text is `self`", cause="a model's own text says nothing about what it lost on others",
            remedy="name a file, or `builtin`",
        )  # fmt: skip
    documents, _ = read_documents(text, "text")
    found, length = [], 0
    for document in documents:
        found.append(document)
        length += len(document)
        if length >= EVALUATION_CHARACTERS:
            break
    return "\n".join(found)
