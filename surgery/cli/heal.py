"""`surgery heal`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from surgery.cli.options import ManifestChoice, base_options, command, manifest_options, run_options
from surgery.cli.output import Output
from surgery.cli.results import run_conversion
from surgery.errors import UsageError

EXAMPLES = (
    "surgery heal OUT HEALED --teacher path/to/base --trust-remote-code --set data.text=[corpus.jsonl]",
    "surgery heal OUT HEALED --teacher path/to/base -m manifest.yaml --set heal.end_to_end.tokens=100M",
)


@command("heal", EXAMPLES)
@click.argument("checkpoint")
@click.argument("out", type=click.Path(path_type=Path))
@manifest_options
@run_options
@click.option("--no-verify", is_flag=True, help="Do not load and check the result (verify: false).")
@base_options
@click.pass_obj
def _command(
    output: Output, /, checkpoint: str, out: Path, *, choice: ManifestChoice, no_verify: bool, **run: Any
) -> int:
    """Train CHECKPOINT towards the base that it was made from, and write OUT.

    Of a manifest only the operations that train are taken; without one, it is `heal` with its defaults.
    """
    from surgery.conversion import convert

    if run["teacher"] is None:
        raise click.UsageError("--teacher is missing: the base that CHECKPOINT was made from")
    if choice.file is None and not choice.operations:
        choice = replace(choice, operations=("heal",))
    manifest = choice.load(verify=not no_verify)
    manifest = replace(manifest, steps=tuple(step for step in manifest.steps if step.trains), variants={})
    if not manifest.steps:
        raise UsageError(
            "the manifest trains nothing", cause="it has no operation that trains",
            remedy="add `- heal` to its operations, or leave the manifest out",
        )  # fmt: skip
    return run_conversion(output, lambda report: convert(checkpoint, out, manifest, report=report, **run))


command = _command
