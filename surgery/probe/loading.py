"""Does it load, whole and as the files say, and does it survive being saved again."""

from __future__ import annotations

import copy
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .outcome import Outcome, bounded, failed, skipped, verdict
from .subject import Subject, load_model, relative, report_problems, text_config


def loading_report(subject: Subject) -> Outcome:
    """No key is missing, unexpected or of another shape."""
    return verdict(report_problems(subject.report), f"{sum(1 for _ in subject.model.parameters())} parameters loaded")


def tokenizer(subject: Subject) -> Outcome:
    """The tokenizer loads, and every id it can give has a row in the embedding."""
    if subject.tokenizer is None:
        return skipped("the folder has no tokenizer")
    highest = max(subject.tokenizer.get_vocab().values())
    rows = text_config(subject.model.config).vocab_size
    return verdict([f"id {highest} has no row among {rows}"] if highest >= rows else [], f"{rows} rows")


def finite_logits(subject: Subject) -> Outcome:
    """No logit is nan or infinite."""
    logits = forward(subject.model, subject.prompts[0])
    bad = int((~logits.isfinite()).sum())
    return verdict([f"{bad} of {logits.numel()} logits are not finite"] if bad else [])


def rope_frequencies(subject: Subject) -> Outcome:
    """The loaded rotary frequencies are those of the job or, failing that, of the rope base that config.json names."""
    found = {
        name: buffer.float().cpu()
        for name, buffer in subject.model.named_buffers()
        if name.endswith("rotary_emb.inv_freq")
    }
    stated = subject.job.get("inv_freq")
    if not found:
        return failed("no rotary_emb.inv_freq to compare") if stated else skipped("no rotary_emb.inv_freq in the model")
    theta = _rope_base(subject.config.get("text_config") or subject.config)
    if stated is None and theta is None:
        return skipped("config.json names no plain rope base, and the job states no frequencies")
    worst = 0.0
    for name, frequencies in found.items():
        count = frequencies.numel()
        plain = [] if theta is None else [theta ** (-index / count) for index in range(count)]
        expected = torch.tensor(plain if stated is None else stated)
        if expected.shape != frequencies.shape:
            return failed(f"{name} has {count} frequencies, {expected.numel()} were stated")
        worst = max(worst, ((frequencies - expected).abs() / expected.abs()).max().item())
    return bounded(worst, 1e-5, "largest relative difference of a frequency")


def config_roundtrip(subject: Subject) -> Outcome:
    """The configuration pickles, copies, and its class builds without arguments, as loaders and savers ask of it."""
    config = subject.model.config
    problems = []
    # The bytes come from the line above: nothing foreign is unpickled.
    if pickle.loads(pickle.dumps(config)).to_dict() != config.to_dict():  # noqa: S301
        problems.append("pickle changes it")
    if copy.deepcopy(config).to_dict() != config.to_dict():
        problems.append("deepcopy changes it")
    if type(config)().model_type != config.model_type:
        problems.append(f"{type(config).__name__}() has another model_type")
    return verdict(problems, type(config).__name__)


def save_reload(subject: Subject) -> Outcome:
    """save_pretrained writes a checkpoint, code included, that loads whole and gives the same logits."""
    if subject.config.get("quantization_config"):
        return skipped("weights are unpacked where they are loaded: to save them packed, copy the folder")
    subject.release()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "resaved_checkpoint"
        subject.model.save_pretrained(folder)
        written = {file.name for file in folder.iterdir()}
        lost = sorted({file.name for file in subject.folder.glob("*.py")} - written)
        if "auto_map" in subject.config and lost:
            return failed(f"save_pretrained leaves out {', '.join(lost)}")
        model, report = load_model(folder, subject.job)
        problems = report_problems(report)
        if problems:
            return verdict(problems)
        reference = forward(subject.model, subject.prompts[0])
        difference = forward(model, subject.prompts[0]) - reference
    return bounded(relative(difference, reference), subject.tolerance, "logits before and after")


def gradient_checkpointing(subject: Subject) -> Outcome:
    """Training with gradient checkpointing gives a finite loss and finite gradients."""
    model = subject.model
    if not model.supports_gradient_checkpointing:
        return skipped("the model class does not claim it")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return skipped("no parameter can be trained")
    # 5.23 has new names for the switch, and warns about the old ones.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")()
    model.train()
    try:
        with torch.enable_grad():
            loss = model(input_ids=subject.prompts[0], labels=subject.prompts[0], use_cache=False).loss
            loss.backward()
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        problems = [] if loss.isfinite() else ["the loss is not finite"]
        problems += [f"gradient of {name}" for name, value in gradients.items() if not value.isfinite().all()]
        if not any(value.abs().max() > 0 for value in gradients.values()):
            problems.append("every gradient is zero")
    finally:
        model.zero_grad(set_to_none=True)
        getattr(model, f"{kind}_checkpointing_disable")()
        model.eval()
    return verdict(problems, f"loss {loss.item():.3f}, {len(gradients)} gradients")


def forward(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    """Logits of one pass without a cache."""
    logits: Tensor = model(input_ids=tokens, use_cache=False, **options).logits
    return logits


def _rope_base(config: dict[str, Any]) -> float | None:
    """The rope base as any spelling of config.json gives it, where nothing else shapes the frequencies."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = settings.get("rope_type", settings.get("type", "default"))
    nested = any(isinstance(value, dict) for value in settings.values())
    if kind != "default" or nested or "rope_local_base_freq" in config:
        return None
    theta = settings.get("rope_theta", config.get("rope_theta"))
    return None if theta is None else float(theta)
