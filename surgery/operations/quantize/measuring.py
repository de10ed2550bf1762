"""Calibrated rounding: which ways are tried, and which one held-out text keeps.

Each choice that is judged must lower the divergence from the model as it was, on windows that rounding never saw, by
more than two standard errors of the difference. Otherwise the plainer way stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from surgery.calibration.store import StoredTensors
from surgery.errors import InternalError, UsageError
from surgery.operations.base import Measuring, Statistics
from surgery.operations.quantize.budget import best_uniform, budget_bytes
from surgery.operations.quantize.rounding import Recipe
from surgery.operations.quantize.sensitivity import sensible_grids
from surgery.operations.quantize.settings import QuantizeSettings
from surgery.operations.quantize.targets import Targets, find_targets, uniform_grids, wanted_grid
from surgery.operations.quantize.walk import Ground, Walked, reference_log_probabilities, walk
from surgery.quantization.schemes import Grid

# Windows kept back to judge: one in eight, at most 32.
HELD_OUT, MOST_HELD_OUT = 8, 32
# Standard errors by which a judged choice must be better.
SURE = 2.0
# Errors of outputs that are told of.
TOLD_ABOVE = 0.10
MOST_TOLD = 3


@dataclass(frozen=True)
class _Judgement:
    """A choice against the plainer way: the difference of divergence in nats per token, and its standard error."""

    name: str
    difference: float
    error: float
    kept: bool

    def to_json(self) -> dict[str, Any]:
        return {"difference": self.difference, "standard_error": self.error, "kept": self.kept}


def measure(measuring: Measuring, settings: QuantizeSettings) -> Statistics:
    """Codes and scales of every matrix, and what was decided. Raises UsageError for too little text to judge on."""
    targets = find_targets(measuring.model, settings.ignore)
    if settings.engine == "gptqmodel":
        return _by_gptqmodel(measuring, settings, targets)
    ground = _ground(measuring, settings, targets)
    reference = reference_log_probabilities(ground) if len(ground.heldout) else torch.empty(0)
    best, judged = _best(ground, targets, reference)
    facts = {
        "grids": _grid_facts(best.grids),
        "judged": {of.name: of.to_json() for of in judged},
        "heldout": {
            "windows": len(ground.heldout),
            **({"kl": float(best.divergence.mean())} if len(ground.heldout) else {}),
        },
        "notes": list(_notes(best, judged, ground)),
    }
    return Statistics(StoredTensors(*best.files), facts)


def _by_gptqmodel(measuring: Measuring, settings: QuantizeSettings, targets: Targets) -> Statistics:
    """The same from optimum and gptqmodel, which run the whole model."""
    from surgery.quantization.gptqmodel import round_by_gptqmodel

    grids = uniform_grids(targets, settings)
    modules = [module for module, grid in grids.items() if grid is not None]
    size = wanted_grid(settings).group_size
    tensors = round_by_gptqmodel(
        measuring.network, measuring.windows, modules, bits=settings.bits, group_size=size or -1,
        damping=settings.damping, act_order=settings.act_order,
    )  # fmt: skip
    return Statistics(tensors, {"grids": _grid_facts(grids), "notes": ["rounded by optimum and gptqmodel"]})


def _grid_facts(grids: Mapping[str, Grid | None]) -> dict[str, Any]:
    return {module: None if grid is None else list(astuple(grid)) for module, grid in grids.items()}


def _ground(measuring: Measuring, settings: QuantizeSettings, targets: Targets) -> Ground:
    from surgery.operations.quantize import FORMATS

    if measuring.layers is None:
        raise InternalError(
            "quantize was given no layers", cause="`by_layers` was not asked", remedy="report this as a defect"
        )
    count = len(measuring.windows)
    judges = settings.bytes_per_weight is not None or "judged" in {settings.scales, settings.bias_correction}
    least = 2 if judges else 1  # an error of a difference takes two
    held = min(max(count // HELD_OUT, least), MOST_HELD_OUT) if count > 1 else 0
    if judges and count <= least:
        raise UsageError(
            f"there are {count} windows of calibration text", cause="a choice that is judged needs two more, held out",
            remedy="raise calibration.samples",
        )  # fmt: skip
    # Held-out windows are spread over the text, as the others are.
    at = torch.linspace(0, count - 1, held).round().long() if held else torch.empty(0, dtype=torch.long)
    rest = torch.ones(count, dtype=torch.bool).index_fill(0, at, False)
    layers = measuring.layers
    with layers.entrance():
        _, keywords = layers.calls(measuring.windows[:1])
    total, done = len(keywords) * (1 + _walks(settings)), [0]

    def step() -> None:
        done[0] += 1
        measuring.progress(min(done[0], total), total)

    return Ground(
        layers, targets.linears, settings, FORMATS[settings.format], measuring.windows[rest], measuring.windows[at],
        keywords, measuring.scratch, step,
    )  # fmt: skip


def _walks(settings: QuantizeSettings) -> int:
    judged = 2 * (settings.scales == "judged") + (settings.bias_correction == "judged")
    return 1 + judged + 2 * (settings.bytes_per_weight is not None)


def _best(ground: Ground, targets: Targets, reference: Tensor) -> tuple[Walked, list[_Judgement]]:
    """Walk with the plain recipe, then with one more choice at a time; each stays where it is surely better."""
    settings = ground.settings
    grids = uniform_grids(targets, settings)
    if settings.bytes_per_weight is not None:
        grids = best_uniform(targets, settings)
    recipe = Recipe(grids, "none" if settings.scales == "judged" else settings.scales)
    best, judged = walk(ground, recipe, "plain", reference), []
    for name, changed in _choices(ground, targets, recipe):
        recipe_now = changed(recipe)
        found = walk(ground, recipe_now, name, reference)
        judgement = _judge(name, best, found)
        judged.append(judgement)
        loser = best if judgement.kept else found
        if judgement.kept:
            best, recipe = found, recipe_now
        for path in loser.files:  # as large as half the model
            path.unlink()
    return best, judged


def _choices(ground: Ground, targets: Targets, recipe: Recipe) -> Iterator[tuple[str, Any]]:
    settings = ground.settings
    if settings.bytes_per_weight is not None:
        budget = budget_bytes(targets, settings)
        mixed = sensible_grids(ground, targets, recipe, budget)
        yield "bits_by_sensitivity", lambda now: replace(now, grids=mixed)
    if settings.scales == "judged":
        for scales in ("mse", "activation"):
            yield f"scales_{scales}", lambda now, scales=scales: replace(now, scales=scales)
    if settings.bias_correction == "judged" and any(
        f"{linear.module}.bias" in ground.layers.checkpoint.tensors for linear in targets.linears
    ):
        yield "bias_correction", lambda now: replace(now, biases=True)


def _judge(name: str, plain: Walked, found: Walked) -> _Judgement:
    difference = found.divergence - plain.divergence
    mean = float(difference.mean())
    error = float(difference.std() / len(difference) ** 0.5) if len(difference) > 1 else abs(mean)
    return _Judgement(name, mean, error, kept=mean < -SURE * error)


def _notes(best: Walked, judged: list[_Judgement], ground: Ground) -> Iterator[str]:
    if len(ground.heldout):
        kl = float(best.divergence.mean())
        on = f"{len(ground.heldout)} held-out windows of the calibration text"
        yield f"rounding alone costs {kl:.5f} nats per token on {on}"
    for of in judged:
        verdict = "kept" if of.kept else "not kept"
        yield f"{of.name} {verdict}: it changes that by {of.difference:+.5f} (standard error {of.error:.5f})"
    raised = [module for module, grid in best.grids.items() if grid is not None and grid == Grid(8, None)]
    asked = ground.settings.bits == 4 and ground.settings.bytes_per_weight is None
    if asked and raised:
        yield f"{len(raised)} matrices got 8 bits, as their outputs would be off by more: {_some(raised)}"
    poor = {module: error for module, error in best.errors.items() if error > TOLD_ABOVE}
    if poor:
        worst = max(poor, key=lambda module: poor[module])
        yield (
            f"the outputs of {len(poor)} of {len(best.errors)} matrices are off by more than {TOLD_ABOVE:.0%}, most "
            f"those of {worst}: {poor[worst]:.1%}"
        )
    reasons: dict[str, list[str]] = {}
    for module, reason in best.fallbacks.items():
        reasons.setdefault(reason.partition(": ")[2] or reason, []).append(module)
    for reason, modules in reasons.items():
        yield f"{len(modules)} matrices not rounded as asked, {reason}: {_some(modules)}"


def _some(modules: list[str]) -> str:
    more = f" and {len(modules) - MOST_TOLD} more" if len(modules) > MOST_TOLD else ""
    return ", ".join(modules[:MOST_TOLD]) + more
