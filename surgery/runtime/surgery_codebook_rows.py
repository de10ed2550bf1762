# SPDX-License-Identifier: Apache-2.0
"""Vectors in little memory: rounded to few bits, and shared where they point the same way.

Sharing follows SpindleKV (arXiv 2507.06517, section 3): vectors whose cosine is above a threshold share one unit
vector, a code, and each keeps the index of its code and its own length. Rounding, and the search for codes that chooses
many at once, are not the paper's.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

BLOCK = 1024  # vectors that are compared with each other at once, and where the search is greedy
CACHED = 2**18  # numbers that a CPU's own cache holds, which is worth more than fewer calls
ALL = slice(None)
SHRINKS = {2: (1.0, 0.85, 0.7, 0.55), 3: (1.0, 0.85, 0.7), 4: (1.0, 0.9, 0.8)}  # scales that are tried, by bits
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}  # bits of a number that lie together, lowest first
LEAST_SPREAD = 0.01  # of the size of vectors: others may come that are not as much alike
MOST = torch.finfo(torch.float32).max
SMALLEST, LARGEST = 1e-4, 6e4  # what float16 holds at full precision


@dataclass(frozen=True)
class Rows:
    """N vectors of width d: `centre + spread * scale[row] * (code + 1/2)`, or the vectors themselves.

    `codes` is [N, d] int8 for 8 bits, uint8 for 2 to 6 (by `PLANES`: in each, the j-th part of a byte belongs to the
    j-th part of the channels), or the vectors in their own type where nothing is rounded: then the rest is None.
    """

    codes: Tensor
    width: int
    bits: int = 16
    scale: Tensor | None = None
    centre: Tensor | None = None
    spread: Tensor | None = None

    def __len__(self) -> int:
        return self.codes.shape[0]

    def tensors(self) -> list[Tensor]:
        """Everything that takes memory."""
        return [tensor for tensor in (self.codes, self.scale, self.centre, self.spread) if tensor is not None]

    def dense(self, piece: slice = ALL) -> Tensor:
        """The vectors [N, d], or a piece of them; float32 where they are rounded."""
        if self.scale is None or self.centre is None or self.spread is None:
            return self.codes[piece]
        levels = _unpack(self.codes[piece], self.bits, self.width).mul_(self.scale[piece].float()[:, None])
        return torch.addcmul(self.centre.float(), levels, self.spread.float())

    def mix(self, weights: Tensor) -> Tensor:
        """Sums of the vectors: weights [M, N] -> [M, d]."""
        if self.scale is None or self.centre is None or self.spread is None:
            return weights @ self.codes.to(weights.dtype)
        weights = weights.float()
        scaled, mixed = weights * self.scale.float(), weights.new_zeros(len(weights), self.width)
        for piece in pieces(self.codes, self.width):
            mixed.addmm_(scaled[:, piece], _unpack(self.codes[piece], self.bits, self.width))
        return mixed * self.spread.float() + self.centre.float() * weights.sum(-1, keepdim=True)

    def append(self, vectors: Tensor) -> "Rows":
        """These rows and `vectors` [M, d] after them, rounded around the same centre."""
        if self.centre is None or self.spread is None or self.scale is None:
            return replace(self, codes=torch.cat([self.codes, vectors.to(self.codes.dtype)]))
        codes, scale = _round((vectors.float() - self.centre.float()) / self.spread.float(), self.bits)
        return replace(self, codes=torch.cat([self.codes, codes]), scale=torch.cat([self.scale, scale]))


def pack(vectors: Tensor, bits: int) -> Rows:
    """Vectors [N, d] in `bits` (2 to 6 or 8; 16 keeps them as they are)."""
    if bits == 16:
        return Rows(vectors.contiguous(), vectors.shape[-1])
    vectors = vectors.float()
    centre = small_float(vectors.mean(0)) if len(vectors) else vectors.new_zeros(vectors.shape[-1])
    offset = vectors - centre.float()
    least = LEAST_SPREAD * vectors.pow(2).mean().sqrt() if len(vectors) else 1.0
    spread = offset.pow(2).mean(0).sqrt() if len(vectors) else torch.ones_like(centre.float())
    spread = small_float(spread.clamp(min=max(float(least), SMALLEST)))
    codes, scale = _round(offset / spread.float(), bits)
    return Rows(codes, vectors.shape[-1], bits, scale, centre, spread)


def bytes_per_row(width: int, bits: int, size: int) -> int:
    """What one more row takes; `size` is that of a number that is not rounded."""
    if bits == 16:
        return width * size
    return 2 + (width if bits == 8 else sum(-(-width * plane // 8) for plane in PLANES[bits]))


def _round(vectors: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """[N, d] -> packed codes and scales [N]: of a few scales that with the least squared error, row by row."""
    low = -(2 ** (bits - 1))
    most = vectors.abs().amax(-1, keepdim=True).clamp(min=1e-6) / (-low - 0.5)
    kind = torch.float16 if not len(most) or float(most.max()) <= LARGEST else torch.float32
    best, levels, scales = torch.full_like(most, float("inf")), torch.zeros_like(vectors), most
    for shrink in SHRINKS.get(bits, (1.0,)):
        scale = (most * shrink).to(kind).float()
        code = (vectors / scale).floor_().clamp_(low, -low - 1)
        error = ((code + 0.5) * scale - vectors).pow_(2).sum(-1, keepdim=True).clamp_(max=MOST)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, scale, scales)
        levels = torch.where(better, code, levels)
    return _pack(levels, bits), scales[:, 0].to(kind)


def _pack(levels: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return levels.to(torch.int8)
    numbers = (levels + 2 ** (bits - 1)).to(torch.uint8)
    planes = []
    for plane in PLANES[bits]:
        width = -(-numbers.shape[-1] * plane // 8)
        part = torch.nn.functional.pad(numbers & (2**plane - 1), (0, width * (8 // plane) - numbers.shape[-1]))
        planes.append(sum(piece << (plane * index) for index, piece in enumerate(part.split(width, -1))))
        numbers = numbers >> plane
    return torch.cat(planes, -1)


def _unpack(codes: Tensor, bits: int, width: int) -> Tensor:
    """Codes plus a half, float32 [N, width]."""
    if bits == 8:
        return codes.float().add_(0.5)
    planes = codes.split([-(-width * plane // 8) for plane in PLANES[bits]], -1)
    numbers, shift = codes.new_zeros(len(codes), width), 0
    for part, plane in zip(planes, PLANES[bits], strict=True):
        mask = 2**plane - 1
        pieces = [(part >> (plane * index)) & mask if index else part & mask for index in range(8 // plane)]
        numbers, shift = numbers | (torch.cat(pieces, -1)[:, :width] << shift), shift + plane
    return numbers.float().add_(0.5 - 2 ** (bits - 1))


@dataclass(frozen=True)
class Coded:
    """N vectors: rows of their own, or rows that they share.

    With `ref` [N] vector t is `rows[ref[t]]`, times `length[t]` where that is not None.
    """

    rows: Rows
    ref: Tensor | None = None
    length: Tensor | None = None
    theta: float = 1.0

    def __len__(self) -> int:
        return len(self.rows) if self.ref is None else len(self.ref)

    def tensors(self) -> dict[str, list[Tensor]]:
        """Everything that takes memory, by kind."""
        return {
            "codes": self.rows.tensors(),
            "indices": [] if self.ref is None else [self.ref],
            "lengths": [] if self.length is None else [self.length],
        }

    def dense(self, piece: slice = ALL) -> Tensor:
        """The vectors [N, d], or a piece of them."""
        if self.ref is None:
            return self.rows.dense(piece)
        rows = self.rows.dense().index_select(0, self.ref[piece].long())
        return rows if self.length is None else rows * self.length[piece].to(rows.dtype)[:, None]

    def mix(self, weights: Tensor) -> Tensor:
        """Sums of the vectors: weights [M, N] -> [M, d]; shared rows are read once, whoever shares them."""
        if self.ref is None:
            return self.rows.mix(weights)
        weights = weights.float() if self.length is None else weights.float() * self.length.float()
        shared = weights.new_zeros(weights.shape[0], len(self.rows))
        return self.rows.mix(shared.index_add_(1, self.ref.long(), weights))

    def append(self, vectors: Tensor, greedy: bool = False) -> "Coded":
        """These vectors and `vectors` [M, d] after them; a shared row is used where one is near enough."""
        if self.ref is None:
            return replace(self, rows=self.rows.append(vectors))
        unit, length = directions(vectors)
        if self.length is None:  # rows shared by token, which says nothing of their lengths: each gets its own
            ref = torch.arange(len(vectors), device=vectors.device) + len(self.rows)
            return replace(self, rows=self.rows.append(vectors), ref=small_int(torch.cat([self.ref.long(), ref])))
        known = directions(self.rows.dense())[0]
        members, ref = cover(unit, self.theta, known=known, greedy=greedy)
        return replace(
            self,
            rows=self.rows.append(unit[members]),
            ref=small_int(torch.cat([self.ref.long(), ref])),
            length=small_float(torch.cat([self.length.float(), length])),
        )


def directions(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors and lengths of `vectors` [..., d], in float32; those of zero vectors are zero (paper: eq. 8)."""
    vectors = vectors.float()
    length = vectors.norm(dim=-1)
    return vectors / length.clamp(min=1e-12)[..., None], length


