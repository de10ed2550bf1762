"""Rounding weights to the values of a grid.

Symmetric, without zero points: a weight is code * scale. Scales are rounded to the type they are stored in before any
code is computed, so that a file decodes to exactly the values that were chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.quantization.schemes import FLOAT8_MAX, Grid

# The least number of float16, which small weights in eight bits come near to.
HALF_LEAST = 2.0**-24
# Shares of the largest magnitude that a search for scales tries; 1 cuts nothing off.
SHRINKS = tuple(1 - step / 20 for step in range(10))
# Numbers that are searched at once: few enough to stay in a processor's cache.
SEARCHED = 1 << 16


@dataclass(frozen=True)
class Rounded:
    """Codes [out, in] (int8, or float8_e4m3fn) and scales [out, groups] of a matrix."""

    codes: Tensor
    scale: Tensor

    def decoded(self) -> Tensor:
        """The weights that this stands for, in float32."""
        return decode(self.codes, self.scale)


def full_scales(weight: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Scales [out, groups] that cut nothing off, as numbers of `dtype`; 1 for groups that are all zero."""
    return _stored(_grouped(weight, grid).abs().amax(-1) / grid.reach, dtype)


def searched_scales(weight: Tensor, grid: Grid, dtype: torch.dtype, importance: Tensor | None = None) -> Tensor:
    """Scales that minimise the squared error of each group, among `SHRINKS` of the full ones.

    importance  what each input [in] counts: the mean of its squares (a diagonal Hessian); None counts all alike

    For eight bits full scales are given: where it was measured, cutting was not worth the time (docs/bench_quant.md).
    """
    if grid.bits > 4:
        return full_scales(weight, grid, dtype)
    rows = max(SEARCHED // weight.shape[1], 1)
    return torch.cat([_searched(part, grid, dtype, importance) for part in weight.split(rows)])


def _searched(weight: Tensor, grid: Grid, dtype: torch.dtype, importance: Tensor | None) -> Tensor:
    grouped, half = _grouped(weight, grid), 2 ** (grid.bits - 1)
    counts = None if importance is None else importance.float().view(1, -1, grouped.shape[-1])
    whole = grouped.abs().amax(-1) / grid.reach
    best, least = _stored(whole, dtype), torch.full_like(whole, torch.inf)
    error = torch.empty_like(grouped)
    for shrink in SHRINKS:
        scale = _stored(whole * shrink, dtype)
        wide = scale.float().unsqueeze(-1)
        torch.div(grouped, wide, out=error).round_().clamp_(-half, half - 1).mul_(wide).sub_(grouped).square_()
        loss = (error if counts is None else error.mul_(counts)).sum(-1)
        better = loss < least
        best, least = torch.where(better, scale, best), torch.where(better, loss, least)
    return best


def encode(weight: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """The nearest codes [out, in] of a matrix; halves go to the even neighbour."""
    grouped = _grouped(weight, grid)
    return _codes(grouped / scale.float().unsqueeze(-1), grid).view(weight.shape)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """The weights [out, in] in float32 that codes and scales stand for."""
    rows = codes.shape[0]
    wide = codes.float().view(rows, scale.shape[1], -1) * scale.float().unsqueeze(-1)
    return wide.view(codes.shape)


def _grouped(weight: Tensor, grid: Grid) -> Tensor:
    return weight.float().view(weight.shape[0], grid.groups(weight.shape[1]), -1)


def _codes(scaled: Tensor, grid: Grid) -> Tensor:
    if grid.kind == "float":
        return scaled.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)
    half = 2 ** (grid.bits - 1)
    return scaled.round_().clamp_(-half, half - 1).to(torch.int8)  # `scaled` was made for this


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale as it will be stored: never zero or infinite, whatever the type."""
    least = HALF_LEAST if dtype == torch.float16 else torch.finfo(torch.float32).tiny
    most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return torch.where(scale > 0, scale.clamp(least, most), 1.0).to(dtype)
