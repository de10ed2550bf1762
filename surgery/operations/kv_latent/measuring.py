"""Calibrating `kv_latent`: two walks through the layers on the calibration windows.

The first, taken for a byte budget only, prices every width of every layer by the KL divergence at the model's output.
The second solves the layers in order, each on what the narrowed layers before it really give, aiming at the original
residual stream. Neither repeats the model's own code: layers are called as the installed transformers calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from surgery.architectures import Model
from surgery.calibration.compare import divergence
from surgery.calibration.layers import BATCH, LayerCall, attention_traffic, decoder, record_calls, replaced_output
from surgery.errors import CorruptCheckpoint
from surgery.operations.allocation import predicted_cost
from surgery.operations.base import Measuring, Statistics
from surgery.operations.kv_latent.allocation import allocate_widths, knee, offered_widths
from surgery.operations.kv_latent.attention import CHUNK, Attention, attention_output, fold_value_bias
from surgery.operations.kv_latent.channels import paper_pairs, stride_channels, stride_pairs
from surgery.operations.kv_latent.editing import KNEE, widths
from surgery.operations.kv_latent.settings import KVLatentSettings
from surgery.operations.kv_latent.solver import (
    averaged_moment,
    drop_orders,
    pair_gram,
    reduce_qk,
    reduce_vo,
    refit_o,
    refit_qk,
    select_pairs,
)

QUERIES = 64  # sampled query positions per window; every position counts for the output fit
PROBES = 8  # windows on which widths are priced; they take no part in solving the candidates
FITTED = 16  # windows on which the candidates are solved
STEPS = 12  # of L-BFGS


@dataclass(frozen=True)
class _Walk:
    """What both walks share."""

    measuring: Measuring
    settings: KVLatentSettings
    calls: list[LayerCall]
    entering: Tensor
    queries: Tensor

    @property
    def model(self) -> Model:
        return self.measuring.model


@torch.no_grad()
def solve(measuring: Measuring, settings: KVLatentSettings) -> Statistics:
    """Solve every layer; the statistics hold the new projections and, in their facts, widths and pairs."""
    measuring.network.requires_grad_(False)
    entering, calls = record_calls(measuring.network, measuring.windows)
    generator = torch.Generator().manual_seed(measuring.seed)
    count, length = measuring.windows.shape
    asked = torch.stack([torch.randperm(length, generator=generator)[:QUERIES].sort().values for _ in range(count)])
    walk = _Walk(measuring, settings, calls, entering, asked.to(entering.device))
    costs: list[dict[int, float]] = []
    qk, vo = widths(walk.model, settings)
    if settings.budgeted:
        costs = _price(walk)
        heads = walk.model.num_key_value_heads
        full = 2 * walk.model.head_dim * walk.model.num_hidden_layers * heads
        chosen = allocate_widths(costs, int(full * (settings.kv_ratio or 0.75) + 1e-6), [heads] * len(costs))
        qk, vo = chosen[0::2], chosen[1::2]
    return _collect(walk, qk, vo, costs)


def _collect(walk: _Walk, qk: list[int], vo: list[int], costs: list[dict[int, float]]) -> Statistics:
    tensors: dict[str, Tensor] = {}
    layers: list[dict[str, Any]] = []
    done = len(costs) // 2
    for layer, (solved, pairs, error) in enumerate(_solve_layers(walk, qk, vo)):
        tensors |= {f"layers.{layer}.{name}": t.cpu() for name, t in _stored(walk.model, solved).items()}
        layers.append(
            {
                "qk_dim": qk[layer], "vo_dim": vo[layer], "rope_pairs": pairs, "scaling": solved.scale,
                "relative_error": error,
            }
        )  # fmt: skip
        walk.measuring.progress(done + layer + 1, done + walk.model.num_hidden_layers)
    facts = {
        "layers": layers,
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "output_bias": any(name.endswith("o.bias") for name in tensors),
        "costs": [{str(width): cost for width, cost in item.items()} for item in costs],
    }
    if costs:
        chosen = [width for pair in zip(qk, vo, strict=True) for width in pair]
        heads = [walk.model.num_key_value_heads] * len(costs)
        facts |= {"predicted_kl": predicted_cost(costs, chosen), "knee": knee(costs, heads, KNEE)}
    return Statistics(tensors, facts)


def _solve_layers(walk: _Walk, qk: list[int], vo: list[int]) -> Iterator[tuple[Attention, list[list[int]], float]]:
    """Layer after layer: the narrowed attention, its pairs, and its relative error on the residual stream."""
    original_stream = narrowed_stream = walk.entering
    settings = walk.settings
    for layer, call in enumerate(walk.calls):
        attention = _attention_module(walk.model, call.layer)
        original = fold_if(load_attention(walk, layer), settings)
        original_x, target, following = _run(call, attention, original_stream)
        x = original_x
        if settings.refit_o:
            target = target + (original_stream - narrowed_stream)
            x, _, _ = _run(call, attention, narrowed_stream)
        narrowed, pairs = _narrow(walk, original, original_x, x, qk[layer], vo[layer])
        if settings.refit_o:
            narrowed = refit_o(x, narrowed, target)
        found = torch.cat([attention_output(part, narrowed) for part in x.split(CHUNK)])
        yield narrowed, pairs, float((found - target).square().sum() / target.square().sum())
        original_stream = following
        narrowed_stream = _run_replaced(call, attention, narrowed_stream, narrowed) if settings.refit_o else following


def _narrow(
    walk: _Walk, original: Attention, original_x: Tensor, x: Tensor, qk_dim: int, vo_dim: int
) -> tuple[Attention, list[list[int]]]:
    """Steps 1 to 3 of `solver.py` under the settings."""
    settings, head = walk.settings, walk.model.head_dim
    pairs, narrowed = [list(range(head // 2))] * walk.model.num_key_value_heads, original
    if qk_dim < head:
        free = settings.logit_gain and original.norm_query is None
        fixed = _fixed_pairs(walk.model, settings, qk_dim)
        gram = pair_gram(original_x, walk.queries, original) if free or fixed is None else None
        if gram is not None and fixed is None:
            fixed = select_pairs(drop_orders(gram, len(original.w_k), free=free), qk_dim // 2)
        pairs = fixed or pairs
        narrowed = reduce_qk(original, pairs, gram if free else None)
    if settings.refit_q and original.norm_query is None:
        narrowed = refit_qk(x, original_x, walk.queries, original, narrowed, STEPS)
    if vo_dim < head:
        if settings.vo_basis == "svd":
            narrowed = reduce_vo(narrowed, averaged_moment(x, walk.queries, narrowed), vo_dim)
        else:
            kept = stride_channels(head, vo_dim)
            bias = None if narrowed.b_v is None else narrowed.b_v[:, kept]
            narrowed = replace(narrowed, w_v=narrowed.w_v[:, kept], w_o=narrowed.w_o[..., kept].contiguous(), b_v=bias)
    return narrowed, pairs


def _fixed_pairs(model: Model, settings: KVLatentSettings, qk_dim: int) -> list[list[int]] | None:
    if settings.qk_select == "energy":
        return None
    stride = settings.qk_select == "stride"
    pairs = stride_pairs(model.head_dim, qk_dim) if stride else paper_pairs(model.head_dim, qk_dim)
    return None if pairs is None else [pairs] * model.num_key_value_heads


def _price(walk: _Walk) -> list[dict[int, float]]:
    """For each layer the cost of every key width, then of every value width: KL at the output, in nats per token."""
    probes = min(PROBES, max(1, len(walk.entering) // 4))
    fitting = slice(0, max(1, min(FITTED, len(walk.entering) - probes)))
    expected = _log_probabilities(walk, 0, walk.entering[-probes:])
    stream, costs, head = walk.entering, [], walk.model.head_dim
    for layer, call in enumerate(walk.calls):
        attention = _attention_module(walk.model, call.layer)
        original = fold_value_bias(load_attention(walk, layer))
        x, target, following = _run(call, attention, stream)
        fit_x, fit_queries, fit_target = x[fitting], walk.queries[fitting], target[fitting]
        gram = pair_gram(fit_x, fit_queries, original)
        moment = averaged_moment(fit_x, fit_queries, original)
        free = walk.settings.logit_gain and original.norm_query is None

        def price(candidate: Attention, layer: int = layer, call: LayerCall = call, at: nn.Module = attention) -> float:
            fitted = refit_o(fit_x, candidate, fit_target) if walk.settings.refit_o else candidate  # noqa: B023
            out = _run_replaced(call, at, stream[-probes:], fitted)  # noqa: B023
            found = _log_probabilities(walk, layer + 1, out)
            return divergence(expected, found)

        keys, orders = {head: 0.0}, drop_orders(gram, len(original.w_k), free=free)
        for width in offered_widths(head, even=True)[:-1]:
            keys[width] = price(reduce_qk(original, select_pairs(orders, width // 2), gram if free else None))
        values = {head: 0.0}
        for width in offered_widths(head, even=False)[:-1]:
            values[width] = price(reduce_vo(original, moment, width))
        costs += [keys, values]
        walk.measuring.progress(layer + 1, 2 * walk.model.num_hidden_layers)
        stream = following
    return costs


def _log_probabilities(walk: _Walk, first: int, hidden: Tensor) -> Tensor:
    """Log-probabilities [B * positions, vocabulary] after the layers from `first` on, at the sampled positions."""
    network = walk.measuring.network
    for call in walk.calls[first:]:
        hidden = call.run(hidden)
    at = walk.queries[-len(hidden) :][..., None].expand(-1, -1, hidden.shape[-1])
    found: Tensor = network.get_output_embeddings()(decoder(network).norm(hidden.gather(1, at)))
    return found.float().log_softmax(-1).flatten(0, 1)


def _run(call: LayerCall, attention: nn.Module, stream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attention inputs and outputs, and the layer's output, for a residual stream [N, T, D]."""
    with attention_traffic(attention) as seen:
        out = torch.cat([call.run(part) for part in stream.split(BATCH)])
    if not torch.isfinite(out).all():
        raise CorruptCheckpoint(
            "the base gives values that are NaN or infinite", cause="nothing can be fitted to them",
            remedy="check that the base works, or calibrate on other text",
        )  # fmt: skip
    return torch.cat([pair[0] for pair in seen]).float(), torch.cat([pair[1] for pair in seen]).float(), out


