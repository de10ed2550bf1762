"""`surgery plan`, and how a plan reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import (
    ManifestChoice,
    base_options,
    choose_base,
    command,
    manifest_options,
    statistics_option,
)
from surgery.cli.output import Human, Output, Table
from surgery.sizes import human_count, human_size

if TYPE_CHECKING:
    from surgery.planning import Plan

EXAMPLES = (
    "surgery plan builtin:llama -o kv_latent:kv_ratio=0.75",
    "surgery plan path/to/base -m manifests/passthrough.yaml --set output.shard_size=1GB -v",
)


@command("plan", EXAMPLES)
@click.argument("base", required=False)
@manifest_options
@statistics_option
@base_options
@click.pass_obj
def _command(
    output: Output,
    /,
    base: str | None,
    *,
    choice: ManifestChoice,
    statistics: Path | None,
    trust_remote_code: bool,
    allow_pickle: bool,
) -> int:
    """Tell what a conversion of BASE would do. No weight is read and nothing is written.

    BASE may be left out where the manifest names one.
    """
    from surgery.api import plan

    checked = choice.load()
    found = plan(
        choose_base(base, checked), checked, statistics=statistics,
        trust_remote_code=trust_remote_code, allow_pickle=allow_pickle,
    )  # fmt: skip
    return show_plan(output, found)


command = _command


def show_plan(output: Output, plan: Plan) -> int:
    """Print a plan; with `-v`, every line of its ledger."""
    data = plan.to_json()
    if output.verbosity:
        data["tensors"] = [asdict(entry) for entry in plan.ledger]
    return output.result(data, _human(plan, verbose=bool(output.verbosity)))


def _human(plan: Plan, *, verbose: bool) -> Human:
    yield Table([*_work(plan), *_sizes(plan), *_account(plan)])
    if plan.variants:
        yield ""
        yield Table(list(_variants(plan)), ("variant", "then", "write", "code", "KV cache"))
    if verbose:
        yield ""
        yield Table([(e.name, e.fate, e.why) for e in plan.ledger], ("tensor", "fate", "why"))


def _work(plan: Plan) -> Iterator[tuple[str, str]]:
    yield "base", plan.source + (f" @ {plan.revision}" if plan.revision and plan.revision not in plan.source else "")
    yield "family", plan.family
    for operation in plan.operations:
        for name, settings in operation.items():
            yield "operation", f"{name}: {_settings(settings)}"
    for number, stage in enumerate(plan.stages, 1):
        yield f"stage {number}", f"{stage.kind}: {stage.title}"
    yield "code", ", ".join(plan.code) or "native: no code"


def _variants(plan: Plan) -> Iterator[tuple[str, ...]]:
    for name, variant in plan.variants.items():
        own = variant.operations[len(plan.operations) :]
        about = " (estimated)" if variant.estimated else ""
        yield (
            name, ", ".join(operation for entry in own for operation in entry),
            human_size(variant.bytes_written) + about, ", ".join(variant.code) or "native: no code", _cache(variant),
        )  # fmt: skip


def _settings(settings: Mapping[str, Any]) -> str:
    shown = {key: str(value).lower() if isinstance(value, bool) else value for key, value in settings.items()}
    return ", ".join(f"{key} {value}" for key, value in shown.items() if value is not None) or "defaults"


def _sizes(plan: Plan) -> Iterator[tuple[str, str]]:
    about = " (estimated: sizes wait for a measurement)" if plan.estimated else ""
    yield "parameters", f"{human_count(plan.parameters_before)} -> {human_count(plan.parameters_after)}{about}"
    if plan.active_before is not None and plan.active_after is not None:
        yield "active", f"{human_count(plan.active_before)} -> {human_count(plan.active_after)} parameters a token"
    if plan.trained_parameters:
        yield "trained", human_count(plan.trained_parameters)
    yield "KV cache", _cache(plan) + about
    yield "read", human_size(plan.bytes_read)
    yield "write", f"{human_size(plan.bytes_written)} in {len(plan.shards)} file{'s' * (len(plan.shards) > 1)}"
    yield "needs", f"{human_size(plan.disk_needed)} of disk, {human_size(plan.peak_memory)} of memory"


def _cache(plan: Plan) -> str:
    before, after = plan.cache_bytes_before, plan.cache_bytes_after
    if before is None or after is None:
        return "unknown"
    ratio = f" ({after / before:.1%})" if before else ""
    where = " of a long prompt" if plan.cache_coded else ""
    return f"{before:,} -> {after:,} bytes a token{where}{ratio} in {plan.cache_dtype}"


def _account(plan: Plan) -> Iterator[tuple[str, str]]:
    for (fate, why), count in Counter((entry.fate, entry.why) for entry in plan.ledger).items():
        yield "tensors", f"{count} {fate}" + (f": {why}" if why else "")
    carried = [name for name, reason in plan.side_files.items() if not reason]
    yield "carried files", ", ".join(carried) or "none"
    for name, reason in plan.side_files.items():
        if reason:
            yield "not carried", f"{name}: {reason}"
    for note in plan.notes:
        yield "note", note
