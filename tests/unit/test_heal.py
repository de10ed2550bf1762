"""The pieces of healing: losses against their formulas, groups, low-rank factors, rates, settings, curves."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from surgery.architectures import Model, architectures
from surgery.errors import EnvironmentFailure, ManifestError, MissingPackage, TrainingDiverged, UsageError
from surgery.manifest import manifest_from_dict
from surgery.metrics.plots import require_plots
from surgery.operations.heal import HealSettings, selection
from surgery.sizes import parse_count
from surgery.training import adapters, curves, losses
from surgery.training.groups import GROUPS, Rank, group_of, layer_names, select
from surgery.training.run import divided, judge, optimizers, rate_factor, set_rate
from tests.tiny import FAMILIES, tiny_config, tiny_tensors

P, Q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])


def brute_kl(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> float:
    """Sum over positions, in float64, of the definition."""
    p = (teacher.double() / temperature).softmax(-1)
    q = (student.double() / temperature).softmax(-1)
    return float((p * (p / q).log()).sum())


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(2, 5, 11, generator=generator), 3 * torch.randn(2, 5, 11, generator=generator)


def test_kl_of_a_pair_computed_by_hand():
    assert losses.kl(P.log()[None, None], Q.log()[None, None]).item() == pytest.approx(0.08512, abs=1e-5)
    assert losses.kl(P.log()[None, None], P.log()[None, None]).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
def test_kl_is_its_definition_times_the_square_of_the_temperature(logits, temperature):
    expected = brute_kl(*logits, temperature) * temperature**2 / 10
    assert losses.kl(*logits, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_the_square_keeps_the_gradient_s_size():
    """For large temperatures the gradient tends to (z - v) / V with centred logits (Hinton et al., equation 4)."""
    teacher, student = torch.randn(1, 1, 7), torch.randn(1, 1, 7).requires_grad_()
    losses.kl(teacher, student, 1000.0).backward()
    centred = (student - student.mean()) - (teacher - teacher.mean())
    assert torch.allclose(student.grad, centred.detach() / 7, atol=1e-3)


def test_the_paper_s_kl_sums_over_positions_and_lacks_the_square(logits):
    assert losses.paper_kl(*logits, 10.0).item() == pytest.approx(brute_kl(*logits, 10.0) / 2, rel=1e-5)


def test_large_logits_are_summed_in_chunks_with_equal_gradients(logits, monkeypatch):
    teacher, student = logits
    whole = student.clone().requires_grad_()
    losses.kl(teacher, whole).backward()
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 33)
    parts = student.clone().requires_grad_()
    value = losses.kl(teacher, parts)
    value.backward()
    assert value.item() == pytest.approx(losses.kl(teacher, student).item(), rel=1e-6)
    assert torch.allclose(parts.grad, whole.grad, atol=1e-7)


def test_stored_kl_with_all_tokens_but_one_is_exact_and_with_fewer_a_lower_bound(logits):
    teacher, student = logits
    exact = losses.kl(teacher, student).item()
    bounds = [losses.stored_kl(*losses.top_log_probabilities(teacher, k), student).item() for k in (1, 3, 6, 10)]
    assert bounds == sorted(bounds)
    assert bounds[-1] == pytest.approx(exact, rel=1e-4)
    assert bounds[0] < exact


def test_stored_kl_is_the_divergence_of_the_merged_outcomes():
    values, tokens = losses.top_log_probabilities(P.log()[None, None], 1)
    expected = 0.7 * math.log(0.7 / 0.5) + 0.3 * math.log(0.3 / 0.5)
    assert losses.stored_kl(values, tokens, Q.log()[None, None]).item() == pytest.approx(expected, rel=1e-5)


def test_stored_kl_has_finite_gradients_where_nothing_is_left():
    teacher, student = torch.tensor([[[50.0, 0.0, 0.0]]]), torch.tensor([[[60.0, 0.0, 0.0]]]).requires_grad_()
    losses.stored_kl(*losses.top_log_probabilities(teacher, 3), student).backward()
    assert student.grad.isfinite().all()


def test_next_token_looks_one_ahead(logits):
    tokens = torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
    log = logits[0].double().log_softmax(-1)
    expected = -sum(log[b, t, tokens[b, t + 1]] for b in range(2) for t in range(4)) / 8
    assert losses.next_token(logits[0], tokens).item() == pytest.approx(float(expected), rel=1e-6)


def model_of(family: str) -> Model:
    config = tiny_config(family)
    return Model(architectures()[family], config, {n: tuple(t.shape) for n, t in tiny_tensors(config).items()})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_has_one_group(family):
    model = model_of(family)
    by_group = {group: set(select(model, [group]).full) for group in GROUPS if group != "all"}
    assert set().union(*by_group.values()) == set(model.shapes) == set(select(model, ["all"]).full)
    assert sum(map(len, by_group.values())) == len(model.shapes)
    assert by_group["embeddings"] == {"model.embed_tokens.weight"}
    assert by_group["head"] == {"lm_head.weight"}
    assert {name for name in model.shapes if "norm" in name} == by_group["norms"]
    assert all(".self_attn." in name for name in by_group["attention"])
    assert by_group["attention"]
    routers = {"mixtral": 2, "qwen2_moe": 4, "qwen3_moe": 2, "olmoe": 2}
    assert len(by_group["router"]) == routers.get(family, 0)
    assert all(name.split(".")[3] in {"mlp", "block_sparse_moe"} for name in by_group["mlp"] | by_group["router"])


def test_what_is_trained_in_full_gets_no_factors():
    model = model_of("llama")
    found = select(model, ["attention"], [(Rank(4, 8), ["attention", "mlp"])])
    assert not set(found.full) & set(found.lora)
    assert set(found.lora) == {name for name in model.shapes if ".mlp." in name}
    assert sorted(layer_names(model, found.names, 1)) == sorted(n for n in found.names if n.startswith("model.layers.1."))
    assert group_of(model, "model.layers.1.self_attn.q_proj.bias") == "attention"


def test_factors_start_without_effect_and_merge_exactly():
    torch.manual_seed(0)
    block = nn.ModuleDict({"up": nn.Linear(6, 9), "down": nn.Linear(9, 6), "other": nn.Linear(6, 6)})
    x = torch.randn(3, 6)

    def run(module: nn.ModuleDict) -> torch.Tensor:
        return module["down"](module["up"](x).relu()) + module["other"](x)

    before = run(block)
    ranks = {"up.weight": Rank(2, 5.0), "down.weight": Rank(3, 1.0)}
    plain = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    adapters.attach(block, ranks)
    assert torch.equal(run(block), before)
    factors = {name: p for name, p in block.named_parameters() if adapters.is_factor(name)}
    assert len(factors) == 4
    with torch.no_grad():
        for parameter in factors.values():
            parameter.normal_()
    unmerged = run(block)
    found = dict(adapters.merged(dict(block.named_parameters()), ranks))
    up = plain["up.weight"] + 5.0 / 2 * factors["up.lora_B.default.weight"] @ factors["up.lora_A.default.weight"]
    assert torch.allclose(found["up.weight"], up, atol=1e-6)
    fresh = nn.ModuleDict({"up": nn.Linear(6, 9), "down": nn.Linear(9, 6), "other": nn.Linear(6, 6)})
    fresh.load_state_dict({**plain, **found})
    assert torch.allclose(run(fresh), unmerged, atol=1e-5)
    assert adapters.stored_name("up.base_layer.weight") == "up.weight"


def test_without_peft_lora_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(MissingPackage, match="peft"):
        adapters.attach(nn.ModuleDict({"up": nn.Linear(2, 2)}), {"up.weight": Rank(1, 1.0)})


def test_without_matplotlib_nothing_begins(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingPackage, match="matplotlib"):
        require_plots("training draws its loss curves", extra="heal")


def test_the_rate_rises_and_falls_as_told():
    rate = rate_factor(HealSettings(warmup_ratio=0.1, lr_scheduler="cosine"), 100)
    found = [rate(step) for step in range(100)]
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[10:] == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 90)) for k in range(90)])
    constant = rate_factor(HealSettings(warmup_ratio=0.0, lr_scheduler="constant"), 5)
    assert [constant(step) for step in range(5)] == [1.0] * 5
    linear = rate_factor(HealSettings(warmup_ratio=0.0, lr_scheduler="linear"), 4)
    assert [linear(step) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_weight_decay_is_for_matrices():
    layer = nn.Linear(3, 2)
    settings = HealSettings(optimizer="adamw", weight_decay=0.5, betas=[0.8, 0.9], eps=1e-3)
    (found,) = optimizers(settings, dict(layer.named_parameters()))
    assert [(group["weight_decay"], len(group["params"])) for group in found.param_groups] == [(0.5, 1), (0.0, 1)]
    assert found.param_groups[0]["betas"] == (0.8, 0.9)
    assert found.param_groups[0]["eps"] == 1e-3


def test_rates_follow_the_size_of_a_tensor_or_not():
    weights = {"a": torch.full((4, 9), 0.5), "b": torch.zeros(4, 16), "c": torch.ones(3)}
    weights = {name: nn.Parameter(weight) for name, weight in weights.items()}
    for scaled, rates in ((True, [0.005, 0.0025, 0.01]), (False, [0.01] * 3)):
        found = optimizers(HealSettings(optimizer="adamw", scale_parameter=scaled), weights)
        set_rate(found, 0.01)
        assert [group["lr"] for one in found for group in one.param_groups] == pytest.approx(rates)


def test_muon_s_update_is_the_rate_times_the_size_of_its_matrix():
    torch.manual_seed(0)
    weights = {
        "layers.0.q_proj.weight": nn.Parameter(0.3 * torch.randn(24, 16)),
        "embed_tokens.weight": nn.Parameter(torch.randn(9, 16)),
        "norm.weight": nn.Parameter(torch.ones(16)),
    }
    matrices, others = optimizers(HealSettings(optimizer="muon"), weights)
    assert [len(one.param_groups) for one in (matrices, others)] == [1, 2]
    weight = weights["layers.0.q_proj.weight"]
    before = weight.detach().clone()
    weight.grad = torch.randn(24, 16)
    set_rate([matrices, others], 0.01)
    matrices.step()
    moved = float((weight.detach() - before).square().mean().sqrt())
    # Five Newton-Schulz steps bring singular values near 1, not to it.
    assert moved == pytest.approx(0.01 * float(before.square().mean().sqrt()), rel=0.3)


def test_an_old_torch_without_muon_says_so(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(EnvironmentFailure, match=r"torch 2\.9"):
        optimizers(HealSettings(optimizer="muon"), {"w": nn.Parameter(torch.ones(2, 2))})


def test_relative_errors_are_per_layer_over_the_teacher_s_variance():
    teacher = [torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[0.0, 20.0]]])]  # variances 2 and 200
    student = [torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, 10.0]]])]  # mean squares 0.5 and 50
    assert losses.relative_errors(teacher, student).item() == pytest.approx(0.25)


def test_a_loss_that_leaves_is_stopped_and_one_that_wobbles_is_not():
    judge([1.0, 0.5] * 20, "here", "")
    judge([0.001, *[0.02] * 30], "here", "")  # all of it is harmless
    with pytest.raises(TrainingDiverged, match="nan") as caught:
        judge([1.0, float("nan")], "step 2", "the last good state is X")
    assert caught.value.exit_code == 5
    assert "learning_rate" in caught.value.remedy
    assert "the last good state is X" in caught.value.remedy
    with pytest.raises(TrainingDiverged, match=r"from 1 to 3\.5"):
        judge([1.0, *[3.5] * 11], "step 12", "")
    with pytest.raises(TrainingDiverged):
        judge([0.1, 0.9], "step 2", "")
    judge([0.01, 0.04], "step 2", "")


def test_a_batch_must_divide():
    assert divided(HealSettings(batch_size=8, gradient_accumulation_steps=2), 2) == 2
    with pytest.raises(UsageError, match="batch_size 8 does not divide into 6"):
        divided(HealSettings(batch_size=8, gradient_accumulation_steps=3), 2)


def heal(**settings: object) -> HealSettings:
    manifest = manifest_from_dict({"surgery": 1, "operations": [{"heal": settings}]})
    return manifest.steps[0].settings


def test_the_paper_s_values():
    """KV-Latent, section on training, and its released code."""
    found = heal(method="paper")
    assert found.betas == [0.9, 0.999]
    assert (found.eps, found.weight_decay, found.batch_size) == (2e-4, 0.01, 8)
    assert (found.warmup_ratio, found.max_grad_norm, found.lr_scheduler) == (0.0, None, "cosine")
    assert found.layerwise is not None
    assert found.layerwise.tokens == 100_000_000
    assert found.end_to_end is not None
    assert (found.end_to_end.loss, found.end_to_end.tokens, found.end_to_end.learning_rate) == ("next_token", 10**9, 2e-5)
    distilled = heal(method="paper", end_to_end={"loss": "paper_kl"}).end_to_end
    assert distilled is not None
    assert (distilled.tokens, distilled.learning_rate, distilled.temperature) == (250_000_000, 2e-7, 10.0)
    chosen = selection(model_of("llama"), found, frozenset())
    assert all(rank == Rank(256, 512) for rank in chosen.lora.values())
    assert heal(method="paper", layerwise=None, batch_size=4).layerwise is None


def test_what_is_trained_by_default_is_what_operations_declared():
    model = model_of("llama")
    assert set(selection(model, heal(), frozenset({"norms"})).names) == {n for n in model.shapes if "norm" in n}
    assert selection(model, heal(), frozenset()).names
    assert selection(model, heal(train=["head"]), frozenset({"norms"})).names == ("lm_head.weight",)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layerwise": None, "end_to_end": None}, "nothing is trained"),
        ({"train": []}, "at least 1"),
        ({"train": ["atention"]}, "did you mean 'attention'"),
        ({"end_to_end": {"tokens": "1X"}}, "such as 250M"),
        ({"end_to_end": {"tokens": 0}}, "greater than or equal to 1"),
        ({"end_to_end": {"loss": "l1"}}, "'kl'"),
        ({"betas": [0.9]}, "at least 2"),
        ({"learning_rate": 1}, "unknown key"),
        ({"end_to_end": {"teacher": "stored", "loss": "paper_kl"}}, "only with loss: kl"),
        ({"end_to_end": {"teacher": "stored"}}, "hidden_weight: 0"),
        ({"end_to_end": {"teacher": "stored", "hidden_weight": 0, "temperature": 2}}, "temperature: 1"),
        ({"precision": "fp16"}, "optimizer: adamw"),
        ({"train": [{"lora": {"on": "embeddings"}}]}, "'mlp'"),
    ],
)
def test_wrong_settings_are_told(settings, words):
    with pytest.raises(ManifestError) as caught:
        heal(**settings)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "count"), [("100M", 10**8), ("1.5B", 1_500_000_000), ("20 K", 20_000), ("4096", 4096), ("1T", 10**12)]
)
def test_counts_are_read(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "M", "0", "1.5", "1e6", "5G", "-1K", "1KM", "\u0665M", "0.0001K"])
def test_other_counts_are_refused(text):
    with pytest.raises(ValueError, match="such as 250M"):
        parse_count(text)


def test_curves_outlive_a_crash_and_end_beside_the_output(tmp_path):
    path = tmp_path / "history.jsonl"
    for step in (10, 20, 30):
        curves.append(path, {"stage": "end_to_end", "step": step, "tokens": step * 5, "loss": 1 / step, "heldout": 2 / step})
    with path.open("a") as file:
        file.write('{"stage": "end_to')
    assert [entry["step"] for entry in curves.read(path)] == [10, 20, 30]
    assert [entry["step"] for entry in curves.keep(path, lambda entry: entry["step"] <= 20)] == [10, 20]
    layers = [{"stage": "layerwise", "layer": n, "step": 1, "tokens": 5, "loss": 0.5} for n in range(2)]
    curves.publish(tmp_path / "OUT.v1.heal", {"tokens": 3}, [*layers, *curves.read(path)])
    found = json.loads((tmp_path / "OUT.v1.heal.json").read_text())
    assert found["tokens"] == 3
    assert len(found["history"]) == 4
    assert (tmp_path / "OUT.v1.heal.png").read_bytes().startswith(b"\x89PNG")
