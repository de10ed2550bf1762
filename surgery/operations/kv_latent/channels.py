"""Which rotary pairs and value channels a narrower head keeps, without looking at data.

Pair j of a head of width d is channels (j, j + d/2), rotating at frequency theta^(-2j/d).
Source: KV-Latent (arXiv 2507.11273) eq. 5 for the stride, section 3.3 and its released code for the spectrum; choosing
the channels that already rotate at the spectrum's frequencies ("matched") is ours.
"""

from __future__ import annotations

from fractions import Fraction


def stride_pairs(head_dim: int, qk_dim: int) -> list[int]:
    """Every s-th pair, s = d / d_qk. Stock RoPE of width d_qk gives these pairs exactly their old frequencies."""
    return list(range(0, head_dim // 2, head_dim // qk_dim))


def paper_exponents(qk_dim: int) -> list[Fraction]:
    """Exponents e_j of the paper's spectrum theta^(-e_j), as its code computes them (its eq. 11 is misprinted).

    The first half covers [1/4, 3/4) in steps of 2/d_qk, the second [3/4, 1) in steps of 1/d_qk. Needs 4 | d_qk.
    """
    quarter = qk_dim // 4
    fast = [Fraction(quarter + 2 * j, qk_dim) for j in range(quarter)]
    return fast + [Fraction(3 * quarter + j, qk_dim) for j in range(quarter)]


def paper_pairs(head_dim: int, qk_dim: int) -> list[int] | None:
    """The original pairs that already rotate at the paper's frequencies; None where one of these is no original one."""
    indices = [exponent * head_dim / 2 for exponent in paper_exponents(qk_dim)]
    return [int(index) for index in indices] if all(index.denominator == 1 for index in indices) else None


def pair_channels(pairs: list[int], head_dim: int) -> list[int]:
    """The channels of pairs in half-split order: first members, then their partners."""
    return [*pairs, *(pair + head_dim // 2 for pair in pairs)]


def stride_channels(head_dim: int, width: int) -> list[int]:
    """Every s-th channel, s = d / width (KV-Latent eq. 5)."""
    return list(range(0, head_dim, head_dim // width))


def head_rows(channels_per_head: list[list[int]], head_dim: int, repeats: int = 1) -> list[int]:
    """Row numbers in a stacked projection: `channels_per_head[g]` of each of the `repeats` heads of group g."""
    heads = [channels for channels in channels_per_head for _ in range(repeats)]
    return [head * head_dim + channel for head, channels in enumerate(heads) for channel in channels]
