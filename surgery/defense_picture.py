"""An image as a model sees it, with the tiles that a defence masks black, and the score of each tile in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from surgery.emission.pictures import View, dimmed, masked, tile_boxes
from surgery.finished import write_picture
from surgery.pruning_picture import framed, gridded, save

if TYPE_CHECKING:
    from surgery.defense_inspection import DefenseReport

LETTERS = 32  # of a size that fits a tile, over the tiles along a side


def draw_defense(place: Path, found: DefenseReport) -> None:
    """Draw a report as the PNG `place`, which appears whole or not at all. Raises what `check_picture` raises."""
    write_picture(place, lambda whole: _draw(whole, found))


def _draw(path: Path, found: DefenseReport) -> None:
    view, side = found.view, found.side
    image = masked(view.image, found.masked, side)
    if found.kept is not None:
        image = dimmed(View(image, view.rows, view.columns, view.first), found.kept)
    figure = framed(image, found.said)
    axes = figure.axes[0]
    if found.kept is not None:
        gridded(axes, view)
    for number, (left, top, right, bottom) in enumerate(tile_boxes(image.size, range(side * side), side)):
        edges = "red" if number in found.masked else "white"
        axes.plot(
            [left - 0.5, right - 0.5, right - 0.5, left - 0.5, left - 0.5],
            [top - 0.5, top - 0.5, bottom - 0.5, bottom - 0.5, top - 0.5],
            color=edges, linewidth=0.8, zorder=3 if number in found.masked else 2,
        )  # fmt: skip
        score = "" if found.scores is None else f"\n{found.scores[number]:.3g}"
        axes.text(
            (left + right - 1) / 2, (top + bottom - 1) / 2, f"{number}{score}", color="white", ha="center", va="center",
            fontsize=min(LETTERS / side, 8), bbox={"facecolor": "black", "alpha": 0.4, "pad": 1, "linewidth": 0},
        )  # fmt: skip
    save(figure, path)
