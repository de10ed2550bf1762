"""The families of tiny.py that only expert pruning knows, and the two formats in which the Hub has experts quantised.

Shapes and numbers alone; tiny.py writes the files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

MOE_ONLY = ("deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "granitemoe")
ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
}

_GROUPED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "attention_bias": False,
}
_DEEPSEEK = _GROUPED | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_layer_freq": 1,
    "ep_size": 1,
    "seq_aux": True,
}
PARTICULAR: dict[str, dict[str, Any]] = {
    # q_lora_rank, topk_method and norm_topk_prob as DeepSeek-V2-Lite has them
    "deepseek_v2": _DEEPSEEK
    | {
        "q_lora_rank": None,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3": _DEEPSEEK
    | {
        "q_lora_rank": 24,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
    },
    "glm4_moe": _GROUPED
    | {
        "head_dim": 16,
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
    },
    "gpt_oss": {
        "head_dim": 16,
        "attention_bias": True,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "experts_per_token": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "swiglu_limit": 7.0,
        "router_aux_loss_coef": 0.9,
        "output_router_logits": False,
        "initial_context_length": 64,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    },
    "granitemoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "attention_bias": False,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 8.0,
        "router_aux_loss_coef": 0.001,
        "output_router_logits": False,
        "tie_word_embeddings": True,
    },
}

# Every key a family's published config.json states the number of experts by, and the number each token goes to.
EXPERT_KEYS = {
    "mixtral": ("num_local_experts",),
    "qwen2_moe": ("num_experts",),
    "qwen3_moe": ("num_experts", "num_local_experts"),
    "olmoe": ("num_experts",),
    "deepseek_v2": ("n_routed_experts",),
    "deepseek_v3": ("n_routed_experts",),
    "glm4_moe": ("n_routed_experts",),
    "gpt_oss": ("num_local_experts",),
    "granitemoe": ("num_local_experts",),
}
TOP_K_KEYS = dict.fromkeys(EXPERT_KEYS, ("num_experts_per_tok",)) | {
    "gpt_oss": ("num_experts_per_tok", "experts_per_token")
}

# As openai/gpt-oss-20b and deepseek-ai/DeepSeek-V3 publish them.
MXFP4_CONFIG = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
FP8_CONFIG = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}

_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
Shapes = Iterator[tuple[str, tuple[int, ...]]]
Tensors = dict[str, torch.Tensor]


def latent_attention(config: dict[str, Any], prefix: str) -> Shapes:
    """The attention of the two DeepSeek families; queries are compressed where `q_lora_rank` is set."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    rotary, plain, value = (config[key] for key in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
    rank, queries = config["kv_lora_rank"], heads * (plain + rotary)
    if config["q_lora_rank"] is None:
        yield f"{prefix}.q_proj.weight", (queries, hidden)
    else:
        yield f"{prefix}.q_a_proj.weight", (config["q_lora_rank"], hidden)
        yield f"{prefix}.q_a_layernorm.weight", (config["q_lora_rank"],)
        yield f"{prefix}.q_b_proj.weight", (queries, config["q_lora_rank"])
    yield f"{prefix}.kv_a_proj_with_mqa.weight", (rank + rotary, hidden)
    yield f"{prefix}.kv_a_layernorm.weight", (rank,)
    yield f"{prefix}.kv_b_proj.weight", (heads * (plain + value), rank)
    yield f"{prefix}.o_proj.weight", (hidden, heads * value)


