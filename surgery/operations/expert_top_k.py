"""Expert skipping: tokens take fewer experts, all experts stay (arXiv 2505.03531).

One number for all layers is a change of the config, and can be taken back. A number per layer needs a few lines of
code, as stock configs have one. The result does less work for each token, in as much memory.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from surgery.architectures import Model
from surgery.architectures.experts import Numbers, groups, main_layers, numbers, unfit_groups
from surgery.operations.base import Measuring, Operation, Settings, Statistics
from surgery.operations.experts.layers import write_numbers
from surgery.operations.experts.mass import correct_mass, unfit_correction
from surgery.planning import Draft

Positive = Annotated[int, Field(ge=1)]


class Schedule(BaseModel):
    """Numbers at the first MoE layer, at one between, and at the last; lines between them, halves rounded up.

    The paper's (b, h, e, p); how it rounds and counts layers is not said, so both are ours: MoE layers count from 0,
    and where `at` is an end, `peak` holds there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    first: Positive = Field(description="at the first MoE layer (paper: b)")
    peak: Positive = Field(description="at MoE layer `at` (paper: h)")
    last: Positive = Field(description="at the last MoE layer (paper: e)")
    at: Annotated[int, Field(ge=0)] = Field(description="which MoE layer, from 0 (paper: p)")

    def resolve(self, layers: int) -> list[int]:
        """The number of each of `layers` MoE layers."""
        found = []
        for layer in range(layers):
            if layer <= self.at:
                share = (self.first, self.peak, layer, self.at) if self.at else (self.peak, self.peak, 0, 1)
            else:
                share = (self.peak, self.last, layer - self.at, layers - 1 - self.at)
            start, end, done, of = share
            found.append((2 * (start * of + (end - start) * done) + of) // (2 * of))
        return found


class ExpertTopKSettings(Settings):
    """How many experts a token takes."""

    top_k: Positive | Annotated[list[Positive], Field(min_length=1)] | Schedule | None = Field(
        default=None,
        description="experts per token: one number, a list with one per MoE layer, or {first, peak, last, at}; three "
        "quarters of the base's, rounded down, where nothing is said",
    )
    mass_correction: bool = Field(
        default=False,
        description="scale experts so that the routed weights keep their mean sum, where families do not renormalise; "
        "used only if it lowers the divergence on held-out calibration windows",
    )


def resolved(model: Model, settings: ExpertTopKSettings) -> list[int]:
    """The number of each MoE layer."""
    layers = len(main_layers(model))
    if settings.top_k is None:
        return [max(3 * top_k // 4, 1) for top_k in numbers(model).top_k.values()]
    if isinstance(settings.top_k, Schedule):
        return settings.top_k.resolve(layers)
    return [settings.top_k] * layers if isinstance(settings.top_k, int) else settings.top_k


def refuses(model: Model, settings: ExpertTopKSettings) -> str | None:
    """Why the operation does not fit, or None. Raises CorruptCheckpoint where config and tensors disagree."""
    if model.architecture.experts is None:
        return "it has no experts: every token goes through the same MLP"
    found = numbers(model)
    if not found.top_k:
        return "no layer of it has experts"
    reason = unfit_groups(model)
    if reason:
        return reason
    if isinstance(settings.top_k, Schedule) and settings.top_k.at >= len(found.top_k):
        return f"the schedule has its peak at MoE layer {settings.top_k.at}, and there are {len(found.top_k)}"
    wanted = resolved(model, settings)
    if len(wanted) != len(found.top_k):
        return f"top_k lists {len(wanted)} layers, the model has {len(found.top_k)} with experts"
    divided, taken = groups(model)
    for (layer, before), after in zip(found.top_k.items(), wanted, strict=True):
        if after > before:
            return f"layer {layer} takes {before} experts per token, and {after} is more: this only lowers"
        if after > found.experts[layer]:
            return f"layer {layer} has {found.experts[layer]} experts, and {after} per token are more"
        if divided > 1 and after > taken * found.experts[layer] // divided:
            return f"{after} experts per token are more than {taken} groups hold"
    if wanted == [*found.top_k.values()]:
        return "tokens take that many experts already: nothing would change"
    return unfit_correction(model) if settings.mass_correction else None


def edit(draft: Draft, settings: ExpertTopKSettings, statistics: Statistics | None) -> None:
    """Write the numbers, and scale experts where that is asked for and helps."""
    found = numbers(draft.model)
    wanted = dict(zip(found.top_k, resolved(draft.model, settings), strict=True))
    write_numbers(draft, Numbers(found.experts, wanted))
    draft.facts["num_experts_per_tok"] = {str(layer): count for layer, count in wanted.items()}
    shown = sorted(set(wanted.values()))
    before = max(found.top_k.values())
    draft.notes.append(
        f"expert_top_k: tokens take {' to '.join(map(str, sorted({shown[0], shown[-1]})))} experts, not {before}"
    )
    if statistics is not None:
        correct_mass(draft, statistics, "expert_top_k")


def measure(measuring: Measuring, settings: ExpertTopKSettings) -> Statistics:
    """The factors of the mass correction, and what they do on held-out windows."""
    import torch

    from surgery.operations.experts.blocks import moe_blocks
    from surgery.operations.experts.measuring import correction

    blocks = moe_blocks(measuring.network)
    wanted = dict(zip(blocks, resolved(measuring.model, settings), strict=True))
    with torch.no_grad():
        factors, figures = correction(measuring.network, blocks, measuring.windows, {}, wanted)
    facts: dict[str, Any] = {"mass_factors": {str(layer): factor for layer, factor in factors.items()}}
    return Statistics({}, facts | {"mass_gain": figures})


OPERATION = Operation(
    name="expert_top_k",
    title="Expert skipping: fewer experts for each token",
    source="arXiv 2505.03531; mass_correction is ours",
    settings=ExpertTopKSettings,
    refuses=refuses,
    edit=edit,
    measures=lambda settings: settings.mass_correction,
    measure=measure,
    limits=("All experts stay in memory. How much faster it is depends on the engine and on the load: measure it.",),
    changes=frozenset({"router", "attention", "norms"}),
)
