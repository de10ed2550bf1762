"""Bases and settings that operations on experts must refuse: each with the exact error, and what it must name.

`build(folder)` makes the base; `headers` says that planning, which reads no weight, refuses as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from surgery.errors import CorruptCheckpoint, SurgeryError, UnsupportedModel
from tests.tiny import write_fp8, write_mxfp4, write_tiny

Tensors = dict[str, torch.Tensor]
HALF = {"keep": 2, "criterion": "random"}
GROUPED = {"experts": 8, "n_group": 2, "topk_group": 1}


class Case(NamedTuple):
    """Converting what `build` makes must raise exactly `error`, with `said` in it."""

    name: str
    build: Callable[[Path], Path]
    error: type[SurgeryError]
    said: str
    settings: Mapping[str, Any] = HALF
    operation: str = "expert_prune"
    headers: bool = True


def tiny(family: str, change: Callable[[Tensors], Any] = lambda _: None, /, **options: Any) -> Callable[[Path], Path]:
    """A builder of a tiny base whose tensors `change` spoils; `config` replaces fields afterwards, shapes stay."""
    config = options.pop("config", {})

    def build(folder: Path) -> Path:
        return spoilt(write_tiny(folder, family, **options), change, config)

    return build


def spoilt(base: Path, change: Callable[[Tensors], Any], config: Mapping[str, Any] | None = None) -> Path:
    """Change the tensors of a base of one file in place, and fields of its config."""
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    written = json.loads((base / "config.json").read_text()) | dict(config or {})
    (base / "config.json").write_text(json.dumps(written))
    return base


def without(*names: str) -> Callable[[Tensors], None]:
    """Drop every tensor whose name starts so."""

    def change(tensors: Tensors) -> None:
        gone = [name for name in tensors if name.startswith(names)]
        assert gone
        for name in gone:
            del tensors[name]

    return change


def put(name: str, value: float, *at: int) -> Callable[[Tensors], None]:
    """One element of a tensor replaced."""

    def change(tensors: Tensors) -> None:
        tensors[name][at] = value

    return change


def dense(*layers: int) -> Callable[[Tensors], None]:
    """Plain MLPs in the place of experts."""

    def change(tensors: Tensors) -> None:
        for layer in layers:
            prefix = f"model.layers.{layer}.mlp."
            first = {name: t for name, t in tensors.items() if name.startswith(f"{prefix}experts.0.")}
            without(prefix)(tensors)
            tensors |= {name.replace("experts.0.", ""): tensor for name, tensor in first.items()}

    return change


def fused(tensors: Tensors) -> None:
    """Qwen3-MoE as transformers 5 holds it in memory, which no Hub file has."""
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        parts = {p: torch.stack([tensors.pop(f"{prefix}.{e}.{p}_proj.weight") for e in range(4)]) for p in ("gate", "up", "down")}
        tensors[f"{prefix}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], 1)
        tensors[f"{prefix}.down_proj"] = parts["down"]


def extra(name: str, *shape: int) -> Callable[[Tensors], None]:
    """A tensor more."""
    return lambda tensors: tensors.update({name: torch.ones(shape)})


def _shards(folder: Path) -> Path:
    write_tiny(folder, "qwen3_moe", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    return folder


def _fp8(folder: Path) -> Path:
    return spoilt(write_fp8(folder), without("model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"))


def _mxfp4(ending: str) -> Callable[[Path], Path]:
    return lambda folder: spoilt(write_mxfp4(folder), without(f"model.layers.1.mlp.experts.down_proj_{ending}"))


L0, L1 = "model.layers.0.mlp", "model.layers.1.mlp"
MIXTRAL = "model.layers.1.block_sparse_moe"
BOTH = [[0, 1], [0, 1]]


def _keeps(family: str, options: dict[str, Any], *rows: tuple[str, Any, str]) -> list[Case]:
    return [
        Case(f"keep-{name}", tiny(family, **options), UnsupportedModel, said, {"keep": keep, "criterion": "random"})
        for name, keep, said in rows
    ]


def _numbers(name: str, config: dict[str, Any], error: type[SurgeryError], said: str) -> Case:
    return Case(f"numbers-{name}", tiny("deepseek_v3", **config), error, said)


def _groups(case: Case) -> Case:
    return case._replace(name=f"{case.name}-top-k", settings={"top_k": 1}, operation="expert_top_k")


CASES: tuple[Case, ...] = (
    # config and tensors
    Case("count-more", tiny("qwen3_moe", config={"num_experts": 5, "num_local_experts": 5}), CorruptCheckpoint, "5 experts"),
    Case("count-fewer", tiny("mixtral", config={"num_local_experts": 3}), CorruptCheckpoint, "3 experts"),
    Case("count-fused", tiny("gpt_oss", config={"num_local_experts": 5}), CorruptCheckpoint, "5 experts"),
    Case("count-twice", tiny("qwen3_moe", config={"num_local_experts": 8}), CorruptCheckpoint, "num_local_experts = 8"),
    Case("count-zero", tiny("olmoe", config={"num_experts": 0}), CorruptCheckpoint, "num_experts = 0"),
    Case("count-absent", tiny("olmoe", config={"num_experts": None}), CorruptCheckpoint, "num_experts = None"),
    Case("count-text", tiny("olmoe", config={"num_experts": "4"}), CorruptCheckpoint, "num_experts = '4'"),
    Case("router-rows", tiny("olmoe", lambda t: t.update({f"{L1}.gate.weight": torch.ones(3, 64)})), CorruptCheckpoint, f"{L1}.gate.weight"),
    Case("router-hash", tiny("deepseek_v3", extra(f"{L0}.gate.tid2eid", 128, 2)), CorruptCheckpoint, f"{L0}.gate.tid2eid"),
    Case("packed-experts", tiny("gpt_oss", lambda t: t.update({f"{L1}.experts.down_proj": torch.ones(2, 96, 64)})),
         CorruptCheckpoint, f"{L1}.experts.down_proj"),
    # tensors that are not there
    Case("missing-projection", tiny("qwen3_moe", without(f"{L1}.experts.2.up_proj")), CorruptCheckpoint, f"{L1}.experts.2.up_proj.weight"),
    Case("missing-w3", tiny("mixtral", without(f"{MIXTRAL}.experts.0.w3")), CorruptCheckpoint, f"{MIXTRAL}.experts.0.w3.weight"),
    Case("missing-projection-of-all", tiny("olmoe", without(*(f"{L0}.experts.{e}.down_proj" for e in range(4)))),
         CorruptCheckpoint, f"{L0}.experts.0.down_proj.weight"),
    Case("missing-scale", _fp8, CorruptCheckpoint, f"{L1}.experts.2.up_proj.weight_scale_inv"),
    Case("missing-fused", tiny("gpt_oss", lambda t: t.pop(f"{L1}.experts.down_proj")), CorruptCheckpoint, f"{L1}.experts.down_proj'"),
    Case("missing-fused-all", tiny("granitemoe", without("model.layers.0.block_sparse_moe.output_linear")),
         CorruptCheckpoint, "model.layers.0.block_sparse_moe.output_linear.weight"),
    Case("missing-blocks", _mxfp4("blocks"), CorruptCheckpoint, f"{L1}.experts.down_proj_blocks"),
    Case("missing-scales", _mxfp4("scales"), CorruptCheckpoint, f"{L1}.experts.down_proj_scales"),
    Case("missing-expert", tiny("qwen2_moe", without(f"{L0}.experts.1.")), CorruptCheckpoint, f"{L0}.experts.1."),
    Case("missing-first", tiny("olmoe", without(f"{L0}.experts.0.")), CorruptCheckpoint, f"{L0}.experts.0."),
    Case("missing-last", tiny("deepseek_v2", without(f"{L1}.experts.3.")), CorruptCheckpoint, "layer 1 has 3 experts"),
    Case("missing-experts", tiny("olmoe", without(f"{L1}.experts.")), CorruptCheckpoint, f"{L1}.experts.0."),
    Case("missing-router", tiny("qwen3_moe", without(f"{L1}.gate.")), CorruptCheckpoint, f"{L1}.gate.weight"),
    Case("missing-router-fused", tiny("gpt_oss", without(f"{L1}.router.weight")), CorruptCheckpoint, f"{L1}.router.weight"),
    Case("missing-correction", tiny("deepseek_v3", without(f"{L1}.gate.e_score_correction_bias")),
         CorruptCheckpoint, f"{L1}.gate.e_score_correction_bias"),
    Case("missing-correction-glm", tiny("glm4_moe", without(f"{L0}.gate.e_score_correction_bias")),
         CorruptCheckpoint, f"{L0}.gate.e_score_correction_bias"),
    Case("missing-shard", _shards, CorruptCheckpoint, "model-00002-of-00002.safetensors"),
    # other layouts
    Case("fused-layout", tiny("qwen3_moe", fused), UnsupportedModel, f"{L0}.experts.down_proj"),
    Case("strange-projection", tiny("olmoe", extra(f"{L1}.experts.3.side_proj.weight", 2, 2)), UnsupportedModel, "side_proj"),
    Case("dense", tiny("llama"), UnsupportedModel, "no experts"),
    Case("dense-top-k", tiny("llama"), UnsupportedModel, "no experts", {"top_k": 1}, "expert_top_k"),
    Case("no-layer", tiny("qwen3_moe", dense(0, 1), mlp_only_layers=[0, 1]), UnsupportedModel, "no layer of it has experts"),
    Case("no-layer-top-k", tiny("qwen3_moe", dense(0, 1), mlp_only_layers=[0, 1]), UnsupportedModel,
         "no layer of it has experts", {"top_k": 1}, "expert_top_k"),
    # numbers that no router can serve
    _numbers("groups-uneven", {"n_group": 3}, UnsupportedModel, "4 experts do not form 3 groups"),
    _groups(_numbers("groups-uneven", {"n_group": 3}, UnsupportedModel, "4 experts do not form 3 groups")),
    _numbers("groups-of-one", {"n_group": 4, "topk_group": 2}, UnsupportedModel, "4 experts do not form 4 groups"),
    _groups(_numbers("groups-of-one", {"n_group": 4, "topk_group": 2}, UnsupportedModel, "4 experts do not form 4 groups")),
    _numbers("groups-too-small", {"n_group": 2, "topk_group": 1, "top_k": 3}, UnsupportedModel, "tokens that take 3"),
    _numbers("groups-taken", {"n_group": 2, "topk_group": 3}, UnsupportedModel, "from 3 of 2 groups"),
    _groups(_numbers("groups-taken", {"n_group": 2, "topk_group": 3}, UnsupportedModel, "from 3 of 2 groups")),
    _numbers("groups-taken-of-one", {"n_group": 1, "topk_group": 2}, UnsupportedModel, "from 2 of 1 groups"),
    _groups(_numbers("groups-taken-of-one", {"n_group": 1, "topk_group": 2}, UnsupportedModel, "from 2 of 1 groups")),
    _numbers("groups-untold", {"n_group": 2, "topk_group": None}, CorruptCheckpoint, "topk_group = None"),
    _groups(_numbers("groups-untold", {"n_group": 2, "topk_group": None}, CorruptCheckpoint, "topk_group = None")),
    _numbers("groups-zero", {"n_group": 0}, CorruptCheckpoint, "n_group = 0"),
    _groups(_numbers("groups-zero", {"n_group": 0}, CorruptCheckpoint, "n_group = 0")),
    _numbers("top-k-above-all", {"top_k": 5}, UnsupportedModel, "4 experts for tokens that take 5"),
    _numbers("top-k-zero", {"top_k": 0}, CorruptCheckpoint, "num_experts_per_tok = 0"),
    _numbers("top-k-negative", {"top_k": -1}, CorruptCheckpoint, "num_experts_per_tok = -1"),
    _numbers("top-k-untold", {"config": {"num_experts_per_tok": None}}, CorruptCheckpoint, "num_experts_per_tok = None"),
    # keep
    *_keeps("qwen3_moe", {},
            ("all", 4, "keep 4 of 4"), ("more", 9, "keep 9 of 4"), ("below-top-k", 1, "1 experts in layer 0 are too few"),
            ("share-below-top-k", 0.25, "1 experts in layer 0"), ("share-none", 0.1, "0 experts in layer 0"),
            ("share-all", 0.9, "keep 0.9 of 4 experts drops none"), ("size-all", "1GB", "keep 1GB of 4 experts drops none"),
            ("list-short", [2], "keep lists 1 layers, the model has 2"), ("list-long", [2, 2, 2], "keep lists 3 layers"),
            ("list-more", [2, 5], "5 experts in layer 1"), ("list-below-top-k", [2, 1], "1 experts in layer 1"),
            ("ids-twice", [[0, 1], [2, 2]], "an expert twice in MoE layer 1"),
            ("ids-beyond", [[0, 4], [0, 1]], "names expert 4 in MoE layer 0"),
            ("ids-short", [[0, 1]], "keep lists 1 layers"), ("ids-below-top-k", [[0, 1], [3]], "1 experts in layer 1"),
            ("size-too-small", "10KB", "keep 10KB is too small: with 2 experts")),
    Case("keep-measured-below-top-k", tiny("qwen3_moe"), UnsupportedModel, "keep allows 2 experts in all, and tokens need 4",
         {"keep": 0.25, "allocation": "measured"}),
    Case("keep-measured-size", tiny("qwen3_moe"), UnsupportedModel, "tokens need 4", {"keep": "10KB", "allocation": "measured"}),
    Case("keep-measured-all", tiny("qwen3_moe"), UnsupportedModel, "drops none", {"keep": 0.9, "allocation": "measured"}),
    *_keeps("deepseek_v3", GROUPED,
            ("groups", 5, "does not divide into the 2 groups"), ("groups-list", [4, 5], "does not divide into the 2 groups"),
            ("groups-of-one", 2, "2 experts in layer 0 are too few"),
            ("groups-ids", [[0, 1, 2, 4], [0, 1, 4, 5]], "unequal numbers from the groups of MoE layer 0")),
    *_keeps("deepseek_v3", GROUPED | {"experts": 12, "top_k": 4}, ("groups-below-top-k", 6, "6 experts in layer 0 are too few")),
    # experts per token
    *[Case(f"top-k-{name}", tiny(family, **options), UnsupportedModel, said, {"top_k": top_k}, "expert_top_k")
      for name, family, options, top_k, said in (
          ("raised", "qwen3_moe", {}, 3, "3 is more"), ("raised-in-one", "qwen3_moe", {}, [2, 3], "layer 1 takes 2 experts per token, and 3 is more"),
          ("list-short", "qwen3_moe", {}, [1], "top_k lists 1 layers"), ("list-long", "olmoe", {}, [1, 1, 1], "top_k lists 3 layers"),
          ("peak-beyond", "qwen3_moe", {}, {"first": 1, "peak": 2, "last": 1, "at": 2}, "peak at MoE layer 2"),
          ("peak-raised", "qwen3_moe", {"top_k": 1}, {"first": 1, "peak": 2, "last": 1, "at": 1}, "2 is more"),
          ("above-all", "qwen3_moe", {"top_k": 6}, 5, "layer 0 has 4 experts, and 5 per token are more"),
          ("above-groups", "deepseek_v3", GROUPED | {"top_k": 6}, 5, "5 experts per token are more than 1 groups hold"),
      )],
    Case("top-k-of-config-zero", tiny("qwen3_moe", top_k=0), CorruptCheckpoint, "num_experts_per_tok = 0", {"top_k": 1}, "expert_top_k"),
    # mass correction
    *[Case(f"mass-{operation}-{family}", tiny(family, **options), UnsupportedModel, "has nothing to correct",
           {"mass_correction": True, **settings}, operation)
      for operation, settings in (("expert_prune", {"keep": 2}), ("expert_top_k", {"top_k": 1}))
      for family, options in (("mixtral", {}), ("qwen3_moe", {"norm_topk_prob": True}), ("deepseek_v3", {}), ("gpt_oss", {}),
                              ("granitemoe", {}), ("glm4_moe", {}))],
    *[Case(f"mass-quantized-{operation}", tiny("olmoe", quantization_config={"quant_method": "fp8"}), UnsupportedModel,
           "the base is quantized", {"mass_correction": True, **settings}, operation)
      for operation, settings in (("expert_prune", {"keep": 2}), ("expert_top_k", {"top_k": 1}))],
    # values, found while converting
    Case("nan-router", tiny("olmoe", put(f"{L1}.gate.weight", math.nan, 1, 3)), CorruptCheckpoint, f"{L1}.gate.weight", {"keep": BOTH}, headers=False),
    Case("infinite-router", tiny("gpt_oss", put(f"{L1}.router.bias", math.inf, 0)), CorruptCheckpoint, f"{L1}.router.bias", {"keep": BOTH}, headers=False),
    Case("nan-correction", tiny("deepseek_v3", put(f"{L0}.gate.e_score_correction_bias", math.nan, 0)),
         CorruptCheckpoint, "e_score_correction_bias", {"keep": BOTH}, headers=False),
    Case("nan-expert", tiny("mixtral", put(f"{MIXTRAL}.experts.1.w2.weight", math.nan, 0, 0)), CorruptCheckpoint,
         f"{MIXTRAL}.experts.1.w2.weight", {"keep": BOTH}, headers=False),
    Case("nan-router-norm", tiny("olmoe", put(f"{L1}.gate.weight", math.nan, 2, 3)), CorruptCheckpoint, f"{L1}.gate.weight",
         {"keep": 2, "criterion": "router_norm"}, headers=False),
    Case("nan-aimer", tiny("olmoe", put(f"{L1}.experts.2.up_proj.weight", math.nan, 2, 3)), CorruptCheckpoint,
         f"{L1}.experts.2.up_proj.weight", {"keep": 2, "criterion": "aimer"}, headers=False),
    Case("packed-aimer", write_mxfp4, UnsupportedModel, f"{L0}.experts.down_proj_", {"keep": 2, "criterion": "aimer"}, headers=False),
)  # fmt: skip
