"""GPTQ (arXiv 2210.17323): rounding column after column, with what each rounding breaks mended by the columns to come.

Scales are fixed before the first column (static), so that columns may be rounded in the order of how much their inputs
matter while the file stays plain: every group is a run of neighbouring inputs. Inputs that calibration never saw keep
their weights, rounded to the nearest; the paper sets them to zero, which changes what other text would see.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from surgery.quantization.grid import Rounded
from surgery.quantization.schemes import Grid

BLOCK = 128
HARDEST_DAMPING = 1.0


def gptq(
    weight: Tensor, hessian: Tensor, scale: Tensor, grid: Grid, *, act_order: bool = True, damping: float = 0.01
) -> Rounded | None:
    """Round a matrix [out, in] for inputs whose second moments are `hessian` [in, in], of any scale.

    scale      [out, groups], see `surgery.quantization.grid`
    act_order  begin with the inputs of the largest second moment
    damping    share of the mean moment that is added to the diagonal; ten times as much after each failure, up to 1

    None where no damping makes the moments invertible.
    """
    matrix, moments = weight.float().clone(), hessian.float().clone()
    inputs = matrix.shape[1]
    diagonal = moments.diagonal()
    seen = diagonal[diagonal != 0]
    mean = seen.mean() if len(seen) else diagonal.new_ones(())
    diagonal[diagonal == 0] = mean  # of what calibration saw, so that their number changes nothing
    group = inputs // scale.shape[1]
    column_scale = scale.float().repeat_interleave(group, dim=1)
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(inputs)
    matrix, moments, column_scale = matrix[:, order], moments[order][:, order], column_scale[:, order]
    factor = _inverse_factor(moments, damping, mean)
    if factor is None:
        return None
    codes = torch.empty_like(matrix)
    half = 2 ** (grid.bits - 1)
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        errors = torch.empty(matrix.shape[0], stop - start, device=matrix.device)
        for column in range(start, stop):
            code = (matrix[:, column] / column_scale[:, column]).round().clamp(-half, half - 1)
            error = (matrix[:, column] - code * column_scale[:, column]) / factor[column, column]
            matrix[:, column + 1 : stop].addr_(error, factor[column, column + 1 : stop], alpha=-1)
            codes[:, column], errors[:, column - start] = code, error
        matrix[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    placed = torch.empty_like(codes, dtype=torch.int8)
    placed[:, order] = codes.to(torch.int8)
    return Rounded(placed, scale)


def _inverse_factor(moments: Tensor, damping: float, mean: Tensor) -> Tensor | None:
    """The upper Cholesky factor of the inverse of moments with `damping` times `mean` on their diagonal."""
    tries = [damping * 10**power for power in range(10) if damping * 10**power < HARDEST_DAMPING]
    for share in (*tries, HARDEST_DAMPING):
        damped = moments + share * mean * torch.eye(len(moments), device=moments.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and torch.isfinite(upper).all():
                return upper
    return None


def relative_error(weight: Tensor, rounded: Tensor, moments: Tensor) -> float:
    """|(W - Q) X| / |W X| for inputs with these second moments [in, in], or their diagonal [in]; inf where none is."""

    def energy(matrix: Tensor) -> float:
        seen = matrix * moments if moments.dim() == 1 else matrix @ moments
        return float((seen * matrix).sum(dtype=torch.float64))

    whole, missed = energy(weight.float()), energy(weight.float() - rounded.float())
    if not math.isfinite(whole + missed):
        return math.inf
    return (max(missed, 0.0) / whole) ** 0.5 if whole > 0 else 0.0
