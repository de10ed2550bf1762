"""What a quantized KV cache, which transformers makes at run time, would cost this model."""

from __future__ import annotations

import inspect
import json
from typing import Any

import torch
import transformers
from torch import Tensor

from .loading import forward
from .outcome import Outcome, failed, passed, skipped
from .quality import windows
from .subject import Subject, divergence, text_config

# Windows that are decoded token by token.
TRIED = 4
GROUPS = (64, 32, 16, 8)


def quantized_cache(subject: Subject) -> Outcome:
    """Divergence from the logits without a cache, for each kind that the job names, over the second half of windows."""
    kinds = subject.job.get("quantized_cache") or []
    if not kinds:
        return skipped("no kind of quantized cache is to be measured")
    made_for_it = getattr(transformers, "QuantizedCache", None)
    if made_for_it is None or "backend" not in inspect.signature(made_for_it).parameters:
        return failed(f"transformers {transformers.__version__} has no quantized cache that takes a backend")
    if not getattr(type(subject.model), "_supports_quantized_cache", True):
        return skipped("its caches have widths of their own, which a quantized cache does not hold")
    tokens = windows(subject)[:TRIED].to(subject.device)
    found = {}
    for kind in kinds:
        settings = cache_config(kind, subject.model.config, tokens.shape[1])
        cost = _divergence(subject, tokens, settings)
        subject.measurements[f"kl_cache_{kind}"] = cost
        found[kind] = {"nats_per_token": float(f"{cost:.3g}"), "tokens": tokens.shape[1], "cache_config": settings}
    return passed(json.dumps(found))


def cache_config(kind: str, config: Any, length: int) -> dict[str, Any]:
    """Settings of a kind such as `fp8`, `hqq-4` or `quanto-4`, for windows of this length."""
    backend, _, bits = kind.partition("-")
    if backend == "fp8":
        return {"backend": "fp8"}
    text = text_config(config)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    axis = 1 if backend == "hqq" else 0
    return {
        "backend": backend, "nbits": int(bits), "axis_key": axis, "axis_value": axis,
        "q_group_size": next((size for size in GROUPS if head % size == 0), head),
        "residual_length": 128 if length >= 512 else max(length // 8, 1),
    }  # fmt: skip


def _divergence(subject: Subject, tokens: Tensor, settings: dict[str, Any]) -> float:
    half = tokens.shape[1] // 2
    total = 0.0
    for row in tokens:
        window = row[None]
        expected = forward(subject.model, window)[:, half:]
        cache = transformers.QuantizedCache(config=subject.model.config, **settings)
        subject.model(input_ids=window[:, :half], past_key_values=cache, use_cache=True)
        steps = []
        for at in range(half, window.shape[1]):
            step = subject.model(input_ids=window[:, at : at + 1], past_key_values=cache, use_cache=True)
            steps.append(step.logits)
        total += divergence(expected, torch.cat(steps, 1))
    return total / len(tokens)
