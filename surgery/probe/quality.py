"""How much the model is worth: perplexity, and distance from the base, on the same windows of text."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .loading import forward
from .outcome import Outcome, bounded, failed, passed, skipped
from .subject import Subject, load_model, text_config

CHUNK = 64  # positions whose distributions are held at once: 150,000 tokens take 40 MB each in float32
CHARACTERS_PER_TOKEN = 12


@dataclass
class Quality:
    """Sums over the windows, turned into means by its properties."""

    is_text: bool
    loss: float = 0.0
    base_loss: float = 0.0
    predicted: int = 0
    divergence: float = 0.0
    agreeing: int = 0
    positions: int = 0
    largest_difference: float = 0.0
    largest_logit: float = 0.0

    @property
    def perplexity(self) -> float:
        """Of the checkpoint."""
        return _exp(self.loss / self.predicted)

    @property
    def base_perplexity(self) -> float:
        """Of the base."""
        return _exp(self.base_loss / self.predicted)


def perplexity_gate(subject: Subject) -> Outcome:
    """Perplexity on the held-out text is at most the stated multiple of the base's."""
    limit, text, base = (subject.job.get(name) for name in ("max_perplexity_ratio", "texts", "against"))
    if not text:
        return failed("a limit is set, but there is no held-out text") if limit else skipped("no held-out text")
    if limit and not base:
        return failed("a limit is set, but there is no base to compare with")
    if subject.tokenizer is None:
        return failed("a held-out text is named, but the folder has no tokenizer")
    quality = measure(subject)
    if not limit:
        return skipped(f"no limit is set; perplexity {quality.perplexity:.4g}")
    return bounded(quality.perplexity / quality.base_perplexity, float(limit), "perplexity over the base's")


def base_comparison(subject: Subject) -> Outcome:
    """The base can be compared token by token: the mean divergence from it is a finite number."""
    if not subject.job.get("against"):
        return skipped("no base to compare with")
    measure(subject)
    divergence = subject.measurements["kl"]
    if not math.isfinite(divergence):
        return failed(f"KL(base || checkpoint) is {divergence} nats per token")
    return passed(f"KL(base || checkpoint) {divergence:.4g} nats per token")


def logits_equal(subject: Subject) -> Outcome:
    """Where nothing was to change, the logits are the base's."""
    if not subject.job.get("expect_identical"):
        return skipped("the output is not meant to equal the base")
    if not subject.job.get("against"):
        return failed("equality is promised, but there is no base to compare with")
    quality = measure(subject)
    value = quality.largest_difference / quality.largest_logit if quality.largest_difference else 0.0
    return bounded(value, subject.tolerance, "logits of the base and of the checkpoint")


@functools.cache
def measure(subject: Subject) -> Quality:
    """Run checkpoint and base over the windows, once per job."""
    subject.release()
    base: Any = None
    rows = windows(subject).to(subject.device)
    quality = Quality(is_text=_has_text(subject))
    if subject.job.get("against"):
        with subject.noise.muted():
            base, _ = load_model(Path(subject.job["against"]), subject.job, base=True)
    for window in rows:
        logits = forward(subject.model, window[None])[0]
        reference = None
        if base is not None:
            with subject.noise.muted():
                reference = forward(base, window[None])[0]
            if reference.shape != logits.shape:
                raise ValueError(f"{logits.shape[-1]} logits where the base gives {reference.shape[-1]}")
        for start in range(0, len(window), CHUNK):
            stop = start + CHUNK
            _add(
                quality,
                logits[start:stop],
                None if reference is None else reference[start:stop],
                window[start + 1 : stop + 1],
            )
    subject.measurements["tokens"] = quality.predicted
    if quality.is_text:
        subject.measurements["perplexity"] = quality.perplexity
    if base is not None:
        if quality.is_text:
            subject.measurements["base_perplexity"] = quality.base_perplexity
        subject.measurements["kl"] = quality.divergence / quality.positions
        subject.measurements["agreement"] = quality.agreeing / quality.positions
    return quality


def _add(quality: Quality, logits: Tensor, reference: Tensor | None, targets: Tensor) -> None:
    """Add one chunk; `targets` is one shorter than the chunk at the end of a window."""
    own = logits.float().log_softmax(-1)
    quality.positions += len(own)
    quality.predicted += len(targets)
    quality.loss -= _at(own, targets)
    if reference is None:
        return
    base = reference.float().log_softmax(-1)
    quality.base_loss -= _at(base, targets)
    quality.divergence += (base.exp() * (base - own)).sum(-1).double().sum().item()
    quality.agreeing += int((base.argmax(-1) == own.argmax(-1)).sum())
    difference = (logits - reference).abs().max().item()
    # A nan must stay: max() would let it go.
    quality.largest_difference = (
        difference if not difference <= quality.largest_difference else quality.largest_difference
    )
    quality.largest_logit = max(quality.largest_logit, reference.abs().max().item())


def _at(distributions: Tensor, targets: Tensor) -> float:
    return distributions[: len(targets)].gather(-1, targets[:, None]).double().sum().item()


def windows(subject: Subject) -> Tensor:
    """Non-overlapping windows (count, length), each begun with the token that the tokenizer begins a text with."""
    count, length = int(subject.job.get("windows", 16)), int(subject.job.get("length", 256))
    length = min(length, getattr(text_config(subject.model.config), "max_position_embeddings", length))
    if not _has_text(subject):
        return subject.random_tokens(count * length, seed=4).view(count, length)
    source = Path(subject.job["texts"]["heldout"])
    with source.open(encoding="utf-8") as file:
        text = file.read(count * length * CHARACTERS_PER_TOKEN)
    # verbose=False: that the text is longer than one context is intended, and cut below.
    tokens = subject.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    begin = _beginning(subject.tokenizer)
    body = length - len(begin)
    count = min(count, len(tokens) // body)
    if count == 0:
        raise ValueError(f"{source.name} has {len(tokens)} tokens, one window needs {body}")
    rows = torch.tensor(tokens[: count * body]).view(count, body)
    return torch.cat([torch.tensor(begin, dtype=torch.long).repeat(count, 1), rows], dim=1)


def _has_text(subject: Subject) -> bool:
    return bool(subject.job.get("texts")) and subject.tokenizer is not None


def _beginning(tokenizer: Any) -> list[int]:
    """The begin-of-text token, where the tokenizer adds it by default."""
    tokens = tokenizer("a").input_ids
    return [tokens[0]] if tokens and tokens[0] == tokenizer.bos_token_id else []


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
