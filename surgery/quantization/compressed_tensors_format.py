"""compressed-tensors: the format of llm-compressor, which vLLM reads and transformers unpacks.

pack-quantized    X.weight_packed int32 [out, in * bits / 32], X.weight_scale [out, groups], X.weight_shape int64 [2]
int-quantized     X.weight int8 [out, in], X.weight_scale [out, 1]; inputs are rounded per token when it runs
float-quantized   X.weight float8_e4m3fn [out, in], X.weight_scale [out, 1]
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery.checkpoint.expressions import Tensors, TensorSpec
from surgery.quantization.layout import Format, Layout
from surgery.quantization.schemes import Grid

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.quantization.grid import Rounded

PACKAGES = {"compressed_tensors": "compressed-tensors>=0.15"}


def _specs(module: str, weight: TensorSpec, grid: Grid, activations: bool) -> dict[str, TensorSpec]:
    outputs, inputs = weight.shape
    scale = {f"{module}.weight_scale": TensorSpec(weight.dtype, (outputs, grid.groups(inputs)))}
    if _kind(grid, activations) == "pack-quantized":
        packed = TensorSpec("I32", (outputs, inputs * grid.bits // 32))
        return {f"{module}.weight_packed": packed, **scale, f"{module}.weight_shape": TensorSpec("I64", (2,))}
    return {f"{module}.weight": TensorSpec("I8" if grid.kind == "int" else "F8_E4M3", weight.shape), **scale}


def _pack(rounded: Rounded, grid: Grid, activations: bool) -> dict[str, Tensor]:
    import torch

    from surgery.quantization.packing import words

    if _kind(grid, activations) != "pack-quantized":
        return {"weight": rounded.codes, "weight_scale": rounded.scale}
    return {
        "weight_packed": words(rounded.codes.int() + 2 ** (grid.bits - 1), grid.bits),
        "weight_scale": rounded.scale,
        "weight_shape": torch.tensor(rounded.codes.shape),
    }


def _join(parts: Sequence[Tensors]) -> dict[str, Tensor]:
    import torch

    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if "weight_shape" in joined:
        rows = sum(int(part["weight_shape"][0]) for part in parts)
        joined["weight_shape"] = torch.tensor([rows, int(parts[0]["weight_shape"][1])])
    return joined


def _kind(grid: Grid, activations: bool) -> str:
    if grid.kind == "float":
        return "float-quantized"
    return "int-quantized" if activations else "pack-quantized"


def _config(layout: Layout, _facts: Mapping[str, Any]) -> dict[str, Any]:
    """The modules of one scheme are named by "Linear", those of all others by patterns, and stand before it.

    transformers 5 gives all experts the first scheme that names classes; releases of compressed-tensors warn of targets
    that come after one which matched everything.
    """
    counts = Counter(layout.grids.values())
    experts = {grid for module, grid in layout.grids.items() if ".experts." in module}
    common = experts.pop() if experts else counts.most_common(1)[0][0]
    groups = [
        (grid, patterns(module for module, of in layout.grids.items() if of == grid))
        for grid in counts
        if grid != common
    ]
    schemes = [_scheme(grid, layout.activations, targets) for grid, targets in (*groups, (common, ["Linear"]))]
    return {
        "quant_method": "compressed-tensors",
        "format": _kind(common, layout.activations),
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": scheme for number, scheme in enumerate(schemes)},
        "ignore": patterns(layout.dense),
    }


def _scheme(grid: Grid, activations: bool, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": grid.bits, "type": grid.kind, "symmetric": True, "dynamic": False,
        "strategy": "channel" if grid.group_size is None else "group", "group_size": grid.group_size,
    }  # fmt: skip
    inputs = {"num_bits": 8, "type": grid.kind, "symmetric": True, "dynamic": True, "strategy": "token"}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs if activations else None,
        "format": _kind(grid, activations),
    }


def patterns(modules: Iterable[str]) -> list[str]:
    """Few regular expressions that name these modules: numbers of layers are listed, those of experts joined.

    A leading `model.` may be absent, as it is in a model without its head. They never say "experts": transformers 5
    takes a scheme whose target does for that of all experts, shared ones as well.
    """
    layers: dict[tuple[str, str], dict[str, None]] = {}
    for module in modules:
        before, layer, after = _parts(module)
        layers.setdefault((before, re.sub(r"(?<=[.])[0-9]+(?=[.])", "\0", after)), {})[layer] = None
    return [_pattern(before, numbers, after) for (before, after), numbers in layers.items()]


def _pattern(before: str, numbers: Iterable[str], after: str) -> str:
    ending = re.escape(after).replace("\0", r"\d+").replace("experts", "expert.")
    listed = f"({'|'.join(numbers)})" if after else ""
    return rf"re:(model\.)?{re.escape(before.removeprefix('model.'))}{listed}{ending}$"


def _parts(module: str) -> tuple[str, str, str]:
    """What stands before the first number, that number and the rest: `model.layers.`, `3`, `.mlp.up_proj`."""
    found = re.match(r"(.*?\.)(\d+)(\..*)", module)
    return (found[1], found[2], found[3]) if found else (module, "", "")


COMPRESSED_TENSORS = Format(
    name="compressed-tensors",
    scale_dtype=lambda dtype: dtype,
    specs=_specs,
    pack=_pack,
    join=_join,
    config=_config,
    packages=PACKAGES,
)
