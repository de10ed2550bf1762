"""The MoE blocks of a loaded model: what goes through their experts, and the same block with fewer of them.

Nothing of a family's routing is repeated here. The experts of transformers 5 are one module that is called with hidden
states, the chosen ids and the weights that multiply the outputs, final; calling it again with weights of one gives each
expert's own output, however its weights are stored.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.calibration.layers import decoder_layers
from surgery.errors import MissingPackage, UnsupportedModel

BLOCKS = ("mlp", "block_sparse_moe")
ROUTERS = ("gate", "router")
COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")
# Expert outputs that are held at once.
ROWS = 8192


@dataclass(frozen=True)
class Block:
    """A MoE block: its router, its experts, and how many there are."""

    layer: int
    block: nn.Module
    router: nn.Module
    experts: nn.Module
    count: int

    def routed(self, hidden: Tensor, positional: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """The chosen ids [N, k] and their weights [N, k], in float32, of a call of the experts."""
        chosen, weights = positional[0], positional[1]
        if weights.shape[-1] != chosen.shape[-1]:  # releases before 5.4 hand over a weight for every expert
            weights = weights.gather(-1, chosen)
        rows = hidden.reshape(-1, hidden.shape[-1]).shape[0]
        return chosen.reshape(rows, -1), weights.reshape(rows, -1).float()

    def outputs(self, hidden: Tensor, chosen: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For hidden states [N, H] and ids [N, k]: (row numbers into the N * k outputs, outputs), part by part."""
        tokens, slots = chosen.shape
        flat = chosen.reshape(-1, 1)
        for start in range(0, tokens * slots, ROWS):
            rows = torch.arange(start, min(start + ROWS, tokens * slots), device=hidden.device)
            part = hidden.reshape(tokens, -1)[rows // slots]
            ones = torch.ones(len(rows), 1, dtype=part.dtype, device=part.device)
            yield rows, self.experts(part, flat[rows], ones)


def moe_blocks(network: Any) -> dict[int, Block]:
    """The MoE blocks of a loaded model by decoder layer. Raises MissingPackage on transformers before 5."""
    found: dict[int, Block] = {}
    for number, layer in enumerate(decoder_layers(network)):
        block = moe_block(layer, number)
        if block is not None:
            found[number] = block
    return found


def moe_block(layer: nn.Module, number: int) -> Block | None:
    """The MoE block of decoder layer `number`; None where it has none. Raises as `moe_blocks` does."""
    for name in BLOCKS:
        block = getattr(layer, name, None)
        router = next((getattr(block, name) for name in ROUTERS if hasattr(block, name)), None)
        if block is None or router is None:
            continue
        experts = getattr(block, "experts", nn.ModuleList())
        if isinstance(experts, nn.ModuleList) or len(inspect.signature(experts.forward).parameters) < 3:
            import transformers

            raise MissingPackage(
                f"transformers {transformers.__version__} cannot tell how experts are used",
                cause="experts are one module, called with their final weights, in later releases only",
                remedy="pip install -U transformers, or choose a way without calibration: aimer, router_norm, rtn",
            )
        return Block(number, block, router, experts, _count(block, router, experts))
    return None


def _count(*modules: nn.Module) -> int:
    known = (getattr(module, name, None) for module in modules for name in COUNTS)
    return next(count for count in known if isinstance(count, int))


@contextmanager
def watched(blocks: Sequence[Block], see: Callable[[Block, Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `see(block, hidden [N, H], ids [N, k], weights [N, k])` whenever a block's experts are called."""
    inside: list[bool] = []

    def hook_of(block: Block) -> Callable[..., None]:
        signature = inspect.signature(block.experts.forward)

        def hook(_module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            if inside:  # `see` calls the experts itself
                return
            hidden, *rest = signature.bind(*positional, **named).arguments.values() if named else positional
            inside.append(True)
            try:
                see(block, hidden.reshape(-1, hidden.shape[-1]), *block.routed(hidden, rest))
            finally:
                inside.pop()

        return hook

    handles = [block.experts.register_forward_pre_hook(hook_of(block), with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def changed(block: Block, kept: Sequence[int] | None = None, top_k: int | None = None) -> Iterator[None]:
    """Let a block have only the experts `kept`, or tokens take only `top_k` of them, while the context is open.

    Raises UnsupportedModel where the weights are not in memory.
    """
    undo: list[Callable[[], None]] = []
    modules = (block.block, block.router, block.experts)
    if kept is not None and len(kept) < block.count:
        for module in (block.router, block.experts):
            for held in (module._parameters, module._buffers):  # noqa: SLF001 - both are plain dicts of tensors
                for name, tensor in held.items():
                    if tensor is not None and tensor.shape[:1] == (block.count,):
                        undo.append(_put(held, name, _rows(tensor, kept)))
        for module in modules:
            undo += [_set(module, name, len(kept)) for name in COUNTS if getattr(module, name, None) == block.count]
    if top_k is not None:
        undo += [_set(module, "top_k", top_k) for module in modules if isinstance(getattr(module, "top_k", None), int)]
    try:
        yield
    finally:
        for back in undo:
            back()


def _rows(tensor: Tensor, kept: Sequence[int]) -> Tensor:
    if tensor.is_meta:
        raise UnsupportedModel(
            "the model does not fit into memory, and this way of choosing experts runs changed layers",
            cause="layers that lie on disk cannot be changed",
            remedy="use allocation: uniform and statistics: one_shot without mass_correction, or a larger machine",
        )
    taken = tensor.index_select(0, torch.tensor(list(kept), device=tensor.device))
    return nn.Parameter(taken, requires_grad=False) if isinstance(tensor, nn.Parameter) else taken


def _put(held: Any, name: str, value: Any) -> Callable[[], None]:
    old = held[name]
    held[name] = value
    return lambda: held.__setitem__(name, old)


def _set(module: nn.Module, name: str, value: int) -> Callable[[], None]:
    old = getattr(module, name)
    setattr(module, name, value)
    return lambda: setattr(module, name, old)
