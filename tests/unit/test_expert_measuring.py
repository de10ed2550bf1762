"""What is measured of experts, and what is made of it: layer by layer, budgets, mass, reuse, plans and explanations.

References are the masked models of moe_reference.py, run as they are, and every allocation there is.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.calibration import stage
from surgery.calibration.loading import causal_lm, loaded_model
from surgery.calibration.store import load_statistics
from surgery.checkpoint.journal import start_journal
from surgery.checkpoint.layout import lay_out
from surgery.checkpoint.reader import open_checkpoint
from surgery.checkpoint.writer import Job, write_shards
from surgery.errors import MissingPackage
from surgery.operations.base import Measuring, Statistics
from surgery.operations.expert_prune import OPERATION
from surgery.operations.expert_prune.decision import decide
from surgery.operations.expert_top_k import OPERATION as TOP_K
from surgery.operations.expert_top_k import ExpertTopKSettings
from surgery.planning import open_draft
from tests import moe_reference
from tests.expert_cases import put, spoilt
from tests.tiny import write_tiny
from tests.unit.test_expert_criteria import TOKENS, chosen, measure, model_of

SELF = {"text": "self", "samples": 4, "length": 16}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def manifest(*operations):
    return surgery.manifest_from_dict({"surgery": 1, "operations": list(operations), "verify": False, "calibration": SELF})


def prune(**settings):
    return manifest({"expert_prune": settings})


def network_of(base):
    return causal_lm(open_checkpoint(base), torch.float32).eval()


def logits(network, tokens=TOKENS):
    with torch.no_grad():
        return network(input_ids=tokens).logits.double().log_softmax(-1)


def divergence(expected, found):
    return float((expected.exp() * (expected - found)).sum(-1).mean())


# Layer by layer


def test_layers_are_measured_after_those_before_were_cut(tmp_path):
    base = write_tiny(tmp_path / "base", "qwen3_moe", experts=6)
    once, layered = measure(base, keep=3), measure(base, keep=3, statistics="layerwise")
    sums, after = once.tensors["sums"], layered.tensors["sums"]
    torch.testing.assert_close(after[0], sums[0], rtol=1e-9, atol=0)
    assert not torch.allclose(after[1], sums[1], rtol=1e-3)
    kept = decide(model_of(base), chosen(keep=3, statistics="layerwise", protect_super_experts=False), layered).kept[0]
    usage = [torch.zeros(6, dtype=torch.double) for _ in range(2)]
    masked = moe_reference.masked(network_of(base), {0: kept})
    for layer, _, router in moe_reference.moe_blocks(masked):


        def see(_, given, out, layer=layer):
            usage[layer].index_add_(0, out[2].flatten(), out[1].flatten().double())

        router.register_forward_hook(see)
    logits(masked)
    torch.testing.assert_close(after[1, 1, 0], usage[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sums[1, 1, 0], usage[1], rtol=1e-3)


# Spread by damage

SPREAD = {
    "olmoe": {"experts": 6, "top_k": 1, "num_hidden_layers": 3},
    "deepseek_v3": {"experts": 8, "top_k": 1, "n_group": 2, "topk_group": 1, "num_hidden_layers": 2},
}


@pytest.mark.parametrize("family", SPREAD)
def test_curves_are_the_damage_of_one_cut_layer(family, tmp_path):
    base = write_tiny(tmp_path, family, **SPREAD[family])
    layers, step = SPREAD[family]["num_hidden_layers"], SPREAD[family].get("n_group", 1)
    statistics = measure(base, allocation="measured")
    expected = logits(network_of(base), probes := TOKENS[-1:])
    for layer, curve in enumerate(statistics.facts["curves"]):
        sizes = [int(count) for count in curve]
        assert sizes == list(range(2 * step if step > 1 else 1, SPREAD[family]["experts"] + 1, step))
        for count in sizes[:-1:2]:
            kept = decide(model_of(base), chosen(keep=count), statistics).kept[layer]
            found = divergence(expected, logits(moe_reference.masked(network_of(base), {layer: kept}), probes))
            assert curve[str(count)] == pytest.approx(found, rel=1e-3, abs=1e-6)
        assert curve[str(sizes[-1])] == 0.0
    assert len(statistics.facts["curves"]) == layers


@pytest.mark.parametrize("share", [0.4, 0.5, 0.7])
@pytest.mark.parametrize("family", SPREAD)
def test_no_other_spread_does_less_damage(family, share, tmp_path):
    base = write_tiny(tmp_path / "base", family, **SPREAD[family])
    model, given = model_of(base), chosen(keep=share, allocation="measured")
    if OPERATION.refuses(model, given):
        pytest.skip("needs more experts")
    statistics = measure(base, allocation="measured")
    curves = [{int(count): cost for count, cost in curve.items()} for curve in statistics.facts["curves"]]
    layers, experts, step = len(curves), SPREAD[family]["experts"], SPREAD[family].get("n_group", 1)
    total = int(experts // step * share + 0.5) * step * layers
    fitting = [choice for choice in itertools.product(*curves) if sum(choice) <= total]
    best = min(sum(curve[count] for curve, count in zip(curves, choice, strict=True)) for choice in fitting)
    kept = decide(model, given, statistics).kept
    counts = [len(kept[layer]) for layer in range(layers)]
    assert sum(counts) <= total
    assert sum(curve[count] for curve, count in zip(curves, counts, strict=True)) == pytest.approx(best, rel=1e-12)
    for ids in kept.values():
        assert len({sum(expert * step // experts == group for expert in ids) for group in range(step)}) == 1


def test_a_size_is_kept_while_experts_are_spread(tmp_path):
    base = write_tiny(tmp_path / "base", "olmoe", **SPREAD["olmoe"])
    whole, expert = (base / "model.safetensors").stat().st_size, (3 * 64 * 96 + 64) * 4
    size = whole - 5 * expert - expert // 2
    given = prune(keep=f"{size / 1000:.3f}KB", allocation="measured")
    planned = surgery.plan(str(base), given)
    assert planned.estimated
    assert planned.code  # numbers will differ between layers
    done = surgery.convert(str(base), tmp_path / "out", given, statistics=tmp_path / "statistics")
    kept = done.lock["decisions"]["0.expert_prune"]["kept"]
    stored = sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / "model.safetensors").values())
    before = sum(tensor.nbytes for tensor in load_file(base / "model.safetensors").values())
    assert stored <= size
    assert before - stored == expert * (18 - sum(map(len, kept.values())))
    assert 10 <= sum(map(len, kept.values())) <= 12


# Mass

KEPT_MASS = {"olmoe": {}, "qwen2_moe": {}, "deepseek_v2": {}, "qwen3_moe": {"norm_topk_prob": False}}


def routed_mass(network, tokens):
    """By layer: mean over tokens of the summed weights."""
    found = {}
    for layer, _, router in moe_reference.moe_blocks(network):
        router.register_forward_hook(lambda _, given, out, layer=layer: found.__setitem__(layer, out[1].double().sum(-1).mean()))
    logits(network, tokens)
    return {layer: float(mass) for layer, mass in found.items()}


@pytest.mark.parametrize("family", KEPT_MASS)
def test_mass_factors_are_the_base_s_mass_over_the_new(family, tmp_path):
    base = write_tiny(tmp_path, family, experts=6, **KEPT_MASS[family])
    statistics = measure(base, keep=3, mass_correction=True)
    kept = dict(decide(model_of(base), chosen(keep=3), statistics).kept)
    fitting, judging = TOKENS[:-1], TOKENS[-1:]
    before = routed_mass(network_of(base), fitting)
    after = routed_mass(moe_reference.masked(network_of(base), kept), fitting)
    for layer, factor in statistics.facts["mass_factors"].items():
        assert factor == pytest.approx(before[int(layer)] / after[int(layer)], rel=1e-4)
        assert factor < 1  # what stays takes over what went
    corrected = moe_reference.masked(network_of(base), kept)
    for layer, block, _ in moe_reference.moe_blocks(corrected):
        block.experts.register_forward_hook(lambda _, given, out, f=statistics.facts["mass_factors"][str(layer)]: out * f)
    expected = logits(network_of(base), judging)
    without = divergence(expected, logits(moe_reference.masked(network_of(base), kept), judging))
    assert statistics.facts["mass_gain"] == pytest.approx(
        {"without": without, "with": divergence(expected, logits(corrected, judging))}, rel=1e-3, abs=1e-7
    )


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
def test_mass_factors_of_fewer_slots(family, tmp_path):
    base = write_tiny(tmp_path, family, experts=6, top_k=3)
    with loaded_model(open_checkpoint(base), "cpu") as network:
        given = ExpertTopKSettings(top_k=[1, 2], mass_correction=True)
        found = TOP_K.measure(Measuring(network, model_of(base), lambda name: None, TOKENS, 0), given).facts
    before = routed_mass(network_of(base), TOKENS[:-1])
    after = routed_mass(moe_reference.top_k(network_of(base), {0: 1, 1: 2}), TOKENS[:-1])
    for layer in range(2):
        assert found["mass_factors"][str(layer)] == pytest.approx(before[layer] / after[layer], rel=1e-4)
        assert found["mass_factors"][str(layer)] > 1


@pytest.mark.parametrize(("figures", "on"), [((0.5, 0.4), True), ((0.4, 0.5), False), ((0.4, 0.4), False)])
@pytest.mark.parametrize("operation", ["expert_prune", "expert_top_k"])
def test_the_correction_is_on_where_it_helps(operation, figures, on, monkeypatch, tmp_path):
    base = write_tiny(tmp_path / "base", "qwen2_moe")
    facts = {"mass_factors": {"0": 0.5, "1": 0.75}, "mass_gain": dict(zip(("without", "with"), figures, strict=True))}
    sums = {"sums": torch.ones(2, 3, 3, 4, dtype=torch.double), "peaks": torch.ones(2, 4, dtype=torch.double)}
    changed = {"keep": 2} if operation == "expert_prune" else {"top_k": 1}
    monkeypatch.setattr("surgery.stages.measure", lambda *_: Statistics(sums, {}))  # equals: 0 and 1 stay
    surgery.convert(str(base), tmp_path / "plain", manifest({operation: changed}))
    monkeypatch.setattr("surgery.stages.measure", lambda *_: Statistics(sums, facts))
    done = surgery.convert(str(base), tmp_path / "out", manifest({operation: changed | {"mass_correction": True}}))
    found, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    told = "divergence on held-out windows {:.4f} without and {:.4f} with it".format(*figures)
    assert f"{operation}: mass_correction is {'on' if on else 'left off'}, {told}" in done.plan.notes
    assert sum(".experts." in name for name in found) == 2 * 3 * (2 if operation == "expert_prune" else 4)
    for name in found:
        factor = {"0": 0.5, "1": 0.75}[name.split(".")[2]] if on and ".experts." in name and "down_proj" in name else 1.0
        assert torch.equal(found[name], plain[name] * factor), name


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
def test_folded_factors_scale_the_routed_output(family, tmp_path):
    base = write_tiny(tmp_path / "base", family)
    draft_facts = {"mass_factors": {"0": 0.6, "1": 1.7}, "mass_gain": {"without": 1.0, "with": 0.0}}
    draft = open_draft(open_checkpoint(base))
    TOP_K.edit(draft, ExpertTopKSettings(top_k=1, mass_correction=True), Statistics({}, draft_facts))
    shutil.copytree(base, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    checkpoint = open_checkpoint(base)
    shards = lay_out(checkpoint, draft.tensors, None)
    write_shards(Job(checkpoint, tmp_path / "out", "", start_journal(tmp_path, "test")), shards)
    found = zip(*(moe_reference.moe_blocks(network_of(tmp_path / name)) for name in ("base", "out")), strict=True)
    hidden = torch.randn(9, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for (layer, plain, router), (_, scaled, _) in found:
            _, weights, ids = router(hidden)
            outputs = [block.experts(hidden, ids, weights) for block in (plain, scaled)]
            torch.testing.assert_close(outputs[1], outputs[0] * draft_facts["mass_factors"][str(layer)], rtol=1e-5, atol=1e-6)


# One measurement for many results


@pytest.fixture
def loads(monkeypatch):
    """How often a model was loaded to be measured."""
    counted = []
    whole = stage.loaded_model
    monkeypatch.setattr(stage, "loaded_model", lambda *given: (counted.append(given[0].folder), whole(*given))[1])
    return counted


SERVED = [
    {"keep": 2}, {"keep": 3}, {"keep": 0.5, "criterion": "man"}, {"keep": [2, 3]}, {"criterion": {"b": 1, "alpha": 2, "beta": 2}},
    {"keep": 2, "protect_super_experts": False}, {"keep": 2, "fallback": "man", "min_tokens": 7}, {"keep": "300KB"},
]  # fmt: skip


def test_one_measurement_serves_every_keep_and_criterion(loads, tmp_path):
    base = write_tiny(tmp_path / "base", "qwen3_moe")
    for number, settings in enumerate(SERVED):
        surgery.convert(str(base), tmp_path / f"{number}", prune(**settings), statistics=tmp_path / "statistics")
        assert not surgery.plan(str(base), prune(**settings), statistics=tmp_path / "statistics").estimated
    assert len(loads) == 1
    (stored,) = (tmp_path / "statistics").iterdir()
    for settings in ({"keep": 2, "statistics": "layerwise"}, {"keep": 3, "statistics": "layerwise"}):
        surgery.convert(str(base), tmp_path / f"{settings['keep']} layerwise", prune(**settings), statistics=tmp_path / "statistics")
    assert len(loads) == 3
    for criterion in ("aimer", "router_norm", "random"):
        surgery.convert(str(base), tmp_path / criterion, prune(keep=2, criterion=criterion), statistics=tmp_path / "statistics")
    assert len(loads) == 3

    copied = shutil.copytree(base, tmp_path / "copied")
    for file in copied.iterdir():
        os.utime(file, (1e9, 1e9))
    surgery.convert(str(copied), tmp_path / "by file", prune(keep=2), statistics=stored)
    assert len(loads) == 3
    assert (tmp_path / "by file" / "model.safetensors").read_bytes() == (tmp_path / "0" / "model.safetensors").read_bytes()
    surgery.convert(str(copied), tmp_path / "by folder", prune(keep=2), statistics=tmp_path / "statistics")
    assert len(loads) == 4


def test_measured_budgets_share_their_curves(loads, tmp_path):
    base = write_tiny(tmp_path / "base", "qwen3_moe", experts=6)
    for number, keep in enumerate((0.5, 4, 0.7)):
        surgery.convert(str(base), tmp_path / f"{number}", prune(keep=keep, allocation="measured"), statistics=tmp_path / "s")
    assert len(loads) == 1


# Plans


def test_plans_know_what_was_measured(tmp_path):
    base = write_tiny(tmp_path / "base", "olmoe", experts=6)
    before = surgery.plan(str(base), prune(keep=3))
    assert before.estimated
    assert not any("router mass" in note for note in before.notes)
    surgery.convert(str(base), tmp_path / "out", prune(keep=2), statistics=tmp_path / "statistics")
    (stored,) = (tmp_path / "statistics").iterdir()
    soft = load_statistics(stored).tensors["sums"][:, 1, 0]
    for place in (stored, tmp_path / "statistics"):
        plan = surgery.plan(str(base), prune(keep=3, criterion="soft_count", protect_super_experts=False), statistics=place)
        assert not plan.estimated
        shares = [float(row.sort(descending=True).values[:3].sum() / row.sum()) for row in soft]
        mean, least = sum(shares) / 2, shares.index(min(shares))
        told = f"router mass kept on the calibration text: {mean:.3f}, least in layer {least}: {min(shares):.3f}"
        assert told in plan.notes
    assert plan.bytes_written == before.bytes_written


PARTS = 2 * 64 * 128 + 64  # embedding, head, last norm
ACTIVE = [
    # attention and norms, router per expert, one expert, shared
    ("qwen3_moe", {}, 2 * 64 * 64 + 2 * 64 * 32 + 2 * 16 + 2 * 64, 64, 3 * 64 * 32, 0),
    ("mixtral", {}, 2 * 64 * 64 + 2 * 64 * 32 + 2 * 64, 64, 3 * 64 * 96, 0),
    ("qwen2_moe", {}, 2 * 64 * 64 + 2 * 64 * 32 + 128 + 2 * 64, 64, 3 * 64 * 32, 3 * 64 * 48 + 64),
    ("gpt_oss", {}, 2 * 64 * 64 + 2 * 64 * 32 + 192 + 4 + 2 * 64, 65, 3 * 64 * 96 + 2 * 96 + 64, 0),
    ("glm4_moe", {"mtp": True}, 2 * 64 * 64 + 2 * 64 * 32 + 128 + 2 * 16 + 2 * 64, 65, 3 * 64 * 32, 3 * 64 * 32),
]  # fmt: skip


@pytest.mark.parametrize(("family", "options", "around", "router", "expert", "shared"), ACTIVE, ids=lambda v: v if isinstance(v, str) else "")
def test_active_parameters_are_counted(family, options, around, router, expert, shared, tmp_path):
    base = write_tiny(tmp_path / "base", family, experts=6, **options)

    def active(experts, taken):
        return PARTS + 2 * (around + shared + experts * router + taken * expert)

    for operations, after in (
        ([{"expert_prune": {"keep": 3, "criterion": "random"}}], active(3, 2)),
        ([{"expert_top_k": {"top_k": 1}}], active(6, 1)),
        ([{"expert_top_k": {"top_k": 1}}, {"expert_prune": {"keep": 2, "criterion": "random"}}], active(2, 1)),
        ([{"expert_top_k": {"top_k": [1, 2]}}], (active(6, 1) + active(6, 2)) // 2),
        ([], active(6, 2)),
    ):
        plan = surgery.plan(str(base), manifest(*operations))
        assert (plan.active_before, plan.active_after) == (active(6, 2), after)


def test_dense_models_have_no_active_parameters(tmp_path):
    plan = surgery.plan(str(write_tiny(tmp_path, "llama")), manifest())
    assert plan.active_before is plan.active_after is None


# Explanations


def test_explanations_are_written_beside_the_result(tmp_path):
    import matplotlib.image

    base = write_tiny(tmp_path / "base", "deepseek_v3", experts=6, num_hidden_layers=2)
    spoilt(base, put("model.layers.1.mlp.gate.e_score_correction_bias", -1e9, 4))

    def grow(tensors):
        tensors["model.layers.0.mlp.experts.2.down_proj.weight"] *= 1e4

    spoilt(base, grow)
    done = surgery.convert(str(base), tmp_path / "out", prune(keep=3, criterion="frequency"), explain=True, statistics=tmp_path / "s")
    (stored,) = (tmp_path / "s").iterdir()
    tokens = load_statistics(stored).tensors["sums"][:, 0, 0]
    found = json.loads((tmp_path / "out.0.expert_prune.json").read_text())
    assert found["criterion"] == "frequency"
    kept = done.lock["decisions"]["0.expert_prune"]["kept"]
    for layer, at in enumerate(found["layers"]):
        assert at["layer"] == layer
        assert at["kept"] == kept[str(layer)]
        assert sorted(at["kept"] + at["dropped"]) == list(range(6))
        assert at["tokens"] == at["scores"] == tokens[layer].tolist()
        assert at["never_routed"] == [expert for expert in range(6) if tokens[layer, expert] == 0]
    assert 4 in found["layers"][1]["never_routed"]
    assert found["layers"][0]["super_experts"] == [2]
    assert found["layers"][1]["super_experts"] == []
    assert 2 in kept["0"]
    told = done.explanations["0.expert_prune"]
    assert len(told.rows) == 2
    assert all(len(row) == len(told.headers) for row in told.rows)
    first = dict(zip(told.headers, told.rows[0], strict=True))
    assert first["kept"] == " ".join(map(str, kept["0"]))
    assert first["super"] == "2"
    assert "4" in dict(zip(told.headers, told.rows[1], strict=True))["never routed"].split()
    assert told.lines[0] == f"{int((tokens == 0).sum())} experts got no calibration token"
    picture = tmp_path / "out.0.expert_prune.png"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = matplotlib.image.imread(picture)
    assert min(pixels.shape[:2]) > 100
    assert len({tuple(pixel) for pixel in pixels.reshape(-1, pixels.shape[-1])[::7].tolist()}) > 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "out.0.expert_prune.json", "out.0.expert_prune.png", "s"]


@pytest.mark.parametrize("criterion", ["random", "reap"])
def test_unused_experts_are_told_apart_from_poor_ones(criterion, tmp_path):
    base = write_tiny(tmp_path / "base", "deepseek_v3")
    spoilt(base, put("model.layers.1.mlp.gate.e_score_correction_bias", -1e9, 3))
    surgery.convert(str(base), tmp_path / "out", prune(keep=2, criterion=criterion), explain=True, statistics=tmp_path / "s")
    at = json.loads((tmp_path / "out.0.expert_prune.json").read_text())["layers"][1]
    assert (at["scores"][3] is None) == (criterion == "reap")
    assert at["never_routed"] == ([e for e, n in enumerate(at["tokens"]) if n == 0] if criterion == "reap" else [])


def test_without_matplotlib_nothing_is_begun(monkeypatch, loads, tmp_path):
    base = write_tiny(tmp_path / "base", "qwen3_moe")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackage, match="matplotlib") as caught:
        surgery.convert(str(base), tmp_path / "out", prune(keep=2), explain=True, statistics=tmp_path / "statistics")
    assert caught.value.exit_code == 4
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert loads == []
    surgery.convert(str(base), tmp_path / "out", prune(keep=2), statistics=tmp_path / "statistics")
