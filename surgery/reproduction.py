"""Doing a conversion again from its lock: the same bytes, or the name of the input that changed."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.calibration.documents import text_source
from surgery.checkpoint.reader import Checkpoint, read_json
from surgery.checkpoint.resolve import open_base
from surgery.checkpoint.writer import hash_file
from surgery.conversion import Conversion, convert
from surgery.emission.lock import FORMAT, versions
from surgery.emission.pictures import PLACE
from surgery.errors import RefusedInput, UsageError, VerificationFailure
from surgery.manifest import Calibration, Data, Manifest, manifest_from_dict
from surgery.planning import variant_errors
from surgery.progress import Report, silent

# The card, its picture and the lock record versions and what was measured, which may differ where the weights do not.
RECORDS = frozenset({"README.md", PLACE})


@dataclass(frozen=True)
class _Lock:
    """The parts of a lock that reproducing needs."""

    base: Mapping[str, Any]
    manifest: Mapping[str, Any]
    statistics: Mapping[str, Any]
    outputs: Mapping[str, Any]
    versions: Mapping[str, Any]
    training: Mapping[str, Any]
    variants: Mapping[str, Any]


def reproduce(
    lock: Path | str,
    out: Path | str,
    *,
    base: str | None = None,
    files: Path | str = "",
    resume: bool = True,
    overwrite: bool = False,
    link: bool = False,
    device: str = "cpu",
    workers: int | None = None,
    statistics: Path | None = None,
    teacher: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    report: Report = silent,
) -> Conversion:
    """Repeat into `out` the conversion that `lock` (a surgery.lock.json) records, and compare every file.

    The lock of a variant repeats that variant alone, the lock of the main result makes all variants again.

    base     where the base is on this machine; needed where it was a local folder
    files    the folder in which the manifest's text files are
    teacher  what training imitated, where that was not the base

    The other arguments are those of `convert`. Raises RefusedInput naming the inputs that changed, before anything is
    written, and VerificationFailure naming the outputs that differ.
    """
    path = Path(lock)
    recorded = _read(path)
    source = base or _source(recorded, path)
    checkpoint = open_base(source, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    manifest = manifest_from_dict(recorded.manifest, folder=files, name=path.name)
    if any(found.get("given") for found in recorded.statistics.values()) and statistics is None:
        raise UsageError(
            "the result rests on a measurement that was given as a file", cause="it cannot be made again from the lock",
            remedy="name that file: --statistics FILE",
        )  # fmt: skip
    changed = [
        *_changed_inputs(checkpoint, recorded.base),
        *_changed_texts(manifest, recorded),
        *_changed_teacher(recorded, teacher, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle),
    ]
    if changed:
        raise RefusedInput(
            f"{len(changed)} inputs are not what they were: {', '.join(changed[:6])}",
            cause=f"their SHA-256 differs from {path.name}", remedy="give the original files, or convert anew",
        )  # fmt: skip
    # Measured again, not taken from a store: a repetition that repeats nothing proves nothing.
    with tempfile.TemporaryDirectory(prefix="surgery-statistics-") as fresh:
        done = convert(
            source, out, manifest, resume=resume, overwrite=overwrite, link=link, device=device, workers=workers,
            statistics=statistics or Path(fresh), teacher=teacher, trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle, report=report,
        )  # fmt: skip
    _compare(done, recorded.outputs, recorded.versions)
    for name, made in done.variants.items():
        with variant_errors(name):
            _compare(made, recorded.variants.get(name, {}).get("outputs", {}), recorded.versions)
    return done


def _read(path: Path) -> _Lock:
    if not path.is_file():
        raise UsageError(f"{path} is not a file", cause="a lock is OUT/surgery.lock.json", remedy="check the path")
    found = read_json(path.parent, path.name)
    parts = ("base", "manifest", "statistics", "outputs", "versions")
    known = isinstance(found, dict) and found.get("lock") == FORMAT
    if not known or not _is_sound(found, parts):
        raise UsageError(
            f"{path.name} is not a lock of format {FORMAT}", cause=f"it must have {', '.join(parts)}",
            remedy="use the surgery.lock.json of a converted checkpoint",
        )  # fmt: skip
    more = {part: found.get(part, {}) for part in ("training", "variants")}
    return _Lock(**{part: found[part] for part in parts}, **more)


def _is_sound(found: Mapping[str, Any], parts: Collection[str]) -> bool:
    """Whether all that is looked into has the form of a lock; its words may still be anybody's."""
    training, variants = found.get("training", {}), found.get("variants", {})
    if not isinstance(training, dict) or not all(isinstance(found.get(part), dict) for part in parts):
        return False
    if not isinstance(variants, dict):
        return False
    if not all(isinstance(made, dict) and isinstance(made.get("outputs", {}), dict) for made in variants.values()):
        return False
    stages = training.get("stages", {})
    files = [part.get("files", {}) for part in (found["base"], training.get("teacher")) if isinstance(part, dict)]
    if not isinstance(stages, dict) or not all(isinstance(part, dict) for part in files):
        return False
    texts = (stage.get("text", {}) if isinstance(stage, dict) else None for stage in stages.values())
    entries = [*texts, *(entry for each in files for entry in each.values()), *found["statistics"].values()]
    return all(isinstance(entry, dict) for entry in entries)


