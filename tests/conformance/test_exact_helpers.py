"""`rotate` and `smooth` leave every family's logits as they are, alone, together, and after operations that cut."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.emission.lint import lint
from tests.moe_cases import close, code_of, config_of, load, logits, prune, raw
from tests.tiny import FAMILIES, write_tiny
from tests.tiny_moe import MOE_ONLY

DENSE = ("llama", "mistral", "qwen2", "qwen3", "phi3")
MLA = ("deepseek_v2", "deepseek_v3")
EVERY = (*FAMILIES, *MOE_ONLY)
MOE = tuple(family for family in EVERY if family not in DENSE)
LATENT = {"kv_latent": {"method": "stride", "qk_dim": 8, "vo_dim": [4, 8]}}
FOLDS = {"folds": ["norms", "values", "up"]}
every_family = pytest.mark.parametrize("family", EVERY)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def base_of(folder, family, **overrides):
    """A tiny base whose norms have weights far from one."""
    base = write_tiny(folder, family, seed=5, **overrides)
    tensors, chance = load_file(base / "model.safetensors"), torch.Generator().manual_seed(7)
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensors[name] = (tensor.float() * (0.7 * torch.randn(tensor.shape, generator=chance)).exp()).to(
                tensor.dtype
            )
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return base


def convert(base, out, *operations):
    data = {
        "surgery": 1, "operations": list(operations), "verify": False,
        "calibration": {"text": "self", "samples": 4, "length": 32},
    }  # fmt: skip
    manifest, place = surgery.manifest_from_dict(data), out.parent / "measured"
    return surgery.convert(str(base), out, manifest, statistics=place, trust_remote_code=bool(code_of(base))).out


def ones(folder):
    """Whether every norm of the stream has a weight of ones."""
    tensors = load_file(folder / "model.safetensors")
    norms = [name for name in tensors if name.endswith(("layernorm.weight", "model.norm.weight")) and "_a_" not in name]
    assert len(norms) == 5
    return all(torch.equal(tensors[name], torch.ones_like(tensors[name])) for name in norms)


def same(base, out):
    """Logits agree to what float32 rounds, as a share of the largest one."""
    close_enough(logits(load(out)), logits(load(base)))


def close_enough(found, wanted):
    close(found / wanted.abs().max(), wanted / wanted.abs().max(), 5e-6)


def changed(base, out):
    before, after = raw(base), raw(out)
    return {name for name in before if before[name] != after[name]}


@every_family
@pytest.mark.parametrize("heads", [True, False])
def test_rotation_is_exact(family, heads, tmp_path):
    base = base_of(tmp_path / "base", family)
    out = convert(base, tmp_path / "out", {"rotate": {"heads": heads, "seed": 3}})
    same(base, out)
    assert ones(out)
    assert not code_of(out)
    inside = ("q_norm", "k_norm", "_a_layernorm", "q_b_proj", "kv_b_proj", "sinks", "correction_bias", "router.bias")
    biases = ("q_proj.bias", "k_proj.bias", "gate_up_proj_bias")
    values = () if heads and family not in MLA else ("v_proj.bias",)
    kept = {name for name in raw(base) if name.endswith((*biases, *values)) or any(part in name for part in inside)}
    assert changed(base, out) == set(raw(base)) - kept


@every_family
def test_smoothing_is_exact(family, tmp_path):
    base = base_of(tmp_path / "base", family)
    out = convert(base, tmp_path / "out", {"smooth": {"alpha": 0.7}})
    same(base, out)
    assert config_of(out) == config_of(convert(base, tmp_path / "passed"))
    assert {name for name in changed(base, out) if name.endswith("norm.weight")} == {
        f"model.layers.{layer}.{norm}.weight"
        for layer in (0, 1)
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    assert not {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} & changed(base, out)
    assert not {
        name
        for name in changed(base, out)
        if name.endswith((".bias", "o_proj.weight", "down_proj.weight", "w2.weight"))
    }


@pytest.mark.parametrize("family", [family for family in EVERY if family not in MLA])
def test_every_fold_is_exact(family, tmp_path):
    base = base_of(tmp_path / "base", family)
    shared = family in {*DENSE, "qwen2_moe", "glm4_moe"}
    out = convert(base, tmp_path / "out", {"smooth": FOLDS if shared else {"folds": ["norms", "values"]}})
    same(base, out)
    moved = changed(base, out)
    assert "model.layers.1.self_attn.o_proj.weight" in moved
    assert any(".down_proj.weight" in name and ".experts." not in name for name in moved) == shared


@pytest.mark.parametrize("family", MLA)
def test_shared_experts_beside_a_latent_can_be_smoothed(family, tmp_path):
    base = base_of(tmp_path / "base", family)
    same(base, convert(base, tmp_path / "out", {"smooth": {"folds": ["norms", "up"]}}))


@every_family
def test_powers_of_two_move_not_a_bit(family, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        base = base_of(tmp_path / f"base_{dtype}", family, dtype=dtype)
        out = convert(base, tmp_path / f"out_{dtype}", {"smooth": {"powers_of_two": True}})
        assert changed(base, out)
        assert torch.equal(logits(load(out)), logits(load(base)))


@every_family
def test_smoothing_what_was_rotated_is_exact(family, tmp_path):
    base = base_of(tmp_path / "base", family)
    same(base, convert(base, tmp_path / "out", "rotate", "smooth"))


@pytest.mark.parametrize(
    "second", [{"rotate": {}}, {"smooth": {"folds": ["norms", "values"]}}], ids=["rotate", "smooth"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_after_narrow_heads(family, second, tmp_path):
    base = base_of(tmp_path / "base", family)
    latent = convert(base, tmp_path / "latent", LATENT)
    out = convert(base, tmp_path / "out", LATENT, second)
    assert code_of(out) == code_of(latent)
    assert lint(code_of(out)) == []
    assert config_of(out) == config_of(latent)
    same(latent, out)
    again = convert(latent, tmp_path / "again", second)  # of the finished result, which carries our code
    assert raw(again) == raw(out)
    same(latent, again)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_after_narrow_heads_that_a_stock_class_holds(family, tmp_path):
    base = base_of(tmp_path / "base", family)
    equal = {"kv_latent": {"method": "stride", "kv_ratio": 0.5}}
    latent = convert(base, tmp_path / "latent", equal)
    assert not code_of(latent)
    same(latent, convert(base, tmp_path / "out", equal, "rotate", {"smooth": FOLDS}))


def test_after_calibrated_heads(tmp_path):
    base = base_of(tmp_path / "base", "qwen2")
    solved = {"kv_latent": {"kv_ratio": 0.5}}
    same(convert(base, tmp_path / "latent", solved), convert(base, tmp_path / "out", solved, "rotate", "smooth"))


@pytest.mark.parametrize("family", MOE)
def test_after_pruning_layers_unequally(family, tmp_path):
    base = base_of(tmp_path / "base", family, experts=8)
    cut = prune([[1, 3, 4, 6, 7], [5, 0, 2]])
    pruned = convert(base, tmp_path / "pruned", cut)
    for name, operations in {"turned": ["rotate"], "smoothed": ["smooth"], "both": ["rotate", "smooth"]}.items():
        out = convert(base, tmp_path / name, cut, *operations)
        assert set(code_of(out)) == set(code_of(pruned)) != set()
        same(pruned, out)


@pytest.mark.parametrize("stored", [False, True], ids=["absent", "stored"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "granitemoe"])
def test_tied_embeddings_part(family, stored, tmp_path):
    base = base_of(tmp_path / "base", family, tie_word_embeddings=True)
    if stored:
        tensors = load_file(base / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    out = convert(base, tmp_path / "out", "rotate")
    same(base, out)
    assert config_of(out)["tie_word_embeddings"] is False
    assert set(raw(out)) == {*raw(base), "lm_head.weight"}
    smoothed = convert(base, tmp_path / "smoothed", "smooth")
    assert config_of(smoothed)["tie_word_embeddings"] is True
    same(base, smoothed)


def test_tied_embeddings_of_a_result_with_code_part_too(tmp_path):
    base = base_of(tmp_path / "base", "llama", tie_word_embeddings=True)
    latent = convert(base, tmp_path / "latent", LATENT)
    out = convert(latent, tmp_path / "out", "rotate")
    assert code_of(out) == code_of(latent)
    same(latent, out)


def test_every_bias_is_seen_to(tmp_path):
    base = base_of(tmp_path / "base", "llama", attention_bias=True, mlp_bias=True)
    tensors, chance = load_file(base / "model.safetensors"), torch.Generator().manual_seed(2)
    for layer in (0, 1):
        for name, size in (("gate_proj", 96), ("up_proj", 96), ("down_proj", 64)):
            tensors[f"model.layers.{layer}.mlp.{name}.bias"] = torch.randn(size, generator=chance)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    same(base, convert(base, tmp_path / "turned", "rotate"))
    same(base, convert(base, tmp_path / "smoothed", {"smooth": FOLDS}))


@pytest.mark.parametrize("hidden", [60, 68, 72, 96])
def test_widths_that_are_no_power_of_two(hidden, tmp_path):
    base = base_of(tmp_path / "base", "llama", hidden_size=hidden, head_dim=12)
    same(base, convert(base, tmp_path / "out", "rotate"))


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_draft_layers(family, tmp_path):
    base = base_of(tmp_path / "base", family, mtp=True)
    ignored = r"model\.layers\.2\."
    wanted = logits(load(base, ignored=ignored))
    dropped = convert(base, tmp_path / "dropped", {"rotate": {"drafts": "drop"}})
    close_enough(logits(load(dropped)), wanted)
    assert config_of(dropped)["num_nextn_predict_layers"] == 0
    assert not [name for name in raw(dropped) if name.startswith("model.layers.2.")]
    with pytest.raises(surgery.SurgeryError, match="does not fit") as refusal:
        convert(base, tmp_path / "refused", "rotate")
    assert "drafts: drop" in refusal.value.cause
    smoothed = convert(base, tmp_path / "smoothed", "smooth")  # what a draft layer reads does not change
    assert not [name for name in changed(base, smoothed) if name.startswith("model.layers.2.")]
    close_enough(logits(load(smoothed, ignored=ignored)), wanted)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "qwen3_moe"])
def test_dense_layers_among_those_with_experts(family, tmp_path):
    if family == "qwen3_moe":
        base = base_of(tmp_path / "base", family, mlp_only_layers=[0])
        tensors, chance = load_file(base / "model.safetensors"), torch.Generator().manual_seed(9)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.0.mlp.")}
        for name, shape in (("gate", (96, 64)), ("up", (96, 64)), ("down", (64, 96))):
            tensors[f"model.layers.0.mlp.{name}_proj.weight"] = torch.randn(shape, generator=chance) / 8
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    else:
        base = base_of(tmp_path / "base", family, first_k_dense_replace=1)
    same(base, convert(base, tmp_path / "turned", "rotate"))
    same(base, convert(base, tmp_path / "smoothed", {"smooth": {"folds": ["norms", "up"]}}))


def test_sharded_bases_stay_divided(tmp_path):
    base = write_tiny(tmp_path / "base", "qwen2", seed=5, shards=3, tie_word_embeddings=True)
    for name, operations in {"turned": ["rotate"], "both": ["rotate", "smooth"]}.items():
        out = convert(base, tmp_path / name, *operations)
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) == 3
        same(base, out)


@every_family
def test_half_precision_moves_as_much_as_rounding_does(family, tmp_path):
    """In bfloat16 a rotated weight is rounded once more: at most a few hundredths of the largest logit."""
    base = base_of(tmp_path / "base", family, dtype=torch.bfloat16)
    out = convert(base, tmp_path / "out", "rotate")
    wanted, found = (logits(load(folder).float()) for folder in (base, out))
    middle = (found - wanted).abs().median() / wanted.abs().max()
    assert 0 < float(middle) < 0.02
