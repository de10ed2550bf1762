"""Measuring for `expert_prune`: usage of experts, damage per layer and number of experts, or weights alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.architectures import Model
from surgery.architectures.experts import ExpertLayer, main_layers
from surgery.calibration.compare import divergence
from surgery.calibration.layers import record_calls
from surgery.errors import CorruptCheckpoint, InternalError, UnsupportedModel
from surgery.operations.base import Measuring, Statistics
from surgery.operations.expert_prune.decision import decide, least_counts, offered_counts
from surgery.operations.expert_prune.settings import ExpertPruneSettings
from surgery.operations.experts.blocks import Block, changed, moe_blocks, watched
from surgery.operations.experts.criteria import WEIGHTS_ONLY
from surgery.operations.experts.measuring import (
    Usage,
    correction,
    log_probabilities,
    measure_usage,
    run_layer,
)

# Windows on which the damage of cut layers is measured, at most; with 8 the differences between layers drown in noise.
PROBES = 32
FP8_BLOCK = (128, 128)


@torch.no_grad()
def measure(measuring: Measuring, settings: ExpertPruneSettings) -> Statistics:
    """Everything that `decide` needs for these settings."""
    layers = main_layers(measuring.model)
    if settings.weights_only:
        return Statistics(_weight_scores(measuring, settings), _about(layers, 0))
    blocks = moe_blocks(measuring.network)
    if [*blocks] != [layer.layer for layer in layers]:
        raise InternalError(
            f"experts are in layers {[*blocks]} of the loaded model",
            cause=f"the tensors say {[n.layer for n in layers]}",
            remedy="report this as a defect, with the model's config.json",
        )  # fmt: skip
    usage = _usage(measuring, settings, blocks)
    found = _weight_scores(measuring, settings) if settings.criterion in WEIGHTS_ONLY else {}
    facts = _about(layers, int(measuring.windows.numel()))
    statistics = Statistics({"sums": usage.sums, "peaks": usage.peaks, **found}, facts)
    if settings.allocation == "measured" and settings.explicit is None:
        facts["curves"] = _curves(measuring, settings, list(blocks.values()), statistics)
    if settings.mass_correction:
        kept = decide(measuring.model, settings, statistics).kept
        factors, figures = correction(measuring.network, blocks, measuring.windows, kept, {})
        facts |= {"mass_factors": {str(layer): factor for layer, factor in factors.items()}, "mass_gain": figures}
    return statistics


def _about(layers: Sequence[ExpertLayer], tokens: int) -> dict[str, Any]:
    return {"layers": [layer.layer for layer in layers], "experts": layers[0].count, "tokens": tokens}


def _weight_scores(measuring: Measuring, settings: ExpertPruneSettings) -> dict[str, Tensor]:
    """Scores [layers, experts] by a criterion that looks at weights only, under its name."""
    read = _norms if settings.criterion == "router_norm" else _concentrations
    layers, rows = main_layers(measuring.model), []
    for layer in layers:
        rows.append(read(measuring, layer))
        measuring.progress(len(rows), len(layers))
    return {str(settings.criterion): torch.tensor(rows, dtype=torch.float64)}


def _usage(measuring: Measuring, settings: ExpertPruneSettings, blocks: dict[int, Block]) -> Usage:
    """Usage in the base, or in each layer after those before it were cut."""
    network, windows = measuring.network, measuring.windows
    whole = measure_usage(network, list(blocks.values()), windows, _progress(measuring, len(windows)))
    if settings.statistics == "one_shot":
        return whole
    usage = Usage(list(blocks.values()))
    stream, calls = record_calls(network, windows)
    for number, call in enumerate(calls):
        block = blocks.get(number)
        if block is None:
            stream = run_layer(call, stream)
            continue
        with watched([block], usage.see):
            run_layer(call, stream)
        # Super experts are those of the base: one layer alone does not tell.
        so_far = Statistics({"sums": usage.sums, "peaks": whole.peaks}, {})
        with changed(block, decide(measuring.model, _unguarded(settings), so_far).kept[number]):
            stream = run_layer(call, stream)
        measuring.progress(number + 1, len(calls))
    usage.peaks = whole.peaks
    return usage


def _unguarded(settings: ExpertPruneSettings) -> ExpertPruneSettings:
    """The same settings while later layers have seen no token yet."""
    return settings.model_copy(update={"calibration_required": False})


def _progress(measuring: Measuring, count: int) -> Callable[[int], None]:
    return lambda done: measuring.progress(done, count)


def _curves(
    measuring: Measuring, settings: ExpertPruneSettings, blocks: Sequence[Block], statistics: Statistics
) -> list[dict[str, float]]:
    """By layer: number of experts -> divergence at the model's output when only this layer keeps that many."""
    model, network = measuring.model, measuring.network
    probes = measuring.windows[-min(PROBES, max(1, len(measuring.windows) // 4)) :]
    stream, calls = record_calls(network, probes)
    expected = log_probabilities(network, calls, stream)
    by_layer = {block.layer: block for block in blocks}
    layers, least = {layer.layer: layer for layer in main_layers(model)}, least_counts(model)
    curves: list[dict[str, float]] = []
    for number, call in enumerate(calls):
        block = by_layer.get(number)
        if block is not None:
            curve = {}
            for count in offered_counts(model, layers[number], least[number])[:-1]:
                kept = _best(model, settings, statistics, count)[number]
                with changed(block, kept):
                    out = run_layer(call, stream)
                curve[str(count)] = divergence(expected, log_probabilities(network, calls[number + 1 :], out))
            curves.append(curve | {str(block.count): 0.0})
            measuring.progress(len(curves), len(blocks))
        stream = run_layer(call, stream)
    return curves


def _best(model: Model, settings: ExpertPruneSettings, statistics: Statistics, count: int) -> dict[int, list[int]]:
    """The ids that these settings keep of `count` in every layer."""
    uniform = settings.model_copy(
        update={"keep": count, "allocation": "uniform", "mass_correction": False, "calibration_required": False}
    )
    return dict(decide(model, uniform, statistics).kept)


def _norms(measuring: Measuring, layer: ExpertLayer) -> list[float]:
    """The norm of each expert's row of the router."""
    name = next(name for name in layer.router if name.endswith(".weight"))
    found: list[float] = _finite(name, measuring.tensor(name).double()).norm(dim=-1).tolist()
    return found


def _concentrations(measuring: Measuring, layer: ExpertLayer) -> list[float]:
    """AIMER (arXiv 2603.18492), turned round: minus the mean of |w| over the root mean square, over all matrices."""
    sums = torch.zeros(3, layer.count, dtype=torch.float64)  # of |w|, of w^2, and how many
    if layer.fused:
        for name in layer.fused:
            if len(measuring.model.shapes[name]) == 3:
                for expert, stored in enumerate(measuring.tensor(name)):
                    _add(sums[:, expert], _weight(measuring, name, stored))
    for expert, names in layer.experts.items():
        for name in names:
            if name.endswith(".weight"):
                _add(sums[:, expert], _weight(measuring, name, measuring.tensor(name)))
    scores = -sums[0] / (sums[1] * sums[2]).sqrt()
    found: list[float] = torch.where(sums[1] > 0, scores, -torch.inf).tolist()  # an expert of zeros goes first
    return found


def _add(sums: Tensor, weight: Tensor) -> None:
    sums[0] += weight.abs().sum(dtype=torch.float64)
    sums[1] += weight.square().sum(dtype=torch.float64)
    sums[2] += weight.numel()


def _weight(measuring: Measuring, name: str, stored: Tensor) -> Tensor:
    """A matrix in float32, FP8 multiplied by the scales of its blocks. Raises UnsupportedModel for packed ones."""
    scales = f"{name}_scale_inv"
    if stored.dtype == torch.float8_e4m3fn and measuring.model.has(scales):
        rows, columns = (measuring.model.config.get("quantization_config") or {}).get("weight_block_size") or FP8_BLOCK
        wide = measuring.tensor(scales).float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        if (-(-stored.shape[0] // rows), -(-stored.shape[1] // columns)) == measuring.model.shapes[scales]:
            return _finite(name, stored.float() * wide[: stored.shape[0], : stored.shape[1]])
    if not stored.is_floating_point() or stored.dtype.itemsize < 2:
        raise UnsupportedModel(
            f"{name!r} is quantized, and its numbers mean nothing by themselves",
            cause=f"it is stored as {stored.dtype}",
            remedy="choose a criterion that calibration gives",
        )  # fmt: skip
    return _finite(name, stored.float())


def _finite(name: str, weight: Tensor) -> Tensor:
    if not torch.isfinite(weight).all():
        raise CorruptCheckpoint(
            f"tensor {name!r} holds NaN or infinity", cause="experts with such weights have no worth",
            remedy="download the checkpoint again, or take another base",
        )  # fmt: skip
    return weight
