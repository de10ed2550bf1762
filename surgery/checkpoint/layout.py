"""Which output tensor goes into which file, and the header bytes of each file."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from surgery.checkpoint.dtypes import BITS
from surgery.checkpoint.expressions import Computed, Stored, Value, sources
from surgery.checkpoint.reader import INDEX, SINGLE, Checkpoint


@dataclass(frozen=True)
class Shard:
    """One output file: its tensors in the order of their bytes; `unchanged` names an input file with the same bytes."""

    name: str
    tensors: Mapping[str, Value]
    unchanged: str | None = None

    @property
    def header(self) -> bytes:
        """Length prefix and JSON, padded with spaces to eight bytes."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, value in self.tensors.items():
            spec = value.spec
            entries[name] = {
                "dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, position + spec.nbytes]
            }  # fmt: skip
            position += spec.nbytes
        raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        return struct.pack("<Q", len(raw)) + raw

    @property
    def data_bytes(self) -> int:
        """Bytes of tensor data."""
        return sum(value.spec.nbytes for value in self.tensors.values())


def lay_out(checkpoint: Checkpoint, tensors: Mapping[str, Value], shard_size: int | None) -> tuple[Shard, ...]:
    """Assign tensors to files.

    `shard_size` in bytes, or None to keep the base's division (then files that no operation touched stay byte for
    byte what they were). The outputs of one rewrite always share a file, so each rewrite is evaluated once.
    """
    groups = _group(tensors)
    files = _by_home(checkpoint, groups) if shard_size is None else _by_size(groups, shard_size)
    names = [SINGLE] if len(files) == 1 else [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
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
            of_rewrite[id(value.rewrite)] = group = {name: value}
            groups.append(group)
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
    """Widest elements first, so that every tensor is aligned; otherwise in the order given."""
    ordered = dict(sorted(file.items(), key=lambda item: -BITS[item[1].spec.dtype]))
    infos = [value.info if isinstance(value, Stored) and value.info.name == key else None for key, value in ordered.items()]
    first = infos[0]
    if first is None:
        return Shard(name, ordered)
    whole = checkpoint.shards.get(first.shard)
    same = whole is not None and whole.tensors == tuple(infos) and whole.metadata.get("format") == "pt"
    return Shard(name, ordered, first.shard if same else None)
