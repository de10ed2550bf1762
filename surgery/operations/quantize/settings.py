"""The settings of `quantize`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from surgery.operations.base import Settings

Choice = Literal["none", "mse", "activation", "judged"]


def _group(value: Any) -> Any:
    return "channel" if value == -1 else value  # as GPTQ's own tools spell it


GroupSize = Annotated[Literal["channel"] | Annotated[int, Field(ge=8, le=65_536)], BeforeValidator(_group)]


class QuantizeSettings(Settings):
    """How weights are rounded, and the format that holds them."""

    method: Literal["rtn", "gptq"] = Field(
        default="rtn",
        description="`rtn` rounds to the nearest and needs no data; `gptq` lets later columns mend each rounding, for "
        "the inputs that calibration sees",
    )
    bits: Literal[4, 8] = Field(default=4, description="bits of a weight")
    group_size: GroupSize | None = Field(
        default=None,
        description="inputs that share a scale, or `channel`: all of a row (default: 128; channel for 8 bits in "
        "compressed-tensors). Matrices that it does not divide get a scale for each row; experts all or none",
    )
    format: Literal["compressed-tensors", "gptq"] = Field(
        default="compressed-tensors",
        description="the file format; `gptq` is version 1 of GPTQ's own, for models without experts",
    )
    type: Literal["int", "float"] = Field(default="int", description="`float` is FP8 (E4M3), with bits: 8")
    activations: Literal["none", "dynamic"] = Field(
        default="none",
        description="`dynamic`: inputs are rounded to 8 bits when the model runs, with a scale for each token (W8A8)",
    )
    bytes_per_weight: float | None = Field(
        default=None,
        gt=0.5,
        lt=2,
        description="a budget for codes and scales, in place of bits: each part of a layer gets 4, 8 or 16 bits by how "
        "much the model's output suffers",
    )
    scales: Choice = Field(
        default="mse",
        description="how far scales of 4 bits shrink below what the largest weight needs: `none`; `mse` by the error "
        "of weights; `activation` by the error weighted with the squares of inputs; `judged` by held-out divergence",
    )
    bias_correction: Literal["none", "judged"] = Field(
        default="none",
        description="`judged`: existing biases take up the mean error of outputs, where held-out divergence falls",
    )
    act_order: bool = Field(default=True, description="gptq: round the columns with the largest inputs first")
    damping: float = Field(
        default=0.01, gt=0, le=1, description="gptq: share of the mean squared input added to each (paper: 0.01)"
    )
    engine: Literal["surgery", "gptqmodel"] = Field(
        default="surgery", description="what computes `gptq`; gptqmodel is run through optimum, for format: gptq"
    )
    raise_above: float = Field(
        default=0.25,
        gt=0,
        description="parts whose output is off by more than this share get 8 bits (calibrated ways only)",
    )
    ignore: list[str] = Field(
        default=[], description="regular expressions of modules that stay as they are, beside heads, norms and routers"
    )

    @field_validator("ignore")
    @classmethod
    def _expressions(cls, value: list[str]) -> list[str]:
        for text in value:
            try:
                re.compile(text)
            except re.error as error:
                raise ValueError(f"has {text!r}, which is no regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def _possible(self) -> QuantizeSettings:
        for wrong, message in self._contradictions():
            if wrong:
                raise ValueError(message)
        return self

    def _contradictions(self) -> list[tuple[bool, str]]:
        own, eight = self.format == "gptq", self.bits == 8 and self.bytes_per_weight is None
        plain = self.bytes_per_weight is None and self.activations == "none" and self.type == "int"
        channel = self.group_size in (None, "channel")
        return [
            (self.bytes_per_weight is not None and (self.type == "float" or self.activations == "dynamic"),
             "can have bytes_per_weight only with type: int and without activations"),
            (self.type == "float" and not eight, "can have type: float only with bits: 8"),
            (self.type == "float" and self.method == "gptq", "can have type: float only with method: rtn"),
            (self.type == "float" and not channel, "can have type: float only with group_size: channel"),
            (self.activations == "dynamic" and not eight, "can have activations: dynamic only with bits: 8"),
            (self.activations == "dynamic" and not channel,
             "can have activations: dynamic only with group_size: channel"),
            (own and not plain, "can have format: gptq only with type: int, no activations and no bytes_per_weight"),
            (own and self.group_size not in (None, 32, 64, 128),
             "can have format: gptq only with group_size: 32, 64 or 128"),
            (own and self.bias_correction != "none", "can have format: gptq only without bias_correction"),
            (self.engine == "gptqmodel" and not (own and self.method == "gptq"),
             "can have engine: gptqmodel only with method: gptq and format: gptq"),
            (self.engine == "gptqmodel" and self.scales not in {"none", "mse"},
             "can have engine: gptqmodel only without scales, which it chooses itself"),
            (self.bytes_per_weight is not None and not channel,
             "can have bytes_per_weight only without group_size: groups of 32 and 128 are what it chooses among"),
        ]  # fmt: skip

    @property
    def calibrates(self) -> bool:
        """Whether data is needed."""
        judged = self.scales in {"activation", "judged"} or self.bias_correction == "judged"
        return self.method == "gptq" or self.bytes_per_weight is not None or judged
