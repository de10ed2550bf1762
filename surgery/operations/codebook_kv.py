"""Codebook KV cache: old tokens evicted, shared and rounded at run time; the weights stay as they are.

The result carries a cache that holds `reserve_ratio` of the stock cache's bytes for a prompt. Source: SpindleKV (arXiv
2507.06517). Its own form (a fixed line over layers, thresholds .98 and .95, greedy search) is `method: paper`; `solved`
is ours: for each layer it measures on the prompt itself how bytes are spent best, with rounding among the ways.

It saves memory of the cache under Hugging Face transformers only: other engines bring caches of their own.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from surgery.architectures import Model
from surgery.emission.code import RuntimePart
from surgery.operations.base import Operation, Settings, Statistics
from surgery.planning import Draft

Share = Annotated[float, Field(gt=0, le=1)]
Tokens = Annotated[int, Field(ge=1)]

_PAPER: dict[str, Any] = {
    "theta_k": 0.98, "theta_v": 0.95, "bits": 16, "heads": "mask", "pool": 1, "greedy": True,
}  # fmt: skip
CHANGING_ROPE = {"dynamic", "longrope"}
USAGE = """\
The cache is used by `generate` and by plain calls as it is. A call may say otherwise:

```python
model.generate(**inputs, surgery_cache={"reserve_ratio": 0.5})  # these settings over those of config.json
model.generate(**inputs, surgery_cache=None)                    # the stock cache: the base model exactly
model.surgery_cache_report()                                    # bytes of the last coded call, by layer and kind
```

