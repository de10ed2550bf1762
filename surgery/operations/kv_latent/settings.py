"""The settings of `kv_latent`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from surgery.operations.base import Settings

Width = Annotated[int, Field(gt=0)]


_NO_DATA = {"qk_select": "stride", "vo_basis": "stride", "logit_gain": False, "refit_q": False, "refit_o": False}
_PRESETS: dict[str, dict[str, Any]] = {"stride": _NO_DATA, "paper": {**_NO_DATA, "rope": "paper"}}


class KVLatentSettings(Settings):
    """How wide the latent heads are, and how their content is chosen."""

    kv_ratio: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="share of the base's cache bytes to keep; widths per layer are chosen by measured error "
        "(default 0.75 where neither this nor a width is given)",
    )
    qk_dim: Width | list[Width] | None = Field(
        default=None, description="channels per key head, for all layers or one per layer (paper: d_qk)"
    )
    vo_dim: Width | list[Width] | None = Field(
        default=None, description="channels per value head, for all layers or one per layer (paper: d_vo)"
    )
    method: Literal["calibrated", "stride", "paper"] = Field(
        default="calibrated",
        description="sets what is not said below: `calibrated` everything measured; `stride` every s-th channel, no "
        "data; `paper` the stride with the paper's spectrum and its 1/sqrt(d_qk), no data",
    )
    qk_select: Literal["energy", "stride", "matched"] = Field(
        default="energy",
        description="which rotary pairs stay: measured share of the logits, every s-th, or the paper's spectrum on the "
        "channels that already rotate so",
    )
    rope: Literal["keep", "paper"] = Field(
        default="keep", description="frequencies of the kept pairs: their own, or the paper's on other channels"
    )
    vo_basis: Literal["svd", "stride"] = Field(
        default="svd", description="values: the calibrated closed form, or every s-th channel"
    )
    logit_gain: bool = Field(
        default=True, description="scale each query head by least squares so that logits keep their size"
    )
    refit_q: bool = Field(
        default=False,
        description="fit queries and keys to the original logits, weighted by attention; better on text like the "
        "calibration's, and it can be far worse on other text",
    )
    allocation: Literal["measured", "uniform"] = Field(
        default="measured",
        description="how kv_ratio is spread over layers, keys and values: by measured error, or evenly",
    )
    refit_o: bool = Field(default=True, description="fit the output projection layer after layer by ridge regression")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {**_PRESETS.get(str(data.get("method")), {}), **data}

    @model_validator(mode="after")
    def _widths(self) -> Self:
        if self.kv_ratio is not None and (self.qk_dim is not None or self.vo_dim is not None):
            raise ValueError("give either kv_ratio or widths (qk_dim, vo_dim), not both")
        return self

    @property
    def calibrated(self) -> bool:
        """Whether anything here needs activations."""
        fitted = self.logit_gain or self.refit_q or self.refit_o
        return fitted or self.qk_select == "energy" or self.vo_basis == "svd"

    @property
    def budgeted(self) -> bool:
        """Whether the widths of each layer are chosen by measured cost."""
        free = self.qk_select == "energy" and self.vo_basis == "svd" and self.allocation == "measured"
        return self.qk_dim is None and self.vo_dim is None and free
