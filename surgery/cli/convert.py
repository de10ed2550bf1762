"""`surgery convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from surgery.cli.options import ManifestChoice, base_options, choose_base, command, manifest_options, run_options
from surgery.cli.output import Output
from surgery.cli.plan import show_plan
from surgery.cli.results import run_conversion

EXAMPLES = (
    "surgery convert builtin:llama OUT -o kv_latent:kv_ratio=0.75",
    "surgery convert path/to/base OUT -m manifest.yaml --set kv_latent.qk_dim=32",
    "surgery convert OUT -m manifest-with-a-base.yaml --dry-run",
    "surgery convert path/to/base OUT -m manifests/passthrough.yaml --shard-size 1GB --link",
)


@command("convert", EXAMPLES)
@click.argument("places", nargs=-1, required=True, metavar="[BASE] OUT")
@manifest_options
@click.option("--dry-run", is_flag=True, help="Only show the plan, as surgery plan does.")
@click.option("--explain", is_flag=True,
              help="Tell why operations decided as they did; writes OUT.N.OPERATION.json and .png.")  # fmt: skip
@run_options
@click.option("--no-verify", is_flag=True, help="Do not load and check the result (verify: false).")
@base_options
@click.pass_obj
def _command(
    output: Output,
    /,
    places: tuple[str, ...],
    *,
    choice: ManifestChoice,
    dry_run: bool,
    no_verify: bool,
    **run: Any,
) -> int:
    """Convert BASE into the folder OUT.

    BASE is a checkpoint folder, id@revision of the Hub, or builtin:NAME; it may be left out where the manifest names
    one. Each variant of the manifest becomes OUT-NAME. All appear complete and verified, or none does.
    """
    if len(places) > 2:
        raise click.UsageError(f"there are {len(places)} places, and a conversion has two: BASE and OUT")
    checked = choice.load(verify=not no_verify)
    base = choose_base(places[0] if len(places) == 2 else None, checked)
    if dry_run:
        from surgery.api import plan

        safety = {name: run[name] for name in ("statistics", "trust_remote_code", "allow_pickle")}
        return show_plan(output, plan(base, checked, **safety))
    from surgery.conversion import convert

    return run_conversion(output, lambda report: convert(base, Path(places[-1]), checked, report=report, **run))


command = _command
