"""Calibration text as token windows: plain files, jsonl, a dataset, the built-in text, or text sampled from the base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.errors import MissingPackage, SourceUnavailable, UsageError

if TYPE_CHECKING:
    from surgery.manifest import Calibration

# Enough characters that windows can be spread over a text without tokenizing all of a large one.
CHARACTERS_PER_TOKEN = 32


@dataclass(frozen=True)
class Windows:
    """Token windows [samples, length] with the provenance that the lock keeps."""

    tokens: Tensor
    provenance: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens themselves."""
        return hashlib.sha256(self.tokens.to(torch.int64).numpy().tobytes()).hexdigest()


def text_windows(calibration: Calibration, tokenizer: Any, longest: int | None) -> Windows:
    """Windows of the calibration text; every one starts as the tokenizer starts a text.

    `longest` bounds the window length (the model's context). Raises UsageError where the text is too short.
    """
    length = min(calibration.length, longest or calibration.length)
    documents, provenance = read_text(calibration)
    start = _prefix(tokenizer)
    body = length - len(start)
    wanted = calibration.samples * body
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document, add_special_tokens=False)["input_ids"]
        if len(ids) >= wanted * 4:
            break
    count = min(len(ids) // body, calibration.samples) if body > 0 else 0
    if count == 0:
        raise UsageError(
            f"the calibration text has {len(ids)} tokens", cause=f"one window takes {body}",
            remedy="give more text, or a smaller calibration length",
        )  # fmt: skip
    places = torch.randperm(len(ids) // body, generator=torch.Generator().manual_seed(calibration.seed))[:count]
    stream = torch.tensor(ids)
    rows = [torch.cat([torch.tensor(start, dtype=torch.int64), stream[p * body : (p + 1) * body]]) for p in places.sort().values]
    return Windows(torch.stack(rows), {**provenance, "samples": count, "length": length, "seed": calibration.seed})


def read_text(calibration: Calibration) -> tuple[Iterator[str], dict[str, Any]]:
    """The documents of a calibration source, and what identifies it."""
    text = calibration.text
    if text == "builtin":
        from surgery.builtin.text import training_text

        content = training_text()
        return iter([content]), {"text": "builtin", "sha256": hashlib.sha256(content.encode()).hexdigest()}
    if isinstance(text, tuple | list):
        paths = [Path(path) for path in text]
        hashes = [_file_hash(path) for path in paths]
        files = [{"name": path.name, "sha256": found} for path, found in zip(paths, hashes, strict=True)]
        return (document for path in paths for document in _documents(path, calibration.field)), {"files": files}
    return _dataset(text, calibration.field), {"dataset": text.dataset, "split": text.split}


def _documents(path: Path, field: str) -> Iterator[str]:
    if path.suffix not in {".jsonl", ".json"}:
        yield _read(path)
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
            "a dataset was named but `datasets` is not installed", cause=str(error), remedy="pip install 'surgery[datasets]'"
        ) from error
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


def _prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: usually the bos token or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return list(full[: full.index(bare[0])]) if bare and bare[0] in full else []


def sampled_windows(model: Any, calibration: Calibration, longest: int | None, start: int) -> Windows:
    """Windows that the base itself writes, token by token at temperature 1 from token `start`."""
    length = min(calibration.length, longest or calibration.length)
    generator = torch.Generator().manual_seed(calibration.seed)
    rows: list[Tensor] = []
    with torch.no_grad():
        for first in range(0, calibration.samples, 32):
            count = min(32, calibration.samples - first)
            rows.append(_sample(model, torch.full((count, 1), start), length, generator))
    provenance = {"text": "self", "samples": calibration.samples, "length": length, "seed": calibration.seed}
    return Windows(torch.cat(rows), provenance)


def _sample(model: Any, tokens: Tensor, length: int, generator: torch.Generator) -> Tensor:
    cache, last = None, tokens
    while tokens.shape[1] < length:
        out = model(input_ids=last.to(model.device), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        chances = out.logits[:, -1].float().softmax(-1).cpu()
        last = torch.multinomial(chances, 1, generator=generator)
        tokens = torch.cat([tokens, last], 1)
    return tokens
