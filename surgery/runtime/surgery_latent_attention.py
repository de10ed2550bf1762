# SPDX-License-Identifier: Apache-2.0
"""Attention with narrow heads: a choice of rotary pairs in keys and queries, any width in values.

A dot product under rotary embedding is a sum over pairs of channels, each turning at its own frequency. Keeping some
pairs, each at the frequency it was trained with, keeps exactly those terms of the sum. Values are not rotated, so their
width is free. What is cached is what is kept: keys after rotation and values, in the stock cache.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .surgery_compatibility import (
    attention_returns_cache,
    columns_of,
    merged,
    normalize,
    padded_for_flash,
    rotate,
    sliding_window,
    update_cache,
)


class LatentAttention(nn.Module):
    """Takes the place of a native attention module; the layer and the model around it stay native.

    `config.surgery["latent_attention"]` holds `qkv_bias`, `o_bias`, `inv_freq`, `select_after_norm`, `clip_qkv` and
    `layers`, one entry per layer: `num_key_value_heads` G, `qk_dim` and `vo_dim` (widths of a head, in channels),
    `scaling` (of the dot product) and `rope_pairs` (for each of the G heads the kept columns of the rotary table).

    Channels j and j + n of a key with n pairs form its pair j; channels beyond the pairs are not rotated. With
    `select_after_norm` queries and keys are projected and normalized at the base's width, then the pairs are taken.
    """

    def __init__(self, config: Any, layer_idx: int, replaced: Any) -> None:
        super().__init__()
        settings = config.surgery["latent_attention"]
        layer = settings["layers"][layer_idx]
        self.config, self.layer_idx = config, layer_idx
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, layer["num_key_value_heads"]
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.qk_dim, self.vo_dim, self.scaling = layer["qk_dim"], layer["vo_dim"], layer["scaling"]
        self.clip_qkv = settings["clip_qkv"]
        self.is_causal = getattr(replaced, "is_causal", True)
        self.attention_dropout = getattr(replaced, "attention_dropout", 0.0)
        if hasattr(replaced, "layer_type"):
            self.layer_type = replaced.layer_type
        self.sliding_window = sliding_window(config, layer_idx, replaced)
        self.returns_cache = attention_returns_cache(replaced)

        pairs = layer["rope_pairs"]
        self.pairs_per_head = any(head != pairs[0] for head in pairs)
        self.whole_table = not self.pairs_per_head and pairs[0] == list(range(len(pairs[0])))
        doubled = [head + head for head in pairs]
        self.columns = DeviceTable(doubled if self.pairs_per_head else doubled[0])

        width = self.qk_dim
        self.select_after_norm = settings["select_after_norm"]
        if self.select_after_norm:
            width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            self.q_norm, self.k_norm = replaced.q_norm, replaced.k_norm
            channels = [head + [pair + width // 2 for pair in head] for head in pairs]
            of_query_heads = [head for head in channels for _ in range(self.num_key_value_groups)]
            self.query_channels, self.key_channels = DeviceTable(of_query_heads), DeviceTable(channels)

        hidden, bias = config.hidden_size, settings["qkv_bias"]
        self.q_proj = nn.Linear(hidden, self.num_heads * width, bias=bias)
        self.k_proj = nn.Linear(hidden, self.num_key_value_heads * width, bias=bias)
        self.v_proj = nn.Linear(hidden, self.num_key_value_heads * self.vo_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.vo_dim, hidden, bias=settings["o_bias"])

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        past_key_value: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """hidden_states [B, T, D], position_embeddings (cos, sin) [B, T, table] -> ([B, T, D], weights or None).

        Under M-RoPE the tables may be [3, B, T, table].
        """
        query, key, value = self.project(hidden_states)
        query, key = self._rotate(query, key, *merged(*position_embeddings, self.config))

        cache = past_key_values if past_key_values is not None else past_key_value
        if cache is not None:
            key, value = update_cache(cache, key, value, self.layer_idx, kwargs)

        implementation = self.config._attn_implementation  # noqa: SLF001
        if "flash" in implementation:
            query, key, value = padded_for_flash(query, key, value)

        attention = eager_attention_forward
        if implementation != "eager":
            attention = ALL_ATTENTION_FUNCTIONS[implementation]
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        output = output[..., : self.vo_dim]  # flash kernels had it wider
        output = self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous())
        return (output, weights, cache) if self.returns_cache else (output, weights)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, D] -> query [B, H, T, qk_dim], key [B, G, T, qk_dim], value [B, G, T, vo_dim], not yet rotated."""
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.select_after_norm:
            query, key = normalize(query, self.q_norm), normalize(key, self.k_norm)
        if self.clip_qkv is not None:
            query, key, value = (x.clamp(min=-self.clip_qkv, max=self.clip_qkv) for x in (query, key, value))
        query = query.unflatten(-1, (self.num_heads, -1))
        key = key.unflatten(-1, (self.num_key_value_heads, -1))
        if self.select_after_norm:
            query = torch.take_along_dim(query, self.query_channels.on(query.device)[None, None], dim=-1)
            key = torch.take_along_dim(key, self.key_channels.on(key.device)[None, None], dim=-1)
        value = value.unflatten(-1, (self.num_key_value_heads, self.vo_dim))
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def rotary_columns(self, table: Tensor) -> Tensor | None:
        """Which columns of the rotary table turn the heads: None for all, [w] for the same, [G, w] for each its own."""
        if self.whole_table and table.shape[-1] == len(self.columns.values):
            return None
        return self.columns.on(table.device)

    def _rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Turn every kept pair by the angle the base's own table has for it."""
        cos, sin = columns_of(cos, sin, self.rotary_columns(cos))
        key = rotate(key, cos, sin)
        if cos.shape[1] > 1:  # a table for each cached head, for the queries that share it
            cos, sin = (table.repeat_interleave(self.num_key_value_groups, dim=1) for table in (cos, sin))
        return rotate(query, cos, sin), key


class LatentRotary(nn.Module):
    """Takes the place of the model's rotary module: cos and sin [B, T, 2n] for the n floats of `inv_freq`.

    The angles are computed in float32 whatever the dtype of the model, and `inv_freq` stays a list of Python floats,
    because a buffer would be cast by `.to(dtype)`: at position 8192 bfloat16 is more than a radian off.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.frequencies = DeviceTable(config.surgery["latent_attention"]["inv_freq"], torch.float32)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """Device and dtype are those of `x`; position_ids [B, T] in tokens."""
        angles = position_ids[..., None].float() * self.frequencies.on(x.device)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def latent_rotary(config: Any, replaced: nn.Module) -> nn.Module:
    """The rotary module of a model: `replaced` itself unless the config brings frequencies of its own."""
    return replaced if config.surgery["latent_attention"]["inv_freq"] is None else LatentRotary(config)


class DeviceTable:
    """Numbers of the config as a tensor, made on first use on each device.

    Not a buffer: models are built on the meta device, and a buffer that no file fills is garbage after loading.
    """

    def __init__(self, values: Sequence[Any], dtype: torch.dtype = torch.long) -> None:
        self.values, self.dtype = values, dtype
        self.made: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The tensor on `device`."""
        if torch.compiler.is_compiling():  # a constant of the graph
            return torch.tensor(self.values, dtype=self.dtype, device=device)
        if device not in self.made:
            with torch.inference_mode(False):  # so that training may use it later
                self.made[device] = torch.tensor(self.values, dtype=self.dtype, device=device)
        return self.made[device]
