"""The layers of a checkpoint, one in memory at a time: a model without weights, filled layer by layer from disk.

Where a release of transformers holds a layer's tensors under other names than the files do (fused experts), the whole
model is loaded instead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from surgery.calibration.layers import decoder, decoder_layers, enter
from surgery.calibration.loading import auto_class, loaded_model, sees
from surgery.checkpoint.evaluate import load
from surgery.checkpoint.reader import Checkpoint

Keywords = dict[str, Any]


@dataclass(frozen=True)
class Layers:
    """The decoder layers of `checkpoint` in `dtype` on `device`; `resident` says that all of them are in memory."""

    network: Any
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    resident: bool

    def layer(self, index: int, changed: Mapping[str, Tensor] = MappingProxyType({})) -> nn.Module:
        """A copy of layer `index` with its stored weights, or those of `changed` (by tensor name) where it has them."""
        return self._filled(decoder_layers(self.network)[index], changed)

    @contextmanager
    def entrance(self) -> Iterator[None]:
        """While it is open, the network has what `calls` needs: the embeddings."""
        if self.resident:
            yield
            return
        held = self.network.get_input_embeddings()
        self.network.set_input_embeddings(self._filled(held, {}))
        try:
            yield
        finally:
            self.network.set_input_embeddings(held)

    @contextmanager
    def exit(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """While it is open: a function from what leaves the last layer [..., D] to logits [..., V]."""
        norm, head = decoder(self.network).norm, self.network.get_output_embeddings()
        weight = head.weight
        if not self.resident:
            norm = self._filled(norm, {})
            tied = f"{_prefix(self.checkpoint, self.network, head)}weight" not in self.checkpoint.tensors
            weight = self._filled(self.network.get_input_embeddings() if tied else head, {}).weight
        scale = getattr(self.network.config, "logits_scaling", 1.0)
        yield lambda hidden: nn.functional.linear(norm(hidden), weight, head.bias) / scale

    def calls(self, tokens: Tensor) -> tuple[Tensor, list[Keywords]]:
        """For tokens [N, T]: hidden states that enter the first layer, and each layer's keyword arguments."""
        with torch.no_grad():
            return enter(self.network, tokens.to(self.device))

    def prefix(self, index: int) -> str:
        """What the tensor names of layer `index` begin with."""
        return _prefix(self.checkpoint, self.network, decoder_layers(self.network)[index])

    def _filled(self, module: nn.Module, changed: Mapping[str, Tensor]) -> nn.Module:
        prefix, made = _prefix(self.checkpoint, self.network, module), copy.deepcopy(module)
        names = [name for name, _ in module.named_parameters() if not self.resident or prefix + name in changed]
        values = {name: self._value(prefix + name, changed) for name in names}
        made.load_state_dict(values, strict=False, assign=True)
        return made

    def _value(self, name: str, changed: Mapping[str, Tensor]) -> Tensor:
        found = changed[name] if name in changed else load(self.checkpoint, self.checkpoint.tensors[name])
        return found.to(self.device, self.dtype)


@contextmanager
def opened_layers(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Iterator[Layers]:
    """The layers of a checkpoint, streamed where its tensor names allow that."""
    network = skeleton(checkpoint)
    if _streamable(checkpoint, network):
        for module in network.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        yield Layers(network.eval(), checkpoint, device, dtype, resident=False)
        return
    with loaded_model(checkpoint, str(device)) as whole:
        yield Layers(whole.to(dtype), checkpoint, device, dtype, resident=True)


def skeleton(checkpoint: Checkpoint) -> Any:
    """The model with real buffers (rotary tables) and parameters that have only a shape."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    trusted = {"trust_remote_code": checkpoint.remote_code}
    config = AutoConfig.from_pretrained(str(checkpoint.folder), **trusted)
    with init_empty_weights(include_buffers=False):
        return auto_class(checkpoint).from_config(config, **trusted)


def _prefix(checkpoint: Checkpoint, network: Any, module: nn.Module) -> str:
    name, vision = next(name for name, found in network.named_modules() if found is module), sees(checkpoint)
    return f"{name if vision is None else vision.stored(name)}."


def _streamable(checkpoint: Checkpoint, network: Any) -> bool:
    modules = [network.get_input_embeddings(), *decoder_layers(network)]
    prefixes = [_prefix(checkpoint, network, module) for module in modules]
    pairs = zip(prefixes, modules, strict=True)
    wanted = ((prefix + name, tuple(p.shape)) for prefix, module in pairs for name, p in module.named_parameters())
    return all(name in checkpoint.tensors and checkpoint.tensors[name].shape == shape for name, shape in wanted)
