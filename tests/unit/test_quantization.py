"""Rounding, GPTQ and file formats, against references written out here: numpy in float64, brute force, decoders by hand.

Also what calibration adds up for them: moments, the traffic of experts, and the order in which modules are called.
"""

from __future__ import annotations

import itertools
import math
import re
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as some
from torch import nn

from surgery.calibration.layers import LayerCall
from surgery.checkpoint.dtypes import BITS
from surgery.checkpoint.expressions import TensorSpec
from surgery.operations.quantize.experts import ENOUGH, SHARED, FusedExperts, Traffic, round_experts
from surgery.operations.quantize.moments import Moments
from surgery.operations.quantize.rounding import Recipe, round_matrix
from surgery.operations.quantize.settings import QuantizeSettings
from surgery.operations.quantize.targets import Linear
from surgery.operations.quantize.walk import Walked, _call_order, _round_layer
from surgery.quantization.compressed_tensors_format import COMPRESSED_TENSORS, patterns
from surgery.quantization.gptq import gptq, relative_error
from surgery.quantization.gptq_format import GPTQ
from surgery.quantization.grid import SHRINKS, Grid, Rounded, decode, encode, full_scales, searched_scales
from surgery.quantization.layout import Layout
from surgery.quantization.packing import words
from tests.quant_reference import decode_float8, decode_gptq, decode_int8, decode_packed

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
GRIDS = [Grid(bits, group) for bits in (4, 8) for group in (32, 64, 128, None)]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def named(value):
    """What a parameter is called, alike in every process."""
    return getattr(value, "name", None) or str(value)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def columns(scale, inputs):
    """A scale for every number, in float64."""
    return np.repeat(scale.double().numpy(), inputs // scale.shape[1], axis=1)


def nearest(weight, scale, bits):
    """The codes of least distance, all tried; halves go to the even one, as python's round does."""
    found = np.empty(weight.shape, dtype=int)
    for at, value in np.ndenumerate(weight.double().numpy() / columns(scale, weight.shape[1])):
        codes = range(-(2 ** (bits - 1)), 2 ** (bits - 1))
        least = min(abs(value - code) for code in codes)
        found[at] = min((c for c in codes if abs(value - c) == least), key=lambda c: c % 2)
    return found


# Scales and codes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", [Grid(4, 8), Grid(4, None), Grid(8, 16)], ids=named)
def test_codes_are_nearest_for_the_scale_that_is_stored(grid, dtype):
    weight = normal(6, 32) * torch.tensor([1e-3, 0.1, 1.0, 1.0, 30.0, 1.0])[:, None]
    scale = full_scales(weight, grid, DTYPES[dtype])
    assert scale.dtype == DTYPES[dtype]
    assert scale.shape == (6, grid.groups(32))
    codes = encode(weight, scale, grid)
    assert codes.dtype == torch.int8
    # The division in float32 is what decides near a half: there, neighbours are equally good.
    wanted, stored = nearest(weight, scale, grid.bits), columns(scale, 32)
    far = np.abs(weight.double().numpy() - codes.numpy() * stored), np.abs(weight.double().numpy() - wanted * stored)
    assert np.all(far[0] <= far[1] + 1e-6 * stored)
    assert np.mean(codes.numpy() != wanted) < 0.05
    assert torch.equal(decode(codes, scale), torch.from_numpy(codes.numpy() * stored).float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_map_the_largest_magnitude_to_the_end_of_the_codes(dtype):
    weight = normal(5, 64, seed=1)
    for grid in (Grid(4, 16), Grid(8, 64), Grid(8, None, "float")):
        reach = 448 if grid.kind == "float" else {4: 7.5, 8: 127.5}[grid.bits]
        peaks = np.abs(weight.double().numpy()).reshape(5, grid.groups(64), -1).max(-1)
        ulp = torch.finfo(DTYPES[dtype]).eps
        assert full_scales(weight, grid, DTYPES[dtype]).double().numpy() == pytest.approx(peaks / reach, rel=ulp)


def test_halves_go_to_the_even_code_by_hand():
    weight = torch.tensor([[7.5, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 6.5], [-7.5, 3.5, -3.5, 4.5, 5.5, -5.5, -6.5, 0.0]])
    grid = Grid(4, 8)
    assert full_scales(weight, grid, torch.float32).tolist() == [[1.0], [1.0]]
    codes = encode(weight, torch.ones(2, 1), grid).tolist()
    assert codes == [[7, 0, 2, 2, 0, -2, -2, 6], [-8, 4, -4, 4, 6, -6, -6, 0]]


@pytest.mark.parametrize("grid", [Grid(4, 8), Grid(8, None), Grid(8, None, "float")], ids=named)
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_zeros_have_scale_one_and_stay_zeros(grid, dtype):
    weight = normal(4, 16)
    weight[1] = 0
    weight[2, 8:] = 0
    for scales in (full_scales, searched_scales):
        scale = scales(weight, grid, DTYPES[dtype])
        empty = weight.view(4, grid.groups(16), -1).abs().amax(-1) == 0
        assert torch.equal(scale[empty], torch.ones_like(scale[empty]))
        assert not decode(encode(weight, scale, grid), scale)[weight == 0].any()


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-30, 1e-12, 1e-6, 1e4, 1e6, 1e30, 3e38])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_scale_is_zero_or_infinite(size, dtype):
    weight = normal(4, 32).clamp(-1, 1) * size
    for grid, scales in itertools.product((Grid(4, 8), Grid(8, None), Grid(8, None, "float")), (full_scales, searched_scales)):
        scale = scales(weight, grid, DTYPES[dtype])
        assert torch.isfinite(scale).all()
        assert (scale > 0).all()
        codes = encode(weight, scale, grid)
        assert torch.isfinite(codes.float()).all()
        assert (decode(codes, scale) * weight >= 0).all()  # no sign is lost


def test_weights_in_float64_have_scales_in_float64():
    assert full_scales(normal(2, 32).double(), Grid(4, 32), torch.float64).dtype == torch.float64


def test_small_weights_keep_eight_bits_with_scales_in_float16():
    weight, grid = normal(8, 64) * 1e-3, Grid(8, 32)
    errors = {}
    for dtype, of in DTYPES.items():
        scale = full_scales(weight, grid, of)
        errors[dtype] = float((weight - decode(encode(weight, scale, grid), scale)).norm() / weight.norm())
    assert errors["F16"] < 1.2 * errors["F32"]


def test_a_matrix_that_lies_transposed_in_memory_is_rounded_alike():
    weight = normal(64, 16).t()
    for grid in (Grid(4, 32), Grid(8, None)):
        scales = [full_scales(of, grid, torch.float32) for of in (weight, weight.contiguous())]
        codes = [encode(weight, scales[0], grid), encode(weight.contiguous(), scales[1], grid)]
        assert torch.equal(*scales)
        assert torch.equal(*codes)
        assert torch.equal(decode(codes[0], scales[0]), decode(codes[1], scales[1]))


