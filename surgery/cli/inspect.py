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
    help="Ask a result of visual_pruning about this image, and show which of its visual tokens stay.",
)
@click.option("--question", metavar="TEXT", help="What it is asked; with --image.")
@click.option(
    "--picture",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Draw what stays as this PNG, which must not be there yet; with --image.",
)
@click.option(
    "--reserve",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the visual tokens that stays, with --image [default: that of the result].",
)
@click.option("--device", help="Where the model runs, with --image [default: cpu].")
@base_options
@click.pass_obj
def _command(
    output: Output, /, base: str, *, trust_remote_code: bool, allow_pickle: bool, image: Path | None, **about: Any
) -> int:
    """Show what BASE is, and which operations fit it.

    BASE is a checkpoint folder, id@revision of the Hub, or builtin:NAME. No weight is read.

    With --image and --question, BASE is a folder that the operation visual_pruning made, and the question is asked. Its
    code runs, if its files are those of its lock, or with --trust-remote-code.
    """
    given = {name: value for name, value in about.items() if value is not None}
    if image is not None:
        return _ask(output, base, image=image, trust_remote_code=trust_remote_code, **given)
    if given:
        raise UsageError(
            f"--{next(iter(given))} is given without --image", cause="it is for a question about an image",
            remedy="add --image FILE, or leave it out",
        )  # fmt: skip
    from surgery.inspection import inspect

    found = inspect(base, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    fitting = "\n".join(name for name, reason in found.operations.items() if reason is None)
    return output.result(found.to_json(), _human(found), fitting)


def _ask(output: Output, base: str, *, picture: Path | None = None, **run: Any) -> int:
    if "question" not in run:
        raise UsageError(
            "--image is given without --question", cause="which of an image stays depends on what is asked",
            remedy="add --question TEXT",
        )  # fmt: skip
    from surgery.finished import check_picture
    from surgery.pruning_inspection import pruning_report

    if picture is not None:
        check_picture(picture)
    with output.progress() as report:
        found = pruning_report(base, report=report, **run)
    if picture is not None:
        found.draw(picture)
    data = {**found.to_json(), "picture": None if picture is None else str(picture)}
    return output.result(data, _stays(found, picture), found.answer)


command = _command


def _stays(found: PruningReport, picture: Path | None) -> Human:
    share = f"{found.kept_tokens:,} of {found.visual_tokens:,} stay, {found.share:.1%}"
    rows = [
        ("image", found.image),
        ("visual tokens", share),
        ("prompt", f"{found.prompt_tokens_after:,} of {found.prompt_tokens_before:,} tokens"),
        ("cache", f"{human_size(found.cache_bytes_after)} of {human_size(found.cache_bytes_before)}"),
        ("what stays", ", ".join(map(str, found.kept))),
        *found.said.items(),
        *(("note", note) for note in found.notes),
    ]
    return [Table([*rows, ("picture", str(picture))] if picture is not None else rows)]


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