def feed_forward(config: dict[str, Any], layer: str) -> Shapes:
    """The MoE block, or in the first layers of a DeepSeek or GLM model the dense one, of `layer` (model.layers.N)."""
    hidden, inner, family = config["hidden_size"], config["intermediate_size"], config["model_type"]
    if family == "gpt_oss":
        experts = config["num_local_experts"]
        yield f"{layer}.mlp.router.weight", (experts, hidden)
        yield f"{layer}.mlp.router.bias", (experts,)
        yield f"{layer}.mlp.experts.gate_up_proj", (experts, hidden, 2 * inner)
        yield f"{layer}.mlp.experts.gate_up_proj_bias", (experts, 2 * inner)
        yield f"{layer}.mlp.experts.down_proj", (experts, inner, hidden)
        yield f"{layer}.mlp.experts.down_proj_bias", (experts, hidden)
    elif family == "granitemoe":
        experts = config["num_local_experts"]
        yield f"{layer}.block_sparse_moe.router.layer.weight", (experts, hidden)
        yield f"{layer}.block_sparse_moe.input_linear.weight", (experts, 2 * inner, hidden)
        yield f"{layer}.block_sparse_moe.output_linear.weight", (experts, hidden, inner)
    elif int(layer.rpartition(".")[2]) < config["first_k_dense_replace"]:
        yield from gated(f"{layer}.mlp", hidden, inner)
    else:
        experts, width = config["n_routed_experts"], config["moe_intermediate_size"]
        yield f"{layer}.mlp.gate.weight", (experts, hidden)
        if family != "deepseek_v2":
            yield f"{layer}.mlp.gate.e_score_correction_bias", (experts,)
        for expert in range(experts):
            yield from gated(f"{layer}.mlp.experts.{expert}", hidden, width)
        yield from gated(f"{layer}.mlp.shared_experts", hidden, width * config["n_shared_experts"])


def prediction_layer(config: dict[str, Any], layer: str) -> Shapes:
    """What a multi-token prediction layer has beside the parts of a decoder layer."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield f"{layer}.embed_tokens.weight", (vocabulary, hidden)
    yield f"{layer}.enorm.weight", (hidden,)
    yield f"{layer}.hnorm.weight", (hidden,)
    yield f"{layer}.eh_proj.weight", (hidden, 2 * hidden)
    yield f"{layer}.shared_head.norm.weight", (hidden,)
    yield f"{layer}.shared_head.head.weight", (vocabulary, hidden)


def gated(
    prefix: str, hidden: int, inner: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Shapes:
    """The three projections of a gated feed-forward."""
    gate, up, down = names
    yield f"{prefix}.{gate}.weight", (inner, hidden)
    yield f"{prefix}.{up}.weight", (inner, hidden)
    yield f"{prefix}.{down}.weight", (hidden, inner)


def to_fp8(tensors: Tensors) -> Tensors:
    """Every projection DeepSeek publishes in float8 (all but router, embedding and heads), scales beside it."""
    found = {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight") or ".eh_proj." in name:
            found[name] = tensor
            continue
        rows, columns = tensor.shape
        padded = torch.nn.functional.pad(tensor.float(), (0, -columns % 128, 0, -rows % 128))
        blocks = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))  # [row block, row, column block, column]
        scale = blocks.abs().amax(dim=(1, 3)) / 448
        whole = (blocks / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)
        found[name] = whole[:rows, :columns].to(torch.float8_e4m3fn).contiguous()
        found[f"{name}_scale_inv"] = scale
    return found


def to_mxfp4(tensors: Tensors) -> Tensors:
    """The experts of gpt_oss in blocks of 32 values of four bits, low nibble first, and one exponent each."""
    found = {}
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[name] = tensor
            continue
        groups = tensor.float().transpose(1, 2).unflatten(2, (-1, 32))  # [E, out, in / 32, 32]
        exponent = (groups.abs().amax(dim=3).log2().floor() - 2).clamp(-127, 127)  # 6 = 1.5 * 2 ** 2 is the largest
        scaled = groups * torch.exp2(-exponent)[..., None]
        codes = (scaled.abs()[..., None] - _FP4).abs().argmin(dim=-1) + 8 * (scaled < 0)
        found[f"{name}_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        found[f"{name}_scales"] = (exponent + 127).to(torch.uint8)
    return found
