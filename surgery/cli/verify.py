"""`surgery verify`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

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
@click.option("--text", metavar="FILE", help="With --against: text for perplexity (default: that of every Python).")
@base_options
@click.pass_obj
def _command(output: Output, /, out: Path, *, against: str | None, text: str | None, **safety: bool) -> int:
    """Check a converted checkpoint.

    First the files of OUT against its lock, then the model in a fresh process that has no surgery.
    """
    from surgery.calibration.documents import evaluation_text
    from surgery.checkpoint.resolve import open_base
    from surgery.verification import Trial, verify

    if text is not None and against is None:
        raise click.UsageError("--text needs --against: its perplexity is compared with the base's")
    if against is None:
        return show_verification(output, str(out), verify(out))
    base = open_base(against, **safety)
    with TemporaryDirectory(prefix="surgery-verify-") as work:
        heldout = Path(work) / "heldout.txt"
        heldout.write_text(evaluation_text("builtin" if text is None else [Path(text)]), encoding="utf-8")
        trial = Trial(text=heldout)
        found = verify(out, against=base.folder, trust_base_code=base.remote_code, trial=trial)
    return show_verification(output, str(out), found)


command = _command
