"""Running a model layer by layer on fixed windows, with what goes in and out of each attention.

A layer is called exactly as its model calls it: the keyword arguments (rotary tables, masks) are recorded from one real
forward pass, so no release's mask code is repeated here. Only one layer's activations are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 16


@dataclass(frozen=True)
class LayerCall:
    """A decoder layer and the keyword arguments that its model gives it for windows of one length."""

    layer: nn.Module
    keywords: dict[str, Any]

    def run(self, hidden: Tensor) -> Tensor:
        """Apply the layer to hidden states [B, T, D]."""
        out = self.layer(hidden, **self.keywords)
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found


def input_device(network: Any) -> torch.device:
    """Where inputs belong; accelerate leaves parameters that it offloads to disk on `meta`."""
    device: torch.device = network.device
    return torch.device("cpu") if device.type == "meta" else device


def decoder_layers(network: Any) -> nn.ModuleList:
    """The decoder layers of a causal language model."""
    layers: nn.ModuleList = network.get_decoder().layers if hasattr(network, "get_decoder") else network.model.layers
    return layers


def record_calls(network: Any, windows: Tensor) -> tuple[Tensor, list[LayerCall]]:
    """Hidden states [N, T, D] that enter the first layer, and how each layer is called."""
    layers = decoder_layers(network)
    keywords: list[dict[str, Any]] = [{} for _ in layers]
    entering: list[Tensor] = []

    def recorder(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            keywords[index] = {k: v for k, v in named.items() if k != "hidden_states"}

        return hook

    def first(_module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        entering.append(positional[0] if positional else named["hidden_states"])
        raise _Entered

    handles = [layer.register_forward_pre_hook(recorder(i), with_kwargs=True) for i, layer in enumerate(layers)]
    network(input_ids=windows[:1].to(input_device(network)), use_cache=False)
    for handle in handles:
        handle.remove()
    handle = layers[0].register_forward_pre_hook(first, with_kwargs=True)
    try:
        for batch in windows.split(BATCH):
            try:
                network(input_ids=batch.to(input_device(network)), use_cache=False)
            except _Entered:
                continue
    finally:
        handle.remove()
    return torch.cat(entering), [LayerCall(layer, kept) for layer, kept in zip(layers, keywords, strict=True)]


class _Entered(Exception):
    """Ends a forward pass once the first layer was reached."""


@contextmanager
def attention_traffic(attention: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect (input, output) of an attention module, each [B, T, D], while the context is open."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(_module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        entering = positional[0] if positional else named["hidden_states"]
        seen.append((entering, out[0] if isinstance(out, tuple) else out))

    handle = attention.register_forward_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def replaced_output(attention: nn.Module, compute: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let an attention module return `compute(its input)` in the place of its own output."""

    def hook(_module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any], out: Any) -> Any:
        entering = positional[0] if positional else named["hidden_states"]
        return (compute(entering), *out[1:]) if isinstance(out, tuple) else compute(entering)

    handle = attention.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