def share(vectors: Tensor, theta: float, bits: int, greedy: bool = False) -> Coded:
    """Vectors [N, d] by a codebook: each has a code whose cosine with it is above `theta`, or is a code itself."""
    return shared(vectors, cover(directions(vectors)[0], theta, greedy=greedy), theta, bits)


def shared(vectors: Tensor, covered: tuple[Tensor, Tensor], theta: float, bits: int) -> Coded:
    """The same where it is known what `cover` gives."""
    (members, ref), (unit, length) = covered, directions(vectors)
    return Coded(pack(unit[members].to(vectors.dtype), bits), small_int(ref), small_float(length), theta)


def share_by(ids: Tensor, vectors: Tensor, bits: int) -> Coded:
    """Vectors [N, d] that depend on `ids` [N] alone: one row for each different id, and nothing is lost but `bits`."""
    distinct, ref = ids.unique(return_inverse=True)
    first = torch.full_like(distinct, len(ids)).scatter_reduce_(
        0, ref, torch.arange(len(ids), device=ids.device), reduce="amin"
    )
    return Coded(pack(vectors[first], bits), small_int(ref))


def cover(unit: Tensor, theta: float, known: Tensor | None = None, greedy: bool = False) -> tuple[Tensor, Tensor]:
    """Codes for unit vectors [N, d]: which of them become codes, and for each the index of its code.

    Codes `known` [M, d] come first in the count and are used where one is near enough. No two new codes have a cosine
    above `theta`. `greedy` is the paper's search (eq. 10-13, one code after the other); without it all vectors that
    have more neighbours than each of their neighbours become codes at once, until every vector has one.
    """
    codes = unit[:0] if known is None else known
    count = len(codes)
    members, refs = [], []
    for start in range(0, len(unit), BLOCK):
        block = unit[start : start + BLOCK]
        ref = torch.full((len(block),), -1, dtype=torch.long, device=unit.device)
        if len(codes):
            cosine, nearest = (block @ codes.T).max(-1)
            ref = torch.where(cosine > theta, nearest, ref)
        left = (ref < 0).nonzero()[:, 0]
        if len(left):
            rest = block[left]
            near = rest @ rest.T > theta
            near.fill_diagonal_(True)  # rounding puts the cosine of a vector with itself on either side of 1
            chosen, found = _one_by_one(near) if greedy else _many_at_once(near, rest)
            ref[left] = found + count
            members.append(left[chosen] + start)
            codes = torch.cat([codes, rest[chosen]])
            count = len(codes)
        refs.append(ref)
    nothing = torch.zeros(0, dtype=torch.long, device=unit.device)
    return torch.cat([nothing, *members]), torch.cat([nothing, *refs])


