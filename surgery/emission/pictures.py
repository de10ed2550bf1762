"""Pictures of images as models see them: visual tokens that leave are dark, tiles that are masked are black."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

PLACE = "pictures/sample.png"  # in a checkpoint
DIMMED = 0.25  # brightness of what leaves
SIDE, COLOURS = 384, 128  # of a card's picture: at most so many pixels of one byte, and so below 150 kB
FINE, COARSE, AROUND = (80, 80, 80), (255, 255, 255), (255, 60, 60)  # lines between tokens, tiles, and around black


@dataclass(frozen=True)
class View:
    """What the vision tower is shown: an image, and how its visual tokens lie on it.

    Tokens lie row by row, `rows` by `columns`; the number of the first one is `first`.
    """

    image: Image
    rows: int
    columns: int
    first: int = 0

    def box(self, token: int) -> tuple[int, int, int, int] | None:
        """Left, top, right and bottom of a token in pixels; None where it shows something else."""
        row, column = divmod(token - self.first, self.columns)
        if not 0 <= row < self.rows:
            return None
        down, across = cuts(self.image.height, self.rows), cuts(self.image.width, self.columns)
        return across[column], down[row], across[column + 1], down[row + 1]


def cuts(size: int, count: int) -> list[int]:
    """Where `count` equal stripes of a side begin, and where the last one ends."""
    return [size * number // count for number in range(count + 1)]


def dimmed(view: View, kept: Iterable[int]) -> Image:
    """The image of a view, dark but for the tokens that stay."""
    from PIL import ImageEnhance

    image = ImageEnhance.Brightness(view.image).enhance(DIMMED)
    for box in filter(None, map(view.box, kept)):
        image.paste(view.image.crop(box), box)
    return image


def tile_boxes(size: tuple[int, int], tiles: Iterable[int], side: int) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of the named tiles of a grid, `side` by `side` and numbered row by row."""
    across, down = (cuts(length, side) for length in size)
    places = [divmod(tile, side) for tile in tiles]
    return [(across[column], down[row], across[column + 1], down[row + 1]) for row, column in places]


def masked(image: Image, tiles: Iterable[int], side: int) -> Image:
    """A copy of an image on which the named tiles are black."""
    image = image.copy()
    for box in tile_boxes(image.size, tiles, side):
        image.paste((0, 0, 0), box)
    return image


def sample_png(sample: Mapping[str, Any], image: Path) -> bytes:
    """The picture that a card shows of `sample`, whose `image` the model was shown: the same bytes each time."""
    from PIL import Image, ImageDraw

    with Image.open(image) as opened:
        seen = opened.convert("RGB")
    if sample["side"] is not None:
        seen = masked(seen, sample["masked"], sample["side"])
    view = View(_sized(seen), sample["rows"], sample["columns"], sample["first"])
    drawn = view.image.copy() if sample["kept"] is None else dimmed(view, sample["kept"])
    lines = ImageDraw.Draw(drawn)
    _grid(lines, drawn.size, view.rows, view.columns, FINE)
    if sample["side"] is not None:
        _grid(lines, drawn.size, sample["side"], sample["side"], COARSE)
        for box in tile_boxes(drawn.size, sample["masked"], sample["side"]):
            lines.rectangle(box, outline=AROUND, width=2)
    file = io.BytesIO()
    drawn.quantize(COLOURS, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def _grid(lines: Any, size: tuple[int, int], rows: int, columns: int, colour: tuple[int, int, int]) -> None:
    width, height = size
    for at in cuts(width - 1, columns):
        lines.line([(at, 0), (at, height)], fill=colour)
    for at in cuts(height - 1, rows):
        lines.line([(0, at), (width, at)], fill=colour)


def _sized(image: Image) -> Image:
    """As large as a card's picture may be: small ones by a whole factor, so that their pixels stay sharp."""
    from PIL import Image as Images

    longest = max(image.size)
    if longest > SIDE:
        size = max(image.width * SIDE // longest, 1), max(image.height * SIDE // longest, 1)
        return image.resize(size, Images.Resampling.BOX)
    factor = SIDE // longest
    return image.resize((image.width * factor, image.height * factor), Images.Resampling.NEAREST)