def _run_replaced(call: LayerCall, attention: nn.Module, stream: Tensor, narrowed: Attention) -> Tensor:
    """The layer's output with its attention replaced."""

    def compute(x: Tensor) -> Tensor:
        return attention_output(x.float(), narrowed).to(x.dtype)

    with replaced_output(attention, compute):
        return torch.cat([call.run(part) for part in stream.split(BATCH)])


def _attention_module(model: Model, layer: nn.Module) -> nn.Module:
    return layer.get_submodule(model.architecture.attention.attribute)


def fold_if(a: Attention, settings: KVLatentSettings) -> Attention:
    """Fold the value bias where the values change their basis."""
    return fold_value_bias(a) if settings.vo_basis == "svd" else a


def load_attention(walk: _Walk, layer: int) -> Attention:
    """A layer's tensors from the checkpoint, in fp32, with the rotary table that the model itself computed."""
    model, names, device = walk.model, walk.model.attention(layer), walk.entering.device
    heads, kv_heads, head = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    sizes = (heads, kv_heads, kv_heads)

    def read(name: str) -> Tensor | None:
        return walk.measuring.tensor(name).to(device, torch.float32) if model.has(name) else None

    def projections(kind: str) -> list[Tensor | None]:
        if names.fused is None:
            found = [read(f"{name}.{kind}") for name in (names.query, names.key, names.value)]
        else:
            fused = read(f"{names.fused}.{kind}")
            found = [None] * 3 if fused is None else list(fused.split([size * head for size in sizes]))
        return [None if t is None else t.unflatten(0, (size, head)) for t, size in zip(found, sizes, strict=True)]

    weights, biases = projections("weight"), projections("bias")
    output = read(f"{names.output}.weight")
    if output is None or any(weight is None for weight in weights):
        raise KeyError(names.output)  # `refuses` has checked that they are there
    cos, sin = (  # of M-RoPE's three tables, which text has equal, the first
        table.flatten(0, -3)[:1, :, : head // 2].float().to(device).expand(kv_heads, -1, -1)
        for table in walk.calls[layer].keywords["position_embeddings"]
    )
    w_q, w_k, w_v = (weight for weight in weights if weight is not None)
    clip = model.config.get(model.architecture.attention.clip or "")
    normed = _norms(walk, layer)
    return Attention(
        w_q, w_k, w_v, output.unflatten(1, (heads, head)), cos, sin, head**-0.5,
        b_q=biases[0], b_k=biases[1], b_v=biases[2], b_o=read(f"{names.output}.bias"),
        window=_window(walk, layer), clip=clip, norm_query=normed[0], norm_key=normed[1],
    )  # fmt: skip


def _norms(walk: _Walk, layer: int) -> tuple[Callable[[Tensor], Tensor] | None, Callable[[Tensor], Tensor] | None]:
    at = walk.model.architecture.attention
    if at.qk_norm == "none":
        return None, None
    epsilon = float(walk.model.config.get("rms_norm_eps", 1e-6))

    def norm(name: str) -> Callable[[Tensor], Tensor]:
        stored = walk.measuring.tensor(f"{at.prefix.format(layer=layer)}.{name}.weight")
        weight = stored.to(walk.entering.device, torch.float32)

        def apply(x: Tensor) -> Tensor:
            flat = x if at.qk_norm == "head" else x.flatten(-2)
            normed = weight * (flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + epsilon))
            return normed.view(x.shape)

        return apply

    return norm("q_norm"), norm("k_norm")


