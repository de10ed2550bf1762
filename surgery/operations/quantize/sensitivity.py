"""How much the model's output suffers when one part of it is rounded, and the bits that follow from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from surgery.calibration.compare import divergence, spread
from surgery.calibration.layers import BATCH, LayerCall
from surgery.operations.quantize.budget import allocate_by_gain, choice_bytes, choices_for, units_of
from surgery.operations.quantize.experts import fused_experts
from surgery.operations.quantize.rounding import Recipe
from surgery.operations.quantize.targets import Linear, Targets, grids_for
from surgery.operations.quantize.walk import Ground, advance, entrance, linear_modules
from surgery.quantization.grid import decode, encode, full_scales
from surgery.quantization.schemes import Grid

# Windows on which parts are tried.
TRIED = 8


@torch.no_grad()
def sensible_grids(ground: Ground, targets: Targets, recipe: Recipe, budget: int) -> dict[str, Grid | None]:
    """Grids by module whose summed damage is least within `budget` bytes.

    The damage of a choice for one part is the divergence from the model as it is, with nothing else rounded, on windows
    of the calibration text.
    """
    units, settings = units_of(targets.linears), ground.settings
    sizes = {
        unit: [choice_bytes(linears, choice, settings) for choice in choices_for(linears)]
        for unit, linears in units.items()
    }
    damage = _damages(ground, units)
    costs = []
    for unit in units:
        cost: dict[int, float] = {}
        least = float("inf")
        for size, harm in sorted(zip(sizes[unit], damage[unit], strict=True), key=lambda pair: (pair[0], -pair[1])):
            least = min(least, harm)  # more bytes are never worse, whatever the sample says
            cost[size] = least
        costs.append(cost)
    grids: dict[str, Grid | None] = dict(recipe.grids)
    for (unit, linears), size in zip(units.items(), allocate_by_gain(costs, budget), strict=True):
        grids |= grids_for(linears, choices_for(linears)[sizes[unit].index(size)], settings)
    return grids


def _damages(ground: Ground, units: dict[str, list[Linear]]) -> dict[str, list[float]]:
    """For every unit the divergence of each choice, summed over its layers; 0 for leaving it as it is."""
    tokens = ground.windows[:TRIED]
    hidden = entrance(ground, tokens, ground.scratch / "sensitivity.bin")
    damage = {unit: [0.0] * len(choices_for(linears)) for unit, linears in units.items()}
    for number in range(ground.count):
        layer = ground.layers.layer(number)
        call = LayerCall(layer, ground.keywords[number])
        outcomes, names = [_run(ground, call, hidden)], []
        for unit, linears in units.items():
            mine = [linear for linear in linears if linear.layer == number]
            for at, choice in enumerate(choices_for(linears)):
                if mine and choice is not None:
                    with _Replaced(ground, call, number, mine, grids_for(linears, choice, ground.settings)):
                        outcomes.append(_run(ground, call, hidden))
                    names.append((unit, at))
        predictions = _predictions(ground, torch.stack(outcomes), number + 1)
        whole = next(predictions)
        for (unit, at), found in zip(names, predictions, strict=True):
            damage[unit][at] += divergence(whole, found)
        advance(ground, call, hidden)
        ground.step()
    return damage


def _run(ground: Ground, call: LayerCall, hidden: Tensor) -> Tensor:
    return torch.cat([call.run(part.to(ground.layers.device)).cpu() for part in hidden.split(BATCH)])


def _predictions(ground: Ground, hidden: Tensor, first: int) -> Iterator[Tensor]:
    """Log-probabilities [N * P, V] of each alternative of [C, N, T, D] that enter layer `first`, one at a time."""
    flat = hidden.flatten(0, 1)
    for number in range(first, ground.count):
        flat = _run(ground, LayerCall(ground.layers.layer(number), ground.keywords[number]), flat)
    compared = flat[:, spread(flat.shape[1])].reshape(len(hidden), -1, flat.shape[-1])
    with ground.layers.exit() as logits:
        for alternative in compared:
            yield logits(alternative.to(ground.layers.device)).float().log_softmax(-1).cpu()


class _Replaced:
    """Some matrices of a layer rounded to the nearest, while the block runs."""

    def __init__(
        self,
        ground: Ground,
        call: LayerCall,
        number: int,
        linears: Sequence[Linear],
        grids: Mapping[str, Grid | None],
    ) -> None:
        self._weights = _weights(ground, call, number, linears)
        self._grids = grids
        self._own: list[Tensor] = []

    def __enter__(self) -> None:
        self._own = [weight.clone() for _, weight in self._weights]
        for linear, weight in self._weights:
            grid = self._grids[linear.module]
            if grid is not None:
                scale = full_scales(weight, grid, torch.float32)
                weight.copy_(decode(encode(weight, scale, grid), scale))

    def __exit__(self, *details: object) -> None:
        for (_, weight), own in zip(self._weights, self._own, strict=True):
            weight.copy_(own)


def _weights(ground: Ground, call: LayerCall, number: int, linears: Sequence[Linear]) -> list[tuple[Linear, Tensor]]:
    """The weights in memory of some modules of a layer."""
    modules, apart = linear_modules(call.layer, ground.layers.prefix(number), linears)
    found = [(linear, module.weight.data) for linear, module in modules.items()]
    if apart:
        _, everything = linear_modules(call.layer, ground.layers.prefix(number), ground.of_layer(number))
        experts = fused_experts(call.layer, number, everything)
        if experts is not None:
            wanted = set(apart)
            for number_of_expert, names in enumerate(experts.names):
                weights = experts.weights(number_of_expert)
                found += [(names[at], weights[at]) for at in range(len(names)) if names[at] in wanted]
    return found
