"""The GPTQ format, version 1: what AutoGPTQ wrote first, and vLLM, SGLang and optimum read.

X.qweight  int32 [in * bits / 32, out]      codes + 2^(bits-1), lowest bits first, along the inputs
X.qzeros   int32 [groups, out * bits / 32]  2^(bits-1) - 1 everywhere: readers add the one
X.scales   float16 [groups, out]
X.g_idx    int32 [in]                       the group of every input
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery.checkpoint.expressions import Tensors, TensorSpec
from surgery.quantization.layout import Format, Layout
from surgery.quantization.schemes import Grid

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.quantization.grid import Rounded


def _specs(module: str, weight: TensorSpec, grid: Grid, _activations: bool) -> dict[str, TensorSpec]:
    outputs, inputs = weight.shape
    groups, per_word = grid.groups(inputs), 32 // grid.bits
    return {
        f"{module}.qweight": TensorSpec("I32", (inputs // per_word, outputs)),
        f"{module}.qzeros": TensorSpec("I32", (groups, outputs // per_word)),
        f"{module}.scales": TensorSpec("F16", (groups, outputs)),
        f"{module}.g_idx": TensorSpec("I32", (inputs,)),
    }


def _pack(rounded: Rounded, grid: Grid, _activations: bool) -> dict[str, Tensor]:
    import torch

    from surgery.quantization.packing import words

    outputs, inputs = rounded.codes.shape
    half = 2 ** (grid.bits - 1)
    groups = rounded.scale.shape[1]
    zeros = torch.full((groups, outputs), half - 1, dtype=torch.int32)
    return {
        "qweight": words(rounded.codes.int() + half, grid.bits).t().contiguous(),
        "qzeros": words(zeros, grid.bits),
        "scales": rounded.scale.half().t().contiguous(),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // (inputs // groups),
    }


def _join(parts: Sequence[Tensors]) -> dict[str, Tensor]:
    import torch

    joined = {name: torch.cat([part[name] for part in parts], dim=1) for name in ("qweight", "qzeros", "scales")}
    return {**joined, "g_idx": parts[0]["g_idx"]}


def _config(layout: Layout, facts: Mapping[str, Any]) -> dict[str, Any]:
    grid = next(iter(layout.grids.values()))
    # Readers take every linear module of the blocks for packed unless the packed ones are listed, once for all blocks.
    inside = list(dict.fromkeys(inside_block(module) for module in layout.grids))
    some = {"modules_in_block_to_quantize": [inside]} if len(layout.dense) > 1 else {}
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": grid.bits,
        "group_size": -1 if grid.group_size is None else grid.group_size,
        "sym": True,
        "desc_act": False,
        "static_groups": True,
        "true_sequential": True,
        "damp_percent": facts["damping"],
        "lm_head": False,
        **some,
    }


def inside_block(module: str) -> str:
    """The name of a module below its decoder layer: `self_attn.q_proj`."""
    return re.sub(r"^.*?\.\d+\.", "", module)


GPTQ = Format(
    name="gptq",
    scale_dtype=lambda _: "F16",
    specs=_specs,
    pack=_pack,
    join=_join,
    config=_config,
    packages={"optimum": "optimum>=2.3", "gptqmodel": "gptqmodel>=7"},
)
