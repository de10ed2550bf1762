"""Which tensors read the residual stream, behind which norm, and which write to it: all of them, or a reason why not.

Every tensor of a checkpoint has to be known by name. One that is not might read or write the stream too, and then
nothing that changes its channels would be exact.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from surgery.architectures.family import Experts, layer_pattern
from surgery.architectures.model import Model
from surgery.errors import CorruptCheckpoint

ATTENTION_NORM = "input_layernorm.weight"
FEED_FORWARD_NORM = "post_attention_layernorm.weight"
# Inside attention, between what reads the stream and what writes to it; the first two readers are those of MLA.
_COMPRESSING = ("q_a_proj", "kv_a_proj_with_mqa")
_INSIDE_ATTENTION = (
    "q_norm.weight", "k_norm.weight", "q_a_layernorm.weight", "q_b_proj.weight", "q_b_proj.bias",
    "kv_a_layernorm.weight", "kv_b_proj.weight", "kv_b_proj.bias", "sinks", "rotary_emb.inv_freq",
)  # fmt: skip
_DENSE = ("gate_proj", "up_proj", "gate_up_proj")
_SHARED = ("shared_expert", "shared_experts")


@dataclass(frozen=True, slots=True)
class Use:
    """A tensor with the channels of the stream on `axis`: it reads them behind `norm`, or, without one, writes them."""

    name: str
    axis: int
    norm: str | None = None


@dataclass(frozen=True)
class Stream:
    """The residual stream of a model, by tensor names.

    uses       readers and writers, the embeddings (which write) and, where it is stored, the head among them
    norms      what stands between; the last is the one before the head
    drafts     the tensors of draft layers, which are none of these
    """

    uses: tuple[Use, ...]
    norms: tuple[str, ...]
    embedding: str
    head: str
    drafts: tuple[str, ...] = ()

    def readers(self, norm: str) -> tuple[Use, ...]:
        """What reads the stream behind a norm."""
        return tuple(use for use in self.uses if use.norm == norm)


@dataclass(frozen=True, slots=True)
class ValueHeads:
    """The values of one layer: rows of tensor `value` from `start`, columns of `output`, without suffixes.

    `heads` cached heads of `width` channels; each serves `repeats` neighbouring query heads.
    """

    value: str
    start: int
    output: str
    heads: int
    width: int
    repeats: int


@dataclass(frozen=True, slots=True)
class FeedForward:
    """A gated feed-forward that every token goes through: rows of `up` from `start`, columns of `down`."""

    up: str
    start: int
    down: str
    width: int


# The axis of the channels and, for what reads them, the norm before it; None for what does not meet the stream.
_Role = tuple[int, str | None] | None


@dataclass
class _Layer:
    """What is known of a layer's tensors, by names inside it, with `*` for the number of an expert."""

    experts: re.Pattern[str]
    roles: dict[str, _Role] = field(default_factory=dict)

    def read(self, modules: Iterable[str], norm: str) -> None:
        for name in modules:
            self.roles |= {f"{name}.weight": (1, norm), f"{name}.bias": None}

    def write(self, module: str) -> None:
        self.roles |= {f"{module}.weight": (0, None), f"{module}.bias": (0, None)}

    def knows(self, inner: str) -> bool:
        return self.experts.sub(r"\1.*.", inner) in self.roles

    def use(self, name: str, inner: str) -> Use | None:
        role = self.roles[self.experts.sub(r"\1.*.", inner)]
        return role and Use(name, role[0], role[1] and name.removesuffix(inner) + role[1])


def residual_stream(model: Model) -> Stream | str:
    """What reads and writes the residual stream, or the reason why that is not known."""
    if model.architecture.residual is None:
        return f"where {model.architecture.title} has norms, and what they compute, is not described"
    if model.config.get("quantization_config"):
        return "the base is quantized, and its channels share scales; start from an unquantized one"
    stem = model.architecture.layers.partition("layers.{layer}")[0]
    norm, embedding, head = f"{stem}norm.weight", f"{stem}embed_tokens.weight", "lm_head.weight"
    outside: dict[str, Use | None] = {embedding: Use(embedding, 1), head: Use(head, 1, norm), norm: None}
    pattern = layer_pattern(model.architecture.layers)
    known = _layer(model)
    uses: list[Use | None] = []
    drafts: list[str] = []
    for name in model.shapes:
        match = pattern.match(name)
        inner = name[match.end() :] if match else ""
        if match and int(match[1]) >= model.num_hidden_layers:
            drafts.append(name)
        elif match and known.knows(inner):
            uses.append(known.use(name, inner))
        elif name in outside:
            uses.append(outside[name])
        else:
            return f"what tensor {name!r} does is not known"
    prefixes = [model.architecture.layers.format(layer=layer) for layer in range(model.num_hidden_layers)]
    norms = [f"{prefix}.{name}" for prefix in prefixes for name in (ATTENTION_NORM, FEED_FORWARD_NORM)]
    stream = Stream(tuple(use for use in uses if use), (*norms, norm), embedding, head, tuple(drafts))
    return _unfit(model, stream) or stream


