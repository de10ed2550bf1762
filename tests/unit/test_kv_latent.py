"""The parts of `kv_latent`: channels, budget, the closed forms, and what is refused.

References are written out here in float64 from the definitions: complex rotation, explicit designs, all subsets.
"""

import itertools
import json
import math
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from safetensors.torch import load_file, save_file

import surgery
from surgery.checkpoint.reader import open_checkpoint
from surgery.errors import CorruptCheckpoint, ManifestError, RefusedInput, UnsupportedModel, UsageError
from surgery.manifest import manifest_from_dict
from surgery.operations.allocation import predicted_cost
from surgery.operations.base import Statistics
from surgery.operations.kv_latent import OPERATION, solver
from surgery.operations.kv_latent.allocation import allocate_widths as allocate
from surgery.operations.kv_latent.allocation import knee, offered_widths
from surgery.operations.kv_latent.attention import Attention, attention_output, fold_value_bias
from surgery.operations.kv_latent.channels import (
    head_rows,
    pair_channels,
    paper_exponents,
    paper_pairs,
    stride_channels,
    stride_pairs,
)
from surgery.operations.kv_latent.settings import KVLatentSettings
from surgery.planning import open_draft

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.tiny import write_tiny

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def close(found, wanted, tolerance=1e-9):
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


# Channels


def is_the_spectrum(exponents, width):
    """What the paper says in words and in its appendix D.2, and what its code computes."""
    return (
        len(exponents) == width // 2
        and exponents[0] == Fraction(1, 4)
        and exponents[-1] == 1 - Fraction(1, width)
        and all(a < b for a, b in itertools.pairwise(exponents))
        and all(Fraction(1, 4) <= e < 1 for e in exponents)
    )


