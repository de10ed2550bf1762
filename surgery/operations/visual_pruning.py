"""Visual tokens that a question does not need leave the prompt before the language model reads it.

A small scorer, trained from what the model itself attends to, rides in the checkpoint; without training data a rule of
relevance and diversity chooses. The base's weights stay. Source: CoViPAL (arXiv 2508.17243) for a trained module at the
entry, its two stages and the reserve ratio; what its text does not give (the module's inside, rounding, positions, the
relaxation of the second stage, the rule) is ours.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from surgery.architectures import Model
from surgery.checkpoint.expressions import TensorSpec
from surgery.emission.code import RuntimePart
from surgery.given import GivenFile
from surgery.operations.base import Operation, Settings, Statistics, Training, from_training
from surgery.planning import Draft

Share = Annotated[float, Field(gt=0, le=1)]
PREFIX = "model.visual_scorer"
USAGE = """\
Calls and `generate` are those of the base, with the same processor. A call may keep more or fewer visual tokens:

```python
model.generate(**inputs, visual_reserve=0.5)  # half of every image's tokens
model.generate(**inputs, visual_reserve=1.0)  # all of them: the base model exactly
```

Tokens that stay keep their positions. Logits of a plain call are those of the columns that stay, which
`output.kept_indices` names (-1 for padding); labels are taken at the same columns."""


class Scorer(Settings):
    """The trained module: its size."""

    width: Annotated[int, Field(ge=8)] = Field(default=512, description="channels inside")
    heads: Annotated[int, Field(ge=1)] = Field(default=8, description="of each attention")
    layers: Annotated[int, Field(ge=1)] = Field(default=1, description="blocks of self- and cross-attention")

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.width % self.heads:
            raise ValueError("width must be a multiple of heads")
        return self


class Train(Settings):
    """How the module learns: first from attention inside the model, then from the answers."""

    images: Literal["builtin"] | GivenFile = Field(
        description="jsonl of images, questions and answers, `{image, question, answer}` or LLaVA's `conversations`; "
        "relative to the manifest, and images to it. `builtin`: what `builtin:llava` was trained on, drawn anew"
    )
    questions: Annotated[int, Field(ge=64)] = Field(default=4096, description="with `images: builtin`, how many")
    epochs: Annotated[float, Field(gt=0)] = Field(default=1.0, description="times the data is seen, in both stages")
    batch_size: Annotated[int, Field(ge=1)] = Field(default=32, description="questions of a step")
    learning_rate: Annotated[float, Field(gt=0)] = Field(default=1e-4, description="of the first stage; then half")
    guided: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5, description="share of the steps that learn from attention; the others learn from the answers"
    )
    guide_layer: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="layer whose attention guides (paper: 16 of 28); by default the one that prunes best by itself",
    )
    attention_loss: Literal["shares", "mse"] = Field(
        default="shares",
        description="of the first stage: cross-entropy of shares of attention, or the squared error of scores (paper)",
    )
    divergence: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="weight of the divergence from the model that sees everything, in the second stage"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=0, description="order of the data, and noise")
    scorer: Scorer = Field(default=Scorer(), description="the module's size")


class VisualPruningSettings(Settings):
    """How much stays, and what decides."""

    reserve: Share = Field(
        default=0.25, description="share of each image's tokens that stays, rounded up (paper: reserve ratio r)"
    )
    min_keep: Annotated[int, Field(ge=1)] = Field(default=1, description="tokens of an image that stay at least")
    train: Train | None = Field(
        default=None, description="trains the scorer; without it relevance and diversity decide, untrained"
    )


def refuses(model: Model, settings: VisualPruningSettings) -> str | None:
    """Why the operation does not fit, or None."""
    if model.architecture.vision is None:
        return f"{model.architecture.title} models see no images"
    if "visual_pruning" in (model.root.get("surgery") or {}):
        return "it prunes visual tokens already; give its settings once"
    if not token_ids(model):
        return "config.json names no token that stands for an image"
    guide = settings.train.guide_layer if settings.train else None
    if guide is not None and guide >= model.num_hidden_layers:
        return f"guide_layer is {guide}, and its last layer is {model.num_hidden_layers - 1}"
    return None


def token_ids(model: Model) -> list[int]:
    """The tokens that stand for features of images and frames."""
    vision = model.architecture.vision
    named = [[model.root.get(key) for key in spellings] for spellings in (vision.placeholders if vision else ())]
    found = [next((token for token in tokens if isinstance(token, int)), None) for tokens in named]
    return [token for token in found if token is not None]


def edit(draft: Draft, settings: VisualPruningSettings, statistics: Statistics | None) -> None:
    """Put the settings into the config, the code beside the weights, and the trained scorer among them."""
    scorer = settings.train.scorer.model_dump() if settings.train else None
    draft.root.setdefault("surgery", {})["visual_pruning"] = {
        "reserve": settings.reserve, "min_keep": settings.min_keep, "token_ids": token_ids(draft.model),
        "scorer": scorer,
    }  # fmt: skip
    part = RuntimePart("surgery_visual_pruning.py", "VisualPruning", "model", of="base", what="visual tokens")
    draft.parts.append(part)
    vision = draft.model.architecture.vision
    if settings.train is not None and vision is not None:
        prefix = f"{vision.stored(PREFIX)}."
        for name, shape in scorer_shapes(draft.model.hidden_size, settings.train.scorer).items():
            trained = from_training(prefix + name, statistics, key=name)
            draft.rewrite([], {prefix + name: TensorSpec("F32", shape)}, trained, why="visual_pruning: scorer")
    by = "a trained scorer chooses" if scorer else "relevance and diversity choose, untrained"
    draft.notes.append(f"visual_pruning: {settings.reserve:g} of an image's tokens stay, {by}; the base's weights stay")
    if statistics is not None:
        draft.notes.extend(statistics.facts.get("notes", ()))


def scorer_shapes(hidden: int, size: Scorer) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the scorer's tensors, as `surgery_visual_scorer.py` makes them."""
    width = size.width
    shapes: dict[str, tuple[int, ...]] = {
        "token_proj.weight": (width, hidden), "text_proj.weight": (width, hidden), "no_text.weight": (width, 1),
        "score.weight": (1, width), "score.bias": (1,),
    }  # fmt: skip
    norms = {"token_norm": hidden, "text_norm": hidden, "out_norm": width}
    for block in (f"blocks.{index}." for index in range(size.layers)):
        norms |= {f"{block}norm{index}": width for index in (1, 2, 3)}
        for attention in ("self_attn", "cross_attn"):
            shapes |= {f"{block}{attention}.{part}_proj.weight": (width, width) for part in "qkvo"}
        shapes |= {f"{block}mlp.0.weight": (2 * width, width), f"{block}mlp.0.bias": (2 * width,)}
        shapes |= {f"{block}mlp.2.weight": (width, 2 * width), f"{block}mlp.2.bias": (width,)}
    return shapes | {f"{name}.{kind}": (size_,) for name, size_ in norms.items() for kind in ("weight", "bias")}


def train(training: Training, settings: VisualPruningSettings) -> Statistics:
    """Train the scorer (see `surgery.training.visual`)."""
    from surgery.training.visual import train_scorer

    return train_scorer(training, settings)


OPERATION = Operation(
    name="visual_pruning",
    title="Visual-token pruning: what a question does not need leaves the prompt",
    source="CoViPAL (arXiv 2508.17243) for the trained module at the entry; its inside and the untrained rule are ours",
    settings=VisualPruningSettings,
    refuses=refuses,
    edit=edit,
    trains=lambda settings: settings.train is not None,
    train=train,
    usage=USAGE,
    limits=(
        "The vision tower still reads every pixel: time falls in the language model's prefill, and in its cache.",
        "Text in images, charts and small things lose most: look at reserve 0.5 before 0.25 for them.",
        "What stays is chosen for the text of one prompt: a later question about the same image reads it anew.",
        "Static caches, drafts of other models and prompts in chunks want visual_reserve=1.0, the base.",
    ),
    after=frozenset({"kv_latent", "codebook_kv"}),
    before=frozenset(),
)
