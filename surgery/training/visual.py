"""Training the scorer of visual tokens: first from attention inside the model, then from the answers.

The two stages, and attention at one deep layer as a target, are CoViPAL's (arXiv 2508.17243); the form of the first
loss, choosing the layer by how well it prunes, and the relaxation of the second stage are ours: hard masks with
straight-through gradients, as soft ones let dropped tokens leak into the answer.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from surgery.calibration.loading import causal_lm, check_device
from surgery.calibration.pictures import IGNORED, Batch, Batches, Question, drawn_questions, read_questions
from surgery.calibration.store import load_statistics, store_statistics
from surgery.checkpoint.writer import environment_errors
from surgery.errors import UsageError
from surgery.metrics.plots import require_plots
from surgery.operations.base import Statistics, Training
from surgery.operations.visual_pruning import Train, VisualPruningSettings, token_ids
from surgery.planning import FLOAT32_LIMIT
from surgery.progress import Progress
from surgery.runtime.surgery_visual_scorer import VisualScorer, best, diverse, reserved, runs
from surgery.training import curves
from surgery.training.processes import several
from surgery.training.run import judge

HELD_OUT, LEAST_HELD_OUT, MOST_HELD_OUT = 0.1, 16, 256  # questions
CALIBRATED = 128  # questions that choose the guiding layer
COST = 12.0  # nats by which dropped tokens are hidden: less lets them leak, more stops the gradient
SHARPNESS = 2.0  # of scores, in units of their spread, before noise
WARMUP = 0.03
LOGGED = 10  # steps over which a recorded loss is averaged
LOWEST = -1e9

Choose = Callable[[Tensor, Tensor, int], Tensor]  # visual [V, D], text [T, D], how many -> ascending indices


@dataclass(frozen=True)
class Prompt:
    """What the language model of a batch is given, and where its visual and its text tokens are.

    embeds [B, L, D], position as the model has it, valid, visual and text [B, L], labels [B, L]. Answers are no text.
    """

    embeds: Tensor
    position: Tensor
    extra: dict[str, Any]
    valid: Tensor
    visual: Tensor
    text: Tensor
    labels: Tensor

    def images(self) -> Iterator[tuple[int, Tensor]]:
        """Row and columns of every image."""
        for row in range(len(self.visual)):
            yield from ((row, columns) for columns in runs(self.visual[row]))

    def mask(self) -> Tensor:
        """What attention adds without pruning, float [B, 1, L, L]: nothing, or so little that it hides."""
        length = self.valid.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.valid.device).tril()
        seen = causal & self.valid[:, None]
        seen |= torch.eye(length, dtype=torch.bool, device=seen.device)  # or padding would see nothing
        return torch.where(seen, 0.0, LOWEST)[:, None].to(self.embeds.dtype)


class _Stop(Exception):
    pass


class Model:
    """The base, frozen, taken apart where its language model begins."""

    def __init__(self, training: Training, tokens: Sequence[int]) -> None:
        small = training.student.parameter_count * 4 <= FLOAT32_LIMIT
        self.whole: Any = causal_lm(training.student, torch.float32 if small else "auto")
        self.whole.to(training.device).eval().requires_grad_(False)
        self.inner: Any = self.whole.model.language_model
        self.tokens = torch.tensor(tokens, device=training.device)

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.inner.layers)

    @torch.no_grad()
    def prompt(self, batch: Batch) -> Prompt:
        """Run everything before the language model."""
        caught: dict[str, Any] = {}

        def catch(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            caught.update(kwargs)
            raise _Stop

        handle = self.inner.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            self.whole(**batch.inputs, use_cache=False)
        except _Stop:
            pass
        finally:
            handle.remove()
        ids, valid = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
        position = caught.get("position_ids")
        if position is None:
            position = (valid.long().cumsum(1) - 1).clamp(min=0)
        visual = torch.isin(ids, self.tokens) & valid
        extra: dict[str, Any] = {
            name: caught[name] for name in ("visual_pos_masks", "deepstack_visual_embeds") if name in caught
        }
        text = valid & ~visual & (batch.labels == IGNORED)
        return Prompt(caught["inputs_embeds"], position, extra, valid, visual, text, batch.labels)

    def logits(self, prompt: Prompt, mask: Tensor) -> Tensor:
        """Logits at the places before answer tokens [A, vocabulary], under a mask [B, 1, L, L]."""
        output = self.inner(
            inputs_embeds=prompt.embeds, attention_mask=mask, position_ids=prompt.position, use_cache=False,
            **prompt.extra,
        )  # fmt: skip
        found: Tensor = self.whole.lm_head(output.last_hidden_state[:, :-1][prompt.labels[:, 1:] != IGNORED])
        return found.float()

    @contextmanager
    def attention(self, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Keep attention weights [B, H, L, L] of these layers, for calls inside the block."""
        kept: dict[int, Tensor] = {}
        changed = {index: self.inner.layers[index].self_attn for index in layers}
        configs = {index: attention.config for index, attention in changed.items()}
        handles = []
        for index, attention in changed.items():
            attention.config = copy.deepcopy(configs[index])
            attention.config._attn_implementation = "eager"  # noqa: SLF001 - the only way that gives weights

            def keep(_module: Any, _args: Any, output: Any, index: int = index) -> None:
                kept[index] = output[1]

            handles.append(attention.register_forward_hook(keep))
        try:
            yield kept
        finally:
            for handle in handles:
                handle.remove()
            for index, attention in changed.items():
                attention.config = configs[index]


