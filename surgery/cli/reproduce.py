"""`surgery reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from surgery.cli.options import base_options, command, run_options
from surgery.cli.output import Output
from surgery.cli.results import run_conversion

EXAMPLES = ("surgery reproduce OUT/surgery.lock.json AGAIN",)


@command("reproduce", EXAMPLES)
@click.argument("lock", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", metavar="BASE", help="Where the base is; needed where it was a local folder.")
@click.option("--files", type=click.Path(path_type=Path), default=Path(), help="Folder of the manifest's text files.")
@run_options
@base_options
@click.pass_obj
def _command(output: Output, /, lock: Path, out: Path, **run: Any) -> int:
    """Convert again from a lock.

    Repeats into OUT what LOCK (a surgery.lock.json) records, and compares the hash of every file.
    """
    from surgery.reproduction import reproduce

    return run_conversion(output, lambda report: reproduce(lock, out, report=report, **run))


command = _command
