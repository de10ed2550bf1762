"""Two operations that tests of variants use: one that measures weights and counts how often, one that packs."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from surgery.checkpoint.expressions import TensorSpec
from surgery.operations.base import Operation, Settings, Statistics


class ScaleSettings(Settings):
    by: float = Field(default=2.0, description="factor")


class PackSettings(Settings):
    calibrated: bool = Field(default=False, description="whether the scales come from measuring")
    package: str = Field(default="", description="what loading needs")


MEASURED: list[str] = []


def matrices(names: Any) -> list[str]:
    return [name for name in names if name.endswith(("q_proj.weight", "o_proj.weight"))]


def _largest(measuring: Any, settings: Any) -> Statistics:
    """The largest number of every matrix, as what runs finds it."""
    measuring.progress(0, 1)
    MEASURED.append(type(settings).__name__)
    found = {name: measuring.tensor(name).float().abs().amax()[None] for name in matrices(measuring.model.shapes)}
    return Statistics(found, {})


def _scale(draft: Any, settings: ScaleSettings, statistics: Statistics | None) -> None:
    """Two tensors in one rewrite, so that the order of files is not the order of names."""
    names = matrices(draft.tensors)
    for query, output in zip(names[::2], names[1::2], strict=True):

        def function(tensors: Any, query: str = query, output: str = output) -> Any:
            largest = statistics.tensors[query].to(tensors[query].dtype)
            return {output: tensors[output] * settings.by, query: tensors[query] / largest}

        draft.rewrite([query, output], {n: draft.spec(n) for n in (output, query)}, function, why="scaled")


def _pack(draft: Any, settings: PackSettings, statistics: Statistics | None) -> None:
    for name in matrices(draft.tensors):
        spec, scale = draft.spec(name), f"{name}_scale"

        def function(tensors: Any, name: str = name, scale: str = scale) -> Any:
            weight = tensors[name].float()
            largest = weight.abs().amax()[None] if statistics is None else statistics.tensors[name]
            # A scale in full precision: casting it afterwards would be seen.
            return {name: (weight / largest * 127).round().to(torch.int8), scale: largest / 127}

        outputs = {name: TensorSpec("I8", spec.shape), scale: TensorSpec("F32", (1,))}
        draft.rewrite([name], outputs, function, why="packed")
    draft.notes.append(f"packed from {spec.dtype}")


SCALE: Operation[Any] = Operation(
    "scale", "Scaled", "us", ScaleSettings, lambda *_: None, _scale, measures=lambda _: True, measure=_largest,
    weights_only=lambda _: True,
)  # fmt: skip
PACK: Operation[Any] = Operation(
    "pack", "Packed", "us", PackSettings, lambda *_: None, _pack, measures=lambda settings: settings.calibrated,
    measure=_largest, weights_only=lambda _: True, quantizes=True,
    packages=lambda settings: {settings.package: f"{settings.package}>=1"} if settings.package else {},
)  # fmt: skip
