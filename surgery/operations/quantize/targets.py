"""Which matrices of a model are rounded, and to which grid."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from surgery.architectures import Model
from surgery.architectures.family import layer_pattern
from surgery.operations.quantize.settings import QuantizeSettings
from surgery.quantization.gptq_format import inside_block
from surgery.quantization.layout import Layout
from surgery.quantization.schemes import Grid

# Low-rank factors that are thinner than this stay as they are: little is won and much lost.
THIN = 256
FACTORS = ("_a_proj", "_b_proj", "_proj_with_mqa")
# What readers of GPTQ files want both sizes of a matrix to be a multiple of.
GPTQ_MULTIPLE = 32
# Linear modules that choose or weight and are never rounded.
CHOOSING = ("shared_expert_gate",)
# The unit of all experts of all layers: transformers 5 reads one scheme for them, and others wrongly or not at all.
EXPERTS = "experts"
# Projections that read the same input, by the last part of their names.
TOGETHER = {
    "gate_proj": "gate_up", "up_proj": "gate_up", "w1": "gate_up", "w3": "gate_up",
    "q_a_proj": "q_kv_a", "kv_a_proj_with_mqa": "q_kv_a",
}  # fmt: skip


@dataclass(frozen=True)
class Linear:
    """A linear module: its weight is [outputs, inputs]; modules with the same `unit` are rounded alike.

    `width` is the bytes of one number as it is stored now; `expert` says that it is one of many that tokens choose.
    """

    module: str
    layer: int
    unit: str
    outputs: int
    inputs: int
    width: int
    expert: bool = False

    @property
    def weight(self) -> str:
        """The name of its weight."""
        return f"{self.module}.weight"


@dataclass(frozen=True)
class Targets:
    """The linear modules of the layers: those that may be rounded and those that stay; `fused` are no modules."""

    linears: tuple[Linear, ...]
    dense: tuple[str, ...]
    fused: tuple[str, ...]


def find_targets(model: Model, ignore: list[str]) -> Targets:
    """Every matrix of the decoder layers, each as what it can be."""
    at, experts = model.architecture.attention, model.architecture.experts
    together = {at.query: "qkv", at.key: "qkv", at.value: "qkv"} | TOGETHER
    router = f"{experts.block}.{experts.router}" if experts else None
    routed = f"{experts.block}.{experts.experts}." if experts and not experts.fused else None
    linears, dense, fused = [], [], []
    for name, shape in model.shapes.items():
        layer = _layer(model, name)
        if layer is None or not name.endswith(".weight"):
            if len(shape) == 3 and layer is not None:
                fused.append(name)
            continue
        module = name.removesuffix(".weight")
        inside = module.removeprefix(model.architecture.layers.format(layer=layer) + ".")
        path, _, last = inside.rpartition(".")
        if len(shape) == 3:
            fused.append(name)
        elif len(shape) == 2 and 0 in shape:
            dense.append(module)
        elif len(shape) == 2:
            chooses = inside == router or last in CHOOSING
            thin = last.endswith(FACTORS) and min(shape) < THIN
            if chooses or thin or any(re.search(text, module) for text in ignore):
                dense.append(module)
            else:
                unit = f"{layer}.{re.sub(r'[.][0-9]+(?=[.]|$)', '', path)}.{together.get(last, last)}"
                count = shape[0] * shape[1]
                width = model.nbytes.get(name, 2 * count) // count
                expert = routed is not None and inside.startswith(routed)
                linears.append(
                    Linear(module, layer, EXPERTS if expert else unit, shape[0], shape[1], width, expert=expert)
                )
    return Targets(tuple(linears), tuple(dense), tuple(fused))


def _layer(model: Model, name: str) -> int | None:
    """The decoder layer of a tensor; None outside of layers, and for draft layers, which transformers never loads."""
    match = layer_pattern(model.architecture.layers).match(name)
    number = int(match[1]) if match else model.num_hidden_layers
    return number if number < model.num_hidden_layers else None


def wanted_grid(settings: QuantizeSettings) -> Grid:
    """The grid that the settings name, before it is held against a matrix."""
    size = settings.group_size
    if size is None:
        wide = settings.bits == 8 and settings.format == "compressed-tensors"
        size = "channel" if wide else 128
    return Grid(settings.bits, None if size == "channel" else size, settings.type)


def fitting(grid: Grid, linear: Linear, settings: QuantizeSettings) -> Grid | None:
    """The grid for a matrix: per row where groups do not divide it, None where the format cannot hold it."""
    divides = grid.group_size is None or linear.inputs % grid.group_size == 0
    if settings.format == "gptq":
        return grid if divides and linear.inputs % GPTQ_MULTIPLE == linear.outputs % GPTQ_MULTIPLE == 0 else None
    packed = settings.type == "int" and settings.activations == "none"
    if packed and linear.inputs * grid.bits % 32:
        return None
    return grid if divides else Grid(grid.bits, None, grid.kind)


def grids_for(linears: Sequence[Linear], grid: Grid | None, settings: QuantizeSettings) -> dict[str, Grid | None]:
    """A grid for some matrices, as far as it fits, by module; experts get one that fits all of these."""
    found = {linear.module: None if grid is None else fitting(grid, linear, settings) for linear in linears}
    experts = {linear.module for linear in linears if linear.expert}
    if grid is not None and len({found[module] for module in experts}) > 1:
        common = Grid(grid.bits, None, grid.kind)
        fits = all(fitting(common, linear, settings) for linear in linears if linear.expert)
        found |= dict.fromkeys(experts, common if fits else None)
    return found


def uniform_grids(targets: Targets, settings: QuantizeSettings, grid: Grid | None = None) -> dict[str, Grid | None]:
    """One grid for all, as far as it fits, by module."""
    grids = grids_for(targets.linears, grid or wanted_grid(settings), settings)
    if settings.format == "gptq":  # which says once for all layers what is packed in them
        dense = {inside_block(module) for module, found in grids.items() if found is None}
        dense |= {inside_block(module) for module in targets.dense}
        grids = {module: None if inside_block(module) in dense else found for module, found in grids.items()}
    return grids


def layout(model: Model, targets: Targets, grids: Mapping[str, Grid | None], settings: QuantizeSettings) -> Layout:
    """What config.json says of the modules; the head and what stands in other tensors than a layer's count as dense."""
    rounded = {module: grid for module, grid in grids.items() if grid is not None}
    left = [linear.module for linear in targets.linears if linear.module not in rounded]
    dense = (*_heads(model), *targets.dense, *left)
    vision = model.architecture.vision
    if vision is not None:  # config.json speaks of modules, and releases differ in the tower's
        tower = f"{vision.tower}."
        short = [f"{vision.short_tower}.{m.removeprefix(tower)}" for m in dense if m.startswith(tower)]
        dense = tuple(dict.fromkeys(vision.loaded(module) for module in (*dense, *short)))
        rounded = {vision.loaded(module): grid for module, grid in rounded.items()}
    return Layout(rounded, dense, settings.activations == "dynamic")


def _heads(model: Model) -> Iterator[str]:
    yield "lm_head"
    for name, shape in model.shapes.items():
        if len(shape) == 2 and name.endswith(".weight") and _layer(model, name) is None and "embed" not in name:
            module = name.removesuffix(".weight")
            if module != "lm_head":
                yield module