def train_scorer(training: Training, settings: VisualPruningSettings) -> Statistics:
    """Train a scorer for the base; returns its tensors, and what was recorded.

    What an earlier run finished is taken from its folder. Raises UsageError for data that cannot be used, and
    TrainingDiverged.
    """
    plan = settings.train
    if plan is None:
        raise UsageError("there is nothing to train", cause="train is not set", remedy="set visual_pruning.train")
    if several():
        raise UsageError(
            "visual_pruning trains in one process", cause="a launcher started several",
            remedy="run surgery convert without it",
        )  # fmt: skip
    result = training.folder / "trained.safetensors"
    if result.is_file():
        return load_statistics(result)
    check_device(training.device)
    require_plots("training draws its loss curves", extra="vision")
    learned, held_out = _divided(plan)
    model = Model(training, token_ids(training.model))
    run = _Run(training, settings, plan, model, Batches(training.teacher, training.device))
    found = run.train(learned, held_out)
    with environment_errors(training.folder):
        training.folder.mkdir(parents=True, exist_ok=True)
    store_statistics(result, found)
    return found


def _divided(plan: Train) -> tuple[list[Question], list[Question]]:
    """What is learned from, and what judges, which is about other images."""
    if plan.images == "builtin":
        judges = drawn_questions(MOST_HELD_OUT, seed=plan.seed, heldout=True)
        return drawn_questions(plan.questions, seed=plan.seed, heldout=False), judges
    questions = read_questions(plan.images.path, plan.images.given)
    draw = random.Random(plan.seed)  # noqa: S311 - no secret
    shown = list(dict.fromkeys(question.images for question in questions))
    draw.shuffle(shown)
    wanted = min(max(int(HELD_OUT * len(questions)), LEAST_HELD_OUT), MOST_HELD_OUT)
    held_out: list[Question] = []
    by_images: dict[Any, list[Question]] = {}
    for question in questions:
        by_images.setdefault(question.images, []).append(question)
    while shown and len(held_out) < wanted:
        held_out += by_images.pop(shown.pop())
    learned = [question for asked in by_images.values() for question in asked]
    if len(learned) < plan.batch_size or not held_out:
        raise UsageError(
            f"{plan.images.given} has {len(questions)} questions", remedy="give more, or a smaller batch_size",
            cause=f"{len(held_out)} of them are held out with their images, and a batch takes {plan.batch_size}",
        )  # fmt: skip
    return learned, held_out[:MOST_HELD_OUT]


