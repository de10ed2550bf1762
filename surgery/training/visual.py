"""Training the scorer of visual tokens: first from attention inside the model, then from the answers.

The two stages, and attention at one deep layer as a target, are CoViPAL's (arXiv 2508.17243); the form of the first
loss, choosing the layer by how well it prunes, and the relaxation of the second stage are ours: hard masks with
straight-through gradients, as soft ones let dropped tokens leak into the answer. Where tokens leave before several
layers, each layer's scorer learns in turn, with those before it as they were found.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from surgery.calibration.layers import called_with
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
    Seen before a deeper `layer`: `states` [B, L, D] there, `gone` [B, L] left before earlier layers, from each of which
    on a mask of `earlier` holds.
    """

    embeds: Tensor
    position: Tensor
    extra: dict[str, Any]
    valid: Tensor
    visual: Tensor
    text: Tensor
    labels: Tensor
    layer: int = 0
    states: Tensor | None = None
    gone: Tensor | None = None
    earlier: Mapping[int, Tensor] = field(default_factory=dict)

    def images(self) -> Iterator[tuple[int, Tensor]]:
        """Row and columns of every image: of those tokens that are left."""
        for row in range(len(self.visual)):
            for columns in runs(self.visual[row]):
                yield row, columns if self.gone is None else columns[~self.gone[row, columns]]

    def counts(self, reserve: float, least: int) -> list[int]:
        """How many tokens of every image stay: a share of those that it had at the entry."""
        return [reserved(len(columns), reserve, least) for row in self.visual for columns in runs(row)]

    def seen(self, row: int, columns: Tensor) -> tuple[Tensor, Tensor]:
        """What scorers are given of an image and of its text, [V, D] and [T, D]."""
        states = self.embeds if self.states is None else self.states
        return states[row, columns], states[row, self.text[row]]

    def hidden(self) -> Tensor:
        """What hides columns [B, L] that left before."""
        none = torch.zeros_like(self.embeds[..., 0])
        return none if self.gone is None else none.masked_fill(self.gone, LOWEST)

    def mask(self) -> Tensor:
        """What attention adds without pruning, float [B, 1, L, L]: nothing, or so little that it hides."""
        length = self.valid.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.valid.device).tril()
        seen = causal & self.valid[:, None]
        seen |= torch.eye(length, dtype=torch.bool, device=seen.device)  # or padding would see nothing
        return torch.where(seen, 0.0, LOWEST)[:, None].to(self.embeds.dtype)


