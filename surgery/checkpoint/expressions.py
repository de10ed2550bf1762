"""Tensor expressions: what each output tensor is made of, as values that cost nothing until evaluated.

A tensor is `Stored` (bytes of the base, kept as they are), `Rows` of such a tensor, or `Computed` (one output of a
`Rewrite`, a function from a few named tensors to a few named tensors). Rewrites nest, so that several operations fold
into one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from surgery.checkpoint.dtypes import byte_count
from surgery.checkpoint.header import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

Tensors: TypeAlias = "Mapping[str, Tensor]"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Element type (safetensors name) and shape of a tensor that is to be written."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return byte_count(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the input checkpoint, unchanged."""

    info: TensorInfo

    @property
    def spec(self) -> TensorSpec:
        """Type and shape."""
        return TensorSpec(self.info.dtype, self.info.shape)


@dataclass(frozen=True, slots=True)
class Rows:
    """Slices of a stored tensor along its first axis, each byte as it is: of any type, without computing.

    `why` is a line for the ledger.
    """

    info: TensorInfo
    rows: tuple[int, ...]
    why: str

    @property
    def spec(self) -> TensorSpec:
        """Type and shape."""
        return TensorSpec(self.info.dtype, (len(self.rows), *self.info.shape[1:]))

    def runs(self) -> Iterator[tuple[int, int]]:
        """Byte ranges of the file, (start, length), in order; neighbouring rows are one range."""
        width = self.info.nbytes // self.info.shape[0]
        start = length = 0
        for row in self.rows:
            at = self.info.offset + row * width
            if at != start + length:
                if length:
                    yield start, length
                start, length = at, 0
            length += width
        if length:
            yield start, length


@dataclass(frozen=True, eq=False)
class Rewrite:
    """A function from named tensors to named tensors.

    `function` gets the inputs under their names and returns every name of `outputs` with exactly that type and shape.
    `work_bytes` bounds what it allocates beside inputs and outputs. `why` is a line for the ledger.
    """

    inputs: Mapping[str, Value]
    outputs: Mapping[str, TensorSpec]
    function: Callable[[Tensors], Tensors]
    why: str
    work_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """Bound of the memory that evaluating takes."""
        held = sum(value.spec.nbytes for value in self.inputs.values())
        nested = max((v.rewrite.peak_bytes for v in self.inputs.values() if isinstance(v, Computed)), default=0)
        return nested + held + sum(spec.nbytes for spec in self.outputs.values()) + self.work_bytes


@dataclass(frozen=True, slots=True)
class Computed:
    """The output `key` of a rewrite."""

    rewrite: Rewrite
    key: str

    @property
    def spec(self) -> TensorSpec:
        """Type and shape."""
        return self.rewrite.outputs[self.key]


Value: TypeAlias = Stored | Rows | Computed


def sources(value: Value) -> Iterator[TensorInfo]:
    """The stored tensors that a value depends on, in order, each as often as it is used."""
    if isinstance(value, Stored | Rows):
        yield value.info
    else:
        for inner in value.rewrite.inputs.values():
            yield from sources(inner)