@dataclass(frozen=True)
class _Run:
    training: Training
    settings: VisualPruningSettings
    plan: Train
    model: Model
    batches: Batches

    def train(self, questions: Sequence[Question], held_out: Sequence[Question]) -> Statistics:
        plan = self.plan
        torch.manual_seed(plan.seed)
        size = plan.scorer
        scorer = VisualScorer(self.training.model.hidden_size, size.width, size.heads, size.layers)
        scorer.to(self.training.device)
        guide, tried = self._guide(questions[:CALIBRATED])
        steps = max(2, math.ceil(plan.epochs * len(questions) / plan.batch_size))
        first = round(plan.guided * steps)
        history: list[curves.Entry] = []
        guided, answered = self._attention_loss(scorer, guide), self._answer_loss(scorer)
        self._loop(scorer, "attention", guided, plan.learning_rate, first, questions, history)
        self._loop(scorer, "answers", answered, plan.learning_rate / 2, steps - first, questions, history)
        return self._conclude(scorer.eval(), held_out, history, guide, tried, len(questions))

    def _loop(
        self, scorer: VisualScorer, stage: str, loss_of: Callable[[Prompt], Tensor], rate: float, steps: int,
        questions: Sequence[Question], history: list[curves.Entry],
    ) -> None:  # fmt: skip
        if not steps:
            return
        from transformers import get_cosine_schedule_with_warmup

        optimizer = torch.optim.AdamW(scorer.parameters(), lr=rate, weight_decay=0.01)
        scheduler = get_cosine_schedule_with_warmup(optimizer, math.ceil(WARMUP * steps), steps)
        draw = random.Random(f"{self.plan.seed} {stage}")  # noqa: S311 - no secret
        order: list[Question] = []
        losses: list[float] = []
        for step in range(1, steps + 1):
            while len(order) < self.plan.batch_size:
                order += draw.sample(list(questions), len(questions))
            chosen, order = order[: self.plan.batch_size], order[self.plan.batch_size :]
            loss = loss_of(self.model.prompt(self.batches(chosen)))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                judge(losses, f"step {step} of {stage}", "nothing was kept")
            if step % LOGGED == 0 or step == steps:
                recent = losses[-LOGGED:]
                seen = step * self.plan.batch_size
                history.append({"stage": stage, "step": step, "tokens": seen, "loss": sum(recent) / len(recent)})
            self.training.report(Progress(f"train on {stage}", step, steps, "steps"))

    def _scores(self, scorer: VisualScorer, prompt: Prompt) -> list[Tensor]:
        """Scores [V] of every image, those of equal shape computed together."""
        places = list(prompt.images())
        shapes: dict[tuple[int, int], list[int]] = {}
        for number, (row, columns) in enumerate(places):
            shapes.setdefault((len(columns), int(prompt.text[row].sum())), []).append(number)
        found: dict[int, Tensor] = {}
        for numbers in shapes.values():
            visual = torch.stack([prompt.embeds[places[n][0], places[n][1]] for n in numbers])
            text = torch.stack([prompt.embeds[places[n][0], prompt.text[places[n][0]]] for n in numbers])
            found.update(zip(numbers, scorer(visual.float(), text.float()), strict=True))
        return [found[number] for number in range(len(places))]

    def _attention_loss(self, scorer: VisualScorer, layer: int) -> Callable[[Prompt], Tensor]:
        def loss(prompt: Prompt) -> Tensor:
            with torch.no_grad(), self.model.attention([layer]) as kept:
                self.model.logits(prompt, prompt.mask())
            targets = received(prompt, kept[layer])
            pairs = list(zip(self._scores(scorer, prompt), targets, strict=True))
            if self.plan.attention_loss == "mse":
                return torch.stack([functional.mse_loss(score, target) for score, target in pairs]).mean()
            shares = [functional.cross_entropy(score, target / target.sum()) for score, target in pairs]
            return torch.stack(shares).mean()

        return loss

    def _answer_loss(self, scorer: VisualScorer) -> Callable[[Prompt], Tensor]:
        def loss(prompt: Prompt) -> Tensor:
            mask = prompt.mask()
            with torch.no_grad():
                whole = self.model.logits(prompt, mask).log_softmax(-1)
            hidden = torch.zeros_like(prompt.embeds[..., 0])
            for (row, columns), scores in zip(prompt.images(), self._scores(scorer, prompt), strict=True):
                count = reserved(len(columns), self.settings.reserve, self.settings.min_keep)
                hidden = hidden.index_put(
                    (torch.full_like(columns, row), columns), relaxed(scores, count).to(hidden.dtype)
                )
            found = self.model.logits(prompt, mask + against(hidden)).log_softmax(-1)
            answers = prompt.labels[:, 1:][prompt.labels[:, 1:] != IGNORED]
            right = functional.nll_loss(found, answers)
            apart = functional.kl_div(found, whole, log_target=True, reduction="batchmean")
            return right + self.plan.divergence * apart

        return loss

    @torch.no_grad()
    def _guide(self, questions: Sequence[Question]) -> tuple[int, dict[int, float]]:
        """The layer whose attention, if it decided alone, would hurt the answers least; loss by layer tried."""
        layers = [self.plan.guide_layer] if self.plan.guide_layer is not None else list(range(self.model.layers))
        losses = dict.fromkeys(layers, 0.0)
        for prompt in self._prompts(questions):
            with self.model.attention(layers) as kept:
                self.model.logits(prompt, prompt.mask())
            for layer in layers:
                scores = received(prompt, kept[layer])
                losses[layer] += float(self._pruned_loss(prompt, scores)[0])
        return min(losses, key=lambda layer: (losses[layer], layer)), losses

    def _prompts(self, questions: Sequence[Question]) -> Iterator[Prompt]:
        for start in range(0, len(questions), self.plan.batch_size):
            yield self.model.prompt(self.batches(questions[start : start + self.plan.batch_size]))

    def _pruned_loss(self, prompt: Prompt, scores: Sequence[Tensor] | None) -> tuple[Tensor, int]:
        """Summed loss of the answers, and how many are right word for word, where each image keeps its best tokens."""
        mask = (
            prompt.mask() if scores is None else keeping(prompt, scores, self.settings.reserve, self.settings.min_keep)
        )
        logits = self.model.logits(prompt, mask)
        answers = prompt.labels[:, 1:]
        loss = functional.cross_entropy(logits, answers[answers != IGNORED], reduction="sum")
        return loss, answered(prompt, logits)

    @torch.no_grad()
    def _right(self, questions: Sequence[Question], scores: Callable[[Prompt], list[Tensor] | None]) -> float:
        """Share of questions answered right, word for word, given the words before."""
        right = sum(self._pruned_loss(prompt, scores(prompt))[1] for prompt in self._prompts(questions))
        return right / len(questions)

    def _conclude(
        self, scorer: VisualScorer, held_out: Sequence[Question], history: list[curves.Entry], guide: int,
        tried: dict[int, float], learned: int,
    ) -> Statistics:  # fmt: skip
        draw = torch.Generator(device="cpu").manual_seed(self.plan.seed)

        def untrained(prompt: Prompt) -> list[Tensor]:
            return as_scores(prompt, diverse, self.settings.reserve, self.settings.min_keep)

        def at_random(prompt: Prompt) -> list[Tensor]:
            return [torch.rand(len(columns), generator=draw).to(columns.device) for _, columns in prompt.images()]

        right = {
            "everything": self._right(held_out, lambda _: None),
            "scorer": self._right(held_out, lambda prompt: self._scores(scorer, prompt)),
            "untrained": self._right(held_out, untrained),
            "random": self._right(held_out, at_random),
        }
        share = f"{self.settings.reserve:g}"
        name = "the drawn pictures" if self.plan.images == "builtin" else self.plan.images.given
        notes = [f"visual_pruning: the scorer learned from {learned} questions of {name}, guided by layer {guide}"]
        notes.append(
            f"of {len(held_out)} held-out questions {right['scorer']:.1%} are answered right with {share} of visual "
            f"tokens, {right['everything']:.1%} with all; the untrained rule gives {right['untrained']:.1%}, tokens at "
            f"random {right['random']:.1%}"
        )
        if right["scorer"] <= right["random"] < right["everything"]:
            notes.append("the scorer is no better than chance: more data, epochs, or another guide_layer may help")
        record = {
            "questions": learned, "held_out": len(held_out), "right": right, "guide_layer": guide,
            "guide_losses": {str(layer): loss for layer, loss in tried.items()},
        }  # fmt: skip
        summary = {"settings": self.settings.model_dump(mode="json"), **record, "torch": torch.__version__}
        curves.publish(self.training.record, summary, history)
        tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in scorer.state_dict().items()}
        return Statistics(tensors, {"notes": notes, "record": record}, self.training.fingerprint)


