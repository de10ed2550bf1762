"""Digits in a grid: the pictures that the built-in model `llava` learned to look at, and what it is asked about them.

A picture has 8 x 8 cells. A cell is as large as a patch of the model's vision tower, so it is one visual token, and
both are numbered row by row. Most cells show a faint texture and nothing else; a few hold a digit, white or of a colour
that no other digit of the picture has. A question names a cell or a colour and is answered by one cell alone: whoever
drops visual tokens knows which one an answer needs, and that this depends on the question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import NamedTuple, TypeVar

from PIL import Image

__all__ = ["Glyph", "Picture", "Question", "VisualPrompt", "picture", "questions", "visual_prompts", "visual_words"]

CELL, GRID = 8, 8  # pixels along a cell, cells along a picture
CELL_NAMES = [f"{column}{row}" for row in range(1, GRID + 1) for column in "abcdefgh"]  # the first row is the top
FEWEST, MOST = 4, 12  # digits in a picture
COLOURED = 3, 4, 5, 6  # of them, at most
BLANK, PLAIN = "blank", "white"
COLOURS = {
    "red": (255, 40, 40),
    "green": (40, 220, 40),
    "blue": (70, 90, 255),
    "yellow": (250, 230, 40),
    "purple": (220, 60, 230),
    "cyan": (40, 225, 235),
}
INKS = COLOURS | {PLAIN: (255, 255, 255)}
ORDINALS = "first", "second"
BY_COLOUR, BY_BLANK = 0.5, 0.1  # shares of all questions; the rest names a cell with a digit in it
FONT = """
    .###. ..#.. .###. ##### ...#. ##### ..##. ##### .###. .###.
    #...# .##.. #...# ...#. ..##. #.... .#... ....# #...# #...#
    #..## ..#.. ....# ..#.. .#.#. ####. #.... ...#. #...# #...#
    #.#.# ..#.. ..##. ...#. #..#. ....# ####. ..#.. .###. .####
    ##..# ..#.. .#... ....# ##### ....# #...# .#... #...# ....#
    #...# ..#.. #.... #...# ...#. #...# #...# .#... #...# ...#.
    .###. .###. ##### .###. ...#. .###. .###. .#... .###. .##..
