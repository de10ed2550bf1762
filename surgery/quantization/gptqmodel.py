"""GPTQ by optimum and gptqmodel: the second engine, for the GPTQ format.

It runs on a model in memory and is read before it packs, so that its codes are written as ours are.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.errors import EnvironmentFailure, MissingPackage, UnsupportedModel
from surgery.quantization.gptq_format import inside_block

if TYPE_CHECKING:
    from collections.abc import Collection

# Its own settings, read when it is imported: a pool that two cores satisfy, and packing without a compiler.
_ENVIRONMENT = {"GPTQMODEL_CPU_WORKERS": "4", "GPTQMODEL_DISABLE_PACK_EXT": "1"}


def round_by_gptqmodel(
    network: Any,
    windows: Tensor,
    modules: Collection[str],
    *,
    bits: int,
    group_size: int,
    damping: float,
    act_order: bool,
) -> dict[str, Tensor]:
    """Codes [out, in] (int8) and scales [out, groups] (float16) of `modules`, as `module.codes` and `module.scale`.

    windows    calibration tokens [N, T]
    act_order  columns are reordered inside their groups' limits, so that the file stays plain

    The network is changed. Raises MissingPackage, and EnvironmentFailure where it leaves a module out.
    """
    quantizer_class = _quantizer_class()
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in windows]
    found: dict[str, Tensor] = {}

    class Reading(quantizer_class):  # type: ignore[misc,valid-type]
        def pack_model(self, model: Any, quantizers: dict[str, Any]) -> None:
            for name, (_, scale, zero, groups) in quantizers.items():
                codes = _codes(name, model.get_submodule(name).weight.detach(), scale, zero, groups, 2 ** (bits - 1))
                found[f"{name}.codes"], found[f"{name}.scale"] = codes, scale.detach().half().cpu().contiguous()

        def post_init_model(self, model: Any) -> Any:
            return model  # nothing was packed, so there is nothing to prepare

    inside = list(dict.fromkeys(inside_block(module) for module in modules))
    quantizer = Reading(
        bits=bits, dataset=rows, group_size=group_size, damp_percent=damping, desc_act=False, sym=True,
        act_group_aware=act_order, modules_in_block_to_quantize=[[name] for name in inside],
    )  # fmt: skip
    quantizer.quantize_model(network)
    missing = [module for module in modules if f"{module}.codes" not in found]
    if missing:
        raise EnvironmentFailure(
            f"gptqmodel left {len(missing)} modules out, {missing[0]!r} first", cause="it says no more about it",
            remedy="use engine: surgery",
        )  # fmt: skip
    return found


def _quantizer_class() -> Any:
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    try:
        import gptqmodel  # noqa: F401 - optimum asks for it late, and less clearly
        from optimum.gptq import GPTQQuantizer
    except ImportError as error:
        raise MissingPackage(
            "optimum and gptqmodel are not installed", cause=f"engine: gptqmodel runs them ({error})",
            remedy='pip install "surgery[gptqmodel]", or use engine: surgery',
        ) from error  # fmt: skip
    return GPTQQuantizer


def _codes(name: str, weight: Tensor, scale: Tensor, zero: Tensor, groups: Tensor, half: int) -> Tensor:
    """Signed codes of a rounded weight. Raises UnsupportedModel where they are not symmetric and in plain groups."""
    inputs, count = weight.shape[1], scale.shape[1]
    plain = torch.arange(inputs) // (inputs // count)
    if not torch.equal(groups.cpu().long(), plain) or not bool((zero == half).all()):
        raise UnsupportedModel(
            f"gptqmodel rounded {name!r} with zeros or groups of its own", cause="the file would not be plain",
            remedy="use engine: surgery",
        )  # fmt: skip
    codes = (weight.float().cpu() / scale.float().cpu()[:, plain]).round()
    return codes.clamp(-half, half - 1).to(torch.int8)
