"""The stored size of a coded cache by layer, drawn as a spindle."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.checkpoint.writer import environment_errors
from surgery.errors import OutputExists, UsageError
from surgery.metrics.plots import require_plots

if TYPE_CHECKING:
    from surgery.cache_inspection import CacheReport


def check_picture(place: Path) -> None:
    """Raise, before long work, where a picture could not be drawn or written after it; nothing is left there."""
    require_plots("pictures are drawn")
    if place.suffix.lower() != ".png":
        raise UsageError(f"{place} is no name of a PNG", cause="pictures are PNG files", remedy="let it end in .png")
    with environment_errors(place):
        if place.exists() or place.is_symlink():
            raise OutputExists(
                f"{place} exists", cause="nothing is replaced unasked", remedy="choose another name, or remove it first"
            )
        if not place.parent.is_dir():
            raise UsageError(
                f"the folder of {place} is not there", cause=f"{place.parent} is no folder",
                remedy="make it first, or choose another place",
            )  # fmt: skip
        with tempfile.TemporaryFile(dir=place.parent):
            pass


def draw_picture(place: Path, found: CacheReport) -> None:
    """Draw a report as the PNG `place`, which appears whole or not at all. Raises what `check_picture` raises."""
    check_picture(place)
    with environment_errors(place), tempfile.TemporaryDirectory(prefix=".surgery-", dir=place.parent) as near:
        whole = Path(near) / place.name
        _draw(whole, found)
        whole.replace(place)


def _draw(path: Path, found: CacheReport) -> None:
    """The spindle: a bar per layer around a common axis, as wide as the layer's share of its stock cache, by kind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = range(len(found.layers))
    stock = [max(layer["stock_bytes"], 1) for layer in found.layers]
    shares = [layer["bytes"] / of for layer, of in zip(found.layers, stock, strict=True)]
    figure = Figure(figsize=(8, min(2 + 0.26 * len(rows), 40)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    left = [-share / 2 for share in shares]
    for kind in found.kinds:
        widths = [layer[kind] / of for layer, of in zip(found.layers, stock, strict=True)]
        if any(widths):
            axes.barh(rows, widths, left=left, height=0.85, label=kind)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, share in enumerate(shares):
        axes.annotate(f"{share:.1%}", (share / 2, row), (4, 0), textcoords="offset points", va="center", fontsize=8)
    reach = max(shares, default=1.0) * 0.62
    axes.set_xlim(-reach, reach)
    axes.xaxis.set_major_formatter(lambda at, _: f"{abs(2 * at):.0%}")
    axes.set_xlabel("bytes of a layer, in percent of its stock cache (whole width of a bar)")
    axes.set_ylabel("layer")
    axes.set_yticks(rows, [str(layer["layer"]) for layer in found.layers])
    axes.invert_yaxis()
    axes.set_title(f"codebook cache after {found.tokens:,} tokens: {found.ratio:.1%} of the stock cache")
    figure.legend(loc="outside right upper")
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
