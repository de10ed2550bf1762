"""Which head widths are on offer, and how narrow heads may become before a loss shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from surgery.errors import UsageError
from surgery.operations.allocation import allocate, predicted_cost


def allocate_widths(costs: Sequence[Mapping[int, float]], budget: int, weights: Sequence[int]) -> list[int]:
    """Widths of least summed cost within `budget` cached numbers. Raises UsageError where none are narrow enough."""
    found = allocate(costs, budget, weights)
    if found is None:
        least = sum(weight * min(item) for item, weight in zip(costs, weights, strict=True))
        raise UsageError(
            f"kv_ratio allows {budget} cached numbers per token", cause=f"the narrowest heads need {least}",
            remedy="raise kv_ratio",
        )  # fmt: skip
    return found


def knee(costs: Sequence[Mapping[int, float]], weights: Sequence[int], limit: float) -> float:
    """The smallest share of the whole cache at which the summed cost of the best widths stays within `limit`."""
    full = sum(weight * max(item) for item, weight in zip(costs, weights, strict=True))
    floor = sum(weight * min(item) for item, weight in zip(costs, weights, strict=True))
    for share in range(1, 20):
        budget = full * share // 20
        if budget >= floor and predicted_cost(costs, allocate_widths(costs, budget, weights)) <= limit:
            return share / 20
    return 1.0


def offered_widths(head_dim: int, *, even: bool) -> list[int]:
    """About eight steps up to the full width; keys need whole rotary pairs."""
    step = 2 * -(-head_dim // 16) if even else max(head_dim // 8, 1)
    return [*range(step, head_dim, step), head_dim]
