"""The stages of a conversion, one after the other: measuring, training, and the checkpoints in between."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint.expressions import Computed, Stored
from surgery.checkpoint.journal import Finished, Journal, sync_folder
from surgery.checkpoint.layout import Shard, index_bytes, lay_out
from surgery.checkpoint.reader import Checkpoint, open_checkpoint
from surgery.checkpoint.writer import Job, environment_errors, hash_value, write_file, write_shards
from surgery.emission.checkpoint import write_small_files
from surgery.errors import InternalError, UsageError
from surgery.planning import Draft
from surgery.progress import Progress, Report
from surgery.training.processes import wait_for_all

if TYPE_CHECKING:
    from surgery.manifest import Manifest
    from surgery.operations.base import Explanation, Statistics, Step


@dataclass(frozen=True)
class Run:
    """Everything that the stages of one result share.

    manifest  what makes this result alone
    out       where it will lie
    partial   the folder of the whole conversion; names in the journal are relative to it
    place     where this result is made: `partial`, or a folder in it for a variant
    journal   None in a process that follows another
    together  whether several processes go through these stages

    `measured`, `trained`, `decided` and `explained` fill up on the way, by the number of the step and its operation.
    """

    manifest: Manifest
    base: Checkpoint
    teacher: Checkpoint
    out: Path
    partial: Path
    place: Path
    fingerprint: str
    journal: Journal | None
    workers: int
    link: bool
    device: str
    statistics: Path
    report: Report
    together: bool = True
    measured: dict[str, Statistics] = field(default_factory=dict)
    trained: dict[str, Any] = field(default_factory=dict)
    decided: dict[str, Any] = field(default_factory=dict)
    explained: dict[str, Explanation] | None = None

    @property
    def checkpoint(self) -> Path:
        """The folder that becomes `out`."""
        return self.place / "checkpoint"

    @property
    def dtype(self) -> str:
        """The type of the output, as the manifest has it."""
        return self.manifest.output.dtype


@dataclass(frozen=True)
class Chain:
    """How far the chain of checkpoints has come: the last one that was written, and the draft of what is left.

    `edited` says that the draft is not that checkpoint any more. `written` is a checkpoint that has become equal to the
    draft meanwhile: a stage that needs one starts there.
    """

    last: Checkpoint
    draft: Draft
    edited: bool = False
    written: Checkpoint | None = None


def run_stages(run: Run, chain: Chain, steps: Sequence[Step], first: int = 0) -> Chain:
    """Every operation in order, the first one having the number `first`."""
    last, draft, edited, written = chain.last, chain.draft, chain.edited, chain.written
    for number, step in enumerate(steps, first):
        name = f"{number}.{step.operation.name}"
        found: Statistics | None = None
        edited = draft.prepare(step, run.dtype) or edited
        if (step.measures or step.trains) and edited:
            last = written or _intermediate(run, last, draft, number)
            draft, edited = draft.onto(last), False
        if step.measures and run.journal is not None:
            found = run.measured[name] = measure(run, last, step)
        elif step.trains:
            found = _train(run, last, draft, step, number)
        if run.explained is not None and step.operation.explain is not None:
            run.explained[name] = step.operation.explain(draft.model, step.settings, found)
        step.edit(draft, found)
        if draft.facts:
            run.decided[name], draft.facts = draft.facts, {}
        edited, written = True, None
    return Chain(last, draft, edited)


def write_checkpoint(
    run: Run, checkpoint: Checkpoint, draft: Draft, folder: Path, shards: tuple[Shard, ...]
) -> dict[str, Finished]:
    """Write one checkpoint folder: weights, index, config, code and what came with the base."""
    if run.journal is None:
        raise InternalError(
            "a process that follows would write", cause="only one may", remedy="report this as a defect"
        )
    with environment_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    total = sum(shard.data_bytes for shard in shards)
    counted, guard = [0], threading.Lock()

    def progress(count: int) -> None:
        with guard:
            counted[0] += count
            run.report(Progress("write", min(counted[0], total), total, "B"))

    prefix = f"{folder.relative_to(run.partial)}/"
    job = Job(checkpoint, folder, prefix, run.journal, run.workers, run.link, progress, _recipe(run.measured))
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


def open_written(run: Run, folder: Path) -> Checkpoint:
    """A checkpoint that this conversion wrote."""
    return open_checkpoint(folder, revision=run.base.revision, trust_remote_code=True)


def measure(run: Run, checkpoint: Checkpoint, step: Step) -> Statistics:
    """Measure for one step, or take the stored result of an equal measurement."""
    from surgery.calibration import stage

    return stage.measure(
        checkpoint, step, run.manifest.calibration, place=run.statistics, device=run.device,
        report=run.report, stage=f"calibrate {step.operation.name}",
    )  # fmt: skip


def _intermediate(run: Run, last: Checkpoint, draft: Draft, number: int) -> Checkpoint:
    """Write the draft as a checkpoint of its own, for a stage that runs it."""
    folder = run.place / "stages" / str(number)
    if run.journal is not None:
        # Divided as the result is, so that a variant finds the same files whether it is made alone or after others.
        write_checkpoint(run, last, draft, folder, lay_out(last, draft.tensors, run.manifest.output.shard_bytes))
    if run.together:
        wait_for_all(run.device)
    return open_written(run, folder)


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


def _recipe(measured: Mapping[str, Statistics]) -> str:
    """A hash of every measurement so far; empty where nothing was measured."""
    if not measured:
        return ""
    from surgery.calibration.store import statistics_digest

    return hashlib.sha256("".join(map(statistics_digest, measured.values())).encode()).hexdigest()[:16]


def _train(run: Run, checkpoint: Checkpoint, draft: Draft, step: Step, number: int) -> Statistics:
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
            data=run.manifest.data, folder=run.place / "stages" / f"{number}-train", fingerprint=run.fingerprint,
            device=run.device, record=run.out.with_name(f"{run.out.name}.{name}"), report=run.report,
        ),
        step.settings,
    )  # fmt: skip
    run.trained[name] = found.facts.get("record", {})
    return found
