"""`surgery verify`."""

from __future__ import annotations

from pathlib import Path

import click

from surgery.cli.options import base_options, command
from surgery.cli.output import Output
from surgery.cli.results import show_verification

EXAMPLES = (
    "surgery verify OUT",
    "surgery verify OUT --against builtin:llama --json",
)


@command("verify", EXAMPLES)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--against", metavar="BASE", help="The base to compare with: a folder, id@revision or builtin:NAME.")
@base_options
@click.pass_obj
def _command(output: Output, /, out: Path, *, against: str | None, **safety: bool) -> int:
    """Check a converted checkpoint.

    First the files of OUT against its lock, then the model in a fresh process that has no surgery.
    """
    from surgery.checkpoint.resolve import open_base
    from surgery.verification import verify

    if against is None:
        return show_verification(output, str(out), verify(out))
    base = open_base(against, **safety)
    found = verify(out, against=base.folder, trust_base_code=base.remote_code)
    return show_verification(output, str(out), found)


command = _command
