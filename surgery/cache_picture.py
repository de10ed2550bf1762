"""The stored size of a coded cache by layer, drawn as a spindle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from surgery.finished import write_picture

if TYPE_CHECKING:
    from surgery.cache_inspection import CacheReport


def draw_picture(place: Path, found: CacheReport) -> None:
    """Draw a report as the PNG `place`, which appears whole or not at all. Raises what `check_picture` raises."""
    write_picture(place, lambda whole: _draw(whole, found))


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
