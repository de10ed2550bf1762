"""Cutting experts out of a draft, and writing how many there are: natively where one number holds for all layers.

Nothing is computed: experts that stay are renamed, and of tensors that hold all experts, slices are taken. So any
type goes through as it is, FP8 with its scales and MXFP4 blocks included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from surgery.architectures.experts import ExpertLayer, Numbers, expert_layers, family_experts, renumbered
from surgery.emission.code import RuntimePart
from surgery.planning import Draft

PART = RuntimePart("surgery_experts.py", "experts_per_layer", attribute="layers", of="model", what="experts")


def cut(draft: Draft, layers: Sequence[ExpertLayer], kept: Mapping[int, Sequence[int]], why: str) -> None:
    """Keep only the experts `kept[layer]`, in ascending order; every layer that is not named there stays as it is."""
    at = family_experts(draft.model)
    gone: list[str] = []
    names: dict[str, str] = {}
    modules: dict[str, str] = {}
    gone_modules: list[str] = []
    for layer in layers:
        chosen = list(kept.get(layer.layer, range(layer.count)))
        if len(chosen) == layer.count:
            continue
        prefix = f"{draft.model.architecture.layers.format(layer=layer.layer)}.{at.block}.{at.experts}."
        ranks = {expert: rank for rank, expert in enumerate(chosen)}
        for expert, tensors in layer.experts.items():
            if expert not in ranks:
                gone += tensors
                gone_modules += [f"{prefix}{expert}", *(f"{prefix}{expert}.{p}" for p in at.projections)]
            elif ranks[expert] != expert:
                old, new = f"{prefix}{expert}", f"{prefix}{ranks[expert]}"
                names |= {name: new + name.removeprefix(old) for name in tensors}
                modules |= {old + part: new + part for part in ("", *(f".{p}" for p in at.projections))}
        for name in (*layer.router, *layer.fused):
            draft.take_rows(name, chosen, why)
    draft.drop(gone, why)
    draft.rename(names)
    quantized = draft.root.get("quantization_config")
    if quantized and (modules or gone_modules):
        draft.root["quantization_config"] = renumbered(quantized, modules, frozenset(gone_modules))


def drop_drafts(draft: Draft, why: str) -> None:
    """Leave draft layers out, and say in the config that there are none."""
    model = draft.model
    prefixes = tuple(
        model.architecture.layers.format(layer=layer.layer) + "."
        for layer in expert_layers(model)
        if layer.layer >= model.num_hidden_layers
    )
    draft.drop([name for name in draft.tensors if prefixes and name.startswith(prefixes)], why)
    key = family_experts(model).drafts
    if key and draft.config.get(key):
        draft.config[key] = 0


def write_numbers(draft: Draft, found: Numbers) -> None:
    """Write the numbers into the config, and see to the code that reads them where they differ between layers."""
    at, config = family_experts(draft.model), draft.config
    present = [key for key in at.counts if key in config] or at.counts[:1]
    config.update(dict.fromkeys(present, max(found.experts.values())))
    config.update(dict.fromkeys([key for key in at.top_k if key in config], max(found.top_k.values())))
    ours = {key: value for key, value in (config.get("surgery") or {}).items() if key != "experts"}
    draft.parts[:] = [part for part in draft.parts if part != PART]
    if found.native and not draft.parts:
        config.pop("surgery", None)
        return
    ours |= {"version": 1, "base_model_type": draft.model.architecture.model_type}
    if not found.native:
        layers = range(draft.model.num_hidden_layers)
        ours["experts"] = {
            "num_experts": [found.experts.get(layer) for layer in layers],
            "num_experts_per_tok": [found.top_k.get(layer) for layer in layers],
        }
        draft.parts.append(PART)
        if config.get("output_router_logits"):  # the stock balancing loss takes layers of equal size
            config["output_router_logits"] = False
            draft.notes.append("output_router_logits is off: the balancing loss takes layers that are alike")
    config["surgery"] = ours
