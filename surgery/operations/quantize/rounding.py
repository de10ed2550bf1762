"""Rounding one matrix, by what a recipe says and calibration saw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from surgery.operations.quantize.moments import Moments
from surgery.operations.quantize.settings import QuantizeSettings
from surgery.quantization.gptq import gptq, relative_error
from surgery.quantization.grid import Rounded, encode, full_scales, searched_scales
from surgery.quantization.schemes import Grid

Scales = Literal["none", "mse", "activation"]


@dataclass(frozen=True)
class Recipe:
    """One way to round a model: a grid for every module (None leaves it), how scales shrink, whether biases mend."""

    grids: Mapping[str, Grid | None]
    scales: Scales
    biases: bool = False


@dataclass(frozen=True)
class Found:
    """A rounded matrix, how far its outputs are off (relative), and where it was not rounded as asked, why."""

    rounded: Rounded
    error: float
    fallback: str = ""


def round_matrix(
    weight: Tensor, moments: Moments, grid: Grid, recipe: Recipe, settings: QuantizeSettings, scale_dtype: torch.dtype
) -> Found:
    """Round a matrix [out, in] whose inputs have these moments."""
    seen = moments.count > 0
    if recipe.scales == "none" or (recipe.scales == "activation" and not seen):
        scale = full_scales(weight, grid, scale_dtype)
    else:
        importance = moments.squares / max(moments.count, 1) if recipe.scales == "activation" else None
        scale = searched_scales(weight, grid, scale_dtype, importance)
    rounded, fallback = None, ""
    if settings.method == "gptq" and moments.full is not None and seen:
        rounded = gptq(
            weight, moments.full, scale, grid, act_order=settings.act_order, damping=settings.damping
        )  # fmt: skip
        fallback = "" if rounded is not None else "its inputs have no invertible moments"
    elif settings.method == "gptq":
        fallback = "too few tokens reach it: rounded to the nearest"
    if rounded is None:
        rounded = Rounded(encode(weight, scale, grid), scale)
    error = relative_error(weight, rounded.decoded(), moments.known) if seen else 0.0
    return Found(rounded, error, fallback)
