"""How `kv_latent` changes a draft: widths, kept channels, config, and the rewrites of the projections.

Two results are possible. A *stock* one, where every layer and head keeps the same stride of pairs and equal widths:
then `head_dim` changes and nothing else, because stock RoPE of the smaller width gives the kept pairs their old
frequencies. Otherwise a *latent* one, whose attention is `surgery/runtime/surgery_latent_attention.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from surgery.architectures import Model
from surgery.checkpoint.expressions import Tensors, TensorSpec
from surgery.emission.code import RuntimePart
from surgery.operations.base import Statistics
from surgery.operations.kv_latent.channels import (
    head_rows,
    pair_channels,
    paper_exponents,
    paper_pairs,
    stride_channels,
    stride_pairs,
)
from surgery.operations.kv_latent.settings import KVLatentSettings
from surgery.planning import Draft

PART = RuntimePart(file="surgery_latent_attention.py", symbol="LatentAttention", attribute="self_attn")
# Stock rotary tables that an equal stride leaves exact; yarn's ramp rounds in units of the width.
STOCK_ROPE = frozenset({"default", "linear", "llama3"})


# Nats per token from which on a model has visibly lost: about a tenth more perplexity.
KNEE = 0.1


@dataclass(frozen=True)
class LayerShape:
    """One layer's latent heads. `rope_pairs[g]` are KV head g's indices into the rotary table.

    `pairs[g]` are the base's pairs whose channels are taken; they differ from `rope_pairs` only under the paper's RoPE.
    """

    qk_dim: int
    vo_dim: int
    pairs: list[list[int]]
    rope_pairs: list[list[int]]
    values: list[int]
    scaling: float


def widths(model: Model, settings: KVLatentSettings) -> tuple[list[int], list[int]]:
    """Widths per layer as far as they are known without measuring; for a ratio, the uniform ones nearest below it."""
    layers, head = model.num_hidden_layers, model.head_dim
    if settings.qk_dim is None and settings.vo_dim is None:
        return uniform_widths(layers, head, settings.kv_ratio or 0.75, settings)
    qk, vo = (head if width is None else width for width in (settings.qk_dim, settings.vo_dim))
    return [qk] * layers if isinstance(qk, int) else qk, [vo] * layers if isinstance(vo, int) else vo


def uniform_widths(layers: int, head: int, ratio: float, settings: KVLatentSettings) -> tuple[list[int], list[int]]:
    """The widest (d_qk, d_vo), equal in all layers, within `ratio`; keys shrink first, values need their width more."""
    strided = settings.qk_select != "energy"
    keys = [w for w in range(2, head + 1, 2) if not strided or (head // 2) % (head // w) == 0 == head % w]
    values = [w for w in range(1, head + 1) if settings.vo_basis == "svd" or head % w == 0]
    fitting = [(k + v, -abs(v - k), v, k) for k in keys for v in values if k + v <= 2 * head * ratio + 1e-9 and k <= v]
    if not fitting:
        return [2] * layers, [1] * layers
    _, _, v, k = max(fitting)
    return [k] * layers, [v] * layers


def edit(draft: Draft, settings: KVLatentSettings, statistics: Statistics | None) -> None:
    """Apply `kv_latent` to a draft."""
    model = draft.model
    shapes = _measured_shapes(statistics) if statistics is not None else _known_shapes(model, settings)
    if _is_identity(model, shapes, settings):
        draft.notes.append("kv_latent keeps every channel: nothing changes")
        return
    qkv_bias, output_bias = model.qkv_bias, model.output_bias
    biased = statistics is not None and bool(statistics.facts.get("output_bias"))
    plain = statistics is None or (biased == output_bias and not model.attention(0).fused)
    stock = plain and _is_stock(model, shapes, settings)
    if statistics is not None and statistics.facts.get("predicted_kl", 0.0) > KNEE:
        cost, floor = statistics.facts["predicted_kl"], statistics.facts["knee"]
        draft.notes.append(
            f"past the knee: these widths cost at least {cost:.2f} nats per token; above {KNEE} a loss shows, "
            f"and this model stays below that down to kv_ratio {floor:g}"
        )
    for layer, shape in enumerate(shapes):
        _rewrite_layer(draft, model, layer, shape, statistics, stock)
    if stock:
        draft.config["head_dim"] = shapes[0].qk_dim
        return
    draft.config["surgery"] = (draft.config.get("surgery") or {}) | {
        "version": 1,
        "base_model_type": model.architecture.model_type,
        "latent_attention": {
            "qkv_bias": qkv_bias,
            "o_bias": output_bias or biased,
            "inv_freq": _paper_table(model, settings, [shape.qk_dim for shape in shapes]),
            "select_after_norm": model.architecture.attention.qk_norm != "none",
            "clip_qkv": model.config.get(model.architecture.attention.clip or ""),
            "layers": [
                {
                    "num_key_value_heads": len(shape.rope_pairs),
                    "qk_dim": shape.qk_dim,
                    "vo_dim": shape.vo_dim,
                    "rope_pairs": shape.rope_pairs,
                    "scaling": shape.scaling,
                }
                for shape in shapes
            ],
        },
    }
    draft.parts.append(PART)


def _known_shapes(model: Model, settings: KVLatentSettings) -> list[LayerShape]:
    """Shapes that need no data: stride, matched and paper; for `energy` the stride stands in while planning."""
    head, groups = model.head_dim, model.num_key_value_heads
    all_qk, all_vo = widths(model, settings)
    own = _own_exponents(head, all_qk)
    shapes = []
    for qk_dim, vo_dim in zip(all_qk, all_vo, strict=True):
        values = stride_channels(head, vo_dim) if head % vo_dim == 0 else list(range(vo_dim))
        if settings.qk_select == "matched":
            pairs = paper_pairs(head, qk_dim) or []
        elif settings.qk_select == "stride":
            pairs = stride_pairs(head, qk_dim)
        else:
            pairs = list(range(qk_dim // 2))
        rope_pairs = pairs
        if settings.rope == "paper":
            rope_pairs = [own.index(e) for e in paper_exponents(qk_dim)] if own else paper_pairs(head, qk_dim) or []
        scaling = (qk_dim if settings.method == "paper" else head) ** -0.5
        shapes.append(LayerShape(qk_dim, vo_dim, [pairs] * groups, [rope_pairs] * groups, values, scaling))
    return shapes


def _measured_shapes(statistics: Statistics) -> list[LayerShape]:
    return [
        LayerShape(
            layer["qk_dim"], layer["vo_dim"], layer["rope_pairs"], layer["rope_pairs"], [], float(layer["scaling"])
        )
        for layer in statistics.facts["layers"]
    ]


def _is_identity(model: Model, shapes: list[LayerShape], settings: KVLatentSettings) -> bool:
    whole = all(shape.qk_dim == shape.vo_dim == model.head_dim for shape in shapes)
    return whole and settings.rope == "keep" and len(shapes[0].rope_pairs) == model.num_key_value_heads


def _is_stock(model: Model, shapes: list[LayerShape], settings: KVLatentSettings) -> bool:
    """Whether a stock class holds the result exactly."""
    at, first, head = model.architecture.attention, shapes[0], model.head_dim
    if not at.native_head_dim or at.qk_norm != "none" or model.rope.kind not in STOCK_ROPE or settings.rope == "paper":
        return False
    if first.qk_dim != first.vo_dim or head % first.qk_dim or (head // 2) % (head // first.qk_dim):
        return False
    stride = [stride_pairs(head, first.qk_dim)] * model.num_key_value_heads
    return all(s.qk_dim == first.qk_dim and s.vo_dim == first.vo_dim and s.rope_pairs == stride for s in shapes)


def _own_exponents(head: int, qk_dims: Sequence[int]) -> list[Fraction] | None:
    """All layers' exponents of the paper's spectrum in one table; None where each is among the base's own."""
    if all(paper_pairs(head, width) is not None for width in qk_dims):
        return None
    return sorted({exponent for width in qk_dims for exponent in paper_exponents(width)})


