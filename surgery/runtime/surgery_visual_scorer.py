# SPDX-License-Identifier: Apache-2.0
"""Which visual tokens of an image matter for a text: a small trained module, or a rule that needs no training.

The module follows CoViPAL (arXiv 2508.17243): it sees projected visual tokens and embedded text before the first layer
and gives every visual token a score. Its inner structure is not the paper's, whose text does not give it.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, scaled_dot_product_attention

FLAT, TINY = 1e-4, 1e-30  # a share that says nothing; what a divisor is at least


class VisualScorer(nn.Module):
    """Scores of visual tokens from self-attention among them and cross-attention to the text."""

    def __init__(self, hidden_size: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.token_norm, self.text_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.token_proj = nn.Linear(hidden_size, width, bias=False)
        self.text_proj = nn.Linear(hidden_size, width, bias=False)
        self.no_text = nn.Linear(1, width, bias=False)  # stands for the text of a prompt that has none
        self.blocks = nn.ModuleList([_Block(width, heads) for _ in range(layers)])
        self.out_norm, self.score = nn.LayerNorm(width), nn.Linear(width, 1)

    def forward(self, visual: Tensor, text: Tensor) -> Tensor:
        """Tokens of one image [V, D] and of its text [T, D], or stacks of them [N, ...] -> float32 [..., V]."""
        visual, text = visual.to(self.score.weight.dtype), text.to(self.score.weight.dtype)
        states, text = self.token_proj(self.token_norm(visual)), self.text_proj(self.text_norm(text))
        if not text.shape[-2]:
            text = self.no_text.weight.T.expand(*text.shape[:-2], 1, -1)
        for block in self.blocks:
            states = block(states, text)
        scores: Tensor = self.score(self.out_norm(states)).squeeze(-1).float()
        return scores


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn, self.cross_attn = _Attention(width, heads), _Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, states: Tensor, text: Tensor) -> Tensor:
        normed = self.norm1(states)
        states = states + self.self_attn(normed, normed)
        states = states + self.cross_attn(self.norm2(states), text)
        output: Tensor = states + self.mlp(self.norm3(states))
        return output


class _Attention(nn.Module):
    """Every query sees every key."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.v_proj, self.o_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, states: Tensor, others: Tensor) -> Tensor:
        query = self.q_proj(states)
        key, value = self.k_proj(others), self.v_proj(others)
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for x in (query, key, value))
        output: Tensor = self.o_proj(scaled_dot_product_attention(query, key, value).transpose(-2, -3).flatten(-2))
        return output


def runs(visual: Tensor) -> list[Tensor]:
    """Columns of each stretch of visual tokens in a row [L]: an image, or a clip."""
    columns = visual.nonzero()[:, 0]
    if not len(columns):
        return []
    ends = (columns.diff() > 1).nonzero()[:, 0] + 1
    return list(columns.tensor_split(ends.cpu()))


def reserved(count: int, reserve: float, least: int) -> int:
    """How many of `count` visual tokens stay: the share `reserve`, rounded up, but not fewer than `least`."""
    return min(count, max(least, math.ceil(reserve * count - 1e-9)))


def best(scores: Tensor, count: int) -> Tensor:
    """The `count` highest of scores [V], as ascending indices; of equal ones the first. Raises RuntimeError for nan."""
    _check(scores)
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def _check(scores: Tensor) -> None:
    if bool(scores.isnan().any()):
        raise RuntimeError("a visual token has no score (nan): the features of the image, or the scorer, are broken")


def diverse(visual: Tensor, count: int) -> Tensor:
    """`count` of the tokens [V, D] that stand out of their image and do not resemble each other; ascending indices.

    With s_i the distance of a token from the mean of its image, the likeliest set of a determinantal point process
    with kernel sqrt(s_i s_j) cos(i, j), chosen greedily (Chen et al., arXiv 1709.05135); of equal tokens, and once none
    adds anything, the first ones. Other images change nothing. Raises RuntimeError for nan.
    """
    visual = visual.float()
    salience = (visual - visual.mean(0)).norm(dim=-1)
    _check(salience)
    if float(salience.max()) <= FLAT * float(visual.norm(dim=-1).max()):
        return torch.arange(count, device=visual.device)
    weighted = normalize(visual, dim=-1, eps=TINY) * salience.sqrt()[:, None]
    kernel = weighted @ weighted.T
    gain = whole = kernel.diagonal()
    factor = kernel.new_zeros(count, len(kernel))  # rows of the kernel's Cholesky factor
    taken = torch.zeros(len(kernel), dtype=torch.bool, device=kernel.device)
    for step in range(count):
        left = torch.where(gain > FLAT * whole, gain, 0.0).masked_fill(taken, -1.0)
        chosen = (left >= (1 - FLAT) * left.max()).int().argmax()  # copies of a token differ by rounding
        taken[chosen] = True
        row = kernel[chosen] - factor[:step, chosen] @ factor[:step]
        factor[step] = row / gain[chosen].clamp(min=FLAT * whole[chosen]).clamp(min=TINY).sqrt()
        gain = gain - factor[step].pow(2)
    return taken.nonzero()[:, 0]
