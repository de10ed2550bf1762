"""What is trained on: token windows of one length on disk, and the order in which steps take them.

A corpus is a folder: `train.tokens` and `heldout.tokens` are raw little-endian int32, [N, length] each, and
`corpus.json`, written last, says what they are. Everything about order is a pure function of seed and position, so a
run that goes on at any step needs no saved state.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from surgery.calibration.documents import Document, document_text
from surgery.calibration.text import ROWS, sampled_rows, token_pieces, token_prefix
from surgery.checkpoint.journal import sync_folder
from surgery.checkpoint.writer import environment_errors, hash_file, write_file
from surgery.errors import InternalError, UsageError
from surgery.progress import Progress, Report

FORMAT = 1
RECORD = "corpus.json"
# What an unfinished corpus is being written with, so that only the same settings go on with it.
WRITING = "writing.json"
SIDES = ("train", "heldout")
# What a side is for, and what helps where it stays empty.
SHORT = {"train": ("to train on", "give more text"), "heldout": ("to hold out", "give more text, hold out more of it")}
# With fewer documents than this over the held-out share, chance may well leave a side without any: P = exp(-16).
MANY = 16
# Characters that are looked at to find out whether there are many documents.
LOOKAHEAD = 1 << 26


@dataclass(frozen=True)
class Corpus:
    """Token windows, `train` and `heldout`, int32 [N, length] each and mapped from files, and where they come from."""

    train: Tensor
    heldout: Tensor
    provenance: dict[str, Any]


def pack_corpus(
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    folder: Path,
    length: int,
    tokens: int | None,
    heldout: float,
    seed: int,
    eos: bool = True,
    source: Mapping[str, Any] | None = None,
) -> Corpus:
    """Tokenize documents into windows of exactly `length` tokens, one text after the other, without padding.

    A hash of text and seed chooses the documents that are held out, about the share `heldout` of them. Reading stops
    once `tokens` training tokens are there (None: all) and a window is held out. `eos` ends every text by that token.
    `source` is what identifies the text (see `read_documents`). Raises UsageError where a side has not a single window.
    """
    limits = _limits(length, tokens, heldout) if tokens else (None, None)
    seen, many = _look(iter(documents), heldout)
    _forget(folder)
    with environment_errors(folder), _path(folder, "train").open("wb") as a, _path(folder, "heldout").open("wb") as b:
        train, held = _Side(a, length, limits[0]), _Side(b, length, limits[1])
        for document in seen:
            if train.full and held.windows:
                break
            for text, out in _divided(document, heldout, seed, whole=many):
                (held if out else train).take(_tokens(text, tokenizer, eos=eos))
    for name, side in zip(SIDES, (train, held), strict=True):
        if not side.windows:
            purpose, remedy = SHORT[name]
            raise UsageError(
                f"the training text gives no window of {length} tokens {purpose}",
                cause=f"that part of it has {side.tokens} tokens in {side.documents} documents",
                remedy=f"{remedy}, or set a smaller length",
            )
    counts = {name: {"documents": side.documents} for name, side in zip(SIDES, (train, held), strict=True)}
    split = "documents" if many else "parts of documents"
    return _finish(
        folder, length, {**(source or {}), "split": split, "share": heldout, "seed": seed, "eos": eos}, counts
    )


def write_self(
    model: Any,
    *,
    folder: Path,
    length: int,
    tokens: int,
    heldout: float,
    seed: int,
    start: int,
    report: Report,
    stage: str = "text",
) -> Corpus:
    """A corpus that the model writes itself, at temperature 1 from token `start`, about `tokens` tokens to train on.

    Every batch has a seed of its own and is on disk before the next one, so a killed run goes on and ends with the
    same bytes; the caller sees to it that a folder belongs to one model. Raises CorruptCheckpoint.
    """
    train, held = _limits(length, tokens, heldout)
    settings = {"length": length, "tokens": tokens, "heldout": heldout, "seed": seed, "start": start}
    if _record(folder / WRITING) != settings:
        _forget(folder)
        for name in SIDES:
            _path(folder, name).unlink(missing_ok=True)
        write_file(folder / WRITING, json.dumps(settings).encode())
    batches = [(name, range(at, min(at + ROWS, rows))) for name, rows in zip(SIDES, (train, held), strict=True)
               for at in range(0, rows, ROWS)]  # fmt: skip
    done = 0
    for number, (name, rows) in enumerate(batches):
        path = _path(folder, name)
        with environment_errors(path), path.open("ab") as file:
            if os.fstat(file.fileno()).st_size < rows.stop * length * 4:
                file.truncate(rows.start * length * 4)  # a torn batch is written again
                generator = _generator("self", seed, number)
                file.write(_raw(sampled_rows(model, start=start, count=len(rows), length=length, generator=generator)))
                file.flush()
                os.fsync(file.fileno())
        done += len(rows)
        report(Progress(stage, done * length, (train + held) * length, "tokens"))
    return _finish(folder, length, {"text": "self", "start": start, "seed": seed}, {name: {} for name in SIDES})


def open_corpus(folder: Path) -> Corpus | None:
    """The finished corpus of a folder; None where there is none, or its files do not have the sizes it names."""
    record = _record(folder / RECORD)
    try:
        if record["corpus"] != FORMAT:
            return None
        provenance = record["provenance"]
        shapes = [(int(provenance[name]["windows"]), int(provenance["length"])) for name in SIDES]
        sizes = [_path(folder, name).stat().st_size for name in SIDES]
        if sizes != [n * m * 4 for n, m in shapes] or min(sizes) == 0:
            return None
    except (OSError, KeyError, TypeError, ValueError):
        return None
    # Mapped privately: a page is read when it is touched, and nothing that is done to the tensor reaches the file.
    train, heldout = (
        torch.from_file(str(_path(folder, name)), shared=False, size=n * m, dtype=torch.int32).view(n, m)
        for name, (n, m) in zip(SIDES, shapes, strict=True)
    )
    return Corpus(train, heldout, provenance)


def shuffled(count: int, *, seed: int, epoch: int) -> Tensor:
    """The order [count], int64, in which an epoch takes its windows."""
    return torch.randperm(count, generator=_generator("epoch", seed, epoch))


def rows_of(count: int, *, step: int, batch_size: int, seed: int) -> Tensor:
    """Which of `count` windows an optimizer step (from 0) takes: int64 [batch_size], from endless shuffled epochs.

    A function of its arguments alone, so any step can be gone on from. A batch may straddle epochs.
    """
    places = [divmod(at, count) for at in range(step * batch_size, (step + 1) * batch_size)]
    return torch.stack([_order(count, seed, epoch)[at] for epoch, at in places])


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return shuffled(count, seed=seed, epoch=epoch)


def _generator(what: str, seed: int, number: int) -> torch.Generator:
    # Hashed, because torch's generator on the CPU starts from the lowest 32 bits alone.
    digest = hashlib.blake2b(f"{what}:{seed}:{number}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _limits(length: int, tokens: int, heldout: float) -> tuple[int, int]:
    """Windows to train on and to hold out, at least one each, where `tokens` are wanted for training."""
    train = -(-tokens // length)
    return train, max(1, round(train * heldout / (1 - heldout)))


class _Side:
    """The windows of one side, cut from a stream of tokens and appended to a file; no more than `limit` of them."""

    def __init__(self, file: BinaryIO, length: int, limit: int | None) -> None:
        self.documents = self.tokens = self.windows = 0
        self._file, self._length, self._limit = file, length, limit
        self._rest: list[int] = []

    @property
    def full(self) -> bool:
        return self._limit is not None and self.windows >= self._limit

    def take(self, pieces: Iterable[list[int]]) -> None:
        """Take the tokens of one document; a full side does not even ask for them."""
        if self.full:
            return
        self.documents += 1
        for ids in pieces:
            self.tokens += len(ids)
            self._rest += ids
            count = len(self._rest) // self._length
            if self._limit is not None:
                count = min(count, self._limit - self.windows)
            self._file.write(_raw(self._rest[: count * self._length]))
            del self._rest[: count * self._length]
            self.windows += count
            if self.full:
                return


def _look(documents: Iterator[Document], heldout: float) -> tuple[Iterator[Document], bool]:
    """The same documents, and whether they are many enough to be divided as wholes."""
    seen: list[Document] = []
    size = 0
    for document in documents:
        seen.append(document)
        size += len(document)
        if len(seen) * heldout >= MANY or size >= LOOKAHEAD:
            break
    return chain(seen, documents), len(seen) * heldout >= MANY


def _divided(document: Document, heldout: float, seed: int, *, whole: bool) -> Iterator[tuple[Document, bool]]:
    """The parts of a document that hold anything, and whether each is held out."""
    if not document:
        return
    if whole or not isinstance(document, str):
        # Messages and not what a template makes of them, which may hold today's date.
        content = document if isinstance(document, str) else json.dumps(document, sort_keys=True, default=str)
        digest = hashlib.blake2b(f"{seed}:{content}".encode(), digest_size=8).digest()
        yield document, int.from_bytes(digest, "big") < heldout * 2**64
        return
    # A few long texts, one in the case of `builtin`: a side could stay empty, or get nearly all. So the end of each is
    # held out, from a break between paragraphs, lines or words on. Equal documents are cut equally.
    target = len(document) - round(len(document) * heldout)
    near = target + (len(document) - target) // 2
    cuts = (at + len(mark) for mark in ("\n\n", "\n", " ") if (at := document.find(mark, target, near)) >= 0)
    cut = next(cuts, target)
    yield from ((part, out) for part, out in ((document[:cut], False), (document[cut:], True)) if part)


def _tokens(document: Document, tokenizer: Any, *, eos: bool) -> Iterator[list[int]]:
    """The tokens of a document in pieces: a text begun as the tokenizer does and ended by eos, a chat as rendered."""
    if not isinstance(document, str):
        yield from token_pieces(document_text(document, tokenizer), tokenizer)
        return
    yield token_prefix(tokenizer)
    yield from token_pieces(document, tokenizer)
    if eos and tokenizer.eos_token_id is not None:
        yield [tokenizer.eos_token_id]


def _raw(tokens: Tensor | list[int]) -> bytes:
    return np.asarray(tokens, dtype="<i4").tobytes()


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.tokens"


def _record(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _forget(folder: Path) -> None:
    """Make the folder, and take back what says that a corpus is finished or under way in it."""
    with environment_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (RECORD, WRITING):
            (folder / name).unlink(missing_ok=True)


def _finish(folder: Path, length: int, facts: dict[str, Any], counts: dict[str, dict[str, Any]]) -> Corpus:
    """Count and hash the token files, and write the record that makes them a corpus."""
    sides = {}
    for name in SIDES:
        file = hash_file(_path(folder, name))
        windows = file.bytes // (4 * length)
        sides[name] = {**counts[name], "windows": windows, "tokens": windows * length, "sha256": file.sha256}
    record = {"corpus": FORMAT, "provenance": {**facts, "length": length, **sides}}
    temporary = folder / f"{RECORD}.{os.getpid()}"
    write_file(temporary, json.dumps(record, indent=1).encode())
    with environment_errors(folder):
        temporary.replace(folder / RECORD)
        sync_folder(folder)
    found = open_corpus(folder)
    if found is None:
        raise InternalError(
            f"the corpus that was just written to {folder.name} does not open", cause="its files changed meanwhile",
            remedy="see that nothing else writes there, and run the command again",
        )  # fmt: skip
    return found
