"""Does a quantized model compute what the numbers in its files say.

The codes are decoded here, by hand, into a plain checkpoint of the same architecture; both must give the same logits.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .loading import forward
from .outcome import Outcome, bounded, failed, skipped
from .packed import packed_modules, tensor_files
from .subject import Subject, load_model, relative, report_problems

LEAST = 1e-8


def dequantized_logits(subject: Subject) -> Outcome:
    """The quantized model gives the logits of the same architecture with decoded weights."""
    settings = subject.config.get("quantization_config")
    if not settings:
        return skipped("the weights are not quantized")
    subject.release()
    with tempfile.TemporaryDirectory() as place, subject.noise.muted():
        folder = Path(place) / "decoded_checkpoint"
        apart = {name for name, _ in subject.model.named_modules()}
        dtypes = {name: subject.model.dtype for name in packed_modules(subject.folder) if name in apart}
        write_decoded(subject.folder, folder, settings, dtypes)
        plain, report = load_model(folder, subject.job)
        problems = report_problems(report)
        if problems:
            return failed(f"the decoded checkpoint does not load: {problems[0]}")
        with _rounded_inputs(plain, settings, set(packed_modules(subject.folder))):
            reference = forward(plain, subject.prompts[0])
    difference = forward(subject.model, subject.prompts[0]) - reference
    return bounded(relative(difference, reference), subject.precision, "logits of packed and of decoded weights")


def write_decoded(folder: Path, out: Path, settings: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]) -> None:
    """Write a checkpoint without its quantization: decoded weights, everything else as it is (see `decoded`)."""
    out.mkdir()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in folder.glob("*.py"):
        shutil.copy(file, out)
    save_file(dict(decoded(folder, settings, dtypes)), out / "model.safetensors", {"format": "pt"})


def decoded(
    folder: Path, settings: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a model without quantization has, by its name.

    Weights are decoded in the type that `dtypes` gives for their module, or else in that of their scales.
    """
    files = tensor_files(folder)

    def read(name: str) -> Tensor:
        with safe_open(files[name], "pt") as file:
            found: Tensor = file.get_tensor(name)
        return found

    gptq = settings["quant_method"] == "gptq"
    for module in packed_modules(folder):
        if gptq:
            parts = {name: read(f"{module}.{name}") for name in ("qweight", "qzeros", "scales", "g_idx")}
            parts["scales"] = parts["scales"].to(dtypes.get(module))
            yield f"{module}.weight", _from_gptq(**parts, bits=int(settings["bits"]))
            continue
        scale = read(f"{module}.weight_scale")
        scale = scale.to(dtypes.get(module, scale.dtype))
        if f"{module}.weight_packed" in files:
            rows, columns = read(f"{module}.weight_shape").tolist()
            packed = read(f"{module}.weight_packed")
            bits = 32 * packed.shape[1] // columns
            codes = _numbers(packed, bits).view(rows, columns) - 2 ** (bits - 1)
        else:
            codes = read(f"{module}.weight")
        wide = codes.to(scale.dtype).view(codes.shape[0], scale.shape[1], -1) * scale.unsqueeze(-1)
        yield f"{module}.weight", wide.view(codes.shape)
    endings = (
        ("qweight", "qzeros", "scales", "g_idx")
        if gptq
        else ("weight_packed", "weight_scale", "weight_shape", "weight")
    )
    parts_of = {f"{module}.{ending}" for module in packed_modules(folder) for ending in endings}
    for name in files:
        if name not in parts_of:
            yield name, read(name)


def _numbers(words: Tensor, bits: int) -> Tensor:
    """Unsigned numbers from 32-bit words along the last axis, lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    unpacked: Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return unpacked.flatten(-2)


def _from_gptq(*, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int) -> Tensor:
    """The weight [out, in]; version 1 stores zeros less one."""
    codes = _numbers(qweight.t().contiguous(), bits)
    zeros = _numbers(qzeros, bits) + 1
    index = g_idx.long()
    return (codes - zeros[index].t()).to(scales.dtype) * scales[index].t()


class _rounded_inputs:  # noqa: N801 - reads as a statement
    """Round what enters the modules to eight bits per token, as the config says that engines do."""

    def __init__(self, model: Any, settings: Mapping[str, Any], modules: set[str]) -> None:
        groups = settings.get("config_groups") or {}
        kinds = {of["input_activations"]["type"] for of in groups.values() if of.get("input_activations")}
        self._kind = kinds.pop() if kinds else None
        self._linears = [m for name, m in model.named_modules() if name in modules and isinstance(m, nn.Linear)]
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        if self._kind is not None:
            self._handles = [module.register_forward_pre_hook(self._round) for module in self._linears]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _round(self, _module: nn.Module, positional: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        largest = positional[0].abs().amax(-1, keepdim=True)
        if self._kind == "float":
            scale = (largest / 448).clamp(min=LEAST)
            return ((positional[0] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(scale.dtype) * scale,)
        scale = (largest / 127.5).clamp(min=LEAST)
        return ((positional[0] / scale).round().clamp(-128, 127) * scale,)
