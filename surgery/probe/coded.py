"""A codebook cache: exact where it is told to keep everything, within its budget otherwise, and what that costs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import tensors_of
from .loading import forward
from .outcome import Outcome, skipped, verdict
from .quality import windows
from .subject import Subject, coded_cache, divergence, relative, text_config

LONGEST, ROWS = 1024, 4
ANSWERED = 4  # the last 1/4 of each row is read with the coded cache
SLACK = 0.02  # of the stock cache's bytes, over the budget


def codebook_cache(subject: Subject) -> Outcome:
    """Kept whole it gives the logits of a full pass; at its budget it holds what it says, and no more than asked."""
    settings = coded_cache(subject.model.config)
    if settings is None:
        return skipped("its cache keeps what it is given")
    tokens = _rows(subject, settings).to(subject.device)
    start = tokens.shape[1] - tokens.shape[1] // ANSWERED
    reference = forward(subject.model, tokens)[:, start:]
    whole = {"method": "solved", "reserve_ratio": 1.0, "theta_k": 1.0, "theta_v": 1.0, "bits": None}
    exact, _ = _read(subject, tokens, start, {**whole, "min_prompt": 0})
    problems = []
    difference = relative(exact - reference, reference)
    if not difference <= subject.tolerance:
        problems.append(f"a cache that keeps everything is off by {difference:.3g} of the largest logit")
    logits, report = _read(subject, tokens, start, {"min_prompt": 0})
    problems += [] if logits.isfinite().all() else ["logits of the coded cache are not finite"]
    cost = divergence(reference, logits)
    subject.measurements["codebook_cache_ratio"] = report["ratio"]
    subject.measurements["codebook_cache_tokens"] = start
    subject.measurements["kl_codebook_cache"] = cost
    if report["bytes"] != report["counted"]:
        problems.append(f"it says {report['bytes']} bytes, its tensors have {report['counted']}")
    raw = (settings["window"] + settings["sinks"]) / start  # these stay as they are whatever the budget is
    allowed = max(settings["reserve_ratio"], raw + 0.05) + SLACK
    if settings["method"] == "solved" and report["ratio"] > allowed:
        problems.append(f"it holds {report['ratio']:.3f} of the stock cache's bytes, {allowed:.3f} is allowed")
    held = f"{report['ratio']:.3f} of the stock bytes for {start} tokens, {cost:.3g} nats per token"
    return verdict(problems, held)


def _rows(subject: Subject, settings: dict[str, Any]) -> Tensor:
    """Rows [R, T] of text where there is one: windows put end to end, as long as the model's own limit allows."""
    limit = getattr(text_config(subject.model.config), "max_position_embeddings", None) or LONGEST
    length = min(LONGEST, limit)
    least = 2 * (settings["window"] + settings["sinks"])
    if subject.job.get("texts") and subject.tokenizer is not None:
        text = windows(subject)
        joined = max(length // text.shape[1], 1)
        count = min(len(text) // joined, ROWS)
        if count and joined * text.shape[1] >= least:
            return text[: count * joined].reshape(count, -1)
    return torch.cat([subject.random_tokens(max(length, least), seed=seed) for seed in range(2)])


def _read(subject: Subject, tokens: Tensor, start: int, settings: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Logits of the tokens from `start` on, read after a cache was coded, and the cache's report at that moment."""
    cache = subject.model.surgery_cache(**settings)
    subject.model(input_ids=tokens[:, :start], past_key_values=cache, use_cache=True)
    report = dict(subject.model.surgery_cache_report(cache))
    held = [cache.tokens, cache.grid, *(tensor for layer in cache.stored.values() for tensor in tensors_of(layer))]
    report["counted"] = sum({id(tensor): tensor.nbytes for tensor in held}.values())
    half = start + (tokens.shape[1] - start) // 2
    parts = [(start, half), (half, tokens.shape[1])]
    logits = [
        subject.model(input_ids=tokens[:, first:last], past_key_values=cache, use_cache=True).logits
        for first, last in parts
    ]
    return torch.cat(logits, 1), report
