"""Spreading a budget over the parts of a model by measured cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def allocate(costs: Sequence[Mapping[int, float]], budget: int, weights: Sequence[int]) -> list[int] | None:
    """The sizes of least summed cost within a budget (an exact knapsack over additive costs).

    costs[i]    loss of giving item i a size, all others left whole; one entry per size on offer
    weights[i]  what one unit of size takes of the budget (for head widths, the KV heads)

    None where even the smallest sizes exceed the budget.
    """
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for item, weight in zip(costs, weights, strict=True):
        following: dict[int, tuple[float, list[int]]] = {}
        for used, (cost, widths) in best.items():
            for width, extra in item.items():
                total = used + weight * width
                if total <= budget and (total not in following or cost + extra < following[total][0]):
                    following[total] = (cost + extra, [*widths, width])
        best = following
    return min(best.values())[1] if best else None


def predicted_cost(costs: Sequence[Mapping[int, float]], widths: Sequence[int]) -> float:
    """The summed cost of the chosen sizes; an underestimate where damages compound."""
    return sum(item[width] for item, width in zip(costs, widths, strict=True))
