# SPDX-License-Identifier: Apache-2.0
"""Attention that can read and write a `CodebookCache`; with no cache, or another one, it is what it was.

Weights and their names are the base's.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .surgery_codebook_cache import CodebookCache
from .surgery_compatibility import (
    attention_returns_cache,
    columns_of,
    merged,
    normalize,
    padded_for_flash,
    rotate,
    sliding_window,
)


def codebook_attention(config: Any, layer_idx: int, replaced: Any) -> Any:
    """The attention of a layer, able to use a codebook cache; as it is where a sliding window bounds its cache."""
    if sliding_window(config, layer_idx, replaced) is None:
        replaced.codebook_returns_cache = getattr(replaced, "returns_cache", attention_returns_cache(replaced))
        if not hasattr(replaced, "scaling"):  # of a few families until 4.57
            replaced.scaling = replaced.head_dim**-0.5
        native: Any = type(replaced)
        replaced.__class__ = _with_codebook(native)
    return replaced


@functools.cache
def _with_codebook(native: Any) -> type:
    return type(f"Codebook{native.__name__}", (CodebookAttention, native), {"__doc__": CodebookAttention.__doc__})


def _revived(native: Any) -> Any:
    made: Any = _with_codebook(native)
    return made.__new__(made)


class CodebookAttention:
    """Stands before a native attention class, or before `LatentAttention`, among the bases of a class."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles look classes up by name, and this one is made at run time."""
        return _revived, (type(self).__bases__[1],), self.__dict__

    def forward(
        self: Any,
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
        cache = past_key_values if past_key_values is not None else past_key_value
        if not isinstance(cache, CodebookCache):
            if cache is not None:
                kwargs["past_key_value" if past_key_values is None else "past_key_values"] = cache
            inputs = {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
            unchanged: tuple[Any, ...] = super().forward(hidden_states, **inputs, **kwargs)  # type: ignore[misc]
            return unchanged
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "the sizes of a codebook cache depend on the text: use surgery_cache=None with torch.compile"
            )

        query, key, value = _states(self, hidden_states)
        columns = self.rotary_columns(position_embeddings[0]) if hasattr(self, "rotary_columns") else None
        cos, sin = columns_of(*merged(*position_embeddings, self.config), columns)
        layer, position = cache.stored[self.layer_idx], cache.now.position.to(key.device)
        layer.append(key, value, position)
        groups = self.num_key_value_groups if cos.shape[1] > 1 else 1
        query = rotate(query, cos.repeat_interleave(groups, 1), sin.repeat_interleave(groups, 1))
        weights, turned = None, None
        if cache.complete(self.layer_idx):  # the kernel and the mask that the model would use without us
            fresh = layer.seen == key.shape[2]
            turned = (
                rotate(key, cos, sin) if fresh else cache.turning(columns, key.device).heads(layer.key, layer.position)
            )
            name = self.config._attn_implementation  # noqa: SLF001
            attention = eager_attention_forward
            if name != "eager":
                attention = ALL_ATTENTION_FUNCTIONS[name]
            states: tuple[Tensor, ...] = (query, turned, layer.value)
            if "flash" in name:
                states = padded_for_flash(*states)
            output, weights = attention(self, *states, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
            output = output[..., : value.shape[-1]]
        else:
            output = layer.attend(query, position, cache.turning(columns, key.device), self.scaling)
        cache.settle(self.layer_idx, query, turned, columns, self.scaling)
        output = self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous())
        return (output, weights, cache) if self.codebook_returns_cache else (output, weights)


def _states(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, D] -> query [B, H, T, d], key [B, G, T, d], value [B, G, T, s], after norms, before rotation."""
    if hasattr(attention, "project"):
        states: tuple[Tensor, Tensor, Tensor] = attention.project(hidden)
        return states
    config, width = attention.config, attention.head_dim
    if hasattr(attention, "qkv_proj"):
        shares = (config.num_attention_heads * width, config.num_key_value_heads * width)
        query, *cached = attention.qkv_proj(hidden).split((*shares, shares[1]), -1)
        key, value = (states.clone() for states in cached)  # a view would keep all three
    else:
        query, key, value = attention.q_proj(hidden), attention.k_proj(hidden), attention.v_proj(hidden)
    if hasattr(attention, "q_norm"):
        query, key = normalize(query, attention.q_norm), normalize(key, attention.k_norm)
    clip = getattr(config, "clip_qkv", None)
    if clip is not None:
        query, key, value = (x.clamp(min=-clip, max=clip) for x in (query, key, value))
    query, key, value = (x.unflatten(-1, (-1, width)).transpose(1, 2) for x in (query, key, value))
    return query, key, value
