"""An image as a vision tower is shown it, and how its visual tokens lie on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Shown:
    """What the tower gets of an image. Tokens lie row by row, `rows` by `columns`; `first` is the first's number."""

    image: Image
    rows: int
    columns: int
    first: int


def shown(inputs: Mapping[str, Any], config: Any, processor: Any, tokens: int) -> Shown | None:
    """The one image among a model's inputs, which became so many visual tokens; None where its layout is not known.

    Of an image that is also shown in closer crops it is the base view, which shows the whole and comes first.
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
        return None
    return Shown(_image(planes[:, : rows * side, : columns * side], processor.image_processor), rows, columns, first)


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
    from PIL import Image as Images  # which is not needed where nothing is shown

    planes = planes.float().cpu()
    if processor.do_normalize:
        mean, std = (torch.tensor(value)[:, None, None] for value in (processor.image_mean, processor.image_std))
        planes = planes * std + mean
    if processor.do_rescale:
        planes = planes / processor.rescale_factor
    return Images.fromarray(planes.round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy())