def keeping(prompt: Prompt, scores: Sequence[Tensor], reserve: float, least: int = 1) -> Tensor:
    """What is added to attention [B, 1, L, L] so that each image keeps the best of its tokens, by their scores [V]."""
    hidden = torch.zeros_like(prompt.embeds[..., 0])
    for (row, columns), of_image in zip(prompt.images(), scores, strict=True):
        dropped = torch.ones(len(columns), dtype=torch.bool, device=columns.device)
        dropped[best(of_image, reserved(len(columns), reserve, least))] = False
        hidden[row, columns[dropped]] = LOWEST
    return (prompt.mask() + against(hidden)).clamp(min=LOWEST)


def as_scores(prompt: Prompt, choose: Choose, reserve: float, least: int = 1) -> list[Tensor]:
    """What a rule chooses of each image, as scores [V]: ones among zeros."""
    found = []
    for row, columns in prompt.images():
        visual, text = prompt.embeds[row, columns], prompt.embeds[row, prompt.text[row]]
        chosen = choose(visual, text, reserved(len(columns), reserve, least))
        found.append(torch.zeros(len(columns), device=columns.device).index_fill_(0, chosen, 1.0))
    return found


def answered(prompt: Prompt, logits: Tensor) -> int:
    """How many questions of a batch are answered right, word for word, by logits [A, vocabulary] before answers."""
    answers = prompt.labels[:, 1:]
    real = answers != IGNORED
    wrong = torch.zeros_like(real)
    wrong[real] = logits.argmax(-1) != answers[real]
    return int((~wrong.any(1)).sum())


