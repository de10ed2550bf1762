"""Sizes of files and memory as people write and read them."""

from __future__ import annotations

import re
from fractions import Fraction

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_FORM = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(KB|MB|GB|KiB|MiB|GiB)")


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB` or `1.5GiB`. Raises ValueError with a sentence that says what is accepted."""
    match = _FORM.fullmatch(text)
    size = int(Fraction(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise ValueError(f"must be a number with one of the units {', '.join(_UNITS)}, such as 5GB")
    return size


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
