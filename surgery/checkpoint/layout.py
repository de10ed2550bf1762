"""Which output tensor goes into which file, and the header bytes of each file."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from surgery.checkpoint.dtypes import BITS
from surgery.checkpoint.expressions import Computed, Stored, TensorSpec, Value, sources
from surgery.checkpoint.header import Header
from surgery.checkpoint.reader import INDEX, SINGLE, Checkpoint

PYTORCH: Mapping[str, str] = {"format": "pt"}


def header_bytes(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] = PYTORCH) -> bytes:
    """Length prefix and JSON for tensors that follow in this order, padded with spaces to eight bytes."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for name, spec in specs.items():
        end = position + spec.nbytes
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


@dataclass(frozen=True)
class Shard:
    """One output file: its tensors in the order of their bytes; `unchanged` names an input file with the same bytes."""

    name: str
    tensors: Mapping[str, Value]
    unchanged: str | None = None

    @property
    def header(self) -> bytes:
        """Length prefix and JSON of this file."""
        return header_bytes({name: value.spec for name, value in self.tensors.items()})

    @property
    def data_bytes(self) -> int:
        """Bytes of tensor data."""
        return sum(value.spec.nbytes for value in self.tensors.values())


def lay_out(checkpoint: Checkpoint, tensors: Mapping[str, Value], shard_size: int | None) -> tuple[Shard, ...]:
    """Assign tensors to files.

    `shard_size` in bytes, or None to keep the base's division (then files that no operation touched stay byte for
    byte what they were). The outputs of one rewrite always share a file, so each rewrite is evaluated once, and stand
    side by side wherever alignment allows, so that it is released at once.
    """
    groups = _group(tensors)
    files = _by_home(checkpoint, groups) if shard_size is None else _by_size(groups, shard_size)
    count = len(files)
    names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return tuple(_finish(checkpoint, name, file) for name, file in zip(names, files, strict=True))


def index_bytes(shards: tuple[Shard, ...]) -> tuple[str, bytes] | None:
    """Name and content of the index, or None for a single file."""
    if len(shards) == 1:
        return None
    index = {
        "metadata": {"total_size": sum(shard.data_bytes for shard in shards)},
        "weight_map": {name: shard.name for shard in shards for name in sorted(shard.tensors)},
    }
    return INDEX, (json.dumps(index, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _group(tensors: Mapping[str, Value]) -> list[dict[str, Value]]:
    """Tensors in order, the outputs of one rewrite together where its first one stands."""
    groups: list[dict[str, Value]] = []
    of_rewrite: dict[int, dict[str, Value]] = {}
    for name, value in tensors.items():
        if isinstance(value, Computed):
            known = of_rewrite.get(id(value.rewrite))
            if known is not None:
                known[name] = value
                continue
            groups.append({name: value})
            of_rewrite[id(value.rewrite)] = groups[-1]
        else:
            groups.append({name: value})
    return groups


def _by_home(checkpoint: Checkpoint, groups: list[dict[str, Value]]) -> list[dict[str, Value]]:
    files: dict[str, dict[str, Value]] = {shard: {} for shard in checkpoint.shards}
    first = next(iter(checkpoint.shards))
    for group in groups:
        home = next((info.shard for info in sources(next(iter(group.values())))), first)
        files[home].update(group)
    return [file for file in files.values() if file]


def _by_size(groups: list[dict[str, Value]], limit: int) -> list[dict[str, Value]]:
    files: list[dict[str, Value]] = []
    used = limit + 1
    for group in groups:
        size = sum(value.spec.nbytes for value in group.values())
        if used + size > limit:
            files.append({})
            used = 0
        files[-1].update(group)
        used += size
    return files


def _finish(checkpoint: Checkpoint, name: str, file: dict[str, Value]) -> Shard:
    """The order of the bytes: the base's own where the file stays as it is, otherwise one that aligns every tensor."""
    home = next((info.shard for value in file.values() for info in sources(value)), None)
    whole = checkpoint.shards.get(home) if home is not None else None
    if whole is not None and whole.metadata.get("format") == "pt" and _same(whole, file):
        return Shard(name, {info.name: file[info.name] for info in whole.tensors}, home)
    grouped = {key: group[key] for group in _group(file) for key in sorted(group, key=lambda key: -_width(group[key]))}
    if _aligned(grouped):
        return Shard(name, grouped)
    return Shard(name, dict(sorted(file.items(), key=lambda item: -_width(item[1]))))


def _same(whole: Header, file: Mapping[str, Value]) -> bool:
    """Whether a file is exactly the tensors of a base file, under their own names."""
    kept = {key: value.info for key, value in file.items() if isinstance(value, Stored)}
    return len(kept) == len(file) and kept == {info.name: info for info in whole.tensors}


def _aligned(tensors: Mapping[str, Value]) -> bool:
    """Whether each tensor, in this order, starts at a multiple of its element's size, as loaders want it."""
    position = 0
    for value in tensors.values():
        if position % max(_width(value) // 8, 1):
            return False
        position += value.spec.nbytes
    return True


def _width(value: Value) -> int:
    return BITS[value.spec.dtype]
