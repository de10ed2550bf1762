"""What is looked at before a conversion begins: the place of OUT, the disk, the texts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.calibration.documents import BUILTIN_TEXTS, Document, evaluation_text, plain_text, read_documents
from surgery.checkpoint.reader import Checkpoint
from surgery.emission.lock import LOCK
from surgery.errors import DiskFull, MissingPackage, OutputExists
from surgery.planning import Plan, calibrates
from surgery.training.overlap import refuse_overlap

if TYPE_CHECKING:
    from surgery.manifest import Calibration, Data, Manifest

# What is held against the evaluation text at most: some 40 million words, which take 20 seconds.
OVERLAP_CHARACTERS = 200_000_000

# What transformers' quantized caches are made of: module, and what to install; fp8 needs nothing.
CACHE_BACKENDS = {"hqq": ("hqq", "hqq"), "quanto": ("optimum.quanto", "optimum-quanto")}


def check_place(checkpoint: Checkpoint, out: Path, *, overwrite: bool) -> None:
    """Refuse an OUT that shares a folder with the base, or holds what is not ours to replace."""
    base = checkpoint.folder.resolve()
    real = out.resolve()
    if real == base or base in real.parents or real in base.parents:
        raise OutputExists(
            f"OUT {out} and the base share a folder", cause="a conversion never writes into its base",
            remedy="choose an OUT outside of the base",
        )  # fmt: skip
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise OutputExists(
            f"{out} exists", cause="nothing is replaced unasked", remedy="choose another OUT, or pass --overwrite"
        )
    if not out.is_dir() or out.is_symlink() or (any(out.iterdir()) and not (out / LOCK).is_file()):
        raise OutputExists(
            f"{out} was not written by surgery", cause=f"it has no {LOCK}, and nothing of others is deleted",
            remedy="move it away yourself, or choose another OUT",
        )  # fmt: skip


def check_packages(manifest: Manifest) -> None:
    """Refuse to make what could not be loaded here to verify it."""
    if manifest.verify is None:
        return
    for step in manifest.all_steps:
        for module, wanted in step.operation.packages(step.settings).items():
            if not _importable(module):
                raise MissingPackage(
                    f"{wanted} is not installed, and results of {step.operation.name} need it to load",
                    cause="the result could not be loaded to verify it",
                    remedy=f'pip install "{wanted}", or do without verification: verify: false, or --no-verify',
                )

    for kind in manifest.verify.quantized_cache:
        backend = kind.partition("-")[0]
        module, wanted = CACHE_BACKENDS.get(backend, ("torch", ""))
        if not _importable(module):
            raise MissingPackage(
                f"{wanted} is not installed, and a quantized cache of kind {kind} needs it",
                cause="verify.quantized_cache asks for its cost", remedy=f'pip install "{wanted}", or leave {kind} out',
            )  # fmt: skip


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # a parent that is missing, or one that a test put there
        return False


def check_texts(manifest: Manifest, plan: Plan) -> None:
    """Refuse to judge a result on text that it was made from."""
    if manifest.verify is None or manifest.verify.text is None:
        return
    used: dict[str, tuple[Any, Calibration | Data]] = {
        "calibration": (calibrates(manifest.all_steps), manifest.calibration),
        "data": (plan.trained_parameters, manifest.data),
    }
    for name, (needed, section) in used.items():
        ours = section.text in BUILTIN_TEXTS and manifest.verify.text in BUILTIN_TEXTS  # divided by construction
        if needed and not ours and section.text != "self":
            documents = _beginning(read_documents(section.text, section.field)[0])
            refuse_overlap(documents, evaluation_text(manifest.verify.text), what=f"verify.text and {name}.text")


def _beginning(documents: Iterator[Document]) -> Iterator[str]:
    """The words of the first documents; a data set may have no end that is worth waiting for."""
    read = 0
    for document in documents:
        text = plain_text(document)
        yield text
        read += len(text)
        if read >= OVERLAP_CHARACTERS:
            return


def check_disk(partial: Path, plan: Plan) -> None:
    """Refuse a disk on which the result would not fit."""
    place = next(parent for parent in partial.parents if parent.exists())
    there = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file()) if partial.exists() else 0
    free = shutil.disk_usage(place).free + there
    if free < plan.disk_needed:
        raise DiskFull(
            f"{place} has {free / 1e9:.2f} GB free, the conversion needs {plan.disk_needed / 1e9:.2f} GB",
            cause="the whole result is written before it is put in place",
            remedy="free space, or name an OUT on another disk",
        )
