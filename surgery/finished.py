"""Finished results that are looked at in this process: what may run, how it loads, and where a picture of it goes."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgery.checkpoint.reader import Checkpoint, open_checkpoint, reading_errors
from surgery.checkpoint.writer import environment_errors
from surgery.errors import (
    CorruptCheckpoint,
    EnvironmentFailure,
    MissingPackage,
    OutputExists,
    SourceUnavailable,
    UnsafeCheckpoint,
    UsageError,
)
from surgery.metrics.plots import require_plots
from surgery.progress import Progress, Report
from surgery.verification import LOCK, check_hashes


def open_result(folder: Path, operation: str) -> Checkpoint:
    """Open a folder that `operation` made; nothing of it runs. Raises SourceUnavailable and what the reader raises."""
    with reading_errors(folder):
        if not folder.is_dir():
            raise SourceUnavailable(
                f"{folder} is not a folder", cause="what runs is a finished result, not a base",
                remedy=f"check the path, or make one: surgery convert BASE OUT -o {operation}",
            )  # fmt: skip
    return open_checkpoint(folder, trust_remote_code=True)  # reads; `refuse_changed` decides what may run


def refuse_changed(folder: Path) -> None:
    """Raise UnsafeCheckpoint unless every file is what the lock says."""
    hashes = check_hashes(folder)
    if hashes.status != "pass":
        raise UnsafeCheckpoint(
            f"{folder} carries code, and is not what {LOCK} says it is", cause=hashes.detail[:300],
            remedy="convert again, or read its .py files and pass --trust-remote-code (trust_remote_code=True)",
        )  # fmt: skip


def load_result(opened: Checkpoint, device: str) -> Any:
    """The model as it is stored, in eval mode. Raises EnvironmentFailure, MissingPackage or CorruptCheckpoint."""
    from surgery.calibration.loading import causal_lm, check_device

    check_device(device)
    with loading_errors(opened.folder, "model"):
        return causal_lm(opened, "auto", **({} if device == "cpu" else {"device_map": {"": device}})).eval()


@contextmanager
def loading_errors(folder: Path, part: str) -> Iterator[None]:
    """Whatever keeps a part of a checkpoint from loading is a MissingPackage or CorruptCheckpoint."""
    try:
        yield
    except MemoryError:
        raise
    except ImportError as error:
        raise MissingPackage(
            f"the {part} of {folder} needs a package to load", cause=str(error)[:300],
            remedy="install what the line above names",
        ) from error  # fmt: skip
    except Exception as error:
        raise CorruptCheckpoint(
            f"the {part} of {folder} does not load", cause=f"{type(error).__name__}: {error}"[:300],
            remedy=f"see what is wrong with it: surgery verify {folder}",
        ) from error  # fmt: skip


@contextmanager
def memory_errors(tokens: int, less: str) -> Iterator[None]:
    """A device too small for a prompt of so many tokens is an EnvironmentFailure; `less` is what to ask for instead."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EnvironmentFailure(
            f"there is not enough memory for {tokens:,} tokens", cause=str(error).partition("\n")[0][:200],
            remedy=f"{less}, or use another device",
        ) from error  # fmt: skip


@contextmanager
def stage(report: Report, name: str, unit: str) -> Iterator[None]:
    """Report the begin and the end of work that has one step."""
    report(Progress(name, 0, 1, unit))
    yield
    report(Progress(name, 1, 1, unit))


@contextmanager
def quiet() -> Iterator[None]:
    """No bars, logs and warnings of transformers meanwhile; afterwards all is as it was."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def check_picture(place: Path) -> None:
    """Raise, before long work, where a picture could not be drawn or written after it; nothing is left there."""
    require_plots("pictures are drawn")
    if place.suffix.lower() != ".png":
        raise UsageError(f"{place} is no name of a PNG", cause="pictures are PNG files", remedy="let it end in .png")
    with environment_errors(place):
        if place.exists() or place.is_symlink():
            raise OutputExists(
                f"{place} exists", cause="nothing is replaced unasked", remedy="choose another name, or remove it first"
            )
        if not place.parent.is_dir():
            raise UsageError(
                f"the folder of {place} is not there", cause=f"{place.parent} is no folder",
                remedy="make it first, or choose another place",
            )  # fmt: skip
        with tempfile.TemporaryFile(dir=place.parent):
            pass


def write_picture(place: Path, draw: Callable[[Path], None]) -> None:
    """Let `draw` write the PNG `place`, which appears whole or not at all. Raises what `check_picture` raises."""
    check_picture(place)
    with environment_errors(place), tempfile.TemporaryDirectory(prefix=".surgery-", dir=place.parent) as near:
        whole = Path(near) / place.name
        draw(whole)
        whole.replace(place)
