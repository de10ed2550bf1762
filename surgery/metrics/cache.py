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
    """The same in bytes, for a cache of torch type `dtype` (for instance `bfloat16`).

    Where the cache is coded, that of a long prompt at its budget; None for the paper's way, which has no budget.
    """
    numbers, coded = cache_numbers_per_token(config), coded_cache(config)
    if numbers is None or (coded is not None and coded["method"] == "paper"):
        return None
    stock = numbers * BITS[SAFETENSORS_NAMES[dtype]] // 8
    return stock if coded is None else round(stock * float(coded["reserve_ratio"]))


def coded_cache(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The settings of a codebook cache, or None where the cache keeps what it is given."""
    ours = config.get("surgery")
    found = ours.get("codebook_cache") if isinstance(ours, Mapping) else None
    return found if isinstance(found, Mapping) else None
