"""`surgery reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from surgery.cli.options import base_options, command, run_options
from surgery.cli.output import Output
from surgery.cli.results import show_conversion

EXAMPLES = ("surgery reproduce OUT/surgery.lock.json AGAIN",)


@command("reproduce", EXAMPLES)
@click.argument("lock", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@run_options
@base_options
@click.pass_obj
def _command(output: Output, lock: Path, out: Path, **run: Any) -> int:
    """Convert again as LOCK (a surgery.lock.json) records, into OUT, and compare every file's hash."""
    from surgery.conversion import reproduce

    with output.progress() as report:
        done = reproduce(lock, out, report=report, **run)
    return show_conversion(output, done)


command = _command
