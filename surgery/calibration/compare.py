"""Comparing what two models predict, at as many positions of a window as tell them apart."""

from __future__ import annotations

from torch import Tensor

# Token positions per window at which outputs are compared.
POSITIONS = 64


def spread(length: int) -> slice:
    """Evenly spread positions of a window of `length` tokens."""
    return slice(0, None, max(length // POSITIONS, 1))


def divergences(expected: Tensor, found: Tensor) -> Tensor:
    """KL(expected, found) in nats for each token, of log-probabilities [..., V]."""
    return (expected.exp() * (expected - found)).sum(-1)


def divergence(expected: Tensor, found: Tensor) -> float:
    """KL(expected, found) in nats per token, of log-probabilities."""
    return float(divergences(expected, found).mean())
