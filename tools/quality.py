"""What the quality benchmarks share: a base, its texts as windows, and how far a result is from it.

A text is divided: its first bytes calibrate and train, the rest is held out; another text is of another kind.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery.calibration.text import text_windows
from surgery.manifest import Calibration


class Trial:
    """One base: its model, its texts as windows, and its own log-probabilities."""

    def __init__(self, folder: Path, chosen: argparse.Namespace, work: Path) -> None:
        self.folder, self.chosen = folder, chosen
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        raw = chosen.calibration.read_bytes()
        self.calibration = work / "calibration.txt"
        held_out = work / "held_out.txt"
        self.calibration.write_bytes(whole_characters(raw[: chosen.calibration_bytes]))
        held_out.write_bytes(whole_characters(raw[chosen.calibration_bytes :]))
        self.texts = {"held out": self.windows(held_out), "other": self.windows(chosen.other)}
        self.expected = {name: log_probabilities(self.base, windows) for name, windows in self.texts.items()}

    def windows(self, path: Path) -> Tensor:
        """Windows of a text, as calibration takes them: from the beginnings of documents where there are enough."""
        settings = {"text": [str(path.absolute())], "samples": self.chosen.windows, "length": self.chosen.length}
        source = Calibration.model_validate(settings)
        return text_windows(source, self.tokenizer, self.chosen.length).tokens

    def measure(self, model: Any) -> dict[str, float]:
        """Perplexity ratio and KL on each text."""
        found = {}
        for name, windows in self.texts.items():
            got, expected = log_probabilities(model, windows), self.expected[name]
            loss = perplexity(got, windows) / perplexity(expected, windows)
            divergence = (expected.exp() * (expected - got)).sum(-1).mean()
            found |= {f"{name} ppl ratio": loss, f"{name} KL": float(divergence)}
        return found


def whole_characters(raw: bytes) -> bytes:
    """Bytes that were cut anywhere, less a torn character at either end."""
    return raw.decode(errors="ignore").encode()


@torch.no_grad()
def log_probabilities(model: Any, windows: Tensor) -> Tensor:
    """[N, T - 1, vocabulary]"""
    return torch.cat([model(input_ids=part).logits[:, :-1].float().log_softmax(-1) for part in windows.split(16)])


def perplexity(found: Tensor, windows: Tensor) -> float:
    """exp of the mean negative log-likelihood per token."""
    return math.exp(-float(found.gather(-1, windows[:, 1:, None]).mean()))


def texts_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which texts are used, and how much of them."""
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--calibration-bytes", type=int, default=3 << 19)
    parser.add_argument("--other", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--output", type=Path, required=True)
