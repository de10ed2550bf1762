"""Calibration text as token windows, cut from documents or sampled from the base itself."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.calibration.documents import read_documents
from surgery.errors import UsageError

if TYPE_CHECKING:
    from surgery.manifest import Calibration

# Windows are spread over this many times the tokens that they take, where the text has them.
SPREAD = 4


@dataclass(frozen=True)
class Windows:
    """Token windows [samples, length] with the provenance that the lock keeps."""

    tokens: Tensor
    provenance: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens themselves."""
        return hashlib.sha256(self.tokens.to(torch.int64).numpy().tobytes()).hexdigest()


def text_windows(calibration: Calibration, tokenizer: Any, longest: int | None) -> Windows:
    """Windows of the calibration text; every one starts as the tokenizer starts a text.

    `longest` bounds the window length (the model's context). Raises UsageError where the text is too short.
    """
    length = min(calibration.length, longest or calibration.length)
    documents, provenance = read_documents(calibration.text, calibration.field)
    start = _prefix(tokenizer)
    body = length - len(start)
    wanted = calibration.samples * body
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document, add_special_tokens=False)["input_ids"]
        if len(ids) >= wanted * SPREAD:
            break
    count = min(len(ids) // body, calibration.samples) if body > 0 else 0
    if count == 0:
        raise UsageError(
            f"the calibration text has {len(ids)} tokens", cause=f"one window takes {body}",
            remedy="give more text, or a smaller calibration length",
        )  # fmt: skip
    places = torch.randperm(len(ids) // body, generator=torch.Generator().manual_seed(calibration.seed))[:count]
    stream = torch.tensor(ids)
    rows = [torch.cat([torch.tensor(start, dtype=torch.int64), stream[p * body : (p + 1) * body]]) for p in places.sort().values]
    return Windows(torch.stack(rows), {**provenance, "samples": count, "length": length, "seed": calibration.seed})


def _prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: usually the bos token or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return list(full[: full.index(bare[0])]) if bare and bare[0] in full else []


def sampled_windows(model: Any, calibration: Calibration, longest: int | None, start: int) -> Windows:
    """Windows that the base itself writes, token by token at temperature 1 from token `start`."""
    length = min(calibration.length, longest or calibration.length)
    generator = torch.Generator().manual_seed(calibration.seed)
    rows: list[Tensor] = []
    with torch.no_grad():
        for first in range(0, calibration.samples, 32):
            count = min(32, calibration.samples - first)
            rows.append(_sample(model, torch.full((count, 1), start), length, generator))
    provenance = {"text": "self", "samples": calibration.samples, "length": length, "seed": calibration.seed}
    return Windows(torch.cat(rows), provenance)


def _sample(model: Any, tokens: Tensor, length: int, generator: torch.Generator) -> Tensor:
    cache, last = None, tokens
    while tokens.shape[1] < length:
        out = model(input_ids=last.to(model.device), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        chances = out.logits[:, -1].float().softmax(-1).cpu()
        last = torch.multinomial(chances, 1, generator=generator)
        tokens = torch.cat([tokens, last], 1)
    return tokens
