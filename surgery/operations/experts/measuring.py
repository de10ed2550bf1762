"""How experts are used on calibration text, and what leaving some out does to the model's output.

Statistics are sums over tokens in float64: nothing that is kept grows with the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from surgery.calibration.compare import divergence, spread
from surgery.calibration.layers import BATCH, LayerCall, decoder, input_device
from surgery.errors import CorruptCheckpoint
from surgery.operations.experts.blocks import Block, changed, watched


class Usage:
    """Sums for each layer and expert.

    sums   [layers, alpha, beta, experts]: over the tokens of an expert, (router weight)^alpha |output|^beta
    peaks  [layers, experts]: the largest entry of any output
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        count = blocks[0].count
        self.row = {block.layer: row for row, block in enumerate(blocks)}
        self.sums = torch.zeros(len(blocks), 3, 3, count, dtype=torch.float64)
        self.peaks = torch.zeros(len(blocks), count, dtype=torch.float64)

    def see(self, block: Block, hidden: Tensor, chosen: Tensor, weights: Tensor) -> None:
        """Add one call of a block's experts."""
        row = self.row[block.layer]
        flat, weight = chosen.reshape(-1).cpu(), weights.reshape(-1).double().cpu()
        for rows, out in block.outputs(hidden, chosen):
            at = rows.cpu()
            ids, norms = flat[at], out.float().norm(dim=-1).double().cpu()
            if not torch.isfinite(norms).all():
                raise CorruptCheckpoint(
                    f"layer {block.layer} gives values that are NaN or infinite",
                    cause="nothing can be measured on them", remedy="check that the base works",
                )  # fmt: skip
            for alpha in range(3):
                for beta in range(3):
                    self.sums[row, alpha, beta].index_add_(0, ids, weight[at] ** alpha * norms**beta)
            self.peaks[row].scatter_reduce_(0, ids, out.abs().amax(-1).double().cpu(), "amax")


def run_decoder(network: Any, windows: Tensor, done: Callable[[int], None]) -> None:
    """Put windows [N, T] through the layers, without the head."""
    for start in range(0, len(windows), BATCH):
        decoder(network)(input_ids=windows[start : start + BATCH].to(input_device(network)), use_cache=False)
        done(min(start + BATCH, len(windows)))


def measure_usage(network: Any, blocks: Sequence[Block], windows: Tensor, done: Callable[[int], None]) -> Usage:
    """One pass over the text through the model as it is."""
    usage = Usage(blocks)
    with watched(blocks, usage.see):
        run_decoder(network, windows, done)
    return usage


def run_layer(call: LayerCall, stream: Tensor) -> Tensor:
    """A layer's output for hidden states [N, T, H]."""
    return torch.cat([call.run(part) for part in stream.split(BATCH)])


def log_probabilities(network: Any, calls: Sequence[LayerCall], hidden: Tensor) -> Tensor:
    """Log-probabilities [N * positions, vocabulary] of what enters the first of `calls`, at evenly spread positions."""
    for call in calls:
        hidden = run_layer(call, hidden)
    found: Tensor = network.get_output_embeddings()(decoder(network).norm(hidden[:, spread(hidden.shape[1])]))
    return found.float().log_softmax(-1).flatten(0, 1)


@contextmanager
def all_changed(
    blocks: Mapping[int, Block], kept: Mapping[int, Sequence[int]], top_k: Mapping[int, int]
) -> Iterator[None]:
    """The model with only the experts `kept`, and `top_k` of them per token, in every layer."""
    with ExitStack() as stack:
        for layer, block in blocks.items():
            stack.enter_context(changed(block, kept.get(layer), top_k.get(layer)))
        yield


def mass_factors(
    network: Any,
    blocks: Mapping[int, Block],
    windows: Tensor,
    kept: Mapping[int, Sequence[int]],
    top_k: Mapping[int, int],
) -> dict[int, float]:
    """By layer: mean sum of the routed weights in the base over that after the change, both in their own model."""
    before, after = _mass(network, blocks, windows), dict[int, float]()
    with all_changed(blocks, kept, top_k):
        after = _mass(network, blocks, windows)
    return {layer: before[layer] / after[layer] for layer in blocks if after[layer] > 0}


def _mass(network: Any, blocks: Mapping[int, Block], windows: Tensor) -> dict[int, float]:
    sums, tokens = dict.fromkeys(blocks, 0.0), dict.fromkeys(blocks, 0)

    def see(block: Block, _hidden: Tensor, _chosen: Tensor, weights: Tensor) -> None:
        sums[block.layer] += float(weights.double().sum())
        tokens[block.layer] += len(weights)

    with watched(list(blocks.values()), see):
        run_decoder(network, windows, lambda _: None)
    return {layer: sums[layer] / max(tokens[layer], 1) for layer in blocks}


@contextmanager
def scaled(blocks: Mapping[int, Block], factors: Mapping[int, float]) -> Iterator[None]:
    """Multiply what the experts of each layer give, all together, by a factor."""

    def hook_of(factor: float) -> Callable[..., Tensor]:
        return lambda _module, _positional, out: out * factor

    handles = [blocks[layer].experts.register_forward_hook(hook_of(factor)) for layer, factor in factors.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits_of(network: Any, windows: Tensor) -> Tensor:
    """Log-probabilities [N * positions, vocabulary] of the whole model, at evenly spread positions."""
    at = spread(windows.shape[1])
    parts = [
        network(input_ids=part.to(input_device(network)), use_cache=False).logits[:, at].float().log_softmax(-1)
        for part in windows.split(BATCH)
    ]
    return torch.cat(parts).flatten(0, 1)


def correction(
    network: Any,
    blocks: Mapping[int, Block],
    windows: Tensor,
    kept: Mapping[int, Sequence[int]],
    top_k: Mapping[int, int],
) -> tuple[dict[int, float], dict[str, float]]:
    """Factors of the mass correction, and the divergence on held-out windows without and with it.

    A quarter of the windows judges; the factors come from the rest.
    """
    held = max(1, len(windows) // 4)
    fitting, judging = windows[:-held] if len(windows) > held else windows, windows[-held:]
    factors = mass_factors(network, blocks, fitting, kept, top_k)
    expected = logits_of(network, judging)
    with all_changed(blocks, kept, top_k):
        without = divergence(expected, logits_of(network, judging))
        with scaled(blocks, factors):
            corrected = divergence(expected, logits_of(network, judging))
    return factors, {"without": without, "with": corrected}
