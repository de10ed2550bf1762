"""Which experts `expert_prune` keeps, and how many: scores, ties, groups, protection, shares, sizes, schedules.

References are written out here: tokens one by one, formulas in float64, all subsets, sums by hand.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from safetensors.torch import load_file

import surgery
from surgery.calibration.loading import loaded_model
from surgery.checkpoint.evaluate import load
from surgery.checkpoint.reader import open_checkpoint
from surgery.operations.base import Measuring, Statistics
from surgery.operations.expert_prune import OPERATION
from surgery.operations.expert_prune.decision import decide
from surgery.operations.expert_prune.settings import ExpertPruneSettings
from surgery.operations.expert_top_k import Schedule
from surgery.operations.experts.criteria import FAMILY, Weighting, calibrated_scores, choose, random_scores
from surgery.planning import open_draft
from tests.moe_reference import moe_blocks
from tests.tiny import write_fp8, write_tiny

DOUBLE = torch.float64
TOKENS = torch.randint(3, 128, (5, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def model_of(base):
    return open_draft(open_checkpoint(base)).model


def chosen(**settings):
    return ExpertPruneSettings.model_validate(settings)


def measure(base, tokens=TOKENS, **given):
    """What the operation measures on exactly these tokens; the model runs only where settings need it."""
    checkpoint, wanted = open_checkpoint(base), chosen(**given)

    def tensor(name):
        return load(checkpoint, checkpoint.tensors[name])

    if wanted.weights_only:
        return OPERATION.measure(Measuring(None, model_of(base), tensor, torch.empty(0, 0), 0), wanted)
    with loaded_model(checkpoint, "cpu") as network:
        return OPERATION.measure(Measuring(network, model_of(base), tensor, tokens, 0), wanted)


def convert(base, out, operations, **options):
    given = {"surgery": 1, "operations": operations, "verify": False, "calibration": {"text": "self", "samples": 4, "length": 16}}
    return surgery.convert(str(base), out, surgery.manifest_from_dict(given), **options)


# Scores of tokens


def used(base, tokens=TOKENS):
    """By layer and expert: (weight, output) of every token that takes it, the experts computed from stored matrices."""
    stored = {name: tensor.to(DOUBLE) for name, tensor in load_file(base / "model.safetensors").items()}
    found = {}
    with loaded_model(open_checkpoint(base), "cpu") as network, torch.no_grad():
        entering = {}
        for layer, block, _ in moe_blocks(network):
            block.register_forward_pre_hook(lambda _, given, layer=layer: entering.__setitem__(layer, given[0]))
        network(input_ids=tokens)
        for layer, _, router in moe_blocks(network):
            hidden = entering[layer].flatten(0, 1)
            _, weights, ids = router(hidden)
            found[layer] = {expert: [] for expert in range(len(router.weight))}
            for token, row, at in zip(hidden.to(DOUBLE), weights, ids, strict=True):
                for weight, expert in zip(row.tolist(), at.tolist(), strict=True):
                    gate, up, down = (
                        stored[f"model.layers.{layer}.mlp.experts.{expert}.{p}_proj.weight"] for p in ("gate", "up", "down")
                    )
                    out = down @ (torch.nn.functional.silu(gate @ token) * (up @ token))
                    found[layer][expert].append((weight, out))
    return found


# By name, as the papers write them: what one token adds, and whether the mean is taken.
DEFINITIONS = {
    "frequency": (lambda g, f: 1.0, False),
    "soft_count": (lambda g, f: g, False),
    "ean": (lambda g, f: f, False),
    "reap": (lambda g, f: g * f, True),
    "man": (lambda g, f: f, True),
    "msan": (lambda g, f: f**2, True),
    "task": (lambda g, f: g * f, False),
    "task_squared": (lambda g, f: g**2 * f**2, False),
}


def definition(criterion, tokens):
    if isinstance(criterion, Weighting):
        adds, mean = (lambda g, f: g**criterion.alpha * f**criterion.beta), bool(criterion.b)
    else:
        adds, mean = DEFINITIONS[criterion]
    if mean and not tokens:
        return -math.inf
    return sum(adds(g, float(f.norm())) for g, f in tokens) / (len(tokens) if mean else 1)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_scores_are_their_definitions(family, tmp_path):
    base = write_tiny(tmp_path, family, experts=6, top_k=2)
    statistics, by_hand = measure(base), used(base)
    for layer in range(2):
        for expert, tokens in by_hand[layer].items():
            peak = max((float(out.abs().max()) for _, out in tokens), default=0.0)
            assert float(statistics.tensors["peaks"][layer, expert]) == pytest.approx(peak, rel=1e-5)
            assert int(statistics.tensors["sums"][layer, 0, 0, expert]) == len(tokens)
    members = [Weighting(b=b, alpha=alpha, beta=beta) for b in (0, 1) for alpha in range(3) for beta in range(3)]
    for criterion in [*DEFINITIONS, *members]:
        wanted = {layer: [definition(criterion, tokens) for tokens in by_hand[layer].values()] for layer in range(2)}
        given = chosen(keep=3, criterion=criterion, protect_super_experts=False)
        decision = decide(model_of(base), given, statistics)
        for layer in range(2):
            assert decision.scores[layer] == pytest.approx(wanted[layer], rel=1e-5)
            best = sorted(range(6), key=lambda expert: -wanted[layer][expert])
            if wanted[layer][best[2]] > wanted[layer][best[3]] * (1 + 1e-4):
                assert decision.kept[layer] == sorted(best[:3])
            mass = [sum(weight for weight, _ in tokens) for tokens in by_hand[layer].values()]
            assert decision.mass[layer] == pytest.approx(sum(mass[e] for e in decision.kept[layer]) / sum(mass), rel=1e-5)
    assert set(DEFINITIONS) == set(FAMILY)


def test_an_expert_that_nobody_takes_goes_first():
    sums = torch.rand(1, 3, 3, 4, dtype=DOUBLE) + 1
    sums[..., 2] = 0.0
    for name, weighting in FAMILY.items():
        scores = calibrated_scores(sums, weighting)[0]
        assert scores[2] == (-math.inf if DEFINITIONS[name][1] else 0.0)
        assert 2 not in choose(scores, 3, 1, frozenset())


@settings(max_examples=200, deadline=None)
@given(some.data())
def test_the_best_of_each_group_stay_and_the_first_of_equals(data):
    groups, size = data.draw(some.integers(1, 3)), data.draw(some.integers(1, 4))
    per_group = data.draw(some.integers(1, size))
    worth = some.sampled_from([-math.inf, 0.0, 1.0, 2.5])
    scores = data.draw(some.lists(worth, min_size=groups * size, max_size=groups * size))
    protected = data.draw(some.frozensets(some.integers(0, groups * size - 1)))
    wanted = []
    for group in range(groups):
        ids = range(group * size, (group + 1) * size)
        # Of all subsets: most super experts, then the best scores from the top, then the lowest ids.
        wanted += min(
            itertools.combinations(ids, per_group),
            key=lambda kept: (-len(protected & {*kept}), sorted(-scores[e] for e in kept if e not in protected),
                              sorted(-scores[e] for e in kept if e in protected), kept),
        )  # fmt: skip
    assert choose(scores, groups * per_group, groups, protected) == sorted(wanted)


def test_ties_by_hand():
    assert choose([1.0] * 4, 2, 1, frozenset()) == [0, 1]
    assert choose([0.0, 2.0, 1.0, 1.0], 2, 1, frozenset()) == [1, 2]
    assert choose([5.0, 4.0, 9.0, 9.0, 0.0, 1.0, 8.0, 8.0], 4, 2, frozenset()) == [2, 3, 6, 7]
    assert choose([5.0, 4.0, 9.0, 9.0], 2, 1, frozenset({1})) == [1, 2]


def test_a_die_is_thrown_once_per_layer_and_seed(tmp_path):
    throws = {(seed, layer): tuple(random_scores(seed, layer, 16)) for seed in range(3) for layer in range(3)}
    assert len({*throws.values()}) == 9
    assert throws == {at: tuple(random_scores(*at, 16)) for at in throws}
    base = write_tiny(tmp_path / "base", "qwen3_moe", experts=16)
    kept = []
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        done = convert(base, tmp_path / name, [{"expert_prune": {"keep": 8, "criterion": "random", "seed": seed}}])
        kept.append(done.lock["decisions"]["0.expert_prune"]["kept"])
    assert kept[0] == kept[1] != kept[2]
    assert kept[0]["0"] != kept[0]["1"]
    first, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "again"))
    assert first == again


# Scores of weights


def dequantised(name, stored):
    """A matrix in float64, FP8 block by block."""
    matrix, scales = stored[name].to(DOUBLE), stored.get(f"{name}_scale_inv")
    if scales is None:
        return matrix
    for row, column in itertools.product(*map(range, scales.shape)):
        matrix[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128] *= scales[row, column].to(DOUBLE)
    return matrix


def matrices(family, stored, layer, expert):
    at = f"model.layers.{layer}"
    if family == "gpt_oss":
        return [stored[f"{at}.mlp.experts.{p}"][expert].to(DOUBLE) for p in ("gate_up_proj", "down_proj")]
    if family == "granitemoe":
        return [stored[f"{at}.block_sparse_moe.{p}_linear.weight"][expert].to(DOUBLE) for p in ("input", "output")]
    block, parts = ("block_sparse_moe", ("w1", "w3", "w2")) if family == "mixtral" else ("mlp", ("gate_proj", "up_proj", "down_proj"))
    return [dequantised(f"{at}.{block}.experts.{expert}.{p}.weight", stored) for p in parts]


ROUTERS = {"mixtral": "block_sparse_moe.gate", "gpt_oss": "mlp.router", "granitemoe": "block_sparse_moe.router.layer"}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "deepseek_v3", "fp8"])
def test_scores_of_weights_are_their_definitions(family, tmp_path):
    wide = {"hidden_size": 192, "moe_intermediate_size": 160, "experts": 6}
    base = write_fp8(tmp_path, **wide) if family == "fp8" else write_tiny(tmp_path, family, experts=6, dtype=torch.bfloat16)
    stored = load_file(base / "model.safetensors")
    for layer in range(2):
        aimer = []
        for expert in range(6):
            whole = torch.cat([matrix.flatten() for matrix in matrices(family, stored, layer, expert)])
            aimer.append(float(whole.abs().sum() / (len(whole) * whole.square().sum()).sqrt()))
        router = stored[f"model.layers.{layer}.{ROUTERS.get(family, 'mlp.gate')}.weight"].to(DOUBLE)
        norms = [math.sqrt(sum(value**2 for value in row)) for row in router.tolist()]
        for criterion, wanted in (("aimer", [-ratio for ratio in aimer]), ("router_norm", norms)):
            decision = decide(model_of(base), chosen(keep=2, criterion=criterion), measure(base, criterion=criterion))
            assert decision.scores[layer] == pytest.approx(wanted, rel=1e-6)
            assert decision.kept[layer] == sorted(sorted(range(6), key=lambda expert: -wanted[expert])[:2])


# Super experts, and too few tokens


def statistics_of(peaks, sums=None):
    layers, experts = len(peaks), len(peaks[0])
    sums = torch.ones(layers, 3, 3, experts, dtype=DOUBLE) if sums is None else sums
    return Statistics({"sums": sums, "peaks": torch.tensor(peaks, dtype=DOUBLE)}, {})


@pytest.mark.parametrize(("layer", "held"), [(0, True), (1, True), (2, True), (3, False)])
def test_super_experts_of_the_first_three_quarters_stay(layer, held, tmp_path):
    base = write_tiny(tmp_path, "qwen3_moe", num_hidden_layers=4, experts=8)
    peaks = [[1.0] * 8 for _ in range(4)]
    peaks[layer][7] = 1000.0
    sums = torch.arange(8, 0, -1, dtype=DOUBLE).expand(4, 3, 3, 8).clone()  # expert 7 is worth least
    sums[:, 0, 0] = 1
    for protect in (True, False):
        decision = decide(model_of(base), chosen(keep=3, protect_super_experts=protect), statistics_of(peaks, sums))
        plain = [0, 1, 2]
        assert decision.kept == {at: [0, 1, 7] if at == layer and held and protect else plain for at in range(4)}
        assert {at: ids for at, ids in decision.protected.items() if ids} == ({layer: {7}} if held and protect else {})


@pytest.mark.parametrize(
    ("three", "protected"),
    [
        # Of 4 x 64 peaks the 99.5th percentile lies 0.725 of the way from the third largest to the second.
        ((1000.0, 151.0, 150.0), {5, 6}),
        ((1000.0, 150.0, 150.0), {5}),
        ((1000.0, 99.0, 98.0), {5}),  # above the percentile, and below a tenth of the largest
        ((1.0, 1.0, 1.0), set()),
    ],
)
def test_super_experts_stand_out_twice(three, protected, tmp_path):
    base = write_tiny(tmp_path, "qwen3_moe", num_hidden_layers=4, experts=64)
    peaks = [[1.0] * 64 for _ in range(4)]
    peaks[0][5:8] = three
    assert decide(model_of(base), chosen(keep=8), statistics_of(peaks)).protected[0] == protected


def test_layers_with_too_few_tokens_fall_back(tmp_path):
    base = write_tiny(tmp_path, "qwen3_moe")
    sums = torch.ones(2, 3, 3, 4, dtype=DOUBLE)
    sums[:, 0, 0] = torch.tensor([[200, 200, 99, 200], [200, 200, 100, 200]])
    sums[:, 1, 1] = torch.tensor([4.0, 3.0, 2.0, 1.0]) * sums[:, 0, 0]  # reap keeps 0 and 1
    sums[:, 0, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0]) * sums[:, 0, 0]  # man keeps 2 and 3
    for fallback, wanted in (("man", {0: [2, 3], 1: [0, 1]}), (None, {0: [0, 1], 1: [0, 1]})):
        decision = decide(model_of(base), chosen(keep=2, criterion="reap", fallback=fallback), statistics_of([[1.0] * 4] * 2, sums))
        assert decision.kept == wanted
        assert decision.fell_back == ({0} if fallback else set())
        assert decision.scores[1] == [4.0, 3.0, 2.0, 1.0]
    draft = open_draft(open_checkpoint(base))
    OPERATION.edit(draft, chosen(keep=2, fallback="man"), statistics_of([[1.0] * 4] * 2, sums))
    told = next(note for note in draft.notes if "fewer than" in note)
    assert "1 experts got fewer than 100 calibration tokens (layer 0 expert 2: 99)" in told
    assert told.endswith("ranked by man")


# How many


def kept_numbers(base, keep, **more):
    model = model_of(base)
    given = chosen(keep=keep, criterion="random", **more)
    assert OPERATION.refuses(model, given) is None
    return {len(ids) for ids in decide(model, given, None).kept.values()}


@pytest.mark.parametrize(
    ("experts", "groups", "share", "number"),
    [
        (8, 1, 0.5, 4), (8, 1, 0.3, 2), (8, 1, 0.3125, 3), (8, 1, 0.3124, 2), (5, 1, 0.5, 3), (5, 1, 0.49, 2), (7, 1, 0.75, 5),
        (8, 2, 0.6, 4), (8, 2, 0.625, 6), (8, 2, 0.75, 6), (12, 3, 0.5, 6), (12, 2, 0.75, 10),
    ],
)  # fmt: skip
def test_shares_are_rounded_within_each_group(experts, groups, share, number, tmp_path):
    base = write_tiny(tmp_path, "deepseek_v3", experts=experts, n_group=groups, topk_group=groups, top_k=1)
    assert kept_numbers(base, share) == {number}


SIZED = {
    "qwen3_moe": ({}, 1), "mixtral": ({}, 1), "qwen2_moe": ({}, 1), "gpt_oss": ({}, 1), "granitemoe": ({}, 1),
    "deepseek_v3": ({"n_group": 2, "topk_group": 2, "mtp": True}, 2), "glm4_moe": ({"first_k_dense_replace": 1, "mtp": True}, 1),
}  # fmt: skip


def tensor_bytes(folder):
    return sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())


@pytest.mark.parametrize("drafts", ["prune", "drop"])
@pytest.mark.parametrize("family", SIZED)
def test_a_size_is_the_most_that_fits(family, drafts, tmp_path):
    options, step = SIZED[family]
    base = write_tiny(tmp_path / "base", family, experts=8, top_k=1, **options)
    sizes = {}
    for number in range(2 * step, 8, step):
        operation = {"expert_prune": {"keep": number, "criterion": "random", "drafts": drafts}}
        convert(base, tmp_path / f"{number}", [operation])
        sizes[number] = tensor_bytes(tmp_path / f"{number}")
    for number in list(sizes)[1:]:
        assert kept_numbers(base, f"{sizes[number] / 1000:.3f}KB", drafts=drafts) == {number}
        assert kept_numbers(base, f"{(sizes[number] - 1) / 1000:.3f}KB", drafts=drafts) == {number - step}


# Schedules

PAPER = [6, 6, 6, 7, 7, 7, 7, 7, 8, 8, 8, 8, 7, 7, 7, 7, 6, 6, 6, 6, 5, 5, 5, 5, 4, 4]


@pytest.mark.parametrize(
    ("first", "peak", "last", "at", "layers", "wanted"),
    [
        (6, 8, 4, 10, 26, PAPER),
        (4, 4, 4, 3, 6, [4] * 6),
        (2, 1, 2, 2, 5, [2, 2, 1, 2, 2]),  # 1.5 is 2, whichever way the line goes
        (1, 2, 1, 2, 5, [1, 2, 2, 2, 1]),
        (6, 2, 4, 0, 3, [2, 3, 4]),  # at the first layer `peak` holds
        (6, 2, 4, 2, 3, [6, 4, 2]),  # and at the last
        (6, 5, 4, 0, 1, [5]),
        (8, 5, 2, 1, 2, [8, 5]),
    ],
)
def test_schedules_by_hand(first, peak, last, at, layers, wanted):
    assert Schedule(first=first, peak=peak, last=last, at=at).resolve(layers) == wanted


@settings(max_examples=200, deadline=None)
@given(some.tuples(*[some.integers(1, 16)] * 3), some.data())
def test_schedules_are_two_lines(numbers, data):
    first, peak, last = numbers
    layers = data.draw(some.integers(1, 70))
    at = data.draw(some.integers(0, layers - 1))
    for layer, found in enumerate(Schedule(first=first, peak=peak, last=last, at=at).resolve(layers)):
        start, end, place = (first, peak, Fraction(layer, at or 1)) if layer < at else (peak, peak, Fraction(0))
        if layer > at:
            start, end, place = peak, last, Fraction(layer - at, layers - 1 - at)
        assert found == math.floor(start + (end - start) * place + Fraction(1, 2))