def _one_by_one(near: Tensor) -> tuple[Tensor, Tensor]:
    """Whoever has most live neighbours becomes a code and takes them along, until nobody is left."""
    degree = near.sum(-1)
    ref = torch.full_like(degree, -1)
    chosen: list[Tensor] = []
    while int(degree[best := degree.argmax()]) > 0:
        taken = (near[best] & (ref < 0)).nonzero()[:, 0]
        ref[taken] = len(chosen)
        chosen.append(best)
        degree -= near[:, taken].sum(-1)
        degree[taken] = 0
    return torch.stack(chosen), ref


def _many_at_once(near: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """All local maxima of the number of live neighbours become codes together; the others take the nearest."""
    count = len(near)
    ref = torch.full((count,), -1, dtype=torch.long, device=near.device)
    order = torch.arange(count, 0, -1, device=near.device, dtype=torch.float32)
    beside = near.float()
    chosen = ref[:0]
    while bool((live := ref < 0).any()):
        degree = beside @ live.float()
        rank = torch.where(live, degree * (count + 1) + order, 0.0)  # no two of the live are equal
        new = (live & (rank == (beside * rank).amax(-1))).nonzero()[:, 0]
        cosine = torch.where(near[:, new], unit @ unit[new].T, -2.0)
        nearest, which = cosine.max(-1)
        ref = torch.where(live & (nearest > -2.0), which + len(chosen), ref)
        ref[new] = torch.arange(len(new), device=near.device) + len(chosen)
        chosen = torch.cat([chosen, new])
    return chosen, ref


def small_int(numbers: Tensor) -> Tensor:
    """Whole numbers >= -1 in the smallest type that holds them."""
    return numbers.to(torch.int16 if not len(numbers) or int(numbers.max()) < 2**15 else torch.int32)


def small_float(numbers: Tensor) -> Tensor:
    """Numbers as float16, or as float32 where that would lose their range."""
    size = numbers.abs()
    fits = bool(((size == 0) | ((size >= SMALLEST) & (size <= LARGEST))).all())
    return numbers.half() if fits else numbers.float()


def held_bytes(tensors: Any) -> int:
    """Bytes of tensors, each of them once however often it is named."""
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def pieces(rows: Tensor, width: int) -> list[slice]:
    """Rows of vectors in pieces that are computed with one after the other; on accelerators all at once."""
    step = max(CACHED // width, 1) if rows.device.type == "cpu" else max(len(rows), 1)
    return [slice(start, start + step) for start in range(0, len(rows), step)]
