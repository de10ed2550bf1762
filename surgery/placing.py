"""Putting results in place by renames: all of them or none, also where a kill falls between two.

Before the first rename the journal gets a line for each result, with the hash of its lock. A result is then either
still in OUT.partial, or lies at its place with that lock: the same command takes such ones back and goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.checkpoint.journal import Finished, Journal, sync_folder
from surgery.checkpoint.writer import environment_errors, hash_file
from surgery.emission.lock import LOCK

PLACING = "placing/"


@dataclass(frozen=True)
class Place:
    """Where the folder `made` goes; `name` is that of the variant."""

    name: str
    made: Path
    out: Path

    @property
    def aside(self) -> Path:
        """Where an earlier `out` waits until all are in place."""
        return self.out.with_name(self.out.name + ".replaced")


def is_placed(place: Place, journal: Journal) -> bool:
    """Whether an interrupted run put this result in place already."""
    known, lock = journal.finished.get(PLACING + place.name), place.out / LOCK
    if known is None or place.made.exists() or place.out.is_symlink() or not lock.is_file():
        return False
    return hash_file(lock).sha256 == known.sha256


def take_back(places: Sequence[Place], journal: Journal) -> None:
    """Let results that an interrupted run put in place be unfinished again."""
    for place in places:
        if is_placed(place, journal):
            with environment_errors(place.out):
                place.made.parent.mkdir(parents=True, exist_ok=True)
                place.out.rename(place.made)


def put_in_place(places: Sequence[Place], journal: Journal, *, overwrite: bool) -> None:
    """Rename every finished result to where it belongs, in this order; where one cannot be, none is."""
    for place in places:
        journal.record(replace(hash_file(place.made / LOCK), file=PLACING + place.name))
    try:
        for place in places:
            with environment_errors(place.out):
                if overwrite and place.out.exists():
                    place.out.rename(place.aside)
                place.made.rename(place.out)
    except BaseException:
        for place in places:
            if not place.made.exists():
                place.out.rename(place.made)
            if overwrite and place.aside.exists() and not place.out.exists():
                place.aside.rename(place.out)
        raise
    with environment_errors(places[-1].out):
        sync_folder(places[-1].out.parent)
        for place in places:
            if overwrite and place.aside.exists():
                shutil.rmtree(place.aside)


def finished_files(journal: Journal) -> list[Finished]:
    """What the journal vouches for, without what it says of places."""
    return [file for name, file in journal.finished.items() if not name.startswith(PLACING)]
