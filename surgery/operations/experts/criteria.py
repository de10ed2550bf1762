"""Scores of experts: from how calibration text uses them, from weights alone, or from a die.

One family holds the criteria of several papers (arXiv 2606.15716): over the tokens X_j that take expert j, with the
weight g_j that multiplies its output f_j,

    S_j(b, alpha, beta) = agg over X_j of g_j^alpha |f_j|^beta          b = 0: sum, b = 1: mean

so that nine sums per expert, kept once, give every one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from surgery.errors import CorruptCheckpoint

if TYPE_CHECKING:
    from torch import Tensor


class Weighting(BaseModel):
    """A member of the family by its numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    b: Literal[0, 1] = Field(description="0: sum over the tokens of an expert, 1: mean")
    alpha: Literal[0, 1, 2] = Field(description="power of the router's weight")
    beta: Literal[0, 1, 2] = Field(description="power of the norm of the expert's output")


# By name: b, alpha, beta. Sources: SEER-MoE (frequency, soft_count), REAP (arXiv 2510.13999; ean, reap), 2606.15716.
FAMILY = {
    "frequency": Weighting(b=0, alpha=0, beta=0),
    "soft_count": Weighting(b=0, alpha=1, beta=0),
    "ean": Weighting(b=0, alpha=0, beta=1),
    "reap": Weighting(b=1, alpha=1, beta=1),
    "man": Weighting(b=1, alpha=0, beta=1),
    "msan": Weighting(b=1, alpha=0, beta=2),
    "task": Weighting(b=0, alpha=1, beta=1),
    "task_squared": Weighting(b=0, alpha=2, beta=2),
}
Calibrated: TypeAlias = Literal["frequency", "soft_count", "ean", "reap", "man", "msan", "task", "task_squared"]
WEIGHTS_ONLY = frozenset({"aimer", "router_norm"})
Criterion: TypeAlias = Annotated[
    Calibrated | Literal["aimer", "router_norm", "random"] | Weighting, Field(union_mode="left_to_right")
]


def calibrated_scores(sums: Tensor, weighting: Weighting) -> list[list[float]]:
    """Scores [layers][experts] from sums [layers, alpha, beta, experts]; a mean over no tokens is -inf.

    Raises CorruptCheckpoint where a statistic is NaN or infinite.
    """
    import torch

    if not torch.isfinite(sums).all():
        raise CorruptCheckpoint(
            "a statistic of the experts is NaN or infinite", cause="the model gives such values on this text",
            remedy="check that the base works, or calibrate on other text",
        )  # fmt: skip
    found = sums[:, weighting.alpha, weighting.beta]
    if weighting.b:
        tokens = sums[:, 0, 0]
        found = torch.where(tokens > 0, found / tokens.clamp(min=1), -torch.inf)
    scores: list[list[float]] = found.tolist()
    return scores


def random_scores(seed: int, layer: int, count: int) -> list[float]:
    """Scores of one layer that mean nothing; without torch, which takes longer to import than experts to cut."""
    draw = Random(seed * 1_000_003 + layer)  # noqa: S311 - no secret
    return [draw.random() for _ in range(count)]


def choose(scores: Sequence[float], count: int, groups: int, protected: frozenset[int]) -> list[int]:
    """The `count` best experts in ascending order, as many from each group; of equals the first ones."""
    size = len(scores) // groups
    kept: list[int] = []
    for group in range(groups):
        ids = range(group * size, (group + 1) * size)
        kept += sorted(ids, key=lambda expert: (expert not in protected, -scores[expert], expert))[: count // groups]
    return sorted(kept)
