"""Which channels `smooth` may scale: what makes each of them, and what reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from surgery.architectures import Model
from surgery.architectures.residual import feed_forwards, residual_stream, value_heads
from surgery.errors import UnsupportedModel
from surgery.operations.base import Settings


class SmoothSettings(Settings):
    """How much of the activations' size goes to the weights, and where."""

    alpha: float = Field(
        default=0.5, ge=0, le=1,
        description="share (paper: alpha) in s = max|X|^alpha / max|W|^(1 - alpha); 0.8 where outliers are large",
    )  # fmt: skip
    folds: Annotated[list[Literal["norms", "values", "up"]], Field(min_length=1)] = Field(
        default=["norms"],
        description="what carries the division: `norms`, for what reads the residual stream; `values`, for outputs of "
        "attention; `up`, for the last matrix of dense feed-forwards and shared experts",
    )
    powers_of_two: bool = Field(
        default=False,
        description="round s to powers of two, so that no weight is rounded and not a bit of a logit moves",
    )


@dataclass(frozen=True)
class Fold:
    """One vector of scales. The activations that count are the outputs of `module`, or its `inputs`.

    divided   tensors whose elements from `start` on, along the first axis, make the channels: name -> start
    read      matrices with the channels on an axis: name -> axis
    repeats   each run of `width` channels is read so many times side by side (query heads of one cached head)
    """

    module: str
    divided: dict[str, int]
    read: dict[str, int]
    inputs: bool = False
    repeats: int = 1
    width: int = 1


def find_folds(model: Model, settings: SmoothSettings) -> tuple[Fold, ...] | str:
    """Every vector of scales that these settings ask for, or why one of them cannot be."""
    stream = residual_stream(model)
    if isinstance(stream, str):
        return stream
    found: list[Fold] = []
    if "norms" in settings.folds:  # but not the last: a head is hardly ever rounded
        for norm in stream.norms[:-1]:
            read = {use.name: use.axis for use in stream.readers(norm)}
            found.append(Fold(norm.removesuffix(".weight"), {norm: 0}, read))
    for layer in range(model.num_hidden_layers):
        if "values" in settings.folds:
            at = value_heads(model, layer)
            if isinstance(at, str):
                return at
            made, read = _with_bias(model, at.value, at.start), {f"{at.output}.weight": 1}
            found.append(Fold(at.output, made, read, inputs=True, repeats=at.repeats, width=at.width))
        if "up" in settings.folds:
            for each in feed_forwards(model, layer):
                read = {f"{each.down}.weight": 1}
                found.append(Fold(each.down, _with_bias(model, each.up, each.start), read, inputs=True))
    if "up" in settings.folds and not any(name.endswith("up_proj.weight") for fold in found for name in fold.divided):
        return "up is for dense feed-forwards and shared experts, and it has neither"
    return tuple(found)


def _with_bias(model: Model, name: str, start: int) -> dict[str, int]:
    return {full: start for full in (f"{name}.weight", f"{name}.bias") if model.has(full)}


def folds(model: Model, settings: SmoothSettings) -> tuple[Fold, ...]:
    """As `find_folds`. Raises UnsupportedModel where there is a reason."""
    found = find_folds(model, settings)
    if isinstance(found, str):
        raise unfit(found)
    return found


def unfit(reason: str) -> UnsupportedModel:
    """The refusal for a reason."""
    return UnsupportedModel("smooth does not fit this model", cause=reason, remedy="see: surgery operations smooth")