Scores = Callable[[Prompt, float], list[Tensor]]  # where a share of each image's tokens is to stay -> [V] of each


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
        _, caught = called_with(self.inner, lambda: self.whole(**batch.inputs, use_cache=False))
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

    def logits(self, prompt: Prompt, mask: Tensor | Mapping[int, Tensor]) -> Tensor:
        """Logits before answer tokens [A, vocabulary], under a mask [B, 1, L, L], or several, each from a layer on."""
        output = self._run(prompt, mask if isinstance(mask, Mapping) else {0: mask})
        found: Tensor = self.whole.lm_head(output.last_hidden_state[:, :-1][prompt.labels[:, 1:] != IGNORED])
        return found.float()

    @torch.no_grad()
    def before(self, prompt: Prompt, layer: int) -> Tensor:
        """States [B, L, D] that come to a layer, under the masks that hold before it."""
        (states, *_), _ = called_with(self.inner.layers[layer], lambda: self._run(prompt, prompt.earlier))
        found: Tensor = states
        return found

    def _run(self, prompt: Prompt, masks: Mapping[int, Tensor]) -> Any:
        masks = masks if 0 in masks else {0: prompt.mask(), **masks}

        def see(index: int) -> Callable[..., Any]:
            mask = masks[max(layer for layer in masks if layer <= index)]
            return lambda _module, args, kwargs: (args, kwargs | {"attention_mask": mask})

        layers = list(enumerate(self.inner.layers))[min((layer for layer in masks if layer), default=self.layers) :]
        handles = [layer.register_forward_pre_hook(see(index), with_kwargs=True) for index, layer in layers]
        try:
            return self.inner(
                inputs_embeds=prompt.embeds, attention_mask=masks[0], position_ids=prompt.position, use_cache=False,
                **prompt.extra,
            )  # fmt: skip
        finally:
            for handle in handles:
                handle.remove()

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

    @property
    def stages(self) -> Mapping[int, float]:
        """The share that is left before each layer where tokens leave."""
        return self.settings.stages or {0: self.settings.reserve}

    def train(self, questions: Sequence[Question], held_out: Sequence[Question]) -> Statistics:
        plan, size = self.plan, self.plan.scorer
        torch.manual_seed(plan.seed)
        steps = max(2, math.ceil(plan.epochs * len(questions) / plan.batch_size))
        first = round(plan.guided * steps)
        history: list[curves.Entry] = []
        guides: dict[int, dict[int, float]] = {}
        scorers: dict[int, VisualScorer] = {}
        for layer in self.stages:
            where = f" before layer {layer}" if self.settings.stages else ""
            scorer = VisualScorer(self.training.model.hidden_size, size.width, size.heads, size.layers)
            scorer.to(self.training.device)
            at = partial(self._descended, scores=self._by(scorers), until=layer)
            guides[layer] = self._guides(questions[:CALIBRATED], at)
            guided, answered = self._attention_loss(scorer, guide_of(guides[layer])), self._answer_loss(scorer)
            learn = partial(self._loop, scorer, at=at, questions=questions, history=history)
            learn(f"attention{where}", guided, plan.learning_rate, first)
            learn(f"answers{where}", answered, plan.learning_rate / 2, steps - first)
            scorers[layer] = scorer.eval().requires_grad_(False)
        return self._conclude(scorers, held_out, history, guides, len(questions))

    def _by(self, scorers: Mapping[int, VisualScorer]) -> Scores:
        return lambda prompt, _share: self._scores(scorers[prompt.layer], prompt)

    @torch.no_grad()
    def _descended(self, prompt: Prompt, scores: Scores, until: int | None = None) -> Prompt:
        """A prompt without what `scores` lets go before all layers, or those before `until`, where it then is."""
        for layer, share in self.stages.items():
            prompt = self._at(prompt, layer)
            if layer == until:
                break
            prompt = self._chosen(prompt, scores(prompt, share), share)
        return prompt

    def _at(self, prompt: Prompt, layer: int) -> Prompt:
        return replace(prompt, layer=layer, states=self.model.before(prompt, layer)) if layer else prompt

    def _chosen(self, prompt: Prompt, scores: Sequence[Tensor], share: float) -> Prompt:
        """A prompt whose images lost all but the best of their tokens before its layer."""
        gone = leaving(prompt, scores, share, self.settings.min_keep)
        return replace(prompt, gone=gone, earlier={**prompt.earlier, prompt.layer: without(prompt, gone)})

    def _loop(
        self, scorer: VisualScorer, stage: str, loss_of: Callable[[Prompt], Tensor], rate: float, steps: int, *,
        at: Callable[[Prompt], Prompt], questions: Sequence[Question], history: list[curves.Entry],
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
            loss = loss_of(at(self.model.prompt(self.batches(chosen))))
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
            visual, text = zip(*(prompt.seen(*places[number]) for number in numbers), strict=True)
            scores = scorer(torch.stack(visual).float(), torch.stack(text).float())
            found.update(zip(numbers, scores, strict=True))
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
            hidden, counts = prompt.hidden(), prompt.counts(self.stages[prompt.layer], self.settings.min_keep)
            for (row, columns), scores, count in zip(
                prompt.images(), self._scores(scorer, prompt), counts, strict=True
            ):
                hidden = hidden.index_put(
                    (torch.full_like(columns, row), columns), relaxed(scores, count).to(hidden.dtype)
                )
            biased = {**prompt.earlier, prompt.layer: mask + against(hidden)}
            found = self.model.logits(prompt, biased).log_softmax(-1)
            answers = prompt.labels[:, 1:][prompt.labels[:, 1:] != IGNORED]
            right = functional.nll_loss(found, answers)
            apart = functional.kl_div(found, whole, log_target=True, reduction="batchmean")
            return right + self.plan.divergence * apart

        return loss

    @torch.no_grad()
    def _guides(self, questions: Sequence[Question], at: Callable[[Prompt], Prompt]) -> dict[int, float]:
        """Loss of the answers by layer, if its attention alone decided which tokens leave."""
        layers = [self.plan.guide_layer] if self.plan.guide_layer is not None else list(range(self.model.layers))
        losses = dict.fromkeys(layers, 0.0)
        for prompt in map(at, self._prompts(questions)):
            with self.model.attention(layers) as kept:
                self.model.logits(prompt, prompt.mask())
            for layer in layers:
                chosen = self._chosen(prompt, received(prompt, kept[layer]), self.stages[prompt.layer])
                losses[layer] += float(self._pruned_loss(chosen)[0])
        return losses

    def _prompts(self, questions: Sequence[Question]) -> Iterator[Prompt]:
        for start in range(0, len(questions), self.plan.batch_size):
            yield self.model.prompt(self.batches(questions[start : start + self.plan.batch_size]))

    def _pruned_loss(self, prompt: Prompt) -> tuple[Tensor, int]:
        """Summed loss of the answers, and how many are right word for word, without what left the prompt."""
        logits = self.model.logits(prompt, prompt.earlier)
        answers = prompt.labels[:, 1:]
        loss = functional.cross_entropy(logits, answers[answers != IGNORED], reduction="sum")
        return loss, answered(prompt, logits)

    @torch.no_grad()
    def _right(self, questions: Sequence[Question], scores: Scores | None) -> float:
        """Share of questions answered right, word for word, given the words before; without scores nothing leaves."""
        right = 0
        for whole in self._prompts(questions):
            right += self._pruned_loss(whole if scores is None else self._descended(whole, scores))[1]
        return right / len(questions)

    def _conclude(
        self, scorers: Mapping[int, VisualScorer], held_out: Sequence[Question], history: list[curves.Entry],
        guides: Mapping[int, dict[int, float]], learned: int,
    ) -> Statistics:  # fmt: skip
        draw = torch.Generator(device="cpu").manual_seed(self.plan.seed)

        def untrained(prompt: Prompt, share: float) -> list[Tensor]:
            def chosen(visual: Tensor, _text: Tensor, count: int) -> Tensor:
                return diverse(visual, count)

            return as_scores(prompt, chosen, share, self.settings.min_keep)

        def at_random(prompt: Prompt, _share: float) -> list[Tensor]:
            return [torch.rand(len(columns), generator=draw).to(columns.device) for _, columns in prompt.images()]

        right = {
            "everything": self._right(held_out, None),
            "scorer": self._right(held_out, self._by(scorers)),
            "untrained": self._right(held_out, untrained),
            "random": self._right(held_out, at_random),
        }
        deep = self.settings.stages is not None
        shares = [f"{share:g}" + (f" from layer {layer} on" if deep else "") for layer, share in self.stages.items()]
        name = "the drawn pictures" if self.plan.images == "builtin" else self.plan.images.given
        notes = [
            f"visual_pruning: the scorer{f' of layer {layer}' if deep else ''} learned from {learned} questions of "
            f"{name}, guided by layer {guide_of(tried)}"
            for layer, tried in guides.items()
        ]
        notes.append(
            f"of {len(held_out)} held-out questions {right['scorer']:.1%} are answered right with {', '.join(shares)} "
            f"of visual tokens, {right['everything']:.1%} with all; the untrained rule gives {right['untrained']:.1%}, "
            f"tokens at random {right['random']:.1%}"
        )
        if right["scorer"] <= right["random"] < right["everything"]:
            notes.append("the scorer is no better than chance: more data, epochs, or another guide_layer may help")
        told: dict[int, dict[str, Any]] = {
            layer: {"guide_layer": guide_of(tried), "guide_losses": {str(one): loss for one, loss in tried.items()}}
            for layer, tried in guides.items()
        }
        record = {"questions": learned, "held_out": len(held_out), "right": right}
        record |= {"stages": {str(layer): guided for layer, guided in told.items()}} if deep else told[0]
        summary = {"settings": self.settings.model_dump(mode="json"), **record, "torch": torch.__version__}
        curves.publish(self.training.record, summary, history)
        tensors = {
            (f"{layer}." if deep else "") + name: tensor.detach().float().cpu().contiguous()
            for layer, scorer in scorers.items() for name, tensor in scorer.state_dict().items()
        }  # fmt: skip
        return Statistics(tensors, {"notes": notes, "record": record}, self.training.fingerprint)


def guide_of(losses: Mapping[int, float]) -> int:
    """The layer whose attention, if it decided alone, would hurt the answers least."""
    return min(losses, key=lambda layer: (losses[layer], layer))


def leaving(prompt: Prompt, scores: Sequence[Tensor], reserve: float, least: int = 1) -> Tensor:
    """What is gone, bool [B, L], where each image keeps the best of its tokens that are left, by their scores [V]."""
    gone = prompt.hidden() < 0
    for (row, columns), of_image, count in zip(prompt.images(), scores, prompt.counts(reserve, least), strict=True):
        gone[row, columns] = True
        gone[row, columns[best(of_image, count)]] = False
    return gone


def without(prompt: Prompt, gone: Tensor) -> Tensor:
    """What is added to attention [B, 1, L, L] so that columns [B, L] are not there."""
    hidden = torch.zeros_like(prompt.embeds[..., 0]).masked_fill(gone, LOWEST)
    return (prompt.mask() + against(hidden)).clamp(min=LOWEST)


def keeping(prompt: Prompt, scores: Sequence[Tensor], reserve: float, least: int = 1) -> Tensor:
    """What is added to attention [B, 1, L, L] so that each image keeps the best of its tokens, by their scores [V]."""
    return without(prompt, leaving(prompt, scores, reserve, least))


def as_scores(prompt: Prompt, choose: Choose, reserve: float, least: int = 1) -> list[Tensor]:
    """What a rule chooses of each image, as scores [V]: ones among zeros."""
    found = []
    for (row, columns), count in zip(prompt.images(), prompt.counts(reserve, least), strict=True):
        chosen = choose(*prompt.seen(row, columns), count)
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
