"""The journal of a conversion: which output files are finished, so that the same command can go on after a crash.

`OUT.partial/journal.jsonl` has one JSON object a line. The first names the fingerprint of manifest, base and version;
each other names a finished file with its size and hash. A torn last line is ignored.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from surgery.errors import EnvironmentFailure, OutputExists

FORMAT = 1
NAME = "journal.jsonl"


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished output file."""

    file: str
    bytes: int
    sha256: str


@dataclass
class Journal:
    """An open journal. `finished` holds what earlier runs completed, by file name relative to OUT.partial."""

    path: Path
    finished: dict[str, Finished]
    _lock: Lock = field(default_factory=Lock)

    def record(self, entry: Finished) -> None:
        """Append one finished file and sync, so that it survives a crash from here on."""
        line = json.dumps({"file": entry.file, "bytes": entry.bytes, "sha256": entry.sha256})
        with self._lock:
            _append(self.path, line)
            self.finished[entry.file] = entry


def start_journal(folder: Path, fingerprint: str) -> Journal:
    """Write the first line of a fresh journal in `folder`."""
    path = folder / NAME
    path.unlink(missing_ok=True)
    _append(path, json.dumps({"surgery": FORMAT, "fingerprint": fingerprint}))
    sync_folder(folder)
    return Journal(path, {})


def read_journal(folder: Path) -> tuple[str, Journal] | None:
    """The fingerprint and journal of an earlier run in `folder`, or None where there is no readable one."""
    path = folder / NAME
    if not path.is_file():
        return None
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        first = json.loads(lines[0])
        if first["surgery"] != FORMAT:
            return None
        fingerprint = str(first["fingerprint"])
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    entries = [entry for line in lines[1:] if (entry := _entry(line)) is not None]
    return fingerprint, Journal(path, {entry.file: entry for entry in entries})


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold OUT.partial against a second conversion into the same place. Raises OutputExists."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputExists(
                f"another conversion is writing to {folder.name}", cause="its lock is held",
                remedy="wait for it, or choose another OUT",
            ) from error  # fmt: skip
        except OSError as error:
            raise EnvironmentFailure(
                f"{folder.name} cannot be locked", cause=f"{type(error).__name__}: {error.strerror}",
                remedy="choose an OUT on a file system that has locks",
            ) from error  # fmt: skip
        yield


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entry(line: bytes) -> Finished | None:
    """One line; None for what a crash tore, which only means that the file is written again."""
    try:
        found = json.loads(line)
        entry = Finished(found["file"], found["bytes"], found["sha256"])
    except (ValueError, KeyError, TypeError):
        return None
    return entry if (type(entry.file), type(entry.bytes), type(entry.sha256)) == (str, int, str) else None


def _append(path: Path, line: str) -> None:
    with path.open("a+b") as file:
        # After a torn write, start on a line of our own.
        end = file.seek(0, os.SEEK_END)
        if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
            file.write(b"\n")
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
