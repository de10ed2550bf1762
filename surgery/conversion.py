"""Running a plan: stages in order, into OUT.partial, verified, then one rename.

    OUT.partial/.lock            held while a conversion runs
    OUT.partial/journal.jsonl    finished files
    OUT.partial/stages/N/        checkpoints between stages
    OUT.partial/stages/N-train/  the state of a training stage
    OUT.partial/checkpoint/      what becomes OUT

A killed conversion leaves OUT.partial; the same command goes on from there. Under `accelerate launch` the same command
runs in several processes: the first one does all of this, the others follow it and join where something is trained.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.calibration.documents import evaluation_text, text_source
from surgery.checkpoint.dtypes import SAFETENSORS_NAMES
from surgery.checkpoint.expressions import Computed, Stored
from surgery.checkpoint.journal import Finished, Journal, exclusive, read_journal, start_journal, sync_folder
from surgery.checkpoint.layout import Shard, index_bytes, lay_out
from surgery.checkpoint.reader import Checkpoint, open_checkpoint
from surgery.checkpoint.resolve import open_base
from surgery.checkpoint.writer import (
    Job,
    environment_errors,
    hash_file,
    hash_tensors,
    hash_value,
    write_file,
    write_shards,
)
from surgery.emission.checkpoint import write_small_files
from surgery.emission.lock import LOCK, lock_bytes, make_lock, portable_source
from surgery.errors import InternalError, OutputExists, RefusedInput, UsageError, VerificationFailure
from surgery.metrics.plots import require_plots
from surgery.planning import FLOAT32_LIMIT, Draft, Plan, calibrates, describe, make_plan, open_draft
from surgery.preconditions import check_disk, check_place, check_texts
from surgery.progress import Progress, Report, silent
from surgery.training.processes import leads, wait_for_all
from surgery.version import __version__

if TYPE_CHECKING:
    from surgery.manifest import Manifest
    from surgery.operations.base import Explanation, Statistics, Step
    from surgery.verification import Verification

_OURS = (".lock", "journal.jsonl", "stages", "checkpoint")


@dataclass(frozen=True)
class Conversion:
    """What a conversion did. `verification` is None where the manifest says `verify: false`, or another process led.

    `explanations` are there where they were asked for, by the number of the step and its operation.
    """

    out: Path
    plan: Plan
    lock: Mapping[str, Any]
    verification: Verification | None
    seconds: float
    resumed_files: int
    explanations: Mapping[str, Explanation] = field(default_factory=dict)


@dataclass(frozen=True)
class _Run:
    """Everything that the stages of one conversion share. `journal` is None in a process that follows another."""

    manifest: Manifest
    base: Checkpoint
    teacher: Checkpoint
    out: Path
    partial: Path
    fingerprint: str
    journal: Journal | None
    workers: int
    link: bool
    device: str
    statistics: Path
    report: Report
    measured: dict[str, Statistics] = field(default_factory=dict)
    trained: dict[str, Any] = field(default_factory=dict)
    decided: dict[str, Any] = field(default_factory=dict)
    explained: dict[str, Explanation] | None = None


def convert(
    base: str,
    out: Path | str,
    manifest: Manifest,
    *,
    resume: bool = True,
    overwrite: bool = False,
    link: bool = False,
    device: str = "cpu",
    workers: int | None = None,
    statistics: Path | None = None,
    teacher: str | None = None,
    explain: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    report: Report = silent,
) -> Conversion:
    """Convert `base` into the folder `out` as `manifest` says.

    base       a folder, `id@revision[:subfolder]` or `builtin:NAME`
    resume     go on from an interrupted run of the same conversion
    overwrite  replace an `out` that surgery wrote
    link       hard-link files that do not change, instead of copying them
    workers    shards written at once (default: the cores, at most 4)
    statistics folder in which calibration results are kept for reuse, or the file of one, made on any machine
    teacher    what training imitates, named like a base (default: the base itself)
    explain    write beside `out` why operations decided as they did: OUT.N.operation.json and .png

    Raises the errors of `surgery.errors`; `out` appears complete and verified, or not at all.
    """
    started = time.monotonic()
    out = Path(out).absolute()
    opened = _opener(trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    checkpoint = opened(base)
    taught_by = opened(teacher) if teacher is not None else checkpoint
    workers = workers or min(os.cpu_count() or 1, 4)
    plan = make_plan(checkpoint, manifest, workers=workers)
    fingerprint = _fingerprint(checkpoint, taught_by, manifest, plan)
    partial = out.with_name(out.name + ".partial")
    folder = statistics or Path.home() / ".cache" / "surgery" / "statistics"
    run = _Run(
        manifest, checkpoint, taught_by, out, partial, fingerprint, None, workers, link, device, folder, report,
        explained={} if explain and leads() else None,
    )  # fmt: skip
    if explain:
        require_plots("explanations are drawn")
    if not leads():
        _run_stages(run)
        wait_for_all(device, last=True)
        return Conversion(out, plan, {}, None, time.monotonic() - started, 0)
    for read in (checkpoint, taught_by):
        check_place(read, out, overwrite=overwrite)
    check_disk(partial, plan)
    check_texts(manifest, plan)
    with environment_errors(partial):
        partial.mkdir(parents=True, exist_ok=True)
    with exclusive(partial):
        journal = _open_journal(partial, fingerprint, resume=resume)
        resumed = len(journal.finished)
        run = replace(run, journal=journal)
        try:
            current, draft = _run_stages(run)
            plan, lock, verification = _complete(run, plan, current, draft)
        except RefusedInput:
            shutil.rmtree(partial)  # what was found in the weights will be found again: nothing to resume
            raise
        except UsageError:
            if not any((partial / name).exists() for name in ("stages", "checkpoint")):
                shutil.rmtree(partial)
            raise
        _put_in_place(partial, out, overwrite=overwrite)
    shutil.rmtree(partial)
    _publish(out, run.explained or {})
    wait_for_all(device, last=True)
    if plan.code and "." in out.name:
        note = "transformers before 4.57 cannot load code from a local folder with a dot in its name; the Hub is fine"
        plan = replace(plan, notes=(*plan.notes, note))
    return Conversion(out, plan, lock, verification, time.monotonic() - started, resumed, run.explained or {})


def _publish(out: Path, explained: Mapping[str, Explanation]) -> None:
    """Write explanations beside OUT."""
    for name, found in explained.items():
        place = out.with_name(f"{out.name}.{name}")
        with environment_errors(place):
            text = json.dumps(found.data, indent=1)
            place.with_name(place.name + ".json").write_text(text + "\n", encoding="utf-8")
            found.draw(place.with_name(place.name + ".png"))


def _opener(*, trust_remote_code: bool, allow_pickle: bool) -> Callable[[str], Checkpoint]:
    return lambda name: open_base(name, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)


def _run_stages(run: _Run) -> tuple[Checkpoint, Draft]:
    """Every operation in order; returns the last checkpoint that was written and the draft of what is left to write."""
    current, draft = run.base, open_draft(run.base)
    edited = False
    for number, step in enumerate(run.manifest.steps):
        found: Statistics | None = None
        if (step.measures or step.trains) and edited:
            current = _intermediate(run, current, draft, number)
            draft, edited = draft.onto(current), False
        if step.measures and run.journal is not None:
            found = run.measured[f"{number}.{step.operation.name}"] = _measure(run, current, step)
        elif step.trains:
            found = _train(run, current, draft, step, number)
        if run.explained is not None and step.operation.explain is not None:
            explanation = step.operation.explain(draft.model, step.settings, found)
            run.explained[f"{number}.{step.operation.name}"] = explanation
        step.edit(draft, found)
        if draft.facts:
            run.decided[f"{number}.{step.operation.name}"], draft.facts = draft.facts, {}
        edited = True
    return current, draft


def _intermediate(run: _Run, current: Checkpoint, draft: Draft, number: int) -> Checkpoint:
    """Write the draft as a checkpoint of its own, for a stage that runs it."""
    folder = run.partial / "stages" / str(number)
    if run.journal is not None:
        _write(run, run.journal, current, draft, folder, lay_out(current, draft.tensors, None))
    wait_for_all(run.device)
    return open_checkpoint(folder, revision=run.base.revision, trust_remote_code=True)


def _complete(
    run: _Run, plan: Plan, current: Checkpoint, draft: Draft
) -> tuple[Plan, dict[str, Any], Verification | None]:
    """Write what becomes OUT, verify it, and describe it in card and lock."""
    checkpoint, final = run.base, run.partial / "checkpoint"
    stored = {name: value.info.name for name, value in draft.tensors.items() if isinstance(value, Stored)}
    kept = {name: old for name, old in stored.items() if name not in draft.trained}
    if run.manifest.output.dtype != "keep":
        draft.cast(SAFETENSORS_NAMES[run.manifest.output.dtype])
    shards = lay_out(current, draft.tensors, run.manifest.output.shard_bytes)
    same = {shard.unchanged: shard.name for shard in shards if shard.unchanged and current is checkpoint}
    with _hashing(checkpoint, same) as hashes:
        outputs = _write(run, _journal(run), current, draft, final, shards)
        inputs = hashes() | {name: outputs[copy] for name, copy in same.items()}
    frozen = _frozen(current, kept, final, run.manifest.output.dtype) if run.trained else {}
    plan = _settled(run, checkpoint, current, plan, draft)
    lock, verification = _finish(run, checkpoint, plan, draft, outputs, inputs, frozen)
    return plan, lock, verification


def _journal(run: _Run) -> Journal:
    if run.journal is None:
        raise InternalError(
            "a process that follows would write", cause="only one may", remedy="report this as a defect"
        )
    return run.journal


def _frozen(current: Checkpoint, kept: Mapping[str, str], final: Path, dtype: str) -> dict[str, str]:
    """Hashes of tensors that nothing should have changed (name in the result -> name before), as they are now.

    Where the result has another type they are compared after rounding to it. Raises InternalError where one moved.
    """
    from surgery.checkpoint.evaluate import is_rounding

    result = open_checkpoint(final, trust_remote_code=True)
    before, after = hash_tensors(current, kept.values()), hash_tensors(result, kept)
    moved = [
        name
        for name, old in kept.items()
        if before[old] != after[name] and (dtype == "keep" or not is_rounding(current, result, name, old))
    ]
    if moved:
        raise InternalError(
            f"{moved[0]!r} changed although nothing should have changed it",
            cause=f"its bytes differ from those of {kept[moved[0]]!r}",
            remedy="report this as a defect, with the manifest",
        )  # fmt: skip
    return after


def _settled(run: _Run, base: Checkpoint, last: Checkpoint, plan: Plan, draft: Draft) -> Plan:
    """The plan with what measuring decided. After intermediate checkpoints the ledger stays that of the dry run."""
    if not plan.estimated:
        return replace(plan, notes=tuple(draft.notes))
    known = describe(last, draft, run.manifest, plan.stages, estimated=False, workers=run.workers)
    if last is base:
        return known
    return replace(
        plan, estimated=False, parameters_after=known.parameters_after, bytes_written=known.bytes_written,
        cache_bytes_after=known.cache_bytes_after, active_after=known.active_after,
        code=known.code, shards=known.shards, notes=tuple(draft.notes),
    )  # fmt: skip


def _write(
    run: _Run, journal: Journal, checkpoint: Checkpoint, draft: Draft, folder: Path, shards: tuple[Shard, ...]
) -> dict[str, Finished]:
    """Write one checkpoint folder: weights, index, config, code and what came with the base."""
    with environment_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    total = sum(shard.data_bytes for shard in shards)
    counted, guard = [0], threading.Lock()

    def progress(count: int) -> None:
        with guard:
            counted[0] += count
            run.report(Progress("write", min(counted[0], total), total, "B"))

    prefix = f"{folder.relative_to(run.partial)}/"
    job = Job(checkpoint, folder, prefix, journal, run.workers, run.link, progress, _recipe(run))
    outputs = write_shards(job, shards)
    index = index_bytes(shards)
    if index is not None:
        outputs[index[0]] = write_file(folder / index[0], index[1])
    for file in write_small_files(checkpoint, draft, folder):
        outputs[file.file] = file
    sync_folder(folder)
    if run.manifest.verify is not None:
        _check_moved(checkpoint, draft, folder)
    return outputs


def _check_moved(checkpoint: Checkpoint, draft: Draft, folder: Path) -> None:
    """Whether what was renamed or sliced has the bytes that it had before. Raises InternalError where it has not."""
    written = open_checkpoint(folder, trust_remote_code=True)
    for name, value in draft.tensors.items():
        if isinstance(value, Computed) or (isinstance(value, Stored) and value.info.name == name):
            continue
        if hash_value(written, Stored(written.tensors[name])) != hash_value(checkpoint, value):
            raise InternalError(
                f"{name!r} was written with other bytes", cause=f"they should be those of {value.info.name!r}",
                remedy="report this as a defect, with the manifest",
            )  # fmt: skip


def _recipe(run: _Run) -> str:
    """A hash of every measurement so far; empty where nothing was measured."""
    from surgery.calibration.store import statistics_digest

    digests = [statistics_digest(found) for found in run.measured.values()]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16] if digests else ""


def _measure(run: _Run, checkpoint: Checkpoint, step: Step) -> Statistics:
    from surgery.calibration.stage import measure

    return measure(
        checkpoint, step, run.manifest.calibration, place=run.statistics, device=run.device,
        report=run.report, stage=f"calibrate {step.operation.name}",
    )  # fmt: skip


def _train(run: _Run, checkpoint: Checkpoint, draft: Draft, step: Step, number: int) -> Statistics:
    """Train one step in every process; its curves go beside OUT."""
    from surgery.operations.base import Training

    if step.operation.train is None:
        raise UsageError(
            f"{step.operation.name} says that it trains but cannot", cause="its declaration lacks `train`",
            remedy="report this to the operation's author",
        )  # fmt: skip
    name = f"{number}.{step.operation.name}"
    wait_for_all(run.device)
    found = step.operation.train(
        Training(
            student=checkpoint, teacher=run.teacher, model=draft.model, changes=frozenset(draft.changes),
            data=run.manifest.data, folder=run.partial / "stages" / f"{number}-train", fingerprint=run.fingerprint,
            device=run.device, record=run.out.with_name(f"{run.out.name}.{name}"), report=run.report,
        ),
        step.settings,
    )  # fmt: skip
    run.trained[name] = found.facts.get("record", {})
    return found


def _finish(
    run: _Run,
    base: Checkpoint,
    plan: Plan,
    draft: Draft,
    outputs: dict[str, Finished],
    inputs: dict[str, Finished],
    frozen: Mapping[str, str],
) -> tuple[dict[str, Any], Verification | None]:
    """Verify, then write the card and the lock, which hold the verification's figures."""
    from surgery.emission.card import card_bytes

    folder = run.partial / "checkpoint"
    verification = _verify(run, base, plan, folder)
    lock = make_lock(base, run.manifest, plan, run.measured, inputs, verification)
    if run.decided:
        lock["decisions"] = run.decided
    if run.trained:
        lock["training"] = {"teacher": _teacher_record(run), "stages": run.trained, "frozen": dict(frozen)}
    card = write_file(folder / "README.md", card_bytes(base, plan, draft, run.manifest, outputs, verification))
    outputs = {**outputs, card.file: card}
    lock["outputs"] = {name: {"sha256": file.sha256, "bytes": file.bytes} for name, file in sorted(outputs.items())}
    write_file(folder / LOCK, lock_bytes(lock))
    sync_folder(folder)
    return lock, verification


