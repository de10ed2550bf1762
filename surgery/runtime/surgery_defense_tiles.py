# SPDX-License-Identifier: Apache-2.0
"""Pictures cut into tiles: which tile each pixel is in, how relevant tiles are, and tiles painted black.

The grid lies on what the vision tower sees. Method: AMIA (arXiv 2505.24519); how the grid follows the layouts of the
processors, and relevance from the model's own embeddings, are ours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers.image_processing_utils import select_best_resolution

OUTSIDE = -1  # padding that no tile covers
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}


@dataclass(frozen=True)
class View:
    """An image, or a clip, as the tower gets it.

    `pixels` is its part of the input, which `at` names; `tiles` (broadcasts to `pixels`) has the tile of each value,
    and `sizes` are the smallest height and width of it, in pixels. It is the `number`-th of its kind.
    """

    kind: str
    at: Any
    pixels: Tensor
    tiles: Tensor
    sizes: tuple[int, int]
    number: int


def stripes(size: int, count: int) -> Tensor:
    """Which of `count` stripes each of `size` places is in; stripe c starts at floor(size * c / count)."""
    starts = torch.tensor([size * number // count for number in range(1, count)], dtype=torch.long)
    return torch.searchsorted(starts, torch.arange(size), right=True)


def tile_map(height: int, width: int, side: int) -> Tensor:
    """The tile of each pixel [height, width]; `side` x `side` tiles are numbered row by row."""
    return stripes(height, side)[:, None] * side + stripes(width, side)


def crop_map(image_size: tuple[int, int], pinpoints: Any, view: int, side: int) -> Tensor:
    """The tiles of a base view and of the crops behind it, [1 + crops, view, view].

    The base view is the whole image; crops divide a canvas on which the image keeps its proportions and is centred.
    """
    tall, wide = select_best_resolution(image_size, pinpoints)
    by_height, by_width = tall / image_size[0], wide / image_size[1]
    if by_width < by_height:
        height, width = min(ceil(image_size[0] * by_width), tall), wide
    else:
        height, width = tall, min(ceil(image_size[1] * by_height), wide)
    top, left = (tall - height) // 2, (wide - width) // 2
    canvas = torch.full((tall, wide), OUTSIDE)
    canvas[top : top + height, left : left + width] = tile_map(height, width, side)
    crops = canvas.unflatten(0, (-1, view)).unflatten(2, (-1, view)).transpose(1, 2).flatten(0, 1)
    return torch.cat([tile_map(view, view, side)[None], crops])


def patch_map(grid: Sequence[int], patch: int, merge: int, side: int) -> Tensor:
    """The tiles of flattened patches, [frames * height * width, patch * patch], as Qwen's processors order them."""
    frames, height, width = grid
    tiles = tile_map(height * patch, width * patch, side)
    blocks = tiles.reshape(height // merge, merge, patch, width // merge, merge, patch).permute(0, 3, 1, 4, 2, 5)
    return blocks.reshape(height * width, patch * patch).repeat(frames, 1)


def views(inputs: dict[str, Any], config: Any, side: int) -> list[View]:
    """Every image and clip among the inputs of a model, images first. Raises for layouts that are not known."""
    return [view for kind in PIXELS for view in _views(kind, inputs, config, side)]


def _views(kind: str, inputs: dict[str, Any], config: Any, side: int) -> Iterator[View]:
    pixels, grids = inputs.get(PIXELS[kind]), inputs.get(GRIDS[kind])
    if pixels is None:
        return
    if pixels.ndim == 2 and grids is not None:
        tower, start = config.vision_config, 0
        patch, merge, area = tower.patch_size, tower.spatial_merge_size, tower.patch_size**2
        for number, grid in enumerate(grids.tolist()):
            at = slice(start, start := start + grid[0] * grid[1] * grid[2])
            tiles = patch_map(grid, patch, merge, side).repeat(1, pixels.shape[1] // area)
            yield View(kind, at, pixels[at], tiles.to(pixels.device), (grid[1] * patch, grid[2] * patch), number)
        return
    crops = kind == "image" and hasattr(config, "image_grid_pinpoints")
    if pixels.ndim != (5 if crops or kind == "video" else 4) or (crops and inputs.get("image_sizes") is None):
        raise NotImplementedError(f"{PIXELS[kind]} of shape {list(pixels.shape)}: pass what the base's processor makes")
    alone = _alone(inputs, len(pixels))
    for number, part in enumerate(pixels):
        height, width = part.shape[-2:]
        tiles = tile_map(height, width, side)
        if crops and alone[number]:
            tall, wide = map(int, inputs["image_sizes"][number])
            tiles = crop_map((tall, wide), config.image_grid_pinpoints, part.shape[-1], side)[: len(part), None]
            rest = torch.full((len(part) - len(tiles), *tiles.shape[1:]), OUTSIDE)
            tiles = torch.cat([tiles, rest])
        yield View(kind, number, part, tiles.to(pixels.device), (height, width), number)


def _alone(inputs: dict[str, Any], count: int) -> list[bool]:
    """Whether images stand alone in their prompt: only these are cropped, where the processor says how many."""
    together = inputs.get("batch_num_images")
    if together is None:
        return [True] * count
    return [number == 1 for number in map(int, together) for _ in range(number)]


def paint(pixels: Tensor, parts: Sequence[tuple[View, Sequence[int]]], black: Tensor) -> Tensor:
    """A copy of `pixels` in which the named tiles of each view have the value `black` of their channel [C]."""
    pixels = pixels.clone()
    for view, masked in parts:
        hit = torch.isin(view.tiles, torch.tensor(masked, dtype=torch.long, device=view.tiles.device))
        colour = black.to(pixels.device, pixels.dtype)
        colour = colour.repeat_interleave(pixels.shape[1] // len(black)) if pixels.ndim == 2 else colour[:, None, None]
        pixels[view.at] = torch.where(hit, colour, view.pixels)
    return pixels


def tile_scores(relevance: Tensor, side: int) -> Tensor:
    """Relevance of visual tokens [rows, columns] -> its mean over each tile [side * side], by the area they share."""
    down, across = (_shares(size, side).to(relevance) for size in relevance.shape)
    return (down @ relevance @ across.T).flatten()


def _shares(size: int, count: int) -> Tensor:
    """[count, size]: how much of each stripe is each place."""
    place, stripe = torch.arange(size) / size, torch.arange(count)[:, None] / count
    shared = torch.minimum(place + 1 / size, stripe + 1 / count) - torch.maximum(place, stripe)
    return normalize(shared.clamp(min=0), p=1, dim=1)


def least(scores: Tensor, count: int) -> list[int]:
    """The `count` tiles with the lowest of scores [N], ascending; of equal ones the first. Raises RuntimeError: nan."""
    if bool(scores.isnan().any()):
        raise RuntimeError("a tile has no score (nan), so none can be masked: the image, or the scorer, is broken")
    return sorted(scores.sort(stable=True).indices[:count].tolist())


def own_relevance(visual: Tensor, text: Tensor, mean: Tensor) -> Tensor:
    """Of visual tokens [V, D] to a text [T, D], float32 [V]: the highest cosine to one of its tokens.

    Both are taken from their means, `mean` being that of all embeddings: what all have in common says nothing.
    """
    visual, text = visual.float(), text.float() - mean.float()
    visual = normalize(visual - visual.mean(0), dim=-1)
    return (visual @ normalize(text, dim=-1).T).amax(-1)


def token_grid(view: View, inputs: dict[str, Any], config: Any) -> tuple[int, int, int]:
    """Frames, rows and columns of a view's tokens in the prompt; of crops, the base view's, which come first."""
    if view.pixels.ndim == 2:
        frames, height, width = inputs[GRIDS[view.kind]][view.number].tolist()
        merge = config.vision_config.spatial_merge_size
        return frames, height // merge, width // merge
    rows, columns = (size // config.vision_config.patch_size for size in view.sizes)
    if view.kind == "video":  # its frames are pooled
        return len(view.pixels), -(-rows // 2), -(-columns // 2)
    return 1, rows, columns


def visual_tokens(model: Any, view: View, inputs: dict[str, Any]) -> Tensor:
    """The projected visual tokens of a view, [frames, rows, columns, D]; of crops, the base view's.

    `model` is the one with the vision tower.
    """
    config = model.config
    if view.pixels.ndim == 2:
        grid = inputs[GRIDS[view.kind]][view.number]
        found = model.visual(view.pixels.to(model.visual.dtype), grid_thw=grid[None])
        found = getattr(found, "pooler_output", found)
        tokens: Tensor = found[0] if isinstance(found, tuple) else found
        return tokens.reshape(*token_grid(view, inputs, config), -1)
    pixels = view.pixels if view.pixels.ndim == 4 else view.pixels[None]
    if view.kind == "image":
        pixels = pixels[:1]
    states = model.vision_tower(pixels.to(model.dtype), output_hidden_states=True, return_dict=True).hidden_states
    layers = config.vision_feature_layer
    found = torch.cat([states[layer] for layer in ([layers] if isinstance(layers, int) else layers)], -1)
    tower = config.vision_config
    rows, columns = (size // tower.patch_size for size in pixels.shape[-2:])
    projected: Tensor = model.multi_modal_projector(found[:, -rows * columns :])
    return projected.reshape(len(projected), rows, columns, -1)


def checked_tiles(given: Any, count: int, tiles: int) -> list[list[int]]:
    """Masks of a caller: for each view the numbers of its tiles."""
    if not isinstance(given, list | tuple) or len(given) != count:
        raise ValueError(f"masked_tiles must be a list of {count} lists, one for each image and then each clip")
    for one in given:
        good = isinstance(one, list | tuple) and all(isinstance(tile, int) and 0 <= tile < tiles for tile in one)
        if not good:
            raise ValueError(f"masked_tiles has {one!r}: tiles of an image are whole numbers from 0 to {tiles - 1}")
    return [sorted(set(one)) for one in given]


def runs_of(ids: list[int], token: int) -> list[int]:
    """Where each stretch of `token` begins."""
    return [at for at, one in enumerate(ids) if one == token and (not at or ids[at - 1] != token)]
