"""The command line. Only click is imported until a command runs, so that every `--help` is quick.

Results go to stdout, progress and errors to stderr. Exit codes are those of `surgery.errors`, and 130 for Ctrl-C.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

import click

from surgery.cli.group import surgery
from surgery.cli.output import Output
from surgery.errors import EnvironmentFailure, InternalError, SurgeryError, UsageError

INTERRUPTED = 130


def main() -> None:
    """Entry point of the `surgery` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return the exit code."""
    output = Output()
    try:
        code = surgery.main(args=list(arguments) or ["--help"], prog_name="surgery", standalone_mode=False, obj=output)
    except click.Abort:
        return _interrupted(output)
    except click.ClickException as error:
        # The parser stopped before it came to the option that chooses the form of the answer.
        if "--json" in arguments:
            output.mode = "json"
        output.error(_usage_error(error))
        return UsageError.exit_code
    except SurgeryError as error:
        output.traceback(error)
        output.error(error)
        return error.exit_code
    except MemoryError as error:
        output.traceback(error)
        output.error(_no_memory())
        return EnvironmentFailure.exit_code
    except Exception as error:  # noqa: BLE001 - the last place where a defect can become a message
        output.traceback(error)
        output.error(_defect(error))
        return InternalError.exit_code
    return code if isinstance(code, int) else 0


def _no_memory() -> EnvironmentFailure:
    return EnvironmentFailure(
        "there is not enough memory", cause="an allocation failed",
        remedy="look at the memory in `surgery plan`, and try --workers 1",
    )  # fmt: skip


def _usage_error(error: click.ClickException) -> UsageError:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "surgery"
    usage = (
        context.command.get_usage(context).replace("Usage: ", "usage is ", 1) if context is not None else "see the help"
    )
    return UsageError(error.format_message(), cause=usage, remedy=f"see: {path} --help")


def _interrupted(output: Output) -> int:
    stop = SurgeryError("interrupted", cause="Ctrl-C", remedy="the same command goes on with what is finished")
    stop.exit_code = INTERRUPTED
    output.error(stop)
    return INTERRUPTED


def _defect(error: Exception) -> InternalError:
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown place"
    return InternalError(
        f"surgery failed with {type(error).__name__}: {error}", cause=f"a defect, at {place}",
        remedy="run it again with -v, and report the traceback with the manifest",
    )  # fmt: skip
