"""Calibration text as token windows, cut from documents or sampled from the base itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.calibration.documents import Document, document_text, read_documents
from surgery.calibration.layers import input_device
from surgery.errors import CorruptCheckpoint, UsageError

if TYPE_CHECKING:
    from surgery.manifest import Calibration

# Windows are chosen among this many times their number, where the text has them.
SPREAD = 4
# Characters tokenized at once.
PIECE = 1 << 18
# Windows that a model writes at once.
ROWS = 32


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

    Windows begin where documents begin, as models were trained, while there are enough documents for that; otherwise
    documents are cut into consecutive windows. `longest` bounds the window length (the model's context). Raises
    UsageError where the text is too short.
    """
    length = min(calibration.length, longest or calibration.length)
    documents, provenance = read_documents(calibration.text, calibration.field)
    start = token_prefix(tokenizer)
    body = length - len(start)
    rows = document_windows(documents, tokenizer, body, calibration.samples)
    if not rows:
        raise UsageError(
            "the calibration text is too short", cause=f"no document of it has the {body} tokens of one window",
            remedy="give longer text, or a smaller calibration length",
        )  # fmt: skip
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(calibration.seed))
    chosen = torch.tensor(rows)[order[: calibration.samples].sort().values]
    tokens = torch.cat([torch.tensor(start, dtype=torch.int64).expand(len(chosen), -1), chosen], 1)
    return Windows(tokens, {**provenance, "samples": len(tokens), "length": length, "seed": calibration.seed})


def document_windows(documents: Iterable[Document], tokenizer: Any, body: int, wanted: int) -> list[list[int]]:
    """Token windows of `body` tokens: document beginnings if there are `wanted` of them, else consecutive windows.

    Reads a few times what is wanted and no more, so that a long text is sampled widely but never tokenized whole. What
    a tokenizer puts before a text is in no window, also where the template of a chat writes it.
    """
    beginnings: list[list[int]] = []
    following: list[list[int]] = []
    for document in documents:
        written = [] if isinstance(document, str) else token_prefix(tokenizer)
        for number, ids in enumerate(token_pieces(document_text(document, tokenizer), tokenizer)):
            skipped = len(written) if number == 0 and ids[: len(written)] == written else 0
            rows = [ids[at : at + body] for at in range(skipped, len(ids) - body + 1, body)]
            beginnings += rows[: number == 0]
            following += rows[number == 0 :]
            if len(following) >= SPREAD * wanted:
                break
        if len(beginnings) >= SPREAD * wanted:
            break
    return beginnings if len(beginnings) >= wanted else beginnings + following


def token_pieces(text: str, tokenizer: Any) -> Iterator[list[int]]:
    """The tokens of a text, without any that the tokenizer would add, a bounded piece of the text at a time."""
    for first in range(0, len(text), PIECE):
        yield tokenizer(text[first : first + PIECE], add_special_tokens=False, verbose=False)["input_ids"]


def token_prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: usually the bos token or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return list(full[: full.index(bare[0])]) if bare and bare[0] in full else []


def sampled_windows(model: Any, calibration: Calibration, longest: int | None, start: int) -> Windows:
    """Windows that the base itself writes, token by token at temperature 1 from token `start`."""
    length = min(calibration.length, longest or calibration.length)
    generator = torch.Generator().manual_seed(calibration.seed)
    counts = [min(ROWS, calibration.samples - first) for first in range(0, calibration.samples, ROWS)]
    rows = [sampled_rows(model, start=start, count=count, length=length, generator=generator) for count in counts]
    provenance = {"text": "self", "samples": calibration.samples, "length": length, "seed": calibration.seed}
    return Windows(torch.cat(rows), provenance)


@torch.no_grad()
def sampled_rows(model: Any, *, start: int, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Tokens [count, length] that a model writes at temperature 1 from token `start`. Raises CorruptCheckpoint."""
    tokens = torch.full((count, 1), start)
    cache, last = None, tokens
    while tokens.shape[1] < length:
        inputs = last.to(input_device(model))
        place = torch.full_like(inputs, tokens.shape[1] - 1)  # until 4.57 Qwen-VL starts anew where none is given
        out = model(input_ids=inputs, position_ids=place, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        chances = out.logits[:, -1].float().softmax(-1).cpu()
        if not chances.isfinite().all():
            raise CorruptCheckpoint(
                "the base gives no probabilities when it writes text",
                cause="its logits are NaN or infinite", remedy="check that the base works",
            )  # fmt: skip
        last = torch.multinomial(chances, 1, generator=generator)
        tokens = torch.cat([tokens, last], 1)
    return tokens
