"""What a family's data file may say."""

from __future__ import annotations

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


class Architecture(_Data):
    """One family. Tensor names are those of the Hub's files, config keys those of config.json."""

    model_type: str
    title: str
    since: str = Field(description="first transformers version, from our floor on, that has the family")
    classes: Classes
    text_config: str | None = Field(default=None, description="config key of the nested language model's config")
    layers: str = Field(description="tensor-name template of a decoder layer, with {layer}")
    attention: Attention
