"""The bytes that one token takes in the key-value cache, read from a config alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.checkpoint.dtypes import BITS, SAFETENSORS_NAMES


def cache_numbers_per_token(config: Mapping[str, Any]) -> int | None:
    """Cached numbers per token over all layers, sum of G (d_qk + d_vo); None where the config does not tell.

    G is `num_key_value_heads`; stock checkpoints have d_qk = d_vo = `head_dim`, ours list all three per layer.
    """
    ours = config.get("surgery")
    if isinstance(ours, Mapping) and isinstance(ours.get("latent_attention"), Mapping):
        layers = ours["latent_attention"]["layers"]
        return sum(int(at["num_key_value_heads"]) * (int(at["qk_dim"]) + int(at["vo_dim"])) for at in layers)
    if config.get("kv_lora_rank") is not None:
        return None
    sizes = [config.get(key) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size")]
    known = [size for size in sizes if type(size) is int and size > 0]
    if len(known) < len(sizes):
        return None
    layers, heads, hidden = known
    head_dim = config.get("head_dim") or hidden // heads
    return int(layers * (config.get("num_key_value_heads") or heads) * 2 * head_dim)


def cache_bytes_per_token(config: Mapping[str, Any], dtype: str) -> int | None:
    """The same in bytes, for a cache of torch type `dtype` (for instance `bfloat16`)."""
    numbers = cache_numbers_per_token(config)
    return None if numbers is None else numbers * BITS[SAFETENSORS_NAMES[dtype]] // 8
