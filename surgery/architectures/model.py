"""A checkpoint seen through its family: sizes, rope, and the names of the tensors that operations touch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery.architectures.family import Architecture
from surgery.errors import CorruptCheckpoint, UnsupportedModel


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position settings. `width` is the number of rotated channels per head, `width / 2` pairs."""

    kind: str
    theta: float
    width: int
    interleaved: bool
    scaling: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class AttentionTensors:
    """Base names of one layer's projections; `fused` replaces query, key and value where the family fuses them."""

    query: str
    key: str
    value: str
    output: str
    fused: str | None


@dataclass(frozen=True)
class Model:
    """Family, language-model config, and shape and bytes of every tensor, for one state of a checkpoint.

    Shapes of weights are [out, in], as stored. `root` is the whole config, which for multimodal models holds that of
    the language model. `cache` keeps what takes long to find.
    """

    architecture: Architecture
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    nbytes: Mapping[str, int] = field(default_factory=dict)
    root: Mapping[str, Any] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number of the config. Raises CorruptCheckpoint where it is none."""
        value = self.config.get(key)
        value = default if value is None else value
        if type(value) is not int or value <= 0:
            raise CorruptCheckpoint(
                f"config.json has {key} = {value!r}", cause="it must be a positive whole number",
                remedy="check config.json",
            )  # fmt: skip
        return value

    @property
    def own_code(self) -> bool:
        """Whether this is a finished result of surgery that carries code of its own."""
        return str((self.root or self.config).get("model_type")).startswith("surgery_")

    @property
    def num_hidden_layers(self) -> int:
        """Decoder layers."""
        return self.size("num_hidden_layers")

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.size("hidden_size")

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""
        return self.size("num_attention_heads")

    @property
    def num_key_value_heads(self) -> int:
        """Cached heads; equal to the query heads where the config does not say (multi-head attention)."""
        return self.size("num_key_value_heads", self.num_attention_heads)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.size("head_dim", self.hidden_size // self.num_attention_heads)

    @property
    def rope(self) -> Rope:
        """Rope settings, read from the 5.x spelling (`rope_parameters`) or the older one. Raises UnsupportedModel."""
        new = self.config.get("rope_parameters") or {}
        old = self.config.get("rope_scaling") or {}
        if not isinstance(new, dict) or not isinstance(old, dict) or any(isinstance(v, dict) for v in new.values()):
            raise UnsupportedModel(
                "the rope settings differ per layer type", cause="one rope table for all layers is what is supported",
                remedy="leave this model to a release that lists its family",
            )  # fmt: skip
        settings = {**new, **old}
        if self.architecture.attention.mrope and "mrope_section" not in settings:
            raise UnsupportedModel(
                "the rope settings have no mrope_section",
                cause="it says which rotary pairs turn by time, which by height and which by width",
                remedy="check rope_scaling in config.json against that of the model on the Hub",
            )  # fmt: skip
        kind = settings.pop("rope_type", None) or settings.pop("type", None) or "default"
        theta = self.config.get("rope_theta") or settings.pop("rope_theta", None) or 10000.0
        part = self.config.get("partial_rotary_factor") or settings.get("partial_rotary_factor") or 1.0
        width = int(self.head_dim * part)
        interleaved = bool(self.config.get("rope_interleave") or self.config.get("rope_interleaved"))
        return Rope(str(kind), float(theta), width, interleaved, settings)

    def attention(self, layer: int) -> AttentionTensors:
        """Names (without `.weight` and `.bias`) of layer `layer`'s projections."""
        at = self.architecture.attention
        prefix = at.prefix.format(layer=layer) + "."
        fused = prefix + at.fused if at.fused else None
        return AttentionTensors(prefix + at.query, prefix + at.key, prefix + at.value, prefix + at.output, fused)

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds tensor `name`."""
        return name in self.shapes

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases; derived from the tensors, not from the config."""
        names = self.attention(0)
        return self.has(f"{names.fused or names.query}.bias")

    @property
    def output_bias(self) -> bool:
        """Whether the attention output has a bias."""
        return self.has(f"{self.attention(0).output}.bias")

    def check_attention(self) -> None:
        """Hold every layer's projection shapes against the config. Raises CorruptCheckpoint, naming the tensor."""
        hidden, head = self.hidden_size, self.head_dim
        rows = self.num_attention_heads * head
        cached = self.num_key_value_heads * head
        if self.num_attention_heads % self.num_key_value_heads:
            raise CorruptCheckpoint(
                "config.json has heads that do not group", remedy="check num_key_value_heads",
                cause=f"{self.num_attention_heads} query heads over {self.num_key_value_heads} cached heads",
            )  # fmt: skip
        for layer in range(self.num_hidden_layers):
            names = self.attention(layer)
            wanted = {names.output: (hidden, rows)}
            if names.fused:
                wanted[names.fused] = (rows + 2 * cached, hidden)
            else:
                wanted |= {names.query: (rows, hidden), names.key: (cached, hidden), names.value: (cached, hidden)}
            for name, shape in wanted.items():
                self._check_shape(f"{name}.weight", shape)
                if self.has(f"{name}.bias"):
                    self._check_shape(f"{name}.bias", shape[:1])

    def _check_shape(self, name: str, wanted: tuple[int, ...]) -> None:
        found = self.shapes.get(name)
        if found is None:
            raise CorruptCheckpoint(
                f"tensor {name!r} is missing", remedy="check that the checkpoint is complete and unquantized",
                cause=f"family {self.architecture.model_type} keeps its attention there",
            )  # fmt: skip
        if found != wanted:
            raise CorruptCheckpoint(
                f"tensor {name!r} has shape {list(found)}", cause=f"config.json implies {list(wanted)}",
                remedy="check head_dim, num_attention_heads and num_key_value_heads in config.json",
            )  # fmt: skip
