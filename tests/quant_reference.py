"""What a quantized checkpoint means: its weights as dense float32, decoded here with numpy alone.

Knows compressed-tensors' pack-quantized, int-quantized and float-quantized, all symmetric and without g_idx, and both
versions of GPTQ's files. Neither library is asked, so that a mistake shared with one of them cannot hide.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Array = NDArray[Any]
Float = NDArray[np.float32]

PACKED = ("weight_packed", "weight_scale", "weight_shape")
GPTQ = ("qweight", "qzeros", "scales", "g_idx")


def decode_packed(packed: Array, scale: Array, shape: Array, bits: int) -> Float:
    """The weight [out, in] of words [out, in * bits / 32]: lowest bits first along the inputs, each value + 2^(bits-1).

    Columns beyond `shape` fill the last word and count for nothing.
    """
    rows, columns = (int(size) for size in shape)
    values = _unpack(packed, bits)[:, :columns] - 2 ** (bits - 1)
    assert values.shape == (rows, columns)
    return _scaled(values, scale)


def decode_int8(weight: Array, scale: Array) -> Float:
    """The weight [out, in] of whole bytes, one scale per output [out, 1] or per group of inputs [out, groups]."""
    assert weight.dtype == np.int8
    return _scaled(weight, scale)


def decode_float8(weight: Tensor, scale: Array) -> Float:
    """The weight [out, in] of float8_e4m3fn: one bit of sign, four of exponent (bias 7), three of mantissa."""
    assert weight.dtype == torch.float8_e4m3fn
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    magnitudes = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    magnitudes[(codes & 127) == 127] = np.nan
    table = np.where(codes < 128, magnitudes, -magnitudes)
    return _scaled(table[weight.view(torch.uint8).numpy()], scale)


def decode_gptq(
    qweight: Array, qzeros: Array, scales: Array, g_idx: Array, bits: int, checkpoint_format: str = "gptq"
) -> Float:
    """The weight [out, in] of words [in * bits / 32, out], lowest bits first along the inputs.

    Scales are [groups, out], zeros [groups, out * bits / 32] in words along the outputs, and g_idx [in] has the group
    of every input. `gptq` stores zeros less one, `gptq_v2` as they are.
    """
    zeros = _unpack(qzeros, bits) + {"gptq": 1, "gptq_v2": 0}[checkpoint_format]
    values = _unpack(qweight.T, bits).T
    assert values.shape[0] == len(g_idx)
    assert zeros.shape == scales.shape
    return ((values - zeros[g_idx]).astype(np.float32) * scales[g_idx].astype(np.float32)).T


def decoded(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a quantized checkpoint: weights in dense float32 as X.weight, the rest as the files have it."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    stored = _read(folder)
    dense = {}
    for name in list(stored):
        module, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            packed, scale, shape = (stored.pop(f"{module}.{part}") for part in PACKED)
            bits = 4 if packed.shape[1] == -(-int(shape[1]) // 8) else 8
            weight = decode_packed(packed.numpy(), _floats(scale), shape.numpy(), bits)
        elif kind == "weight" and f"{module}.weight_scale" in stored:
            values, scales = stored.pop(name), _floats(stored.pop(f"{module}.weight_scale"))
            whole = values.dtype == torch.int8
            weight = decode_int8(values.numpy(), scales) if whole else decode_float8(values, scales)
        elif kind == "qweight":
            words, zeros, scale, groups = (stored.pop(f"{module}.{part}") for part in GPTQ)
            form = settings["bits"], settings.get("checkpoint_format", "gptq")
            weight = decode_gptq(words.numpy(), zeros.numpy(), _floats(scale), groups.numpy(), *form)
        else:
            continue
        assert f"{module}.weight" not in stored
        dense[f"{module}.weight"] = torch.from_numpy(np.ascontiguousarray(weight))
    return stored | dense


def write_dense(folder: Path, out: Path) -> Path:
    """The same model as a plain checkpoint in float32: no quantization_config, the Python files as they are.

    Buffers of whole numbers stay whole. Returns `out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    config |= {key: "float32" for key in ("dtype", "torch_dtype") if key in config}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in folder.glob("*.py"):
        shutil.copyfile(file, out / file.name)
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in decoded(folder).items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def _read(folder: Path) -> dict[str, Tensor]:
    """Every tensor, of the files that the index names or of the only one."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(folder / file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def _unpack(words: Array, bits: int) -> Array:
    """[rows, words] to [rows, words * 32 / bits], unsigned values, lowest bits first."""
    assert words.dtype == np.int32
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    values = np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts & np.uint32(2**bits - 1)
    return values.reshape(len(words), -1).astype(np.int64)


def _scaled(values: Array, scale: Array) -> Float:
    """Values [out, in] times scales [out, groups], one product of float32 each."""
    assert values.shape[1] % scale.shape[1] == 0
    per_column = np.repeat(scale.astype(np.float32), values.shape[1] // scale.shape[1], axis=1)
    return values.astype(np.float32) * per_column


def _floats(scale: Tensor) -> Float:
    """Numpy has no bfloat16; float32 holds each of its values."""
    return scale.float().numpy()