def received(prompt: Prompt, weights: Tensor) -> list[Tensor]:
    """What each image's tokens receive from the prompt's text behind them, of weights [B, H, L, L]; the most is 1."""
    found = []
    places = torch.arange(weights.shape[-1], device=weights.device)
    for row, columns in prompt.images():
        asks = prompt.text[row] & (places > columns[-1])
        given = weights[row][:, asks][:, :, columns].float().sum((0, 1))
        found.append(given / given.max().clamp(min=1e-12))
    return found


def against(hidden: Tensor) -> Tensor:
    """What is added to attention [B, 1, L, L] so that columns are hidden by [B, L]; a token always sees itself."""
    length = hidden.shape[1]
    others = 1 - torch.eye(length, dtype=hidden.dtype, device=hidden.device)
    return (hidden[:, None] * others)[:, None]


def relaxed(scores: Tensor, count: int) -> Tensor:
    """What hides each of the tokens [V] whose scores are not, with noise, among the best `count`; it has a gradient.

    The value is 0 or -COST. The gradient is that of log p, p having the sum `count` (found by bisection).
    """
    noise = -torch.empty_like(scores).exponential_().log()  # Gumbel
    spread = scores.std().clamp(min=1e-6) if len(scores) > 1 else scores.new_ones(())
    wanted = SHARPNESS * (scores - scores.mean()) / spread + noise
    with torch.no_grad():
        low, high = wanted.min() - 20, wanted.max() + 20
        for _ in range(30):
            middle = (low + high) / 2
            if float((wanted - middle).sigmoid().sum()) > count:
                low = middle
            else:
                high = middle
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[wanted.topk(count).indices] = True
    likely = functional.logsigmoid(wanted - middle)
    return torch.where(kept, 0.0, -COST) + (likely - likely.detach())
