"""Running a plan: stages in order, into OUT.partial, verified, then renamed into place.

    OUT.partial/.lock                held while a conversion runs
    OUT.partial/journal.jsonl        finished files
    OUT.partial/stages/N/            checkpoints between stages
    OUT.partial/stages/N-train/      the state of a training stage
    OUT.partial/checkpoint/          what becomes OUT
    OUT.partial/variants/NAME/       the same of a variant: checkpoint/ becomes OUT-NAME

A killed conversion leaves OUT.partial; the same command goes on from there. Under `accelerate launch` the same command
runs in several processes: the first one does all of this, the others follow it and join where something is trained.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.calibration.documents import text_source
from surgery.checkpoint.journal import Journal, exclusive, read_journal, start_journal
from surgery.checkpoint.reader import Checkpoint
from surgery.checkpoint.resolve import open_base
from surgery.checkpoint.writer import environment_errors
from surgery.completion import MAIN, Result, complete, describe_results
from surgery.errors import OutputExists, RefusedInput, UsageError
from surgery.metrics.plots import require_plots
from surgery.placing import Place, finished_files, is_placed, put_in_place, take_back
from surgery.planning import Plan, calibrates, make_plan, open_draft, starts_on_main, variant_errors
from surgery.preconditions import check_disk, check_packages, check_place, check_texts
from surgery.progress import Progress, Report, silent
from surgery.stages import Chain, Run, open_written, run_stages
from surgery.training.processes import leads, wait_for_all
from surgery.version import __version__

if TYPE_CHECKING:
    from surgery.emission.figures import Compared
    from surgery.manifest import Manifest
    from surgery.operations.base import Explanation
    from surgery.verification import Verification

_MADE = ("stages", "checkpoint", "variants")
_OURS = (".lock", "journal.jsonl", *_MADE)


@dataclass(frozen=True)
class Conversion:
    """What a conversion did. `verification` is None where the manifest says `verify: false`, or another process led.

    `explanations` are there where they were asked for, by the number of the step and its operation. `variants` has the
    further results, and `comparison` the figures of all, this one first; empty where there are none.
    """

    out: Path
    plan: Plan
    lock: Mapping[str, Any]
    verification: Verification | None
    seconds: float
    resumed_files: int
    explanations: Mapping[str, Explanation] = field(default_factory=dict)
    variants: Mapping[str, Conversion] = field(default_factory=dict)
    comparison: tuple[Compared, ...] = ()


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
    """Convert `base` into the folder `out` as `manifest` says, and its variants into folders `out`-NAME.

    base       a folder, `id@revision[:subfolder]` or `builtin:NAME`
    resume     go on from an interrupted run of the same conversion
    overwrite  replace an `out` that surgery wrote
    link       hard-link files that do not change, instead of copying them
    workers    shards written at once (default: the cores, at most 4)
    statistics folder in which calibration results are kept for reuse, or the file of one, made on any machine
    teacher    what training imitates, named like a base (default: the base itself)
    explain    write beside `out` why operations decided as they did: OUT.N.operation.json and .png

    Raises the errors of `surgery.errors`; `out` and its variants appear complete and verified, or not at all.
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
    run = Run(
        manifest, checkpoint, taught_by, out, partial, partial, fingerprint, None, workers, link, device, folder,
        report, explained={} if explain and leads() else None,
    )  # fmt: skip
    if explain:
        require_plots("explanations are drawn")
    if not leads():
        run_stages(run, Chain(checkpoint, open_draft(checkpoint)), manifest.steps)
        wait_for_all(device, last=True)
        return Conversion(out, plan, {}, None, time.monotonic() - started, 0)
    places = _places(run)
    _check(run, plan, places, resume=resume, overwrite=overwrite)
    with environment_errors(partial):
        partial.mkdir(parents=True, exist_ok=True)
    with exclusive(partial):
        journal = _open_journal(partial, fingerprint, resume=resume)
        resumed = len(finished_files(journal))
        take_back([place for place in places if place.name != MAIN], journal)
        try:
            results = _make(replace(run, journal=journal), plan)
            locks, figures = describe_results(results)
        except RefusedInput:
            shutil.rmtree(partial)  # what was found in the weights will be found again: nothing to resume
            raise
        except UsageError:
            if not any((partial / name).exists() for name in _MADE):
                shutil.rmtree(partial)
            raise
        put_in_place(places, journal, overwrite=overwrite)
    shutil.rmtree(partial)
    for result in results.values():
        _publish(result.run.out, result.run.explained or {})
    wait_for_all(device, last=True)
    variants = {name: _told(r, locks[name], r.seconds, 0) for name, r in results.items() if name != MAIN}
    done = _told(results[MAIN], locks[MAIN], time.monotonic() - started, resumed)
    plan = replace(done.plan, variants={name: variant.plan for name, variant in variants.items()})
    return replace(done, plan=plan, variants=variants, comparison=figures)


