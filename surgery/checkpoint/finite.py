"""Finding NaN and infinity in raw bytes, without torch: all exponent bits set, in every IEEE-like format."""

from __future__ import annotations

import numpy as np

# Per dtype: the integer type of one element, and the mask of its exponent bits.
_EXPONENTS: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF0000000000000),
}
# Small enough to stay in a core's cache, so that the look costs little beside the copy.
_WINDOW = 1 << 17


class FiniteCheck:
    """Looks through consecutive blocks of one dtype. Keeps one small buffer; one per thread."""

    def __init__(self) -> None:
        self._buffer = np.empty(_WINDOW, dtype=np.uint8)

    def all_finite(self, dtype: str, block: memoryview) -> bool:
        """Whether `block`, a whole number of elements of `dtype`, holds no NaN and no infinity."""
        if dtype not in _EXPONENTS:
            return True
        kind, exponent = _EXPONENTS[dtype]
        mask = kind(exponent)
        values = np.frombuffer(block, dtype=kind)
        scratch = self._buffer.view(kind)
        for start in range(0, len(values), len(scratch)):
            part = values[start : start + len(scratch)]
            if np.bitwise_and(part, mask, out=scratch[: len(part)]).max(initial=0) == mask:
                return False
        return True