def _teacher_record(run: _Run) -> dict[str, Any] | str:
    """The files of a teacher that is not the base."""
    if run.teacher is run.base:
        return "base"
    with _hashing(run.teacher, ()) as hashes:
        files = {name: {"sha256": file.sha256, "bytes": file.bytes} for name, file in sorted(hashes().items())}
    return {"source": portable_source(run.teacher), "revision": run.teacher.revision, "files": files}


def _verify(run: _Run, base: Checkpoint, plan: Plan, folder: Path) -> Verification | None:
    """Try the result in a fresh process. Raises VerificationFailure where a check fails."""
    from surgery.verification import Promises, Trial, verify

    wanted = run.manifest.verify
    if wanted is None:
        return None
    run.report(Progress("verify", 0, 1, "process"))
    promises = Promises(
        kv_bytes_per_token=plan.cache_bytes_after,
        kv_dtype=plan.cache_dtype,
        static_cache=True,
        max_perplexity_ratio=wanted.max_perplexity_ratio,
        identical=not run.manifest.steps,
    )
    with tempfile.TemporaryDirectory(prefix="surgery-verify-") as work:
        text = None
        if wanted.text is not None and (base.folder / "tokenizer_config.json").is_file():
            text = Path(work) / "heldout.txt"
            text.write_text(evaluation_text(wanted.text), encoding="utf-8")
        small = base.parameter_count * 4 <= FLOAT32_LIMIT
        trial = Trial(text=text, device=run.device, dtype="float32" if small else "auto")
        # What was trained is held against what it was to resemble; without a teacher of its own that is the base.
        found = verify(
            folder, against=run.teacher.folder, trust_base_code=run.teacher.remote_code, promises=promises, trial=trial
        )  # fmt: skip
    if not found.passed:
        first = found.failures[0]
        raise VerificationFailure(
            f"the result fails {len(found.failures)} of {len(found.checks)} checks: "
            + ", ".join(check.name for check in found.failures),
            cause=f"{first.name}: {first.detail}"[:600],
            remedy=f"nothing was put in place; look at {folder}, change the manifest, or set verify: false to keep it",
        )
    run.report(Progress("verify", 1, 1, "process"))
    return found