`generation_config.surgery_cache` holds settings for all calls. For a prompt that comes in several calls of the model,
pass `past_key_values=model.surgery_cache(prompt_length=...)`."""
LARGEST_GROUP = 31  # bits of a number that says which query heads see a token
ENGINES = (
    "The cache is smaller under transformers only: vLLM, SGLang and others bring caches of their own and the base's "
    "attention."
)


class CodebookKVSettings(Settings):
    """What the cache does where a call says nothing else."""

    reserve_ratio: Share = Field(
        default=0.3,
        description="share of the stock cache's bytes that a prompt may take; with `method: paper` the share of its "
        "tokens that stay, before they share codes (paper: r)",
    )
    method: Literal["solved", "paper"] = Field(
        default="solved",
        description="`solved` measures for each layer how the bytes are spent best; `paper` sets what is not said "
        "below: thresholds 0.98 and 0.95, tokens by the line over layers, each query head its own, nothing rounded",
    )
    theta_k: Share | None = Field(
        default=None,
        description="cosine above which keys share a code; 1 shares none (paper: theta_K; default: measured)",
    )
    theta_v: Share | None = Field(
        default=None,
        description="cosine above which values share a code; 1 shares none (paper: theta_V; default: measured)",
    )
    bits: Literal[2, 3, 4, 5, 6, 8, 16] | None = Field(
        default=None, description="bits of a stored number; 16 keeps the model's own type (default: measured)"
    )
    beta: Share = Field(
        default=0.05, description="`paper`: share of the context that the last layer keeps (paper: beta)"
    )
    window: Tokens = Field(
        default=32,
        description="newest tokens of a prompt: their queries judge what matters, and none of them is evicted; with "
        "`method: paper` they stay as they are (paper: l_w)",
    )
    sinks: Annotated[int, Field(ge=0)] = Field(default=4, description="first tokens, which stay as they are")
    residual: Tokens = Field(default=32, description="newest tokens that stay as they are; so many can be taken back")
    min_prompt: Annotated[int, Field(ge=0)] = Field(
        default=128, description="tokens of a prompt below which nothing is coded"
    )
    heads: Literal["union", "mask", "mean"] = Field(
        default="union",
        description="query heads that share keys: all see what one wants, each sees what it wants (the paper's "
        "unfolding, stored once), or they decide together",
    )
    pool: Annotated[int, Field(ge=1)] = Field(
        default=7, description="tokens over which scores are smoothed; odd, 1 for none"
    )
    divisor: Literal["window", "paper"] = Field(
        default="window",
        description="what summed scores are divided by: the window, or the printed distance to the end",
    )
    greedy: bool = Field(default=False, description="choose codes one by one, as the paper does, not many at once")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("method") == "paper":
            return {**_PAPER, **data}
        return data

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.pool % 2 == 0:
            raise ValueError("pool must be odd")
        if self.method == "paper" and (self.theta_k is None or self.theta_v is None):
            raise ValueError("method: paper has thresholds: theta_k and theta_v must be numbers")
        if self.method == "paper" and self.beta > self.reserve_ratio:
            raise ValueError("beta is more than reserve_ratio: the last layer cannot keep more than the mean")
        return self


def refuses(model: Model, settings: CodebookKVSettings) -> str | None:
    """Why the operation does not fit, or None. Raises CorruptCheckpoint where config and tensors disagree."""
    at = model.architecture.attention
    if at.unlike:
        return at.unlike
    if model.config.get("kv_lora_rank"):
        return "its cache is latent already (MLA)"
    if "codebook_cache" in (model.config.get("surgery") or {}):
        return "it has a codebook cache already; give its settings once"
    if model.config.get("position_embedding_type") in {"alibi", "absolute"} or model.config.get("alibi"):
        return "it has no rotary positions, and keys are coded before rotation"
    rope = model.rope
    if rope.interleaved:
        return "its rotary pairs are interleaved, and the cache turns halves"
    if rope.width != model.head_dim:
        return f"only {rope.width} of {model.head_dim} channels rotate, and partial rotation was not tried"
    if rope.kind in CHANGING_ROPE:
        return f"its rotation ({rope.kind}) changes with the length, so keys cannot be turned later as they were"
    if at.window and not settled_layers(model):
        return "all its layers have a sliding window, which bounds their cache already"
    if settings.heads == "mask" and model.num_attention_heads // model.num_key_value_heads > LARGEST_GROUP:
        return f"heads: mask holds at most {LARGEST_GROUP} query heads per key head"
    if not model.config.get("surgery"):
        model.check_attention()
    return None


def settled_layers(model: Model) -> list[int]:
    """Layers whose cache grows without a window."""
    key = model.architecture.attention.window
    window = model.config.get(key) if key else None
    layers = list(range(model.num_hidden_layers))
    if window is None or model.config.get("use_sliding_window") is False:
        return layers
    kinds = model.config.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == len(layers):
        return [layer for layer in layers if kinds[layer] != "sliding_attention"]
    if "use_sliding_window" in model.config or "max_window_layers" in model.config:
        first = model.config.get("max_window_layers") or 0
        return [layer for layer in layers if layer < first]
    return []


def edit(draft: Draft, settings: CodebookKVSettings, _statistics: Statistics | None) -> None:
    """Put the settings into the config and the cache beside the weights, which stay."""
    draft.config.setdefault("surgery", {})["codebook_cache"] = settings.model_dump(mode="json")
    part = RuntimePart("surgery_codebook_attention.py", "codebook_attention", "self_attn", what="attention")
    draft.parts.append(part)
    share = f"about {settings.reserve_ratio:g} of the stock cache's bytes" if settings.method == "solved" else "less"
    draft.notes.append(f"codebook_kv: prompts of {settings.min_prompt} tokens or more take {share}; weights stay")


OPERATION = Operation(
    name="codebook_kv",
    title="Codebook KV cache: old tokens evicted, shared and rounded",
    source="SpindleKV (arXiv 2507.06517); `solved`, and rounding, are ours",
    settings=CodebookKVSettings,
    refuses=refuses,
    edit=edit,
    usage=USAGE,
    limits=(
        ENGINES,
        "It saves memory, not time: at 16k tokens on a CPU a step took 1.2 to 2.7 times as long as a stock one.",
        "What is evicted is chosen by the end of the prompt: a later question may ask for what is gone.",
        "Static caches, torch.compile and masks that are not [batch, tokens] want surgery_cache=None, the stock model.",
    ),
    after=frozenset({"kv_latent", "expert_prune", "expert_top_k", "heal", "rotate", "smooth"}),
)