def value_heads(model: Model, layer: int) -> ValueHeads | str:
    """How a layer keeps its values, or why they cannot be changed. Raises CorruptCheckpoint where heads do not fit."""
    names, clip = model.attention(layer), model.architecture.attention.clip
    if clip and model.config.get(clip) is not None:
        return f"it clamps its values ({clip})"
    plain = model.has(f"{names.value}.weight")
    value = names.value if plain else names.fused
    if value is None or not model.has(f"{value}.weight") or not model.has(f"{names.output}.weight"):
        return "its values come from a latent (MLA)"
    latent = (model.config.get("surgery") or {}).get("latent_attention")
    heads = latent["layers"][layer]["num_key_value_heads"] if latent else model.num_key_value_heads
    queries, columns = model.num_attention_heads, model.shapes[f"{names.output}.weight"][1]
    width = columns // queries
    start = 0 if plain else (queries + heads) * width
    if columns % queries or queries % heads or model.shapes[f"{value}.weight"][0] != start + heads * width:
        raise CorruptCheckpoint(
            f"tensors {value!r} and {names.output!r} do not have the heads of config.json",
            cause=f"{queries} query heads and {heads} cached heads would have to divide them",
            remedy="check num_attention_heads and num_key_value_heads in config.json",
        )
    return ValueHeads(value, start, names.output, heads, width, queries // heads)


def feed_forwards(model: Model, layer: int) -> Iterator[FeedForward]:
    """The feed-forwards of a layer that every token goes through: the dense one, and shared experts."""
    prefix = model.architecture.layers.format(layer=layer)
    block = model.architecture.experts.block if model.architecture.experts else "mlp"
    for inner in ("mlp", *(f"{block}.{shared}" for shared in _SHARED)):
        down = f"{prefix}.{inner}.down_proj"
        width = model.shapes.get(f"{down}.weight", (0, 0))[-1]
        for up, start in ((f"{prefix}.{inner}.up_proj", 0), (f"{prefix}.{inner}.gate_up_proj", width)):
            if width and model.shapes.get(f"{up}.weight", ())[:1] == (start + width,):
                yield FeedForward(up, start, down, width)


def _layer(model: Model) -> _Layer:
    at, experts = model.architecture.attention, model.architecture.experts
    block = experts.block if experts else "mlp"
    inside = ".".join(part for part in (block, experts.experts if experts else "experts") if part)
    found = _Layer(re.compile(rf"^({re.escape(inside)})\.\d+\."), {ATTENTION_NORM: None, FEED_FORWARD_NORM: None})
    attention = at.prefix.removeprefix(model.architecture.layers + ".")
    reading = (at.query, at.key, at.value, *((at.fused,) if at.fused else ()), *_COMPRESSING)
    found.read((f"{attention}.{name}" for name in reading), ATTENTION_NORM)
    found.write(f"{attention}.{at.output}")
    found.roles |= {f"{attention}.{name}": None for name in _INSIDE_ATTENTION}
    for dense in ("mlp", *(f"{block}.{shared}" for shared in _SHARED)):
        found.read((f"{dense}.{name}" for name in _DENSE), FEED_FORWARD_NORM)
        found.write(f"{dense}.down_proj")
    if experts is None:
        return found
    found.read((f"{block}.{experts.router}", f"{block}.shared_expert_gate"), FEED_FORWARD_NORM)
    if experts.correction:
        found.roles[f"{block}.{experts.router}.{experts.correction}"] = None
    if experts.fused:
        found.roles |= _fused(experts, inside)
    else:
        found.read((f"{inside}.*.{name}" for name in experts.projections[:-1]), FEED_FORWARD_NORM)
        found.write(f"{inside}.*.{experts.projections[-1]}")
    return found


def _fused(experts: Experts, inside: str) -> dict[str, _Role]:
    """Tensors with the experts on their first axis, with and without `.weight`."""
    roles: dict[str, _Role] = {}
    into, out = (1, 2) if experts.transposed else (2, 1)
    *reading, writing = (f"{inside}.{name}" for name in experts.projections)
    for suffix in ("", ".weight"):
        roles |= {f"{name}{suffix}": (into, FEED_FORWARD_NORM) for name in reading}
        roles[f"{writing}{suffix}"] = (out, None)
    return roles | {f"{name}_bias": None for name in reading} | {f"{writing}_bias": (1, None)}


def _unfit(model: Model, stream: Stream) -> str | None:
    """Why what was found is no whole model, or None."""
    hidden = model.hidden_size
    for name in (stream.embedding, *stream.norms):
        if not model.has(name):
            return f"it has no tensor {name!r}"
    for name in stream.norms:
        if model.shapes[name] != (hidden,):
            return f"tensor {name!r} has shape {list(model.shapes[name])}, and the stream has {hidden} channels"
    for use in stream.uses:
        shape = model.shapes[use.name]
        if shape[use.axis : use.axis + 1] != (hidden,):
            return f"tensor {use.name!r} has shape {list(shape)}, and the stream has {hidden} channels"
        if use.name in model.nbytes and model.nbytes[use.name] < 2 * math.prod(shape):
            return f"tensor {use.name!r} is quantized; start from an unquantized base"
    return None
