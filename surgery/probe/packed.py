"""What of a checkpoint's tensors are packed weights."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import safe_open


def packed_modules(folder: Path) -> list[str]:
    """Names of the modules with rounded weights."""
    names = [re.fullmatch(r"(.*)\.(weight_scale|qweight)", name) for name in tensor_files(folder)]
    return [found[1] for found in names if found]


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of every tensor."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found
