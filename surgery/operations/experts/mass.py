"""Folding a factor of the routed output into the experts: exact, because their last matrix is linear, and native."""

from __future__ import annotations

from surgery.architectures import Model
from surgery.architectures.experts import family_experts, main_layers, mass_depends
from surgery.checkpoint.expressions import Tensors
from surgery.operations.base import Statistics
from surgery.planning import Draft


def unfit_correction(model: Model) -> str | None:
    """Why the routed weights of a model cannot be corrected, or None."""
    if not mass_depends(model):
        return "mass_correction has nothing to correct: the weights of a token's experts always sum to one number"
    if model.config.get("quantization_config"):
        return "mass_correction scales weights, and the base is quantized"
    return None


def correct_mass(draft: Draft, statistics: Statistics, operation: str) -> None:
    """Scale the experts by the measured factors, if that lowered the divergence on held-out windows; tell both."""
    figures = statistics.facts["mass_gain"]
    told = f"divergence on held-out windows {figures['without']:.4f} without and {figures['with']:.4f} with it"
    if not figures["with"] < figures["without"]:
        draft.notes.append(f"{operation}: mass_correction is left off, {told}")
        return
    draft.notes.append(f"{operation}: mass_correction is on, {told}")
    model = draft.model
    last = family_experts(model).projections[-1]
    for layer in main_layers(model):
        factor = statistics.facts["mass_factors"].get(str(layer.layer))
        for name in (name for of in layer.experts.values() for name in of):
            if factor is not None and f".{last}" in name:
                _scale(draft, name, factor, f"{operation}: mass_correction")


def _scale(draft: Draft, name: str, factor: float, why: str) -> None:
    def function(tensors: Tensors) -> Tensors:
        wide = tensors[name]
        return {name: (wide.double() * factor).to(wide.dtype)}

    spec = draft.spec(name)
    draft.rewrite([name], {name: spec}, function, why=why, work_bytes=8 * spec.nbytes)
