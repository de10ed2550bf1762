"""In-layer distillation: each layer learns to give the teacher's output for the teacher's own input.

Layers are independent, so one is in memory at a time, beside the teacher's. The hidden states between them lie on disk.
Where a run has more tokens than the buffer, it goes through all layers in rounds. Each (round, layer) is one unit:
what is killed in the middle of one repeats it from its beginning and comes to the same weights.

Processes share the layers among themselves and do not communicate until the end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from surgery.calibration.files import mapped
from surgery.calibration.layers import LayerCall
from surgery.calibration.streamed import Keywords, Layers, opened_layers
from surgery.checkpoint.writer import environment_errors
from surgery.progress import Progress
from surgery.training import curves
from surgery.training.adapters import attach, is_factor, merged, stored_name
from surgery.training.data import rows_of
from surgery.training.groups import Rank, layer_names
from surgery.training.losses import hidden_mse
from surgery.training.run import Run, divided, judge, optimizers, rate_factor, set_rate

Optimizers: TypeAlias = Sequence[torch.optim.Optimizer]
LOGGED = 10  # steps over which a recorded loss is averaged
HARMLESS_SHARE = 0.01  # of the mean square of the hidden states: errors below this are never called divergence


@dataclass(frozen=True)
class _Round:
    """Steps [first, last) of the whole run, and the windows that they use, in the order of their place on disk."""

    first: int
    last: int
    rows: Tensor


@dataclass(frozen=True)
class _Stage:
    """What every unit shares; `part` is how many sequences are computed at once."""

    run: Run
    student: Layers
    teacher: Layers
    keywords: tuple[list[Keywords], list[Keywords]]
    steps: int
    rate: float
    part: int

    @property
    def folder(self) -> Path:
        return self.run.folder / "layerwise"

    def state(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:03d}.safetensors"

    def history(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:03d}.jsonl"

    def trains(self, layer: int) -> bool:
        return any(True for _ in layer_names(self.run.training.model, self.run.selection.names, layer))


def layerwise(run: Run) -> tuple[dict[str, Tensor], list[curves.Entry]]:
    """Train every layer; returns the trained tensors in float32 by name, and what was recorded."""
    wanted = run.settings.layerwise
    if wanted is None:
        return {}, []
    training, layers = run.training, range(run.training.model.num_hidden_layers)
    device = run.accelerator.device
    with ExitStack() as stack:
        student, teacher = (
            stack.enter_context(opened_layers(c, device, run.weights_dtype(c) or _stored(c)))
            for c in (training.student, training.teacher)
        )
        keywords = _keywords(student, run), _keywords(teacher, run)
        steps, part = run.steps(wanted.tokens), divided(run.settings, 1)
        stage = _Stage(run, student, teacher, keywords, steps, wanted.learning_rate, part)
        with environment_errors(stage.folder):
            stage.folder.mkdir(parents=True, exist_ok=True)
        mine = [layer for layer in layers if stage.trains(layer) and _is_mine(run, layer)]
        for turn in _rounds(run, steps, wanted.buffer):
            if any(_step_of(stage.state(layer)) < turn.last for layer in mine):
                _go_through(stage, turn, mine)
    run.accelerator.wait_for_everyone()
    trained = [layer for layer in layers if stage.trains(layer)]
    tensors = {name: tensor for layer in trained for name, tensor in _result(stage, layer)}
    return tensors, [entry for layer in trained for entry in curves.read(stage.history(layer))]


def _is_mine(run: Run, layer: int) -> bool:
    return layer % int(run.accelerator.num_processes) == int(run.accelerator.process_index)


def _stored(checkpoint: Any) -> torch.dtype:
    from surgery.planning import storage_dtype

    found: torch.dtype = getattr(torch, storage_dtype(checkpoint))
    return found


def _keywords(source: Layers, run: Run) -> list[Keywords]:
    with source.entrance():
        return source.calls(run.corpus.train[:1].long())[1]


def _rounds(run: Run, steps: int, buffer: int) -> Iterator[_Round]:
    """All steps at once where every window fits into the buffer; else as many as fill it."""
    count, size, seed = len(run.corpus.train), run.settings.batch_size, run.settings.seed
    if count * run.length <= buffer:
        yield _Round(0, steps, torch.arange(count))
        return
    each = max(1, buffer // (size * run.length))
    for first in range(0, steps, each):
        last = min(first + each, steps)
        used = torch.cat([rows_of(count, step=step, batch_size=size, seed=seed) for step in range(first, last)])
        yield _Round(first, last, used.unique())


def _go_through(stage: _Stage, part: _Round, mine: list[int]) -> None:
    """One round: the teacher's hidden states go from layer to layer, and each of `mine` trains when they pass."""
    store = _Store.of(stage, len(part.rows))
    with stage.teacher.entrance():
        for start in range(0, len(part.rows), stage.part):
            rows = part.rows[start : start + stage.part]
            hidden, _ = stage.teacher.calls(stage.run.corpus.train[rows].long())
            store.inputs[start : start + stage.part] = hidden.cpu()
    for layer in range(max(mine) + 1):
        call = LayerCall(stage.teacher.layer(layer), stage.keywords[1][layer])
        for start in range(0, len(part.rows), stage.part):
            taken = store.inputs[start : start + stage.part].to(stage.run.accelerator.device)
            with torch.no_grad(), stage.run.accelerator.autocast():
                store.outputs[start : start + stage.part] = call.run(taken).cpu()
        del call  # before the student's layer is loaded
        if layer in mine and _step_of(stage.state(layer)) < part.last:
            _train_layer(stage, part, layer, store)
        store = store.turned()
    store.remove()