def float8_values():
    """Every finite number of E4M3 by hand: a sign, four bits of exponent (bias 7), three of mantissa."""
    magnitudes = [m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:-1]
    return np.array(magnitudes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_codes_are_nearest(dtype):
    weight, grid, values = normal(8, 48), Grid(8, None, "float"), float8_values()
    scale = full_scales(weight, grid, DTYPES[dtype])
    codes = encode(weight, scale, grid)
    assert codes.dtype == torch.float8_e4m3fn
    scaled = weight.double().numpy() / columns(scale, 48)
    best = np.abs(np.abs(scaled)[..., None] - values).min(-1)
    assert np.abs(codes.double().numpy() - scaled) == pytest.approx(best, abs=1e-4)
    assert {float(v) for v in codes.float().abs().flatten()} <= {*values.tolist()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", [Grid(4, 16), Grid(4, None)], ids=named)
@pytest.mark.parametrize("weighted", [False, True])
def test_searched_scales_are_the_best_that_were_tried(grid, dtype, weighted):
    generator = torch.Generator().manual_seed(4)
    weight = normal(4, 32, seed=4) ** 3  # heavy tails
    importance = torch.rand(32, generator=generator) ** 4 if weighted else None
    if weighted:
        importance[3] = 0.0
    counts = np.ones(32) if importance is None else importance.double().numpy()
    found, full = (
        scales(weight, grid, DTYPES[dtype], *more)
        for scales, more in ((searched_scales, (importance,)), (full_scales, ()))
    )
    size, whole = 32 // grid.groups(32), weight.double().numpy()

    def loss(row, group, scale):
        """The weighted error of one group in float64, with codes as they would be."""
        at = slice(group * size, (group + 1) * size)
        codes = encode(weight[row : row + 1, at], torch.tensor([[scale]]), Grid(grid.bits, None, grid.kind)).double().numpy()[0]
        return float((counts[at] * (whole[row, at] - codes * scale) ** 2).sum())

    shrunk = False
    for row, group in np.ndindex(4, grid.groups(32)):
        peak = weight[row].view(-1, size)[group].abs().max() / grid.reach
        tried = [float((peak * shrink).to(DTYPES[dtype])) for shrink in SHRINKS]
        chosen, losses = float(found[row, group]), [loss(row, group, scale) for scale in tried]
        assert chosen in tried
        assert loss(row, group, chosen) <= min(losses) * (1 + 1e-4)
        assert loss(row, group, chosen) <= loss(row, group, float(full[row, group])) * (1 + 1e-6)
        shrunk |= chosen < float(full[row, group])
    assert shrunk
    assert list(SHRINKS) == pytest.approx([1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55])
    assert SHRINKS[0] == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", [Grid(8, 16), Grid(8, None), Grid(8, None, "float")], ids=named)
@pytest.mark.parametrize("weighted", [False, True])
def test_eight_bits_keep_full_scales(grid, dtype, weighted):
    weight = normal(4, 32, seed=4) ** 3
    importance = normal(32, seed=5).square() if weighted else None
    found = searched_scales(weight, grid, DTYPES[dtype], importance)
    assert found.dtype == DTYPES[dtype]
    assert torch.equal(found, full_scales(weight, grid, DTYPES[dtype]))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("searched", [1, 32, 100, 5 * 32, 1 << 16])
def test_scales_searched_some_rows_at_a_time_are_the_same(searched, weighted, monkeypatch):
    weight, importance = normal(7, 32, seed=4) ** 3, normal(32, seed=5).square() if weighted else None
    whole = torch.cat([searched_scales(row[None], Grid(4, 8), torch.float16, importance) for row in weight])
    monkeypatch.setattr("surgery.quantization.grid.SEARCHED", searched)
    assert torch.equal(searched_scales(weight, Grid(4, 8), torch.float16, importance), whole)


def test_importance_decides_what_is_cut():
    """An outlier that no input ever reaches may be cut; one that inputs reach may not."""
    weight = torch.full((1, 16), 0.12)
    weight[0, 5] = 1.0
    alone, others = torch.zeros(16), torch.ones(16)
    alone[5], others[5] = 1.0, 0.0
    grid = Grid(4, None)
    scales = {name: float(searched_scales(weight, grid, torch.float32, of)) for name, of in (("alone", alone), ("others", others))}
    errors = {name: (weight - decode(encode(weight, torch.tensor([[scale]]), grid), torch.tensor([[scale]]))).abs()[0] for name, scale in scales.items()}
    assert errors["alone"][5] < errors["others"][5]
    assert errors["others"][0] < errors["alone"][0]
    unseen = searched_scales(weight, grid, torch.float32, torch.zeros(16))
    assert torch.equal(unseen, full_scales(weight, grid, torch.float32))


@settings(max_examples=150, deadline=None)
@given(
    some.integers(0, 10_000), some.sampled_from([(4, 8), (4, 16), (4, None), (8, 8), (8, None)]), some.sampled_from([*DTYPES]),
    some.floats(-12, 4), some.floats(0.2, 6), some.sampled_from(["full", "mse"]),
)  # fmt: skip
def test_no_weight_is_off_by_more_than_half_a_step_unless_cut(seed, grid, dtype, exponent, spread, how):
    grid = Grid(*grid)
    weight = torch.sign(normal(4, 32, seed=seed)) * normal(4, 32, seed=seed + 1).abs() ** spread * 10**exponent
    scale = {"full": full_scales, "mse": searched_scales}[how](weight, grid, DTYPES[dtype])
    found = decode(encode(weight, scale, grid), scale).double().numpy()
    exact, wide, half = weight.double().numpy(), columns(scale, 32), 2 ** (grid.bits - 1)
    cut = np.maximum(exact - (half - 1) * wide, -half * wide - exact)  # how far beyond the outermost codes
    assert np.all(np.abs(exact - found) <= np.maximum(wide / 2, cut) + 3e-5 * wide)  # float32 holds 127.5 to 4e-6


@pytest.mark.parametrize("group", [16, 64, None])
@pytest.mark.parametrize("scales", [full_scales, searched_scales])
def test_more_bits_are_better(group, scales):
    weight = normal(16, 64, seed=3)
    errors = []
    for bits in range(2, 9):
        grid = Grid(bits, group)
        scale = scales(weight, grid, torch.bfloat16)
        errors.append(float((weight - decode(encode(weight, scale, grid), scale)).square().mean()))
    assert all(more < 0.5 * fewer for fewer, more in itertools.pairwise(errors)), errors


@settings(max_examples=60, deadline=None)
@given(some.integers(0, 1000), some.sampled_from([Grid(4, 16), Grid(4, None), Grid(8, 32), Grid(8, None, "float")]), some.integers(1, 3))
def test_columns_of_zeros_leave_the_rest_as_it_was(seed, grid, groups):
    weight, extra = normal(5, 64, seed=seed), groups * (grid.group_size or 7)
    padded = torch.cat([weight, torch.zeros(5, extra)], dim=1)
    for scales in (full_scales, searched_scales):
        alone, wide = scales(weight, grid, torch.float16), scales(padded, grid, torch.float16)
        assert torch.equal(wide[:, : alone.shape[1]], alone)
        codes = encode(padded, wide, grid).float()
        assert torch.equal(codes[:, :64], encode(weight, alone, grid).float())
        assert not codes[:, 64:].any()


@settings(max_examples=60, deadline=None)
@given(some.integers(0, 1000), some.sampled_from([Grid(4, 16), Grid(8, None), Grid(8, None, "float")]), some.integers(-6, 10), some.booleans())
def test_powers_of_two_move_the_scale_alone(seed, grid, power, searched):
    weight, scales = normal(4, 32, seed=seed), searched_scales if searched else full_scales
    for dtype in DTYPES.values():
        one, other = scales(weight, grid, dtype), scales(weight * 2.0**power, grid, dtype)
        if dtype == torch.float16 and min(float(one.min()), float(other.min())) < 2.0**-14:
            continue
        assert torch.equal(one.float() * 2.0**power, other.float())
        assert torch.equal(encode(weight, one, grid).float(), encode(weight * 2.0**power, other, grid).float())


@pytest.mark.parametrize(("grid", "shape", "dtype", "wanted"), [
    (Grid(4, 128), (256, 256), "BF16", 256 * 128 + 256 * 2 * 2), (Grid(4, None), (3, 24), "F32", 36 + 12),
    (Grid(8, None), (5, 7), "F16", 35 + 10), (Grid(8, None, "float"), (5, 7), "F16", 35 + 10),
])  # fmt: skip
def test_bytes_by_hand(grid, shape, dtype, wanted):
    assert grid.nbytes(*shape, BITS[dtype] // 8) == wanted


# GPTQ

# Relative error of outputs, from the specification: rounding to the nearest, static scales, and these with act-order.
# Which channel scales it drew is not said: sigma of the log-normal is what gives its figures with this seed.
TABLE = {
    0.0: (1.0, 0.0945, 0.0931, 0.0918),
    0.5: (1.0, 0.0944, 0.0814, 0.0739),
    0.9: (1.0, 0.0949, 0.0468, 0.0361),
    0.98: (0.5, 0.0937, 0.0199, 0.0159),
}


@cache
def correlated(rho, sigma, seed=0, width=256, samples=4096):
    """A matrix, and inputs whose neighbours correlate by `rho`, with log-normal sizes of channels."""
    chance = np.random.default_rng(seed)
    weight, noise = chance.standard_normal((width, width)), chance.standard_normal((samples, width))
    rows = noise.copy()
    for channel in range(1, width):
        rows[:, channel] = rho * rows[:, channel - 1] + math.sqrt(1 - rho**2) * noise[:, channel]
    return torch.from_numpy(weight).float(), torch.from_numpy(rows * np.exp(sigma * chance.standard_normal(width)))


def output_error(weight, decoded, rows):
    """|X (W - Q)^T| / |X W^T| in float64, from the inputs themselves."""
    return float((rows @ (weight - decoded).double().t()).norm() / (rows @ weight.double().t()).norm())


@pytest.mark.parametrize("rho", TABLE)
def test_the_table_of_the_specification(rho):
    sigma, *wanted = TABLE[rho]
    weight, rows = correlated(rho, sigma)
    grid, moments = Grid(4, 32), (rows.t() @ rows).float()
    scale = full_scales(weight, grid, torch.float32)
    plain, *ours = (Rounded(encode(weight, scale, grid), scale), *(gptq(weight, moments, scale, grid, act_order=order) for order in (False, True)))
    errors = [output_error(weight, rounded.decoded(), rows) for rounded in (plain, *ours)]
    assert errors == pytest.approx(wanted, rel=0.05)
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] / errors[0] < {0.0: 1, 0.5: 0.9, 0.9: 0.55, 0.98: 0.3}[rho]
    assert errors[2] / errors[0] < {0.0: 1, 0.5: 0.8, 0.9: 0.45, 0.98: 0.25}[rho]
    for rounded, error in zip((plain, *ours), errors, strict=True):
        assert relative_error(weight, rounded.decoded(), moments) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(8, None), Grid(4, None)], ids=named)
