"""The measuring stage: text, model, measurement, and a store of results that later runs reuse."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from surgery.calibration.documents import text_source
from surgery.calibration.loading import load_tokenizer, loaded_model, measured_dtype
from surgery.calibration.store import load_statistics, store_statistics
from surgery.calibration.streamed import opened_layers
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
    place: Path,
    device: str,
    report: Report,
    stage: str,
) -> Statistics:
    """Measure for one step, or take the stored result of an equal measurement.

    `place` is a folder of stored results, in which equal means: same base, operation, settings that matter, text and
    version of surgery. Or it is one such file, from any machine: then it must be of a base with the same config and
    tensors, and nothing is measured. Raises UsageError where it is not.
    """
    found = _given(checkpoint, step, place)
    key = "" if found is not None else _fingerprint(checkpoint, step, calibration)
    path = _path(place, step, key)
    if found is not None or path.is_file():
        report(Progress(stage, 1, 1, "stored result"))
        return found or load_statistics(path)
    if step.operation.measure is None:
        raise UsageError(
            f"{step.operation.name} says that it measures but cannot", cause="its declaration lacks `measure`",
            remedy="report this to the operation's author",
        )  # fmt: skip
    model = open_draft(checkpoint).model

    def tensor(name: str) -> Tensor:
        return load(checkpoint, checkpoint.tensors[name])

    def progress(done: int, of: int) -> None:
        report(Progress(stage, done, of, "steps"))

    if step.weights_only:
        nothing = torch.empty(0, 0, dtype=torch.int64)
        found = step.operation.measure(Measuring(None, model, tensor, nothing, 0, progress), step.settings)
        return _store(path, checkpoint, step, found, {}, key)
    with TemporaryDirectory(prefix="surgery-measure-") as scratch, ExitStack() as stack:
        layers = None
        if step.operation.by_layers(step.settings):
            if calibration.text == "self":
                with loaded_model(checkpoint, device) as writer:
                    windows = _windows(checkpoint, calibration, writer)
            layers = stack.enter_context(opened_layers(checkpoint, torch.device(device), measured_dtype(checkpoint)))
            network = layers.network
        else:
            network = stack.enter_context(loaded_model(checkpoint, device))
        if layers is None or calibration.text != "self":
            windows = _windows(checkpoint, calibration, network)
        measuring = Measuring(
            network, model, tensor, windows.tokens, calibration.seed, progress, layers, Path(scratch)
        )  # fmt: skip
        found = step.operation.measure(measuring, step.settings)
        provenance = {**windows.provenance, "tokens_sha256": windows.fingerprint}
        return _store(path, checkpoint, step, found, provenance, key)


def _store(
    path: Path, checkpoint: Checkpoint, step: Step, found: Statistics, provenance: Mapping[str, Any], key: str
) -> Statistics:
    facts = {**found.facts, "provenance": provenance, "measured": _measured(checkpoint, step)}
    return store_statistics(path, Statistics(found.tensors, facts, key))


def stored_result(checkpoint: Checkpoint, step: Step, calibration: Calibration, place: Path) -> Statistics | None:
    """The stored result of an equal measurement, where there is one. See `measure`."""
    found = _given(checkpoint, step, place)
    if found is not None:
        return found
    path = _path(place, step, _fingerprint(checkpoint, step, calibration))
    return load_statistics(path) if path.is_file() else None


def _given(checkpoint: Checkpoint, step: Step, place: Path) -> Statistics | None:
    """The result in `place` where that is a file; None for a folder. Raises UsageError where it is of another base."""
    if place.is_file():
        found = load_statistics(place)
        wanted, measured = _measured(checkpoint, step), dict(found.facts.get("measured") or ())
        wrong = [name for name in wanted if measured.get(name) != wanted[name]]
        if wrong:
            raise UsageError(
                f"{place.name} is not a measurement of this kind: other {', '.join(wrong)}",
                cause=f"it was made by {measured.get('operation')!r} on a base of family {measured.get('family')!r}",
                remedy="measure this base with these settings, by naming a folder or leaving --statistics out",
            )
        return Statistics(found.tensors, {**found.facts, "given": True}, found.fingerprint)
    if place.suffix == ".safetensors":
        raise UsageError(
            f"{place} is not there", cause="--statistics names a result of calibration, or a folder for results",
            remedy="check the path",
        )  # fmt: skip
    return None


def _path(folder: Path, step: Step, key: str) -> Path:
    return folder / f"{step.operation.name}-{key[:32]}.safetensors"


def _measured(checkpoint: Checkpoint, step: Step) -> dict[str, Any]:
    """What a measurement is of, in terms that hold on every machine."""
    return {
        "operation": step.operation.name,
        "settings": json.loads(json.dumps(step.operation.measured_by(step.settings))),
        "family": checkpoint.config.get("model_type"),
        "base": checkpoint.identity(),
        "weights": checkpoint.sample(),
    }


def _fingerprint(checkpoint: Checkpoint, step: Step, calibration: Calibration) -> str:
    facts = {
        "base": checkpoint.fingerprint(),
        "operation": step.operation.name,
        "settings": step.operation.measured_by(step.settings),
        "versions": [__version__, *(_version(name) for name in ("torch", "transformers", "gptqmodel", "optimum"))],
    }
    if not step.weights_only:
        facts |= {
            "source": text_source(calibration),
            "field": calibration.field,
            "samples": calibration.samples,
            "length": calibration.length,
            "seed": calibration.seed,
        }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _windows(checkpoint: Checkpoint, calibration: Calibration, network: Any) -> Windows:
    longest = getattr(network.config, "max_position_embeddings", None)
    if calibration.text == "self":
        start = network.config.get_text_config().bos_token_id
        return sampled_windows(network, calibration, longest, start if isinstance(start, int) else 0)
    return text_windows(calibration, load_tokenizer(checkpoint), longest)
