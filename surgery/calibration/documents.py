"""Texts and chats as documents: plain files, jsonl, a dataset, or what every Python carries. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from surgery.builtin.text import DOMAINS, heldout_documents, heldout_text, training_documents, training_text
from surgery.errors import MissingPackage, SourceUnavailable, UsageError

if TYPE_CHECKING:
    from surgery.manifest import Calibration, Data

# A text, or a chat: messages with a `role`, a `content`, and whatever else the chat template may want to see.
Document: TypeAlias = str | tuple[Mapping[str, Any], ...]

# Words for texts that every Python carries, with the domains of builtin/text.py; `builtin` alone is the first of them.
BUILTIN_TEXTS: Mapping[str, tuple[str, ...]] = {
    "builtin": DOMAINS[:1], "builtin:code": ("code",), "builtin:records": ("records",), "builtin:mixed": DOMAINS,
}  # fmt: skip

# The separator that text dumps of language-model corpora use.
SEPARATOR = "<|endoftext|>"
# What evaluation reads of a text at most; its windows are far fewer.
EVALUATION_CHARACTERS = 4_000_000


def read_documents(text: Any, field: str) -> tuple[Iterator[Document], dict[str, Any]]:
    """The documents of a text as manifests name it (files, `builtin` or a dataset), and what identifies it."""
    if text == "builtin":
        content = training_text()
        return iter([content]), {"text": "builtin", "sha256": hashlib.sha256(content.encode()).hexdigest()}
    if isinstance(text, str) and text in BUILTIN_TEXTS:
        documents = _of_domains(text, training_documents)
        digest = hashlib.sha256("\0".join(documents).encode())
        return iter(documents), {"text": text, "sha256": digest.hexdigest()}
    if isinstance(text, tuple | list):
        paths = [Path(path) for path in text]
        hashes = [_file_hash(path) for path in paths]
        files = [{"name": path.name, "sha256": found} for path, found in zip(paths, hashes, strict=True)]
        return (document for path in paths for document in _documents(path, field)), {"files": files}
    return _dataset(text, field), {"dataset": text.dataset, "split": text.split}


def document_text(document: Document, tokenizer: Any) -> str:
    """A text as it is, a chat as the tokenizer's template writes it. Raises UsageError where that cannot be done."""
    if isinstance(document, str):
        return document
    from jinja2 import TemplateError

    try:
        rendered = tokenizer.apply_chat_template([dict(message) for message in document], tokenize=False)
    except (TypeError, ValueError, TemplateError) as error:
        missing = getattr(tokenizer, "chat_template", None) is None
        raise UsageError(
            "the text holds a chat that the tokenizer cannot write out",
            cause="the tokenizer has no chat template" if missing else f"{type(error).__name__}: {error}",
            remedy="give plain text, or a base whose tokenizer has a chat template that fits these messages",
        ) from error  # fmt: skip
    return str(rendered)


def plain_text(document: Document) -> str:
    """The words of a document where no tokenizer is at hand: a text as it is, of a chat what was said, in lines."""
    return document if isinstance(document, str) else "\n".join(message["content"] for message in document)


def _documents(path: Path, field: str) -> Iterator[Document]:
    if path.suffix not in {".jsonl", ".json"}:
        yield from (document for text in _separated(_lines(path)) if (document := text.strip()))
        return
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            yield _document(json.loads(line)[field])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(
                f"{path.name}:{number} has no text under {field!r}", cause=f"{type(error).__name__}: {error}",
                remedy="each line must be a JSON object; set field to the key that holds the text or the messages",
            ) from error  # fmt: skip


def _document(value: Any) -> Document:
    """What stands under the field, as a document. Raises TypeError, or ValueError for half a surrogate pair."""
    if isinstance(value, str):
        _ = value.isascii() or value.encode()
        return value
    if not isinstance(value, list | tuple) or not value:
        raise TypeError(f"it is {_kind(value)}, not a text or a list of messages")
    for message in value:
        if not isinstance(message, Mapping):
            raise TypeError(f"it is a list with an entry {_kind(message)}, not of messages")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise TypeError(f"a message of it has no text under {key!r}")
            message[key].encode()
    # Data sets give every row every key; a template takes a key that is None for one that was meant.
    return tuple({key: given for key, given in message.items() if given is not None} for message in value)


def _kind(value: Any) -> str:
    return "an empty list" if isinstance(value, list | tuple) and not value else f"of type {type(value).__name__}"


def _separated(lines: Iterable[str]) -> Iterator[str]:
    """The texts between separators; a file need not fit into memory, only its longest text."""
    found: list[str] = []
    for line in lines:
        first, *others = line.split(SEPARATOR)
        found.append(first)
        for other in others:
            yield "".join(found)
            found = [other]
    yield "".join(found)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        raise SourceUnavailable(
            f"{path} cannot be read as text", cause=f"{type(error).__name__}: {error}", remedy="give a UTF-8 text file"
        ) from error


def _file_hash(path: Path) -> str:
    """SHA-256 of the text of a file, with its line ends as Python reads them."""
    digest = hashlib.sha256()
    for line in _lines(path):
        digest.update(line.encode())
    return digest.hexdigest()


def _dataset(source: Any, field: str) -> Iterator[Document]:
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
        for number, row in enumerate(rows, 1):
            yield _row(row[field], f"row {number} of {source.dataset}", field)
    except (OSError, ValueError, KeyError) as error:
        raise SourceUnavailable(
            f"the dataset {source.dataset} cannot be read", cause=f"{type(error).__name__}: {error}",
            remedy="check its name and split, set field to the key that holds the text, and see to the connection",
        ) from error  # fmt: skip


def _row(value: Any, place: str, field: str) -> Document:
    try:
        return _document(value)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{place} has no text under {field!r}", cause=f"{type(error).__name__}: {error}",
            remedy="set field to the key that holds the text or the messages",
        ) from error  # fmt: skip


def _of_domains(word: str, documents: Callable[[str], tuple[str, ...]]) -> list[str]:
    """The built-in documents of one domain, or of all by turns, so that any beginning has as many of each."""
    turns = zip_longest(*(documents(domain) for domain in BUILTIN_TEXTS[word]))
    return [document for turn in turns for document in turn if document is not None]


def text_source(section: Calibration | Data) -> dict[str, Any]:
    """What identifies the text of a section of the manifest, by content where it is on this machine."""
    if section.text == "self":
        return {"text": "self"}
    return read_documents(section.text, section.field)[1]


def evaluation_text(text: Any) -> str:
    """The text to measure perplexity on; of `builtin` the part that nothing was trained or calibrated on."""
    if text == "builtin":
        return heldout_text()
    if isinstance(text, str) and text in BUILTIN_TEXTS:
        return "\n\n".join(_of_domains(text, heldout_documents))
    if text == "self":
        raise UsageError(
            "verify.text is `self`", cause="a model's own text says nothing about what it lost on others",
            remedy="name a file, or `builtin`",
        )  # fmt: skip
    documents, _ = read_documents(text, "text")
    found, length = [], 0
    for document in documents:
        found.append(plain_text(document))
        length += len(found[-1])
        if length >= EVALUATION_CHARACTERS:
            break
    return "\n".join(found)
