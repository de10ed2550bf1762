"""Pruned experts: fewer routed experts in each MoE layer, chosen by how calibration text uses them.

Routers lose the rows of what goes; nothing else changes, so tokens choose among the experts that stay as if the others
were masked. Sources: the study of arXiv 2505.03531, and the criteria of SEER-MoE, REAP (arXiv 2510.13999), AIMER (arXiv
2603.18492) and arXiv 2606.15716.
"""

from __future__ import annotations

from surgery.architectures import Model
from surgery.architectures.experts import (
    Numbers,
    expert_layers,
    groups,
    main_layers,
    numbers,
    unfit_groups,
)
from surgery.operations.base import Explanation, Measuring, Operation, Statistics
from surgery.operations.expert_prune.decision import (
    Decision,
    curve_key,
    decide,
    describe_budget,
    least_counts,
    total_count,
    uniform_counts,
)
from surgery.operations.expert_prune.settings import ExpertPruneSettings
from surgery.operations.experts.layers import cut, drop_drafts, write_numbers
from surgery.operations.experts.mass import correct_mass, unfit_correction
from surgery.planning import Draft

# Some kernels and expert parallelism want multiples of this.
MULTIPLE = 8


def refuses(model: Model, settings: ExpertPruneSettings) -> str | None:
    """Why the operation does not fit, or None. Raises CorruptCheckpoint where config and tensors disagree."""
    if model.architecture.experts is None:
        return "it has no experts: every token goes through the same MLP"
    layers = main_layers(model)
    if not layers:
        return "no layer of it has experts"
    count = layers[0].count
    divided, taken = groups(model)
    if (settings.explicit is None or settings.calibrates) and len({layer.count for layer in layers}) > 1:
        return "its layers have unequal numbers of experts already: name the ids that stay, without mass_correction"
    reason = unfit_groups(model)
    if reason:
        return reason
    for layer, top_k in numbers(model).top_k.items():
        if top_k > count or (divided > 1 and top_k > taken * count // divided):
            return f"layer {layer} has {count} experts for tokens that take {top_k}"
    listed = settings.keep
    if isinstance(listed, list) and len(listed) != len(layers):
        return f"keep lists {len(listed)} layers, the model has {len(layers)} with experts"
    if settings.explicit is not None:
        reason = _unfit_ids(settings.explicit, [layer.count for layer in layers], divided)
        if reason:
            return reason
    if isinstance(listed, int) and listed >= count:
        return f"keep {listed} of {count} experts drops none"
    reason = unfit_correction(model) if settings.mass_correction else None
    return reason or _unfit_counts(model, settings) or _unfit_format(model, settings)


def _unfit_format(model: Model, settings: ExpertPruneSettings) -> str | None:
    method = (model.config.get("quantization_config") or {}).get("quant_method")
    unequal = settings.allocation == "measured" or len(set(uniform_counts(model, settings).values())) > 1
    if method == "mxfp4" and unequal:
        return "its MXFP4 loader takes one number of experts for all layers; keep as many in each"
    return None


def _unfit_ids(explicit: list[list[int]], counts: list[int], divided: int) -> str | None:
    for number, (ids, count) in enumerate(zip(explicit, counts, strict=True)):
        if len(set(ids)) != len(ids):
            return f"keep names an expert twice in MoE layer {number}"
        if max(ids) >= count:
            return f"keep names expert {max(ids)} in MoE layer {number}, and there are {count}"
        per_group = {sum(expert * divided // count == group for expert in ids) for group in range(divided)}
        if len(per_group) > 1:
            return f"keep takes unequal numbers from the groups of MoE layer {number}, and routing needs equal ones"
    return None


def _unfit_counts(model: Model, settings: ExpertPruneSettings) -> str | None:
    layers, (divided, _), least = main_layers(model), groups(model), least_counts(model)
    count, stored = layers[0].count, {layer.layer: layer.count for layer in layers}
    if settings.allocation == "measured":
        total = total_count(model, settings)
        if total < sum(least.values()):
            return f"keep allows {total} experts in all, and tokens need {sum(least.values())}"
        return _drops_none(settings, count) if total >= count * len(layers) else None
    counts = uniform_counts(model, settings)
    for layer, kept in counts.items():
        if isinstance(settings.keep, str) and kept < least[layer]:
            return describe_budget(model, settings)
        if kept > stored[layer]:
            return f"keep asks for {kept} experts in layer {layer}, and there are {stored[layer]}"
        if kept % divided:
            return f"keep {kept} does not divide into the {divided} groups of experts that the router chooses from"
        if kept < least[layer]:
            return f"{kept} experts in layer {layer} are too few: with its top k, tokens need {least[layer]}"
    # A list may spell it out: each of its layers is as it says.
    whole = {*counts.values()} == {count} and not isinstance(settings.keep, list)
    return _drops_none(settings, count) if whole else None


def _drops_none(settings: ExpertPruneSettings, count: int) -> str:
    return f"keep {settings.keep} of {count} experts drops none"


def edit(draft: Draft, settings: ExpertPruneSettings, statistics: Statistics | None) -> None:
    """Cut the experts that do not stay, or, while planning, as many of them."""
    model = draft.model
    layers, found = expert_layers(model), numbers(model)
    decided = statistics is not None or not (settings.calibrates or settings.weights_only)
    decision = decide(model, settings, statistics) if decided else _stand_in(model, settings)
    last = max(decision.kept)
    kept = {layer.layer: decision.kept.get(layer.layer, decision.kept[last]) for layer in layers}
    why = f"expert_prune by {_criterion(settings)}"
    if settings.drafts == "drop":
        drop_drafts(draft, why)
        layers = tuple(layer for layer in layers if layer.layer in decision.kept)
    counts = {layer: len(ids) for layer, ids in decision.kept.items()}
    whole = max(layer.count for layer in layers)
    cut(draft, layers, kept, why)
    write_numbers(draft, Numbers(counts, found.top_k))
    if decided:
        draft.facts["kept"] = {str(layer): ids for layer, ids in decision.kept.items()}
        draft.notes += _notes(whole, settings, decision)
    if statistics is not None and "mass_factors" in statistics.facts:
        correct_mass(draft, statistics, "expert_prune")


def _stand_in(model: Model, settings: ExpertPruneSettings) -> Decision:
    """As many experts as will stay, while nothing is measured yet."""
    layers, (divided, _) = main_layers(model), groups(model)
    if settings.allocation == "uniform":
        counts = uniform_counts(model, settings)
    else:
        each = min(total_count(model, settings) // len(layers), layers[0].count - 1) // divided * divided
        counts = dict.fromkeys((layer.layer for layer in layers), each)
        counts[layers[0].layer] += divided * (len(layers) > 1)  # unequal numbers, as they will be
    size = layers[0].count // divided
    return Decision(
        {
            layer: [group * size + rank for group in range(divided) for rank in range(count // divided)]
            for layer, count in counts.items()
        }
    )


def _criterion(settings: ExpertPruneSettings) -> str:
    if settings.explicit is not None:
        return "the ids given"
    weighting = settings.criterion
    return (
        weighting if isinstance(weighting, str) else f"b {weighting.b}, alpha {weighting.alpha}, beta {weighting.beta}"
    )


def _notes(whole: int, settings: ExpertPruneSettings, decision: Decision) -> list[str]:
    counts = sorted({len(ids) for ids in decision.kept.values()})
    stay = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    layers = len(decision.kept)
    notes = [f"expert_prune keeps {stay} of {whole} experts in {layers} layers, by {_criterion(settings)}"]
    if decision.mass:
        least = min(decision.mass, key=lambda layer: decision.mass[layer])
        mean = sum(decision.mass.values()) / len(decision.mass)
        notes.append(
            f"router mass kept on the calibration text: {mean:.3f}, least in layer {least}: {decision.mass[least]:.3f}"
        )
    poor = [(layer, e, n) for layer, all_n in decision.tokens.items() for e, n in enumerate(all_n)
            if n < settings.min_tokens]  # fmt: skip
    if poor:
        shown = ", ".join(f"layer {layer} expert {expert}: {n}" for layer, expert, n in poor[:6])
        how = f"; those layers are ranked by {settings.fallback}" if decision.fell_back else ""
        notes.append(
            f"{len(poor)} experts got fewer than {settings.min_tokens} calibration tokens ({shown}"
            f"{', ...' if len(poor) > 6 else ''}): calibrate on more, or on more kinds of text{how}"
        )
    if len(counts) == 1 and counts[0] % MULTIPLE and whole % MULTIPLE == 0:
        notes.append(f"{counts[0]} experts are no multiple of {MULTIPLE}: some kernels and expert parallelism want one")
    return notes


def measure(measuring: Measuring, settings: ExpertPruneSettings) -> Statistics:
    """Run the model on the calibration text, or read weights (see `measuring.py`)."""
    from surgery.operations.expert_prune import measuring as how

    return how.measure(measuring, settings)


def measured_by(settings: ExpertPruneSettings) -> object:
    """The settings that statistics depend on: none but the way, so that one run serves every keep and criterion."""
    if settings.statistics == "layerwise" or settings.mass_correction:
        return settings.model_dump(mode="json")
    if settings.weights_only:
        return {"criterion": settings.criterion}
    if settings.allocation == "measured":
        return {"statistics": "one_shot", "curves": curve_key(settings)}
    return {"statistics": "one_shot"}


def explain(model: Model, settings: ExpertPruneSettings, statistics: Statistics | None) -> Explanation:
    """What stays and why, layer by layer (see `explaining.py`)."""
    from surgery.operations.expert_prune.explaining import explanation

    return explanation(model, settings, decide(model, settings, statistics))


OPERATION = Operation(
    name="expert_prune",
    title="Pruned experts: fewer of them in each layer",
    source="arXiv 2505.03531, and the papers of the criteria; allocation: measured is ours",
    settings=ExpertPruneSettings,
    refuses=refuses,
    edit=edit,
    measures=lambda settings: settings.calibrates or settings.weights_only,
    measure=measure,
    measured_by=measured_by,
    weights_only=lambda settings: settings.weights_only,
    explain=explain,
    limits=(
        "Which experts stayed was decided on one text, or on weights alone: on other text the loss may be larger.",
        "Memory shrinks. A token still goes through as many experts as before, so one sequence hardly gets faster.",
    ),
    changes=frozenset({"router", "attention", "norms"}),
)