def _source(recorded: _Lock, path: Path) -> str:
    """The recorded base; a local folder is known by its name only, and looked for beside the checkpoint."""
    name = str(recorded.base.get("source"))
    if name.startswith("builtin:") or recorded.base.get("revision"):
        return name
    for place in (path.absolute().parent.parent, Path.cwd()):
        if "/" not in name and (place / name / "config.json").is_file():
            return str(place / name)
    raise UsageError(
        f"the base was a local folder called {name!r}", cause="locks hold no paths of the machine that wrote them",
        remedy=f"say where it is: surgery reproduce {path} OUT --base FOLDER",
    )  # fmt: skip


def _changed_teacher(recorded: _Lock, teacher: str | None, *, trust_remote_code: bool, allow_pickle: bool) -> list[str]:
    """What changed of a teacher that was not the base. Raises UsageError where it is not named."""
    known = recorded.training.get("teacher")
    if not isinstance(known, dict):
        return []
    if teacher is None:
        raise UsageError(
            f"training imitated {known.get('source')!r}, which is not named", cause="that was not the base",
            remedy="say where it is: --teacher FOLDER",
        )  # fmt: skip
    found = open_base(teacher, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    return [f"{name} of the teacher" for name in _changed_inputs(found, known)]


def _changed_inputs(checkpoint: Checkpoint, recorded: Mapping[str, Any]) -> list[str]:
    expected = recorded.get("files")
    if not isinstance(expected, dict):
        return ["the lock's list of base files"]
    here = {"config.json", *checkpoint.shards, *(file.name for file in checkpoint.side_files if not file.dropped)}
    changed = [name for name in sorted(here | expected.keys()) if name not in here or name not in expected]
    same = (name for name in sorted(here & expected.keys()))
    return changed + [n for n in same if hash_file(checkpoint.path(n)).sha256 != expected[n].get("sha256")]


def _changed_texts(manifest: Manifest, recorded: _Lock) -> list[str]:
    """Which texts are not those that were measured or trained on, where something was."""
    stages = recorded.training.get("stages", {})
    # Of weights alone nothing is recorded, and what was measured elsewhere was measured on a text of its own.
    measured = [found for found in recorded.statistics.values() if found and not found.get("given")]
    used: dict[str, tuple[Calibration | Data, list[Mapping[str, Any]]]] = {
        "the calibration text": (manifest.calibration, measured),
        "the training text": (manifest.data, [stage.get("text", {}) for stage in stages.values()]),
    }
    return [
        name
        for name, (section, records) in used.items()
        if records and any(found.get(k) != v for found in records for k, v in text_source(section).items())
    ]


def _compare(done: Conversion, wanted: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    """Hold the hashes of what was made against those `wanted`; `recorded` are the versions that made these."""
    made = done.lock["outputs"]
    names = sorted((made.keys() | wanted.keys()) - RECORDS)
    differing = [name for name in names if made.get(name) != wanted.get(name)]
    if differing:
        now = versions()
        moved = [f"{k} {recorded.get(k)} -> {v}" for k, v in now.items() if recorded.get(k) != v]
        raise VerificationFailure(
            f"{len(differing)} files differ from the lock: {', '.join(differing[:6])}",
            cause=f"changed since: {'; '.join(moved)}" if moved else "versions are the same; the processor may differ",
            remedy=f"compare {done.out} with the original; it stays in place",
        )