@pytest.mark.parametrize("width", [4, 8, 12, 16, 32, 64, 128])
def test_spectrum(width):
    assert is_the_spectrum(paper_exponents(width), width)
    printed = [Fraction(width // 4 + 2 * j, width) for j in range(width // 4)]
    printed += [Fraction(j - 1, width) + Fraction(3, 4) for j in range(width // 4 + 1, width // 2 + 1)]  # eq. 11
    assert not is_the_spectrum(printed, width)


def test_matched_pairs_of_128():
    assert paper_pairs(128, 64) == [*range(16, 48, 2), *range(48, 64)]
    assert paper_pairs(128, 32) == [*range(16, 48, 4), *range(48, 64, 2)]
    assert paper_pairs(128, 16) == [16, 24, 32, 40, 48, 52, 56, 60]
    assert paper_pairs(128, 128) is None  # a half of its exponents lies between those of the model
    assert paper_pairs(64, 64) is None


@pytest.mark.parametrize(("head", "stride"), [(16, 1), (16, 2), (16, 8), (64, 4), (96, 3), (128, 8), (128, 64)])
def test_strides_keep_pairs_and_frequencies(head, stride):
    width = head // stride
    channels = pair_channels(stride_pairs(head, width), head)
    assert channels == list(range(0, head, stride)) == stride_channels(head, width)
    assert all(channels[j + width // 2] == channels[j] + head // 2 for j in range(width // 2))
    for new, old in enumerate(stride_pairs(head, width)):
        assert Fraction(2 * new, width) == Fraction(2 * old, head)


def test_matched_pairs_turn_at_the_exponents():
    for head, width in ((128, 64), (128, 32), (64, 32), (16, 8)):
        assert [Fraction(2 * pair, head) for pair in paper_pairs(head, width)] == paper_exponents(width)


def test_rows_of_stacked_heads():
    assert head_rows([[0, 2], [1, 3]], 4) == [0, 2, 5, 7]
    assert head_rows([[0, 2], [1, 3]], 4, repeats=2) == [0, 2, 4, 6, 9, 11, 13, 15]


# Budget


@settings(max_examples=60, deadline=None)
@given(
    costs=some.lists(
        some.dictionaries(some.integers(1, 6), some.floats(0, 10), min_size=1, max_size=4), min_size=1, max_size=5
    ),
    data=some.data(),
)
def test_allocation_is_the_best_of_all(costs, data):
    weights = data.draw(some.lists(some.integers(1, 3), min_size=len(costs), max_size=len(costs)))
    budget = data.draw(some.integers(1, 40))
    fitting = [
        sum(cost[width] for cost, width in zip(costs, choice, strict=True))
        for choice in itertools.product(*costs)
        if sum(w * width for w, width in zip(weights, choice, strict=True)) <= budget
    ]
    if not fitting:
        with pytest.raises(UsageError, match="kv_ratio"):
            allocate(costs, budget, weights)
        return
    chosen = allocate(costs, budget, weights)
    assert sum(w * width for w, width in zip(weights, chosen, strict=True)) <= budget
    assert sum(cost[width] for cost, width in zip(costs, chosen, strict=True)) == pytest.approx(min(fitting))


@pytest.mark.parametrize("head", [2, 4, 6, 16, 24, 40, 64, 72, 80, 96, 112, 120, 128, 256])
def test_offered_widths_are_whole(head):
    for even in (True, False):
        offered = offered_widths(head, even=even)
        assert offered == sorted(set(offered))
        assert offered[-1] == head
        assert offered[0] > 0
        assert len(offered) <= max(9, head // 8 + 2)
        assert not even or all(width % 2 == 0 for width in offered)


# One layer


def make(seed=0, *, heads=4, groups=2, head=8, hidden=24, length=12, windows=5, biases=True, values=None):
    """A random layer with strongly correlated inputs: (x, queries, attention)."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=DOUBLE)

    mixing = normal(hidden, hidden) * torch.logspace(0, -2, hidden, dtype=DOUBLE)
    x = normal(windows, length, hidden) @ mixing.T + 0.3 * normal(hidden)
    speeds = 100.0 ** -torch.linspace(0, 1, head // 2, dtype=DOUBLE)
    angles = torch.arange(length, dtype=DOUBLE)[:, None] * speeds
    values = values or head
    layer = Attention(
        normal(heads, head, hidden) * 0.5, normal(groups, head, hidden) * 0.5, normal(groups, values, hidden),
        normal(hidden, heads, values) / 4,
        angles.cos().expand(groups, -1, -1), angles.sin().expand(groups, -1, -1), head**-0.5,
        b_q=normal(heads, head) if biases else None, b_k=normal(groups, head) if biases else None,
        b_v=normal(groups, values) if biases else None, b_o=normal(hidden) if biases else None,
    )  # fmt: skip
    asked = torch.stack([torch.randperm(length, generator=random)[:7].sort().values for _ in range(windows)])
    return x, asked, layer


def plus(value, bias):
    return value if bias is None else value + bias


def terms(x, a):
    """What each pair adds to each logit, as complex numbers q conj(k): [B, H, T, T, P]."""
    turn = torch.complex(a.cos, a.sin)  # [G, T, P]
    out = []
    for h in range(len(a.w_q)):
        g = h // a.group
        query = plus(x @ a.w_q[h].T, None if a.b_q is None else a.b_q[h]) * a.scale
        key = plus(x @ a.w_k[g].T, None if a.b_k is None else a.b_k[g])
        half = query.shape[-1] // 2
        query, key = (torch.complex(y[..., :half], y[..., half:]) * turn[g] for y in (query, key))
        out.append(query[:, :, None] * key[:, None].conj())
    return torch.stack(out, 1)


def attend(x, a, found=None):
    """Attention weights [B, H, T, T] from complex terms."""
    scores = (terms(x, a) if found is None else found).real.sum(-1)
    place = torch.arange(x.shape[1])
    hidden = place[None] > place[:, None]
    if a.window is not None:
        hidden |= place[:, None] - place[None] >= a.window
    return scores.masked_fill(hidden, float("-inf")).softmax(-1)


def outputs(x, a):
    """[B, T, D], from the definition."""
    weights, total = attend(x, a), 0
    for h in range(len(a.w_q)):
        value = plus(x @ a.w_v[h // a.group].T, None if a.b_v is None else a.b_v[h // a.group])
        total = total + weights[:, h] @ value @ a.w_o[:, h].T
    return plus(total, a.b_o)


def spread(weights, error, asked):
    """Mean over the asked queries of the variance of `error` under the attention, per head: [H]."""
    mean = (weights * error).sum(-1, keepdim=True)
    variance = (weights * (error - mean) ** 2).sum(-1)
    return variance.gather(2, asked[:, None].expand(-1, variance.shape[1], -1)).mean((0, 2))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("biases", [True, False])
def test_attention_is_the_definition(window, biases):
    from dataclasses import replace

    x, _, a = make(biases=biases, values=5)
    a = replace(a, window=window)
    close(attention_output(x, a), outputs(x, a))


def test_value_bias_folds_exactly():
    x, _, a = make()
    folded = fold_value_bias(a)
    assert folded.b_v is None
    close(outputs(x, folded), outputs(x, a))


# Pairs


def subsets(pairs, sizes):
    return [list(kept) for size in sizes for kept in itertools.combinations(range(pairs), size)]


def test_gram_prices_every_subset_and_gain():
    x, asked, a = make()
    gram, found = solver.pair_gram(x, asked, a), terms(x, a)
    weights, pairs = attend(x, a), a.cos.shape[-1]
    random = torch.Generator().manual_seed(1)
    for kept in subsets(pairs, range(pairs + 1)):
        gains = torch.complex(*torch.randn(2, 4, len(kept), generator=random, dtype=DOUBLE))
        # Re(g q conj k) = Re(g) c_j - Im(g) Im(q conj k), and c_{P+j} is -Im(q conj k)
        error = (found.sum(-1) - (gains[None, :, None, None] * found[..., kept]).sum(-1)).real
        delta = torch.cat([torch.ones(4, pairs), torch.zeros(4, pairs)], 1).to(DOUBLE)
        delta[:, kept] -= gains.real
        delta[:, [pairs + pair for pair in kept]] -= gains.imag
        close(torch.einsum("hi,hij,hj->h", delta, gram, delta), spread(weights, error, asked))


def test_gains_are_the_least_squares_optimum(monkeypatch):
    monkeypatch.setattr(solver, "GAIN_RIDGE", 0.0)
    x, asked, a = make(3)
    gram, found, weights = solver.pair_gram(x, asked, a), terms(x, a), attend(x, a)
    pairs = a.cos.shape[-1]
    design = torch.cat([found.real, -found.imag], -1)  # [B, H, T, T, 2P]
    design = (design - (weights[..., None] * design).sum(3, keepdim=True)) * weights[..., None].sqrt()
    for head in range(4):
        rows = torch.cat([design[b, head, asked[b]].flatten(0, 1) for b in range(len(x))])
        for kept in subsets(pairs, (1, 2, 3)):
            columns = [*kept, *(pairs + pair for pair in kept)]
            target = rows[:, :pairs].sum(1)
            wanted = torch.linalg.lstsq(rows[:, columns], target[:, None]).solution[:, 0]
            gains, loss = solver.gains(gram[head], kept)
            close(gains, wanted, 1e-6)
            close(loss, (rows[:, columns] @ wanted - target).square().sum() / asked.numel(), 1e-8)


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pairs_go_greedily(free, seed):
    """Against the plain algorithm: try every next pair, take the one whose loss over the group's heads is least."""
    x, asked, a = make(seed, heads=6, groups=2, head=12)
    gram, pairs = solver.pair_gram(x, asked, a), 6

    def loss(group, kept):
        heads = gram[3 * group : 3 * group + 3]
        if free:
            return sum(float(solver.gains(head, kept)[1]) for head in heads) if kept else math.inf
        lost = [pair for pair in range(pairs) if pair not in kept]
        return float(heads[:, lost][:, :, lost].sum())

    orders = solver.drop_orders(gram, 2, free=free)
    for group in range(2):
        kept = list(range(pairs))
        for gone in orders[group][:-1]:
            rests = {pair: [other for other in kept if other != pair] for pair in kept}
            assert gone == min(kept, key=lambda pair: loss(group, rests[pair]))
            kept = rests[gone]
        assert kept == orders[group][-1:]
    for keep in range(1, pairs + 1):
        for order, chosen in zip(orders, solver.select_pairs(orders, keep), strict=True):
            assert chosen == sorted(order[pairs - keep :])


@pytest.mark.parametrize("free", [True, False])
def test_independent_pairs_give_the_best_subset(free):
    """Where contributions do not correlate greedy is optimal, and must find the best of all subsets."""
    energy = torch.tensor([3.0, 0.5, 7.0, 0.1, 2.0, 5.0], dtype=DOUBLE)
    gram = torch.diag(torch.cat([energy, energy]))[None]
    for keep in range(1, 6):
        best = min(subsets(6, (keep,)), key=lambda kept: energy.sum() - energy[kept].sum())
        assert solver.select_pairs(solver.drop_orders(gram, 1, free=free), keep) == [best]


@pytest.mark.parametrize("biases", [True, False])
def test_reduced_heads_are_partial_sums(biases):
    x, asked, a = make(5, biases=biases)
    pairs, whole = [[0, 2], [1, 3]], terms(x, a)
    for free in (True, False):
        gram = solver.pair_gram(x, asked, a) if free else None
        narrow = solver.reduce_qk(a, pairs, gram)
        found = terms(x, narrow).real.sum(-1)
        for head in range(4):
            kept = pairs[head // 2]
            gains = torch.ones(2, dtype=torch.complex128)
            if free:
                gains = torch.complex(*solver.gains(gram[head], kept)[0].chunk(2))
            close(found[:, head], (gains * whole[:, head][..., kept]).sum(-1).real)


def weighted_loss(x, asked, original, a):
    return float(
        spread(attend(x, original), (terms(x, a) - 0).real.sum(-1) - terms(x, original).real.sum(-1), asked).sum()
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("steps", [1, 3, 12])
def test_refit_never_worsens_its_loss(seed, steps):
    x, asked, a = make(seed)
    gram = solver.pair_gram(x, asked, a)
    narrow = solver.reduce_qk(a, [[0, 1], [2, 3]], gram)
    fitted = solver.refit_qk(x, x, asked, a, narrow, steps)
    before, after = (weighted_loss(x, asked, a, candidate) for candidate in (narrow, fitted))
    assert after <= before
    if steps == 12:
        assert after < 0.9 * before


def test_a_search_that_fails_changes_nothing(monkeypatch):
    def spoil(parameters, _loss, _steps):
        for parameter in parameters:
            parameter.data += 1.0

    monkeypatch.setattr(solver, "_lbfgs", spoil)
    x, asked, a = make(2)
    narrow = solver.reduce_qk(a, [[0, 1], [2, 3]], None)
    fitted = solver.refit_qk(x, x, asked, a, narrow, 3)
    assert torch.equal(fitted.w_q, narrow.w_q)
    assert torch.equal(fitted.w_k, narrow.w_k)


def test_refit_finds_the_original_at_full_width():
    from dataclasses import replace

    x, asked, a = make(1)
    assert weighted_loss(x, asked, a, solver.refit_qk(x, x, asked, a, a, 12)) < 1e-20
    noise = torch.Generator().manual_seed(9)
    shaken = replace(a, w_q=a.w_q + 0.1 * torch.randn(a.w_q.shape, generator=noise, dtype=DOUBLE))
    start = weighted_loss(x, asked, a, shaken)
    assert weighted_loss(x, asked, a, solver.refit_qk(x, x, asked, a, shaken, 400)) < 1e-4 * start


# Values


def value_error(a, narrow, moment):
    """sum over groups and their heads of E ||(O_h V_g - O'_h V'_g) z||^2 with E z z^T = moment[g]."""
    total = 0.0
    for h in range(len(a.w_q)):
        g = h // a.group
        lost = a.w_o[:, h] @ a.w_v[g] - narrow.w_o[:, h] @ narrow.w_v[g]
        total += float(torch.trace(lost @ moment[g] @ lost.T))
    return total


def dropped_energy(a, moment, width):
    """Sum of the squared singular values beyond `width`, of the stacked maps after a symmetric square root."""
    total = 0.0
    for g in range(len(a.w_k)):
        values, vectors = torch.linalg.eigh(moment[g])
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        stacked = torch.cat([a.w_o[:, h] @ a.w_v[g] for h in range(g * a.group, (g + 1) * a.group)])
        total += float(torch.linalg.svdvals(stacked @ root)[width:].square().sum())
    return total


def strided_values(a, width):
    from dataclasses import replace

    kept = list(range(0, a.w_v.shape[1], a.w_v.shape[1] // width))
    return replace(a, w_v=a.w_v[:, kept], w_o=a.w_o[..., kept])


def pca_values(a, moment, width):
    """The best basis for the values themselves, whatever the outputs do with them."""
    from dataclasses import replace

    bases = [torch.linalg.eigh(v @ m @ v.T).eigenvectors[:, -width:] for v, m in zip(a.w_v, moment, strict=True)]
    w_v = torch.stack([basis.T @ v for basis, v in zip(bases, a.w_v, strict=True)])
    w_o = torch.stack([a.w_o[:, h] @ bases[h // a.group] for h in range(len(a.w_q))], 1)
    return replace(a, w_v=w_v, w_o=w_o)


def test_moment_is_that_of_averaged_inputs():
    x, asked, a = make(2)
    weights, moment = attend(x, a), solver.averaged_moment(x, asked, a)
    for g in range(2):
        seen = [weights[b, h, m] @ x[b] for b in range(len(x)) for h in (2 * g, 2 * g + 1) for m in asked[b].tolist()]
        stacked = torch.stack(seen)
        close(moment[g], stacked.T @ stacked / len(seen))


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_value_basis_is_the_closed_form(seed, heads, groups, monkeypatch):
    monkeypatch.setattr(solver, "MOMENT_RIDGE", 0.0)
    x, asked, a = make(seed, heads=heads, groups=groups, biases=False, windows=12)
    moment = solver.averaged_moment(x, asked, a)
    whole = value_error(a, strided_values(a, 1), moment)
    errors = []
    for width in range(1, 9):
        narrow = solver.reduce_vo(a, moment, width)
        assert narrow.w_v.shape == (groups, width, 24)
        assert narrow.w_o.shape == (24, heads, width)
        error = value_error(a, narrow, moment)
        assert error == pytest.approx(dropped_energy(a, moment, width), rel=1e-6, abs=1e-12 * whole)
        assert error <= value_error(a, pca_values(a, moment, width), moment) + 1e-12 * whole
        if 8 % width == 0:
            assert error <= value_error(a, strided_values(a, width), moment) + 1e-12 * whole
        errors.append(error)
    assert all(less <= more + 1e-12 * whole for more, less in itertools.pairwise(errors))
    close(outputs(x, solver.reduce_vo(a, moment, 8)), outputs(x, a), 1e-6)


def test_ridge_of_the_moment_costs_little():
    x, asked, a = make(4, biases=False)
    moment = solver.averaged_moment(x, asked, a)
    for width in (2, 4, 6):
        best = dropped_energy(a, moment, width)
        assert value_error(a, solver.reduce_vo(a, moment, width), moment) <= 1.05 * best


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 1e-6, 1e-2, 10.0])
def test_output_fit_never_raises_the_error(ridge, biases):
    x, _, a = make(6, biases=biases, windows=20)
    narrow = strided_values(fold_value_bias(a), 4)
    random = torch.Generator().manual_seed(3)
    target = outputs(x, a) + 0.1 * torch.randn(x.shape, generator=random, dtype=DOUBLE)
    fitted = solver.refit_o(x, narrow, target, ridge)
    before, after = (float((outputs(x, one) - target).square().sum()) for one in (narrow, fitted))
    assert after <= before
    if ridge == 0.0:
        weights = attend(x, narrow)
        seen = [weights[:, h] @ x @ narrow.w_v[h // 2].T for h in range(4)]
        design = torch.cat([*seen, torch.ones_like(x[..., :1])] if biases else seen, -1).flatten(0, 1)
        best = torch.linalg.lstsq(design, target.flatten(0, 1)).solution
        assert after == pytest.approx(float((design @ best - target.flatten(0, 1)).square().sum()), rel=1e-9)


def test_output_fit_stays_where_nothing_is_to_gain():
    x, _, a = make(7)
    close(solver.refit_o(x, a, outputs(x, a)).w_o, a.w_o, 1e-8)


# Settings, and what is refused


def manifest(**chosen):
    return manifest_from_dict({"surgery": 1, "operations": [{"kv_latent": chosen}], "verify": False})


def test_methods_preset_and_yield():
    assert not KVLatentSettings(method="stride").calibrated
    assert not KVLatentSettings(method="paper").calibrated
    assert KVLatentSettings(method="paper").rope == "paper"
    assert KVLatentSettings(method="paper", rope="keep").rope == "keep"
    assert KVLatentSettings().calibrated
    for one in ("logit_gain", "refit_q", "refit_o"):
        assert KVLatentSettings(method="stride", **{one: True}).calibrated
    assert KVLatentSettings(method="stride", qk_select="energy").calibrated
    assert KVLatentSettings(method="stride", vo_basis="svd").calibrated


STRIDE = {"method": "stride"}
REFUSED = {
    "stride does not divide": ({**STRIDE, "qk_dim": 6}, {}, "divide"),
    "stride that does not divide half a head": ({**STRIDE, "qk_dim": 5}, {"head_dim": 20}, "come in pairs"),
    "values do not divide": ({**STRIDE, "vo_dim": 5}, {}, "vo_dim"),
    "odd keys": ({"qk_dim": 7}, {}, "odd"),
    "four": ({"method": "paper", "qk_dim": 2}, {}, "divisible by 4"),
    "four, matched": ({"qk_select": "matched", "qk_dim": 6}, {}, "divisible by 4"),
    "matched at full width": ({"qk_select": "matched", "qk_dim": 16}, {}, "frequencies"),
    "wide keys": ({"qk_dim": 18}, {}, "more than head_dim"),
    "wide values": ({"vo_dim": 17}, {}, "more than head_dim"),
    "short list": ({"qk_dim": [4]}, {}, "lists 1 widths"),
    "long list": ({"vo_dim": [4, 4, 4]}, {}, "lists 3 widths"),
    "empty list": ({"vo_dim": []}, {}, "lists 0 widths"),
    "ratio below the floor": ({"kv_ratio": 0.1}, {}, "below the narrowest"),
    "ratio below the strides": ({**STRIDE, "kv_ratio": 0.05}, {}, "below the narrowest"),
    "interleaved": ({**STRIDE, "qk_dim": 4}, {"rope_interleaved": True}, "interleaved"),
    "quantized": ({**STRIDE, "qk_dim": 4}, {"quantization_config": {"quant_method": "gptq"}}, "quantized"),
    "alibi": ({**STRIDE, "qk_dim": 4}, {"alibi": True}, "rotary"),
    "absolute": ({**STRIDE, "qk_dim": 4}, {"position_embedding_type": "absolute"}, "rotary"),
    "partial rotary": ({**STRIDE, "qk_dim": 4}, {"partial_rotary_factor": 0.5}, "rotate"),
    "paper on scaled rope": (
        {"method": "paper", "qk_dim": 8}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "unscaled"
    ),
    "paper that chooses": ({"method": "paper", "qk_select": "energy", "qk_dim": 8}, {}, "qk_select: stride"),
    "paper that fits": ({"method": "paper", "refit_o": True, "qk_dim": 8}, {}, "calibrated"),
    "paper's scale that fits": ({"method": "paper", "rope": "keep", "refit_o": True, "qk_dim": 8}, {}, "method: paper"),
    "latent already": (
        {**STRIDE, "qk_dim": 4}, {"surgery": {"version": 1, "latent_attention": {"layers": []}}}, "latent already"
    ),
    "MLA": ({**STRIDE, "qk_dim": 4}, {"kv_lora_rank": 8}, "MLA"),
}  # fmt: skip


def assert_refused(base, chosen, error, said, tmp_path):
    for attempt in (
        lambda: surgery.plan(str(base), manifest(**chosen)),
        lambda: surgery.convert(str(base), tmp_path / "out", manifest(**chosen), statistics=tmp_path / "statistics"),
    ):
        with pytest.raises(error) as caught:
            attempt()
        assert said in f"{caught.value}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    chosen, config, said = REFUSED[name]
    assert_refused(write_tiny(tmp_path / "base", "llama", **config), chosen, UnsupportedModel, said, tmp_path)


def test_both_kinds_of_size_are_refused():
    with pytest.raises(ManifestError, match="not both"):
        manifest(kv_ratio=0.5, qk_dim=8)


@pytest.mark.parametrize(
    "chosen",
    [{"kv_ratio": 0.0}, {"kv_ratio": 1.1}, {"qk_dim": 0}, {"qk_dim": -2}, {"vo_dim": "8"}, {"qk": 8}, {"vo_dim": 8.0}],
)
def test_settings_out_of_range_are_refused(chosen):
    with pytest.raises(ManifestError):
        manifest(**chosen)


def test_two_conversions_of_the_same_heads_are_refused(tmp_path):
    base = write_tiny(tmp_path / "base", "llama")
    twice = manifest_from_dict(
        {"surgery": 1, "operations": [{"kv_latent": {**STRIDE, "qk_dim": 4}}, {"kv_latent": {"vo_dim": 8}}]}
    )
    with pytest.raises(UnsupportedModel, match="does not fit") as caught:
        surgery.plan(str(base), twice)
    assert "latent already" in caught.value.cause


@pytest.mark.parametrize("family", ["qwen3", "olmoe"])
def test_paper_behind_a_norm_is_refused(family, tmp_path):
    base = write_tiny(tmp_path / "base", family)
    assert_refused(base, {"method": "paper", "qk_dim": 8}, UnsupportedModel, "norm", tmp_path)


def test_clamped_projections_are_not_calibrated(tmp_path):
    base = write_tiny(tmp_path / "base", "olmoe", clip_qkv=1.0)
    assert_refused(base, {"qk_dim": 8}, UnsupportedModel, "clamps", tmp_path)
    assert surgery.plan(str(base), manifest(method="stride", qk_dim=8)).code


def rewrite(base, change):
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, base / "model.safetensors", metadata={"format": "pt"}
    )
    return base


Q, K = ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight")


def renamed(tensors):
    tensors["model.layers.1.self_attn.queries.weight"] = tensors.pop(Q)


def trimmed(tensors):
    tensors[K] = tensors[K][:-1]


@pytest.mark.parametrize(("change", "said"), [(lambda t: t.pop(Q), Q), (renamed, Q), (trimmed, K)])
def test_projections_that_do_not_fit_are_refused(change, said, tmp_path):
    base = rewrite(write_tiny(tmp_path / "base", "llama"), change)
    assert_refused(base, {**STRIDE, "qk_dim": 8, "vo_dim": 8}, CorruptCheckpoint, said, tmp_path)


@pytest.mark.parametrize("config", [{"num_key_value_heads": 3}, {"head_dim": 8}, {"num_attention_heads": 8}])
def test_configs_that_contradict_the_tensors_are_refused(config, tmp_path):
    base = write_tiny(tmp_path / "base", "llama")
    written = json.loads((base / "config.json").read_text()) | config
    (base / "config.json").write_text(json.dumps(written))
    assert_refused(base, {**STRIDE, "qk_dim": 4}, CorruptCheckpoint, "", tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("chosen", [{**STRIDE, "qk_dim": 8, "vo_dim": 8}, {"qk_dim": 8}], ids=["stride", "calibrated"])
@pytest.mark.parametrize("name", [Q, "model.layers.0.mlp.up_proj.weight"])
def test_values_that_are_no_numbers_are_refused(value, chosen, name, tmp_path):
    def spoil(tensors):
        tensors[name].view(-1)[7] = value

    trained = Path(surgery.__file__).parent / "builtin" / "llama"  # with a tokenizer, for the calibration text
    base = rewrite(shutil.copytree(trained, tmp_path / "base"), spoil)
    small = manifest_from_dict(
        {
            "surgery": 1,
            "operations": [{"kv_latent": chosen}],
            "calibration": {"samples": 2, "length": 8},
            "verify": False,
        }
    )
    with pytest.raises(CorruptCheckpoint, match="NaN"):
        surgery.convert(str(base), tmp_path / "out", small, statistics=tmp_path / "statistics")
    assert not (tmp_path / "out").exists()


def test_absent_shards_are_refused(tmp_path):
    base = write_tiny(tmp_path / "base", "llama", shards=2)
    (base / "model-00002-of-00002.safetensors").unlink()
    assert_refused(base, {**STRIDE, "qk_dim": 8}, RefusedInput, "model-00002", tmp_path)


@pytest.mark.parametrize("kind", ["mllama", "gpt_neox", "no_such_family"])
def test_other_families_are_refused_by_name(kind, tmp_path):
    base = write_tiny(tmp_path / "base", "llama")
    text = json.loads((base / "config.json").read_text())
    wrapper = {"architectures": ["LlavaForConditionalGeneration"], "model_type": kind, "text_config": text}
    (base / "config.json").write_text(json.dumps(wrapper))
    assert_refused(base, {**STRIDE, "qk_dim": 8}, UnsupportedModel, "llama", tmp_path)


def test_plans_count_the_cache(tmp_path):
    base = write_tiny(tmp_path / "base", "llama", dtype=torch.bfloat16)
    for chosen, widths in (
        ({**STRIDE, "qk_dim": 4, "vo_dim": 8}, (4 + 8) * 2), ({**STRIDE, "kv_ratio": 0.5}, (8 + 8) * 2),
        ({"qk_dim": [2, 6], "vo_dim": [1, 16]}, 2 + 6 + 1 + 16), ({**STRIDE, "kv_ratio": 0.8}, (8 + 16) * 2),
    ):  # fmt: skip
        plan = surgery.plan(str(base), manifest(**chosen))
        assert plan.cache_bytes_before == 2 * 2 * 32 * 2
        assert plan.cache_bytes_after == 2 * widths * 2
    assert surgery.plan(str(base), manifest(kv_ratio=0.4)).cache_bytes_after <= 0.4 * 256


@pytest.mark.parametrize("rope", ["default", "linear", "llama3", "yarn", "dynamic"])
def test_only_tables_that_a_stride_leaves_exact_stay_stock(rope, tmp_path):
    base = write_tiny(tmp_path / "base", "llama", rope)
    plan = surgery.plan(str(base), manifest(method="stride", qk_dim=8, vo_dim=8))
    assert bool(plan.code) == (rope in {"yarn", "dynamic"})


def test_empty_quantization_config_is_none(tmp_path):
    base = write_tiny(tmp_path / "base", "llama", quantization_config=None)
    assert surgery.plan(str(base), manifest(method="stride", qk_dim=8)).cache_bytes_after == 2 * 2 * (8 + 16) * 4


def test_a_base_that_cannot_write_is_refused(tmp_path):
    def spoil(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][:] = math.nan

    base = rewrite(write_tiny(tmp_path / "base", "llama"), spoil)
    own = manifest_from_dict(
        {"surgery": 1, "operations": [{"kv_latent": {}}], "calibration": {"text": "self", "samples": 2, "length": 8}}
    )
    with pytest.raises(CorruptCheckpoint):
        surgery.convert(str(base), tmp_path / "out", own, statistics=tmp_path / "statistics")


def test_the_knee_is_where_the_best_widths_cost_what_is_allowed():
    # Two items of one head each; what a width costs is plain to add up by hand.
    costs = [{16: 0.0, 8: 0.02, 4: 0.3}, {16: 0.0, 8: 0.05, 4: 0.06}]
    assert predicted_cost(costs, [8, 4]) == pytest.approx(0.08)
    assert knee(costs, [1, 1], 0.1) == 0.4  # 8 + 4 of 32 is the least that stays within 0.1: 12 / 32 = 0.375
    assert knee(costs, [1, 1], 0.0) == 1.0
    assert knee(costs, [1, 1], 1.0) == 0.25


def test_a_model_past_its_knee_is_told_so(tmp_path):
    base = write_tiny(tmp_path / "base", "llama")
    checkpoint = open_checkpoint(base)
    facts = {
        "layers": [{"qk_dim": 8, "vo_dim": 8, "rope_pairs": [[0, 1, 2, 3]] * 2, "scaling": 0.25}] * 2,
        "shapes": {}, "output_bias": False, "knee": 0.85,
    }  # fmt: skip
    for cost, told in ((0.05, False), (0.4, True)):
        draft = open_draft(checkpoint)
        OPERATION.edit(draft, KVLatentSettings(), Statistics({}, facts | {"predicted_kl": cost}))
        assert any("past the knee" in note and "0.85" in note for note in draft.notes) == told