@dataclass(frozen=True)
class _Store:
    """Hidden states [windows, T, D] that enter and leave a layer of the teacher, in two files."""

    inputs: Tensor
    outputs: Tensor
    files: tuple[Path, Path]

    @classmethod
    def of(cls, stage: _Stage, windows: int) -> _Store:
        rank = int(stage.run.accelerator.process_index)
        files = tuple(stage.folder / f"hidden-{rank}-{side}.bin" for side in "ab")
        shape = (windows, stage.run.length, stage.run.training.model.hidden_size)
        inputs, outputs = (mapped(file, shape, stage.teacher.dtype) for file in files)
        return cls(inputs, outputs, (files[0], files[1]))

    def turned(self) -> _Store:
        """What left this layer enters the next."""
        return replace(self, inputs=self.outputs, outputs=self.inputs)

    def remove(self) -> None:
        for file in self.files:
            file.unlink(missing_ok=True)


def _train_layer(stage: _Stage, part: _Round, layer: int, store: _Store) -> None:
    """Train one layer through one round, and write its state: weights, moments, and the step it has come to."""
    run, settings, rate = stage.run, stage.run.settings, stage.rate
    losses = [entry["loss"] for entry in curves.keep(stage.history(layer), lambda entry: entry["step"] <= part.first)]
    torch.manual_seed(settings.seed + layer)
    module = stage.student.layer(layer)
    parameters = _prepare(stage, module, layer)
    chosen = optimizers(settings, {stage.student.prefix(layer) + name: p for name, p in parameters.items()})
    _restore(stage.state(layer), parameters, chosen)
    scaler = torch.amp.GradScaler(run.accelerator.device.type, enabled=settings.precision == "fp16")
    call = LayerCall(module, stage.keywords[0][layer])
    factor, size = rate_factor(settings, stage.steps), settings.batch_size
    place = {int(row): at for at, row in enumerate(part.rows)}
    harmless = HARMLESS_SHARE * float(store.outputs[: stage.part].float().square().mean())
    recent: list[Tensor] = []
    started = time.monotonic()
    for step in range(part.first, part.last):
        set_rate(chosen, rate * factor(step))
        rows = rows_of(len(run.corpus.train), step=step, batch_size=size, seed=settings.seed)
        at = torch.tensor([place[int(row)] for row in rows])
        recent.append(_step(stage, call, store, at, chosen, scaler))
        if (step + 1) % LOGGED == 0 or step + 1 == part.last:
            losses.append(float(torch.stack(recent).mean()))
            recent = []
            judge(losses, f"step {step + 1} of layer {layer}", f"finished layers are kept in {stage.folder}", harmless)
            entry = {"stage": "layerwise", "layer": layer, "step": step + 1, "tokens": (step + 1) * size * run.length}
            curves.append(stage.history(layer), {**entry, "loss": losses[-1]})
            speed = (step + 1 - part.first) * size * run.length / (time.monotonic() - started)
            detail = f"loss {losses[-1]:.4g}, {speed:,.0f} tokens/s"
            run.training.report(Progress(f"heal layer {layer}", step + 1, stage.steps, "steps", detail))
            run.accelerator.log({f"layer {layer} loss": losses[-1]}, step=step + 1)
    if not all(bool(parameter.isfinite().all()) for parameter in parameters.values()):
        judge([*losses, math.nan], f"the last step of layer {layer}", f"finished layers are kept in {stage.folder}")
    _save(stage.state(layer), parameters, chosen, part.last)


