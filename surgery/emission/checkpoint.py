"""Writing everything of a checkpoint that is not a weight: config, code, and the files that came with the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from surgery.checkpoint.journal import Finished
from surgery.checkpoint.reader import Checkpoint
from surgery.checkpoint.writer import write_file
from surgery.emission.code import Family, emit_code
from surgery.emission.config import custom_config, down_level
from surgery.emission.side_files import carry
from surgery.planning import Draft
from surgery.version import __version__


def write_small_files(checkpoint: Checkpoint, draft: Draft, folder: Path) -> list[Finished]:
    """Write config.json, the code that the draft needs (none for a stock result), and the carried side files."""
    written = [write_file(folder / "config.json", json_bytes(result_config(draft)))]
    written += [write_file(folder / name, content) for name, content in result_code(draft).items()]
    return [*written, *carry(checkpoint, folder, already={file.file for file in written})]


def result_config(draft: Draft) -> dict[str, Any]:
    """The config.json of the result, in the spelling that every supported transformers version reads."""
    if draft.parts and draft.architecture is not None:
        ours = {"version": 1, "base_model_type": draft.architecture.model_type} | draft.root.get("surgery", {})
        return custom_config(draft.root, Family.of(draft.architecture), ours)
    return down_level(draft.root)


def result_code(draft: Draft) -> dict[str, bytes]:
    """The Python files of the result by name; empty where a stock class holds it."""
    if not draft.parts or draft.architecture is None:
        return {}
    return emit_code(Family.of(draft.architecture), draft.parts, __version__)


def json_bytes(data: Any) -> bytes:
    """JSON as checkpoints have it: two spaces, sorted, a newline at the end."""
    return (json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
