"""The safetensors header, parsed as hostile input.

Layout of a file: eight bytes little-endian header length, that many bytes of JSON, then one data section that the
tensors tile without gap or overlap. Everything here reads the first two parts only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.checkpoint.dtypes import BITS, byte_count
from surgery.errors import CorruptCheckpoint

MAX_HEADER_BYTES = 100_000_000
MAX_JSON_VALUES = 2_000_000
MAX_JSON_DEPTH = 64
MAX_TENSOR_NAME = 512
MAX_DIMENSIONS = 16


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor: where its bytes are and how they are to be read.

    `offset` counts from the start of the file, `nbytes` is the length there; `shard` is a base name.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A parsed file header: tensors in the order of their bytes, and the hash of the header itself."""

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str] = field(default_factory=dict)
    sha256: str = ""
    file_bytes: int = 0


def parse_json(raw: bytes, what: str, *, constants: bool = False) -> Any:
    """Decode JSON strictly: UTF-8, no duplicate keys, bounded size and nesting. Raises CorruptCheckpoint.

    `constants` admits NaN and Infinity, which are no JSON but which Python writes into some configs.
    """
    try:
        return _strict_json(raw, constants=constants)
    except RecursionError:
        cause = "it is nested too deeply"
    except UnicodeDecodeError as error:
        cause = f"it is not UTF-8 at byte {error.start}"
    except ValueError as error:
        cause = str(error)
    raise CorruptCheckpoint(f"{what} cannot be read", cause=cause, remedy="download the file again, or correct it")


def _strict_json(raw: bytes, *, constants: bool) -> Any:
    # Commas bound the number of values, so that a small file cannot grow into gigabytes of objects.
    if raw.count(b",") > MAX_JSON_VALUES:
        raise ValueError(f"it has more than {MAX_JSON_VALUES} values")
    constant = float if constants else _no_constant
    value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=constant)
    if _deeper_than(value, MAX_JSON_DEPTH):
        raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} deep")
    return value


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} appears twice")
    return found


def _deeper_than(value: Any, limit: int) -> bool:
    """Whether containers nest deeper than `limit`; goes level by level, so that it cannot itself recurse too deep."""
    level = [value]
    for _ in range(limit):
        containers = [item for item in level if isinstance(item, dict | list)]
        if not containers:
            return False
        level = [inner for item in containers for inner in (item.values() if isinstance(item, dict) else item)]
    return any(isinstance(item, dict | list) for item in level)


def read_header(path: Path) -> Header:
    """Read and check the header of one safetensors file. Raises CorruptCheckpoint; reads no tensor data."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _corrupt(path, f"the file has {size} bytes, too few for a header")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise _corrupt(path, f"the header claims {length} bytes, more than the {MAX_HEADER_BYTES} that are allowed")
        if length > size - 8:
            raise _corrupt(path, f"the header claims {length} bytes, the file has {size}")
        raw = file.read(length)
    return parse_header(raw, path.name, size)


def parse_header(raw: bytes, shard: str, file_bytes: int) -> Header:
    """Check header bytes `raw` of a file named `shard` with `file_bytes` bytes in all."""
    entries = parse_json(raw, f"the header of {shard}")
    if not isinstance(entries, dict):
        raise _corrupt(shard, "the header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt(shard, "__metadata__ is not a map of strings")
    start = 8 + len(raw)
    tensors = sorted(
        (_tensor(name, entry, shard, start) for name, entry in entries.items()), key=lambda t: (t.offset, t.nbytes)
    )
    position = start
    for tensor in tensors:
        if tensor.offset != position:
            kind = "overlaps the one before it" if tensor.offset < position else "leaves a gap before it"
            raise _corrupt(shard, f"tensor {tensor.name!r} {kind}")
        position += tensor.nbytes
    if position != file_bytes:
        kind = "truncated" if position > file_bytes else "followed by bytes that no tensor owns"
        raise _corrupt(shard, f"the data is {kind}: tensors end at byte {position}, the file at {file_bytes}")
    return Header(tuple(tensors), metadata, hashlib.sha256(raw).hexdigest(), file_bytes)


def _tensor(name: str, entry: Any, shard: str, start: int) -> TensorInfo:
    shown = name[:80]
    if not name or len(name) > MAX_TENSOR_NAME or not name.isprintable():
        raise _corrupt(shard, f"the tensor name {shown!r} is empty, too long or not printable")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _corrupt(shard, f"tensor {shown!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _corrupt(shard, f"tensor {shown!r} has the unknown dtype {_shown(dtype)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_is_count(size) for size in shape):
        raise _corrupt(shard, f"tensor {shown!r} has the shape {_shown(shape)}, not a list of counts")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise _corrupt(shard, f"tensor {shown!r} has offsets {_shown(offsets)}, not two counts")
    begin, end = offsets
    if not _is_count(math.prod(size for size in shape if size)):
        raise _corrupt(shard, f"tensor {shown!r} has a shape that no machine can index")
    try:
        needed = byte_count(dtype, tuple(shape))
    except ValueError as error:
        raise _corrupt(shard, f"tensor {shown!r}: {error}") from error
    if end - begin != needed:
        raise _corrupt(
            shard, f"tensor {shown!r} takes {needed} bytes as {dtype} {shape}, its offsets give {end - begin}"
        )
    return TensorInfo(name, dtype, tuple(shape), shard, start + begin, needed)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _shown(value: Any) -> str:
    """A hostile value for a message: short, and printable."""
    return ascii(value)[:80]


def _corrupt(where: Path | str, cause: str) -> CorruptCheckpoint:
    name = where.name if isinstance(where, Path) else where
    return CorruptCheckpoint(f"{name} is not a sound safetensors file", cause=cause, remedy="download the file again")
