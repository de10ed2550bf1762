"""`surgery verify`."""

from __future__ import annotations

from pathlib import Path

import click

from surgery.cli.options import command
from surgery.cli.output import Output
from surgery.cli.results import show_verification

EXAMPLES = (
    "surgery verify OUT",
    "surgery verify OUT --against path/to/base --json",
)


@command("verify", EXAMPLES)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--against", metavar="BASE", type=click.Path(path_type=Path), help="The base's folder, to compare with.")
@click.pass_obj
def _command(output: Output, out: Path, *, against: Path | None) -> int:
    """Check OUT: its files against its lock, then the model in a fresh process that has no surgery."""
    from surgery.verification import verify

    return show_verification(output, str(out), verify(out, against=against))


command = _command
