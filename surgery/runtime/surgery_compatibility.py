# SPDX-License-Identifier: Apache-2.0
"""What our files share: how releases of transformers differ, and the arithmetic around an attention function.

Differences are found by looking at what is installed, never at its version number.
"""

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import cache_utils, modeling_utils

try:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: F401  (first in 4.48)
except ImportError as error:
    raise ImportError(
        f"This checkpoint needs transformers 4.48.3 or newer; installed is {transformers.__version__}. "
        "Run: pip install -U transformers"
    ) from error

CACHE_IS_TOLD_WHERE = "cache_kwargs" in inspect.signature(cache_utils.Cache.update).parameters


def keep_weight_conversion(native_type: str, own_type: str) -> None:
    """Let `own_type` load its weights by the rules of `native_type`; both are `model_type` strings, or class names.

    transformers 5 renames and fuses tensors (experts, above all) by model_type or class, and initializes at random what
    it finds no rule for. Releases without such rules need nothing.
    """
    try:
        from transformers.conversion_mapping import (
            get_checkpoint_conversion_mapping,
            register_checkpoint_conversion_mapping,
        )
    except ImportError:
        return
    rules = get_checkpoint_conversion_mapping(native_type)
    if rules:
        register_checkpoint_conversion_mapping(own_type, rules, overwrite=True)


def tied_weights(native_class: type) -> dict[str, str] | None:
    """What `native_class` ties, as the mapping {tied: source} that 5.x wants; 4.x has a list and takes a mapping."""
    tied: Any = getattr(native_class, "_tied_weights_keys", None)
    return {"lm_head.weight": "model.embed_tokens.weight"} if isinstance(tied, list) else tied


def recorded_outputs(native_class: type, **replacements: type) -> dict[str, Any] | None:
    """The outputs `native_class` records by module class, with the classes in `replacements` (name=class) put in."""
    recorded = getattr(native_class, "_can_record_outputs", None)
    if not recorded:
        return None
    return {**recorded, **{name: module for name, module in replacements.items() if name in recorded}}


def record_inside(model: Any, **replacements: type) -> None:
    """Let a model that is a part of another one record the outputs of modules that were put into it."""
    native: Any = type(model)
    recorded = recorded_outputs(native, **replacements)
    if recorded is not None:
        model.__class__ = type(f"Surgery{native.__name__}", (native,), {"_can_record_outputs": recorded})
        # Taken note of when a model is made, by the name of its class; some releases let only models be keys.
        dict.__setitem__(getattr(modeling_utils, "_CAN_RECORD_REGISTRY", {}), str(type(model)), recorded)


def static_cache_holds_any_width() -> bool:
    """Whether a static cache takes the widths of keys and of values from the tensors it is given (from 5.0 on)."""
    allocate = getattr(getattr(cache_utils, "StaticLayer", None), "lazy_initialization", None)
    return allocate is not None and "value_states" in inspect.signature(allocate).parameters


def update_cache(cache: Any, key: Tensor, value: Tensor, layer_idx: int, options: dict[str, Any]) -> Any:
    """Append keys and values [B, G, T, width] to layer `layer_idx`; returns all that the layer holds.

    Until 5.3 a static cache has to be told where, or it writes over its first tokens without a word. There `options`,
    what the layer passed to its attention, has the positions.
    """
    positions = options.get("cache_position") if CACHE_IS_TOLD_WHERE else None
    if positions is None:
        return cache.update(key, value, layer_idx)
    return cache.update(key, value, layer_idx, {"cache_position": positions})


def padded_for_flash(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """The three in one width, a multiple of 8, as flash kernels want them; the output has to be cropped afterwards.

    Zero channels change no dot product.
    """
    width = -(-max(key.shape[-1], value.shape[-1]) // 8) * 8
    return tuple(nn.functional.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))


def attention_returns_cache(native_attention: nn.Module) -> bool:
    """Whether the layer around `native_attention` unpacks (output, weights, cache) instead of (output, weights).

    True until 4.53 for the families whose attention was still written as one class per backend.
    """
    one_class_per_backend = "use_cache" in inspect.signature(native_attention.forward).parameters
    return one_class_per_backend and not hasattr(cache_utils, "DynamicLayer")


def sliding_window(config: Any, layer_idx: int, native_attention: Any) -> int | None:
    """The window in tokens of one attention layer, or None: wherever the installed release keeps it."""
    if hasattr(native_attention, "sliding_window"):
        window: int | None = native_attention.sliding_window
        return window
    window = getattr(config, "sliding_window", None)
    if getattr(config, "layer_types", None):
        return window if config.layer_types[layer_idx] == "sliding_attention" else None
    in_use = getattr(config, "use_sliding_window", True) and layer_idx >= getattr(config, "max_window_layers", 0)
    return window if in_use else None


def mrope_sections(config: Any) -> list[int] | None:
    """Rotary pairs that turn by time, by height and by width, where tokens have these three positions (M-RoPE)."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    sections: list[int] | None = rope.get("mrope_section")
    return sections


def merged(cos: Tensor, sin: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Tables [3, B, T, table] of M-RoPE's three positions -> [B, T, table], each section by its own; one is as it is.

    Until 5.15 the rotary modules of Qwen2-VL and Qwen2.5-VL leave this to attention.
    """
    sections = mrope_sections(config)
    if cos.ndim == 3 or sections is None:
        return cos, sin
    cos, sin = (
        torch.cat([section[number % 3] for number, section in enumerate(table.split(sections * 2, -1))], -1)
        for table in (cos, sin)
    )
    return cos, sin


def columns_of(cos: Tensor, sin: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """[B, T, table] -> [B, 1 or G, T, w]."""
    if columns is None:
        return cos[:, None], sin[:, None]
    if columns.ndim == 1:
        return cos[:, None, :, columns], sin[:, None, :, columns]
    return cos[..., columns].transpose(1, 2), sin[..., columns].transpose(1, 2)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first `cos.shape[-1]` channels, half-split: channels j and j + n are a pair."""
    rotary, rest = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    first, second = rotary.chunk(2, dim=-1)
    rotary = (rotary * cos) + (torch.cat((-second, first), dim=-1) * sin)
    return torch.cat((rotary, rest), dim=-1) if rest.shape[-1] else rotary


def normalize(states: Tensor, norm: Any) -> Tensor:
    """Apply a norm over each head or over all heads at once, whichever the norm's weight is made for."""
    normalized: Tensor = norm(states.reshape(*states.shape[:-1], -1, norm.weight.shape[-1]))
    return normalized.flatten(-2)
