"""The measuring stage: text, model, measurement, and a store of results that later runs reuse."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from surgery.calibration.documents import text_source
from surgery.calibration.loading import load_tokenizer, loaded_model
from surgery.calibration.store import load_statistics, store_statistics
from surgery.calibration.text import Windows, sampled_windows, text_windows
from surgery.checkpoint.evaluate import load
from surgery.checkpoint.reader import Checkpoint
from surgery.errors import UsageError
from surgery.manifest import Calibration
from surgery.operations.base import Measuring, Statistics, Step
from surgery.planning import open_draft
from surgery.progress import Progress, Report
from surgery.version import __version__


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
        return load_statistics(path)
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
    return store_statistics(path, Statistics(found.tensors, facts, key))


def _fingerprint(checkpoint: Checkpoint, step: Step, calibration: Calibration) -> str:
    source = text_source(calibration)
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
    return text_windows(calibration, load_tokenizer(checkpoint), longest)
