"""From the last draft to a finished result: written, verified, described by card and lock."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.calibration.documents import evaluation_text
from surgery.checkpoint.expressions import Stored
from surgery.checkpoint.journal import Finished, sync_folder
from surgery.checkpoint.layout import lay_out
from surgery.checkpoint.reader import Checkpoint, open_checkpoint
from surgery.checkpoint.writer import environment_errors, hash_file, hash_tensors, write_file
from surgery.emission.lock import LOCK, lock_bytes, make_lock, portable_source
from surgery.emission.pictures import PLACE, sample_png
from surgery.errors import InternalError, VerificationFailure
from surgery.planning import FLOAT32_LIMIT, Draft, Plan, describe
from surgery.progress import Progress
from surgery.stages import Chain, Run, write_checkpoint

if TYPE_CHECKING:
    from surgery.emission.figures import Compared
    from surgery.verification import Sample, Verification

CARD = "README.md"
SAMPLES = Path(__file__).with_name("builtin") / "llava_samples"  # drawn by surgery: anybody may pass them on
SHOWS = "visual_pruning", "visual_defense"  # what a sample image can show of a result
MAIN = ""  # the name, among those of variants, of the result that is none


@dataclass(frozen=True)
class Result:
    """A checkpoint that was written and verified; `inputs` are the files of the base, `frozen` what had to stay.

    `picture` is the PNG of what became of a sample image; None where nothing is shown.
    """

    run: Run
    plan: Plan
    draft: Draft
    inputs: Mapping[str, Finished]
    outputs: Mapping[str, Finished]
    frozen: Mapping[str, str]
    verification: Verification | None
    picture: bytes | None
    seconds: float = 0.0


def complete(run: Run, plan: Plan, chain: Chain, inputs: Mapping[str, Finished] | None = None) -> Result:
    """Write what becomes OUT and verify it. Files of the base are hashed meanwhile, unless `inputs` has them."""
    last, draft = chain.last, chain.draft
    for name in (CARD, LOCK, PLACE):
        (run.checkpoint / name).unlink(missing_ok=True)  # of an interrupted run; they are written at the very end
    stored = {name: value.info.name for name, value in draft.tensors.items() if isinstance(value, Stored)}
    kept = {name: old for name, old in stored.items() if name not in draft.trained}
    draft.finish(run.dtype)
    shards = lay_out(last, draft.tensors, run.manifest.output.shard_bytes)
    same = {shard.unchanged: shard.name for shard in shards if shard.unchanged and last is run.base}
    with _hashing(run.base, same) if inputs is None else nullcontext(dict) as hashes:
        outputs = write_checkpoint(run, last, draft, run.checkpoint, shards)
        inputs = inputs or hashes() | {name: outputs[copy] for name, copy in same.items()}
    frozen = _frozen(last, kept, run.checkpoint, run.dtype) if run.trained else {}
    plan = _settled(run, last, plan, draft)
    verification, picture = _verify(run, plan, draft)
    return Result(run, plan, draft, inputs, outputs, frozen, verification, picture)


def describe_results(results: Mapping[str, Result]) -> tuple[dict[str, dict[str, Any]], tuple[Compared, ...]]:
    """Write card and lock of every result, with the figures of all; returns the locks, and those figures.

    The main result is called MAIN, the others by their variants. Where there are none, nothing is compared.
    """
    from surgery.emission.figures import compared

    main = results[MAIN]
    figures = tuple(
        compared(name, r.run.base, r.run.manifest.steps, r.draft, r.outputs, r.verification)
        for name, r in results.items()
    ) if len(results) > 1 else ()  # fmt: skip
    teacher = _teacher_record(main.run) if main.run.trained else ""
    locks: dict[str, dict[str, Any]] = {}
    for name in sorted(results, key=lambda name: name == MAIN):  # the main lock names the outputs of all others
        made = {other: {"outputs": lock["outputs"]} for other, lock in locks.items()} if name == MAIN else {}
        locks[name] = _describe(name, results[name], figures, teacher, made)
    return locks, figures


def _describe(
    name: str, result: Result, figures: tuple[Compared, ...], teacher: dict[str, Any] | str, variants: dict[str, Any]
) -> dict[str, Any]:
    from surgery.emission.card import card_bytes

    run, folder = result.run, result.run.checkpoint
    lock = make_lock(run.base, run.manifest, result.plan, run.measured, result.inputs, result.verification)
    if run.decided:
        lock["decisions"] = run.decided
    if run.trained:
        lock["training"] = {"teacher": teacher, "stages": run.trained, "frozen": dict(result.frozen)}
    content = card_bytes(
        run.base, result.plan, result.draft, run.manifest, result.outputs, result.verification, figures, name
    )
    outputs = {**result.outputs, CARD: write_file(folder / CARD, content)}
    if result.picture is not None:
        with environment_errors(folder / PLACE):
            (folder / PLACE).parent.mkdir(exist_ok=True)
        outputs[PLACE] = replace(write_file(folder / PLACE, result.picture), file=PLACE)
    lock["outputs"] = {name: {"sha256": file.sha256, "bytes": file.bytes} for name, file in sorted(outputs.items())}
    if variants:
        lock["variants"] = variants
    write_file(folder / LOCK, lock_bytes(lock))
    sync_folder(folder)
    return lock


def _frozen(last: Checkpoint, kept: Mapping[str, str], final: Path, dtype: str) -> dict[str, str]:
    """Hashes of tensors that nothing should have changed (name in the result -> name before), as they are now.

    Where the result has another type they are compared after rounding to it. Raises InternalError where one moved.
    """
    from surgery.checkpoint.evaluate import is_rounding

    result = open_checkpoint(final, trust_remote_code=True)
    before, after = hash_tensors(last, kept.values()), hash_tensors(result, kept)
    moved = [
        name
        for name, old in kept.items()
        if before[old] != after[name] and (dtype == "keep" or not is_rounding(last, result, name, old))
    ]
    if moved:
        raise InternalError(
            f"{moved[0]!r} changed although nothing should have changed it",
            cause=f"its bytes differ from those of {kept[moved[0]]!r}",
            remedy="report this as a defect, with the manifest",
        )  # fmt: skip
    return after


def _settled(run: Run, last: Checkpoint, plan: Plan, draft: Draft) -> Plan:
    """The plan with what measuring decided. After intermediate checkpoints the ledger stays that of the dry run."""
    if not plan.estimated:
        return replace(plan, notes=tuple(draft.notes))
    known = describe(last, draft, run.manifest, plan.stages, estimated=False, workers=run.workers)
    if last is run.base:
        return replace(known, disk_needed=plan.disk_needed, peak_memory=plan.peak_memory, variants=plan.variants)
    return replace(
        plan, estimated=False, parameters_after=known.parameters_after, bytes_written=known.bytes_written,
        cache_bytes_after=known.cache_bytes_after, active_after=known.active_after,
        code=known.code, shards=known.shards, notes=tuple(draft.notes),
    )  # fmt: skip


def _verify(run: Run, plan: Plan, draft: Draft) -> tuple[Verification | None, bytes | None]:
    """Try the result in a fresh process, and draw what that saw. Raises VerificationFailure where a check fails."""
    from surgery.verification import Promises, Trial, verify

    wanted = run.manifest.verify
    if wanted is None:
        return None, None
    run.report(Progress("verify", 0, 1, "process"))
    promises = Promises(
        kv_bytes_per_token=None if plan.cache_coded else plan.cache_bytes_after,
        kv_dtype=plan.cache_dtype,
        static_cache=True,
        max_perplexity_ratio=wanted.max_perplexity_ratio,
        identical=not run.manifest.steps,
    )
    with tempfile.TemporaryDirectory(prefix="surgery-verify-") as work:
        text = None
        if wanted.text is not None and (run.base.folder / "tokenizer_config.json").is_file():
            text = Path(work) / "heldout.txt"
            text.write_text(evaluation_text(wanted.text), encoding="utf-8")
        small = run.base.parameter_count * 4 <= FLOAT32_LIMIT
        sample = _sample(draft, Path(work) / "view.png")
        trial = Trial(
            text=text, device=run.device, dtype="float32" if small else "auto", quantized_cache=wanted.quantized_cache,
            sample=sample,
        )  # fmt: skip
        # What was trained is held against what it was to resemble; without a teacher of its own that is the base.
        found = verify(
            run.checkpoint, against=run.teacher.folder, trust_base_code=run.teacher.remote_code,
            promises=promises, trial=trial,
        )  # fmt: skip
        picture = sample_png(found.sample, sample.view) if sample is not None and found.sample is not None else None
    if not found.passed:
        first = found.failures[0]
        raise VerificationFailure(
            f"the result fails {len(found.failures)} of {len(found.checks)} checks: "
            + ", ".join(check.name for check in found.failures),
            cause=f"{first.name}: {first.detail}"[:600],
            remedy=f"nothing was put in place; look at {run.checkpoint}, change the manifest, "
            "or set verify: false to keep it",
        )
    run.report(Progress("verify", 1, 1, "process"))
    return found, picture


def _sample(draft: Draft, view: Path) -> Sample | None:
    """The image that a result is shown for its card, where it prunes or masks; `view` is where the probe writes it."""
    from surgery.verification import Sample

    if not any(name in draft.root.get("surgery", {}) for name in SHOWS):
        return None
    first = json.loads((SAMPLES / "samples.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return Sample(SAMPLES / first["image"], first["question"], view)


def _teacher_record(run: Run) -> dict[str, Any] | str:
    """The files of a teacher that is not the base."""
    if run.teacher is run.base:
        return "base"
    with _hashing(run.teacher, ()) as hashes:
        files = {name: {"sha256": file.sha256, "bytes": file.bytes} for name, file in sorted(hashes().items())}
    return {"source": portable_source(run.teacher), "revision": run.teacher.revision, "files": files}


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