def test_independent_inputs_give_the_nearest(grid, act_order):
    weight, moments = normal(24, 320), torch.eye(320) * 5.0  # 320: three blocks, the last not full
    scale = full_scales(weight, grid, torch.bfloat16)
    found = gptq(weight, moments, scale, grid, act_order=act_order)
    assert torch.equal(found.codes, encode(weight, scale, grid))
    assert found.scale is scale
    sizes = torch.diag(torch.linspace(0.1, 9, 320))  # any diagonal
    assert torch.equal(gptq(weight, sizes, scale, grid, act_order=act_order).codes, encode(weight, scale, grid))


def small_case(seed=0, outputs=12, inputs=24, samples=60, group=8):
    """A small matrix with inputs that depend on each other; scales that leave no weight on a half."""
    chance = torch.Generator().manual_seed(seed)
    weight, mix = (torch.randn(shape, generator=chance) for shape in ((outputs, inputs), (inputs, inputs)))
    rows = torch.randn(samples, inputs, generator=chance) @ (mix + 2 * torch.eye(inputs)) * 0.3
    grid = Grid(4, group)
    return weight, rows.double(), full_scales(weight, grid, torch.float32) * 1.0371, grid


def inverse(matrix):
    """Gauss and Jordan with pivots, in float64."""
    size = len(matrix)
    both = np.concatenate([matrix.astype(float), np.eye(size)], axis=1)
    for column in range(size):
        pivot = column + int(np.abs(both[column:, column]).argmax())
        both[[column, pivot]] = both[[pivot, column]]
        both[column] /= both[column, column]
        for row in range(size):
            if row != column:
                both[row] -= both[row, column] * both[column]
    return both[:, size:]


