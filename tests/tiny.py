"""Tiny random checkpoints, one family each, in the tensor layout the Hub has.

Written without transformers: names and shapes stand here, so a base is ready in milliseconds and cannot take over a
habit of whatever transformers happens to be installed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests import tiny_moe
from tests.tiny_moe import EXPERT_KEYS, MOE_ONLY, TOP_K_KEYS, gated

# FAMILIES are those of latent KV heads, MOE_FAMILIES those of them with experts; MOE_ONLY has the rest with experts.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
MOE_FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
} | tiny_moe.ARCHITECTURES

# Original contexts are short, so that a few dozen tokens already feel the scaling.
ROPES: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {"type": "longrope"},
}

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SHARED_EXPERT = {"shared_expert_intermediate_size": 48, "decoder_sparse_step": 1, "mlp_only_layers": []}
_PARTICULAR: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16, "attention_bias": False, "mlp_bias": False},
    "mistral": {"head_dim": 16, "sliding_window": None},
    "qwen2": {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 2},
    "qwen3": {"head_dim": 16, "attention_bias": False, "use_sliding_window": False, "max_window_layers": 2},
    "phi3": {"sliding_window": None, "original_max_position_embeddings": 256, "partial_rotary_factor": 1.0},
    "mixtral": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32} | _SHARED_EXPERT,
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": None, "norm_topk_prob": False},
} | tiny_moe.PARTICULAR

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def write_tiny(
    folder: str | Path,
    family: str,
    rope: str = "default",
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    **overrides: Any,
) -> Path:
    """Write a random base of `family` into `folder` (made if missing): config.json and `shards` safetensors files.

    `rope` is a key of ROPES; `overrides` replace config fields, and the tensor shapes follow. Two layers, 4 query
    heads, 2 KV heads, head width 16, hidden width 64, 128 tokens, 4 experts of which 2 are active, unless overridden;
    tiny_config has options for experts. Returns the folder.
    """
    config = tiny_config(family, rope, dtype=dtype, **overrides)
    return _write(Path(folder), config, tiny_tensors(config, seed=seed, dtype=dtype), shards)


def write_fp8(folder: str | Path, seed: int = 0, *, shards: int = 1, **overrides: Any) -> Path:
    """A tiny deepseek_v3 whose projections are float8 with one float32 scale per 128 x 128 block, the rest bfloat16."""
    config = tiny_config("deepseek_v3", dtype=torch.bfloat16, **overrides)
    tensors = tiny_moe.to_fp8(tiny_tensors(config, seed=seed, dtype=torch.bfloat16))
    return _write(Path(folder), config | {"quantization_config": tiny_moe.FP8_CONFIG}, tensors, shards)


def write_mxfp4(folder: str | Path, seed: int = 0, *, shards: int = 1, **overrides: Any) -> Path:
    """A tiny gpt_oss whose experts are in blocks of four-bit values, the rest bfloat16."""
    config = tiny_config("gpt_oss", dtype=torch.bfloat16, **overrides)
    tensors = tiny_moe.to_mxfp4(tiny_tensors(config, seed=seed, dtype=torch.bfloat16))
    return _write(Path(folder), config | {"quantization_config": tiny_moe.MXFP4_CONFIG}, tensors, shards)


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], shards: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return folder


def tiny_config(
    family: str,
    rope: str = "default",
    *,
    dtype: torch.dtype = torch.float32,
    experts: int | None = None,
    top_k: int | None = None,
    mtp: bool = False,
    **overrides: Any,
) -> dict[str, Any]:
    """The config.json of a tiny base: legacy rope keys, both dtype keys.

    `experts` and `top_k` set every key by which the family states the number of experts, and of active ones; `mtp`
    adds a multi-token prediction layer to deepseek_v3 and glm4_moe.
    """
    config = {"architectures": [ARCHITECTURES[family]], "model_type": family} | _COMMON | _PARTICULAR[family]
    config |= {"rope_scaling": ROPES[rope] or config["rope_scaling"]}
    for keys, count in ((EXPERT_KEYS, experts), (TOP_K_KEYS, top_k)):
        config |= dict.fromkeys(keys[family], count) if count is not None else {}
    if mtp:
        assert "num_nextn_predict_layers" in config, f"{family} has no multi-token prediction"
        config["num_nextn_predict_layers"] = 1
    config |= {"torch_dtype": str(dtype).removeprefix("torch.")} | overrides
    if "layer_types" in config and "layer_types" not in overrides:
        layers = config["num_hidden_layers"]
        config["layer_types"] = (config["layer_types"] * layers)[:layers]
    config.setdefault("dtype", config["torch_dtype"])
    if rope == "longrope":
        pairs = head_width(config) // 2
        short, long = [1.0 + 0.1 * j for j in range(pairs)], [2.0 + j for j in range(pairs)]
        config["rope_scaling"] = {"type": "longrope", "short_factor": short, "long_factor": long}
        config["original_max_position_embeddings"] = config["max_position_embeddings"] // 4
    return config


def tiny_tensors(
    config: dict[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Random weights for `config`: unit-variance projections, norms near one, so that attention is far from flat."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in _shapes(config):
        values = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            values = 1 + 0.1 * values
        elif name.endswith("bias"):
            values = 0.2 * values
        elif name.endswith("_proj"):  # experts as [E, in, out]
            values = values * shape[-2] ** -0.5
        elif name != "model.embed_tokens.weight" and not name.endswith("sinks"):
            values = values * shape[-1] ** -0.5
        tensors[name] = values if name.endswith("e_score_correction_bias") else values.to(dtype)
    return tensors


def head_width(config: dict[str, Any]) -> int:
    """The width of one head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _shapes(config: dict[str, Any]) -> Shapes:
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"] + config.get("num_nextn_predict_layers", 0)):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield from _attention(config, f"{prefix}.self_attn")
        yield from _feed_forward(config, prefix)
        if layer >= config["num_hidden_layers"]:
            yield from tiny_moe.prediction_layer(config, prefix)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocabulary, hidden)


