"""How a finished conversion and a verification read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from surgery.cli.output import Human, Output, Table
from surgery.errors import VerificationFailure
from surgery.progress import Report, silent
from surgery.sizes import human_size

if TYPE_CHECKING:
    from surgery.conversion import Conversion
    from surgery.verification import Verification

_MARKS = {"pass": "ok", "fail": "FAILS", "skip": "skipped"}


def run_conversion(output: Output, run: Callable[[Report], Conversion]) -> int:
    """Run a conversion with its progress and print what it did; of several processes only the first one speaks."""
    from surgery.training.processes import leads

    if not leads():
        run(silent)
        return 0
    with output.progress() as report:
        done = run(report)
    return show_conversion(output, done)


def show_conversion(output: Output, done: Conversion) -> int:
    """Print what a conversion did; quiet is the path of OUT, then those of variants."""
    paths = [done.out, *(variant.out for variant in done.variants.values())]
    return output.result(_conversion_json(done), _conversion(done), "\n".join(map(str, paths)))


def show_verification(output: Output, folder: str, found: Verification) -> int:
    """Print every check; a failed one sets the exit code."""
    failed = [check for check in found.checks if check.status == "fail"]
    failure = None
    if failed:
        failure = VerificationFailure(
            f"{len(failed)} of {len(found.checks)} checks failed", cause=f"{failed[0].name}: {failed[0].detail}",
            remedy="do not use this checkpoint; convert again, or look at the checks above",
        )  # fmt: skip
    return output.result(_verification_json(found), _verification(folder, found), failure=failure)


def _conversion(done: Conversion) -> Human:
    yield from _one(done)
    if done.resumed_files:
        yield f"{done.resumed_files} files were finished by an earlier run"
    for variant in done.variants.values():
        yield ""
        yield from _one(variant)
    if done.comparison:
        from surgery.emission.figures import HEADERS, compared_cells

        outs = [done.out.name, *(variant.out.name for variant in done.variants.values())]
        rows = [(out, *compared_cells(of)) for out, of in zip(outs, done.comparison, strict=True)]
        yield ""
        yield Table(rows, ("", *HEADERS))


def _one(done: Conversion) -> Human:
    plan = done.plan
    yield f"wrote {done.out}: {human_size(plan.bytes_written)} in {done.seconds:.1f} s"
    for note in plan.notes:
        yield f"note: {note}"
    for name, explanation in done.explanations.items():
        yield f"{name}: see also {done.out}.{name}.png"
        yield Table(explanation.rows, explanation.headers)
        yield from explanation.lines
    if done.verification is None:
        yield "it was not verified; do that with: surgery verify " + str(done.out)
    else:
        passed = sum(check.status == "pass" for check in done.verification.checks)
        yield f"verified: {passed} checks passed"
        yield from _measured(done.verification)


def _verification(folder: str, found: Verification) -> Human:
    yield Table([(check.name, _MARKS[check.status], check.detail) for check in found.checks], ("check", "", "detail"))
    yield from _measured(found)
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    yield f"{folder}: {'all checks hold' if found.passed else 'checks fail'}" + (f" ({versions})" if versions else "")


def _measured(found: Verification) -> Human:
    if found.measurements:
        yield Table([(name, f"{value:,.6g}") for name, value in found.measurements.items()])


def _conversion_json(done: Conversion) -> dict[str, Any]:
    variants = {name: _conversion_json(variant) for name, variant in done.variants.items()}
    compared = [asdict(each) for each in done.comparison]
    return {
        "out": str(done.out),
        "plan": done.plan.to_json(),
        "verification": _verification_json(done.verification) if done.verification else None,
        "seconds": done.seconds,
        "resumed_files": done.resumed_files,
        **({"explanations": {name: e.data for name, e in done.explanations.items()}} if done.explanations else {}),
        **({"variants": variants, "comparison": compared} if variants else {}),
    }


def _verification_json(found: Verification) -> dict[str, Any]:
    return {
        "passed": found.passed, "checks": [asdict(check) for check in found.checks],
        "measurements": dict(found.measurements), "versions": dict(found.versions),
    }  # fmt: skip
