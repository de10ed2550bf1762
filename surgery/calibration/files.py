"""Large arrays on disk, mapped into memory."""

from __future__ import annotations

import os
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from surgery.checkpoint.writer import environment_errors


def mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor whose pages are those of a file, made if it is missing. Raises DiskFull before the first byte.

    Space is reserved at once: a full disk found later, at the touch of a page, would end the process by a signal.
    """
    size = prod(shape)
    with environment_errors(path), path.open("ab") as file:
        if os.fstat(file.fileno()).st_size < size * dtype.itemsize:
            os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)
