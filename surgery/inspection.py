"""What a checkpoint is, and which operations fit it; reads headers and configs, never weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from surgery.architectures import Architecture, Model, Rope, architectures, carries_own_code
from surgery.architectures.experts import numbers
from surgery.architectures.family import Experts
from surgery.checkpoint.dtypes import TORCH_NAMES, element_count
from surgery.checkpoint.resolve import open_base
from surgery.errors import RefusedInput, UnsupportedModel
from surgery.metrics.active import active_parameters
from surgery.metrics.cache import cache_bytes_per_token
from surgery.operations import operations
from surgery.operations.base import Operation
from surgery.planning import open_draft, storage_dtype


@dataclass(frozen=True)
class Structure:
    """The parts of a known family that operations work on. `window` is None for attention over everything.

    `experts` are those of one layer, `expert_layers` how many layers have some, `active_parameters` what a token goes
    through; all three are None without experts, or where config and tensors disagree.
    """

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None
    qkv_bias: bool
    output_bias: bool
    qk_norm: str
    window: int | None
    experts: int | None = None
    experts_per_token: int | None = None
    expert_layers: int | None = None
    active_parameters: int | None = None


@dataclass(frozen=True)
class Inspection:
    """A checkpoint at a glance.

    structure   None for a family that has no data file
    dtypes      stored numbers by torch type
    operations  for each operation None where it fits with its default settings, or the reason why not
    side_files  for each file beside the weights an empty text where it is carried, or the reason why not
    """

    source: str
    revision: str | None
    model_type: str
    family: str | None
    structure: Structure | None
    parameters: int
    bytes: int
    dtypes: Mapping[str, int]
    shards: tuple[str, ...]
    cache_dtype: str
    cache_bytes_per_token: int | None
    remote_code: bool
    operations: Mapping[str, str | None]
    side_files: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        plain = {key: dict(value) if isinstance(value, Mapping) else value for key, value in vars(self).items()}
        if self.structure is not None:
            rope = self.structure.rope
            rope_json = (
                None
                if rope is None
                else {name: getattr(rope, name) for name in _ROPE} | {"scaling": dict(rope.scaling)}
            )
            plain["structure"] = {**vars(self.structure), "rope": rope_json}
        return plain


EXPERTS = 8  # of an ordinary model
_ROPE = ("kind", "theta", "width", "interleaved")


def inspect(base: str, *, trust_remote_code: bool = False, allow_pickle: bool = False) -> Inspection:
    """Look at `base` (a folder, `id@revision` or `builtin:NAME`). Raises the errors of `surgery.errors`."""
    checkpoint = open_base(base, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, headers_only=True)
    draft = open_draft(checkpoint)
    dtypes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        dtypes[TORCH_NAMES.get(tensor.dtype, tensor.dtype)] += element_count(tensor.shape)
    known = draft.architecture is not None
    dtype = storage_dtype(checkpoint)
    return Inspection(
        source=checkpoint.source,
        revision=checkpoint.revision,
        model_type=str(checkpoint.config.get("model_type")),
        family=draft.architecture.title if draft.architecture else None,
        structure=_structure(draft.model) if known else None,
        parameters=checkpoint.parameter_count,
        bytes=checkpoint.tensor_bytes,
        dtypes=MappingProxyType(dtypes),
        shards=tuple(checkpoint.shards),
        cache_dtype=dtype,
        cache_bytes_per_token=cache_bytes_per_token(draft.config, dtype),
        remote_code=checkpoint.remote_code,
        operations={
            name: why_not(operation, draft.model) if known else "no architecture describes its family"
            for name, operation in operations().items()
        },
        side_files={file.name: file.dropped for file in checkpoint.side_files},
    )


def why_not(operation: Operation[Any], model: Model) -> str | None:
    """The reason why an operation does not fit a model with its default settings, or None."""
    needed = [name for name, field in operation.settings.model_fields.items() if field.is_required()]
    if needed:
        return f"it depends on settings without a default: {', '.join(needed)}"
    if operation.reshapes and model.own_code:
        return carries_own_code(model.config["model_type"]).problem
    try:
        return operation.refuses(model, operation.settings())
    except RefusedInput as error:
        return f"{error.problem} ({error.cause})"


def fitting_families(operation: Operation[Any]) -> Mapping[str, str | None]:
    """By the title of each family: None where the operation fits an ordinary model of it, or the reason why not."""
    return {family.title: why_not(operation, ordinary_model(family)) for family in architectures().values()}


def ordinary_model(family: Architecture) -> Model:
    """A small model of a family as it usually is: grouped queries, plain rope, no window. Names and shapes only."""
    hidden, heads, kv_heads, width = 256, 4, 2, 64
    config = {
        "model_type": family.model_type, "num_hidden_layers": 2, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": width, "rope_theta": 10000.0,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {}
    model = Model(family, config, shapes)
    stem = family.layers.partition("layers.{layer}")[0]
    shapes |= {f"{stem}embed_tokens.weight": (1024, hidden), "lm_head.weight": (1024, hidden)}
    shapes[f"{stem}norm.weight"] = (hidden,)
    for layer in range(2):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{family.layers.format(layer=layer)}.{norm}.weight"] = (hidden,)
        names = model.attention(layer)
        rows = {names.query: heads * width, names.key: kv_heads * width, names.value: kv_heads * width}
        if names.fused:
            rows = {names.fused: sum(rows.values())}
        shapes |= {f"{name}.weight": (count, hidden) for name, count in rows.items()}
        shapes[f"{names.output}.weight"] = (hidden, heads * width)
        if family.experts is not None:
            shapes |= _ordinary_experts(family, family.experts, layer, hidden)
    if family.experts is not None:
        config |= dict.fromkeys(family.experts.counts, EXPERTS) | dict.fromkeys(family.experts.top_k, EXPERTS // 4)
    return model


def _ordinary_experts(family: Architecture, at: Experts, layer: int, hidden: int) -> dict[str, tuple[int, ...]]:
    block = f"{family.layers.format(layer=layer)}.{at.block}"
    shapes: dict[str, tuple[int, ...]] = {f"{block}.{at.router}.weight": (EXPERTS, hidden)}
    if at.correction:
        shapes[f"{block}.{at.router}.{at.correction}"] = (EXPERTS,)
    inside = ".".join(part for part in (block, at.experts) if part)
    if at.fused:
        return shapes | {f"{inside}.{name}.weight": (EXPERTS, hidden, hidden) for name in at.projections}
    each = [(expert, name) for expert in range(EXPERTS) for name in at.projections]
    return shapes | {f"{inside}.{expert}.{name}.weight": (hidden, hidden) for expert, name in each}


def _structure(model: Model) -> Structure:
    attention = model.architecture.attention
    window = model.config.get(attention.window) if attention.window else None
    # Some families state a width of the window beside a switch that turns it off.
    if model.config.get("use_sliding_window") is False:
        window = None
    return Structure(
        layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        heads=model.num_attention_heads,
        kv_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        rope=_rope(model),
        qkv_bias=model.qkv_bias,
        output_bias=model.output_bias,
        qk_norm=attention.qk_norm,
        window=window if type(window) is int else None,
        **_experts(model),
    )


def _experts(model: Model) -> dict[str, int]:
    if model.architecture.experts is None:
        return {}
    try:
        found = numbers(model)
        active = active_parameters(model)
    except RefusedInput:
        return {}  # the operations on experts say what is wrong
    if not found.experts:
        return {}
    return {
        "experts": max(found.experts.values()), "experts_per_token": max(found.top_k.values()),
        "expert_layers": len(found.experts), "active_parameters": active,
    }  # fmt: skip


def _rope(model: Model) -> Rope | None:
    try:
        return model.rope
    except UnsupportedModel:
        return None  # more than one rope table; the operations say so themselves
