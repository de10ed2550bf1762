"""`surgery cache`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import command
from surgery.cli.output import Human, Output, Table
from surgery.sizes import human_size

if TYPE_CHECKING:
    from surgery.cache_inspection import CacheReport

EXAMPLES = (
    "surgery cache OUT",
    "surgery cache OUT --text corpus.txt --tokens 4096 --reserve-ratio 0.2 --picture spindle.png",
)


@command("cache", EXAMPLES)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--text",
    metavar="FILE",
    default="builtin",
    show_default=True,
    help="The prompt: a text file, or builtin for a text that every Python carries.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="Tokens of the prompt, at most as many as the model takes.",
)
@click.option(
    "--reserve-ratio",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the stock cache's bytes that the prompt may take [default: that of CHECKPOINT].",
)
@click.option(
    "--method", type=click.Choice(["solved", "paper"]), help="How the cache is coded [default: that of CHECKPOINT]."
)
@click.option(
    "--picture",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Draw the stored size by layer as this PNG, which must not be there yet.",
)
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run the code of CHECKPOINT also where its files are not those of its lock.",
)
@click.option("--device", default="cpu", show_default=True, help="Where the model runs.")
@click.pass_obj
def _command(
    output: Output, /, checkpoint: Path, *, picture: Path | None, reserve_ratio: float | None, method: str | None,
    **run: Any,
) -> int:  # fmt: skip
    """Show what the codebook cache of CHECKPOINT takes for a prompt, by layer and kind.

    CHECKPOINT is a folder that the operation codebook_kv made. Its code runs, if its files are those of its lock.
    """
    from surgery.cache_inspection import cache_report
    from surgery.finished import check_picture

    if picture is not None:
        check_picture(picture)
    given = {"reserve_ratio": reserve_ratio, "method": method}
    settings = {name: value for name, value in given.items() if value is not None}
    with output.progress() as report:
        found = cache_report(checkpoint, settings=settings, report=report, **run)
    if picture is not None:
        found.draw(picture)
    data = {**found.to_json(), "picture": None if picture is None else str(picture)}
    return output.result(data, _human(found, picture), f"{found.ratio:.4f}")


command = _command


def _human(found: CacheReport, picture: Path | None) -> Human:
    names = ("bytes", "stock_bytes", "stored_tokens", "seen_tokens", *found.kinds)
    total = {name: sum(layer[name] for layer in found.layers) for name in names}
    rows = [*((str(layer["layer"]), layer) for layer in found.layers), ("all", total)]
    yield Table([_size(*row) for row in rows], ("layer", "stored tokens, all heads", "bytes", "stock bytes", "share"))
    yield ""
    kinds = [(label, *(human_size(layer[kind]) for kind in found.kinds)) for label, layer in rows]
    yield Table(kinds, ("layer", *found.kinds))
    yield ""
    held = f"{human_size(found.bytes)} of {human_size(found.stock_bytes)}"
    yield f"{found.tokens:,} tokens of {found.text}: {held}, ratio {found.ratio:.4f}"
    for note in found.notes:
        yield f"note: {note}"
    if picture is not None:
        yield f"picture: {picture}"


def _size(label: str, layer: Mapping[str, int]) -> tuple[str, ...]:
    share = layer["bytes"] / layer["stock_bytes"] if layer["stock_bytes"] else 1.0
    stored = f"{layer['stored_tokens']:,} of {layer['seen_tokens']:,}"
    return label, stored, human_size(layer["bytes"]), human_size(layer["stock_bytes"]), f"{share:.1%}"