"""

_Choice = TypeVar("_Choice")


class Glyph(NamedTuple):
    """What a cell shows."""

    digit: str
    colour: str


class Question(NamedTuple):
    """A question about one picture: what is asked, the one word that answers it, and the cell that shows it."""

    text: str
    answer: str
    cell: int


@dataclass(frozen=True, slots=True)
class Picture:
    """An image of 64 x 64 pixels (RGB), and its digits by the number of their cells."""

    image: Image.Image
    glyphs: Mapping[int, Glyph]


@dataclass(frozen=True, slots=True)
class VisualPrompt:
    """A question about one image, or about one of two."""

    images: tuple[Image.Image, ...]
    question: str
    answer: str
    cell: int
    asked: int = 0  # which image the question is about

    @property
    def token(self) -> int:
        """The number of the visual token that shows the answer, among those of all images."""
        return self.asked * GRID * GRID + self.cell


def picture(seed: int, *, most: int = MOST) -> Picture:
    """Return the picture that `seed` alone decides, with at most `most` digits."""
    draw = Random(seed)  # noqa: S311 - no secret
    side = GRID * CELL // 2
    texture = Image.frombytes("L", (side, side), bytes(int(50 * draw.random()) for _ in range(side * side)))
    image = texture.resize((2 * side, 2 * side), Image.Resampling.NEAREST).convert("RGB")
    fewest = min(FEWEST, most)
    cells = _several(draw, range(GRID * GRID), fewest + int((most - fewest + 1) * draw.random()))
    colours = [*_several(draw, tuple(COLOURS), _one(draw, COLOURED)), *[PLAIN] * len(cells)]
    glyphs = {}
    for cell, colour in zip(cells, colours, strict=False):
        digit, strength = int(10 * draw.random()), 0.75 + 0.25 * draw.random()
        ink = tuple(int(strength * part) for part in INKS[colour])
        row, column = divmod(cell, GRID)
        corner = column * CELL + 1 + int(2 * draw.random()), row * CELL + int(2 * draw.random())
        image.paste(ink, corner, _mask(digit))
        glyphs[cell] = Glyph(str(digit), colour)
    return Picture(image, glyphs)


def questions(shown: Picture) -> list[Question]:
    """Return everything that can be asked about a picture: what is in each cell, and which digit has each colour."""
    by_cell = [
        Question(f"What is at {name}?", shown.glyphs[cell].digit if cell in shown.glyphs else BLANK, cell)
        for cell, name in enumerate(CELL_NAMES)
    ]
    by_colour = [
        Question(f"Which digit is {glyph.colour}?", glyph.digit, cell)
        for cell, glyph in shown.glyphs.items()
        if glyph.colour != PLAIN
    ]
    return by_cell + by_colour


def visual_prompts(
    count: int, *, seed: int, heldout: bool = True, images: int = 1, turns: int = 1, most: int = MOST
) -> list[VisualPrompt]:
    """Return `count` questions, `turns` after one another about the same images: 1, or 2 of which each names one.

    Pictures that are held out have odd seeds, the others even ones. Half the questions name a colour, one in ten an
    empty cell, the others a cell with a digit. Nothing is asked twice about the same images.

    Raises ValueError if `images` is neither 1 nor 2, or if `count` is no multiple of `turns`, which are 64 at most.
    """
    if images not in {1, 2} or not 0 < turns <= len(CELL_NAMES) or count % turns:
        raise ValueError(f"cannot ask {count} questions, {turns} at a time, about {images} images")
    draw = Random(2 * seed + heldout)  # noqa: S311 - no secret
    prompts = []
    for _ in range(count // turns):
        shown = [picture(2 * int(draw.random() * 2**52) + heldout, most=most) for _ in range(images)]
        seen = tuple(one.image for one in shown)
        left = [(asked, question) for asked, one in enumerate(shown) for question in questions(one)]
        for _ in range(turns):
            due = _kind_due(draw)
            asked, question = drawn = _one(draw, [entry for entry in left if _kind(entry[1]) == due] or left)
            left.remove(drawn)
            text = question.text
            if images > 1:
                text = f"In the {ORDINALS[asked]} image, {text[0].lower()}{text[1:]}"
            prompts.append(VisualPrompt(seen, text, question.answer, question.cell, asked))
    return prompts


def visual_words() -> list[str]:
    """Return every word and sign of questions and answers, in lower case: what a tokenizer has to know of them."""
    asked = ["what", "is", "at", "which", "digit", "in", "the", "image", ",", "?"]
    return [*asked, *ORDINALS, *COLOURS, *CELL_NAMES, *map(str, range(10)), BLANK]


def _kind(question: Question) -> str:
    """Return what a question names: a colour, a blank cell or a cell with a digit."""
    if question.text.startswith("Which"):
        return "colour"
    return BLANK if question.answer == BLANK else "digit"


def _kind_due(draw: Random) -> str:
    """Draw a kind, as often as it is due."""
    at = draw.random()
    return "colour" if at < BY_COLOUR else BLANK if at < BY_COLOUR + BY_BLANK else "digit"


def _one(draw: Random, choices: Sequence[_Choice]) -> _Choice:
    """Draw one; only `random()` promises the same results in every Python."""
    return choices[int(len(choices) * draw.random())]


def _several(draw: Random, choices: Sequence[_Choice], count: int) -> list[_Choice]:
    """Draw `count` different ones."""
    return sorted(choices, key=lambda _: draw.random())[:count]


@lru_cache
def _mask(digit: int) -> Image.Image:
    """Return the pixels of a digit: white where there is ink."""
    rows = [row.split()[digit] for row in FONT.split("\n") if row.strip()]
    ink = bytes(255 * (pixel == "#") for row in rows for pixel in row)
    return Image.frombytes("L", (len(rows[0]), len(rows)), ink)
