"""Latent KV heads: narrower keys, values, queries and outputs, so that the cache shrinks with the attention.

Each head keeps `d_qk` of its query and key channels, in whole rotary pairs, and `d_vo` of its value dimensions, so a
token caches `G * (d_qk + d_vo)` numbers a layer in place of `2 * G * d`. Source: KV-Latent (arXiv 2507.11273). Its own
form (uniform stride, changed RoPE, training) is `method: paper`; the calibrated form is ours and needs no training.

It does not change the number of heads, the MLP or the embeddings, and it does not make single-stream decoding faster:
that is bound by reading weights, not by the cache.
"""

from __future__ import annotations

from surgery.architectures import Model
from surgery.operations.base import Measuring, Operation, Statistics
from surgery.operations.kv_latent.allocation import offered_widths
from surgery.operations.kv_latent.channels import paper_pairs
from surgery.operations.kv_latent.editing import edit, widths
from surgery.operations.kv_latent.settings import KVLatentSettings


def refuses(model: Model, settings: KVLatentSettings) -> str | None:
    """Why the operation does not fit, or None. Raises CorruptCheckpoint where config and tensors disagree."""
    unfit = _unfit_model(model)
    if unfit is not None:
        return unfit
    clip = model.config.get(model.architecture.attention.clip or "")
    if clip is not None and settings.calibrated:
        return "it clamps queries, keys and values, and a new basis would clamp other numbers; use method: stride"
    model.check_attention()
    qk, vo = widths(model, settings)
    for name, values in (("qk_dim", qk), ("vo_dim", vo)):
        if len(values) != model.num_hidden_layers:
            return f"{name} lists {len(values)} widths, the model has {model.num_hidden_layers} layers"
    if settings.kv_ratio is not None and _least_ratio(model, settings, qk, vo) > settings.kv_ratio + 1e-9:
        return f"kv_ratio {settings.kv_ratio} is below the narrowest heads that these settings allow"
    reasons = (_unfit_widths(model, settings, k, v) for k, v in zip(qk, vo, strict=True))
    return next((reason for reason in reasons if reason), None)


def _least_ratio(model: Model, settings: KVLatentSettings, qk: list[int], vo: list[int]) -> float:
    """The smallest kv_ratio that these settings can reach; `qk` and `vo` are the uniform widths for the one asked."""
    least = qk[0] + vo[0]
    if settings.budgeted:
        least = min(offered_widths(model.head_dim, even=True)) + min(offered_widths(model.head_dim, even=False))
    return least / (2 * model.head_dim)


def _unfit_model(model: Model) -> str | None:
    if model.architecture.attention.unlike:
        return model.architecture.attention.unlike
    if "latent_attention" in (model.config.get("surgery") or {}):
        return "its heads are latent already; ask for the final widths in one step"
    if model.config.get("quantization_config"):
        return "the base is quantized, and packed groups cannot be cut; dequantize it first"
    if model.config.get("kv_lora_rank"):
        return "its attention is already latent (MLA)"
    if model.config.get("position_embedding_type") in {"alibi", "absolute"} or model.config.get("alibi"):
        return "it has no rotary positions, so pairs mean nothing (its keys could be factorised instead)"
    rope = model.rope
    if rope.interleaved:
        return "its rotary pairs are interleaved, and cutting channels would tear them"
    if rope.width != model.head_dim:
        return f"only {rope.width} of {model.head_dim} channels rotate, and partial rotation is not handled"
    if model.head_dim % 2:
        return f"head_dim {model.head_dim} is odd"
    return None


def _unfit_widths(model: Model, settings: KVLatentSettings, qk_dim: int, vo_dim: int) -> str | None:
    head = model.head_dim
    if qk_dim > head or vo_dim > head:
        return f"a width of {max(qk_dim, vo_dim)} is more than head_dim {head}"
    if qk_dim % 2:
        return f"qk_dim {qk_dim} is odd, and rotary channels come in pairs"
    paper = settings.rope == "paper" or settings.qk_select == "matched"
    if paper and qk_dim % 4:
        return f"the paper's spectrum needs a qk_dim divisible by 4, not {qk_dim}"
    if settings.qk_select == "stride" and (head % qk_dim or (head // 2) % (head // qk_dim)):
        return f"a stride needs qk_dim to divide head_dim {head} with whole pairs, and {qk_dim} does not"
    if settings.qk_select == "matched" and paper_pairs(head, qk_dim) is None:
        return f"at qk_dim {qk_dim} of {head} the paper's frequencies are not among the model's own"
    if settings.rope == "paper" and settings.qk_select != "stride":
        return "rope: paper changes the frequencies of strided channels; use qk_select: stride"
    if settings.rope == "paper" and model.architecture.attention.qk_norm != "none":
        return "rope: paper turns channels as others turn; behind a norm of queries and keys that is not handled"
    if settings.rope == "paper" and model.architecture.attention.mrope:
        return "rope: paper turns channels as others turn, and these turn by time, height or width; use rope: keep"
    if settings.rope == "paper" and settings.calibrated:
        return "rope: paper turns channels at other speeds than they were trained with; that cannot be calibrated"
    if settings.rope == "paper" and model.rope.kind != "default":
        return f"the paper's spectrum is defined for unscaled RoPE, this model has {model.rope.kind!r}"
    if settings.method == "paper" and settings.calibrated:
        return "method: paper divides by sqrt(d_qk) and measures nothing; leave the method out to calibrate"
    if settings.vo_basis == "stride" and head % vo_dim:
        return f"a stride needs vo_dim to divide head_dim {head}, and {vo_dim} does not"
    return None


def measure(measuring: Measuring, settings: KVLatentSettings) -> Statistics:
    """Solve every layer on the calibration text (see `measuring.py`)."""
    from surgery.operations.kv_latent.measuring import solve

    return solve(measuring, settings)


OPERATION = Operation(
    name="kv_latent",
    title="Latent KV heads: a narrower cache",
    source="KV-Latent (arXiv 2507.11273); calibration is ours",
    settings=KVLatentSettings,
    refuses=refuses,
    edit=edit,
    measures=lambda settings: settings.calibrated,
    measure=measure,
    limits=("What shrinks is memory. Decoding a single sequence is bound by reading weights and hardly gets faster.",),
    # The paper trains attention, and the MLP by low-rank factors; whole matrices and norms were better, and no dearer.
    changes=frozenset({"attention", "mlp", "norms"}),
)