def _paper_table(model: Model, settings: KVLatentSettings, qk_dims: Sequence[int]) -> list[float] | None:
    """The frequencies that the result brings; None where it uses the base's."""
    own = _own_exponents(model.head_dim, qk_dims) if settings.rope == "paper" else None
    return None if own is None else [math.pow(model.rope.theta, -float(exponent)) for exponent in own]


def _rewrite_layer(
    draft: Draft, model: Model, layer: int, shape: LayerShape, statistics: Statistics | None, stock: bool
) -> None:
    names = model.attention(layer)
    if statistics is not None:
        _take_measured(draft, model, layer, shape, statistics, stock)
        return
    head, groups = model.head_dim, model.num_key_value_heads
    repeats = model.num_attention_heads // groups
    channels = [pair_channels(pairs, head) for pairs in shape.pairs]
    normed = model.architecture.attention.qk_norm != "none"
    rows = {
        names.query: None if normed else head_rows(channels, head, repeats),
        names.key: None if normed else head_rows(channels, head),
        names.value: head_rows([shape.values] * groups, head),
    }
    # A stock class divides by sqrt(head_dim); the queries carry what is missing to the scale that is wanted.
    factor = shape.scaling * math.sqrt(shape.qk_dim) if stock else 1.0
    columns = head_rows([shape.values] * groups, head, repeats)
    if names.fused:
        _split_fused(draft, model, layer, rows, factor, stock)
    else:
        for name, kept in rows.items():
            if kept is not None:
                scale = factor if name == names.query else 1.0
                for kind in ("weight", "bias"):
                    if model.has(f"{name}.{kind}"):
                        _select(draft, f"{name}.{kind}", kept, 0, scale)
    _select(draft, f"{names.output}.weight", columns, 1, 1.0)


