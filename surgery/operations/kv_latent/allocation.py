"""Spreading a byte budget over layers, and over keys against values, by measured cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from surgery.errors import UsageError


def allocate(costs: Sequence[Mapping[int, float]], budget: int, weights: Sequence[int]) -> list[int]:
    """The widths of least summed cost within a budget (an exact knapsack over additive costs).

    costs[i]    loss of giving item i a width, all others left whole; one entry per width on offer
    weights[i]  cached numbers per unit of width (the KV heads)
    budget      cached numbers in all

    Raises UsageError where even the narrowest widths exceed the budget.
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
    if not best:
        least = sum(weight * min(item) for item, weight in zip(costs, weights, strict=True))
        raise UsageError(
            f"kv_ratio allows {budget} cached numbers per token", cause=f"the narrowest heads need {least}",
            remedy="raise kv_ratio",
        )  # fmt: skip
    return min(best.values())[1]


def knee(costs: Sequence[Mapping[int, float]], weights: Sequence[int], limit: float) -> float:
    """The smallest share of the whole cache at which the summed cost of the best widths stays within `limit`."""
    full = sum(weight * max(item) for item, weight in zip(costs, weights, strict=True))
    floor = sum(weight * min(item) for item, weight in zip(costs, weights, strict=True))
    for share in range(1, 20):
        budget = full * share // 20
        if budget >= floor and predicted_cost(costs, allocate(costs, budget, weights)) <= limit:
            return share / 20
    return 1.0


def predicted_cost(costs: Sequence[Mapping[int, float]], widths: Sequence[int]) -> float:
    """The summed cost of the chosen widths; an underestimate where damages compound."""
    return sum(item[width] for item, width in zip(costs, widths, strict=True))


def offered_widths(head_dim: int, *, even: bool) -> list[int]:
    """About eight steps up to the full width; keys need whole rotary pairs."""
    step = 2 * -(-head_dim // 16) if even else max(head_dim // 8, 1)
    return [*range(step, head_dim, step), head_dim]
