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
    layers: nn.ModuleList = decoder(network).layers
    return layers


def decoder(network: Any) -> Any:
    """The part of a causal language model below its head: layers, and the norm after them."""
    return network.get_decoder() if hasattr(network, "get_decoder") else network.model


def record_calls(network: Any, windows: Tensor) -> tuple[Tensor, list[LayerCall]]:
    """Hidden states [N, T, D] that enter the first layer, and how each layer is called. No layer runs."""
    _, keywords = enter(network, windows[:1])
    calls = [LayerCall(layer, kept) for layer, kept in zip(decoder_layers(network), keywords, strict=True)]
    return torch.cat([enter(network, batch)[0] for batch in windows.split(BATCH)]), calls


def enter(network: Any, tokens: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """For tokens [N, T]: the hidden states that enter the first layer, and the keyword arguments of each layer."""
    layers = decoder_layers(network)
    keywords: list[dict[str, Any]] = [{} for _ in layers]
    entering: list[Tensor] = []

    def stand_in(index: int) -> Callable[..., tuple[Any]]:
        def forward(hidden_states: Any, *_: Any, **named: Any) -> tuple[Any]:
            keywords[index] = named
            entering.append(hidden_states)
            if index == len(layers) - 1:
                raise _Entered
            return (hidden_states,)  # releases differ in whether a layer returns a tuple; a stand-in takes either

        return forward

    own = [layer.__dict__.get("forward") for layer in layers]
    for index, layer in enumerate(layers):
        layer.forward = stand_in(index)
    try:
        network(input_ids=tokens.to(input_device(network)), use_cache=False)
    except _Entered:
        pass
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:  # a hook of accelerate stands there
                layer.forward = forward
    return entering[0], keywords


class _Entered(Exception):
    """Ends a forward pass once what was waited for is reached."""


def called_with(module: nn.Module, run: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `run` calls a module with first; neither it nor anything behind it runs."""
    caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def catch(_module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        caught.append((positional, named))
        raise _Entered

    handle = module.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        run()
    except _Entered:
        pass
    finally:
        handle.remove()
    return caught[0]


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