def _prepare(stage: _Stage, module: nn.Module, layer: int) -> dict[str, nn.Parameter]:
    """Make the chosen parameters of a layer trainable, in float32, and freeze the others; returns them by name."""
    prefix = stage.student.prefix(layer)
    selection = stage.run.selection
    attach(module, relative(selection.lora, prefix))
    full = {name.removeprefix(prefix) for name in selection.full if name.startswith(prefix)}
    found = {}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in full or is_factor(name))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            found[name] = parameter
    return found


def relative(ranks: Mapping[str, Rank], prefix: str) -> dict[str, Rank]:
    """The entries below `prefix`, named relative to it."""
    return {name.removeprefix(prefix): rank for name, rank in ranks.items() if name.startswith(prefix)}


def _step(
    stage: _Stage, call: LayerCall, store: _Store, at: Tensor, chosen: Optimizers, scaler: torch.amp.GradScaler
) -> Tensor:
    """One optimizer step; returns the loss."""
    accelerator, total = stage.run.accelerator, torch.zeros((), device=stage.run.accelerator.device)
    for rows in at.split(stage.part):
        inputs, wanted = (held[rows].to(accelerator.device) for held in (store.inputs, store.outputs))
        with accelerator.autocast():
            loss = hidden_mse(wanted, call.run(inputs)) * (len(rows) / len(at))
        scaler.scale(loss).backward()
        total += loss.detach()
    if stage.run.settings.max_grad_norm is not None:
        for one in chosen:
            scaler.unscale_(one)
        owned = [p for one in chosen for group in one.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(owned, stage.run.settings.max_grad_norm)
    for one in chosen:
        scaler.step(one)
        one.zero_grad()
    scaler.update()
    return total.cpu()


def _save(path: Path, parameters: Mapping[str, nn.Parameter], chosen: Optimizers, step: int) -> None:
    """Weights as `weight/NAME`, what the optimizer keeps of them as `state/KEY/NAME`."""
    tensors = {f"weight/{name}": parameter.data.cpu() for name, parameter in parameters.items()}
    kept = {parameter: state for one in chosen for parameter, state in one.state.items()}
    for name, parameter in parameters.items():
        tensors |= {f"state/{key}/{name}": value.cpu() for key, value in kept.get(parameter, {}).items()}
    temporary = path.with_suffix(".writing")
    with environment_errors(path):
        save_file(tensors, temporary, {"step": str(step)})
        temporary.replace(path)


def _restore(path: Path, parameters: Mapping[str, nn.Parameter], chosen: Optimizers) -> None:
    """Take up weights and the optimizers' states where an earlier round left them."""
    if not _step_of(path):
        return
    owner = {parameter: one for one in chosen for group in one.param_groups for parameter in group["params"]}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - the file is no mapping
            kind, _, name = key.partition("/")
            if kind == "weight":
                parameters[name].data.copy_(file.get_tensor(key))
                continue
            entry, _, name = name.partition("/")
            parameter, value = parameters[name], file.get_tensor(key)
            kept = value if entry == "step" else value.to(parameter.device)  # AdamW counts its steps on the processor
            owner[parameter].state[parameter][entry] = kept


def _step_of(path: Path) -> int:
    """The step that a layer's state has come to; 0 where there is none."""
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def _result(stage: _Stage, layer: int) -> Iterator[tuple[str, Tensor]]:
    """The trained tensors of one layer, factors merged."""
    prefix = stage.student.prefix(layer)
    with safe_open(stage.state(layer), "pt") as file:
        names = [name.removeprefix("weight/") for name in file.keys() if name.startswith("weight/")]  # noqa: SIM118
        values = {name: file.get_tensor(f"weight/{name}") for name in names}
    yield from ((prefix + stored_name(name), value) for name, value in values.items() if not is_factor(name))
    ranks = relative(stage.run.selection.lora, prefix)
    if ranks:
        from surgery.checkpoint.evaluate import load

        student = stage.student.checkpoint
        for name in ranks:
            stem = name.removesuffix(".weight")
            values[f"{stem}.base_layer.weight"] = load(student, student.tensors[prefix + name])
        yield from ((prefix + name, value) for name, value in merged(values, ranks))
