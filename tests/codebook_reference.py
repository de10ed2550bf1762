"""What the tests of the codebook cache hold it against: the paper's formulas by brute force, and a masked base model.

Nothing here uses the code under test, except `convert` and `load`, which make a result, and what reads a cache's fields.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import surgery

# So small that a few dozen tokens are evicted, shared and rounded.
SMALL = {"min_prompt": 8, "window": 6, "sinks": 2, "residual": 4}
LOSSLESS = {**SMALL, "reserve_ratio": 1.0}
SELF = {"text": "self", "samples": 6, "length": 24}


def convert(base: Path | str, out: Path, *before: dict[str, Any], **settings: Any) -> Path:
    operations = [*before, {"codebook_kv": settings}]
    data = {"surgery": 1, "operations": operations, "calibration": SELF, "verify": False}
    return surgery.convert(str(base), out, surgery.manifest_from_dict(data)).out


def load(folder: Path | str, attention: str = "sdpa", **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, attn_implementation=attention, **options
    ).eval()


def tokens(count: int, rows: int = 1, seed: int = 1, low: int = 3, high: int = 128) -> Tensor:
    return torch.randint(low, high, (rows, count), generator=torch.Generator().manual_seed(seed))


# How the bits of a number are divided.
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}

# The paper's formulas.


def line(ratio: float, beta: float, layers: int) -> list[float]:
    """Equations 5 and 6, with 2 r - 1 where 1 - 2 r is printed; what they leave open is even."""
    if ratio <= beta or ratio >= 1 or layers == 1:
        return [min(max(ratio, 0.0), 1.0)] * layers
    first, last = 2 * ratio - beta, beta
    if first > 1:
        first, last = 1.0, 2 * ratio - 1
    return [first * (1 - at / (layers - 1)) + last * at / (layers - 1) for at in range(layers)]


def algorithm_1(unit: Tensor, theta: float) -> tuple[list[int], list[int]]:
    """Algorithm 1 as printed (with G where the listing sums S), in float64: members of the codebook, code of each."""
    unit = unit.double()
    near = ((unit @ unit.T) > theta).double()
    near.fill_diagonal_(1)
    chosen: list[int] = []
    ref = [-1] * len(unit)
    while near.sum() > 0:
        best = int(near.sum(1).argmax())
        row = near[best].clone()
        for index in row.nonzero()[:, 0].tolist():
            ref[index] = len(chosen)
        chosen.append(best)
        alive = 1 - row
        near = near * alive[:, None] * alive[None]
    return chosen, ref


def pooled(values: list[float], width: int) -> list[float]:
    half = width // 2
    return [max(values[max(at - half, 0) : at + half + 1]) for at in range(len(values))]


def window_scores(attention: Tensor, window: int, sinks: int, pool: int = 1, divisor: str = "window") -> list[Any]:
    """From post-softmax attention [H, l, l] of one sequence: for each head what its context tokens receive."""
    length = attention.shape[-1]
    context = range(sinks, length - window)
    found = []
    for head in attention.double():
        received = [
            float(head[length - window :, at].sum()) / (length - at if divisor == "paper" else window) for at in context
        ]
        found.append(pooled(received, pool) if pool > 1 else received)
    return found


def best(scores: list[float], count: int, first: int) -> set[int]:
    order = sorted(range(len(scores)), key=lambda at: -scores[at])
    return {at + first for at in order[:count]}


def best_of_all(scores: list[list[float]], count: int, least_share: float) -> list[set[int]]:
    """The best `count` of all heads together, after each head's own best share."""
    heads, length = len(scores), len(scores[0])
    least = min(int(least_share * count / heads), length)
    kept = [best(of, least, 0) for of in scores]
    rest = sorted(
        ((of[at], head, at) for head, of in enumerate(scores) for at in range(length) if at not in kept[head]),
        key=lambda found: -found[0],
    )
    for _, head, at in rest[: count - heads * least]:
        kept[head].add(at)
    return kept


def turned(states: Tensor, position: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary embedding [..., N, d] at position [N] by complex numbers, in float64."""
    width = states.shape[-1]
    angle = position.double()[:, None] * base ** (-torch.arange(0, width, 2).double() / width)
    first, second = states.double().chunk(2, -1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


# What a cache holds.


def row_bytes(width: int, bits: int, size: int) -> int:
    """What a stored vector takes: its bits, in planes of whole bytes of 4, 2 or 1 each, and a scale."""
    if bits == 16:
        return width * size
    return 2 + sum(math.ceil(width * plane / 8) for plane in PLANES[bits])


def reachable(thing: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor that can be reached from an object, each once, whatever it hangs in."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, (str, bytes, int, float, bool, type(None), type, torch.dtype)):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in list(thing.values()):
            yield from reachable(value, seen)
    elif isinstance(thing, (list, tuple, set)):
        for value in thing:
            yield from reachable(value, seen)
    elif hasattr(thing, "__dict__") and not callable(thing):
        yield from reachable(vars(thing), seen)


def memory(tensors: Iterator[Tensor] | list[Tensor]) -> int:
    """What their storages take, each once: a view of something larger takes all of it."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())


def kept(cache: Any, layer: int, row: int, head: int, share: int) -> set[int]:
    """Places that query head number `head` can see of a coded layer."""
    stored = cache.stored[layer]
    group, at = divmod(head, share)
    coded = stored.heads[row][group]
    places = coded.position.tolist()
    if coded.mask is not None:
        places = [place for place, bits in zip(places, coded.mask.tolist(), strict=True) if bits >> at & 1]
    return {*places, *(place for place in stored.position[row].tolist() if place >= 0)}


def masked(base: Any, ids: Tensor, prompt: int, visible: dict[tuple[int, int], set[int]]) -> Tensor:
    """Logits of an eager base whose queries after the prompt see, of the prompt, only what `visible` says.

    `visible` has by (layer, query head) the places that are left. ids [1, T] -> [1, T - prompt, V].
    """
    total, handles = ids.shape[1], []
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    for index, layer in enumerate(base.model.layers):
        heads = base.config.num_attention_heads
        allowed = causal.repeat(heads, 1, 1)
        for head in range(heads):
            gone = [at for at in range(prompt) if at not in visible[index, head]]
            allowed[head, prompt:, gone] = False
        mask = torch.zeros(1, heads, total, total).masked_fill(~allowed, torch.finfo(torch.float32).min)

        def replace(_module: Any, args: Any, kwargs: Any, mask: Tensor = mask) -> Any:
            return args, kwargs | {"attention_mask": mask}

        handles.append(layer.self_attn.register_forward_pre_hook(replace, with_kwargs=True))
    try:
        with torch.no_grad():
            return base(ids, use_cache=False).logits[:, prompt:]
    finally:
        for handle in handles:
            handle.remove()
