"""Going through a model layer by layer, rounding each for what the rounded layers before it hand on.

Hidden states between layers lie on disk; of the weights, one layer is in memory where its tensors can be read alone
(see `surgery.calibration.streamed`). Inside a layer, modules that read the same input are rounded together, in the
order in which they are called, each group seeing what the ones before it became.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from surgery.calibration.compare import divergences, spread
from surgery.calibration.files import mapped
from surgery.calibration.layers import BATCH, LayerCall
from surgery.calibration.streamed import Layers
from surgery.checkpoint.dtypes import TORCH_NAMES
from surgery.errors import CorruptCheckpoint, UnsupportedModel
from surgery.operations.quantize.budget import units_of
from surgery.operations.quantize.experts import ENOUGH, fused_experts, round_experts, traffic
from surgery.operations.quantize.moments import Moments
from surgery.operations.quantize.rounding import Found, Recipe, round_matrix
from surgery.operations.quantize.settings import QuantizeSettings
from surgery.operations.quantize.targets import Linear, fitting
from surgery.quantization.layout import Format
from surgery.quantization.schemes import Grid

# What a part of a layer gets whose outputs are off by too much.
RAISED = Grid(8, None)


@dataclass(frozen=True)
class Ground:
    """What all walks of one measurement share.

    windows    tokens [N, T] that rounding sees
    heldout    tokens [M, T] that judge it; may be empty
    keywords   how each layer is called
    """

    layers: Layers
    linears: Sequence[Linear]
    settings: QuantizeSettings
    form: Format
    windows: Tensor
    heldout: Tensor
    keywords: list[dict[str, Any]]
    scratch: Path
    step: Callable[[], None]

    @property
    def count(self) -> int:
        """Decoder layers."""
        return len(self.keywords)

    def of_layer(self, number: int) -> list[Linear]:
        """The linear modules of a layer."""
        return [linear for linear in self.linears if linear.layer == number]

    def scale_dtype(self, linear: Linear) -> torch.dtype:
        """The type that scales of a matrix are stored in."""
        stored = self.layers.checkpoint.tensors[linear.weight].dtype
        found: torch.dtype = getattr(torch, TORCH_NAMES[self.form.scale_dtype(stored)])
        return found


@dataclass
class Walked:
    """What one walk gave: files of rounded tensors by layer, final grids, errors, fallbacks, and divergence [M]."""

    files: list[Path] = field(default_factory=list)
    grids: dict[str, Grid | None] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)
    divergence: Tensor = field(default_factory=lambda: torch.empty(0))


@torch.no_grad()
def walk(ground: Ground, recipe: Recipe, name: str, reference: Tensor) -> Walked:
    """Round the model by a recipe; `name` is for its files, `reference` is of `reference_log_probabilities`."""
    found = Walked(grids=dict(recipe.grids))
    folder = ground.scratch / name
    folder.mkdir()
    stream, judged = (entrance(ground, tokens, folder / f"{which}.bin")
                      for which, tokens in (("windows", ground.windows), ("heldout", ground.heldout)))  # fmt: skip
    for number in range(ground.count):
        layer = ground.layers.layer(number)
        call = LayerCall(layer, ground.keywords[number])
        tensors = _round_layer(ground, recipe, number, call, stream, found)
        path = folder / f"layer-{number:04d}.safetensors"
        save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, path)
        found.files.append(path)
        for hidden in (stream, judged):
            advance(ground, call, hidden)
        del layer, call
        ground.step()
    if len(judged):
        found.divergence = _divergence(ground, judged, reference)
    for which in ("windows", "heldout"):
        (folder / f"{which}.bin").unlink(missing_ok=True)
    return found


@torch.no_grad()
def reference_log_probabilities(ground: Ground) -> Tensor:
    """What the model as it is predicts on the held-out windows: log-probabilities [M, P, V], on disk."""
    hidden = entrance(ground, ground.heldout, ground.scratch / "reference.bin")
    for number in range(ground.count):
        advance(ground, LayerCall(ground.layers.layer(number), ground.keywords[number]), hidden)
        ground.step()
    found: Tensor | None = None
    with ground.layers.exit() as logits:
        for row, window in enumerate(hidden):
            made = _log_probabilities(logits, window.to(ground.layers.device))
            if found is None:
                found = mapped(ground.scratch / "predictions.bin", (len(hidden), *made.shape), torch.float32)
            found[row] = made.cpu()
    return torch.empty(0) if found is None else found


def entrance(ground: Ground, tokens: Tensor, path: Path) -> Tensor:
    """Hidden states that enter the first layer for tokens [N, T], kept in a file."""
    if not len(tokens):
        return torch.empty(0)
    kept: Tensor | None = None
    with ground.layers.entrance():
        for start in range(0, len(tokens), BATCH):
            hidden, _ = ground.layers.calls(tokens[start : start + BATCH])
            if kept is None:
                kept = mapped(path, (len(tokens), *hidden.shape[1:]), hidden.dtype)
            kept[start : start + BATCH] = hidden.cpu()
    return torch.empty(0) if kept is None else kept


def advance(ground: Ground, call: LayerCall, hidden: Tensor) -> None:
    """Replace hidden states [N, T, D] by what a layer makes of them."""
    for start in range(0, len(hidden), BATCH):
        made = call.run(hidden[start : start + BATCH].to(ground.layers.device))
        if not torch.isfinite(made).all():
            raise CorruptCheckpoint(
                "the model gives values that are NaN or infinite", cause="nothing can be measured on them",
                remedy="check that the base works",
            )  # fmt: skip
        hidden[start : start + BATCH] = made.cpu()


def _log_probabilities(logits: Callable[[Tensor], Tensor], window: Tensor) -> Tensor:
    """Log-probabilities [P, V] at evenly spread positions of a window [T, D]."""
    return logits(window[spread(len(window))]).float().log_softmax(-1)


def _divergence(ground: Ground, hidden: Tensor, reference: Tensor) -> Tensor:
    """KL(as it was, rounded) in nats per token, for every held-out window."""
    found = []
    with ground.layers.exit() as logits:
        for row, window in enumerate(hidden):
            ours = _log_probabilities(logits, window.to(ground.layers.device)).cpu()
            found.append(divergences(reference[row], ours).mean(dtype=torch.float64))
    return torch.stack(found)


def _round_layer(
    ground: Ground, recipe: Recipe, number: int, call: LayerCall, stream: Tensor, found: Walked
) -> dict[str, Tensor]:
    """Round one layer in place; returns codes, scales and corrected biases by name."""
    tensors: dict[str, Tensor] = {}
    prefix = ground.layers.prefix(number)
    modules, apart = linear_modules(call.layer, prefix, ground.of_layer(number))
    rounded_ones = {linear: module for linear, module in modules.items() if recipe.grids[linear.module] is not None}
    full = ground.settings.method == "gptq"
    for group in _call_order(ground, call, rounded_ones, stream):
        moments = _moments(ground, call, rounded_ones[group[0]], stream, full=full)
        for unit in units_of(group).values():
            tensors |= _settle_unit(ground, recipe, unit, rounded_ones, moments, found)
    apart = [linear for linear in apart if recipe.grids[linear.module] is not None]
    experts = fused_experts(call.layer, number, apart)
    if experts is not None:

        def settle(linear: Linear, weight: Tensor, moments: Moments) -> None:
            grid = recipe.grids[linear.module]
            if grid is not None:
                made = round_matrix(weight, moments, grid, recipe, ground.settings, ground.scale_dtype(linear))
                tensors.update(_kept(linear, made, found))
                weight.copy_(made.rounded.decoded())

        seen = traffic(experts, call, stream, ground.scratch, ground.layers.device)
        for linear, reason in round_experts(experts, seen, ground.layers.device, settle, full=full):
            found.fallbacks.setdefault(linear.module, reason)
    return tensors


def linear_modules(
    layer: nn.Module, prefix: str, linears: Sequence[Linear]
) -> tuple[dict[Linear, nn.Linear], list[Linear]]:
    """The modules of a layer that are `linears`, and those of `linears` that have no module of their own there."""
    known = dict(layer.named_modules())
    modules, apart = {}, []
    for linear in linears:
        module = known.get(linear.module.removeprefix(prefix))
        if module is None:
            apart.append(linear)
        elif type(module) is nn.Linear:
            modules[linear] = module
        else:
            raise UnsupportedModel(
                f"{linear.module!r} is a {type(module).__name__}", cause="only plain linear modules can be calibrated",
                remedy=f"leave it as it is: ignore: ['{linear.module.rpartition('.')[2]}$']",
            )  # fmt: skip
    return modules, apart


def _call_order(
    ground: Ground, call: LayerCall, modules: Mapping[Linear, nn.Linear], stream: Tensor
) -> list[list[Linear]]:
    """Modules in the order of their calls, those that get the same input together; those not called come last."""
    inputs: list[Tensor] = []
    groups: list[list[Linear]] = []

    def hook_of(linear: Linear) -> Callable[..., None]:
        def hook(_module: nn.Module, positional: tuple[Tensor, ...]) -> None:
            entering = positional[0]
            if any(linear in group for group in groups):
                return
            for known, group in zip(inputs, groups, strict=True):
                same = known.numel() == entering.numel() and known.shape[-1] == entering.shape[-1]
                if same and known.numel() and known.data_ptr() == entering.data_ptr():
                    group.append(linear)
                    return
            inputs.append(entering)  # held, so that no other input takes its place in memory
            groups.append([linear])

        return hook

    handles = [module.register_forward_pre_hook(hook_of(linear)) for linear, module in modules.items()]
    try:
        call.run(stream[:1].to(ground.layers.device))
    finally:
        for handle in handles:
            handle.remove()
    called = {linear for group in groups for linear in group}
    return [*groups, *([linear] for linear in modules if linear not in called)]


def _moments(ground: Ground, call: LayerCall, module: nn.Linear, stream: Tensor, *, full: bool) -> Moments:
    """Run a layer on all hidden states and sum up what enters one of its modules."""
    moments = Moments.empty(module.in_features, ground.layers.device, full=full)
    handle = module.register_forward_pre_hook(lambda _module, positional: moments.see(positional[0]))
    try:
        for part in stream.split(BATCH):
            call.run(part.to(ground.layers.device))
    finally:
        handle.remove()
    return moments


def _settle_unit(
    ground: Ground,
    recipe: Recipe,
    unit: Sequence[Linear],
    modules: Mapping[Linear, nn.Linear],
    moments: Moments,
    found: Walked,
) -> dict[str, Tensor]:
    """Round modules that go together, in 8 bits where their outputs would be off by too much."""
    settings = ground.settings
    if unit[0].expert and moments.count < ENOUGH * unit[0].inputs:  # a rank-poor full matrix would mislead
        moments = replace(moments, full=None)

    def all_of(grids: Mapping[str, Grid | None]) -> dict[Linear, Found]:
        return {
            linear: round_matrix(
                modules[linear].weight.data, moments, grid, recipe, settings, ground.scale_dtype(linear)
            )
            for linear in unit
            if (grid := grids[linear.module]) is not None
        }

    made = all_of(recipe.grids)
    worst = max((of.error for of in made.values()), default=0.0)
    # Not experts, which must be alike in all layers, and not against a budget or a format with one grid for all.
    alone = settings.format == "compressed-tensors" and settings.bytes_per_weight is None
    can_raise = alone and all(
        not linear.expert and grid is not None and grid.bits < RAISED.bits
        for linear in unit
        for grid in [recipe.grids[linear.module]]
    )
    if worst > settings.raise_above and can_raise:
        raised = {linear.module: fitting(RAISED, linear, settings) for linear in unit}
        made = all_of(raised)
        found.grids |= raised
    tensors: dict[str, Tensor] = {}
    for linear, of in made.items():
        tensors |= _kept(linear, of, found)
        module, decoded = modules[linear], of.rounded.decoded()
        if recipe.biases and module.bias is not None and moments.count:
            missing = (module.weight.data.float() - decoded) @ moments.mean
            name = f"{linear.module}.bias"
            stored = getattr(torch, TORCH_NAMES[ground.layers.checkpoint.tensors[name].dtype])
            tensors[name] = (module.bias.data.float() + missing).to(stored)
            module.bias.data.copy_(tensors[name])
        module.weight.data.copy_(decoded)
    return tensors


def _kept(linear: Linear, made: Found, found: Walked) -> dict[str, Tensor]:
    found.errors[linear.module] = made.error
    if made.fallback:
        found.fallbacks[linear.module] = made.fallback
    return {f"{linear.module}.codes": made.rounded.codes, f"{linear.module}.scale": made.rounded.scale}