def _check(run: Run, plan: Plan, places: tuple[Place, ...], *, resume: bool, overwrite: bool) -> None:
    """Everything that can be known before the first byte is written."""
    earlier = read_journal(run.partial) if resume else None
    for place in places:
        if place.name != MAIN and earlier and earlier[0] == run.fingerprint and is_placed(place, earlier[1]):
            continue  # by this very conversion, which was interrupted and goes on
        for read in (run.base, run.teacher):
            check_place(read, place.out, overwrite=overwrite)
    check_packages(run.manifest)
    check_disk(run.partial, plan)
    check_texts(run.manifest, plan)


def _places(run: Run) -> tuple[Place, ...]:
    """Where results go: variants first, as OUT says that all is done."""
    variants = (_variant_run(run, name) for name in run.manifest.variants)
    return (*(Place(r.place.name, r.checkpoint, r.out) for r in variants), Place(MAIN, run.checkpoint, run.out))


def _variant_run(run: Run, name: str) -> Run:
    """The run that makes a variant, with what the shared stages found."""

    def report(progress: Progress) -> None:
        run.report(replace(progress, stage=f"{name}: {progress.stage}"))

    return replace(
        run, manifest=run.manifest.variant(name), out=run.out.with_name(f"{run.out.name}-{name}"),
        place=run.partial / "variants" / name, report=report, together=False, measured=dict(run.measured),
        trained=dict(run.trained), decided=dict(run.decided), explained=None if run.explained is None else {},
    )  # fmt: skip


def _make(run: Run, plan: Plan) -> dict[str, Result]:
    """The main result, and the variants, which go on from where its stages ended."""
    started, steps = time.monotonic(), run.manifest.steps
    chain = run_stages(run, Chain(run.base, open_draft(run.base)), steps)
    shared = replace(chain, draft=chain.draft.fork())
    results = {MAIN: replace(complete(run, plan, chain), seconds=time.monotonic() - started)}
    for name, more in run.manifest.variants.items():
        started = time.monotonic()
        with variant_errors(name):
            branch = _variant_run(run, name)
            written = open_written(run, run.checkpoint) if starts_on_main(run.manifest, more[0]) else None
            # Only what has to run needs the main result: drafts fold, so that a variant equals what is made alone.
            chain = run_stages(branch, replace(shared, draft=shared.draft.fork(), written=written), more, len(steps))
            result = complete(branch, plan.variants[name], chain, results[MAIN].inputs)
            results[name] = replace(result, seconds=time.monotonic() - started)
    return results


def _told(result: Result, lock: Mapping[str, Any], seconds: float, resumed: int) -> Conversion:
    plan, out = result.plan, result.run.out
    if plan.code and "." in out.name:
        note = "transformers before 4.57 cannot load code from a local folder with a dot in its name; the Hub is fine"
        plan = replace(plan, notes=(*plan.notes, note))
    return Conversion(out, plan, lock, result.verification, seconds, resumed, result.run.explained or {})


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


def _fingerprint(checkpoint: Checkpoint, teacher: Checkpoint, manifest: Manifest, plan: Plan) -> str:
    """What must be equal for an interrupted run to go on: base, manifest, the texts that are used, version."""
    parts = [__version__, manifest.sha256(), checkpoint.source, str(checkpoint.revision), checkpoint.fingerprint()]
    if calibrates(manifest.all_steps):
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
    for name in _MADE:
        if (partial / name).exists():
            shutil.rmtree(partial / name)
    return start_journal(partial, fingerprint)
