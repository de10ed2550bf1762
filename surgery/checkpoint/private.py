"""Private folders for checkpoints that are made from others: gone when the process ends."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

from surgery.checkpoint.reader import inner_path, side_files

CARD = "README.md"


def private_folder() -> Path:
    """A fresh folder that only this user can enter (under TMPDIR), removed at exit."""
    folder = Path(tempfile.mkdtemp(prefix="surgery-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def copy_small_files(source: Path, target: Path) -> None:
    """Copy config.json, the card and every carried side file, with their times. Raises as `contained` does."""
    files = side_files(source, {"config.json"}, remote_code=True)
    names = ["config.json", *(file.name for file in files if not file.dropped)]
    if (source / CARD).is_symlink() or (source / CARD).is_file():
        names.append(CARD)
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copy2(inner_path(source, name), target / name)
