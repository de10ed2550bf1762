"""Random orthogonal matrices of any size, as Kronecker products of small ones, and turning tensors by them.

For a size `2^n * m` with m odd: random signs, times a Hadamard matrix of 2^n (as two of about 2^(n/2), by Sylvester),
times a random orthogonal matrix of m. Random bits are SHAKE-256 of a label, so no release of a library changes them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from surgery.operations.rotate.editing import CHUNK, Piece


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal matrix: a diagonal of signs, times the Kronecker product of `factors`; all float64."""

    signs: Tensor
    factors: tuple[Tensor, ...]

    def turn(self, rows: Tensor) -> Tensor:
        """Rows [..., n] times the matrix."""
        parts = (rows * self.signs).unflatten(-1, [len(factor) for factor in self.factors])
        for axis, factor in enumerate(self.factors, start=-len(self.factors)):
            parts = (parts.movedim(axis, -1) @ factor).movedim(-1, axis)
        found: Tensor = parts.flatten(-len(self.factors))
        return found


@lru_cache(maxsize=4096)
def rotation(size: int, label: str) -> Rotation:
    """The matrix of a size that belongs to a label."""
    power = size & -size
    low = 1 << (power.bit_length() - 1) // 2
    factors = [_hadamard(low), _hadamard(power // low), _random(size // power, f"{label} odd part")]
    bits = torch.frombuffer(bytearray(_bytes(size, f"{label} signs")), dtype=torch.uint8) & 1
    used = tuple(factor for factor in factors if len(factor) > 1) or (factors[0],)
    return Rotation(1.0 - 2.0 * bits.double(), used)


def turned(tensor: Tensor, axis: int | None, label: str, scale: Tensor | None, pieces: Sequence[Piece] = ()) -> Tensor:
    """A tensor with its channels on `axis` times `scale`, turned by the matrix of `label`, and rounded to its type.

    `pieces` divide the first of the other axes; those with labels are turned along it too. Without `axis` that is all.
    """
    out = torch.empty_like(tensor)
    source, target = _channels_last(tensor, axis), _channels_last(out, axis)
    along = None if axis is None else rotation(tensor.shape[axis], label)
    for piece in pieces or (Piece(0, len(source), None),):
        width = piece.stop - piece.start
        step = width if piece.label else max(1, CHUNK // math.prod(source.shape[1:]))
        for start in range(piece.start, piece.stop, step):
            stop = min(start + step, piece.stop)
            part = source[start:stop].double()
            if scale is not None:
                part = part * scale.double()
            if along is not None:
                part = along.turn(part)
            if piece.label:
                part = rotation(width, piece.label).turn(part.movedim(0, -1)).movedim(-1, 0)
            target[start:stop] = part.to(tensor.dtype)
    return out


def _channels_last(tensor: Tensor, axis: int | None) -> Tensor:
    """A view with the channels on the last of at least two axes."""
    if axis is None:
        return tensor[:, None]
    return tensor[None] if tensor.ndim == 1 else tensor.movedim(axis, -1)


def _hadamard(size: int) -> Tensor:
    found = torch.ones(1, 1, dtype=torch.float64)
    one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(found) < size:
        found = torch.kron(found, one)
    return found / math.sqrt(size)


def _random(size: int, label: str) -> Tensor:
    """Q of a matrix of normal numbers, with signs that make it unique."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    count = size * size
    whole = torch.frombuffer(bytearray(_bytes(16 * count, label)), dtype=torch.int64)
    uniform = ((whole >> 11) & ((1 << 53) - 1)).double().add(0.5) * 2.0**-53
    normal = (-2 * uniform[:count].log()).sqrt() * (2 * math.pi * uniform[count:]).cos()
    q, r = torch.linalg.qr(normal.view(size, size))
    signed: Tensor = q * r.diagonal().sign()
    return signed


def _bytes(count: int, label: str) -> bytes:
    return hashlib.shake_256(label.encode()).digest(count)
