"""Bits by sensitivity: which parts of a model get more of a budget of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from surgery.operations.quantize.settings import QuantizeSettings
from surgery.operations.quantize.targets import Linear, Targets, grids_for, uniform_grids
from surgery.quantization.schemes import Grid

# From few bytes to many; None leaves the weights as they are.
CHOICES: tuple[Grid | None, ...] = (Grid(4, 128), Grid(4, 32), Grid(8, None), None)


def choice_bytes(linears: Sequence[Linear], choice: Grid | None, settings: QuantizeSettings) -> int:
    """What codes and scales of some matrices take with a choice, or their numbers as they are."""
    grids, total = grids_for(linears, choice, settings), 0
    for linear in linears:
        grid, shape = grids[linear.module], (linear.outputs, linear.inputs)
        total += shape[0] * shape[1] * linear.width if grid is None else grid.nbytes(*shape, linear.width)
    return total


def choices_for(linears: Sequence[Linear]) -> tuple[Grid | None, ...]:
    """What a unit may be given; experts cannot stay as they are where anything else is rounded."""
    return CHOICES[:-1] if linears[0].expert else CHOICES


def units_of(linears: Iterable[Linear]) -> dict[str, list[Linear]]:
    """Linear modules that are rounded alike, by the name of their unit."""
    units: dict[str, list[Linear]] = {}
    for linear in linears:
        units.setdefault(linear.unit, []).append(linear)
    return units


def budget_bytes(targets: Targets, settings: QuantizeSettings) -> int:
    """The whole budget. `bytes_per_weight` must be set."""
    numbers = sum(linear.outputs * linear.inputs for linear in targets.linears)
    return int(numbers * (settings.bytes_per_weight or 0))


def least_bytes(targets: Targets, settings: QuantizeSettings) -> int:
    """What the smallest choice of every unit takes."""
    return sum(
        choice_bytes(linears, _least_choice(linears, settings), settings)
        for linears in units_of(targets.linears).values()
    )


def best_uniform(targets: Targets, settings: QuantizeSettings) -> dict[str, Grid | None]:
    """The most bytes that one choice for all can use within the budget; the least of every unit where none fits."""
    budget = budget_bytes(targets, settings)
    fits = [c for c in CHOICES[:-1] if choice_bytes(targets.linears, c, settings) <= budget]
    if fits:
        chosen = max(fits, key=lambda c: choice_bytes(targets.linears, c, settings))
        return uniform_grids(targets, settings, chosen)
    grids: dict[str, Grid | None] = {}
    for linears in units_of(targets.linears).values():
        grids |= grids_for(linears, _least_choice(linears, settings), settings)
    return grids


def _least_choice(linears: Sequence[Linear], settings: QuantizeSettings) -> Grid | None:
    return min(choices_for(linears), key=lambda choice: choice_bytes(linears, choice, settings))


def allocate_by_gain(costs: Sequence[Mapping[int, float]], budget: int) -> list[int]:
    """Sizes of small summed cost within a budget.

    costs[i] gives the cost of item i at each size on offer. The largest item is tried at each of its sizes, as no order
    of gains tells whether it or many small ones should have the bytes; the others take the best gain per byte first.
    The smallest sizes are taken where the budget has no more.
    """
    largest = max(range(len(costs)), key=lambda item: max(costs[item]))
    found = []
    for size in costs[largest]:
        fixed = [{size: cost[size]} if item == largest else cost for item, cost in enumerate(costs)]
        sizes = _by_gain(fixed, budget)
        if sum(sizes) <= budget or size == min(costs[largest]):
            cost_of_all = sum(of[taken] for of, taken in zip(costs, sizes, strict=True))
            found.append((cost_of_all, -sum(sizes), sizes))  # of equal costs the one that leaves nothing unused
    return min(found)[2]


def _by_gain(costs: Sequence[Mapping[int, float]], budget: int) -> list[int]:
    sizes = [min(item) for item in costs]
    left = budget - sum(sizes)
    while True:
        offers = []
        for item, (now, cost) in enumerate(zip(sizes, costs, strict=True)):
            larger = [s for s in cost if now < s <= now + left and cost[s] < cost[now]]
            offers += [((cost[now] - cost[s]) / (s - now), -s, item) for s in larger]
        if not offers:
            return sizes
        _, size, item = max(offers)
        left -= -size - sizes[item]
        sizes[item] = -size
