# SPDX-License-Identifier: Apache-2.0
"""What one attention layer holds of the past: old tokens coded, for each head its own; a few as they are."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .surgery_codebook_rows import Coded, held_bytes, pieces, small_int
from .surgery_compatibility import columns_of, rotate

QUERIES = 256  # that attend at once, so that weights stay small
EVERYONE = {torch.uint8: 255, torch.int32: 2**31 - 1}


@dataclass(frozen=True)
class Head:
    """The coded tokens of one key and value head of one sequence, oldest first.

    `place` [N] are their places in the sequence; where they are consecutive only the first is kept, as a number. Keys
    are coded before rotation. `mask` [N], where it is not None, says with its j-th bit that the group's j-th query head
    may see the token.
    """

    place: Tensor | int
    key: Coded
    value: Coded
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.key)

    @property
    def position(self) -> Tensor:
        """The places, int64 [N]."""
        if isinstance(self.place, Tensor):
            return self.place.long()
        return torch.arange(self.place, self.place + len(self), device=self.key.rows.codes.device)

    def tensors(self) -> dict[str, list[Tensor]]:
        """Everything that takes memory, by kind."""
        keys, values = self.key.tensors(), self.value.tensors()
        found = {kind: keys[kind] + values[kind] for kind in keys}
        found["positions"] = [self.place] if isinstance(self.place, Tensor) else []
        return {**found, "masks": [] if self.mask is None else [self.mask]}

    def append(self, position: Tensor, key: Tensor, value: Tensor, greedy: bool) -> "Head":
        """This head with M more tokens: position [M], key [M, d], value [M, s]."""
        mask = self.mask
        if mask is not None:
            mask = torch.cat([mask, torch.full_like(position, EVERYONE[mask.dtype], dtype=mask.dtype)])
        place = placed(torch.cat([self.position, position]))
        return Head(place, self.key.append(key, greedy), self.value.append(value, greedy), mask)


def placed(position: Tensor) -> Tensor | int:
    """Places as a head keeps them."""
    consecutive = len(position) > 0 and bool((position.diff() == 1).all())
    return int(position[0]) if consecutive else small_int(position)


def masked(wanted: Tensor) -> Tensor:
    """Which of n query heads want each of N tokens, bool [n, N], as one number for each token [N]."""
    bits = 1 << torch.arange(wanted.shape[0], device=wanted.device)
    return (wanted * bits[:, None]).sum(0).to(torch.uint8 if wanted.shape[0] <= 8 else torch.int32)


def visible(mask: Tensor, count: int) -> Tensor:
    """The other way: bool [count, N]."""
    return ((mask.long()[None] >> torch.arange(count, device=mask.device)[:, None]) & 1) != 0


@dataclass(frozen=True)
class Turning:
    """Rotary embedding at any place: cos and sin [S, width] by place, and the columns of them that a head uses.

    Where each sequence has its own they are [B, S, width], and `of` gives those of one.
    `columns` is None where every head uses all, [w] where all use the same, [G, w] where each has its own. The second
    half of a table repeats the first, as channels j and j + n are a pair.
    """

    cos: Tensor
    sin: Tensor
    columns: Tensor | None = None
    last: list[Tensor] = field(default_factory=list)  # heads that keep the same tokens share their places

    def heads(self, states: Tensor, position: Tensor) -> Tensor:
        """Rotate [B, G, N, d] at position [B, N]."""
        place = position.clamp(min=0).long()
        at = (place,) if self.cos.ndim == 2 else (torch.arange(len(place), device=place.device)[:, None], place)
        return rotate(states, *columns_of(self.cos[at], self.sin[at], self.columns))

    def of(self, row: int) -> "Turning":
        """Rotary embedding of one sequence."""
        return self if self.cos.ndim == 2 else Turning(self.cos[row], self.sin[row], self.columns)

    def logits(self, query: Tensor, head: Head, index: int) -> Tensor:
        """Rotated queries [M, d] times the keys of head number `index`, rotated at their places: [M, N]."""
        cos, sin = self._tables(head, index)
        found = [
            _logits(query, head.key.dense(piece), cos[piece], sin[piece]) for piece in pieces(cos, query.shape[-1])
        ]
        return torch.cat(found, -1) if found else query.new_zeros(len(query), 0)

    def _tables(self, head: Head, index: int) -> tuple[Tensor, Tensor]:
        """The halves of cos and sin at the places of a head: [N, pairs]."""
        place = head.place
        if not isinstance(place, Tensor):
            cos, sin = (table[place : place + len(head)] for table in (self.cos, self.sin))
        else:
            if not self.last or self.last[0] is not place:
                self.last[:] = [place, *(table.index_select(0, place.long()) for table in (self.cos, self.sin))]
            _, cos, sin = self.last
        if self.columns is None:
            return cos[:, : cos.shape[1] // 2], sin[:, : sin.shape[1] // 2]
        columns = self.columns if self.columns.ndim == 1 else self.columns[index]
        columns = columns[: len(columns) // 2]
        return cos[:, columns], sin[:, columns]


def _logits(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotated queries [M, d] times keys [N, d] turned by half tables [N, pairs]; their halves are never joined."""
    query, cos, sin = query.to(key.dtype), cos.to(key.dtype), sin.to(key.dtype)
    pairs = cos.shape[-1]
    one, two, rest = key[:, :pairs], key[:, pairs : 2 * pairs], key[:, 2 * pairs :]
    logits = query[:, :pairs] @ (one * cos).addcmul_(two, sin, value=-1).T
    logits = logits.addmm_(query[:, pairs : 2 * pairs], (two * cos).addcmul_(one, sin).T)
    return logits.addmm_(query[:, 2 * pairs :], rest.T) if rest.shape[-1] else logits


