# SPDX-License-Identifier: Apache-2.0
"""How one layer's past is coded: which tokens each head keeps, what they share, and how finely they are stored.

The paper's way (SpindleKV, arXiv 2507.06517) is a line over layers (eq. 5, 6), its top tokens for each query head
(eq. 2, 7), and a codebook at fixed thresholds. `solved` is not the paper's: for each layer it tries a few ways to spend
the same bytes and takes the one whose attention, for queries of the prompt itself, is nearest to the exact one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .surgery_codebook_layer import Head, Turning, masked, placed, visible
from .surgery_codebook_rows import Coded, bytes_per_row, cover, directions, held_bytes, pack, share_by, shared
from .surgery_codebook_settings import CacheSettings

LEAST_SHARE = 0.2  # of an even split of a layer's tokens, which every head gets (AdaKV, arXiv 2407.11550)
# Bits of keys and of values, fine to coarse.
PAIRS = (
    (16, 16), (8, 8), (8, 6), (6, 6), (6, 5), (5, 5), (5, 4), (4, 4), (4, 3), (3, 3), (3, 2), (2, 2),
)  # fmt: skip
FINER, STRIDE = 2, 2  # pairs tried beside the finest that holds every token, and how far apart they are
SHARING = 4  # of the pairs above that one, those that are tried with codes
GAPS = tuple(0.0025 * 2**step for step in range(5))  # 1 - theta_k that are tried
VALUES_GAP = 2.5  # times that is 1 - theta_v, as in the paper
FITTING = 4  # tries to meet a budget by leaving tokens out
SMALL = 2**15  # codes up to which an index takes two bytes
LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Past:
    """One layer of one sequence: all of its prompt, and the queries that judge what becomes of it.

    key [G, T, d] before rotation, turned [G, T, d] after it, value [G, T, s], position [T]. Columns `context` may be
    coded, columns `raw` stay. Rotated queries [H, P, d] stand at asked [P]; the last `window` of them are the newest
    tokens'. `ids` [T] are given where keys and values depend on the token alone.
    """

    key: Tensor
    turned: Tensor
    value: Tensor
    position: Tensor
    context: Tensor
    raw: Tensor
    query: Tensor
    asked: Tensor
    window: int
    scaling: float
    turning: Turning
    ids: Tensor | None = None
    covers: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)  # of all of a head's context, by threshold

    @property
    def groups(self) -> int:
        """Key and value heads."""
        return self.key.shape[0]

    @property
    def everything(self) -> int:
        """Context tokens of all heads."""
        return self.groups * len(self.context)

    def bytes(self, bits: tuple[int, int]) -> int:
        """What one token of one head takes in rows of its own, without its place."""
        size = self.key.element_size()
        return bytes_per_row(self.key.shape[-1], bits[0], size) + bytes_per_row(self.value.shape[-1], bits[1], size)

    def fixed(self, bits: tuple[int, int]) -> int:
        """What rows take besides, however many there are: a mean and a spread for each head."""
        widths = self.key.shape[-1], self.value.shape[-1]
        return self.groups * sum(4 * width for width, each in zip(widths, bits, strict=True) if each < 16)

    def holds(self, bits: tuple[int, int], budget: float) -> bool:
        """Whether rows of their own for all tokens fit."""
        return self.everything * self.bytes(bits) + self.fixed(bits) <= budget

    def weights(self) -> Tensor:
        """Exact attention of the queries, float32 [H, P, T]."""
        grouped: Tensor = self.query.unflatten(0, (self.groups, -1)).flatten(1, 2)
        logits = (grouped @ self.turned.transpose(-1, -2)).float().view(*self.query.shape[:2], -1) * self.scaling
        return logits.masked_fill(self.position > self.asked[:, None], LOWEST).softmax(-1)


def line(ratio: float, beta: float, layers: int) -> list[float]:
    """Share of the context that each layer keeps; the mean is `ratio` (paper: eq. 5, 6, one of its signs corrected)."""
    if ratio >= 1 or layers == 1 or ratio <= beta:
        return [min(max(ratio, 0.0), 1.0)] * layers
    first, last = (2 * ratio - beta, beta) if ratio <= (1 + beta) / 2 else (1.0, 2 * ratio - 1)
    return [first + (last - first) * layer / (layers - 1) for layer in range(layers)]


def scores(past: Past, weights: Tensor, settings: CacheSettings) -> Tensor:
    """What the window's queries give each context token, smoothed: float32 [H, C] (paper: eq. 2)."""
    received = weights[:, -past.window :].sum(1)[:, past.context]
    if settings.divisor == "paper":
        received = received / (past.asked.max() + 1 - past.position[past.context])
    else:
        received = received / past.window
    if settings.pool > 1 and received.shape[-1]:
        received = torch.nn.functional.max_pool1d(received[None], settings.pool, 1, settings.pool // 2)[0]
    return received


def paper(past: Past, settings: CacheSettings, layer: int, layers: int) -> list[Head]:
    """SpindleKV's way for one layer: tokens by the line, codes at the two thresholds."""
    found = scores(past, past.weights(), settings).unflatten(0, (past.groups, -1))
    if settings.heads == "mean":
        found = found.mean(1, keepdim=True)
    tokens = len(past.context) + len(past.raw)
    ratio = (settings.reserve_ratio * tokens - len(past.raw)) / max(len(past.context), 1)
    keep = int(line(ratio, settings.beta, layers)[layer] * len(past.context))
    wanted = torch.zeros_like(found, dtype=torch.bool).scatter_(-1, found.topk(keep, -1).indices, True)
    heads = []
    for head in range(past.groups):
        union = wanted[head].any(0)
        mask = masked(wanted[head][:, union]) if settings.heads == "mask" else None
        columns = past.context[union]
        bits = settings.bits or 16
        pair = _coded(past, head, columns, (bits, bits), given(settings), settings.greedy)
        heads.append(Head(placed(past.position[columns]), *pair, mask))
    return heads


def solved(past: Past, settings: CacheSettings, budget: float) -> list[Head]:
    """The way that hurts the queries least, of those whose coded tokens take at most `budget` bytes."""
    weights = past.weights()
    exact = weights.unflatten(0, (past.groups, -1)).flatten(1, 2) @ past.value.float()
    found = scores(past, weights, settings).unflatten(0, (past.groups, -1))
    found = found.mean(1) if settings.heads == "mean" else found.amax(1)
    newest = past.position[past.context] > past.asked.max() - past.window
    found[:, newest] = float("inf")  # what judges stays; not all of its keys were seen by all of it
    best, least = None, float("inf")
    for bits, sharing in _ways(past, settings, budget):
        heads = _within(past, settings, found, bits, sharing, budget)
        if heads is not None and (error := float((attention(past, heads) - exact).pow(2).sum())) < least:
            best, least = heads, error
    if best is not None:
        return best
    least = max(past.groups * int(newest.sum()), min(past.groups, past.everything))  # over the budget, if need be
    return _code(past, settings, found, least, (settings.bits or 2,) * 2, None)


def whole(past: Past, settings: CacheSettings, budget: float) -> list[Head]:
    """All tokens, as finely as `budget` allows."""
    pairs = [(settings.bits, settings.bits)] if settings.bits else PAIRS
    bits = next((bits for bits in pairs if past.holds(bits, budget)), pairs[-1])
    nothing = past.value.new_zeros(past.groups, len(past.context))
    return _code(past, settings, nothing, past.everything, bits, given(settings))


def given(settings: CacheSettings) -> tuple[float, float] | None:
    """The thresholds that the settings name; where they name one, the other shares nothing."""
    if settings.theta_k is None and settings.theta_v is None:
        return None
    return settings.theta_k or 1.0, settings.theta_v or 1.0


def _ways(past: Past, settings: CacheSettings, budget: float) -> Iterator[tuple[tuple[int, int], Any]]:
    """What is tried: bits of keys and of values, with thresholds, or sharing by "ids", or None."""
    named = (settings.bits or 16,) * 2
    pairs = [named] if settings.bits else list(PAIRS)
    thetas = given(settings)
    if past.ids is not None and (thetas is None or min(thetas) < 1):
        yield from ((bits, "ids") for bits in pairs)
    if thetas is not None:
        yield from ((bits, thetas) for bits in pairs)
        return
    holds = (index for index, bits in enumerate(pairs) if past.holds(bits, budget))
    holding = next(holds, len(pairs) - 1)
    for index in range(holding, max(holding - FINER * STRIDE, 0) - 1, -STRIDE):
        yield pairs[index], None
    for bits in pairs[max(holding - SHARING, 1) : holding] or pairs[:1]:
        if bits[0] == bits[1] and (thetas := _fitting(past, settings, bits, budget)) is not None:
            yield bits, thetas


def _fitting(past: Past, settings: CacheSettings, bits: tuple[int, int], budget: float) -> tuple[float, float] | None:
    """The highest thresholds, of a few, at which all tokens fit `budget`, by bisection; None where none will do."""
    if past.holds(bits, budget) or not past.everything:
        return None

    def thetas(index: int) -> tuple[float, float]:
        return 1 - GAPS[index], 1 - VALUES_GAP * GAPS[index]

    def fits(index: int) -> bool:
        return _planned(past, settings, bits, thetas(index)) <= budget

    low, high = 0, len(GAPS) - 1
    if not fits(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return thetas(low)


def _planned(past: Past, settings: CacheSettings, bits: tuple[int, int], thetas: tuple[float, float]) -> int:
    """What all tokens take with codes at these thresholds, wherever codes are smaller; nothing is coded for it."""
    tokens, size, total = len(past.context), past.key.element_size(), 0
    for kind, states, own, theta in zip("kv", (past.key, past.value), bits, thetas, strict=True):
        row = bytes_per_row(states.shape[-1], own, size)
        for head in range(past.groups):
            codes = len(_covered(past, kind, head, past.context, theta, settings.greedy)[0])
            index = 2 if codes <= SMALL else 4
            total += min(tokens * row, codes * row + tokens * (index + 2))
    return total + past.fixed(bits)


def _covered(past: Past, kind: str, head: int, columns: Tensor, theta: float, greedy: bool) -> tuple[Tensor, Tensor]:
    """What `cover` finds for one head's keys or values; remembered for all of the context."""
    name = (kind, head, theta) if len(columns) == len(past.context) else None
    if name is not None and name in past.covers:
        return past.covers[name]
    unit, _ = directions((past.key if kind == "k" else past.value)[head, columns])
    found = cover(unit, theta, greedy=greedy)
    if name is not None:
        past.covers[name] = found
    return found


def _within(
    past: Past, settings: CacheSettings, found: Tensor, bits: tuple[int, int], sharing: Any, budget: float
) -> list[Head] | None:
    """Heads coded in this way with as many tokens as the budget allows; None where that is no token for each."""
    count = past.everything
    if sharing is None and not past.holds(bits, budget):
        count = int((budget - past.fixed(bits)) / (past.bytes(bits) + 2))  # places take two bytes or four
    for _ in range(FITTING):
        if count < past.groups:
            return None
        heads = _code(past, settings, found, count, bits, sharing)
        used = size_of(heads)
        if used <= budget:
            return heads
        count = int(min(count, past.everything) * min(budget / used, 0.99))
    return None


def _code(
    past: Past, settings: CacheSettings, found: Tensor, count: int, bits: tuple[int, int], sharing: Any
) -> list[Head]:
    """Heads with the best `count` context tokens of all heads together, by scores [G, C]."""
    if count >= past.everything:
        chosen: Sequence[Tensor] = [past.context] * past.groups
        places = [placed(past.position[past.context])] * past.groups  # one tensor at most, which takes memory once
    else:
        chosen = [past.context[keep] for keep in spread(found, count)]
        places = [placed(past.position[columns]) for columns in chosen]
    return [
        Head(place, *_coded(past, head, columns, bits, sharing, settings.greedy))
        for head, (columns, place) in enumerate(zip(chosen, places, strict=True))
    ]


def spread(found: Tensor, count: int) -> list[Tensor]:
    """Which tokens each head keeps, as masks [C]: the best of all heads, and a share that every head gets."""
    groups, tokens = found.shape
    least = min(int(LEAST_SHARE * count / groups), tokens)
    lifted = found.scatter(-1, found.topk(least, -1).indices, float("inf"))
    keep = torch.zeros(groups * tokens, dtype=torch.bool, device=found.device)
    keep[lifted.flatten().topk(min(count, groups * tokens)).indices] = True
    return list(keep.view(groups, tokens))


def _coded(
    past: Past, head: int, columns: Tensor, bits: tuple[int, int], sharing: Any, greedy: bool
) -> tuple[Coded, Coded]:
    """Keys and values of one head's tokens at `columns`; rows are shared only where that is smaller."""
    key, value = past.key[head, columns], past.value[head, columns]
    if not len(columns):
        sharing = None
    if sharing is None:
        return Coded(pack(key, bits[0])), Coded(pack(value, bits[1]))
    if sharing == "ids" and past.ids is not None:
        keys, values = (share_by(past.ids[columns], x, b) for x, b in zip((key, value), bits, strict=True))
        both = keys, Coded(values.rows, keys.ref)
        own = Coded(pack(key, bits[0])), Coded(pack(value, bits[1]))
        return both if _size(*both) < _size(*own) else own
    pair = []
    for kind, vectors, own_bits, theta in zip("kv", (key, value), bits, sharing, strict=True):
        row = bytes_per_row(vectors.shape[-1], own_bits, vectors.element_size())
        if theta < 1:
            members, ref = _covered(past, kind, head, columns, theta, greedy)
            if len(members) * row + len(columns) * 4 < len(columns) * row:
                pair.append(shared(vectors, (members, ref), theta, own_bits))
                continue
        pair.append(Coded(pack(vectors, own_bits)))
    return pair[0], pair[1]


def _size(*parts: Coded) -> int:
    return held_bytes([tensor for part in parts for kind in part.tensors().values() for tensor in kind])


def size_of(heads: Sequence[Head]) -> int:
    """Bytes of coded heads."""
    return held_bytes([tensor for head in heads for kind in head.tensors().values() for tensor in kind])


def attention(past: Past, heads: Sequence[Head]) -> Tensor:
    """Outputs of the judging queries from coded heads and raw columns: float32 [G, n P, s]."""
    outputs = []
    count = past.query.shape[0] // past.groups
    for index, head in enumerate(heads):
        query = past.query[index * count : (index + 1) * count].flatten(0, 1)
        stored = past.turning.logits(query, head, index).float()
        raw = query.float() @ past.turned[index, past.raw].float().T
        logits = torch.cat([stored, raw], -1).unflatten(0, (count, -1)) * past.scaling
        place = torch.cat([head.position, past.position[past.raw]])
        logits = logits.masked_fill(place > past.asked[:, None], LOWEST)
        if head.mask is not None:
            hidden = torch.nn.functional.pad(~visible(head.mask, count), (0, len(past.raw)))
            logits = logits.masked_fill(hidden[:, None], LOWEST)
        weights = logits.softmax(-1).flatten(0, 1)
        coded = head.value.mix(weights[:, : len(head)]).float()
        outputs.append(coded + weights[:, len(head) :] @ past.value[index, past.raw].float())
    return torch.stack(outputs)
