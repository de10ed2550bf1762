"""The measuring stage: text, model, measurement, and a store of results that later runs reuse."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from surgery.calibration.documents import calibration_source
from surgery.calibration.loading import loaded_model
from surgery.calibration.text import Windows, sampled_windows, text_windows
from surgery.checkpoint.evaluate import load
from surgery.checkpoint.reader import Checkpoint
from surgery.checkpoint.writer import environment_errors
from surgery.errors import UsageError
from surgery.manifest import Calibration
from surgery.operations.base import Measuring, Statistics, Step
from surgery.planning import open_draft
from surgery.progress import Progress, Report
from surgery.version import __version__


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with safe_open(path, "pt") as file:
            self._names = list(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._path, "pt") as file:
            found: Tensor = file.get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def measure(
    checkpoint: Checkpoint,
    step: Step,
    calibration: Calibration,
    *,
    folder: Path,
    device: str,
    report: Report,
    stage: str,
) -> Statistics:
    """Measure for one step, or take the stored result of an equal measurement from `folder`.

    Equal means: same base, operation, settings, text and version of surgery.
    """
    key = _fingerprint(checkpoint, step, calibration)
    path = folder / f"{step.operation.name}-{key[:32]}.safetensors"
    if path.is_file():
        report(Progress(stage, 1, 1, "stored result"))
        return _load(path, key)
    if step.operation.measure is None:
        raise UsageError(
            f"{step.operation.name} says that it measures but cannot", cause="its declaration lacks `measure`",
            remedy="report this to the operation's author",
        )  # fmt: skip
    with loaded_model(checkpoint, device) as network:
        windows = _windows(checkpoint, calibration, network)
        found = step.operation.measure(
            Measuring(
                network, open_draft(checkpoint).model, lambda name: load(checkpoint, checkpoint.tensors[name]),
                windows.tokens, calibration.seed,
                lambda done, of: report(Progress(stage, done, of, "layers")),
            ),
            step.settings,
        )  # fmt: skip
    provenance = {**windows.provenance, "tokens_sha256": windows.fingerprint}
    facts = {**found.facts, "provenance": provenance}
    return _store(path, Statistics(found.tensors, facts, key))


def _fingerprint(checkpoint: Checkpoint, step: Step, calibration: Calibration) -> str:
    source = calibration_source(calibration)
    facts = {
        "base": checkpoint.fingerprint(),
        "operation": step.operation.name,
        "settings": step.settings.model_dump(mode="json"),
        "source": source,
        "field": calibration.field,
        "samples": calibration.samples,
        "length": calibration.length,
        "seed": calibration.seed,
        "versions": [__version__, torch.__version__],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _windows(checkpoint: Checkpoint, calibration: Calibration, network: Any) -> Windows:
    longest = getattr(network.config, "max_position_embeddings", None)
    if calibration.text == "self":
        start = network.config.bos_token_id
        return sampled_windows(network, calibration, longest, start if isinstance(start, int) else 0)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(checkpoint.folder))
    except (OSError, ValueError) as error:
        raise UsageError(
            "the base has no tokenizer that loads", cause=f"{type(error).__name__}: {error}",
            remedy="set calibration: {text: self}, which needs none",
        ) from error  # fmt: skip
    return text_windows(calibration, tokenizer, longest)


def _store(path: Path, found: Statistics) -> Statistics:
    with environment_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        tensors = {name: tensor.contiguous() for name, tensor in found.tensors.items()}
        save_file(tensors, temporary, {"facts": json.dumps(found.facts), "fingerprint": found.fingerprint})
        temporary.replace(path)
    return _load(path, found.fingerprint)


def _load(path: Path, fingerprint: str) -> Statistics:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return Statistics(StoredTensors(path), json.loads(metadata["facts"]), fingerprint)
