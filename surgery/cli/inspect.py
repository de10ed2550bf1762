"""`surgery inspect`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import base_options, command
from surgery.cli.output import Human, Output, Table
from surgery.errors import UsageError
from surgery.sizes import human_count, human_size

if TYPE_CHECKING:
    from surgery.defense_inspection import DefenseReport
    from surgery.inspection import Inspection, Structure
    from surgery.pruning_inspection import PruningReport

EXAMPLES = (
    "surgery inspect builtin:llama",
    "surgery inspect path/to/checkpoint --json",
    "surgery inspect OUT --image photo.jpg --question 'What is written on the sign?' --picture stays.png",
)


@command("inspect", EXAMPLES)
@click.argument("base")
@click.option(
    "--image",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Ask a result of visual_pruning or visual_defense about this image, and show what stays and what is masked.",
)
@click.option("--question", metavar="TEXT", help="What it is asked; with --image.")
@click.option(
    "--picture",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Draw that as this PNG, which must not be there yet; with --image.",
)
@click.option(
    "--reserve",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the visual tokens that stays, with --image [default: that of the result].",
)
@click.option(
    "--masked-tiles",
    metavar="NUMBERS",
    help="Tiles that are masked, such as 0,5,9, with --image [default: those that the result chooses].",
)
@click.option("--device", help="Where the model runs, with --image [default: cpu].")
@base_options
@click.pass_obj
def _command(
    output: Output, /, base: str, *, trust_remote_code: bool, allow_pickle: bool, image: Path | None, **about: Any
) -> int:
    """Show what BASE is, and which operations fit it.

    BASE is a checkpoint folder, id@revision of the Hub, or builtin:NAME. No weight is read.

    With --image and --question, BASE is a folder that visual_pruning or visual_defense made, and the question is asked.
    Its code runs, if its files are those of its lock, or with --trust-remote-code.
    """
    given = {name: value for name, value in about.items() if value is not None}
    if image is not None:
        return _ask(output, base, image=image, trust_remote_code=trust_remote_code, **given)
    if given:
        name = next(iter(given)).replace("_", "-")
        raise UsageError(
            f"--{name} is given without --image", cause="it is for a question about an image",
            remedy="add --image FILE, or leave it out",
        )  # fmt: skip
    from surgery.inspection import inspect

    found = inspect(base, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    fitting = "\n".join(name for name, reason in found.operations.items() if reason is None)
    return output.result(found.to_json(), _human(found), fitting)


def _ask(output: Output, base: str, *, picture: Path | None = None, masked_tiles: str | None = None, **run: Any) -> int:
    if "question" not in run:
        raise UsageError(
            "--image is given without --question", cause="which of an image stays depends on what is asked",
            remedy="add --question TEXT",
        )  # fmt: skip
    from surgery.defense_inspection import DefenseReport, defense_report
    from surgery.finished import check_picture, open_result
    from surgery.pruning_inspection import pruning_report

    if picture is not None:
        check_picture(picture)
    found: DefenseReport | PruningReport
    defended = "visual_defense" in (open_result(Path(base), "visual_pruning").config.get("surgery") or {})
    if masked_tiles is not None and not defended:
        raise UsageError(
            "--masked-tiles is given, and this result masks nothing", cause="visual_defense did not make it",
            remedy="leave it out",
        )  # fmt: skip
    with output.progress() as report:
        if defended:
            found = defense_report(base, report=report, masked_tiles=_numbers(masked_tiles), **run)
        else:
            found = pruning_report(base, report=report, **run)
    if picture is not None:
        found.draw(picture)
    data = {**found.to_json(), "picture": None if picture is None else str(picture)}
    rows = [
        ("image", found.image),
        *(_masks(found) if isinstance(found, DefenseReport) else _stays(found)),
        *found.said.items(),
        *(("note", note) for note in found.notes),
        *([("picture", str(picture))] if picture is not None else []),
    ]
    return output.result(data, [Table(rows)], found.answer)


command = _command


def _numbers(given: str | None) -> list[int] | None:
    """The numbers of tiles in a list with commas; none of them where it is empty."""
    if given is None:
        return None
    parts = [part.strip() for part in given.split(",") if part.strip()]
    wrong = [part for part in parts if not (part.isascii() and part.isdecimal())]
    if wrong:
        raise UsageError(
            f"--masked-tiles has {wrong[0]!r}", cause="tiles have whole numbers, row by row from 0",
            remedy="give numbers with commas between: --masked-tiles 0,5,9",
        )  # fmt: skip
    return [int(part) for part in parts]


def _stays(found: PruningReport) -> Iterator[tuple[str, str]]:
    yield "visual tokens", f"{found.kept_tokens:,} of {found.visual_tokens:,} stay, {found.share:.1%}"
    yield "prompt", f"{found.prompt_tokens_after:,} of {found.prompt_tokens_before:,} tokens"
    yield "cache", f"{human_size(found.cache_bytes_after)} of {human_size(found.cache_bytes_before)}"
    yield "what stays", ", ".join(map(str, found.kept))


def _masks(found: DefenseReport) -> Iterator[tuple[str, str]]:
    yield "masked tiles", f"{', '.join(map(str, found.masked)) or 'none'} of {found.tiles}"
    for row in range(0, found.tiles, found.side) if found.scores is not None else ():
        scores = (found.scores or ())[row : row + found.side]
        yield f"scores {row} to {row + found.side - 1}", "  ".join(f"{score:.4g}" for score in scores)
    if found.kept is not None:
        stay = len(found.kept)
        yield "visual tokens", f"{stay:,} of {found.visual_tokens:,} stay, {stay / found.visual_tokens:.1%}"
        yield "what stays", ", ".join(map(str, found.kept))
    yield "prompt", f"{found.prompt_tokens_read:,} tokens are read, {found.prompt_tokens:,} were put"
    if found.tag_found is not None:
        yield "answer was marked", "yes" if found.tag_found else "no: on_missing decided"


def _human(found: Inspection) -> Human:
    kinds = ", ".join(f"{kind} {human_count(count)}" for kind, count in found.dtypes.items())
    rows = [
        (
            "base",
            found.source + (f" @ {found.revision}" if found.revision and found.revision not in found.source else ""),
        ),
        ("family", f"{found.family or 'no family file'} ({found.model_type})"),
        *(_structure(found.structure) if found.structure else ()),
        ("parameters", f"{human_count(found.parameters)} in {kinds}"),
        ("weights", f"{human_size(found.bytes)} in {len(found.shards)} file{'s' * (len(found.shards) > 1)}"),
        ("KV cache", _cache(found)),
        ("code", "its own, not run" if found.remote_code else "native"),
        *((name, "fits" if reason is None else f"does not fit: {reason}") for name, reason in found.operations.items()),
        ("carried files", ", ".join(name for name, reason in found.side_files.items() if not reason) or "none"),
        *(("not carried", f"{name}: {reason}") for name, reason in found.side_files.items() if reason),
    ]
    return [Table(rows)]


def _cache(found: Inspection) -> str:
    if found.cache_bytes_per_token is None:
        return "unknown"
    return f"{found.cache_bytes_per_token:,} bytes a token in {found.cache_dtype}"


def _structure(structure: Structure) -> Iterator[tuple[str, str]]:
    rope = structure.rope
    biases = [name for name, there in (("q, k, v", structure.qkv_bias), ("output", structure.output_bias)) if there]
    yield "layers", f"{structure.layers} of width {structure.hidden_size}"
    yield "attention", f"{structure.heads} heads, {structure.kv_heads} KV heads, width {structure.head_dim}"
    yield "rope", f"{rope.kind}, theta {rope.theta:g}, width {rope.width}" if rope else "several tables"
    yield "biases", "; ".join(biases) or "none"
    yield "query-key norm", structure.qk_norm
    if structure.experts is not None and structure.active_parameters is not None:
        taken = (
            f"{structure.experts} in each of {structure.expert_layers} layers, {structure.experts_per_token} a token"
        )
        yield "experts", f"{taken}; {human_count(structure.active_parameters)} parameters active"
    yield "sliding window", f"{structure.window} tokens" if structure.window else "none"