def optimal_brain_surgeon(weight, moments, scale, bits, order, damping):
    """Round column after column; after each, the others move by the inverse of what is left, computed anew."""
    left, matrix, wide = list(order), weight.double().numpy().copy(), columns(scale, weight.shape[1])
    damped = moments.double().numpy() + damping * np.diag(moments.double().numpy()).mean() * np.eye(len(moments))
    codes = np.zeros(matrix.shape, dtype=int)
    while left:
        column, inverted = left[0], inverse(damped[np.ix_(left, left)])
        codes[:, column] = np.clip(np.round(matrix[:, column] / wide[:, column]), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        off = matrix[:, column] - codes[:, column] * wide[:, column]
        matrix[:, left] -= np.outer(off / inverted[0, 0], inverted[0])
        left = left[1:]
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("damping", [0.01, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_gptq_is_the_optimal_brain_surgeon(seed, damping, act_order):
    weight, rows, scale, grid = small_case(seed)
    moments = rows.t() @ rows
    order = sorted(range(24), key=lambda column: -float(moments[column, column])) if act_order else range(24)
    found = gptq(weight, moments, scale, grid, act_order=act_order, damping=damping)
    wanted = optimal_brain_surgeon(weight, moments, scale, 4, order, damping)
    assert found.codes.tolist() == wanted.tolist()
    assert found.codes.tolist() != encode(weight, scale, grid).tolist()


def test_blocks_do_not_change_what_comes_out(monkeypatch):
    weight, rows, scale, grid = small_case(5, outputs=8, inputs=64, samples=200)
    moments = rows.t() @ rows
    whole = gptq(weight, moments, scale, grid).codes
    monkeypatch.setattr("surgery.quantization.gptq.BLOCK", 10)
    assert torch.equal(gptq(weight, moments, scale, grid).codes, whole)


@pytest.mark.parametrize("act_order", [False, True])
def test_the_size_of_inputs_does_not_matter(act_order):
    weight, rows, scale, grid = small_case(1)
    moments, given = rows.t() @ rows, weight.clone()
    found = gptq(weight, moments, scale, grid, act_order=act_order).codes
    for factor in (2.0**-30, 2.0**40, 3.7, 1e-7, 1e9):
        before = moments * factor
        assert torch.equal(gptq(weight, before, scale, grid, act_order=act_order).codes, found), factor
        assert torch.equal(before, moments * factor)  # nothing given is changed
    assert torch.equal(weight, given)


@pytest.mark.parametrize("seed", range(3))
def test_inputs_may_change_places_inside_groups_that_move_as_one(seed):
    weight, rows, scale, grid = small_case(seed)
    chance = torch.Generator().manual_seed(seed)
    groups = torch.randperm(3, generator=chance)
    at = torch.cat([group * 8 + torch.randperm(8, generator=chance) for group in groups])
    moments = rows.t() @ rows
    found = gptq(weight, moments, scale, grid).codes
    moved = gptq(weight[:, at], moments[at][:, at], scale[:, groups], grid).codes
    assert torch.equal(moved, found[:, at])


@pytest.mark.parametrize("act_order", [False, True])
def test_inputs_never_seen_keep_their_weights(act_order):
    weight, rows, scale, grid = small_case(2)
    dead = [0, 7, 15, 23]
    rows[:, dead] = 0
    moments = (rows.t() @ rows).float()
    found = gptq(weight, moments, scale, grid, act_order=act_order).codes
    assert torch.equal(moments, (rows.t() @ rows).float())  # what was given is as it was
    assert torch.equal(found[:, dead], encode(weight, scale, grid)[:, dead])
    assert found[:, dead].any()


@pytest.mark.parametrize("case", ["small inputs", "more unseen inputs"])
def test_inputs_never_seen_do_not_change_the_rest(case):
    weight, rows, scale, grid = small_case(2)
    rows[:, 16:] = 0
    moments = rows.t() @ rows
    if case == "small inputs":
        found, wanted = gptq(weight, moments * 2.0**-30, scale, grid), gptq(weight, moments, scale, grid)
    else:
        small = moments[:16, :16] * 2.0**-20
        wanted = gptq(weight[:, :16], small, scale[:, :2], grid)
        found = gptq(weight, moments * 2.0**-20, scale, grid)
    assert torch.equal(found.codes[:, :16], wanted.codes[:, :16])


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_inputs_never_seen_count_as_the_mean_of_those_seen(size, act_order):
    weight, rows, scale, grid = small_case(4)
    dead = [1, 2, 9, 20]
    rows[:, dead] = 0
    moments = rows.t() @ rows * size
    filled = moments.clone()
    filled[dead, dead] = moments.diagonal()[moments.diagonal() != 0].mean()
    order = sorted(range(24), key=lambda column: -float(filled[column, column])) if act_order else range(24)
    found = gptq(weight, moments, scale, grid, act_order=act_order, damping=0.3)
    assert found.codes.tolist() == optimal_brain_surgeon(weight, filled, scale, 4, order, 0.3).tolist()
    assert torch.equal(found.codes, gptq(weight, filled, scale, grid, act_order=act_order, damping=0.3).codes)


def test_without_any_input_seen_all_weights_are_rounded_to_the_nearest():
    weight, _, scale, grid = small_case(4)
    assert torch.equal(gptq(weight, torch.zeros(24, 24), scale, grid).codes, encode(weight, scale, grid))


def test_fewer_samples_than_inputs_are_enough():
    weight, rows, scale, grid = small_case(3, samples=6)
    found = gptq(weight, rows.t() @ rows, scale, grid)
    plain = Rounded(encode(weight, scale, grid), scale)
    assert output_error(weight, found.decoded(), rows) < 0.5 * output_error(weight, plain.decoded(), rows)


def moments_with(negative):
    """Moments of mean 1 that no sum of squares has: one direction has the size -`negative`."""
    basis = torch.linalg.qr(normal(24, 24, seed=9).double())[0]
    sizes = torch.full((24,), (24 + negative) / 23, dtype=torch.float64)
    sizes[3] = -negative
    return (basis * sizes) @ basis.t()


@pytest.mark.parametrize(("negative", "damping", "helps"), [
    (0.05, 0.01, 0.1), (0.05, 0.0001, 0.1), (0.5, 0.01, 1.0), (0.5, 0.001, 1.0), (0.05, 0.03, 0.3), (0.5, 0.03, 1.0), (0.5, 0.7, 0.7),
    (0.8, 0.7, 1.0), (0.5, 1.0, 1.0), (2.0, 0.01, None), (2.0, 0.7, None), (2.0, 1.0, None),
])  # fmt: skip
def test_damping_is_raised_until_the_moments_can_be_inverted(negative, damping, helps):
    """By ten while it is below 1, and then to 1."""
    weight, _, scale, grid = small_case(4)
    moments = moments_with(negative)
    found = gptq(weight, moments, scale, grid, damping=damping)
    if helps is None:
        assert found is None
        return
    assert torch.equal(found.codes, gptq(weight, moments, scale, grid, damping=helps).codes)
    order = sorted(range(24), key=lambda column: -float(moments[column, column]))
    assert found.codes.tolist() == optimal_brain_surgeon(weight, moments, scale, 4, order, helps).tolist()


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(3, 3), (2, 5)])
def test_moments_that_are_no_numbers_are_nothing_to_go_by(broken, place):
    weight, rows, scale, grid = small_case(4)
    moments = rows.t() @ rows
    moments[place] = moments[place[::-1]] = broken
    assert gptq(weight, moments, scale, grid) is None
    seen = Moments(moments.float(), moments.diagonal().float().clone(), torch.zeros(24), count=60)
    made = round_matrix(weight, seen, grid, Recipe({}, "none"), QuantizeSettings(method="gptq", group_size=8), torch.float32)
    assert made.fallback == "its inputs have no invertible moments"
    assert made.error == math.inf
    plain = full_scales(weight, grid, torch.float32)
    assert torch.equal(made.rounded.codes, encode(weight, plain, grid))


def test_relative_error_is_that_of_outputs():
    weight, rows, scale, grid = small_case(6)
    decoded = decode(encode(weight, scale, grid), scale)
    moments = rows.t() @ rows
    assert relative_error(weight, decoded, moments.float()) == pytest.approx(output_error(weight, decoded, rows), rel=1e-4)
    # With the diagonal alone, as if inputs were independent.
    off, sizes = (weight - decoded).double(), moments.diagonal()
    wanted = float((off.square() * sizes).sum() / (weight.double().square() * sizes).sum()) ** 0.5
    assert relative_error(weight, decoded, sizes.float()) == pytest.approx(wanted, rel=1e-4)
    assert relative_error(weight, weight, moments.float()) == 0
    assert relative_error(torch.zeros(3, 24), torch.zeros(3, 24), moments.float()) == 0
    assert relative_error(weight, decoded, torch.zeros(24)) == 0


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_an_error_that_is_no_number_is_the_worst(broken):
    weight, rows, scale, grid = small_case(6)
    decoded, moments = decode(encode(weight, scale, grid), scale), (rows.t() @ rows).float()
    moments[3, 3] = broken
    assert relative_error(weight, decoded, moments) == math.inf
    assert relative_error(weight, decoded, moments.diagonal()) == math.inf


# Moments, and rounding one matrix


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_are_sums_over_rows(full, dtype):
    batches = [(normal(*shape, 6, seed=seed) + 0.5).to(dtype) for seed, shape in enumerate([(3, 5), (7,), (1, 1, 4), (0,)])]
    moments = Moments.empty(6, CPU, full=full)
    assert moments.mean.tolist() == [0.0] * 6
    for batch in batches:
        moments.see(batch)
    rows = torch.cat([batch.reshape(-1, 6) for batch in batches]).double().numpy()
    assert moments.count == len(rows) == 26
    assert moments.sums.numpy() == pytest.approx(rows.sum(0), rel=1e-5, abs=1e-4)
    assert moments.squares.numpy() == pytest.approx((rows**2).sum(0), rel=1e-5)
    assert moments.mean.numpy() == pytest.approx(rows.mean(0), rel=1e-5, abs=1e-5)
    assert (moments.full is not None) == full
    assert moments.known.numpy() == pytest.approx(rows.T @ rows if full else (rows**2).sum(0), rel=1e-5, abs=1e-4)


def seen_by(rows, *, full):
    moments = Moments.empty(rows.shape[1], CPU, full=full)
    moments.see(rows.float())
    return moments


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("scales", ["none", "mse", "activation"])
def test_a_matrix_is_rounded_by_its_recipe(method, scales):
    weight, rows, _, grid = small_case(7)
    weight = weight**3
    chosen = QuantizeSettings(method=method, group_size=8, scales=scales, damping=0.05, act_order=False)
    made = round_matrix(weight, seen_by(rows, full=method == "gptq"), grid, Recipe({}, scales), chosen, torch.bfloat16)
    importance = rows.square().mean(0)
    scale = {
        "none": lambda: full_scales(weight, grid, torch.bfloat16),
        "mse": lambda: searched_scales(weight, grid, torch.bfloat16),
        "activation": lambda: searched_scales(weight, grid, torch.bfloat16, importance),
    }[scales]()
    wanted = Rounded(encode(weight, scale, grid), scale)
    if method == "gptq":
        wanted = gptq(weight, (rows.t() @ rows).float(), scale, grid, damping=0.05, act_order=False)
    assert made.fallback == ""
    assert torch.equal(made.rounded.scale, scale)
    assert (made.rounded.codes != wanted.codes).float().mean() < 0.02  # sums of float32 may differ in the last bit
    assert made.error > 0
    if method == "gptq":
        assert made.error == pytest.approx(output_error(weight, made.rounded.decoded(), rows), rel=1e-3)


TOO_FEW = "too few tokens reach it: rounded to the nearest"


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("scales", ["none", "mse", "activation"])
def test_a_matrix_without_inputs_is_rounded_to_the_nearest(scales, full):
    weight, _, _, grid = small_case(7)
    chosen = QuantizeSettings(method="gptq", group_size=8, scales=scales)
    made = round_matrix(weight, Moments.empty(24, CPU, full=full), grid, Recipe({}, scales), chosen, torch.float32)
    scale = (searched_scales if scales == "mse" else full_scales)(weight, grid, torch.float32)
    assert made.fallback == TOO_FEW
    assert made.error == 0
    assert torch.equal(made.rounded.codes, encode(weight, scale, grid))
    assert torch.equal(made.rounded.scale, scale)


@pytest.mark.parametrize("scales", ["none", "mse", "activation"])
def test_a_matrix_with_too_few_inputs_is_rounded_to_the_nearest(scales):
    """Its moments have no full matrix; what it has of them decides scales and tells the error."""
    weight, rows, _, grid = small_case(7, samples=5)
    weight = weight**3
    chosen = QuantizeSettings(method="gptq", group_size=8, scales=scales)
    made = round_matrix(weight, seen_by(rows, full=False), grid, Recipe({}, scales), chosen, torch.float32)
    sizes = rows.square().mean(0)
    scale = {
        "none": lambda: full_scales(weight, grid, torch.float32),
        "mse": lambda: searched_scales(weight, grid, torch.float32),
        "activation": lambda: searched_scales(weight, grid, torch.float32, sizes),
    }[scales]()
    assert made.fallback == TOO_FEW
    assert torch.equal(made.rounded.scale, scale)
    assert torch.equal(made.rounded.codes, encode(weight, scale, grid))
    off = (weight - made.rounded.decoded()).double()
    wanted = float((off.square() * sizes).sum() / (weight.double().square() * sizes).sum()) ** 0.5
    assert made.error == pytest.approx(wanted, rel=1e-4)


# File formats


def random_rounded(grid, shape, dtype, seed=0):
    """Codes over their whole range, and scales without a pattern."""
    chance = torch.Generator().manual_seed(seed)
    half = 2 ** (grid.bits - 1)
    codes = torch.randint(-half, half, shape, generator=chance, dtype=torch.int8)
    if grid.kind == "float":
        codes = (torch.randn(shape, generator=chance) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = (torch.rand(shape[0], grid.groups(shape[1]), generator=chance) + 0.01).to(dtype)
    return Rounded(codes, scale)


def unpacked(form, packed, grid, version="gptq"):
    """What packed tensors stand for, by the decoders of quant_reference."""
    if form is GPTQ:
        words = (packed[name].numpy() for name in ("qweight", "qzeros"))
        return decode_gptq(*words, packed["scales"].float().numpy(), packed["g_idx"].numpy(), grid.bits, version)
    scale = packed["weight_scale"].float().numpy()
    if "weight_packed" in packed:
        return decode_packed(packed["weight_packed"].numpy(), scale, packed["weight_shape"].numpy(), grid.bits)
    if grid.kind == "float":
        return decode_float8(packed["weight"], scale)
    return decode_int8(packed["weight"].numpy(), scale)


def check_packing(form, rounded, grid, dtype, *, activations=False):
    packed = form.pack(rounded, grid, activations)
    assert np.array_equal(unpacked(form, packed, grid), rounded.decoded().numpy())
    specs = form.specs("a.b", TensorSpec(dtype, tuple(rounded.codes.shape)), grid, activations)
    names = {"I32": torch.int32, "I64": torch.int64, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn} | DTYPES
    assert {name: (names[spec.dtype], spec.shape) for name, spec in specs.items()} == {
        f"a.b.{name}": (tensor.dtype, tuple(tensor.shape)) for name, tensor in packed.items()
    }
    assert all(tensor.is_contiguous() for tensor in packed.values())
    return packed


@pytest.mark.parametrize("grid", GRIDS, ids=named)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_integers_decode_to_the_same_numbers(grid, dtype):
    rounded = random_rounded(grid, (40, 256), DTYPES[dtype])
    assert COMPRESSED_TENSORS.scale_dtype(dtype) == dtype
    packed = check_packing(COMPRESSED_TENSORS, rounded, grid, dtype)
    assert packed["weight_shape"].tolist() == [40, 256]


@pytest.mark.parametrize("grid", GRIDS, ids=named)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gptq_files_decode_to_the_same_numbers(grid, dtype):
    assert GPTQ.scale_dtype(dtype) == "F16"
    packed = check_packing(GPTQ, random_rounded(grid, (40, 256), torch.float16), grid, dtype)
    assert packed["g_idx"].tolist() == [column // (grid.group_size or 256) for column in range(256)]
    assert {f"{word & 0xFFFFFFFF:08x}" for word in packed["qzeros"].flatten().tolist()} == {{4: "77777777", 8: "7f7f7f7f"}[grid.bits]}


@pytest.mark.parametrize(("kind", "activations"), [("int", True), ("float", False), ("float", True)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 256), (5, 7), (1, 1)], ids=named)
def test_whole_bytes_decode_to_the_same_numbers(kind, activations, dtype, shape):
    grid = Grid(8, None, kind)
    rounded = random_rounded(grid, shape, DTYPES[dtype])
    packed = check_packing(COMPRESSED_TENSORS, rounded, grid, dtype, activations=activations)
    assert set(packed) == {"weight", "weight_scale"}


@pytest.mark.parametrize(("form", "grid", "shape"), [
    (COMPRESSED_TENSORS, Grid(4, None), (1, 8)), (COMPRESSED_TENSORS, Grid(4, None), (7, 24)), (COMPRESSED_TENSORS, Grid(8, None), (3, 20)),
    (COMPRESSED_TENSORS, Grid(4, 12), (3, 24)), (COMPRESSED_TENSORS, Grid(8, 10), (3, 20)), (GPTQ, Grid(4, None), (8, 24)), (GPTQ, Grid(8, 10), (4, 20)),
], ids=named)  # fmt: skip
def test_odd_sizes_decode_to_the_same_numbers(form, grid, shape):
    check_packing(form, random_rounded(grid, shape, torch.float16), grid, "F16")


@pytest.mark.parametrize(("form", "grid", "activations"), [
    *((form, grid, False) for form in (COMPRESSED_TENSORS, GPTQ) for grid in GRIDS),
    *((COMPRESSED_TENSORS, Grid(8, None, kind), True) for kind in ("int", "float")),
], ids=named)  # fmt: skip
@pytest.mark.parametrize("cuts", [[96], [32, 96], [32, 64, 96]], ids=named)
def test_rows_packed_apart_and_joined_are_the_whole(form, grid, activations, cuts):
    rounded = random_rounded(grid, (96, 256), torch.float16)
    parts = [
        form.pack(Rounded(rounded.codes[start:stop], rounded.scale[start:stop]), grid, activations)
        for start, stop in itertools.pairwise([0, *cuts])
    ]
    joined, whole = form.join(parts), form.pack(rounded, grid, activations)
    assert set(joined) == set(whole)
    for name, tensor in whole.items():
        assert joined[name].dtype == tensor.dtype
        assert torch.equal(joined[name].view(torch.uint8), tensor.view(torch.uint8)), name


def with_zeros_moved(packed, bits, by):
    """Every number of every word of `qzeros` moved by `by`, as from one version of the format to the other."""
    words = packed["qzeros"].to(torch.int64) & 0xFFFFFFFF
    fields = [(words >> shift & 2**bits - 1) + by for shift in range(0, 32, bits)]
    assert all(((field >= 0) & (field < 2**bits)).all() for field in fields)
    moved = sum(field << shift for field, shift in zip(fields, range(0, 32, bits), strict=True))
    return packed | {"qzeros": torch.where(moved >= 2**31, moved - 2**32, moved).to(torch.int32)}


@pytest.mark.parametrize("bits", [4, 8])
def test_both_versions_of_gptq_zeros(bits):
    weight, grid = normal(32, 64), Grid(bits, 32)
    scale = full_scales(weight, grid, torch.float16)
    rounded = Rounded(encode(weight, scale, grid), scale)
    first = GPTQ.pack(rounded, grid, False)
    second = with_zeros_moved(first, bits, 1)
    assert {f"{word & 0xFFFFFFFF:08x}" for word in second["qzeros"].flatten().tolist()} == {{4: "88888888", 8: "80808080"}[bits]}
    assert torch.equal(with_zeros_moved(second, bits, -1)["qzeros"], first["qzeros"])
    assert np.array_equal(unpacked(GPTQ, second, grid, "gptq_v2"), rounded.decoded().numpy())

    def error(packed, version):
        return float(np.linalg.norm(unpacked(GPTQ, packed, grid, version) - weight.numpy()) / weight.norm())

    for packed, right, wrong in ((first, "gptq", "gptq_v2"), (second, "gptq_v2", "gptq")):
        assert error(packed, wrong) > 3 * error(packed, right)


# config.json

WEIGHTS = {"symmetric": True, "dynamic": False}
MODULES = [f"model.layers.{layer}.mlp.{name}_proj" for layer in range(2) for name in ("up", "down")]
SCHEMES = {
    "int4": (Grid(4, 128), False, "pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}),
    "int8 groups": (Grid(8, 32), False, "pack-quantized", {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32}),
    "int8": (Grid(8, None), False, "pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "group_size": None}),
    "W8A8": (Grid(8, None), True, "int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "group_size": None}),
    "FP8": (Grid(8, None, "float"), False, "float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None}),
    "FP8 both": (Grid(8, None, "float"), True, "float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None}),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES)
def test_config_of_one_scheme(name):
    grid, activations, form, weights = SCHEMES[name]
    layout = Layout(dict.fromkeys(MODULES, grid), ("lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"), activations)
    inputs = {"num_bits": 8, "type": grid.kind, "symmetric": True, "dynamic": True, "strategy": "token"}
    assert COMPRESSED_TENSORS.config(layout, {"damping": 0.01}) == {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"], "weights": weights | WEIGHTS, "input_activations": inputs if activations else None, "format": form,
            }
        },
        "ignore": [r"re:(model\.)?lm_head$", r"re:(model\.)?layers\.(0|1)\.mlp\.gate$"],
    }  # fmt: skip


def one_group(targets, name, **more):
    weights = SCHEMES[name][3] | WEIGHTS | more
    return {"targets": targets, "weights": weights, "input_activations": None, "format": "pack-quantized"}


def test_config_of_several_schemes():
    """The scheme of most modules is for all that no other names, and stands last."""
    grids = dict.fromkeys(MODULES, Grid(8, None)) | {MODULES[0]: Grid(4, 32)}
    assert COMPRESSED_TENSORS.config(Layout(grids, ("lm_head",)), {"damping": 0.01}) == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": one_group([r"re:(model\.)?layers\.(0)\.mlp\.up_proj$"], "int4", group_size=32),
            "group_1": one_group(["Linear"], "int8"),
        },
        "ignore": [r"re:(model\.)?lm_head$"],
    }


@pytest.mark.parametrize("common", range(3))
def test_the_scheme_of_most_modules_stands_last(common):
    schemes = [(Grid(4, 128), "int4"), (Grid(8, 32), "int8 groups"), (Grid(8, None), "int8")]
    counts = [3 if number == common else 2 for number in range(3)]
    grids = {
        f"model.layers.{layer}.mlp.{'abc'[number]}": schemes[number][0] for number in range(3) for layer in range(counts[number])
    }
    found = COMPRESSED_TENSORS.config(Layout(grids, ("lm_head",)), {"damping": 0.01})["config_groups"]
    others = [one_group([rf"re:(model\.)?layers\.(0|1)\.mlp\.{'abc'[n]}$"], schemes[n][1]) for n in range(3) if n != common]
    wanted = [*others, one_group(["Linear"], schemes[common][1])]
    assert [*found.items()] == [(f"group_{number}", group) for number, group in enumerate(wanted)]


def test_the_scheme_of_experts_is_the_one_for_all():
    """However few they are: transformers 5 gives experts the first scheme that names classes."""
    experts = [f"model.layers.0.mlp.experts.{expert}.up_proj" for expert in range(2)]
    grids = dict.fromkeys(MODULES, Grid(8, None)) | dict.fromkeys(experts, Grid(4, 128))
    found = COMPRESSED_TENSORS.config(Layout(grids, ("lm_head",)), {"damping": 0.01})["config_groups"]
    targets = [rf"re:(model\.)?layers\.(0|1)\.mlp\.{name}_proj$" for name in ("up", "down")]
    assert found == {"group_0": one_group(targets, "int8"), "group_1": one_group(["Linear"], "int4")}
    assert list(found) == ["group_0", "group_1"]


@pytest.mark.parametrize(("grid", "size"), [(Grid(4, 128), 128), (Grid(8, 32), 32)], ids=named)
def test_config_of_gptq(grid, size):
    whole = Layout(dict.fromkeys(MODULES, grid), ("lm_head",))
    wanted = {
        "quant_method": "gptq", "checkpoint_format": "gptq", "bits": grid.bits, "group_size": size, "sym": True, "desc_act": False,
        "static_groups": True, "true_sequential": True, "damp_percent": 0.05, "lm_head": False,
    }  # fmt: skip
    assert GPTQ.config(whole, {"damping": 0.05}) == wanted
    part = Layout(dict.fromkeys(MODULES, grid), ("lm_head", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"))
    assert GPTQ.config(part, {"damping": 0.05}) == wanted | {"modules_in_block_to_quantize": [["mlp.up_proj", "mlp.down_proj"]]}


def matched(expressions, names):
    """Which names compressed-tensors takes a list of targets for: it matches expressions from the start."""
    assert all(expression.startswith("re:") for expression in expressions)
    return {name for name in names if any(re.match(expression[3:], name) for expression in expressions)}


EXPERTS = 3
KINDS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.shared_expert.up_proj", "mlp.shared_experts.up_proj", "mlp.experts.{}.up_proj",
         "mlp.experts.{}.down_proj", "block_sparse_moe.experts.{}.w1"]  # fmt: skip
LAYERS = [0, 1, 2, 3, 10, 11, 12, 21, 110]


def spelled(layer, kind, before="model."):
    return [f"{before}layers.{layer}.{kind.format(expert)}" for expert in range(EXPERTS if "{}" in kind else 1)]


OTHERS = [f"{name}{more}" for layer in (1, 10) for name in spelled(layer, "mlp.up_proj") for more in ("x", ".bias", ".0")] + [
    "model.xlayers.1.mlp.up_proj", "model.layers.1.mlpxup_proj", "model.layersx1.mlp.up_proj", "model.layers.1.mlp.experts.up_proj",
    "model.layers.1.mlp.experts.a.up_proj", "model.layers.1.x.mlp.up_proj", "lm_head", "modelxlayers.1.mlp.up_proj",
]  # fmt: skip
PLACES = ["", "model.", "a.", "a.model.", "model.model.", "model.language_model.", "language_model.", "model.vision_tower.encoder."]


@settings(max_examples=200, deadline=None)
@given(
    some.sets(some.tuples(some.sampled_from(LAYERS), some.sampled_from(KINDS)), min_size=1),
    some.sampled_from(["model.", "model.language_model.", "a."]),
)
def test_patterns_are_for_the_named_modules_and_no_other(chosen, before):
    """What stands before the layers counts, but for a leading `model.`: a model without its head has shorter names."""
    expressions = patterns(name for layer, kind in sorted(chosen) for name in spelled(layer, kind, before))
    everything = [name for place in PLACES for layer in LAYERS for kind in KINDS for name in spelled(layer, kind, place)] + OTHERS
    short = before.removeprefix("model.")
    assert matched(expressions, everything) == {
        name for layer, kind in chosen for place in (short, f"model.{short}") for name in spelled(layer, kind, place)
        if name in everything
    }  # fmt: skip
    assert len(expressions) == len({kind for _, kind in chosen})
    assert not any("experts" in expression for expression in expressions)  # a word that transformers 5 looks for


def test_patterns_by_hand():
    experts = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in (1, 12) for expert in range(3)]
    names = [
        "lm_head", "model.layers.0.mlp.up_proj", *experts, "model.layers.3.mlp.up_proj", "model.layers.1.mlp.shared_experts.up_proj",
        "model.vision_tower.layers.3.mlp.up_proj", "audio.layers.3.mlp.up_proj", "model.projector",
    ]  # fmt: skip
    assert patterns(names) == [
        r"re:(model\.)?lm_head$",
        r"re:(model\.)?layers\.(0|3)\.mlp\.up_proj$",
        r"re:(model\.)?layers\.(1|12)\.mlp\.expert.\.\d+\.up_proj$",
        r"re:(model\.)?layers\.(1)\.mlp\.shared_expert.\.up_proj$",
        r"re:(model\.)?vision_tower\.layers\.(3)\.mlp\.up_proj$",
        r"re:(model\.)?audio\.layers\.(3)\.mlp\.up_proj$",
        r"re:(model\.)?projector$",
    ]
    assert patterns([]) == []


def test_patterns_of_names_without_layers():
    names = ["lm_head", "encoder+head", "mtp.eh_proj"]
    others = ["lm_headx", "xlm_head", "x.lm_head", "encoderxhead", "encoderrhead", "mtp.eh_proj.x", "mtpxeh_proj", "eh_proj"]
    assert matched(patterns(names), [*names, "model.lm_head", *others]) == {*names, "model.lm_head"}


def test_patterns_are_not_for_another_tower():
    names = ["vision_tower.encoder.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj"]
    for name in names:
        assert matched(patterns([name]), names) == {name}


# Experts in one parameter, and modules in the order of their calls


def linear(module, unit, outputs, inputs, *, expert=False):
    return Linear(module, 0, unit, outputs, inputs, 4, expert=expert)


def fused(count, width, inner):
    names = [
        (
            *(linear(f"model.layers.0.mlp.experts.{e}.{p}_proj", "0.mlp.experts.gate_up", inner, width) for p in ("gate", "up")),
            linear(f"model.layers.0.mlp.experts.{e}.down_proj", "0.mlp.experts.down_proj", width, inner),
        )
        for e in range(count)
    ]
    parameters = {"gate_up_proj": normal(count, 2 * inner, width), "down_proj": normal(count, width, inner, seed=1)}
    experts = SimpleNamespace(**{name: nn.Parameter(value) for name, value in parameters.items()}, act_fn=nn.functional.silu)
    return FusedExperts(SimpleNamespace(experts=experts, count=count), names)


def spread_rows(rows, count):
    """At most `count` rows from the first to the last, by numpy."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("width", "inner"), [(4, 6), (6, 4)])
def test_experts_are_rounded_for_the_tokens_that_choose_them(width, inner, full):
    """Two experts have tokens enough, one lacks one, one has none; `down` sees what rounded gate and up make."""
    tokens, enough = 60, ENOUGH * 6  # of the wider of both inputs
    experts = fused(4, width, inner)
    before = {e: [weight.clone() for weight in experts.weights(e)] for e in range(4)}
    hidden, number = normal(tokens, width, seed=2), torch.arange(tokens)
    chosen = torch.zeros(tokens, 2, dtype=torch.long)
    chosen[:, 1] = torch.where(number < enough, 1, torch.where(number < 2 * enough - 1, 2, 4))  # 4: none of the four
    seen, settled = Traffic(hidden, chosen), []

    def settle(of, weight, moments):
        settled.append((of.module, moments))
        weight.mul_(0.5).add_(0.01)

    reasons = dict(round_experts(experts, seen, CPU, settle, full=full))
    assert [module for module, _ in settled] == [of.module for names in experts.names for of in names]
    assert {of.module: reason for of, reason in reasons.items()} == {
        of.module: f"{count} tokens chose it: rounded for all tokens of the layer"
        for expert, count in ((2, enough - 1), (3, 0)) for of in experts.names[expert]
    }  # fmt: skip
    everything = spread_rows(hidden, SHARED * 6)
    assert len(everything) == 24 < tokens
    for expert, rows in enumerate((hidden, hidden[:enough], everything, everything)):
        gate, up, down = experts.weights(expert)
        assert torch.equal(gate, before[expert][0] * 0.5 + 0.01)
        assert torch.equal(down, before[expert][2] * 0.5 + 0.01)
        x, a, b = (of.double().detach().numpy() for of in (rows, gate, up))
        middle = (x @ a.T) / (1 + np.exp(-(x @ a.T))) * (x @ b.T)
        for (_, moments), wanted in zip(settled[3 * expert : 3 * expert + 3], (x, x, middle), strict=True):
            assert moments.count == len(wanted)
            assert (moments.full is not None) == full
            assert moments.known.detach().numpy() == pytest.approx(wanted.T @ wanted if full else (wanted**2).sum(0), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(("tokens", "whole"), [(6, {"gate_proj", "up_proj", "down_proj"}), (5, {"gate_proj", "up_proj"}), (4, {"gate_proj", "up_proj"}), (3, set()), (1, set())])
@pytest.mark.parametrize("full", [False, True])
def test_moments_of_fewer_tokens_than_inputs_have_no_matrix(tokens, whole, full):
    """Which `gptq` takes for a reason to round to the nearest: it would mend for few tokens what others need."""
    experts, settled = fused(2, 4, 6), []  # `gate` and `up` have 4 inputs, `down` has 6
    seen = Traffic(normal(tokens, 4, seed=2), torch.zeros(tokens, 1, dtype=torch.long))
    chosen = QuantizeSettings(method="gptq", group_size="channel")

    def settle(of, weight, moments):
        settled.append((of.module, moments))
        made = round_matrix(weight, moments, Grid(4, None), Recipe({}, "none"), chosen, torch.float32)
        scale = full_scales(weight, Grid(4, None), torch.float32)
        few = not full or of.module.rpartition(".")[2] not in whole
        assert made.fallback == (TOO_FEW if few else "")
        if few:
            assert torch.equal(made.rounded.codes, encode(weight, scale, Grid(4, None)))

    reasons = dict(round_experts(experts, seen, CPU, settle, full=full))
    assert {module.rpartition(".")[2] for module, moments in settled if moments.full is not None} == (whole if full else set())
    assert [moments.count for _, moments in settled] == [tokens] * 6
    assert all(moments.squares.any() for _, moments in settled)
    assert sorted({*reasons.values()}) == [f"{count} tokens chose it: rounded for all tokens of the layer" for count in (0, tokens)]
    assert len(reasons) == 6


def test_the_tokens_of_an_expert():
    hidden, chosen = torch.arange(12.0).view(6, 2), torch.tensor([[0, 1], [1, 0], [2, 1], [2, 2], [0, 2], [1, 2]])
    seen = Traffic(hidden, chosen)
    assert [seen.of(expert)[:, 0].tolist() for expert in range(4)] == [[0, 2, 8], [0, 2, 4, 10], [4, 6, 8, 10], []]


@settings(max_examples=200, deadline=None)
@given(some.integers(1, 3000), some.integers(1, 400))
@example(39, 20)
@example(40, 20)
@example(100, 20)
@example(20, 20)
@example(10, 20)
@example(1, 1)
def test_rows_are_spread_from_the_first_to_the_last(rows, count):
    found = Traffic(torch.arange(rows).view(-1, 1), torch.zeros(rows, 1)).spread(count).flatten().tolist()
    assert len(found) == min(rows, count)
    assert found[0] == 0
    assert found[-1] == (rows - 1 if count > 1 else 0)
    gaps = [after - before for before, after in itertools.pairwise(found)]
    assert all(gap in {(rows - 1) // (len(found) - 1), -(-(rows - 1) // (len(found) - 1))} for gap in gaps)
    assert all(gap > 0 for gap in gaps)


def test_no_rows_are_spread_to_none():
    assert Traffic(torch.zeros(0, 3), torch.zeros(0, 1)).spread(20).shape == (0, 3)


class Toy(nn.Module):
    """A layer whose modules are declared in another order than they are called in."""

    def __init__(self):
        super().__init__()
        names = ("down", "up", "unused", "o", "v", "gate", "k", "q")
        for name in names:
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, hidden):
        normed = hidden * 2
        mixed = self.q(normed) + self.k(normed) + self.v(normed.view(normed.shape))
        hidden = hidden + self.o(mixed)
        again = hidden * 3
        return self.down(self.gate(again) * self.up(again))


class Routed(nn.Module):
    """As releases before transformers 5 call experts: each with its tokens, of which there may be none."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    def forward(self, hidden):
        flat, chosen = hidden.reshape(-1, 8), ([0, 1, 2], [], [0, 1], [])
        return sum(expert(flat[rows]).sum() for expert, rows in zip(self.experts, chosen, strict=True)) + hidden


class Twice(nn.Module):
    """One module that two places of a layer share."""

    def __init__(self):
        super().__init__()
        self.both = nn.Linear(8, 8)

    def forward(self, hidden):
        return self.both(torch.relu(self.both(hidden)))


def order_of(layer):
    known = {linear(name, name, 8, 8): module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    ground = SimpleNamespace(layers=SimpleNamespace(device=CPU))
    with torch.no_grad():
        groups = _call_order(ground, LayerCall(layer, {}), known, normal(2, 5, 8))
    assert not any(module._forward_pre_hooks for module in layer.modules())
    return [[of.module for of in group] for group in groups]


def test_modules_go_in_the_order_of_their_calls_those_of_one_input_together():
    assert order_of(Toy()) == [["q", "k", "v"], ["o"], ["gate", "up"], ["down"], ["unused"]]


def test_experts_without_tokens_do_not_share_an_input():
    assert order_of(Routed()) == [[f"experts.{expert}"] for expert in range(4)]


def test_a_module_that_is_called_twice_is_rounded_once():
    assert order_of(Twice()) == [["both"]]


class Listed(nn.Module):
    """Experts with modules of their own, as releases before transformers 5 have them; the first is hard to round."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(32, 8, bias=False) for _ in range(2)])
        self.experts[0].weight.data[:, 0] = 60.0

    def forward(self, hidden):
        return hidden + sum(expert(rows).sum() for expert, rows in zip(self.experts, (hidden * 2, hidden * 3), strict=True))


FOUR, EIGHT = Grid(4, 32), Grid(8, None)


@pytest.mark.parametrize(("case", "given", "wanted"), [
    ("plain", {"group_size": 32}, [EIGHT, FOUR]),
    ("plain", {"group_size": 32, "raise_above": 2.0}, [FOUR, FOUR]),
    ("experts", {"group_size": 32}, [FOUR, FOUR]),  # they have one scheme for all layers
    ("plain", {"bytes_per_weight": 1.0}, [FOUR, FOUR]),  # the budget has given all it had
    ("plain", {"group_size": 32, "format": "gptq"}, [FOUR, FOUR]),  # one grid for the whole file
], ids=named)  # fmt: skip
def test_what_is_off_by_too_much_gets_eight_bits(case, given, wanted):
    """Part by part, but never experts, and nothing beside a budget or in a format of one grid."""
    torch.manual_seed(0)
    layer, chosen = Listed(), QuantizeSettings(**{"method": "gptq", "raise_above": 0.2} | given)
    linears = [
        linear(f"model.layers.0.experts.{e}", "experts" if case == "experts" else f"0.{e}", 8, 32, expert=case == "experts")
        for e in range(2)
    ]
    stream = normal(2, 40, 32)
    stream[..., 0] = 0  # what the large weights read says nothing
    ground = SimpleNamespace(
        layers=SimpleNamespace(device=CPU, prefix=lambda number: "model.layers.0."), of_layer=lambda number: linears,
        settings=chosen, scale_dtype=lambda of: torch.float32,
    )  # fmt: skip
    grids = {of.module: FOUR for of in linears}
    found = Walked(grids=dict(grids))
    with torch.no_grad():
        tensors = _round_layer(ground, Recipe(grids, "none"), 0, LayerCall(layer, {}), stream, found)
    assert found.grids == dict(zip(grids, wanted, strict=True))
    assert set(found.errors) == set(grids)
    first, second = found.errors.values()
    assert (first < 1) == (wanted[0] == EIGHT)
    assert second < 0.2
    for module, grid in found.grids.items():
        codes = tensors[f"{module}.codes"]
        assert tensors[f"{module}.scale"].shape == (8, grid.groups(32))
        assert int(codes.abs().max()) == 2 ** (grid.bits - 1) - 1 or int(codes.min()) == -(2 ** (grid.bits - 1))
        assert torch.equal(layer.get_submodule(module.removeprefix("model.layers.0.")).weight.data, decode(codes, tensors[f"{module}.scale"]))


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_that_of_compressed_tensors(bits):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (12, 96), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(words(codes.int() + half, bits), pack_to_int32(codes, bits))
