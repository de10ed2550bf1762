"""Rules that choose visual tokens at the entry of a model, and the model itself, opened where they look in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from surgery.checkpoint.resolve import open_base
from surgery.operations.visual_pruning import PREFIX, token_ids
from surgery.planning import open_draft
from surgery.runtime.surgery_visual_scorer import VisualScorer, diverse
from surgery.training.visual import Choose, Model, Prompt, answered, as_scores, keeping

LAYER = 2  # of FastV
PIVOTS = 4  # of DART

Scores = Callable[[Prompt, float], list[Tensor]]


class Opened:
    """The base, through the pieces that training takes it apart into."""

    def __init__(self, base: str) -> None:
        checkpoint = open_base(base)
        training: Any = SimpleNamespace(student=checkpoint, device="cpu")
        self.model = Model(training, token_ids(open_draft(checkpoint).model))
        self.cls: dict[int, Tensor] = {}

    @torch.no_grad()
    def prompt(self, batch: Any) -> Prompt:
        """What the language model is given; what the class token attends to is remembered by it."""
        tower = self.model.whole.model.vision_tower
        deep = getattr(tower, "vision_model", tower).encoder.layers[-1].self_attn
        caught: list[Tensor] = []

        def catch(module: Any, args: Any, kwargs: Any) -> None:
            caught.append(class_attention(module, args, kwargs))

        handle = deep.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            prompt = self.model.prompt(batch)
        finally:
            handle.remove()
        self.cls[id(prompt)] = torch.cat(caught)
        return prompt

    @torch.no_grad()
    def right(self, prompt: Prompt, rule: Scores, reserve: float, *, late: bool) -> int:
        """How many of a batch are answered right, word for word, with the best `reserve` of each image's tokens."""
        whole = prompt.mask()
        mask = keeping(prompt, rule(prompt, reserve), reserve) if reserve < 1 else whole
        handles = []
        if late:  # layers before it see everything

            def see(_module: Any, args: Any, kwargs: Any) -> Any:
                return args, kwargs | {"attention_mask": whole}

            early = self.model.inner.layers[:LAYER]
            handles = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in early]
        try:
            return answered(prompt, self.model.logits(prompt, mask))
        finally:
            for handle in handles:
                handle.remove()


def class_attention(module: Any, args: Any, kwargs: Any) -> Tensor:
    """What the class token of a CLIP layer gives the patches, over all heads: [images, patches]."""
    hidden = args[0] if args else kwargs["hidden_states"]
    heads = module.num_heads
    query = module.q_proj(hidden[:, :1]).unflatten(-1, (heads, -1)).transpose(1, 2)
    key = module.k_proj(hidden).unflatten(-1, (heads, -1)).transpose(1, 2)
    weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
    return weights[:, :, 0, 1:].sum(1)


def trained_scorer(out: Path) -> VisualScorer:
    """The scorer of a result of `visual_pruning`."""
    config = json.loads((out / "config.json").read_text())
    scorer = VisualScorer(config["text_config"]["hidden_size"], **config["surgery"]["visual_pruning"]["scorer"])
    tensors = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    scorer.load_state_dict({n.removeprefix(f"{PREFIX}."): t for n, t in tensors.items() if n.startswith(PREFIX)})
    return scorer.eval()


def rules(scorer: VisualScorer, opened: Opened) -> dict[str, Scores]:
    """Scores of each image's tokens, by rule; sets are told as ones among zeros."""
    draw = torch.Generator().manual_seed(0)

    def chosen(choose: Choose) -> Scores:
        return lambda prompt, reserve: as_scores(prompt, choose, reserve)

    @torch.no_grad()
    def by_scorer(prompt: Prompt, _reserve: float) -> list[Tensor]:
        return [scorer(prompt.embeds[row, at], prompt.embeds[row, prompt.text[row]]) for row, at in prompt.images()]

    @torch.no_grad()
    def by_attention(prompt: Prompt, _reserve: float) -> list[Tensor]:
        with opened.model.attention([LAYER]) as kept:
            opened.model.logits(prompt, prompt.mask())
        last = [int(prompt.text[row].nonzero()[-1]) for row in range(len(prompt.text))]
        return [kept[LAYER][row, :, last[row], columns].sum(0) for row, columns in prompt.images()]

    def by_class_token(prompt: Prompt, _reserve: float) -> list[Tensor]:
        return list(opened.cls[id(prompt)])

    def at_random(prompt: Prompt, _reserve: float) -> list[Tensor]:
        return [torch.rand(len(columns), generator=draw) for _, columns in prompt.images()]

    return {
        "scorer": by_scorer,
        "untrained": chosen(lambda visual, _text, count: diverse(visual, count)),
        "divprune": chosen(farthest),
        "dart": chosen(unlike_pivots),
        "cls": by_class_token,
        "fastv-entry": by_attention,
        "random": at_random,
        "fastv": by_attention,
    }


def farthest(visual: Tensor, _text: Tensor, count: int) -> Tensor:
    """Greedily, what is farthest from its nearest kept neighbour; the first is farthest from its nearest of all."""
    unit = functional.normalize(visual.float(), dim=-1)
    distance = 1 - unit @ unit.T
    distance.fill_diagonal_(float("inf"))
    kept = [int(distance.min(1).values.argmax())]
    while len(kept) < count:
        nearest = distance[:, kept].min(1).values
        nearest[kept] = -1
        kept.append(int(nearest.argmax()))
    return torch.tensor(sorted(kept))


def unlike_pivots(visual: Tensor, _text: Tensor, count: int) -> Tensor:
    """The pivots are the longest tokens; after them come those with the least cosine to any of them."""
    pivots = visual.float().norm(dim=-1).topk(min(PIVOTS, count)).indices
    unit = functional.normalize(visual.float(), dim=-1)
    alike = (unit @ unit[pivots].T).max(-1).values
    alike[pivots] = float("-inf")
    return alike.topk(count, largest=False).indices.sort().values
