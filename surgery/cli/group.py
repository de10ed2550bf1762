"""The table of commands; a command's module is imported when it is called or described."""

from __future__ import annotations

from importlib import import_module

import click

from surgery.suggestions import did_you_mean
from surgery.version import __version__

# In the order in which people need them.
COMMANDS = ("inspect", "operations", "plan", "convert", "heal", "verify", "cache", "reproduce", "schema")


class LazyGroup(click.Group):
    """A group whose commands are the modules of `surgery.cli` named in COMMANDS."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """The names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"surgery.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that was called, or suggest the nearest."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            ctx.fail(f"there is no command {name!r}{did_you_mean(name, COMMANDS)}; known: {', '.join(COMMANDS)}")
        return super().resolve_command(ctx, args)


surgery = LazyGroup(
    "surgery",
    help="Operate on trained models: read a Hugging Face checkpoint, apply a manifest's operations, write a checkpoint "
    "that loads anywhere.",
    epilog="Start with: surgery inspect builtin:llama",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
click.version_option(__version__, "--version", prog_name="surgery")(surgery)
