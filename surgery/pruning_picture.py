"""An image as a model sees it, with the patches that leave the prompt darkened."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import UnsupportedModel
from surgery.finished import write_picture

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from surgery.pruning_inspection import PruningReport

DIMMED = 0.25  # brightness of what leaves
INCHES = 7  # longest side of the image when drawn
SHORT, LINE = 300, 72  # letters of a text in the title, and of a line of it


@dataclass(frozen=True)
class View:
    """What the vision tower is shown: an image, and how its visual tokens lie on it.

    Tokens lie row by row, `rows` by `columns`; the number of the first one is `first`.
    """

    image: Image
    rows: int
    columns: int
    first: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a token in pixels."""
        return self.image.width // self.columns, self.image.height // self.rows

    def box(self, token: int) -> tuple[int, int, int, int] | None:
        """Left, top, right and bottom of a token in pixels; None where it shows something else."""
        row, column = divmod(token - self.first, self.columns)
        if not 0 <= row < self.rows:
            return None
        width, height = self.size
        return column * width, row * height, (column + 1) * width, (row + 1) * height


def seen(inputs: Mapping[str, Any], config: Any, processor: Any, tokens: int) -> View:
    """The view of the one image among a model's inputs, which became so many visual tokens.

    Of an image that is also shown in closer crops it is the base view, which shows the whole and comes first. Raises
    UnsupportedModel where tokens do not lie in a grid that is known.
    """
    tower = config.vision_config
    if "image_grid_thw" in inputs:
        planes, side = _joined(inputs["pixel_values"], inputs["image_grid_thw"][0].tolist(), tower)
    else:
        pixels, side = inputs["pixel_values"], tower.patch_size
        planes = pixels[0, 0] if pixels.ndim == 5 else pixels[0]
    rows, columns = planes.shape[1] // side, planes.shape[2] // side
    default = getattr(processor, "vision_feature_select_strategy", None) == "default"
    first = max(getattr(processor, "num_additional_image_tokens", 0) - default, 0)  # such as one for the whole image
    count = first + rows * columns
    if tokens < count or (tokens > count and inputs["pixel_values"].ndim < 5):
        raise UnsupportedModel(
            f"{tokens} visual tokens do not lie on the image in a way that is known",
            cause=f"its patches make {rows} rows of {columns}", remedy="ask the model itself: output.kept_indices",
        )  # fmt: skip
    return View(_image(planes[:, : rows * side, : columns * side], processor.image_processor), rows, columns, first)


def _joined(pixels: Tensor, grid: list[int], tower: Any) -> tuple[Tensor, int]:
    """Flattened patches [N, C * frames * p * p] -> their image [C, H, W], and the pixels along a token.

    Patches whose features merge into one token are neighbours, so rows are ordered (H/m, W/m, m, m).
    """
    (_, height, width), merge, patch = grid, tower.spatial_merge_size, tower.patch_size
    parts = (height // merge, width // merge, merge, merge, -1, tower.temporal_patch_size, patch, patch)
    blocks = pixels.reshape(parts)[:, :, :, :, :, 0]
    return blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(-1, height * patch, width * patch), merge * patch


def _image(planes: Tensor, processor: Any) -> Image:
    """Normalised pixels [3, H, W] as an image."""
    import torch
    from PIL import Image

    planes = planes.float().cpu()
    if processor.do_normalize:
        mean, std = (torch.tensor(value)[:, None, None] for value in (processor.image_mean, processor.image_std))
        planes = planes * std + mean
    if processor.do_rescale:
        planes = planes / processor.rescale_factor
    return Image.fromarray(planes.round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy())


def draw_pruning(place: Path, found: PruningReport) -> None:
    """Draw a report as the PNG `place`, which appears whole or not at all. Raises what `check_picture` raises."""
    write_picture(place, lambda whole: _draw(whole, found))


def dimmed(view: View, kept: tuple[int, ...]) -> Image:
    """The image of a view, dark but for the tokens that stay."""
    from PIL import ImageEnhance

    image = ImageEnhance.Brightness(view.image).enhance(DIMMED)
    for box in filter(None, map(view.box, kept)):
        image.paste(view.image.crop(box), box)
    return image


def _draw(path: Path, found: PruningReport) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    view = found.view
    longest = max(view.image.size)
    figure = Figure(figsize=(INCHES * view.image.width / longest, INCHES * view.image.height / longest))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(dimmed(view, found.kept))
    width, height = view.size
    axes.set_xticks([at * width - 0.5 for at in range(view.columns + 1)])
    axes.set_yticks([at * height - 0.5 for at in range(view.rows + 1)])
    axes.grid(color="white", alpha=0.3, linewidth=0.4)
    axes.tick_params(length=0, labelbottom=False, labelleft=False)
    lines = (textwrap.shorten(f"{name}: {text}", SHORT, placeholder=" ...") for name, text in found.said.items())
    # A question is anybody's words: no formulas, and no complaint about letters that the font lacks.
    axes.set_title("\n".join(textwrap.fill(line, LINE) for line in lines), fontsize=9, loc="left", parse_math=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.savefig(path, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})
