"""Images of noise, and image processors of tiny models that need no torchvision."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from PIL import Image

SIDE = 16
COLOURS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.5, 0.3]}


def image_processor(name: str, **settings: Any) -> Any:
    """One that needs no torchvision; releases before 5 have no other name for it."""
    kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    return kind(**COLOURS, **settings)


def picture(width: int = SIDE, height: int = SIDE) -> Image.Image:
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def apart(one: Image.Image, other: Image.Image) -> int:
    """The largest difference between two images."""
    first, second = (torch.tensor(list(image.convert("RGB").tobytes())) for image in (one, other))
    return int((first - second).abs().max())


def patcher() -> Any:
    """The image processor of the Qwen families, which shows an image as it is."""
    return image_processor("Qwen2VLImageProcessor", min_pixels=64, max_pixels=10**6, patch_size=4)


def cropper(family: str) -> Any:
    """The image processor of a family that shows an image whole, and in crops."""
    pinpoints = {"image_grid_pinpoints": [[16, 16], [16, 32], [32, 16]]}
    if family == "llava_next":
        return image_processor(
            "LlavaNextImageProcessor",
            size={"shortest_edge": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            **pinpoints,
        )
    return image_processor("LlavaOnevisionImageProcessor", size={"height": SIDE, "width": SIDE}, **pinpoints)
