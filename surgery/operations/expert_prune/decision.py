"""Which experts stay: settings, sizes and statistics in, ids out. Pure, and without torch until scores are needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from surgery.architectures import Model
from surgery.architectures.experts import ExpertLayer, expert_layers, groups, main_layers, numbers
from surgery.errors import InternalError, RefusedInput, UsageError
from surgery.operations.allocation import allocate
from surgery.operations.base import Statistics
from surgery.operations.expert_prune.settings import ExpertPruneSettings
from surgery.operations.experts.criteria import FAMILY, calibrated_scores, choose, random_scores
from surgery.sizes import human_size, parse_size

if TYPE_CHECKING:
    from torch import Tensor

# Of a super expert: the share of all largest outputs below it, its share of the largest, and how deep it may lie.
PERCENTILE, OF_LARGEST, DEPTH = 0.995, 0.1, 0.75


@dataclass(frozen=True)
class Decision:
    """What stays, by decoder layer, and what it rests on.

    scores     worth of every expert; empty where the settings name the ids
    tokens     how many calibration tokens each expert got; empty where none ran
    mass       share of the routed weights that goes to kept experts
    protected  super experts
    fell_back  layers in which the fallback criterion decided
    """

    kept: Mapping[int, list[int]]
    scores: Mapping[int, list[float]] = field(default_factory=dict)
    tokens: Mapping[int, list[int]] = field(default_factory=dict)
    mass: Mapping[int, float] = field(default_factory=dict)
    protected: Mapping[int, frozenset[int]] = field(default_factory=dict)
    fell_back: frozenset[int] = frozenset()


def uniform_counts(model: Model, settings: ExpertPruneSettings) -> dict[int, int]:
    """Experts that stay in each layer while all layers have to be alike, or as the settings list them."""
    layers = main_layers(model)
    keep = settings.keep
    if isinstance(keep, list):
        of_layers = [len(entry) if isinstance(entry, list) else entry for entry in keep]
        return dict(zip((layer.layer for layer in layers), of_layers, strict=True))
    return dict.fromkeys((layer.layer for layer in layers), _uniform_count(model, settings, layers[0].count, keep))


def _uniform_count(model: Model, settings: ExpertPruneSettings, count: int, keep: float | str) -> int:
    """One number for all layers: of a share the nearest one, of a size the largest within it; whole groups only.

    Zero where even one expert per group is too much.
    """
    divided, _ = groups(model)
    if isinstance(keep, int):
        return keep
    if isinstance(keep, float):
        return int(count // divided * keep + 0.5) * divided
    fixed, each = _bytes(model, settings, drafts=True)
    return min(max((parse_size(keep) - fixed) // each, 0), count) // divided * divided


def _bytes(model: Model, settings: ExpertPruneSettings, *, drafts: bool) -> tuple[int, int]:
    """Bytes of all that stays in any case, and of one expert of every layer, draft layers among them or not."""
    layers = expert_layers(model)
    main = [layer for layer in layers if layer.layer < model.num_hidden_layers]
    gone = tuple(model.architecture.layers.format(layer=layer.layer) + "." for layer in layers[len(main) :])
    gone = gone if settings.drafts == "drop" else ()
    moving = layers if drafts and not gone else main
    sizes = [(sum(model.nbytes[name] for name in layer), layer.count) for layer in moving]
    total = sum(model.nbytes[name] for name in model.shapes if not name.startswith(gone))
    return total - sum(size for size, _ in sizes), sum(-(-size // count) for size, count in sizes)


def total_count(model: Model, settings: ExpertPruneSettings) -> int:
    """Experts that stay in all layers together, however they are spread."""
    layers = main_layers(model)
    if not isinstance(settings.keep, str):
        return sum(uniform_counts(model, settings).values())
    # Draft layers follow the last layer, whose number is not known yet: they count as whole.
    fixed, _ = _bytes(model, settings, drafts=False)
    largest = max(-(-sum(model.nbytes[name] for name in layer) // layer.count) for layer in layers)
    return (parse_size(settings.keep) - fixed) // largest


def offered_counts(model: Model, layer: ExpertLayer, least: int) -> list[int]:
    """About eight numbers of experts up to all, whole groups only, none below `least`."""
    divided, _ = groups(model)
    step = max(layer.count // 8 // divided, 1) * divided
    offered = [number for number in range(step, layer.count, step) if number >= least]
    return sorted({least, *offered, layer.count})


def least_counts(model: Model) -> dict[int, int]:
    """The fewest experts with which each layer serves a token: its top k, within the groups that a token may take."""
    divided, taken = groups(model)
    per_group = 2 if divided > 1 else 1
    return {layer: max(-(-top_k // taken), per_group) * divided for layer, top_k in numbers(model).top_k.items()}


def decide(model: Model, settings: ExpertPruneSettings, statistics: Statistics | None) -> Decision:
    """Choose the experts that stay. Raises RefusedInput where calibration is asked to suffice and does not."""
    layers = main_layers(model)
    counts = (
        uniform_counts(model, settings) if settings.allocation == "uniform" else _spread(model, settings, statistics)
    )
    if settings.explicit is not None:
        kept = {layer.layer: sorted(ids) for layer, ids in zip(layers, settings.explicit, strict=True)}
        return Decision(kept)
    if settings.criterion == "random":
        scores = {layer.layer: random_scores(settings.seed, layer.layer, layer.count) for layer in layers}
        return Decision(_chosen(model, layers, scores, counts, {}), scores)
    if statistics is None:
        raise InternalError(
            "experts are chosen without statistics", cause="a plan was evaluated as if it were a result",
            remedy="report this as a defect, with the manifest",
        )  # fmt: skip
    if settings.weighting is None:
        found = _measured(statistics, str(settings.criterion), layers).tolist()
        scores = {layer.layer: row for layer, row in zip(layers, found, strict=True)}
        return Decision(_chosen(model, layers, scores, counts, {}), scores)
    return _calibrated(model, settings, layers, counts, statistics)


def _calibrated(
    model: Model,
    settings: ExpertPruneSettings,
    layers: Sequence[ExpertLayer],
    counts: Mapping[int, int],
    statistics: Statistics,
) -> Decision:
    sums = _measured(statistics, "sums", layers)
    rows = {layer.layer: row for row, layer in enumerate(layers)}
    tokens = {layer: [int(n) for n in sums[row, 0, 0].tolist()] for layer, row in rows.items()}
    poor = [(layer, expert, n) for layer, all_n in tokens.items() for expert, n in enumerate(all_n)
            if n < settings.min_tokens]  # fmt: skip
    if poor and settings.calibration_required:
        layer, expert, n = min(poor, key=lambda entry: entry[2])
        raise RefusedInput(
            f"{len(poor)} experts get fewer than {settings.min_tokens} calibration tokens",
            cause=f"expert {expert} of layer {layer} gets {n}; calibration_required is set",
            remedy="calibrate on more text, or text of more kinds (calibration.samples, calibration.text)",
        )
    if settings.weighting is None:
        raise InternalError("no criterion", cause="calibrated without one", remedy="report this as a defect")
    found = calibrated_scores(sums, settings.weighting)
    scores = {layer: found[row] for layer, row in rows.items()}
    fell_back = frozenset(layer for layer, _, _ in poor) if settings.fallback else frozenset()
    if fell_back:
        gate_free = calibrated_scores(sums, FAMILY["man"])
        scores |= {layer: gate_free[rows[layer]] for layer in fell_back}
    peaks = _measured(statistics, "peaks", layers)
    protected = _super_experts(model, peaks, rows) if settings.protect_super_experts else {}
    kept = _chosen(model, layers, scores, counts, protected)
    soft = {layer: sums[row, 1, 0] for layer, row in rows.items()}
    mass = {layer: float(soft[layer][ids].sum() / soft[layer].sum().clamp(min=1e-30)) for layer, ids in kept.items()}
    return Decision(kept, scores, tokens, mass, protected, fell_back)


def _measured(statistics: Statistics, name: str, layers: Sequence[ExpertLayer]) -> Tensor:
    """A table by layer and expert. Raises UsageError where a file of statistics has no such one for these layers."""
    found = statistics.tensors.get(name)
    if found is None or (len(found), found.shape[-1]) != (len(layers), layers[0].count):
        raise UsageError(
            f"the statistics have no {name!r} of {len(layers)} layers with {layers[0].count} experts each",
            cause=f"of {name!r} they have {'nothing' if found is None else list(found.shape)}",
            remedy="measure again: name another place with --statistics, or leave it out",
        )  # fmt: skip
    return found


def _chosen(
    model: Model,
    layers: Sequence[ExpertLayer],
    scores: Mapping[int, list[float]],
    counts: Mapping[int, int],
    protected: Mapping[int, frozenset[int]],
) -> dict[int, list[int]]:
    divided, _ = groups(model)
    return {
        layer.layer: choose(
            scores[layer.layer], counts[layer.layer], divided, protected.get(layer.layer, frozenset())
        )
        for layer in layers
    }  # fmt: skip


def _super_experts(model: Model, peaks: Tensor, rows: Mapping[int, int]) -> dict[int, frozenset[int]]:
    """Experts whose outputs stand out by far, in the layers where massive activations are made."""
    import torch

    limit = max(float(torch.quantile(peaks.flatten(), PERCENTILE)), float(peaks.max()) * OF_LARGEST)
    deep = model.num_hidden_layers * DEPTH
    return {
        layer: frozenset((peaks[row] > limit).nonzero()[:, 0].tolist()) for layer, row in rows.items() if layer < deep
    }


def curve_key(settings: ExpertPruneSettings) -> dict[str, Any]:
    """What measured curves depend on."""
    plain = settings.model_dump(mode="json")
    return {name: plain[name] for name in ("criterion", "seed", "min_tokens", "fallback", "protect_super_experts")}


def _spread(model: Model, settings: ExpertPruneSettings, statistics: Statistics | None) -> dict[int, int]:
    """Numbers per layer of least summed damage within the total; while planning, the uniform ones."""
    layers = main_layers(model)
    if statistics is None or "curves" not in statistics.facts:
        total = total_count(model, settings)
        each = max(total // len(layers), 1)
        return dict.fromkeys((layer.layer for layer in layers), each)
    curves = [{int(count): cost for count, cost in curve.items()} for curve in statistics.facts["curves"]]
    total = total_count(model, settings)
    found = allocate(curves, total, [1] * len(layers))
    if found is None:
        raise UsageError(
            f"keep allows {total} experts in all", cause=f"the least that works is {sum(map(min, curves))}",
            remedy="raise keep, or lower the experts per token first (expert_top_k)",
        )  # fmt: skip
    return {layer.layer: count for layer, count in zip(layers, found, strict=True)}


def describe_budget(model: Model, settings: ExpertPruneSettings) -> str:
    """Why a size cannot be met."""
    least = max(least_counts(model).values())
    fixed, each = _bytes(model, settings, drafts=True)
    return (
        f"keep {settings.keep} is too small: with {least} experts in every layer the tensors take "
        f"{human_size(fixed + least * each)}"
    )
