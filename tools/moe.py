"""What the benchmarks of experts share: a MoE base, its domains as text and windows, and conversions of it.

Calibration windows come from training documents, held-out windows from held-out documents (`surgery.builtin.text`).
"""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quality import log_probabilities
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery
from surgery.builtin.text import DOMAINS, heldout_documents, training_documents
from surgery.calibration.text import token_prefix
from surgery.checkpoint.resolve import open_base

# Characters of a piece of a document: enough for a window, few enough that windows lie everywhere in it.
PIECE = 1200


@dataclass(frozen=True)
class Found:
    """KL to the base and negative log-likelihood, in nats per token: one number a held-out window, by domain."""

    kl: dict[str, Tensor]
    nll: dict[str, Tensor]

    @property
    def pooled(self) -> Tensor:
        """KL of every window of every domain."""
        return torch.cat(list(self.kl.values()))


class Bench:
    """A base, its held-out windows with its own log-probabilities, and texts to calibrate on."""

    def __init__(self, base: str, work: Path, windows: int, length: int, samples: int) -> None:
        self.base, self.work, self.length, self.samples = base, work, length, samples
        folder = open_base(base).folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.windows = {domain: self._heldout(domain, windows) for domain in DOMAINS}
        self.model = load(folder)
        self.expected = {domain: log_probabilities(self.model, rows) for domain, rows in self.windows.items()}
        pieces = {domain: list(_pieces(domain)) for domain in DOMAINS}
        mixed = [piece for turn in zip(*pieces.values(), strict=False) for piece in turn]
        self.texts = {}
        for name, documents in {**pieces, "mixed": mixed}.items():
            self.texts[name] = work / f"{name}.jsonl"
            self.texts[name].write_text("".join(json.dumps({"text": piece}) + "\n" for piece in documents))

    def _heldout(self, domain: str, count: int) -> Tensor:
        """Windows spread evenly over the held-out documents of a domain."""
        start = token_prefix(self.tokenizer)
        body, rows = self.length - len(start), []
        for document in heldout_documents(domain):
            ids = self.tokenizer(document, add_special_tokens=False)["input_ids"]
            rows += [[*start, *ids[at : at + body]] for at in range(0, len(ids) - body + 1, body)]
        return torch.tensor([rows[number * len(rows) // count] for number in range(min(count, len(rows)))])

    def convert(self, operations: Sequence[dict[str, Any]], text: str = "mixed", seed: int = 0) -> tuple[Path, Any]:
        """The folder of a result, and what its conversion told. Raises SurgeryError."""
        calibration = {
            "text": [str(self.texts[text])], "samples": self.samples, "length": self.length, "seed": seed,
        }  # fmt: skip
        settings = {"surgery": 1, "operations": list(operations), "calibration": calibration, "verify": False}
        out = self.work / "out"
        manifest = surgery.manifest_from_dict(settings)
        return out, surgery.convert(self.base, out, manifest, overwrite=True, statistics=self.work / "statistics")

    def measure(self, model: Any) -> Found:
        """What a model does to the held-out windows."""
        kl, nll = {}, {}
        for domain, windows in self.windows.items():
            got, expected = log_probabilities(model, windows), self.expected[domain]
            kl[domain] = (expected.exp() * (expected - got)).sum(-1).mean(-1)
            nll[domain] = likelihood(got, windows)
        gc.collect()  # outputs lie in cycles, 100 MB a model
        return Found(kl, nll)

    def figures(self, found: Found) -> dict[str, float]:
        """KL and perplexity ratio of each domain, and pooled: of all windows together, domains weighing alike."""
        base = {domain: likelihood(self.expected[domain], rows) for domain, rows in self.windows.items()}
        worse = {domain: found.nll[domain] - base[domain] for domain in base}
        kl = {**found.kl, "pooled": found.pooled}
        ratio = {**worse, "pooled": torch.cat(list(worse.values()))}
        return {f"{name} KL": float(kl[name].mean()) for name in kl} | {
            f"{name} ppl ratio": float(ratio[name].mean().exp()) for name in ratio
        }


def load(folder: Path) -> Any:
    """A checkpoint in float32, whatever its type."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


def likelihood(found: Tensor, windows: Tensor) -> Tensor:
    """Negative log-likelihood per token of each window."""
    return -found.gather(-1, windows[:, 1:, None])[..., 0].mean(-1)


def _pieces(domain: str) -> Iterator[str]:
    """Pieces of training documents, cut at ends of lines, in an order without meaning."""
    found = []
    for document in training_documents(domain):
        piece = ""
        for line in document.splitlines(keepends=True):
            piece += line
            if len(piece) >= PIECE:
                found.append(piece)
                piece = ""
    random.Random(0).shuffle(found)  # noqa: S311 - no secret
    yield from found
