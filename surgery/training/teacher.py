"""The teacher of end-to-end healing: the base beside the student, or what it said, computed once and kept on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from surgery.calibration.files import mapped
from surgery.calibration.loading import loaded_model
from surgery.checkpoint.writer import environment_errors, write_file
from surgery.operations.heal import EndToEnd
from surgery.progress import Progress
from surgery.training.losses import kl, paper_kl, relative_errors, stored_kl, top_log_probabilities
from surgery.training.run import Run

SIDES = ("train", "heldout")


class Teacher(Protocol):
    """How far a student is from the teacher."""

    def compare(self, side: str, rows: Tensor, tokens: Tensor, student: Any) -> tuple[Tensor, Tensor]:
        """Divergence of logits, and error of hidden states over their variance (0 where they are not compared).

        For the windows `rows` of a side of the corpus, whose tokens [B, T] gave the student's output.
        """

    def kl(self, side: str, rows: Tensor, tokens: Tensor, logits: Tensor) -> Tensor:
        """Mean KL(teacher || student) in nats at temperature 1, or the lower bound of it that is known."""


@dataclass(frozen=True)
class Resident:
    """The base in memory."""

    network: Any
    settings: EndToEnd

    def compare(self, side: str, rows: Tensor, tokens: Tensor, student: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - the protocol's
        """See `Teacher`."""
        looks_inside = student.hidden_states is not None
        with torch.no_grad():
            expected = self.network(input_ids=tokens, use_cache=False, output_hidden_states=looks_inside)
        divergence = paper_kl if self.settings.loss == "paper_kl" else kl
        inside = torch.zeros((), device=tokens.device)
        if looks_inside:  # the first are the embeddings, before any layer
            inside = relative_errors(expected.hidden_states[1:], student.hidden_states[1:])
        return divergence(expected.logits, student.logits, self.settings.temperature), inside

    def kl(self, side: str, rows: Tensor, tokens: Tensor, logits: Tensor) -> Tensor:  # noqa: ARG002
        """See `Teacher`."""
        with torch.no_grad():
            return kl(self.network(input_ids=tokens, use_cache=False).logits, logits)


@dataclass(frozen=True)
class Stored:
    """By side of the corpus: log-probabilities and tokens [N, T, k] of the k most likely tokens, mapped from disk."""

    kept: dict[str, tuple[Tensor, Tensor]]

    def compare(self, side: str, rows: Tensor, tokens: Tensor, student: Any) -> tuple[Tensor, Tensor]:
        """See `Teacher`."""
        found = self.kl(side, rows, tokens, student.logits)
        return found, torch.zeros_like(found)

    def kl(self, side: str, rows: Tensor, tokens: Tensor, logits: Tensor) -> Tensor:
        """See `Teacher`."""
        expected, likely = (held[rows].to(tokens.device) for held in self.kept[side])
        return stored_kl(expected, likely, logits)


@contextmanager
def opened_teacher(run: Run, settings: EndToEnd, part: int) -> Iterator[Teacher]:
    """The teacher that the settings ask for; `part` is how many sequences it reads at once."""
    if settings.teacher == "resident":
        with loaded_model(run.training.teacher, str(run.accelerator.device)) as network:
            yield Resident(network.requires_grad_(False), settings)
        return
    folder = run.folder / "teacher"
    windows = {"train": run.corpus.train, "heldout": run.corpus.heldout}
    if not _is_complete(folder, windows, settings):
        with environment_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with loaded_model(run.training.teacher, str(run.accelerator.device)) as network:
            width = min(settings.top_k, network.config.vocab_size)
            for side in SIDES:
                _store(run, network, part, windows[side], _mapped(folder, side, windows[side], width), side)
        run.accelerator.wait_for_everyone()
        if run.main:
            write_file(folder / "done.json", json.dumps(_identity(windows, settings, width)).encode())
        run.accelerator.wait_for_everyone()
    width = json.loads((folder / "done.json").read_bytes())["width"]
    yield Stored({side: _mapped(folder, side, windows[side], width) for side in SIDES})


@torch.no_grad()
def _store(run: Run, network: Any, part: int, windows: Tensor, kept: tuple[Tensor, Tensor], side: str) -> None:
    """Compute this process' share of the windows."""
    each, index = int(run.accelerator.num_processes), int(run.accelerator.process_index)
    mine = torch.arange(len(windows))[index::each]
    for number, rows in enumerate(mine.split(part)):
        logits = network(input_ids=windows[rows].long().to(run.accelerator.device), use_cache=False).logits
        found = top_log_probabilities(logits, kept[0].shape[-1])
        for held, values in zip(kept, found, strict=True):
            held[rows] = values.to(held.dtype).cpu()
        run.training.report(Progress(f"teacher {side}", min((number + 1) * part, len(mine)), len(mine), "windows"))


def _mapped(folder: Path, side: str, windows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    shape = (*windows.shape, width)
    values = mapped(folder / f"{side}.values", shape, torch.float32)
    return values, mapped(folder / f"{side}.tokens", shape, torch.int32)


def _identity(windows: dict[str, Tensor], settings: EndToEnd, width: int) -> dict[str, Any]:
    return {
        "shapes": {side: list(found.shape) for side, found in windows.items()}, "width": width,
        "top_k": settings.top_k,
    }  # fmt: skip


def _is_complete(folder: Path, windows: dict[str, Tensor], settings: EndToEnd) -> bool:
    """Whether an interrupted run finished this part; the folder belongs to one manifest and one base."""
    try:
        found = json.loads((folder / "done.json").read_bytes())
    except (OSError, ValueError):
        return False
    return bool(found == _identity(windows, settings, found.get("width")))
