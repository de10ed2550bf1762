"""The values that a weight may take after rounding, as plain facts that need no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FLOAT8_MAX = 448.0


@dataclass(frozen=True)
class Grid:
    """Codes of `bits` bits, with a scale for every `group_size` inputs of a row (None: one for the whole row).

    Integers lie in [-2^(bits-1), 2^(bits-1) - 1]; `kind` float is E4M3 of 8 bits.
    """

    bits: int
    group_size: int | None
    kind: Literal["int", "float"] = "int"

    def groups(self, inputs: int) -> int:
        """How many scales a row of `inputs` numbers has."""
        return 1 if self.group_size is None else inputs // self.group_size

    def nbytes(self, outputs: int, inputs: int, width: int) -> int:
        """Bytes of the codes and scales of a matrix; `width` is those of one scale."""
        return outputs * inputs * self.bits // 8 + outputs * self.groups(inputs) * width

    @property
    def reach(self) -> float:
        """The code to which the largest magnitude of a group is mapped."""
        return FLOAT8_MAX if self.kind == "float" else (2**self.bits - 1) / 2
