"""Evaluating tensor expressions with torch, one group of tensors at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from surgery.checkpoint.dtypes import SAFETENSORS_NAMES, TORCH_NAMES
from surgery.checkpoint.expressions import Rewrite, Rows, Stored
from surgery.checkpoint.header import TensorInfo
from surgery.checkpoint.reader import Checkpoint, read_into, reading_errors
from surgery.errors import CorruptCheckpoint, InternalError, UnsupportedModel

# Numbers that are summed at once.
SUMMED = 1 << 22


def load(checkpoint: Checkpoint, info: TensorInfo) -> Tensor:
    """Read one stored tensor into private memory. Raises UnsupportedModel for types that torch cannot compute with."""
    dtype = _torch_type(info)
    if info.nbytes == 0:
        return torch.empty(info.shape, dtype=dtype)
    return _read(checkpoint, info, [(info.offset, info.nbytes)]).view(dtype).view(info.shape)


def load_rows(checkpoint: Checkpoint, value: Rows) -> Tensor:
    """Read slices of a stored tensor. Raises as `load` does."""
    return _read(checkpoint, value.info, list(value.runs())).view(_torch_type(value.info)).view(value.spec.shape)


def _read(checkpoint: Checkpoint, info: TensorInfo, runs: list[tuple[int, int]]) -> Tensor:
    """The bytes of some ranges of a tensor's file, one after the other."""
    buffer = memoryview(bytearray(sum(length for _, length in runs)))
    path = checkpoint.path(info.shard)
    position = 0
    with reading_errors(path), path.open("rb", buffering=0) as file:
        for start, length in runs:
            read_into(file.fileno(), buffer[position : position + length], start, info.shard)
            position += length
    return torch.frombuffer(buffer, dtype=torch.uint8)


def _torch_type(info: TensorInfo) -> torch.dtype:
    if info.dtype not in TORCH_NAMES:
        raise UnsupportedModel(
            f"tensor {info.name!r} has dtype {info.dtype}", cause="an operation wants to compute with it, torch cannot",
            remedy="start from an unquantized base",
        )  # fmt: skip
    found: torch.dtype = getattr(torch, TORCH_NAMES[info.dtype])
    return found


def evaluate(checkpoint: Checkpoint, rewrite: Rewrite) -> Mapping[str, Tensor]:
    """Evaluate a rewrite: all its outputs, checked against what was planned and for NaN and infinity."""
    with torch.no_grad():
        outputs = rewrite.function(_inputs(checkpoint, rewrite))
    for name, spec in rewrite.outputs.items():
        found = outputs.get(name)
        if found is None or tuple(found.shape) != spec.shape or _dtype(found) != spec.dtype:
            got = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise InternalError(
                f"the rewrite of {name!r} gave {got}", cause=f"the plan promised {spec.dtype} {list(spec.shape)}",
                remedy="report this as a defect, with the manifest",
            )  # fmt: skip
        _check_finite(name, found)
    return {name: outputs[name] for name in rewrite.outputs}


def _inputs(checkpoint: Checkpoint, rewrite: Rewrite) -> dict[str, Tensor]:
    inputs: dict[str, Tensor] = {}
    nested: dict[int, Mapping[str, Tensor]] = {}
    for name, value in rewrite.inputs.items():
        if isinstance(value, Stored | Rows):
            inputs[name] = load_rows(checkpoint, value) if isinstance(value, Rows) else load(checkpoint, value.info)
            _check_finite(name, inputs[name])
        else:
            if id(value.rewrite) not in nested:
                nested[id(value.rewrite)] = evaluate(checkpoint, value.rewrite)
            inputs[name] = nested[id(value.rewrite)][value.key]
    return inputs


def _dtype(tensor: Tensor) -> str | None:
    return SAFETENSORS_NAMES.get(str(tensor.dtype).removeprefix("torch."))


def is_rounding(before: Checkpoint, after: Checkpoint, name: str, old: str) -> bool:
    """Whether tensor `name` of `after` is what `old` is in `before`, rounded to the type that it has there."""
    wide, found = load(before, before.tensors[old]), load(after, after.tensors[name])
    return bool(torch.equal(wide.to(found.dtype), found))


def to_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _check_finite(name: str, tensor: Tensor) -> None:
    # A sum is finite unless an element is not, or it overflows: only then look at every element. In pieces, as summing
    # in float32 makes a copy.
    if tensor.is_floating_point() and tensor.itemsize > 1:
        pieces = tensor.reshape(-1).split(SUMMED)
        suspect = (piece for piece in pieces if not torch.isfinite(piece.sum(dtype=torch.float32)))
        bad = sum(int((~torch.isfinite(piece)).sum()) for piece in suspect)
        if bad:
            raise CorruptCheckpoint(
                f"tensor {name!r} holds {bad} values that are NaN or infinite", cause="no operation can repair that",
                remedy="download the checkpoint again, or take another base",
            )  # fmt: skip
