"""A checkpoint of DeepSeek-V3's size: real headers and index, and files that take no disk because they are sparse."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

HIDDEN, HEADS, HEAD, EXPERTS, LAYERS, MLP, VOCABULARY = 7168, 128, 128, 256, 61, 2048, 129280
SHARD_BYTES = 4_300_000_000


def tensors() -> Iterator[tuple[str, str, list[int]]]:
    """Name, dtype and shape: FP8 experts with their scales, as published, around the attention of a listed family."""
    yield "model.embed_tokens.weight", "BF16", [VOCABULARY, HIDDEN]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name in ("q", "k", "v"):
            yield f"{at}.self_attn.{name}_proj.weight", "BF16", [HEADS * HEAD, HIDDEN]
        yield f"{at}.self_attn.o_proj.weight", "BF16", [HIDDEN, HEADS * HEAD]
        for name in ("q_norm", "k_norm"):
            yield f"{at}.self_attn.{name}.weight", "BF16", [HEAD]
        yield f"{at}.mlp.gate.weight", "BF16", [EXPERTS, HIDDEN]
        for expert in range(EXPERTS):
            for name, shape in (("gate", [MLP, HIDDEN]), ("up", [MLP, HIDDEN]), ("down", [HIDDEN, MLP])):
                yield f"{at}.mlp.experts.{expert}.{name}_proj.weight", "F8_E4M3", shape
                scale = [size // 128 for size in shape]
                yield f"{at}.mlp.experts.{expert}.{name}_proj.weight_scale_inv", "F32", scale
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}.{name}.weight", "BF16", [HIDDEN]
    yield "model.norm.weight", "BF16", [HIDDEN]
    yield "lm_head.weight", "BF16", [VOCABULARY, HIDDEN]


def write_giant(folder: Path) -> int:
    """Write it; returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    shards: list[list[tuple[str, str, list[int], int]]] = [[]]
    used = 0
    for name, dtype, shape in tensors():
        count = {"BF16": 2, "F8_E4M3": 1, "F32": 4}[dtype]
        for size in shape:
            count *= size
        if used + count > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append((name, dtype, shape, count))
        used += count
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        total += _write_sparse(folder / file, shard)
        weight_map |= {name: file for name, *_ in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "model_type": "qwen3_moe", "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "head_dim": HEAD, "num_hidden_layers": LAYERS, "num_experts": EXPERTS, "num_experts_per_tok": 8, "vocab_size": VOCABULARY,
        "torch_dtype": "bfloat16", "rope_theta": 10000.0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return total


def _write_sparse(path: Path, shard: list[tuple[str, str, list[int], int]]) -> int:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape, count in shard:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + count]}
        position += count
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + position)
    return position
