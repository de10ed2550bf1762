"""One attention layer as plain tensors, before and after it is narrowed, in the form that calibration computes with.

Letters: N windows, T tokens, M query positions, D hidden size, H query heads, G cached heads, r width of a query or key
head, s width of a value head, P = r / 2 rotary pairs, half-split (pair j is channels j and j + P).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CHUNK = 16


@dataclass(frozen=True)
class Attention:
    """Tensors of one layer. `cos` and `sin` are the rotary table of the pairs in use, as the model itself computes it.

    With `norm_query` and `norm_key` the projections stay at full width: they are normalized (by these functions of
    [B, T, h, d]), and `channels` are taken afterwards.
    """

    w_q: Tensor  # [H, r, D]
    w_k: Tensor  # [G, r, D]
    w_v: Tensor  # [G, s, D]
    w_o: Tensor  # [D, H, s]
    cos: Tensor  # [G, T, P]
    sin: Tensor  # [G, T, P]
    scale: float
    b_q: Tensor | None = None  # [H, r]
    b_k: Tensor | None = None  # [G, r]
    b_v: Tensor | None = None  # [G, s]
    b_o: Tensor | None = None  # [D]
    window: int | None = None  # a query sees this many tokens, itself included
    clip: float | None = None
    norm_query: Callable[[Tensor], Tensor] | None = None
    norm_key: Callable[[Tensor], Tensor] | None = None
    channels: Tensor | None = None  # [G, r]

    @property
    def group(self) -> int:
        """Query heads per cached head."""
        return self.w_q.shape[0] // self.w_k.shape[0]

    @property
    def qk_dim(self) -> int:
        """Width of a cached key."""
        return 2 * self.cos.shape[-1]


def project(x: Tensor, weight: Tensor, bias: Tensor | None, clip: float | None = None) -> Tensor:
    """X [B, T, D], weight [h, r, D] -> [B, h, T, r]."""
    heads, width, _ = weight.shape
    out: Tensor = (x @ weight.reshape(heads * width, -1).T).unflatten(-1, (heads, width)).transpose(1, 2)
    out = out if bias is None else out + bias[None, :, None, :]
    return out if clip is None else out.clamp(-clip, clip)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """X [B, h, T, 2P] by angles whose cosine and sine are [B or 1, h, T, P]."""
    one, two = x.chunk(2, -1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)


def rotated(x: Tensor, a: Attention, queries: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scaled rotated queries [B, H, M, r] at positions `queries` [B, M] (None: all), rotated keys [B, G, T, r]."""
    asking = x if queries is None else x.gather(1, queries[..., None].expand(-1, -1, x.shape[-1]))
    query, key = project(asking, a.w_q, a.b_q), project(x, a.w_k, a.b_k)
    if a.norm_query is not None and a.norm_key is not None:
        query = a.norm_query(query.transpose(1, 2)).transpose(1, 2)
        key = a.norm_key(key.transpose(1, 2)).transpose(1, 2)
    if a.clip is not None:
        query, key = query.clamp(-a.clip, a.clip), key.clamp(-a.clip, a.clip)
    if a.channels is not None:
        query = _taken(query, a.channels.repeat_interleave(a.group, 0))
        key = _taken(key, a.channels)
    cos, sin = a.cos[None, :, : x.shape[1]], a.sin[None, :, : x.shape[1]]
    key = rotate(key, cos, sin)
    if queries is not None:
        at = queries[:, None, :, None].expand(-1, cos.shape[1], -1, cos.shape[-1])
        cos, sin = (table.expand(len(x), -1, -1, -1).gather(2, at) for table in (cos, sin))
    cos, sin = cos.repeat_interleave(a.group, 1), sin.repeat_interleave(a.group, 1)
    return rotate(query, cos, sin) * a.scale, key


def _taken(x: Tensor, channels: Tensor) -> Tensor:
    """X [B, h, T, d], channels [h, r] -> [B, h, T, r]."""
    return x.gather(-1, channels[None, :, None, :].expand(len(x), -1, x.shape[2], -1))


def hidden_from(x: Tensor, a: Attention, queries: Tensor | None) -> Tensor:
    """Which keys a query must not see: [B, M, T]."""
    positions = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
    distance = (positions if queries is None else queries)[:, :, None] - positions[:, None, :]
    future = distance < 0
    return future if a.window is None else future | (distance >= a.window)


def logits(x: Tensor, a: Attention, queries: Tensor | None = None) -> Tensor:
    """Masked attention logits [B, H, M, T]."""
    query, key = rotated(x, a, queries)
    batch, heads, asked, width = query.shape
    out = (query.reshape(batch, key.shape[1], -1, width) @ key.transpose(-1, -2)).view(batch, heads, asked, -1)
    return out.masked_fill(hidden_from(x, a, queries)[:, None], float("-inf"))


def head_outputs(x: Tensor, a: Attention) -> Tensor:
    """softmax(logits) V of every query head: [B, T, H, s]."""
    weights, value = logits(x, a).softmax(-1), project(x, a.w_v, a.b_v, a.clip)
    batch, heads, asked, seen = weights.shape
    out = weights.view(batch, value.shape[1], -1, seen) @ value
    return out.view(batch, heads, asked, -1).transpose(1, 2)


def attention_output(x: Tensor, a: Attention) -> Tensor:
    """What the layer adds to the residual stream: [B, T, D]."""
    out = head_outputs(x, a).flatten(2) @ a.w_o.flatten(1).T
    return out if a.b_o is None else out + a.b_o


def fold_value_bias(a: Attention) -> Attention:
    """Move the value bias into the output bias: attention rows sum to one, so it only adds a constant (exact)."""
    if a.b_v is None:
        return a
    shift = torch.einsum("ohs,hs->o", a.w_o.double(), a.b_v.double().repeat_interleave(a.group, 0)).to(a.w_o.dtype)
    return replace(a, b_v=None, b_o=shift if a.b_o is None else a.b_o + shift)
