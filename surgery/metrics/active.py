"""How many parameters one token goes through."""

from __future__ import annotations

from surgery.architectures import Model
from surgery.architectures.experts import expert_layers, numbers
from surgery.checkpoint.dtypes import element_count


def active_parameters(model: Model) -> int:
    """Stored elements that one token goes through: all but the experts it does not take, and draft layers."""
    found = numbers(model)
    total = sum(element_count(model.shapes[name]) for name in model.shapes)
    for layer in expert_layers(model):
        stored = sum(element_count(model.shapes[name]) for name in layer if name not in layer.router)
        if layer.layer in found.top_k:
            total -= stored - stored * found.top_k[layer.layer] // layer.count
        else:
            prefix = model.architecture.layers.format(layer=layer.layer) + "."
            total -= sum(element_count(model.shapes[name]) for name in model.shapes if name.startswith(prefix))
    return total
