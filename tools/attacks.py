"""Perturbed pictures that make a llava say what an attacker wants: projected gradient descent on pixels.

The method is that of Madry et al. (arXiv 1706.06083): steps along the sign of the gradient, held within a radius around
the picture. Averaging the gradient over random masks is expectation over transformations (arXiv 1707.07397).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from surgery.calibration.pictures import IGNORED, Batch

FIRST, LAST = 1 / 4, 1 / 32  # of the radius: the longest and the shortest step

Hidden = Callable[[Tensor], Tensor]  # pixels [B, 3, H, W] -> what is painted black before they are read [B, 1, H, W]


def perturbed(
    model: Any,
    wanted: Batch,
    pixels: Tensor,
    *,
    radius: float,
    steps: int,
    processor: Any,
    reach: Tensor | None = None,
    hidden: Hidden | None = None,
    draws: int = 1,
    seed: int = 0,
) -> Tensor:
    """Pictures [B, 3, H, W] of whole numbers from 0 to 255 near `pixels`, for which the model tends to say the labels.

    wanted   the prompts with the attacker's answers
    radius   the furthest that a value may move, in steps of 8 bits; 255 for no bound
    reach    which pixels may change [B, 1, H, W]; None for all
    hidden   the defence that the attacker reckons with, asked `draws` times a step
    """
    draw = torch.Generator().manual_seed(seed)
    reach = torch.ones_like(pixels, dtype=torch.bool) if reach is None else reach
    low, high = (pixels - radius).clamp(min=0), (pixels + radius).clamp(max=255)
    found = torch.where(reach, low + (high - low) * torch.rand(pixels.shape, generator=draw), pixels)
    for step in range(steps):
        found.requires_grad_()
        loss = torch.zeros(())
        for _ in range(draws):
            seen = found if hidden is None else torch.where(hidden(found.detach()), 0, found)
            loss = loss + label_loss(model, wanted, seen, processor)
        (gradient,) = torch.autograd.grad(loss, found)
        rate = radius * (FIRST + (LAST - FIRST) * step / steps)
        moved = torch.minimum(torch.maximum(found.detach() - rate * gradient.sign(), low), high)
        found = torch.where(reach, moved, pixels)
    return torch.minimum(torch.maximum(found.round(), low), high)


def label_loss(model: Any, wanted: Batch, pixels: Tensor, processor: Any) -> Tensor:
    """Summed loss of the labels of a batch, for pictures of values from 0 to 255."""
    of_images = processor.image_processor
    mean, std = (torch.tensor(value)[:, None, None] for value in (of_images.image_mean, of_images.image_std))
    inputs = wanted.inputs | {"pixel_values": (pixels * of_images.rescale_factor - mean) / std}
    states = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    told = wanted.labels[:, 1:] != IGNORED
    return cross_entropy(model.lm_head(states[told]), wanted.labels[:, 1:][told], reduction="sum")
