"""What `rotate` and `smooth` do to tensors, against references written out here, and what they refuse."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.architectures import architectures
from surgery.architectures.model import Model
from surgery.architectures.residual import residual_stream
from surgery.calibration.text import sampled_windows
from surgery.checkpoint.resolve import open_base
from surgery.errors import CorruptCheckpoint, ManifestError, UnsupportedModel
from surgery.operations.rotate.editing import Piece
from surgery.operations.rotate.orthogonal import rotation, turned
from surgery.operations.smooth.editing import scales
from surgery.operations.smooth.folds import SmoothSettings
from tests.moe_cases import config_of, load, logits, prune, raw
from tests.tiny import write_fp8, write_mxfp4, write_tiny

LAYER = "model.layers.1"
ATTENTION_READERS = [f"{LAYER}.self_attn.{name}_proj.weight" for name in "qkv"]
READERS = {f"{LAYER}.input_layernorm": ATTENTION_READERS, f"{LAYER}.post_attention_layernorm": [f"{LAYER}.mlp.{n}_proj.weight" for n in ("gate", "up")]}  # fmt: skip
CALIBRATION = {"text": "self", "samples": 4, "length": 48}
LATENT = {"kv_latent": {"method": "stride", "qk_dim": 8, "vo_dim": [4, 8]}}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def manifest_of(*operations):
    data = {"surgery": 1, "operations": list(operations), "verify": False, "calibration": CALIBRATION}
    return surgery.manifest_from_dict(data)


def convert(base, out, *operations, **options):
    return surgery.convert(str(base), out, manifest_of(*operations), statistics=out.parent / "measured", **options)


def tensors_of(folder):
    return {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}


def base_of(folder, family="llama", *, edit=None, config=None, **overrides):
    """A tiny base with norms far from one, after `edit` of its tensors and `config` of its configuration."""
    base = write_tiny(folder, family, seed=4, **overrides)
    tensors, chance = load_file(base / "model.safetensors"), torch.Generator().manual_seed(6)
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensors[name] = tensor * (0.5 * torch.randn(tensor.shape, generator=chance)).exp()
    if edit:
        edit(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    if config:
        (base / "config.json").write_text(json.dumps(config_of(base) | config))
    return base


def outliers(tensors):
    """Three channels of the stream that norms blow up, and two that one hidden unit feeds strongly."""
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[[5, 17, 40]] *= 60
        elif "layers" in name and name.endswith("_proj.weight") and tensor.shape[1] == 64 and ".o_proj" not in name:
            tensor[:, [5, 17, 40]] /= 8


@pytest.mark.parametrize("size", [1, 2, 3, 4, 12, 15, 16, 64, 80, 96, 128, 2880])
def test_matrices_are_orthogonal_and_spread_every_channel(size):
    eye = torch.eye(size, dtype=torch.float64)
    found = rotation(size, "a label").turn(eye)
    torch.testing.assert_close(found @ found.T, eye, atol=1e-13, rtol=0)
    power = size & -size
    assert float(found.abs().max()) <= power**-0.5 + 1e-12
    if power == size:  # Hadamard: every entry is as large as the others
        torch.testing.assert_close(found.abs(), torch.full_like(found, size**-0.5), atol=1e-13, rtol=0)


def test_a_label_is_one_matrix_and_another_is_another():
    eye = torch.eye(16, dtype=torch.float64)
    first, again, other = (
        rotation(16, label).turn(eye) for label in ("surgery rotate 0", "surgery rotate 0", "surgery rotate 1")
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # From SHAKE-256 of the label alone: these signs hold on every machine and for every release.
    assert "".join("+-"[int(sign < 0)] for sign in rotation(16, "surgery rotate 0").signs) == SIGNS
    torch.testing.assert_close(
        rotation(3, "odd").turn(torch.eye(3, dtype=torch.float64))[0],
        torch.tensor(ODD, dtype=torch.float64),
        atol=1e-12,
        rtol=0,
    )


SIGNS = "--++++++--+--+--"
ODD = [0.4302547286566598, -0.5475752954558102, 0.717664381361557]


def test_tensors_are_turned_in_parts_as_in_one(monkeypatch):
    chance = torch.Generator().manual_seed(0)
    scale = torch.rand(12, generator=chance)
    turn = rotation(12, "residual").turn(torch.eye(12, dtype=torch.float64))
    heads = torch.block_diag(*(rotation(3, label).turn(torch.eye(3, dtype=torch.float64)) for label in ("a", "b")))
    pieces = [Piece(0, 4, None), Piece(4, 7, "a"), Piece(7, 10, "b")]
    rows = torch.block_diag(torch.eye(4, dtype=torch.float64), heads)
    for chunk in (1, 1 << 22):
        monkeypatch.setattr("surgery.operations.rotate.orthogonal.CHUNK", chunk)
        w = torch.randn(10, 12, generator=chance)
        close(turned(w, 1, "residual", scale), w.double() * scale @ turn)
        close(turned(w, 1, "residual", scale, pieces), rows.T @ (w.double() * scale) @ turn)
        close(turned(w.T, 0, "residual", None, pieces), turn.T @ w.T.double() @ rows)
        close(turned(w[:, 0], None, "residual", None, pieces), w[:, 0].double() @ rows)
        bias = torch.randn(12, generator=chance)
        close(turned(bias, 0, "residual", None), bias.double() @ turn)
        experts = torch.randn(3, 12, 5, generator=chance)
        close(turned(experts, 1, "residual", scale), turn.T @ (experts.double() * scale[:, None]))


def close(found, wanted, tolerance=1e-5):
    torch.testing.assert_close(found.double(), wanted.double(), atol=tolerance, rtol=0)


def test_one_rotation_explains_every_tensor(tmp_path):
    """R1 is solved for from the embeddings alone, and R2 from the values; everything else has to follow."""
    base = base_of(tmp_path / "base", "qwen2", attention_bias=True)
    out = convert(base, tmp_path / "out", {"rotate": {"seed": 9}}).out
    w, r = tensors_of(base), tensors_of(out)
    embedding = "model.embed_tokens.weight"
    close(r[embedding] @ r[embedding].T, w[embedding] @ w[embedding].T, 1e-4)  # distances of tokens stay
    turn = torch.linalg.lstsq(w[embedding], r[embedding]).solution
    close(turn @ turn.T, torch.eye(64))
    close(turn.abs(), torch.full_like(turn, 1 / 8))  # a Hadamard matrix
    norm = {name: tensor for name, tensor in w.items() if name.endswith("norm.weight")}
    assert norm
    assert all(torch.equal(r[name], torch.ones_like(r[name])) for name in norm)
    close(r["lm_head.weight"], w["lm_head.weight"] * norm["model.norm.weight"] @ turn, 1e-4)
    for layer in range(2):
        at = f"model.layers.{layer}"
        attention, feed = norm[f"{at}.input_layernorm.weight"], norm[f"{at}.post_attention_layernorm.weight"]
        for name in ("q", "k"):
            close(r[f"{at}.self_attn.{name}_proj.weight"], w[f"{at}.self_attn.{name}_proj.weight"] * attention @ turn)
            assert torch.equal(r[f"{at}.self_attn.{name}_proj.bias"], w[f"{at}.self_attn.{name}_proj.bias"])
        for name in ("gate", "up"):
            close(r[f"{at}.mlp.{name}_proj.weight"], w[f"{at}.mlp.{name}_proj.weight"] * feed @ turn)
        close(r[f"{at}.mlp.down_proj.weight"], turn.T @ w[f"{at}.mlp.down_proj.weight"])
        value, output = f"{at}.self_attn.v_proj", f"{at}.self_attn.o_proj.weight"
        heads = []
        for head in range(2):
            rows = slice(16 * head, 16 * head + 16)
            before, after = (w[f"{value}.weight"] * attention @ turn)[rows], r[f"{value}.weight"][rows]
            heads.append(torch.linalg.lstsq(before.T, after.T).solution)  # after = R2^T before
            close(heads[-1] @ heads[-1].T, torch.eye(16))
            close(heads[-1].T @ before, after)
            close(r[f"{value}.bias"][rows], w[f"{value}.bias"][rows] @ heads[-1])
        assert not torch.allclose(heads[0], heads[1])
        columns = torch.block_diag(heads[0], heads[0], heads[1], heads[1])  # two query heads share a cached one
        close(r[output], turn.T @ w[output] @ columns)


def test_seeds_and_heads(tmp_path):
    base = base_of(tmp_path / "base")
    first, again, other, stream = (
        raw(convert(base, tmp_path / name, {"rotate": settings}).out)
        for name, settings in {"a": {}, "b": {"seed": 0}, "c": {"seed": 1}, "d": {"heads": False}}.items()
    )
    assert first == again
    assert first["model.embed_tokens.weight"] != other["model.embed_tokens.weight"]
    assert {name for name in first if first[name] != stream[name]} == {
        f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1) for name in "vo"
    }


def test_one_seed_is_one_result_however_it_is_stored(tmp_path):
    base = base_of(tmp_path / "base")
    whole = tensors_of(convert(base, tmp_path / "whole", "rotate").out)
    split = surgery.manifest_from_dict(
        {"surgery": 1, "operations": ["rotate"], "verify": False, "output": {"shard_size": "40KB"}}
    )
    done = surgery.convert(str(base), tmp_path / "split", split, workers=1)
    parts = {name: tensor for file in done.out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert len(list(done.out.glob("*.safetensors"))) > 3
    assert all(torch.equal(parts[name].double(), whole[name]) for name in whole)


def inputs_of(folder, windows):
    """The largest magnitude of each channel of what every norm gives, and of what every linear module reads."""
    model, norms, linears, handles = load(folder), {}, {}, []
    for name, module in model.named_modules():
        if name.endswith("layernorm"):
            handles.append(module.register_forward_hook(lambda _, __, out, n=name: norms.__setitem__(n, out)))
        elif isinstance(module, torch.nn.Linear):
            handles.append(module.register_forward_pre_hook(lambda _, x, n=name: linears.__setitem__(n, x[0])))
    with torch.no_grad():
        model(windows)
    for handle in handles:
        handle.remove()
    return norms, linears


def windows_of(base):
    """The windows that the calibration of these tests has: what the base writes itself."""
    calibration = manifest_of().calibration
    return sampled_windows(load(base), calibration, 256, 1).tokens


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothing_by_hand(alpha, tmp_path):
    base = base_of(tmp_path / "base", edit=outliers)
    out = convert(base, tmp_path / "out", {"smooth": {"alpha": alpha}}).out
    w, r = tensors_of(base), tensors_of(out)
    norms, _ = inputs_of(base, windows_of(base))
    for norm, readers in READERS.items():
        x = norms[norm].abs().amax((0, 1)).double()
        largest = torch.cat([w[name] for name in readers]).abs().amax(0)
        s = x**alpha / largest ** (1 - alpha)
        torch.testing.assert_close(r[f"{norm}.weight"], w[f"{norm}.weight"] / s, atol=0, rtol=1e-5)
        for name in readers:
            torch.testing.assert_close(r[name], w[name] * s, atol=0, rtol=1e-5)


def test_at_a_half_activations_and_weights_are_of_one_size(tmp_path):
    base = base_of(tmp_path / "base", edit=outliers)
    windows = windows_of(base)
    out = convert(base, tmp_path / "norms", "smooth").out
    norms, r = inputs_of(out, windows)[0], tensors_of(out)
    for norm, readers in READERS.items():
        largest = torch.cat([r[name] for name in readers]).abs().amax(0)
        close(norms[norm].abs().amax((0, 1)) / largest, torch.ones(64), 1e-4)
    out = convert(base, tmp_path / "others", {"smooth": {"folds": ["values", "up"]}}).out
    before, after, r = inputs_of(base, windows)[1], inputs_of(out, windows)[1], tensors_of(out)
    down, output = f"{LAYER}.mlp.down_proj", f"{LAYER}.self_attn.o_proj"
    close(after[down].abs().amax((0, 1)) / r[f"{down}.weight"].abs().amax(0), torch.ones(96), 1e-4)
    x = after[output].abs().amax((0, 1)).view(2, 2, 16).amax(1)  # over the query heads of each cached head
    close(x / r[f"{output}.weight"].abs().amax(0).view(2, 2, 16).amax(1), torch.ones(2, 16), 1e-4)
    assert all(not torch.allclose(before[name], after[name], rtol=0.1) for name in (down, output))


def test_the_scale_of_experts_is_that_of_all_that_read(tmp_path):
    base = base_of(tmp_path / "base", "qwen2_moe")
    w, r = tensors_of(base), tensors_of(convert(base, tmp_path / "out", "smooth").out)
    at = f"{LAYER}.mlp"
    experts = [f"{at}.experts.{n}.{name}_proj.weight" for n in range(4) for name in ("gate", "up")]
    shared = [f"{at}.shared_expert.{name}_proj.weight" for name in ("gate", "up")]
    readers = [*experts, *shared, f"{at}.gate.weight", f"{at}.shared_expert_gate.weight"]
    norm = f"{LAYER}.post_attention_layernorm"
    x = inputs_of(base, windows_of(base))[0][norm].abs().amax((0, 1)).double()
    s = (x / torch.cat([w[name] for name in readers]).abs().amax(0)).sqrt()
    torch.testing.assert_close(r[f"{norm}.weight"], w[f"{norm}.weight"] / s, atol=0, rtol=1e-5)
    for name in readers:
        torch.testing.assert_close(r[name], w[name] * s, atol=0, rtol=1e-5)


def test_scales_of_channels_that_are_dead_or_extreme():
    settings = SmoothSettings()
    x, w = torch.tensor([0.0, 2.0, 0.0, 1e30, 1e-30, 8.0]), torch.tensor([3.0, 0.0, 0.0, 1e-30, 1e30, 2.0])
    close(scales(x, w, settings), torch.tensor([1.0, 1.0, 1.0, 1e5, 1e-5, 2.0]), 1e-9)
    rounded = scales(torch.tensor([9.0, 5.0]), torch.tensor([1.0, 2.0]), SmoothSettings(powers_of_two=True))
    assert rounded.tolist() == [4.0, 2.0]


def test_dead_channels_stay_as_they_are(tmp_path):
    def silence(tensors):
        tensors[f"{LAYER}.input_layernorm.weight"][7] = 0
        for name in READERS[f"{LAYER}.post_attention_layernorm"]:
            tensors[name][:, 9] = 0

    base = base_of(tmp_path / "base", edit=silence)
    out = convert(base, tmp_path / "out", "smooth").out
    w, r = tensors_of(base), tensors_of(out)
    assert all(torch.equal(r[name][:, 7], w[name][:, 7]) for name in ATTENTION_READERS)
    norm = f"{LAYER}.post_attention_layernorm.weight"
    assert r[norm][9] == w[norm][9]
    torch.testing.assert_close(logits(load(out)), logits(load(base)), atol=2e-5, rtol=0)


def rounding_error(folder, windows):
    """Mean relative error of every linear module of the layers, with inputs in int8 by token, weights by row."""
    _, inputs = inputs_of(folder, windows)
    weights, errors = tensors_of(folder), []
    for name, x in inputs.items():
        if name != "lm_head":
            x, w = x.double().flatten(0, 1), weights[f"{name}.weight"]
            rounded = [
                (v / s).round() * s for v in (x, w) for s in [v.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127]
            ]
            errors.append(float((rounded[0] @ rounded[1].T - x @ w.T).norm() / (x @ w.T).norm()))
    return sum(errors) / len(errors)


def test_rounded_activations_err_less(tmp_path):
    base = base_of(tmp_path / "base", edit=outliers)
    windows = windows_of(base)
    smoothed = rounding_error(convert(base, tmp_path / "smoothed", "smooth").out, windows)
    turned_error = rounding_error(convert(base, tmp_path / "turned", "rotate").out, windows)
    before = rounding_error(base, windows)
    assert smoothed < 0.6 * before
    assert turned_error < 0.6 * before


def test_rotation_takes_outliers_out_of_activations_and_weights(tmp_path):
    base = base_of(tmp_path / "base", edit=outliers)
    out = convert(base, tmp_path / "out", "rotate").out
    windows = windows_of(base)

    def sharpness(folder):
        inputs = inputs_of(folder, windows)[1]
        x = inputs[f"{LAYER}.self_attn.q_proj"].flatten(0, 1)
        return float((x.abs().amax(1) / x.pow(2).mean(1).sqrt()).mean())

    assert sharpness(out) < 0.7 * sharpness(base)


def test_plans_tell_what_happens(tmp_path):
    base = base_of(tmp_path / "base", tie_word_embeddings=True)
    plan = surgery.plan(str(base), manifest_of("rotate", "smooth"))
    assert plan.parameters_after == plan.parameters_before + 128 * 64
    assert any("no longer tied" in note and "32.8 KB" in note for note in plan.notes)
    assert dict(plan.fates) == {"rewritten": 20, "added": 1}
    added = next(entry for entry in plan.ledger if entry.fate == "added")
    assert (added.name, "model.norm.weight" in added.why) == ("lm_head.weight", True)
    clamped = base_of(tmp_path / "clamped", "olmoe", clip_qkv=4.0)
    notes = surgery.plan(str(clamped), manifest_of("rotate")).notes
    assert any("values keep their basis: it clamps its values (clip_qkv)" in note for note in notes)
    done = convert(clamped, tmp_path / "out", "rotate", "smooth")
    assert any("the largest input over the mean channel's became" in note for note in done.plan.notes)
    torch.testing.assert_close(logits(load(done.out)), logits(load(clamped)), atol=2e-5, rtol=0)


def test_a_measurement_serves_every_alpha(tmp_path):
    base = base_of(tmp_path / "base")
    for name, settings in {"a": {"alpha": 0.2}, "b": {"alpha": 0.9}, "c": {"powers_of_two": True}}.items():
        convert(base, tmp_path / name, {"smooth": settings})
    assert len(list((tmp_path / "measured").iterdir())) == 1
    assert raw(tmp_path / "a") != raw(tmp_path / "b")


def test_planned_memory_is_of_one_tensor_not_of_the_model(tmp_path):
    """What a rewrite holds does not grow with the number of experts or layers."""
    peaks = []
    for number, layers in enumerate((1, 6)):
        base = write_tiny(tmp_path / str(number), "qwen3_moe", num_hidden_layers=layers, experts=4 * layers)
        peaks.append(surgery.plan(str(base), manifest_of("rotate")).peak_memory)
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize(
    ("operations", "reason"),
    [
        (["smooth", "rotate"], "put rotate before smooth"),
        (["rotate", "expert_top_k"], "put expert_top_k before rotate"),
        (["rotate", "heal"], "put heal before rotate"),
        (["smooth", LATENT], "put kv_latent before smooth"),
    ],
)
def test_the_order_is_held(operations, reason):
    with pytest.raises(ManifestError) as found:
        manifest_of(*operations)
    assert found.value.remedy == reason


@pytest.mark.parametrize("settings", [{"alpha": 1.5}, {"folds": []}, {"folds": ["down"]}, {"seed": 1}])
def test_settings_of_smooth_are_checked(settings):
    with pytest.raises(ManifestError):
        manifest_of({"smooth": settings})


@pytest.mark.parametrize("settings", [{"seed": -1}, {"heads": "both"}, {"drafts": "prune"}, {"alpha": 0.5}])
def test_settings_of_rotate_are_checked(settings):
    with pytest.raises(ManifestError):
        manifest_of({"rotate": settings})


def refusal(base, *operations):
    with pytest.raises(UnsupportedModel) as found:
        surgery.plan(str(base), manifest_of(*operations))
    return found.value.cause


def add(name, *shape):
    return lambda tensors: tensors.__setitem__(name, torch.zeros(*shape))


@pytest.mark.parametrize("operation", ["rotate", "smooth"])
@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("llama", "model.layers.0.self_attn.gate_proj.weight", (64, 64)),
        ("llama", "model.layers.1.layer_scale", (64,)),
        ("llama", "model.layers.0.post_feedforward_layernorm.weight", (64,)),
        ("llama", "model.layers.0.input_layernorm.bias", (64,)),
        ("llama", "model.embed_positions.weight", (256, 64)),
        ("llama", "lm_head.bias", (128,)),
        ("qwen3_moe", "model.layers.0.mlp.experts.0.extra_proj.weight", (32, 64)),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w4.weight", (32, 64)),
        ("gpt_oss", "model.layers.0.mlp.experts.extra", (4, 64, 64)),
    ],
)
def test_a_tensor_that_nobody_knows_is_refused_by_name(operation, family, name, shape, tmp_path):
    base = base_of(tmp_path / "base", family, edit=add(name, *shape))
    assert refusal(base, operation) == f"what tensor {name!r} does is not known"


@pytest.mark.parametrize("operation", ["rotate", "smooth"])
def test_bases_that_are_quantized_or_broken_are_refused(operation, tmp_path):
    assert "quantized" in refusal(write_fp8(tmp_path / "fp8"), operation)
    assert "quantized" in refusal(write_mxfp4(tmp_path / "mxfp4"), operation)
    (tmp_path / "bare").mkdir()
    silent = write_fp8(tmp_path / "bare")
    config = config_of(silent)
    del config["quantization_config"]
    (silent / "config.json").write_text(json.dumps(config))
    assert "weight_scale_inv' does is not known" in refusal(silent, operation)
    norm = f"{LAYER}.input_layernorm.weight"
    assert norm in refusal(base_of(tmp_path / "less", edit=lambda tensors: tensors.pop(norm)), operation)
    wide = base_of(tmp_path / "wide", edit=add("model.layers.0.mlp.up_proj.weight", 96, 32))
    assert "the stream has 64 channels" in refusal(wide, operation)
    odd = base_of(tmp_path / "odd", edit=add(norm, 32))
    assert "the stream has 64 channels" in refusal(odd, operation)
    small = base_of(tmp_path / "small", edit=lambda tensors: tensors.update({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items() if name.endswith("q_proj.weight")}))  # fmt: skip
    assert "is quantized" in refusal(small, operation)


def test_heads_that_are_missing_or_untrue_are_refused(tmp_path):
    headless = base_of(tmp_path / "headless", edit=lambda tensors: tensors.pop("lm_head.weight"))
    assert "lm_head.weight" in refusal(headless, "rotate")
    both = base_of(tmp_path / "both", config={"tie_word_embeddings": True})
    with pytest.raises(CorruptCheckpoint, match="is not equal"):
        convert(both, tmp_path / "out", "rotate")
    assert not (tmp_path / "out").exists()
    crooked = base_of(tmp_path / "crooked", config={"num_key_value_heads": 4})
    with pytest.raises(CorruptCheckpoint, match="heads of"):
        surgery.plan(str(crooked), manifest_of("rotate"))
    beyond = base_of(tmp_path / "beyond", num_hidden_layers=3, config={"num_hidden_layers": 2})
    assert "config.json does not count" in refusal(beyond, {"rotate": {"drafts": "drop"}})


def test_folds_that_are_not_exact_are_refused(tmp_path):
    clamped = base_of(tmp_path / "clamped", "olmoe", clip_qkv=4.0)
    assert "clip_qkv" in refusal(clamped, {"smooth": {"folds": ["values"]}})
    assert "MLA" in refusal(base_of(tmp_path / "mla", "deepseek_v3"), {"smooth": {"folds": ["norms", "values"]}})
    for family in ("mixtral", "gpt_oss", "granitemoe"):
        reason = refusal(base_of(tmp_path / family, family), {"smooth": {"folds": ["norms", "up"]}})
        assert reason == "up is for dense feed-forwards and shared experts, and it has neither"


def test_a_family_that_does_not_say_where_its_norms_are_is_refused(tmp_path):
    base = open_base(str(base_of(tmp_path / "base")))
    family = architectures()["llama"].model_copy(update={"residual": None})
    shapes = {name: info.shape for name, info in base.tensors.items()}
    assert (
        residual_stream(Model(family, base.config, shapes))
        == "where Llama has norms, and what they compute, is not described"
    )


@pytest.mark.parametrize("family", sorted(name for name, found in architectures().items() if found.vision is None))
def test_every_family_that_ships_says_where_its_norms_are(family):
    """By the code of the installed transformers: what a layer adds comes from attention or feed-forward, scaled at most."""
    import importlib
    import inspect
    import re

    found = architectures()[family]
    module = importlib.import_module(found.classes.modeling)
    assert found.residual == "plain"
    layer = next(value for name, value in vars(module).items() if name.endswith("DecoderLayer"))
    source = inspect.getsource(layer.forward)
    norms = re.findall(r"self\.(\w*norm)\(", source)
    assert norms == ["input_layernorm", "post_attention_layernorm"]
    sums = re.findall(r"= residual \+ (.*)", source)
    assert len(sums) == 2
    assert all(
        re.match(
            r"hidden_states( \* self\.residual_multiplier)?$|self\.resid_\w+_dropout\(hidden_states\)",
            line.split("  #")[0],
        )
        for line in sums
    )
    norm = next(value for name, value in vars(module).items() if name.endswith("RMSNorm"))
    assert re.search(r"return \(?self\.weight \* hidden_states", inspect.getsource(norm.forward))


def test_pruned_and_drafts(tmp_path):
    base = base_of(tmp_path / "base", "glm4_moe", mtp=True, experts=8)
    cut = prune([[1, 3, 4, 6, 7], [5, 0, 2]])
    assert "drafts: drop" in refusal(base, cut, "rotate")
    dropped = surgery.plan(str(base), manifest_of(cut, {"rotate": {"drafts": "drop"}}))
    assert any(entry.fate == "dropped" and entry.why == "rotate: drafts: drop" for entry in dropped.ledger)
