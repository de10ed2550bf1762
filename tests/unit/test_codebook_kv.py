"""What `codebook_kv` says of a model and writes beside its weights; the cache itself is in test_codebook_rows.py."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

import surgery
from surgery.emission.code import Family, RuntimePart, emit_code
from surgery.emission.lint import lint
from surgery.errors import ManifestError, UnsupportedModel
from surgery.metrics.cache import cache_bytes_per_token, coded_cache
from surgery.operations.codebook_kv import CodebookKVSettings
from surgery.runtime.surgery_codebook_settings import PAPER, CacheSettings
from tests.tiny import write_tiny


def manifest_of(*operations):
    return surgery.manifest_from_dict({"surgery": 1, "operations": list(operations), "verify": False})


def raw_tensors(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).view(-1).numpy().tobytes() for name in file.keys()}  # noqa: SIM118


def test_weights_stay_to_the_byte_and_settings_are_in_the_config(tmp_path):
    base = write_tiny(tmp_path / "base", "phi3")  # fused projections stay fused
    done = surgery.convert(str(base), tmp_path / "out", manifest_of({"codebook_kv": {"reserve_ratio": 0.4}}))
    assert raw_tensors(done.out) == raw_tensors(base)
    config = json.loads((done.out / "config.json").read_text())
    assert config["model_type"] == "surgery_phi3"
    assert config["surgery"]["codebook_cache"] == CodebookKVSettings(reserve_ratio=0.4).model_dump(mode="json")
    assert done.plan.fates == {"kept": len(raw_tensors(base))}


def test_the_plan_tells_of_a_long_prompt_and_promises_nothing_of_a_token(tmp_path):
    base = write_tiny(tmp_path / "base", "llama")
    done = surgery.convert(str(base), tmp_path / "out", manifest_of({"codebook_kv": {"reserve_ratio": 0.25}}))
    assert done.plan.cache_coded
    assert done.plan.cache_bytes_after == done.plan.cache_bytes_before / 4
    lock = json.loads((done.out / "surgery.lock.json").read_text())
    assert lock["promises"]["kv_bytes_per_token"] is None


def test_the_papers_way_has_no_budget_to_tell_of():
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
    assert cache_bytes_per_token(config, "float32") == 2 * 4 * 2 * 16 * 4
    coded = config | {"surgery": {"codebook_cache": CodebookKVSettings(method="paper").model_dump()}}
    assert coded_cache(coded)["method"] == "paper"
    assert cache_bytes_per_token(coded, "float32") is None


def test_the_card_says_how_to_use_it_and_where_it_saves(tmp_path):
    base = write_tiny(tmp_path / "base", "qwen3")
    done = surgery.convert(str(base), tmp_path / "out", manifest_of({"codebook_kv": {}}))
    card = (done.out / "README.md").read_text()
    assert "surgery_cache=None" in card
    assert "vLLM, SGLang and others bring caches of their own" in card


def test_generated_classes_inherit_and_swap_in_order():
    parts = [
        RuntimePart("surgery_latent_attention.py", "LatentAttention", "self_attn"),
        RuntimePart("surgery_codebook_attention.py", "codebook_attention", "self_attn", what="attention"),
    ]
    files = emit_code(Family.named("llama", "Llama"), parts, "1")
    assert lint(files) == []
    text = files["modeling_surgery_llama.py"].decode()
    assert "class SurgeryLlamaModel(Capabilities, CodebookModel, LlamaModel):" in text
    assert "class SurgeryLlamaForCausalLM(Capabilities, CodebookGeneration, LlamaForCausalLM, GenerationMixin):" in text
    first = text.index("layer.self_attn = LatentAttention(config, index, layer.self_attn)")
    assert first < text.index("layer.self_attn = codebook_attention(config, index, layer.self_attn)")
    assert "recorded_outputs(LlamaModel, attentions=LatentAttention)" in text


def test_a_changed_attention_keeps_what_its_native_class_says_of_itself():
    part = RuntimePart("surgery_codebook_attention.py", "codebook_attention", "self_attn", what="attention")
    text = emit_code(Family.named("llama", "Llama"), [part], "1")["modeling_surgery_llama.py"].decode()
    assert "_supports_static_cache" not in text
    assert "recorded_outputs(LlamaModel)" in text


def test_both_definitions_of_the_settings_agree():
    """The manifest's and the runtime's: names, defaults, and what the paper's way sets."""
    assert CodebookKVSettings().model_dump() == vars(CacheSettings())
    ours = CodebookKVSettings(method="paper").model_dump()
    assert ours == vars(CacheSettings.of({}, {"method": "paper"}))
    assert {name: ours[name] for name in PAPER} == PAPER


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reserve_ratio": 0}, "reserve_ratio"),
        ({"bits": 7}, "bits"),
        ({"pool": 4}, "pool must be odd"),
        ({"method": "paper", "reserve_ratio": 0.04}, "beta is more than reserve_ratio"),
        ({"method": "paper", "theta_k": None}, "theta_k and theta_v must be numbers"),
        ({"ratio": 0.5}, "ratio"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, said):
    with pytest.raises(ManifestError, match=said):
        manifest_of({"codebook_kv": settings})


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        ("llama", {"rope_interleave": True}, "interleaved"),
        ("llama", {"partial_rotary_factor": 0.5}, "8 of 16 channels rotate"),
        ("llama", {"alibi": True}, "no rotary positions"),
        ("deepseek_v3", {}, "MLA"),
        ("mistral", {"sliding_window": 8}, "sliding window"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(family, config, said, tmp_path):
    base = write_tiny(tmp_path / "base", family)
    written = json.loads((base / "config.json").read_text()) | config
    (base / "config.json").write_text(json.dumps(written))
    with pytest.raises(UnsupportedModel) as caught:
        surgery.convert(str(base), tmp_path / "out", manifest_of({"codebook_kv": {}}))
    assert said in caught.value.cause
    assert not (tmp_path / "out").exists()


def test_masks_are_for_groups_that_fit_a_number(tmp_path):
    base = write_tiny(tmp_path / "base", "llama", num_attention_heads=32, num_key_value_heads=1)
    with pytest.raises(UnsupportedModel) as caught:
        surgery.plan(str(base), manifest_of({"codebook_kv": {"heads": "mask"}}))
    assert "31 query heads" in caught.value.cause
    assert surgery.plan(str(base), manifest_of({"codebook_kv": {}})).cache_coded


def test_order_is_held(tmp_path):
    with pytest.raises(ManifestError, match="kv_latent cannot come after codebook_kv"):
        manifest_of({"codebook_kv": {}}, {"kv_latent": {}})
