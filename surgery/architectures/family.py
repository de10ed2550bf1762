"""What a family's data file may say."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Classes(_Data):
    """Where transformers keeps the family's classes."""

    modeling: str = Field(description="module of the modeling code")
    configuration: str = Field(description="module of the configuration class")
    config: str
    model: str
    causal_lm: str


class Attention(_Data):
    """Where attention is, and which properties of it decide what an operation may do."""

    prefix: str = Field(description="tensor-name template with {layer}")
    attribute: str = Field(default="self_attn", description="attribute of the decoder layer in the modeling code")
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    fused: str | None = Field(default=None, description="one projection with the rows of query, key and value")
    qk_norm: Literal["none", "head", "full"] = Field(
        default="none", description="RMS norm of queries and keys: over each head, or over all heads together"
    )
    native_head_dim: bool = Field(description="the stock class sizes projections by config.head_dim, on every version")
    clip: str | None = Field(default=None, description="config key of a clamp on queries, keys and values")
    window: str | None = Field(default=None, description="config key of a sliding window")
    mrope: bool = Field(
        default=False,
        description="tokens have three positions (time, height, width), and mrope_section in the rope settings says "
        "which rotary pairs turn by which",
    )
    unlike: str | None = Field(
        default=None,
        description="what sets it apart from plain rotary attention, for operations on attention to refuse",
    )


class Experts(_Data):
    """Where routed experts are, in tensors and in the config. How tokens choose among them is the model's own code."""

    block: str = Field(
        default="mlp", description="the block with router and experts, in the names of a layer's tensors"
    )
    router: str = Field(default="gate", description="inside the block; each of its tensors has one row per expert")
    correction: str | None = Field(default=None, description="a bias of the choice, inside the router")
    experts: str = Field(default="experts", description="inside the block")
    projections: tuple[str, ...] = Field(
        default=("gate_proj", "up_proj", "down_proj"),
        description="the matrices of one expert; or, where all experts share tensors, their names inside the block",
    )
    fused: bool = Field(default=False, description="all experts of a layer share tensors, whose first axis counts them")
    transposed: bool = Field(
        default=False, description="tensors that experts share are [experts, in, out], not [experts, out, in]"
    )
    counts: tuple[str, ...] = Field(description="config keys of the number of experts: one number, several spellings")
    top_k: tuple[str, ...] = Field(
        default=("num_experts_per_tok",), description="config keys of how many experts a token takes"
    )
    mass: Literal["whole", "kept", "norm_topk_prob"] = Field(
        description="what the weights of a token's experts sum to: one number, whatever experts there are (`whole`); "
        "a share of all experts there are (`kept`); or as this config key says"
    )
    drafts: str | None = Field(
        default=None, description="config key of the number of draft (MTP) layers after the last"
    )


def _begun(name: str, beginnings: dict[str, str]) -> str:
    for old, new in beginnings.items():
        if name == old or name.startswith(f"{old}."):
            return new + name[len(old) :]
    return name


class Vision(_Data):
    """Where images enter a model whose language model is a part of it."""

    placeholders: tuple[tuple[str, ...], ...] = Field(
        description="config keys of the tokens that stand for visual features: one token each, in several spellings"
    )
    tower: str | None = Field(
        default=None,
        description="prefix of the vision tower's tensors on the Hub, whose last part 5.x leaves out when it saves",
    )
    modules: dict[str, str] = Field(
        default={}, description="what names of modules begin with in transformers, and their tensors on the Hub"
    )

    @property
    def short_tower(self) -> str | None:
        """That prefix as 5.x saves it."""
        return self.tower.rpartition(".")[0] if self.tower else None

    def stored(self, module: str) -> str:
        """The name on the Hub of what transformers calls `module`."""
        return _begun(module, self.modules)

    def loaded(self, tensor: str) -> str:
        """The name in transformers of what the Hub calls `tensor`."""
        return _begun(tensor, {stored: loaded for loaded, stored in self.modules.items()})


class Architecture(_Data):
    """One family. Tensor names are those of the Hub's files, config keys those of config.json."""

    model_type: str
    title: str
    since: str = Field(description="first transformers version, from our floor on, that has the family")
    classes: Classes
    text_config: str | None = Field(default=None, description="config key of the nested language model's config")
    layers: str = Field(description="tensor-name template of a decoder layer, with {layer}")
    attention: Attention
    residual: Literal["plain"] | None = Field(
        default=None,
        description="`plain`: RMS norms, whose weights multiply, stand before attention, before the feed-forward and "
        "before the head; nothing but scalars stands between these and the residual stream; attention mixes values "
        "linearly. Without it, operations that change the basis of the stream, or the scale of channels, refuse",
    )
    experts: Experts | None = None
    vision: Vision | None = None


class Composite(_Data):
    """A family whose language model is one of another family, with a vision tower beside it."""

    model_type: str
    title: str
    since: str
    classes: Classes
    text_config: str = "text_config"
    text_prefix: str = Field(default="language_model.", description="before the names of the language model's tensors")
    vision: Vision

    def around(self, text: Architecture) -> Architecture:
        """The family with `text` as its language model. Operations that need more than attention of it refuse."""
        attention = text.attention.model_copy(update={"prefix": self.text_prefix + text.attention.prefix})
        own = {"title": f"{self.title} ({text.title})", "residual": None, "experts": None, "attention": attention}
        own |= {name: getattr(self, name) for name in ("model_type", "since", "classes", "text_config", "vision")}
        return text.model_copy(update={**own, "layers": self.text_prefix + text.layers})


@lru_cache(maxsize=64)
def layer_pattern(template: str) -> re.Pattern[str]:
    """Matches the beginning of the names of tensors in layers, by an architecture's `layers`; group 1 is the number."""
    return re.compile(re.escape(template).replace(r"\{layer\}", r"(\d+)") + r"\.")
