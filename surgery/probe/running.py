"""Runs a job: each check alone, so that one failure hides no other."""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from . import attention, cached, coded, decoding, dequantized, loading, pictured, quality, sampled
from .noise import Noise
from .outcome import Outcome, failed, skipped, verdict
from .subject import Subject

Check = Callable[[Subject], Outcome]

# In this order: a check may leave state behind in transformers, so the ones that change the model come late.
CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        loading.loading_report,
        loading.tokenizer,
        loading.finite_logits,
        dequantized.dequantized_logits,
        loading.rope_frequencies,
        loading.config_roundtrip,
        decoding.cached_decode_equals_full_forward,
        decoding.greedy_equals_beam_1,
        decoding.beam_4,
        decoding.num_return_sequences,
        decoding.assisted_decoding,
        decoding.left_padded_batch,
        attention.cache_bytes,
        coded.codebook_cache,
        pictured.visual_pruning,
        sampled.visual_sample,
        attention.eager_equals_sdpa,
        attention.output_attentions,
        loading.save_reload,
        loading.gradient_checkpointing,
        decoding.static_cache,
        quality.perplexity_gate,
        quality.base_comparison,
        quality.logits_equal,
        cached.quantized_cache,
    )
}
NAMES = (*CHECKS, "no_warnings")


def run(job_file: Path, result_file: Path) -> None:
    """Run the job and write the result, whole or not at all."""
    job = json.loads(job_file.read_text(encoding="utf-8"))
    wanted = set(NAMES if job.get("checks") is None else job["checks"])
    unknown = sorted(wanted - set(NAMES))
    if unknown:
        raise ValueError(f"no such check: {', '.join(unknown)}")
    if not job.get("sample"):
        wanted.discard(sampled.visual_sample.__name__)
    transformers.logging.set_verbosity_warning()
    transformers.logging.disable_progress_bar()
    noise = Noise()
    with noise.listening(), torch.no_grad():
        subject = Subject(job, noise)
        outcomes = _outcomes(subject, wanted)
    if "no_warnings" in wanted:
        outcomes["no_warnings"] = verdict(noise.messages)
    result = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "checks": [{"name": name} | asdict(outcome) for name, outcome in outcomes.items()],
        # JSON knows no nan: a measurement that is none is left out, and the check that made it says so.
        "measurements": {name: value for name, value in subject.measurements.items() if math.isfinite(value)},
        "sample": subject.sample,
    }
    partial = result_file.with_name(result_file.name + ".partial")
    partial.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(result_file)


def _outcomes(subject: Subject, wanted: set[str]) -> dict[str, Outcome]:
    """Loading is always checked: a model that does not load must not pass for want of a question."""
    outcomes: dict[str, Outcome] = {}
    for name, check in CHECKS.items():
        if name == "loading_report":
            outcomes[name] = _isolated(name, check, subject, before=subject.load)
        elif subject.model is None:
            if name in wanted:
                outcomes[name] = skipped("the model did not load")
        elif name == "tokenizer":
            outcome = _isolated(name, check, subject, before=subject.prepare)
            if name in wanted or outcome.status == "fail":
                outcomes[name] = outcome
        elif name in wanted:
            outcomes[name] = _isolated(name, check, subject)
    return outcomes


def _isolated(name: str, check: Check, subject: Subject, *, before: Callable[[], None] | None = None) -> Outcome:
    print(f"check {name}", file=sys.stderr, flush=True)  # noqa: T201 - a killed probe's last line says where it was
    try:
        if before is not None:
            before()
        return check(subject)
    except Exception as error:  # noqa: BLE001 - any error of the model under test is this check's finding
        return failed(" ".join(f"{type(error).__name__}: {error}".split())[:2000])
