"""Statistics on disk: their tensors as safetensors, read one at a time, their facts as JSON in the file's metadata."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from surgery.checkpoint.dtypes import BITS, SAFETENSORS_NAMES
from surgery.checkpoint.evaluate import to_bytes
from surgery.checkpoint.expressions import TensorSpec
from surgery.checkpoint.layout import header_bytes
from surgery.checkpoint.reader import reading_errors
from surgery.checkpoint.writer import environment_errors
from surgery.errors import UsageError
from surgery.operations.base import Statistics


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of safetensors files, each read when it is asked for."""

    def __init__(self, *paths: Path) -> None:
        self._home: dict[str, Path] = {}
        for path in paths:
            with safe_open(path, "pt") as file:
                self._home |= dict.fromkeys(file.keys(), path)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._home[name], "pt") as file:
            found: Tensor = file.get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)


def store_statistics(path: Path, found: Statistics) -> Statistics:
    """Write statistics to a file, whole or not at all; returns what reading it gives."""
    with environment_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        specs = {name: _spec(found.tensors[name]) for name in sorted(found.tensors)}
        ordered = sorted(specs, key=lambda name: -BITS[specs[name].dtype])  # so that every tensor is aligned
        metadata = {"facts": json.dumps(found.facts), "fingerprint": found.fingerprint}
        try:
            with temporary.open("wb") as file:  # one tensor at a time: together they may be as large as the model
                file.write(header_bytes({name: specs[name] for name in ordered}, metadata))
                for name in ordered:
                    file.write(to_bytes(found.tensors[name]))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return load_statistics(path)


def _spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(SAFETENSORS_NAMES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))


def statistics_digest(found: Statistics) -> str:
    """A hash of everything that was measured."""
    digest = hashlib.sha256(json.dumps(dict(found.facts), sort_keys=True).encode())
    for name in sorted(found.tensors):
        digest.update(name.encode())
        digest.update(found.tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_statistics(path: Path) -> Statistics:
    """The statistics of a file that `store_statistics` wrote. Raises UsageError for any other file."""
    try:
        with reading_errors(path), safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return Statistics(StoredTensors(path), dict(json.loads(metadata["facts"])), metadata["fingerprint"])
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path.name} is not a file of statistics", cause=f"{type(error).__name__}: {error}"[:200],
            remedy="name a file that a calibration of surgery wrote, or delete it to measure again",
        ) from error  # fmt: skip
