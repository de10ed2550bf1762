"""What came with the base and is no weight: tokenizer, templates, processor, licence, carried as bytes.

Two files are mended where they would not load or could not be saved again; every change is told by `repairs`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.checkpoint.journal import Finished
from surgery.checkpoint.reader import CARRIED_FOLDER, Checkpoint, inner_path, read_json
from surgery.checkpoint.writer import copy_file, environment_errors, hash_file, write_file
from surgery.emission.config import down_level_tokenizer
from surgery.errors import CorruptCheckpoint

TOKENIZER = "tokenizer_config.json"
GENERATION = "generation_config.json"
# Settings that only sampling reads, with the values at which transformers takes them for unset.
_SAMPLING: Mapping[str, float | None] = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None,
    "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Repair:
    """A side file that is not carried as it is: its new content, and a line that says what changed and why."""

    name: str
    content: bytes
    note: str


def repairs(checkpoint: Checkpoint) -> tuple[Repair, ...]:
    """The side files that are changed on the way. Raises CorruptCheckpoint where one of them is no JSON object."""
    carried = {file.name for file in checkpoint.side_files if not file.dropped}
    makers = {TOKENIZER: _tokenizer, GENERATION: _generation}
    found = (maker(_object(checkpoint, name)) for name, maker in makers.items() if name in carried)
    return tuple(repair for repair in found if repair is not None)


def carry(checkpoint: Checkpoint, folder: Path, *, already: Collection[str] = ()) -> list[Finished]:
    """Write every carried side file of `checkpoint` into `folder`; names in `already` are left as they are there.

    Raises what reading and writing raise: a file that cannot be carried is an error.
    """
    changed = {repair.name: repair.content for repair in repairs(checkpoint)}
    written = []
    for name in (file.name for file in checkpoint.side_files if not file.dropped and file.name not in already):
        target = folder / name
        if name.startswith(f"{CARRIED_FOLDER}/"):
            with environment_errors(target):
                target.parent.mkdir(exist_ok=True)
        source = inner_path(checkpoint.folder, name)
        finished = _there(target, changed.get(name, source))
        if finished is None:
            finished = write_file(target, changed[name]) if name in changed else copy_file(source, target)
        written.append(replace(finished, file=name))
    return written


def _there(target: Path, wanted: bytes | Path) -> Finished | None:
    """A file that an interrupted run wrote. It is left alone, for what was measured on it goes by its time."""
    if not target.is_file() or target.is_symlink():
        return None
    found = hash_file(target)
    sha256 = hash_file(wanted).sha256 if isinstance(wanted, Path) else hashlib.sha256(wanted).hexdigest()
    return found if found.sha256 == sha256 else None


def _tokenizer(config: dict[str, Any]) -> Repair | None:
    lower = down_level_tokenizer(config)
    if lower == config:
        return None
    return Repair(TOKENIZER, _json_bytes(lower), f"{TOKENIZER}: spelled so that transformers 4.x reads it too")


def _generation(config: dict[str, Any]) -> Repair | None:
    """Settings of sampling beside `do_sample: false`: without effect, but with them the model cannot be saved."""
    if config.get("do_sample") is not False:
        return None
    idle = [name for name, unset in _SAMPLING.items() if config.get(name) is not None and config[name] != unset]
    if not idle:
        return None
    kept = {name: value for name, value in config.items() if name not in idle}
    note = f"{GENERATION}: dropped {', '.join(idle)}, which do_sample: false makes idle and saving refuses"
    return Repair(GENERATION, _json_bytes(kept), note)


def _object(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    found = read_json(checkpoint.folder, name)
    if not isinstance(found, dict):
        raise CorruptCheckpoint(
            f"{name} is not a JSON object",
            cause=f"it is a {type(found).__name__}",
            remedy="download it again, or remove it",
        )
    return found


def _json_bytes(data: Mapping[str, Any]) -> bytes:
    """In the order of the original, so that a reader sees only what changed."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