class StoredLayer:
    """One layer of a `CodebookCache`.

    `key` [B, G, R, d] (before rotation), `value` [B, G, R, s] and `position` [B, R] (-1 for padding) are the tokens
    that stay as they are; `heads` has, where something was coded, for each sequence its G heads. `seen` counts columns,
    padding too.
    """

    def __init__(self, residual: int, greedy: bool) -> None:
        self.residual, self.greedy = residual, greedy  # tokens; how codes are searched for
        self.key: Any = None
        self.value: Any = None
        self.position: Any = None
        self.heads: list[list[Head]] | None = None
        self.seen = 0
        self.kept_raw = 0  # of the raw columns, how many at the front are never coded
        self.free = 0  # of the raw columns, how many at the end are the newest tokens, with nothing coded in between
        self.query: Any = None  # rotated queries [B, H, P, d] of the newest tokens, and
        self.asked: Any = None  # their places [B, P], until the prompt is coded

    def append(self, key: Tensor, value: Tensor, position: Tensor) -> None:
        """Take in new tokens as they are: key [B, G, T, d] before rotation, value [B, G, T, s], position [B, T]."""
        position = small_int(position.flatten()).view(position.shape)
        if self.key is None:
            self.key, self.value, self.position = key, value, position
        else:
            wider = torch.promote_types(self.position.dtype, position.dtype)
            self.key, self.value = torch.cat([self.key, key], 2), torch.cat([self.value, value], 2)
            self.position = torch.cat([self.position.to(wider), position.to(wider)], 1)
        self.seen += key.shape[2]
        self.free += key.shape[2]

    def watch(self, query: Tensor, position: Tensor, most: int) -> None:
        """Remember the newest `most` rotated queries [B, H, T, d] at position [B, T] while a prompt is not complete."""
        if self.query is not None:
            query, position = torch.cat([self.query, query], 2), torch.cat([self.asked, position], 1)
        self.query, self.asked = query[:, :, -most:].clone(), position[:, -most:].clone()

    def settle(self) -> None:
        """Code the oldest raw tokens once twice the residual has gathered; none of them is evicted."""
        if self.heads is None or self.key.shape[2] - self.kept_raw < 2 * self.residual:
            return
        old = slice(self.kept_raw, self.key.shape[2] - self.residual)
        self.heads = [
            [self._grown(head, row, index, old) for index, head in enumerate(heads)]
            for row, heads in enumerate(self.heads)
        ]
        self._forget(old)
        self.free = self.residual

    def _grown(self, head: Head, row: int, index: int, old: slice) -> Head:
        position = self.position[row, old]
        real = position >= 0
        return head.append(
            position[real].long(), self.key[row, index, old][real], self.value[row, index, old][real], self.greedy
        )

    def _forget(self, old: slice) -> None:
        """Drop raw columns; the rest is copied, so that the memory is free."""
        keep = [column for column in range(self.key.shape[2]) if not old.start <= column < old.stop]
        columns = torch.tensor(keep, device=self.key.device)
        self.key, self.value = self.key.index_select(2, columns), self.value.index_select(2, columns)
        self.position = self.position.index_select(1, columns)

    def code(self, heads: list[list[Head]], raw: Tensor, free: int) -> None:
        """Replace the past by coded heads and raw columns [B, R] (-1 for none), of which the last `free` are newest."""
        self.heads, self.kept_raw, self.free = heads, raw.shape[1], free
        self.query = self.asked = None
        at = raw.clamp(min=0)
        wide = at[:, None, :, None].expand(-1, self.key.shape[1], -1, -1)
        self.key = self.key.gather(2, wide.expand(-1, -1, -1, self.key.shape[-1]))
        self.value = self.value.gather(2, wide.expand(-1, -1, -1, self.value.shape[-1]))
        self.position = torch.where(raw >= 0, self.position.gather(1, at), -1)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # sizes depend on the text
    def attend(self, query: Tensor, position: Tensor, turning: Turning, scaling: float) -> Tensor:
        """Rotated queries [B, H, T, d] at position [B, T] -> [B, T, H, s], once something was coded."""
        outputs = [
            self._attend(query[:, :, start : start + QUERIES], position[:, start : start + QUERIES], turning, scaling)
            for start in range(0, query.shape[2], QUERIES)
        ]
        return torch.cat(outputs, 1)

    def _attend(self, query: Tensor, position: Tensor, turning: Turning, scaling: float) -> Tensor:
        batch, count, asked, _ = query.shape
        groups = self.key.shape[1]
        share = count // groups
        grouped = query.reshape(batch, groups, share * asked, -1)
        recent = (grouped @ turning.heads(self.key, self.position).transpose(-1, -2)).float() * scaling
        hidden = (self.position[:, None] > position[:, :, None]) | (self.position < 0)[:, None]
        hidden = hidden[:, None, None].expand(-1, groups, share, -1, -1).flatten(2, 3)
        recent = recent.masked_fill(hidden, torch.finfo(recent.dtype).min)  # finite: a padding query sees only these
        each = [
            self._one(head, grouped[row, index], recent[row, index], (row, index), own, scaling, asked)
            for row, heads in enumerate(self.heads or [])
            for own in [turning.of(row)]
            for index, head in enumerate(heads)
        ]
        return torch.stack(each).view(batch, count, asked, -1).transpose(1, 2)

    def _one(
        self,
        head: Head,
        query: Tensor,
        recent: Tensor,
        at: tuple[int, int],
        turning: Turning,
        scaling: float,
        asked: int,
    ) -> Tensor:
        """One head of one sequence: queries [n T, d], logits of raw tokens [n T, R] -> [n T, s]."""
        stored = turning.logits(query, head, at[1]).float() * scaling
        if head.mask is not None:
            seen = visible(head.mask, len(query) // asked)
            stored = stored.masked_fill(~seen.repeat_interleave(asked, 0), float("-inf"))
        weights = torch.cat([stored, recent], -1).softmax(-1)
        mixed: Tensor = head.value.mix(weights[:, : stored.shape[1]]).to(query.dtype)
        value: Tensor = self.value[at]
        return mixed + weights[:, stored.shape[1] :].to(query.dtype) @ value

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; coded heads are values and are shared, not copied."""
        if self.key is None:
            return
        rows = rows.to(self.key.device)
        self.key, self.value, self.position = self.key[rows], self.value[rows], self.position[rows]
        if self.heads is not None:
            self.heads = [self.heads[row] for row in rows.tolist()]

    def crop(self, count: int) -> None:
        """Take back the newest `count` tokens. Raises ValueError where they are coded already."""
        if count > self.free:
            raise ValueError(
                f"{count} tokens are to be taken back, and only the newest {self.free} are as they were: "
                "the others are coded. Use surgery_cache=None for what rolls back further, or a larger residual"
            )
        if count and bool((self.position[:, -count:] < 0).any()):
            raise ValueError("tokens are to be taken back that are padding in some sequences: pad on the left")
        if count:
            keep = self.key.shape[2] - count
            self.key, self.value = self.key[:, :, :keep].clone(), self.value[:, :, :keep].clone()
            self.position = self.position[:, :keep].clone()
            self.seen -= count
            self.free -= count
            self.kept_raw = min(self.kept_raw, keep)
            if self.query is not None:
                left = max(self.query.shape[2] - count, 0)
                self.query, self.asked = self.query[:, :, :left], self.asked[:, :left]

    def report(self) -> dict[str, int]:
        """Bytes by kind, and how many tokens are stored, over all heads of all sequences."""
        held: dict[str, list[Tensor]] = {
            "raw": [],
            "codes": [],
            "indices": [],
            "lengths": [],
            "positions": [],
            "masks": [],
        }
        if self.key is None:
            return {**dict.fromkeys(held, 0), "stored": 0}
        held["raw"] += [self.key, self.value]
        held["positions"].append(self.position)
        stored = int((self.position >= 0).sum()) * self.key.shape[1]
        for head in _flat(self.heads or []):
            stored += len(head)
            for kind, tensors in head.tensors().items():
                held[kind] += tensors
        seen: set[int] = set()
        counts = {}
        for kind, tensors in held.items():
            counts[kind] = held_bytes([tensor for tensor in tensors if id(tensor) not in seen])
            seen |= {id(tensor) for tensor in tensors}
        return {**counts, "stored": stored}


def _flat(rows: Sequence[Sequence[Head]]) -> list[Head]:
    return [head for row in rows for head in row]