def _attention(config: dict[str, Any], prefix: str) -> Shapes:
    hidden, width, family = config["hidden_size"], head_width(config), config["model_type"]
    if family.startswith("deepseek"):
        yield from tiny_moe.latent_attention(config, prefix)
        return
    queries, keys = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    if family == "phi3":
        yield f"{prefix}.qkv_proj.weight", (queries + 2 * keys, hidden)
    else:
        bias = family in ("qwen2", "qwen2_moe") or config.get("attention_bias")
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield f"{prefix}.{name}.weight", (rows, hidden)
            if bias:
                yield f"{prefix}.{name}.bias", (rows,)
    yield f"{prefix}.o_proj.weight", (hidden, queries)
    if config.get("attention_bias") and family != "glm4_moe":
        yield f"{prefix}.o_proj.bias", (hidden,)
    if family == "gpt_oss":
        yield f"{prefix}.sinks", (config["num_attention_heads"],)
    if family in ("qwen3", "qwen3_moe", "olmoe") or config.get("use_qk_norm"):
        whole = family == "olmoe"
        yield f"{prefix}.q_norm.weight", (queries if whole else width,)
        yield f"{prefix}.k_norm.weight", (keys if whole else width,)


def _feed_forward(config: dict[str, Any], layer: str) -> Shapes:
    hidden, inner, family = config["hidden_size"], config["intermediate_size"], config["model_type"]
    if family in MOE_ONLY:
        yield from tiny_moe.feed_forward(config, layer)
    elif family == "phi3":
        yield f"{layer}.mlp.gate_up_proj.weight", (2 * inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
    elif family == "mixtral":
        yield f"{layer}.block_sparse_moe.gate.weight", (config["num_local_experts"], hidden)
        for expert in range(config["num_local_experts"]):
            prefix = f"{layer}.block_sparse_moe.experts.{expert}"
            yield from gated(prefix, hidden, inner, names=("w1", "w3", "w2"))
    elif family in MOE_FAMILIES:
        yield f"{layer}.mlp.gate.weight", (config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            yield from gated(f"{layer}.mlp.experts.{expert}", hidden, config.get("moe_intermediate_size", inner))
        if family == "qwen2_moe":
            yield from gated(f"{layer}.mlp.shared_expert", hidden, config["shared_expert_intermediate_size"])
            yield f"{layer}.mlp.shared_expert_gate.weight", (1, hidden)
    else:
        yield from gated(f"{layer}.mlp", hidden, inner)
