"""An image as a model sees it, with the patches that leave the prompt darkened."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.emission.pictures import View, cuts, dimmed
from surgery.errors import UnsupportedModel
from surgery.finished import write_picture

if TYPE_CHECKING:
    from PIL.Image import Image

    from surgery.pruning_inspection import PruningReport

INCHES = 7  # longest side of the image when drawn
SHORT, LINE = 300, 72  # letters of a text in the title, and of a line of it


def seen(inputs: Mapping[str, Any], config: Any, processor: Any, tokens: int) -> View:
    """The view of the one image among a model's inputs, which became so many visual tokens.

    Of an image that is also shown in closer crops it is the base view, which shows the whole and comes first. Raises
    UnsupportedModel where tokens do not lie in a grid that is known.
    """
    from surgery.probe.views import shown

    found = shown(inputs, config, processor, tokens)
    if found is None:
        raise UnsupportedModel(
            f"{tokens} visual tokens do not lie on the image in a way that is known",
            cause="they are not its patches row by row", remedy="ask the model itself: output.kept_indices",
        )  # fmt: skip
    return View(found.image, found.rows, found.columns, found.first)


def draw_pruning(place: Path, found: PruningReport) -> None:
    """Draw a report as the PNG `place`, which appears whole or not at all. Raises what `check_picture` raises."""
    write_picture(place, lambda whole: _draw(whole, found))


def _draw(path: Path, found: PruningReport) -> None:
    view = found.view
    figure = framed(dimmed(view, found.kept), found.said)
    gridded(figure.axes[0], view)
    save(figure, path)


def framed(image: Image, said: Mapping[str, str]) -> Any:
    """A figure that shows an image, below what is `said` of it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    longest = max(image.size)
    figure = Figure(figsize=(INCHES * image.width / longest, INCHES * image.height / longest))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(image)
    axes.tick_params(length=0, labelbottom=False, labelleft=False)
    lines = (textwrap.shorten(f"{name}: {text}", SHORT, placeholder=" ...") for name, text in said.items())
    # A question is anybody's words: no formulas, and no complaint about letters that the font lacks.
    axes.set_title("\n".join(textwrap.fill(line, LINE) for line in lines), fontsize=9, loc="left", parse_math=False)
    return figure


def gridded(axes: Any, view: View) -> None:
    """Draw lines between visual tokens."""
    axes.set_xticks([at - 0.5 for at in cuts(view.image.width, view.columns)])
    axes.set_yticks([at - 0.5 for at in cuts(view.image.height, view.rows)])
    axes.grid(color="white", alpha=0.3, linewidth=0.4)


def save(figure: Any, path: Path) -> None:
    """Write a figure as a PNG, the same bytes each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.savefig(path, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})
