"""What expert pruning must come out as: stock models in which experts are never chosen, or fewer of the chosen count.

Both functions change a model of transformers 5.23 in place and leave its config alone. Routers there, those
of all nine families, return (logits, weights of the chosen, ids of the chosen) for hidden states [tokens, width].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ALWAYS_NORMALISED = ("mixtral", "gpt_oss", "granitemoe")
NEVER_NORMALISED = ("deepseek_v2",)  # whatever its config says of norm_topk_prob
NEVER = -1e9  # finite: where scores are compared within a group too, infinity would spread


def moe_blocks(model: nn.Module) -> Iterator[tuple[int, nn.Module, nn.Module]]:
    """(decoder layer index, MoE block, its router) of every layer that has experts."""
    for index, layer in enumerate(model.model.layers):
        for name in ("mlp", "block_sparse_moe"):
            block = getattr(layer, name, None)
            if hasattr(block, "experts"):
                yield index, block, block.gate if hasattr(block, "gate") else block.router


def masked(model: nn.Module, kept: dict[int, list[int]]) -> nn.Module:
    """Let no token be routed to an expert outside `kept` {decoder layer: expert ids}; layers not named stay whole.

    Where a family has a bias that only selects (DeepSeek-V3, GLM-4.5), or one inside the logits (gpt-oss), the bias of
    dropped experts is -1e9. Elsewhere their logits are -inf as the router's projection returns them, so before softmax;
    in deepseek_v2 they thereby count for nothing in the score of their group too, which is the maximum of the group.
    Returns the model.
    """
    routers = {index: router for index, _, router in moe_blocks(model)}
    for layer, ids in kept.items():
        router = routers[layer]
        dropped = torch.ones(len(router.weight), dtype=torch.bool)
        dropped[ids] = False
        bias = getattr(router, "e_score_correction_bias", None)
        if bias is None:
            bias = getattr(router, "bias", None)
        if bias is not None:
            bias.data = bias.data.masked_fill(dropped.to(bias.device), NEVER)
        else:
            router.forward = _without(router.forward, dropped)
    return model


def top_k(model: nn.Module, counts: dict[int, int]) -> nn.Module:
    """Let only the `counts[layer]` first choices of each token have weight, the sum being shared among them again where
    the family normalises. Layers not named stay as they are. Returns the model.
    """
    routers = {index: router for index, _, router in moe_blocks(model)}
    for layer, count in counts.items():
        router = routers[layer]
        router.forward = _with_fewer(router, count, normalised=_normalises(model.config))
    return model


def _normalises(config: Any) -> bool:
    if config.model_type in NEVER_NORMALISED:
        return False
    return config.model_type in ALWAYS_NORMALISED or config.norm_topk_prob


class _MaskedLinear(TorchFunctionMode):
    """Every linear map inside the mode gives -inf for the outputs in `dropped`."""

    def __init__(self, dropped: Tensor) -> None:
        super().__init__()
        self.dropped = dropped

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is not nn.functional.linear:
            return result
        return result.masked_fill(self.dropped.to(result.device), float("-inf"))


def _without(forward: Callable[..., Any], dropped: Tensor) -> Callable[..., Any]:
    def route(*args, **kwargs):
        with _MaskedLinear(dropped):
            return forward(*args, **kwargs)

    return route


def _with_fewer(router: nn.Module, count: int, *, normalised: bool) -> Callable[..., Any]:
    forward = router.forward  # which may already be a masked one

    def route(*args, **kwargs):
        logits, weights, ids = forward(*args, **kwargs)
        assert 1 <= count <= ids.shape[-1], f"{count} of {ids.shape[-1]} choices"
        order = logits.float()
        if hasattr(router, "e_score_correction_bias"):
            order = order.sigmoid() + router.e_score_correction_bias
        chosen = order.gather(-1, ids)
        keep = torch.zeros_like(weights).scatter(-1, chosen.topk(count, dim=-1).indices, 1.0)
        fewer = weights * keep
        if normalised:
            fewer = fewer * (weights.sum(-1, keepdim=True) / fewer.sum(-1, keepdim=True))
        return logits, fewer, ids

    return route
