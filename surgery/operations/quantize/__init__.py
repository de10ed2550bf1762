"""Quantized weights: int4, int8 or FP8, by rounding to the nearest or by GPTQ.

The last operation: whatever was done before, its matrices are rounded and packed. Sources: GPTQ (arXiv 2210.17323).
Model Hemorrhage (arXiv 2503.23924) names "dynamic quantization scaling" without a formula that was found; scales by
input, bits by sensitivity and the judging of each on held-out text are ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from surgery.architectures import Model
from surgery.checkpoint.dtypes import FLOATING, TORCH_NAMES
from surgery.checkpoint.expressions import Computed, Tensors, TensorSpec
from surgery.errors import UnsupportedModel
from surgery.operations.base import Measuring, Operation, Statistics
from surgery.operations.quantize.budget import best_uniform, budget_bytes, least_bytes
from surgery.operations.quantize.settings import QuantizeSettings
from surgery.operations.quantize.targets import (
    Linear,
    Targets,
    find_targets,
    layout,
    uniform_grids,
)
from surgery.planning import Draft
from surgery.quantization.compressed_tensors_format import COMPRESSED_TENSORS
from surgery.quantization.gptq_format import GPTQ
from surgery.quantization.layout import Format
from surgery.quantization.schemes import Grid

FORMATS: Mapping[str, Format] = {form.name: form for form in (COMPRESSED_TENSORS, GPTQ)}
# Numbers of a matrix that are rounded and packed at once.
PIECE = 1 << 18
# What rounding and packing a number takes meanwhile.
WORK_PER_NUMBER = 48
EXPERTS_LOAD = (
    "transformers 5.0 to 5.9 cannot unpack experts and leaves them random, with a warning only: load this with 4.56, "
    "4.57, or 5.13 and later"
)
LIMIT = (
    "Weight files shrink. transformers on a CPU unpacks them when it loads, so memory there is that of 16 bits; "
    "engines that compute on packed weights, such as vLLM, were not tried."
)
RELEASES = (
    "Files of compressed-tensors were loaded with transformers 4.56, 4.57 and 5; 4.53 and 4.54 with compressed-tensors "
    "0.15 or newer leave the packed weights random, with a warning only."
)
OUTER = "They are unpacked when the whole model first runs: call the model once before any inner part of it alone."


def refuses(model: Model, settings: QuantizeSettings) -> str | None:
    """Why the operation does not fit, or None."""
    if any(model.config.get(key) is not None for key in ("quantization_config", "compression_config")):
        return "it is quantized already, and rounding rounded weights adds up; start from the base in 16 bits"
    targets = find_targets(model, settings.ignore)
    if not targets.linears:
        return "no linear module of its layers is left to round"
    if settings.format == "gptq" and model.architecture.experts is not None:
        return "transformers loads GPTQ files of models with experts wrongly, without an error; use compressed-tensors"
    if settings.activations == "dynamic" and any(linear.expert for linear in targets.linears):
        return "transformers does not load experts with rounded inputs (int-quantized); leave activations out"
    grids = uniform_grids(targets, settings)
    left = [linear.module for linear in targets.linears if linear.expert and grids[linear.module] is None]
    left += [module for module in targets.dense if ".experts." in module]
    if left:
        return f"{left[0]} would stay as it is, and transformers 5 loads experts beside packed weights only if packed"
    least = least_bytes(targets, settings)
    if settings.bytes_per_weight is not None and least > budget_bytes(targets, settings):
        least_each = least / sum(linear.outputs * linear.inputs for linear in targets.linears)
        return f"the fewest bits that fit take {least_each:.3f} bytes per weight of it; raise bytes_per_weight"
    if not any(grid is not None for grid in grids.values()):
        return "no matrix of it fits this format and group_size: see which sizes they must divide in docs/quantize.md"
    return None


def edit(draft: Draft, settings: QuantizeSettings, statistics: Statistics | None) -> None:
    """Round every matrix that the settings and the measurement name, and say so in the config."""
    model, form = draft.model, FORMATS[settings.format]
    targets = find_targets(model, settings.ignore)
    _check_types(draft, targets)
    grids = uniform_grids(targets, settings) if statistics is None else measured_grids(statistics)
    if statistics is None and settings.bytes_per_weight is not None:
        grids = best_uniform(targets, settings)  # about as many bytes, while nothing is measured yet
    for group in _sharing(draft, [linear for linear in targets.linears if grids[linear.module] is not None]):
        _round(draft, group, grids, settings, statistics)
    described = layout(model, targets, grids, settings)
    draft.root["quantization_config"] = form.config(described, {"damping": settings.damping})
    if statistics is not None:
        _correct_biases(draft, statistics)
        draft.facts |= {
            name: statistics.facts[name] for name in ("judged", "grids", "heldout") if name in statistics.facts
        }
        draft.notes += statistics.facts["notes"]
    draft.notes += _notes(targets, grids)


def _check_types(draft: Draft, targets: Targets) -> None:
    """Raise UnsupportedModel for matrices that are not floating numbers of 16 bits or more: rounded ones among them."""
    for linear in targets.linears:
        dtype = draft.spec(linear.weight).dtype
        if dtype not in FLOATING:
            raise UnsupportedModel(
                f"{linear.weight!r} is stored as {dtype}", cause="only F16, BF16, F32 and F64 are rounded",
                remedy=f"start from a base in 16 bits, or leave it as it is: ignore: ['{linear.module}$']",
            )  # fmt: skip


def measured_grids(statistics: Statistics) -> dict[str, Grid | None]:
    """The grids that measuring chose, by module."""
    found = statistics.facts["grids"]
    return {module: None if grid is None else Grid(*grid) for module, grid in found.items()}


def _sharing(draft: Draft, linears: Sequence[Linear]) -> list[list[Linear]]:
    """Linear modules in order; those whose weights one rewrite makes are together, so that it is evaluated once."""
    groups: dict[Any, list[Linear]] = {}
    for linear in linears:
        value = draft.tensors[linear.weight]
        key = id(value.rewrite) if isinstance(value, Computed) else linear.module
        groups.setdefault(key, []).append(linear)
    return list(groups.values())


def _round(
    draft: Draft,
    linears: Sequence[Linear],
    grids: Mapping[str, Grid | None],
    settings: QuantizeSettings,
    statistics: Statistics | None,
) -> None:
    form, activations = FORMATS[settings.format], settings.activations == "dynamic"
    outputs: dict[str, TensorSpec] = {}
    for linear in linears:
        grid = grids[linear.module]
        if grid is not None:
            outputs |= form.specs(linear.module, draft.spec(linear.weight), grid, activations)
    dtypes = {linear.module: form.scale_dtype(draft.spec(linear.weight).dtype) for linear in linears}

    def function(tensors: Tensors) -> Tensors:
        made = {}
        for linear in linears:
            grid = grids[linear.module]
            if grid is not None:
                found = _packed(linear, tensors[linear.weight], grid, dtypes[linear.module], settings, statistics)
                made.update({f"{linear.module}.{ending}": tensor for ending, tensor in found.items()})
        return made

    width = max(linear.inputs for linear in linears)
    draft.rewrite(
        [linear.weight for linear in linears], outputs, function, why=f"quantize by {settings.method}",
        work_bytes=WORK_PER_NUMBER * max(PIECE, 32 * width),
    )  # fmt: skip


def _packed(
    linear: Linear, weight: Any, grid: Grid, dtype: str, settings: QuantizeSettings, statistics: Statistics | None
) -> Tensors:
    """The tensors that stand for a weight, some rows at a time."""
    import torch

    from surgery.quantization.grid import Rounded, encode, full_scales, searched_scales

    form, stored = FORMATS[settings.format], getattr(torch, TORCH_NAMES[dtype])
    rows = max(PIECE // linear.inputs // 32, 1) * 32  # words along the outputs must not be divided
    find = searched_scales if settings.scales == "mse" else full_scales

    def rounded(part: Any) -> Rounded:
        scale = find(part, grid, stored)
        return Rounded(encode(part, scale, grid), scale)

    if statistics is None:
        pieces: Iterable[Rounded] = (rounded(part) for part in weight.split(rows))
    else:
        codes, scale = (statistics.tensors[f"{linear.module}.{part}"] for part in ("codes", "scale"))
        pieces = (Rounded(*both) for both in zip(codes.split(rows), scale.split(rows), strict=True))
    return form.join([form.pack(piece, grid, settings.activations == "dynamic") for piece in pieces])


def _correct_biases(draft: Draft, statistics: Statistics) -> None:
    for name in (name for name in statistics.tensors if name.endswith(".bias")):

        def function(_: Tensors, name: str = name) -> Tensors:
            return {name: statistics.tensors[name]}

        draft.rewrite([name], {name: draft.spec(name)}, function, why="quantize: takes up the mean error")


def _notes(targets: Targets, grids: Mapping[str, Grid | None]) -> list[str]:
    parts = [f"{count} matrices {_described(grid)}" for grid, count in Counter(grids.values()).items()]
    notes = [f"quantize: {', '.join(parts)}; embeddings, head, norms and routers stay"]
    if any(linear.expert for linear in targets.linears):
        notes.append(EXPERTS_LOAD)
    if targets.fused:
        notes.append(
            f"{len(targets.fused)} tensors that hold all experts of a layer stay as they are: no format has them"
        )
    return notes


def _described(grid: Grid | None) -> str:
    if grid is None:
        return "left as they are"
    size = "a scale per row" if grid.group_size is None else f"groups of {grid.group_size}"
    return f"in {'FP8' if grid.kind == 'float' else f'int{grid.bits}'} with {size}"


def measure(measuring: Measuring, settings: QuantizeSettings) -> Statistics:
    """Round layer by layer on calibration text (see `measuring.py`)."""
    from surgery.operations.quantize import measuring as how

    return how.measure(measuring, settings)


OPERATION = Operation(
    name="quantize",
    title="Quantized weights: int4, int8 or FP8",
    source="GPTQ (arXiv 2210.17323); budgets, scales by input and judging on held-out text are ours",
    settings=QuantizeSettings,
    refuses=refuses,
    edit=edit,
    measures=lambda settings: settings.calibrates,
    measure=measure,
    by_layers=lambda settings: settings.engine == "surgery",
    limits=(LIMIT, RELEASES, OUTER),
    quantizes=True,
    packages=lambda settings: FORMATS[settings.format].packages,
    after=frozenset(
        {"kv_latent", "expert_prune", "expert_top_k", "heal", "smooth", "rotate", "codebook_kv"}
        | {"visual_pruning", "visual_defense"}
    ),
    never_with=frozenset({"quantize"}),
)
