"""Visual tokens that a question does not need leave the prompt before the language model reads it.

A small scorer, trained from what the model itself attends to, rides in the checkpoint; without training data a rule of
salience and diversity chooses. The base's weights stay. Source: CoViPAL (arXiv 2508.17243) for a trained module at the
entry, its two stages and the reserve ratio; what its text does not give (the module's inside, rounding, positions, the
relaxation of the second stage, the rule) is ours. So is how tokens leave layer by layer, which its title names and what
could be read of it does not explain.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from surgery.architectures import Model
from surgery.checkpoint.expressions import TensorSpec
from surgery.emission.code import RuntimePart
from surgery.given import GivenFile
from surgery.operations.base import Operation, Settings, Statistics, Training, from_training
from surgery.planning import Draft

Share = Annotated[float, Field(gt=0, le=1)]


def _numbered(value: Any) -> Any:
    """Keys of YAML and JSON are words."""
    if not isinstance(value, dict):
        return value
    return {int(key) if isinstance(key, str) and key.isdecimal() else key: share for key, share in value.items()}


Stages = Annotated[dict[Annotated[int, Field(ge=0)], Share], BeforeValidator(_numbered)]
PREFIX = "model.visual_scorer"
USAGE = """\
Calls and `generate` are those of the base, with the same processor. A call may keep more or fewer visual tokens:

```python
model.generate(**inputs, visual_reserve=0.5)  # half of every image's tokens
model.generate(**inputs, visual_reserve=1.0)  # all of them: the base model exactly
```

Where tokens leave layer by layer (`stages`), shares other than the last one and 1.0 are refused.

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
    stages: Stages | None = Field(
        default=None, description="layer by layer, in place of `reserve`: {layer: share that is left from it on}"
    )
    min_keep: Annotated[int, Field(ge=1)] = Field(default=1, description="tokens of an image that stay at least")
    train: Train | None = Field(
        default=None, description="trains the scorer; without it salience and diversity decide, untrained"
    )

    @field_validator("stages")
    @classmethod
    def _falls(cls, stages: dict[int, float] | None) -> dict[int, float] | None:
        if stages is None:
            return None
        layers, shares = list(stages), list(stages.values())
        if not layers:
            raise ValueError("stages has no layer: give {layer: share}, or reserve alone")
        if layers != sorted(layers):
            raise ValueError("layers must ascend, as tokens pass them")
        if shares != sorted(shares, reverse=True):
            raise ValueError("shares must not rise: what left does not come back")
        return stages

    @model_validator(mode="before")
    @classmethod
    def _last(cls, given: Any) -> Any:
        """With stages `reserve` is what they leave in the end."""
        stages = given.get("stages") if isinstance(given, dict) else None
        if not isinstance(stages, dict) or not stages:
            return given
        left = list(stages.values())[-1]
        if given.get("reserve", left) != left:
            raise ValueError(f"reserve is {given['reserve']}, and stages leave {left}: give one of the two")
        return {**given, "reserve": left}


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
    return _misplaced(model, settings.stages) if settings.stages else None


def _misplaced(model: Model, stages: dict[int, float]) -> str | None:
    """Why tokens cannot leave before these layers, or None."""
    if max(stages) >= model.num_hidden_layers:
        return f"stages has layer {max(stages)}, and its last layer is {model.num_hidden_layers - 1}"
    if "codebook_cache" in (model.config.get("surgery") or {}):
        return "stages: a codebook cache wants the same tokens in every layer, so give reserve alone, or no codebook_kv"
    added = len((model.root.get("vision_config") or {}).get("deepstack_visual_indexes") or ())
    early = [layer for layer in stages if 0 < layer < added]
    if early:
        return f"stages: {added} layers add features to all visual tokens, so layer {early[0]} must be 0, or {added} on"
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
    stages = {str(layer): share for layer, share in settings.stages.items()} if settings.stages else None
    draft.root.setdefault("surgery", {})["visual_pruning"] = {
        "reserve": settings.reserve, "min_keep": settings.min_keep, "token_ids": token_ids(draft.model),
        "scorer": scorer, **({"stages": stages} if stages else {}),
    }  # fmt: skip
    part = RuntimePart("surgery_visual_pruning.py", "VisualPruning", "model", of="base", what="visual tokens")
    draft.parts.append(part)
    vision = draft.model.architecture.vision
    if settings.train is not None and vision is not None:
        prefix, shapes = f"{vision.stored(PREFIX)}.", scorer_shapes(draft.model.hidden_size, settings.train.scorer)
        layers = [f"{layer}." for layer in settings.stages or ()] or [""]
        for name, shape in ((layer + name, shape) for layer in layers for name, shape in shapes.items()):
            trained = from_training(prefix + name, statistics, key=name)
            draft.rewrite([], {prefix + name: TensorSpec("F32", shape)}, trained, why="visual_pruning: scorer")
    by = "a trained scorer chooses" if scorer else "salience and diversity choose, untrained"
    left = f"{settings.reserve:g} of an image's tokens stay"
    if settings.stages:
        shares = (f"{share:g} from layer {layer} on" for layer, share in settings.stages.items())
        share = cached(draft.model, settings.stages)
        left = f"of an image's tokens {', '.join(shares)} stay, {share:.3g} of their cache"
    draft.notes.append(f"visual_pruning: {left}, {by}; the base's weights stay")
    if statistics is not None:
        draft.notes.extend(statistics.facts.get("notes", ()))


def cached(model: Model, stages: dict[int, float]) -> float:
    """The share of an image's tokens that layers hold, a mean over them."""
    shares = [1.0] * model.num_hidden_layers
    for layer, share in stages.items():
        shares[layer:] = [share] * (len(shares) - layer)
    return sum(shares) / len(shares)


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
