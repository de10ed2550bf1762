"""How long-running work tells what it has done: plain values handed to a callable, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` of a stage; `unit` is `B` for bytes or a word for things counted; `detail` is a short line."""

    stage: str
    done: int
    total: int
    unit: str
    detail: str = ""


Report: TypeAlias = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """The report that tells nobody."""
