"""The element types of safetensors, as numbers of bits, with their torch names."""

from __future__ import annotations

import math

BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

TORCH_NAMES: dict[str, str] = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
}  # fmt: skip

SAFETENSORS_NAMES: dict[str, str] = {name: code for code, name in TORCH_NAMES.items()}

FLOATING = frozenset({"F16", "BF16", "F32", "F64"})


def element_count(shape: tuple[int, ...]) -> int:
    """Elements of a tensor of `shape`."""
    return math.prod(shape)


def byte_count(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor of `dtype` and `shape` takes; raises ValueError where it is no whole number."""
    elements = element_count(shape)
    count, rest = divmod(elements * BITS[dtype], 8)
    if rest:
        raise ValueError(f"{elements} elements of {dtype} do not fill whole bytes")
    return count
