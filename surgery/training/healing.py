"""The healing stage: text, the two trainings, and what is told of them."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from surgery.calibration.documents import BUILTIN_TEXTS, read_documents
from surgery.calibration.loading import check_device, load_tokenizer, loaded_model
from surgery.calibration.store import load_statistics, store_statistics
from surgery.calibration.streamed import skeleton
from surgery.checkpoint.dtypes import TORCH_NAMES
from surgery.checkpoint.reader import Checkpoint
from surgery.errors import UnsupportedModel, UsageError
from surgery.metrics.plots import require_plots
from surgery.operations.base import Statistics, Training
from surgery.operations.heal import HealSettings
from surgery.sizes import human_count
from surgery.training import curves
from surgery.training.data import Corpus, open_corpus, pack_corpus, write_self
from surgery.training.end_to_end import end_to_end
from surgery.training.groups import Selection, require_parameters
from surgery.training.layerwise import layerwise
from surgery.training.processes import accelerator
from surgery.training.run import Run, judge


def heal(training: Training, settings: HealSettings, selection: Selection) -> Statistics:
    """Train the student towards the teacher; returns the trained tensors as they are stored, and what was recorded.

    Only the process that leads has the tensors. What an earlier run of the same stage finished is taken from its
    folder. Raises UnsupportedModel where student and teacher do not fit together, and what the stages raise.
    """
    result = training.folder / "trained.safetensors"
    made = accelerator(settings, training.device, training.record.with_name(training.record.name + ".logs"))
    if result.is_file():
        made.wait_for_everyone()
        return load_statistics(result)
    check_device(training.device)
    require_plots("training draws its loss curves", extra="heal")
    _check_pair(training, settings)
    require_parameters(selection.names, dict(skeleton(training.student).named_parameters()))
    if settings.tracker:
        made.init_trackers("surgery", config={"operation": "heal", **_flat(settings.model_dump(mode="json"))})
    corpus = _corpus(training, settings, made)
    run = Run(training, settings, corpus, selection, made)
    tensors, first = layerwise(run)
    tensors, second = end_to_end(run, tensors)
    for tracker in made.trackers:
        tracker.finish()
    found = Statistics({}, {"notes": []})
    if made.is_main_process:
        found = _conclude(run, tensors, [*first, *second])
        store_statistics(result, found)
    made.wait_for_everyone()
    return found


def _conclude(run: Run, tensors: dict[str, Tensor], history: list[curves.Entry]) -> Statistics:
    """Round to the stored types, draw the curves, and say what was done."""
    training, settings = run.training, run.settings
    # Taken out one by one, so that memory never holds all of them in both types.
    stored = {name: _as_stored(training.student, name, tensors.pop(name)) for name in list(tensors)}
    changed = sum(tensor.numel() for tensor in stored.values())
    on = run.corpus.provenance
    amounts = {
        stage: run.steps(part.tokens) * settings.batch_size * run.length
        for stage, part in (("layerwise", settings.layerwise), ("end_to_end", settings.end_to_end))
        if part is not None
    }
    heldout = [{k: e[k] for k in ("step", "heldout", "kl", "perplexity")} for e in history if "heldout" in e]
    summary = {
        "settings": settings.model_dump(mode="json"), "tokens": amounts, "trained_parameters": changed,
        "text": on, "teacher": training.teacher.source, "processes": int(run.accelerator.num_processes),
        "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    curves.publish(training.record, summary, history)
    words = " and ".join(f"{human_count(count)} tokens {stage.replace('_', ' ')}" for stage, count in amounts.items())
    notes = [f"healed {human_count(changed)} parameters on {words}, of {_text_name(on)}"]
    if heldout:
        first, last = heldout[0], heldout[-1]
        known = "at least " if settings.end_to_end is not None and settings.end_to_end.teacher == "stored" else ""
        notes.append(
            f"on held-out text KL to the base went from {known}{first['kl']:.4g} to {last['kl']:.4g} nats per token, "
            f"perplexity from {first['perplexity']:.4g} to {last['perplexity']:.4g}"
        )
    record = {
        "text": on, "tokens": amounts, "heldout": heldout, "trained": sorted(stored),
        "processes": int(run.accelerator.num_processes),
        "versions": {package: version(package) for package in ("accelerate", "peft") if find_spec(package)},
    }  # fmt: skip
    return Statistics(stored, {"notes": notes, "record": record}, training.fingerprint)


def _as_stored(student: Checkpoint, name: str, tensor: Tensor) -> Tensor:
    if not bool(tensor.isfinite().all()):
        judge([math.nan], f"the end, in {name!r}", "the states of training are kept in OUT.partial")
    return tensor.to(getattr(torch, TORCH_NAMES[student.tensors[name].dtype])).contiguous()


def _text_name(provenance: Mapping[str, Any]) -> str:
    files = provenance.get("files")
    if files:
        return ", ".join(str(file["name"]) for file in files)
    words = {"self": "text that the base wrote"} | dict.fromkeys(BUILTIN_TEXTS, "the built-in text")
    return words.get(str(provenance.get("text")), str(provenance.get("dataset", "the given text")))


def _check_pair(training: Training, settings: HealSettings) -> None:
    """Whether the student can learn from this teacher at all."""
    student, teacher = training.student.config, training.teacher.config
    wanted = ["vocab_size"]
    end = settings.end_to_end
    if settings.layerwise is not None or (end is not None and end.loss != "next_token" and end.hidden_weight):
        wanted += ["num_hidden_layers", "hidden_size"]
    for key in wanted:
        if student.get(key) != teacher.get(key):
            raise UnsupportedModel(
                f"the teacher does not fit: its {key} is {teacher.get(key)}, the student's {student.get(key)}",
                cause="both must give a distribution over the same tokens, and layers are compared one to one",
                remedy="name the checkpoint that the student was made from as --teacher",
            )  # fmt: skip


def _corpus(training: Training, settings: HealSettings, made: Any) -> Corpus:
    """The text as windows; the process that leads writes them, the others read them."""
    folder = training.folder / "corpus"
    if made.is_main_process and open_corpus(folder) is None:
        _write_corpus(training, settings, folder)
    made.wait_for_everyone()
    found = open_corpus(folder)
    if found is None:
        raise UsageError(
            "the training text is not there", cause="the first process did not finish writing it, or shares no folder",
            remedy="put OUT on a file system that all processes see",
        )  # fmt: skip
    return found


def _write_corpus(training: Training, settings: HealSettings, folder: Any) -> None:
    data, student = training.data, training.student
    longest = student.config.get("max_position_embeddings")
    length = min(data.length, longest) if isinstance(longest, int) else data.length
    stages = (settings.layerwise, settings.end_to_end)
    tokens = data.tokens or max(stage.tokens for stage in stages if stage is not None)
    if data.text == "self":
        start = training.teacher.config.get("bos_token_id")
        with loaded_model(training.teacher, training.device) as network:
            write_self(
                network, folder=folder, length=length, tokens=tokens, heldout=data.heldout, seed=data.seed,
                start=start if isinstance(start, int) else 0, report=training.report, stage="write text",
            )  # fmt: skip
        return
    documents, source = read_documents(data.text, data.field)
    tokenizer = load_tokenizer(training.teacher)
    size = training.teacher.config.get("vocab_size")
    if isinstance(size, int) and max(tokenizer.get_vocab().values(), default=0) >= size:
        raise UsageError(
            "the tokenizer has tokens that the model does not know", cause=f"the model has {size} rows of embeddings",
            remedy="use the tokenizer that belongs to the base, or set data.text: self, which needs none",
        )  # fmt: skip
    pack_corpus(
        documents, tokenizer, folder=folder, length=length, tokens=tokens,
        heldout=data.heldout, seed=data.seed, eos=data.eos, source=source,
    )  # fmt: skip


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as one level of text, which every tracker takes."""
    flat: dict[str, str] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: str(value)}
    return flat
