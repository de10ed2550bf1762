"""Options that several commands share, each defined once, and the form of a command."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from surgery.cli.output import Output
from surgery.errors import UsageError

if TYPE_CHECKING:
    from surgery.manifest import Manifest

F = TypeVar("F", bound=Callable[..., Any])


class Command(click.Command):
    """A command with example lines, which its help shows and a test parses."""

    examples: Sequence[str] = ()

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's
        """Write the examples as they are, so that they can be copied."""
        with formatter.section("Examples"):
            for line in self.examples:
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


def command(name: str, examples: Sequence[str]) -> Callable[[Callable[..., Any]], Command]:
    """Make a function with options a command of this name; `-q`, `-v` and `--json` come with it."""

    def make(function: Callable[..., Any]) -> Command:
        made = click.command(name, cls=Command)(output_options(function))
        made.examples = examples
        return made

    return make


def _stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    def add(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def _set_mode(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        output = ctx.ensure_object(Output)
        output.mode = "json" if param.name == "json" else "quiet"


def _set_verbosity(ctx: click.Context, _: click.Parameter, value: int) -> None:
    ctx.ensure_object(Output).verbosity = value


output_options = _stack(
    click.option("--json", is_flag=True, is_eager=True, expose_value=False, callback=_set_mode,
                 help="Print one JSON document, for errors too."),
    click.option("-q", "--quiet", is_flag=True, is_eager=True, expose_value=False, callback=_set_mode,
                 help="Print only what a script needs."),
    click.option("-v", "--verbose", count=True, is_eager=True, expose_value=False, callback=_set_verbosity,
                 help="Print more, and tracebacks of errors."),
)  # fmt: skip

base_options = _stack(
    click.option("--trust-remote-code", is_flag=True,
                 help="Accept a base that carries its own code; it must be pinned as id@40-digit-commit."),
    click.option("--allow-pickle", is_flag=True, help="Read weights from pickle files, restricted to tensors."),
)  # fmt: skip

_manifest_options = _stack(
    click.option("-m", "--manifest", metavar="FILE", type=click.Path(path_type=Path), help="The manifest (YAML)."),
    click.option("-o", "--operation", "operations", metavar="NAME[:SETTING=VALUE,...]", multiple=True,
                 help="An operation, in place of a manifest; may be repeated."),
    click.option("--set", "overrides", metavar="TARGET=VALUE", multiple=True,
                 help="Change one value of the manifest, such as output.shard_size=1GB or kv_latent.qk_dim=32."),
    click.option("--dtype", type=click.Choice(["keep", "float32", "bfloat16", "float16"]),
                 help="Type of floating tensors in the result (output.dtype)."),
    click.option("--shard-size", metavar="SIZE", help="Largest file, such as 5GB (output.shard_size)."),
)  # fmt: skip


@dataclass(frozen=True)
class ManifestChoice:
    """The manifest that a command line describes, not read yet."""

    file: Path | None
    operations: tuple[str, ...]
    overrides: tuple[str, ...]

    def load(self, *, verify: bool = True) -> Manifest:
        """Read and check it; `verify=False` turns verification off, whatever it says."""
        from surgery.manifest import load_manifest

        more = () if verify else ("verify=false",)
        return load_manifest(self.file, operations=self.operations, overrides=(*self.overrides, *more))


def manifest_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that name a manifest; the function takes them as one `choice`. An option counts as the last `--set`."""

    @wraps(function)
    def with_choice(
        *arguments: Any, manifest: Path | None, operations: tuple[str, ...], overrides: tuple[str, ...], **rest: Any
    ) -> Any:
        own = {"output.dtype": rest.pop("dtype"), "output.shard_size": rest.pop("shard_size")}
        more = (f"{target}={value}" for target, value in own.items() if value is not None)
        return function(*arguments, choice=ManifestChoice(manifest, operations, (*overrides, *more)), **rest)

    return _manifest_options(with_choice)


statistics_option = click.option(
    "--statistics", metavar="PATH", type=click.Path(path_type=Path),
    help="Folder in which calibration results are kept for reuse, or the file of one.",
)  # fmt: skip

run_options = _stack(
    click.option("--resume/--no-resume", default=True, show_default=True,
                 help="Go on from an interrupted run of the same conversion."),
    click.option("--overwrite", is_flag=True, help="Replace an OUT that surgery wrote."),
    click.option("--link", is_flag=True, help="Hard-link files that do not change instead of copying them."),
    click.option("--device", default="cpu", show_default=True, help="Where calibration and training run."),
    click.option("--workers", type=click.IntRange(min=1), help="Files written at once [default: cores, at most 4]."),
    statistics_option,
    click.option("--teacher", metavar="BASE", help="What training imitates [default: the base]."),
)  # fmt: skip


def choose_base(named: str | None, manifest: Manifest) -> str:
    """The base on the command line, or else the manifest's. Raises UsageError where there is none."""
    base = named or manifest.base
    if base is None:
        raise UsageError(
            "no base is named", cause="neither the command line nor the manifest has one",
            remedy="name a folder, OWNER/NAME@COMMIT or builtin:NAME before OUT",
        )  # fmt: skip
    return base
