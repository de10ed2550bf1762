"""Evaluating tensor expressions with torch, one group of tensors at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from surgery.checkpoint.dtypes import SAFETENSORS_NAMES, TORCH_NAMES
from surgery.checkpoint.expressions import Rewrite, Stored, Value
from surgery.checkpoint.header import TensorInfo
from surgery.checkpoint.reader import Checkpoint
from surgery.errors import CorruptCheckpoint, InternalError, UnsupportedModel


def load(checkpoint: Checkpoint, info: TensorInfo) -> Tensor:
    """Read one stored tensor into private memory. Raises UnsupportedModel for types that torch cannot compute with."""
    if info.dtype not in TORCH_NAMES:
        raise UnsupportedModel(
            f"tensor {info.name!r} has dtype {info.dtype}", cause="an operation wants to compute with it, torch cannot",
            remedy="start from an unquantized base",
        )  # fmt: skip
    dtype = getattr(torch, TORCH_NAMES[info.dtype])
    if info.nbytes == 0:
        return torch.empty(info.shape, dtype=dtype)
    buffer = bytearray(info.nbytes)
    with checkpoint.path(info.shard).open("rb", buffering=0) as file:
        view, position = memoryview(buffer), 0
        while position < info.nbytes:
            count = os.preadv(file.fileno(), [view[position:]], info.offset + position)
            if count == 0:
                raise CorruptCheckpoint(
                    f"{info.shard} became shorter while it was read", cause=f"tensor {info.name!r} ends after the file",
                    remedy="do not change the base during a conversion; start again",
                )  # fmt: skip
            position += count
    return torch.frombuffer(buffer, dtype=dtype).view(info.shape)


def value_of(checkpoint: Checkpoint, value: Value) -> Tensor:
    """Evaluate a single value."""
    if isinstance(value, Stored):
        return load(checkpoint, value.info)
    return evaluate(checkpoint, value.rewrite)[value.key]


def evaluate(checkpoint: Checkpoint, rewrite: Rewrite) -> Mapping[str, Tensor]:
    """Evaluate a rewrite: all its outputs, checked against what was planned and for NaN and infinity."""
    inputs: dict[str, Tensor] = {}
    nested: dict[int, Mapping[str, Tensor]] = {}
    for name, value in rewrite.inputs.items():
        if isinstance(value, Stored):
            inputs[name] = load(checkpoint, value.info)
            _check_finite(name, inputs[name])
        else:
            known = nested.setdefault(id(value.rewrite), {}) or evaluate(checkpoint, value.rewrite)
            nested[id(value.rewrite)] = known
            inputs[name] = known[value.key]
    with torch.no_grad():
        outputs = rewrite.function(inputs)
    for name, spec in rewrite.outputs.items():
        found = outputs.get(name)
        if found is None or tuple(found.shape) != spec.shape or SAFETENSORS_NAMES[str(found.dtype)[6:]] != spec.dtype:
            got = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise InternalError(
                f"the rewrite of {name!r} gave {got}", cause=f"the plan promised {spec.dtype} {list(spec.shape)}",
                remedy="report this as a defect, with the manifest",
            )  # fmt: skip
        _check_finite(name, found)
    return outputs


def to_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _check_finite(name: str, tensor: Tensor) -> None:
    # A sum is finite unless an element is not, or it overflows: only then look at every element.
    if tensor.is_floating_point() and tensor.itemsize > 1 and not torch.isfinite(tensor.sum(dtype=torch.float32)):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise CorruptCheckpoint(
                f"tensor {name!r} holds {bad} values that are NaN or infinite", cause="no operation can repair that",
                remedy="download the checkpoint again, or take another base",
            )  # fmt: skip
