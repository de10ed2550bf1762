"""What a format is: how the rounded matrices of a model are named, packed and described in config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.checkpoint.expressions import Tensors, TensorSpec
from surgery.quantization.schemes import Grid

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.quantization.grid import Rounded


@dataclass(frozen=True)
class Layout:
    """Which linear modules are rounded, by name, and which stay as they are; `activations` are rounded as well."""

    grids: Mapping[str, Grid]
    dense: Sequence[str]
    activations: bool = False


@dataclass(frozen=True)
class Format:
    """A file format.

    name         as manifests spell it
    scale_dtype  safetensors name of the type of scales, for a weight of a type
    specs        the tensors that stand for the weight of a module, by their full names
    pack         the same tensors for some rows, by the ending of their names
    join         puts parts of the rows together
    config       `quantization_config`
    packages     what loading needs beside transformers
    """

    name: str
    scale_dtype: Callable[[str], str]
    specs: Callable[[str, TensorSpec, Grid, bool], dict[str, TensorSpec]]
    pack: Callable[[Rounded, Grid, bool], dict[str, Tensor]]
    join: Callable[[Sequence[Tensors]], dict[str, Tensor]]
    config: Callable[[Layout, Mapping[str, Any]], dict[str, Any]]
    packages: Mapping[str, str]