@contextmanager
def _hashing(checkpoint: Checkpoint, unchanged: Collection[str]) -> Iterator[Callable[[], dict[str, Finished]]]:
    """Hash, beside what runs in the block, every file of the base that was read and is not `unchanged`.

    Yields a function that waits for the hashes. Threads of its own keep cores busy while others import or sync.
    """
    names = ["config.json", *checkpoint.shards, *(f.name for f in checkpoint.side_files if not f.dropped)]
    pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="surgery-hash")
    futures = {name: pool.submit(hash_file, checkpoint.path(name)) for name in names if name not in unchanged}
    try:
        yield lambda: {name: future.result() for name, future in futures.items()}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _fingerprint(checkpoint: Checkpoint, teacher: Checkpoint, manifest: Manifest, plan: Plan) -> str:
    """What must be equal for an interrupted run to go on: base, manifest, the texts that are used, version."""
    parts = [__version__, manifest.sha256(), checkpoint.source, str(checkpoint.revision), checkpoint.fingerprint()]
    if calibrates(manifest.steps):
        parts.append(json.dumps(text_source(manifest.calibration), sort_keys=True))
    if plan.trained_parameters:
        parts += [json.dumps(text_source(manifest.data), sort_keys=True), teacher.fingerprint()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _open_journal(partial: Path, fingerprint: str, *, resume: bool) -> Journal:
    strange = sorted(entry.name for entry in partial.iterdir() if entry.name not in _OURS)
    if strange:
        raise OutputExists(
            f"{partial} holds {strange[0]!r}, which surgery did not write", cause="nothing of others is deleted",
            remedy="move it away, or choose another OUT",
        )  # fmt: skip
    earlier = read_journal(partial)
    if earlier is not None and resume and earlier[0] == fingerprint:
        return earlier[1]
    for name in ("stages", "checkpoint"):
        if (partial / name).exists():
            shutil.rmtree(partial / name)
    return start_journal(partial, fingerprint)


def _put_in_place(partial: Path, out: Path, *, overwrite: bool) -> None:
    replaced = out.with_name(out.name + ".replaced")
    with environment_errors(out):
        if overwrite and out.exists():
            out.rename(replaced)
        (partial / "checkpoint").rename(out)
        sync_folder(out.parent)
        if overwrite and replaced.exists():
            shutil.rmtree(replaced)