def _window(walk: _Walk, layer: int) -> int | None:
    """The sliding window of a layer, where it is shorter than the calibration windows."""
    attention = _attention_module(walk.model, walk.calls[layer].layer)
    config = walk.model.config
    stated = config.get(walk.model.architecture.attention.window or "")
    if config.get("layer_types"):
        slides = config["layer_types"][layer] == "sliding_attention"
    else:
        slides = config.get("use_sliding_window", True) and layer >= (config.get("max_window_layers") or 0)
    found = getattr(attention, "sliding_window", stated if slides else None)
    return found if isinstance(found, int) and found < walk.entering.shape[1] else None


def _stored(model: Model, a: Attention) -> dict[str, Tensor]:
    """Projections as a checkpoint stores them; under a norm, queries and keys keep what they have."""
    weights = {"v.weight": a.w_v.flatten(0, 1), "o.weight": a.w_o.flatten(1)}
    biases = {"o.bias": a.b_o}
    if model.qkv_bias:
        # One flag says whether all three have biases; a folded one is zero.
        biases["v.bias"] = a.w_v.new_zeros(a.w_v.shape[0] * a.w_v.shape[1]) if a.b_v is None else a.b_v.flatten()
    if a.norm_query is None:
        weights |= {"q.weight": a.w_q.flatten(0, 1), "k.weight": a.w_k.flatten(0, 1)}
        biases |= {name: None if b is None else b.flatten() for name, b in (("q.bias", a.b_q), ("k.bias", a.b_k))}
    return {name: t.contiguous() for name, t in (weights | biases).items() if t is not None}
