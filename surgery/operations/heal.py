"""Healing: training what surgery changed, so that it resembles the base again.

The student is the checkpoint that the operations before wrote, the teacher is the base. Two stages, each optional:
`layerwise` lets every layer imitate the teacher's layer on the teacher's own input, one layer at a time; `end_to_end`
trains all chosen parameters through the whole model. Source of both: KV-Latent (arXiv 2507.11273), section on training;
`method: paper` has its values. What is not trained stays bit-identical.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from surgery.architectures import Model
from surgery.checkpoint.dtypes import element_count
from surgery.operations.base import Count, Operation, Settings, Statistics, Training, from_training
from surgery.planning import Draft
from surgery.training.groups import Group, LoraGroup, Rank, Selection, group_of, select


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Layerwise(_Part):
    """Every layer alone, on the teacher's input."""

    tokens: Count = Field(default=1_000_000, description="tokens each layer is trained on (paper: 0.1B)")
    loss: Literal["hidden_mse"] = Field(
        default="hidden_mse", description="mean squared error of the layer's output to the teacher's"
    )
    learning_rate: float = Field(default=5e-3, gt=0, description="peak rate, see scale_parameter")
    buffer: Count = Field(
        default=2_000_000, description="tokens whose hidden states lie on disk at once; more are trained in rounds"
    )


class EndToEnd(_Part):
    """All chosen parameters through the whole model."""

    tokens: Count = Field(default=10_000_000, description="tokens trained on (paper: 0.25B for kl, 1B for next_token)")
    loss: Literal["kl", "next_token", "paper_kl"] = Field(
        default="kl",
        description="`kl` of the teacher's distribution to the student's, times the temperature squared; `next_token` "
        "cross-entropy on the text; `paper_kl` as the authors' code has it: summed over positions, without the square",
    )
    temperature: float = Field(
        default=1.0, gt=0, le=100, description="divides both sides' logits in the kl losses (paper: 10)"
    )
    learning_rate: float = Field(
        default=5e-3, gt=0, description="peak rate, see scale_parameter (paper: 2e-5 next_token, 2e-7 kl)"
    )
    hidden_weight: float = Field(
        default=1.0,
        ge=0,
        description="adds to a kl loss this much of the mean over layers of the squared error of hidden states over "
        "their variance (paper: 0)",
    )
    teacher: Literal["resident", "stored"] = Field(
        default="resident",
        description="the teacher runs beside the student, or its most likely tokens are computed once and kept on disk",
    )
    top_k: int = Field(
        default=64, ge=1, description="tokens kept per position with `teacher: stored`; the rest counts as one bucket"
    )

    @model_validator(mode="after")
    def _storable(self) -> EndToEnd:
        if self.teacher == "stored" and self.loss != "kl":
            raise ValueError("can have teacher: stored only with loss: kl, which is what the stored tokens give")
        if self.teacher == "stored" and self.temperature != 1:
            raise ValueError("can have teacher: stored only with temperature: 1, at which the tokens are kept")
        if self.teacher == "stored" and self.hidden_weight:
            raise ValueError("can have teacher: stored only with hidden_weight: 0, as no hidden states are stored")
        return self


class Lora(_Part):
    """Low-rank factors, merged into their matrices at the end."""

    rank: int = Field(default=256, ge=1, description="width of the factors (paper: 256)")
    alpha: float = Field(default=512, gt=0, description="the factors' product is scaled by alpha / rank (paper: 512)")
    on: LoraGroup | list[LoraGroup] = Field(default="mlp", description="groups whose matrices get factors")

    @property
    def groups(self) -> frozenset[str]:
        """The groups as a set."""
        return frozenset([self.on] if isinstance(self.on, str) else self.on)


class LoraEntry(_Part):
    """An entry `lora: {...}` of `train`."""

    lora: Lora


Betas = Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]

_PAPER: dict[str, Any] = {
    "betas": [0.9, 0.999],
    "eps": 2e-4,
    "weight_decay": 0.01,
    "max_grad_norm": None,
    "optimizer": "adamw",
    "scale_parameter": False,
    "warmup_ratio": 0.0,
    "lr_scheduler": "cosine",
    "batch_size": 8,
    "train": ["attention", {"lora": {"rank": 256, "alpha": 512, "on": "mlp"}}],
}
# By loss: tokens, learning rate, temperature.
_PAPER_STAGES = {
    "next_token": (1_000_000_000, 2e-5, 1.0),
    "paper_kl": (250_000_000, 2e-7, 10.0),
    "kl": (250_000_000, 2e-7, 10.0),
}


DEFAULT = frozenset({"attention", "mlp", "norms"})  # where no operation before declared anything


