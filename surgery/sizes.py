"""Sizes and counts as people write and read them."""

from __future__ import annotations

import re
from fractions import Fraction

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_FORM = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(KB|MB|GB|KiB|MiB|GiB)")
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_COUNT_FORM = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([KMBT]?)")


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB` or `1.5GiB`. Raises ValueError with a sentence that says what is accepted."""
    match = _FORM.fullmatch(text)
    size = int(Fraction(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise ValueError(f"must be a number with one of the units {', '.join(_UNITS)}, such as 5GB")
    return size


def parse_count(text: str) -> int:
    """Things counted, such as `250M`, `1.5B` or `4096`. Raises ValueError, saying what is accepted."""
    match = _COUNT_FORM.fullmatch(text)
    count = Fraction(match[1]) * _COUNTS[match[2]] if match else Fraction(0)
    if count < 1 or count.denominator != 1:
        raise ValueError("must be a whole number of at least 1, or one with K, M, B or T, such as 250M")
    return int(count)


def human_size(count: float) -> str:
    """`count` bytes in decimal units with three digits: `512 B`, `1.23 GB`."""
    size = float(count)
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"


def human_count(count: int) -> str:
    """`count` things with three digits: `512`, `1.24 B` for billions."""
    number = float(count)
    for unit in ("", " K", " M", " B", " T"):
        if number < 999.5 or unit == " T":
            break
        number /= 1000
    return f"{number:.0f}" if not unit else f"{number:.3g}{unit}"
