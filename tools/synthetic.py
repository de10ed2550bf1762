"""What the benchmarks of size share: a large model of noise, and the memory that a process holds for itself."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HIDDEN, MLP, KV, VOCABULARY = 4096, 14336, 1024, 32000
EXPERTS, EXPERT_HIDDEN, EXPERT_MLP = 128, 2048, 768  # of Qwen3-30B-A3B


def tensor_shapes(layers: int, model: str = "llama") -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama with 8B-sized layers, or of a Qwen3-MoE with layers of the size of 30B-A3B."""
    yield from (llama_shapes if model == "llama" else qwen3_moe_shapes)(layers)


def llama_shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama with 8B-sized layers."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name, shape in (("q", (HIDDEN, HIDDEN)), ("k", (KV, HIDDEN)), ("v", (KV, HIDDEN)), ("o", (HIDDEN, HIDDEN))):
            yield f"{at}self_attn.{name}_proj.weight", shape
        for name, shape in (("gate", (MLP, HIDDEN)), ("up", (MLP, HIDDEN)), ("down", (HIDDEN, MLP))):
            yield f"{at}mlp.{name}_proj.weight", shape
        yield f"{at}input_layernorm.weight", (HIDDEN,)
        yield f"{at}post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)


def qwen3_moe_shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Qwen3-MoE with layers of the size of 30B-A3B, each expert by itself."""
    yield "model.embed_tokens.weight", (VOCABULARY, EXPERT_HIDDEN)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name, rows in (("q", HIDDEN), ("k", 512), ("v", 512)):
            yield f"{at}self_attn.{name}_proj.weight", (rows, EXPERT_HIDDEN)
        yield f"{at}self_attn.o_proj.weight", (EXPERT_HIDDEN, HIDDEN)
        yield f"{at}self_attn.q_norm.weight", (128,)
        yield f"{at}self_attn.k_norm.weight", (128,)
        yield f"{at}mlp.gate.weight", (EXPERTS, EXPERT_HIDDEN)
        for expert in range(EXPERTS):
            yield f"{at}mlp.experts.{expert}.gate_proj.weight", (EXPERT_MLP, EXPERT_HIDDEN)
            yield f"{at}mlp.experts.{expert}.up_proj.weight", (EXPERT_MLP, EXPERT_HIDDEN)
            yield f"{at}mlp.experts.{expert}.down_proj.weight", (EXPERT_HIDDEN, EXPERT_MLP)
        yield f"{at}input_layernorm.weight", (EXPERT_HIDDEN,)
        yield f"{at}post_attention_layernorm.weight", (EXPERT_HIDDEN,)
    yield "model.norm.weight", (EXPERT_HIDDEN,)


def make_checkpoint(folder: Path, gigabytes: float, model: str = "llama") -> int:
    """Write a checkpoint of about `gigabytes`; returns its exact bytes of tensors."""
    per_layer = 2 * sum(int(np.prod(shape)) for name, shape in tensor_shapes(1, model) if ".layers.0." in name)
    tensors = list(tensor_shapes(max(1, round(gigabytes * 1e9 / per_layer)), model))
    layers = sum(name.endswith("q_proj.weight") for name, _ in tensors)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in tensors:
        count = 2 * int(np.prod(shape))
        if size + count > 512_000_000 and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += count
    folder.mkdir(parents=True)
    noise = (np.random.default_rng(0).standard_normal(1 << 22).astype(np.float32) * 0.02).view(np.uint32) >> 16
    block = noise.astype(np.uint16).tobytes()
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {tensor: name for tensor, _ in shard}
        write_shard(folder / name, shard, block)
    total = sum(2 * int(np.prod(shape)) for _, shape in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(layers, model)))
    return total


def write_shard(path: Path, shard: list[tuple[str, tuple[int, ...]]], block: bytes) -> None:
    """Write one safetensors file whose data is `block` over and over."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shard:
        count = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + count]}
        position += count
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        while position:
            position -= file.write(block[:position])


def config(layers: int, model: str = "llama") -> dict[str, object]:
    """config.json of the synthetic model."""
    if model == "qwen3_moe":
        return {
            "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": EXPERT_HIDDEN,
            "intermediate_size": 6144, "moe_intermediate_size": EXPERT_MLP, "num_experts": EXPERTS,
            "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": layers,
            "vocab_size": VOCABULARY, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
            "max_position_embeddings": 8192, "hidden_act": "silu", "torch_dtype": "bfloat16",
        }  # fmt: skip
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": MLP,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": layers,
        "vocab_size": VOCABULARY, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "max_position_embeddings": 8192, "hidden_act": "silu", "torch_dtype": "bfloat16",
    }  # fmt: skip


def private_bytes(pid: int) -> int:
    """Memory that only this process and its children hold."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Private_Dirty"):  # clean pages are page cache
                total += int(line.split()[1]) * 1024
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return total  # it ended between two looks
    return total + sum(private_bytes(int(child)) for child in children)
