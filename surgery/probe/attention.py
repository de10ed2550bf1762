"""Attention implementations agree, show their weights, and cache what the plan says."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .decoding import padded
from .loading import forward
from .outcome import Outcome, bounded, failed, skipped, verdict
from .subject import Subject, coded_cache, relative, text_config

FEWER, MORE = 16, 24


def eager_equals_sdpa(subject: Subject) -> Outcome:
    """Both implementations give the same logits, with padding too."""
    if not getattr(subject.model, "_supports_sdpa", True):
        return skipped("the model class says that it has eager attention only")
    tokens, mask = padded(subject)
    logits = {
        name: forward(subject.with_attention(name), tokens, attention_mask=mask)[mask.bool()]
        for name in ("sdpa", "eager")
    }
    return bounded(relative(logits["sdpa"] - logits["eager"], logits["eager"]), subject.tolerance, "logits of both")


def output_attentions(subject: Subject) -> Outcome:
    """One map per layer; each row of it sums to one (or less, beside sinks) and looks at no later token."""
    maps = subject.with_attention("eager")(
        input_ids=subject.prompts[0], use_cache=False, output_attentions=True
    ).attentions
    layers = text_config(subject.model.config).num_hidden_layers
    if maps is None or len(maps) != layers or any(weights is None for weights in maps):
        got = "none" if maps is None else sum(weights is not None for weights in maps)
        return failed(f"{got} attention maps from {layers} layers")
    sinks = any(name.endswith(".sinks") for name, _ in subject.model.named_parameters())
    worst = max(max(_off_one(weights, sinks=sinks), weights.triu(1).abs().max().item()) for weights in maps)
    return bounded(worst, subject.tolerance, "distance of the maps from causal distributions")


def _off_one(weights: Tensor, *, sinks: bool) -> float:
    """How far the sums of a map's rows are from what they may be."""
    excess = weights.sum(-1) - 1
    return (excess.clamp(min=0) if sinks else excess.abs()).max().item()


def cache_bytes(subject: Subject) -> Outcome:
    """What one more token adds to the tensors of a real cache, per row of the batch, is what the plan says."""
    if coded_cache(subject.model.config):
        return skipped("what a token takes depends on the text: see codebook_cache")
    window = getattr(text_config(subject.model.config), "sliding_window", None)
    if isinstance(window, int) and window < MORE:
        return skipped(f"some layers may keep only {window} tokens")
    dtype = str(subject.job.get("kv_dtype") or subject.model.dtype).removeprefix("torch.")
    size = getattr(torch, dtype).itemsize
    fewer, more = (_cached(subject, count) for count in (FEWER, MORE))
    steps = 2 * (MORE - FEWER)
    numbers = (_numbers(more) - _numbers(fewer)) / steps
    used = (_bytes(more, size) - _bytes(fewer, size)) / steps
    subject.measurements["kv_numbers_per_token"] = _whole(numbers)
    subject.measurements["kv_bytes_per_token"] = _whole(used)
    measured = {"kv_numbers_per_token": numbers, "kv_bytes_per_token": used}
    stated = {name: subject.job[name] for name in measured if subject.job.get(name) is not None}
    if not stated:
        return skipped(f"the job states no figure; {used:g} bytes per token as {dtype}")
    problems = [
        f"{name} is {measured[name]:g}, {stated[name]:g} was stated"
        for name in stated
        if measured[name] != stated[name]
    ]
    return verdict(problems, f"{used:g} bytes per token as {dtype}")


def _cached(subject: Subject, count: int) -> list[Tensor]:
    """Every tensor that the cache of two rows of `count` tokens holds."""
    tokens = torch.cat([subject.random_tokens(count, seed=seed) for seed in (2, 3)]).to(subject.device)
    cache = subject.model(input_ids=tokens, use_cache=True).past_key_values
    if cache is None:
        raise ValueError("the model returns no cache")
    return tensors_of(cache)


def tensors_of(cache: Any) -> list[Tensor]:
    """Every tensor that can be reached from a cache, once."""
    found: dict[int, Any] = {}
    _collect(cache, found)
    return [item for item in found.values() if isinstance(item, Tensor)]


def _collect(item: Any, found: dict[int, Any]) -> None:
    """All tensors reachable through containers and attributes: where they are kept differs between versions."""
    if id(item) in found or isinstance(item, (type, ModuleType)):
        return
    found[id(item)] = item
    if isinstance(item, Tensor):
        return
    parts = item.values() if isinstance(item, dict) else item if isinstance(item, (list, tuple, set)) else ()
    for part in (*parts, *getattr(item, "__dict__", {}).values()):
        _collect(part, found)


def _numbers(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _bytes(tensors: list[Tensor], size: int) -> int:
    """Floating numbers count `size` bytes, whatever this run computes in; codes count as they are."""
    return sum(tensor.numel() * (size if tensor.is_floating_point() else tensor.itemsize) for tensor in tensors)


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value