def _select(draft: Draft, name: str, kept: list[int], axis: int, scale: float) -> None:
    """Keep rows (axis 0) or columns (axis 1) of a tensor, times a scale."""
    spec = draft.spec(name)
    if scale == 1.0 and len(kept) == spec.shape[axis]:
        return
    shape = tuple(len(kept) if i == axis else size for i, size in enumerate(spec.shape))

    def function(tensors: Tensors) -> Tensors:
        return {name: _taken(tensors[name], kept, axis, scale)}

    what = "rows" if axis == 0 else "columns"
    draft.rewrite(
        [name], {name: TensorSpec(spec.dtype, shape)}, function,
        why=f"kv_latent keeps {len(kept)} of {spec.shape[axis]} {what}",
        work_bytes=0 if scale == 1.0 else 2 * spec.nbytes,
    )  # fmt: skip


def _split_fused(
    draft: Draft, model: Model, layer: int, rows: dict[str, list[int] | None], factor: float, stock: bool
) -> None:
    """Select from a fused projection; a stock result stays fused, a latent one gets three projections."""
    names = model.attention(layer)
    if names.fused is None:
        return
    cached = model.num_key_value_heads * model.head_dim
    starts = {names.query: 0, names.key: model.num_attention_heads * model.head_dim}
    starts[names.value] = starts[names.key] + cached
    flat = {name: [starts[name] + row for row in kept or []] for name, kept in rows.items()}
    for kind in ("weight", "bias"):
        fused = f"{names.fused}.{kind}"
        if not model.has(fused):
            continue
        spec = draft.spec(fused)
        counts = {f"{name}.{kind}": len(kept) for name, kept in flat.items()}
        outputs = {name: TensorSpec(spec.dtype, (count, *spec.shape[1:])) for name, count in counts.items()}
        whole = TensorSpec(spec.dtype, (sum(counts.values()), *spec.shape[1:]))

        def function(tensors: Tensors, fused: str = fused, kind: str = kind) -> Tensors:
            import torch

            scales = {names.query: factor}
            parts = {name: _taken(tensors[fused], kept, 0, scales.get(name, 1.0)) for name, kept in flat.items()}
            if stock:
                return {fused: torch.cat(list(parts.values()))}
            return {f"{name}.{kind}": part for name, part in parts.items()}

        draft.rewrite(
            [fused], {fused: whole} if stock else outputs, function,
            why="kv_latent selects from the fused projection", work_bytes=2 * spec.nbytes,
        )  # fmt: skip


def _taken(tensor: Any, kept: list[int], axis: int, scale: float) -> Any:
    import torch

    taken = tensor.index_select(axis, torch.tensor(kept))
    return taken if scale == 1.0 else (taken.double() * scale).to(tensor.dtype)


def _take_measured(
    draft: Draft, model: Model, layer: int, shape: LayerShape, statistics: Statistics, stock: bool
) -> None:
    """Replace a layer's projections by those that calibration solved for, stored in the base's dtype."""
    names = model.attention(layer)
    parts = {"q": names.query, "k": names.key, "v": names.value, "o": names.output}
    solved = {
        f"{base}.{kind}": f"layers.{layer}.{part}.{kind}"
        for part, base in parts.items()
        for kind in ("weight", "bias")
        if f"layers.{layer}.{part}.{kind}" in statistics.tensors
    }
    inputs = list(solved) if names.fused is None else [f"{names.fused}.weight", f"{names.fused}.bias", *solved]
    inputs = [name for name in inputs if model.has(name)]
    dtype = draft.spec(f"{names.output}.weight").dtype
    outputs = {name: TensorSpec(dtype, tuple(statistics.facts["shapes"][key])) for name, key in solved.items()}
    factor = shape.scaling * math.sqrt(shape.qk_dim) if stock else 1.0

    def function(tensors: Tensors) -> Tensors:
        of = tensors[f"{names.output}.weight"].dtype
        found = {name: statistics.tensors[key] for name, key in solved.items()}
        return {
            name: (tensor.double() * factor if name.startswith(names.query) else tensor).to(of)
            for name, tensor in found.items()
        }

    work = 4 * sum(spec.nbytes for spec in outputs.values())
    draft.rewrite(inputs, outputs, function, why="kv_latent solved this layer on the calibration text", work_bytes=work)
