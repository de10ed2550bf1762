"""End-to-end healing: the whole student against the teacher, or against the text, by accelerate.

A step is a function of its number: which windows it sees and its rate need no state. So a run that was killed takes up
the newest saved state (weights, moments, random numbers) and goes on to the same weights.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from surgery.calibration.loading import causal_lm
from surgery.checkpoint.writer import environment_errors
from surgery.errors import EnvironmentFailure, UsageError
from surgery.operations.heal import EndToEnd
from surgery.progress import Progress
from surgery.training import curves
from surgery.training.adapters import attach, is_factor, merged, stored_name
from surgery.training.data import rows_of
from surgery.training.losses import next_token
from surgery.training.processes import release
from surgery.training.run import Run, divided, judge, optimizers, rate_factor, set_rate
from surgery.training.teacher import Teacher, opened_teacher

KEPT_STATES = 2
HELDOUT_WINDOWS = 32
LOGGED = 10  # steps over which a recorded loss is averaged
TRAINED = "trained.safetensors"
KIND = "distributed_type"


@dataclass(frozen=True)
class _Loop:
    """What the steps share. `model` is prepared by accelerate; `names` are its parameters that train."""

    run: Run
    settings: EndToEnd
    teacher: Teacher
    model: Any
    optimizers: list[Any]
    names: tuple[str, ...]
    steps: int
    part: int

    @property
    def folder(self) -> Path:
        return self.run.folder / "end_to_end"

    @property
    def history(self) -> Path:
        return self.folder / "history.jsonl"


def end_to_end(run: Run, earlier: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[curves.Entry]]:
    """Train from the tensors `earlier` on; returns the trained tensors in float32 by name (on the process that leads).

    Raises TrainingDiverged, and UnsupportedModel where a tensor to be trained is no parameter of the loaded model.
    """
    settings, accelerator = run.settings.end_to_end, run.accelerator
    if settings is None:
        return dict(earlier), []
    part = divided(run.settings, accelerator.num_processes)
    torch.manual_seed(run.settings.seed)
    student = _student(run, earlier)
    trained = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    names = tuple(trained)
    chosen = optimizers(run.settings, trained)
    _check_launch(run, len(chosen))
    _tell_deepspeed(run, part)
    model, *chosen = accelerator.prepare(student, *chosen)
    del student, trained
    with opened_teacher(run, settings, part) as teacher, _trained_states_only(run, set(names)):
        loop = _Loop(run, settings, teacher, model, chosen, names, run.steps(settings.tokens), part)
        with environment_errors(loop.folder):
            loop.folder.mkdir(parents=True, exist_ok=True)
        _train(loop)
        history = curves.read(loop.history) if run.main else []
        result = _gathered(loop, earlier)
    del loop, model, chosen
    release(accelerator)
    return result, history


def _check_launch(run: Run, count: int) -> None:
    """Raise UsageError where accelerate cannot divide what steps the parameters: it saves one optimizer a model."""
    kind = str(run.accelerator.distributed_type).rpartition(".")[2]
    if run.settings.optimizer == "muon" and (kind == "DEEPSPEED" or (kind == "FSDP" and count > 1)):
        raise UsageError(
            f"optimizer muon does not run under {kind}", cause="accelerate divides one optimizer, this needs two",
            remedy="set heal.optimizer to adamw, or launch whole copies (docs/accelerate/ddp.yaml)",
        )  # fmt: skip


def _tell_deepspeed(run: Run, part: int) -> None:
    """DeepSpeed would ask a data loader for its sizes, and clips by itself."""
    plugin = getattr(run.accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": part,
            "gradient_accumulation_steps": run.settings.gradient_accumulation_steps,
            "gradient_clipping": run.settings.max_grad_norm or 0.0,
            "zero_allow_untested_optimizer": True,
        }


def _student(run: Run, earlier: Mapping[str, Tensor]) -> Any:
    """The student with what earlier training gave it; the chosen parameters trainable in float32, the others frozen."""
    checkpoint = run.training.student
    model = causal_lm(checkpoint, run.weights_dtype(checkpoint) or "auto")
    there = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in earlier.items():
            there[name].copy_(tensor)
    attach(model, run.selection.lora)
    full = set(run.selection.full)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in full or is_factor(name))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if name in earlier:  # once more, where the model's own type had rounded it
                parameter.data.copy_(earlier[name])
    if run.settings.gradient_checkpointing:
        # The method was renamed, with a warning under the old name.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    model.config.use_cache = False
    return model.train()


def _train(loop: _Loop) -> None:
    """All steps that are left."""
    run = loop.run
    done = _resume(loop)
    history = _history(loop, done)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    factor = rate_factor(run.settings, loop.steps)
    recent: list[Tensor] = []
    clock = _Clock(done)
    first = next((entry for entry in history if "heldout" in entry), None)
    if first is None:
        first = _heldout(loop)
        _record(loop, 0, first)
    for step in range(done, loop.steps):
        set_rate(loop.optimizers, loop.settings.learning_rate * factor(step))
        recent.append(_step(loop, step))
        saves = (step + 1) % run.settings.save_steps == 0 or step + 1 == loop.steps
        if (step + 1) % LOGGED and not saves:
            continue
        losses.append(float(torch.stack(recent).mean()))
        recent = []
        judge(losses, f"step {step + 1}", _last_good(loop))
        speed = clock.speed(step + 1) * run.settings.batch_size * run.length
        found = _heldout(loop) if saves else {}
        if saves:  # before the weights are kept: the last update is in no training loss yet
            judge([first["heldout"], found["heldout"]], f"step {step + 1}, on held-out text", _last_good(loop))
        _record(loop, step + 1, {"loss": losses[-1], **found}, speed=speed)
        if saves:
            _save(loop, step + 1)


def _step(loop: _Loop, step: int) -> Tensor:
    """One optimizer step over this process' share of the batch; returns the mean loss over all processes."""
    run, accelerator = loop.run, loop.run.accelerator
    size, count = run.settings.batch_size, int(accelerator.num_processes)
    rows = rows_of(len(run.corpus.train), step=step, batch_size=size, seed=run.settings.seed)
    mine = rows[int(accelerator.process_index) * size // count :][: size // count]
    total = torch.zeros((), device=accelerator.device)
    for taken in mine.split(loop.part):
        with accelerator.accumulate(loop.model):
            loss = _loss(loop, "train", run.corpus.train, taken)
            accelerator.backward(loss)
            total += loss.detach()
            if accelerator.sync_gradients and run.settings.max_grad_norm is not None:
                accelerator.clip_grad_norm_(loop.model.parameters(), run.settings.max_grad_norm)
            for chosen in loop.optimizers:
                chosen.step()
                chosen.zero_grad()
    mean: Tensor = accelerator.reduce(total / run.settings.gradient_accumulation_steps, "mean")
    return mean.cpu()


def _loss(loop: _Loop, side: str, windows: Tensor, rows: Tensor) -> Tensor:
    tokens = windows[rows].long().to(loop.run.accelerator.device)
    if loop.settings.loss == "next_token":
        return next_token(loop.model(input_ids=tokens, use_cache=False).logits, tokens)
    weight = loop.settings.hidden_weight
    found = loop.model(input_ids=tokens, use_cache=False, output_hidden_states=weight > 0)
    divergence, inside = loop.teacher.compare(side, rows, tokens, found)
    return divergence + weight * inside


@torch.no_grad()
def _heldout(loop: _Loop) -> dict[str, float]:
    """On held-out windows: divergence from the teacher in nats per token, perplexity, and the one that is trained for.

    Every process computes the same.
    """
    rows = torch.arange(min(len(loop.run.corpus.heldout), HELDOUT_WINDOWS))
    loop.model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    for part in rows.split(loop.part):
        tokens = loop.run.corpus.heldout[part].long().to(loop.run.accelerator.device)
        answer = loop.model(input_ids=tokens, use_cache=False)
        found = loop.teacher.kl("heldout", part, tokens, answer.logits), next_token(answer.logits, tokens)
        sums += torch.stack(found).double().cpu() * len(part)
    loop.model.train()
    divergence, surprise = (sums / len(rows)).tolist()
    loss = surprise if loop.settings.loss == "next_token" else divergence
    return {"heldout": loss, "kl": divergence, "perplexity": math.exp(min(surprise, 700.0))}


def _record(loop: _Loop, step: int, found: Mapping[str, float], *, speed: float = 0.0) -> None:
    """Write a line of the history, tell the trackers, and report."""
    run = loop.run
    run.accelerator.log(found, step=step)
    if not run.main:
        return
    tokens = step * run.settings.batch_size * run.length
    entry = {"stage": "end_to_end", "step": step, "tokens": tokens, "tokens_per_second": round(speed, 1)}
    curves.append(loop.history, {**entry, **found})
    words = [f"{name} {found[name]:.4g}" for name in ("loss", "heldout", "kl", "perplexity") if name in found]
    words += [f"{speed:,.0f} tokens/s"] if speed else []
    run.training.report(Progress("heal end to end", step, loop.steps, "steps", ", ".join(words)))


class _Clock:
    """Steps per second since this process began."""

    def __init__(self, done: int) -> None:
        self._done, self._started = done, time.monotonic()

    def speed(self, step: int) -> float:
        return (step - self._done) / max(time.monotonic() - self._started, 1e-9)


def _states(loop: _Loop) -> dict[int, Path]:
    """Saved states by step; each was renamed into place when it was whole."""
    return dict(sorted((int(path.name.removeprefix("state-")), path) for path in loop.folder.glob("state-*")))


def _save(loop: _Loop, step: int) -> None:
    """Save a state whole, then drop those that are older than the newest two."""
    accelerator, temporary = loop.run.accelerator, loop.folder / "writing"
    if loop.run.main:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        with environment_errors(loop.folder):
            accelerator.save_state(str(temporary))
            if loop.run.main:
                (temporary / KIND).write_text(str(accelerator.distributed_type), encoding="utf-8")
    except (RuntimeError, SafetensorError) as error:  # what torch and safetensors make of a full disk
        raise EnvironmentFailure(
            f"the state of step {step} could not be saved", cause=f"{type(error).__name__}: {error}",
            remedy="check the disk of OUT, then run the same command again",
        ) from error  # fmt: skip
    accelerator.wait_for_everyone()
    if loop.run.main:
        with environment_errors(loop.folder):
            temporary.rename(loop.folder / f"state-{step}")
            for path in list(_states(loop).values())[:-KEPT_STATES]:
                shutil.rmtree(path)
    accelerator.wait_for_everyone()


def _resume(loop: _Loop) -> int:
    """Load the newest state; returns the steps that it has behind it."""
    states = _states(loop)
    if not states:
        return 0
    step = max(states)
    kind = (states[step] / KIND).read_text(encoding="utf-8")
    if kind != str(loop.run.accelerator.distributed_type):
        raise UsageError(
            "training cannot go on under another kind of launch", cause=f"the state of step {step} was saved by {kind}",
            remedy="launch it as before, or start anew with --no-resume",
        )  # fmt: skip
    loop.run.accelerator.load_state(str(states[step]))
    return step


def _last_good(loop: _Loop) -> str:
    states = _states(loop)
    return f"the last good state is {states[max(states)]}" if states else "no state was saved before it"


def _history(loop: _Loop, done: int) -> list[curves.Entry]:
    """What is recorded up to the state that is resumed from; the process that leads drops the rest."""
    if loop.run.main:
        curves.keep(loop.history, lambda entry: entry["step"] <= done and done > 0)
    loop.run.accelerator.wait_for_everyone()
    return curves.read(loop.history)


@contextmanager
def _trained_states_only(run: Run, names: set[str]) -> Iterator[None]:
    """Let accelerate save only what trains of a model that is whole in every process: the rest does not change."""

    def save(_models: list[Any], weights: list[dict[str, Tensor]], folder: str) -> None:
        if weights and run.main:
            kept = {name: tensor.contiguous() for name, tensor in weights[0].items() if plain(name) in names}
            save_file(kept, Path(folder) / TRAINED)
        weights.clear()

    def load(models: list[nn.Module], folder: str) -> None:
        if models:
            models.pop().load_state_dict(load_file(Path(folder) / TRAINED), strict=False)

    handles = (
        run.accelerator.register_save_state_pre_hook(save),
        run.accelerator.register_load_state_pre_hook(load),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plain(name: str) -> str:
    """A parameter's name without what data parallelism put before it."""
    return name.removeprefix("module.")


def _gathered(loop: _Loop, earlier: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained tensors, whole, in float32 and with factors merged; empty where another process leads."""
    found: dict[str, Tensor] = loop.run.accelerator.get_state_dict(loop.model)
    if not loop.run.main:
        return {}
    values = {plain(name): tensor.detach().cpu() for name, tensor in found.items()}
    result = dict(earlier)
    result |= {stored_name(name): values[name].float() for name in loop.names if not is_factor(name)}
    return result | dict(merged(values, loop.run.selection.lora))