class HealSettings(Settings):
    """What is trained, on how much, towards what, and how."""

    method: Literal["default", "paper"] = Field(
        default="default", description="sets what is not said below; `paper` takes the values of KV-Latent"
    )
    layerwise: Layerwise | None = Field(default=None, description="the first stage; none leaves it out")
    end_to_end: EndToEnd | None = Field(default=EndToEnd(), description="the second stage; none leaves it out")
    train: Annotated[list[Group | LoraEntry], Field(min_length=1)] | None = Field(
        default=None,
        description="groups of parameters (attention, mlp, router, norms, embeddings, head, all) and entries "
        "`lora: {rank, alpha, on}` (default: what the operations before declare; paper: attention, and a lora of rank "
        "256 and alpha 512 on mlp)",
    )
    batch_size: int = Field(default=8, ge=1, description="sequences per optimizer step, over all processes")
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="parts in which a step is computed")
    optimizer: Literal["muon", "adamw"] = Field(
        default="muon",
        description="`muon` gives the matrices of layers orthogonal updates, the rest is AdamW's (paper: adamw)",
    )
    scale_parameter: bool = Field(
        default=True,
        description="multiply the rate of each tensor by the root mean square of its elements, so that one rate fits "
        "models of any scale (paper: false)",
    )
    betas: Betas = Field(default=[0.9, 0.999], description="decay of AdamW's moments")
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon (paper: 2e-4)")
    weight_decay: float = Field(default=0.0, ge=0, description="of matrices (paper: 0.01)")
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="form of the rate after the warm-up; the first two end at zero"
    )
    warmup_ratio: float = Field(default=0.02, ge=0, le=1, description="share of the steps in which the rate rises")
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="gradients are clipped to this norm; none leaves them (paper)"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="mixed precision; trained weights and moments stay in float32"
    )
    gradient_checkpointing: bool = Field(default=False, description="recompute activations, to save memory")
    seed: int = Field(default=0, ge=0, lt=2**63, description="order of the data and start of the factors")
    save_steps: int = Field(default=200, ge=1, description="steps between saved states and held-out measurements")
    tracker: Literal["tensorboard", "wandb"] | None = Field(
        default=None, description="also log there, through accelerate; files lie beside the output"
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("method") != "paper":
            return data
        end = data.get("end_to_end", {})
        if isinstance(end, dict):
            loss = end.get("loss", "next_token")
            tokens, rate, temperature = _PAPER_STAGES.get(str(loss), _PAPER_STAGES["next_token"])
            known = {"loss": loss, "tokens": tokens, "learning_rate": rate, "temperature": temperature}
            end = {**known, "hidden_weight": 0.0, **end}
        layers = data.get("layerwise", {})
        if isinstance(layers, dict):
            layers = {"tokens": 100_000_000, "learning_rate": 2e-5, **layers}
        return {**_PAPER, **data, "end_to_end": end, "layerwise": layers}

    @model_validator(mode="after")
    def _something(self) -> HealSettings:
        if self.layerwise is None and self.end_to_end is None:
            raise ValueError("must have layerwise or end_to_end: without either nothing is trained")
        if self.precision == "fp16" and self.optimizer == "muon":
            raise ValueError(
                "can have precision: fp16 only with optimizer: adamw, as two optimizers share no loss scale"
            )
        return self


def selection(model: Model, settings: HealSettings, changes: frozenset[str]) -> Selection:
    """The tensors that these settings train, where `changes` are the groups that earlier operations declared."""
    if settings.train is None:
        # Not the experts, which newer releases of transformers hold fused, nor what they hold under other names.
        found = select(model, changes or DEFAULT).without(".experts.")
        at = model.architecture.experts
        if at is not None and at.block != "mlp":
            found = found.without(f".{at.block}.")
        if at is not None and at.correction is not None:
            found = found.without(f".{at.correction}")
    else:
        full = frozenset(entry for entry in settings.train if isinstance(entry, str))
        lora = [(Rank(e.lora.rank, e.lora.alpha), e.lora.groups) for e in settings.train if isinstance(e, LoraEntry)]
        found = select(model, full, lora)
    return found if settings.end_to_end is not None else found.inside_layers(model)


def refuses(model: Model, settings: HealSettings) -> str | None:
    """Why the operation does not fit, or None."""
    if model.architecture.vision is not None:
        return "it sees images, and healing compares language models on text alone"
    if model.config.get("quantization_config"):
        return "the base is quantized, and packed weights cannot be trained; heal first, quantize afterwards"
    if settings.train is not None and not selection(model, settings, frozenset()).names:
        return "no tensor of the model is in the groups that train names"
    chosen = selection(model, settings, frozenset())
    if settings.layerwise is not None and settings.train is not None and not chosen.inside_layers(model).names:
        return "layerwise trains what is inside layers, and train names nothing there"
    tied = model.config.get("tie_word_embeddings") and model.has("lm_head.weight")
    if tied and any(group_of(model, name) in {"embeddings", "head"} for name in chosen.names):
        return "it stores its tied embeddings twice, and training would make them differ; leave embeddings and head out"
    return None


def edit(draft: Draft, settings: HealSettings, statistics: Statistics | None) -> None:
    """Put the trained tensors in the place of those that were trained."""
    chosen = selection(draft.model, settings, frozenset(draft.changes))
    for name in chosen.names:
        draft.rewrite([name], {name: draft.spec(name)}, from_training(name, statistics), why="trained by heal")
    draft.trained.update(chosen.names)
    draft.scratch_bytes += _disk(draft, settings, chosen)
    if statistics is not None:
        draft.notes.extend(statistics.facts["notes"])


def _disk(draft: Draft, settings: HealSettings, chosen: Selection) -> int:
    """Bound of what training keeps on disk: three states of weights and two moments, hidden states, the teacher."""
    needed = 4 * 3 * 3 * sum(element_count(draft.spec(name).shape) for name in chosen.names)
    if settings.layerwise is not None:
        layer, width = settings.layerwise, draft.model.hidden_size
        needed += 2 * 4 * width * min(layer.buffer, layer.tokens)
    if settings.end_to_end is not None and settings.end_to_end.teacher == "stored":
        needed += 8 * settings.end_to_end.top_k * settings.end_to_end.tokens
    return needed


def train(training: Training, settings: HealSettings) -> Statistics:
    """Run both stages (see `surgery.training.healing`)."""
    from surgery.training.healing import heal

    return heal(training, settings, selection(training.model, settings, training.changes))


OPERATION = Operation(
    name="heal",
    title="Healing: training what surgery changed",
    source="KV-Latent (arXiv 2507.11273) for the two stages; the default values are ours",
    settings=HealSettings,
    refuses=refuses,
    edit=edit,
    trains=lambda _: True,
    train=train,
    reshapes=False,
    after=frozenset({"kv_latent", "expert_prune", "expert_top_k"}),
)
