# SPDX-License-Identifier: Apache-2.0
"""A cache that holds less than it has seen: old tokens coded, new ones as they are."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import DynamicCache

from .surgery_codebook_layer import Head, StoredLayer, Turning
from .surgery_codebook_rows import small_int
from .surgery_codebook_settings import CacheSettings
from .surgery_codebook_solver import Past, paper, size_of, solved, whole
from .surgery_compatibility import mrope_sections

NEVER = 2**31 - 1  # where padding stands: no query is as late
UNLIMITED = -1 if hasattr(cache_utils, "DynamicLayer") else None  # as the installed release spells it
PROBES = 32  # queries from all over a prompt, beside its window's, that judge how its layers are coded


@dataclass(frozen=True)
class Step:
    """One call of the model: the places [B, T] of its tokens (-1 for padding), and rotation at any place.

    Places order tokens. They are the positions, or, where a token has three of these (M-RoPE), columns.
    """

    position: Tensor
    table: Callable[[], tuple[Tensor, Tensor]]


def stock_options(config: Any) -> dict[str, Any]:
    """What a stock cache is made with, where the installed release takes it: the config says which layers slide."""
    return {"config": config} if "config" in inspect.signature(DynamicCache.__init__).parameters else {}


class CodebookCache(DynamicCache):  # type: ignore[misc]
    """Coded layers beside stock ones (those with a sliding window).

    `prompt_length`, in tokens with padding, says when a prompt that comes in several calls is complete; without it the
    first call is the whole prompt. Coded layers are written by their own attention only.
    """

    def __init__(
        self, settings: CacheSettings, coded: Iterable[int], config: Any, prompt_length: int | None = None
    ) -> None:
        super().__init__(**stock_options(config))
        self.settings, self.prompt_length = settings, prompt_length
        self.stored = {index: StoredLayer(settings.residual, settings.greedy) for index in coded}
        self.spare: dict[int, float] = {}  # bytes that layers left of their budgets, by sequence
        self.places = 0
        self.step: Step | None = None
        self.past_ids: Tensor | None = None
        self.tokens = torch.zeros(0, dtype=torch.long)  # of each sequence, without padding
        # Under M-RoPE the three positions [3, B, S] of all that was seen, once for all layers.
        self.grid = torch.zeros(3 if mrope_sections(config) else 0, 0, 0, dtype=torch.int16)

    # What a call goes through, from the model's `forward` and from each layer's attention.

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(
        self,
        ids: Tensor | None,
        position: Tensor | None,
        mask: Any,
        given: Tensor,
        rotary: Callable[..., Any],
        like: Tensor,
    ) -> None:
        """Take note of a call on `given` [B, T, ...]: ids, places and 2-D mask, any of which may be None."""
        batch, count = given.shape[:2]
        seen = self.get_seq_length(next(iter(self.stored)))
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            raise ValueError(
                "a codebook cache needs the attention mask as [batch, tokens]; with another mask use surgery_cache=None"
            )
        columns = torch.arange(seen, seen + count, device=like.device)[None]
        position = columns if position is None else position
        if len(self.grid):
            self._remember(position, batch)
            position = columns
        self.places = max(self.places, int(position.max()) + 1)
        position = position.expand(batch, -1)
        if mask is not None:
            position = torch.where(mask[:, -count:].bool(), position, -1)
        if not len(self.tokens):
            self.tokens = torch.zeros(batch, dtype=torch.long, device=position.device)
        self.tokens = self.tokens + (position >= 0).sum(1)
        if 0 in self.stored and self.stored[0].heads is None and (self.past_ids is not None or not seen):
            known = ids if self.past_ids is None or ids is None else torch.cat([self.past_ids, ids], 1)
            self.past_ids = known  # None from here on where a part came as embeddings
        made: list[tuple[Tensor, Tensor]] = []

        def table() -> tuple[Tensor, Tensor]:
            if not made:  # the places of all calls so far, once for all layers, and gone when the call is over
                parts = len(self.grid)
                every = self.grid.long() if parts else torch.arange(self.places, device=like.device)[None]
                cos, sin = rotary(like[..., :1, :], every)
                made.append((cos, sin) if parts else (cos[0], sin[0]))
            return made[0]

        self.step = Step(position, table)

    def _remember(self, position: Tensor, batch: int) -> None:
        """Three positions of new tokens: those given [3, B, T], behind a row that counts columns, or one for all."""
        rows = position[-3:] if position.ndim == 3 else position[None]
        new = small_int(rows.expand(3, batch, -1))
        self.grid = torch.cat([self.grid, new], -1) if self.grid.shape[1] else new

    def complete(self, layer_idx: int) -> bool:
        """Whether a layer holds every token as it was."""
        return self.stored[layer_idx].heads is None

    def turning(self, columns: Tensor | None, device: Any) -> Turning:
        """Rotation at any place of this call, for a layer on `device`."""
        cos, sin = (table.to(device) for table in self.now.table())
        return Turning(cos, sin, columns)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # sizes depend on the text
    @torch.no_grad()
    def settle(
        self, layer_idx: int, query: Tensor, turned: Tensor | None, columns: Tensor | None, scaling: float
    ) -> None:
        """After a layer attended: code what is old enough.

        Rotated queries [B, H, T, d] of this call; all rotated keys [B, G, S, d] of a layer that holds everything.
        """
        layer, settings = self.stored[layer_idx], self.settings
        if layer.heads is not None or turned is None:
            layer.settle()
            return
        asked, count = self.now.position.to(query.device), query.shape[2]
        is_answer = count <= settings.residual and layer.seen > count and layer.seen != self.prompt_length
        if layer.seen < (self.prompt_length or 0):
            layer.watch(query, asked, settings.window)
            return
        if layer.seen < settings.min_prompt + (2 * settings.residual if is_answer else 0):
            layer.query = layer.asked = None  # a prompt that stays as it is needs no judges later, and no ids
            if layer_idx == 0:
                self.past_ids = None
            return
        if layer.query is not None:
            query, asked = torch.cat([layer.query, query], 2), torch.cat([layer.asked, asked], 1)
        self._code(layer_idx, query, asked, turned, columns, scaling, is_answer)

    def _code(
        self,
        layer_idx: int,
        query: Tensor,
        asked: Tensor,
        turned: Tensor,
        columns: Tensor | None,
        scaling: float,
        is_answer: bool,
    ) -> None:
        layer, settings = self.stored[layer_idx], self.settings
        paper_prompt = settings.method == "paper" and not is_answer
        sinks, newest = settings.sinks, settings.window if paper_prompt else settings.residual
        coded: list[list[Head]] = []
        raws: list[Tensor] = []
        for row in range(len(layer.key)):
            real = (layer.position[row] >= 0).nonzero()[:, 0]
            last = real[max(len(real) - newest, 0) :]
            first = real[: min(sinks, len(real) - len(last))]
            context = real[len(first) : len(real) - len(last)]
            judges = self._judges(asked[row], settings.window)
            raw = torch.cat([first, last])
            position = layer.position[row].long()
            ids = self.past_ids[row] if layer_idx == 0 and self.past_ids is not None else None
            past = Past(
                layer.key[row], turned[row], layer.value[row], torch.where(position >= 0, position, NEVER), context,
                raw, query[row][:, judges], asked[row, judges], min(settings.window, len(judges)), scaling,
                self.turning(columns, query.device).of(row), None if ids is None else ids.to(query.device),
            )  # fmt: skip
            coded.append(self._heads(past, layer_idx, row, len(real), is_answer))
            raws.append(raw)
        width = max(map(len, raws))
        padded = [torch.nn.functional.pad(raw, (width - len(raw), 0), value=-1) for raw in raws]
        layer.code(coded, torch.stack(padded), min(newest, width))
        if layer_idx == 0:
            self.past_ids = None

    def _judges(self, asked: Tensor, window: int) -> Tensor:
        """Which queries judge: some from all over, then the newest."""
        real = (asked >= 0).nonzero()[:, 0]
        newest, older = real[max(len(real) - window, 0) :], real[: max(len(real) - window, 0)]
        step = max(len(older) // PROBES, 1)
        return torch.cat([older[step - 1 :: step], newest])

    def _heads(self, past: Past, layer_idx: int, row: int, tokens: int, is_answer: bool) -> list[Head]:
        settings = self.settings
        if not is_answer and settings.method == "paper" and tokens >= settings.min_prompt:
            return paper(past, settings, list(self.stored).index(layer_idx), len(self.stored))
        row_bytes = past.groups * (past.key[0, 0].nbytes + past.value[0, 0].nbytes)
        left = len(self.stored) - list(self.stored).index(layer_idx)
        given = self.spare.get(row, 0.0) / left
        budget = settings.reserve_ratio * tokens * row_bytes - len(past.raw) * (row_bytes + 4) + given
        budget -= len(self.grid) * self.grid.element_size() * tokens / len(self.stored)
        finite = bool(torch.isfinite(past.key).all() & torch.isfinite(past.value).all())
        if not finite or tokens < settings.min_prompt:  # the latter beside a longer sequence; alone it would stay raw
            return whole(past, replace(settings, theta_k=1.0, theta_v=1.0, bits=16), NEVER)
        if settings.reserve_ratio >= 1:
            heads = whole(past, settings, NEVER)
        elif is_answer:
            heads = whole(past, settings, budget)
        else:
            heads = solved(past, settings, budget)
        self.spare[row] = self.spare.get(row, 0.0) - given + budget - size_of(heads)
        return heads

    def end(self) -> None:
        """The call is over: what was made for it alone is let go."""
        self.step = None

    @property
    def now(self) -> Step:
        """The call that is going on. Raises ValueError outside of one."""
        if self.step is None:
            raise ValueError("a codebook cache is used through the model that made it, not through a layer of it")
        return self.step

    # What transformers asks of a cache.

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Stock layers only."""
        if layer_idx in self.stored:
            raise TypeError(f"layer {layer_idx} is coded, and written by the attention of its own checkpoint only")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int | None = 0, *args: Any, **kwargs: Any) -> int:
        """Tokens seen (not: stored), on which positions depend."""
        layer_idx = layer_idx or 0
        if layer_idx in self.stored:
            return self.stored[layer_idx].seen
        length: int = super().get_seq_length(layer_idx, *args, **kwargs)
        return length

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Columns and offset of the mask that the model builds, which layers read only while they hold everything."""
        if layer_idx in self.stored:
            count = query_length if isinstance(query_length, int) else query_length.shape[0]
            return self.stored[layer_idx].seen + count, 0
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def get_max_cache_shape(self, *_: Any) -> int | None:
        """No limit."""
        return UNLIMITED

    def get_max_length(self, *_: Any) -> int | None:
        """No limit."""
        return UNLIMITED

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow beams."""
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._select(torch.arange(len(self.tokens)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """These sequences only."""
        super().batch_select_indices(indices)
        self._select(indices)

    def _select(self, rows: Tensor) -> None:
        for layer in self.stored.values():
            layer.select(rows)
        self.tokens = self.tokens[rows.to(self.tokens.device)]
        self.grid = self.grid[:, rows.to(self.grid.device)] if len(self.grid) else self.grid
        if self.past_ids is not None:
            self.past_ids = self.past_ids[rows.to(self.past_ids.device)]

    def crop(self, max_length: int) -> None:
        """To this many tokens, or by this many where it is not positive. Raises ValueError where those are coded."""
        seen = self.get_seq_length(next(iter(self.stored)))
        count = -max_length if max_length <= 0 else max(seen - max_length, 0)
        for layer in self.stored.values():
            layer.crop(count)
        stock = [index for index in range(super().__len__()) if index not in self.stored]
        if stock:
            super().crop(max_length)
        self.tokens = self.tokens - count
        self.grid = self.grid[..., : self.grid.shape[-1] - count].clone()
        if count and self.past_ids is not None:
            self.past_ids = self.past_ids[:, :-count]

    @property
    def is_croppable(self) -> bool:
        """Within the residual."""
        return True

    def reset(self) -> None:
        """Empty it."""
        if hasattr(super(), "reset"):
            super().reset()
        for index, layer in self.stored.items():
            self.stored[index] = StoredLayer(layer.residual, layer.greedy)
        self.spare, self.places, self.step, self.past_ids = {}, 0, None, None
        self.tokens, self.grid = self.tokens[:0], self.grid[:, :0, :0]

    def __len__(self) -> int:
        stock: int = super().__len__()
        return max([stock, *(index + 1 for index in self.stored)])

    # What it takes.

    def report(self) -> dict[str, Any]:
        """Bytes, by layer and kind, beside those of the stock cache for the same tokens (padding not counted)."""
        tokens = int(self.tokens.sum())
        layers = []
        for index, layer in sorted(self.stored.items()):
            kinds = layer.report()
            stored = kinds.pop("stored")
            groups = 0 if layer.key is None else layer.key.shape[1]
            row = 0 if layer.key is None else groups * (layer.key[0, 0, :1].nbytes + layer.value[0, 0, :1].nbytes)
            layers.append({
                "layer": index, "bytes": sum(kinds.values()), "stock_bytes": tokens * row, "stored_tokens": stored,
                "seen_tokens": tokens * groups, **kinds,
            })  # fmt: skip
        total, stock = (sum(layer[name] for layer in layers) for name in ("bytes", "stock_bytes"))
        total += self.tokens.nbytes + self.grid.nbytes
        return {"bytes": total, "stock_bytes": stock, "ratio": total / stock if stock else 1.0, "layers": layers}
