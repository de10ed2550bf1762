"""Rounding experts that share one parameter in memory and have matrices of their own on disk.

Each is rounded for the tokens that choose it. One that too few choose is rounded as if every token of the layer had,
and where even those are too few, to the nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.calibration.files import mapped
from surgery.calibration.layers import BATCH, LayerCall
from surgery.errors import UnsupportedModel
from surgery.operations.experts.blocks import Block, moe_block, watched
from surgery.operations.quantize.moments import Moments
from surgery.operations.quantize.targets import Linear

# Tokens that an expert needs, per input, to be rounded for its own.
ENOUGH = 2
# Tokens per input that stand for all of a layer's, where those of an expert are too few.
SHARED = 4
TOLERANCE = 1e-3
# Rows that go through an expert at once.
AT_ONCE = 4096
# Gate, up and down, as families call them.
PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


@dataclass(frozen=True)
class FusedExperts:
    """The experts of one layer in memory; `names` gives gate, up and down of each expert as on disk."""

    block: Block
    names: Sequence[tuple[Linear, Linear, Linear]]

    def weights(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """Views of gate [I, D], up [I, D] and down [D, I] of an expert."""
        module: Any = self.block.experts
        both = module.gate_up_proj.data[expert]
        half = both.shape[0] // 2
        return both[:half], both[half:], module.down_proj.data[expert]

    def between(self, rows: Tensor, expert: int) -> Tensor:
        """What enters `down` of an expert, for rows [N, D]."""
        gate, up, _ = self.weights(expert)
        module: Any = self.block.experts
        made: Tensor = module.act_fn(rows @ gate.t()) * (rows @ up.t())
        return made


def fused_experts(layer: nn.Module, number: int, linears: Sequence[Linear]) -> FusedExperts | None:
    """The experts of a layer whose matrices `linears` are fused in memory; None where there are none.

    Raises UnsupportedModel where they are held or computed in a way that is not known here.
    """
    if not linears:
        return None
    block = moe_block(layer, number)
    names = _by_expert(linears)
    if block is None or len(names) != block.count:
        raise _unknown(linears[0].module, "the layer that is loaded has no such experts")
    found = FusedExperts(block, names)
    _check(found)
    return found


def _by_expert(linears: Sequence[Linear]) -> list[tuple[Linear, Linear, Linear]]:
    experts: dict[int, list[Linear]] = {}
    for linear in linears:
        number = next(int(part) for part in reversed(linear.module.split(".")) if part.isdecimal())
        experts.setdefault(number, []).append(linear)
    named = []
    for number in sorted(experts):
        of = {linear.module.rpartition(".")[2]: linear for linear in experts[number]}
        names = next((names for names in PROJECTIONS if of.keys() == set(names)), None)
        if names is None:
            raise _unknown(experts[number][0].module, "an expert is not gate, up and down")
        gate, up, down = (of[name] for name in names)
        named.append((gate, up, down))
    return named


@torch.no_grad()
def _check(found: FusedExperts) -> None:
    """Whether one expert, computed here, gives what the loaded module gives."""
    module: Any = found.block.experts
    (gate, up, down), (rows_of_gate, _, rows_of_down) = found.names[0], found.weights(0)
    fits = rows_of_gate.shape == (gate.outputs, gate.inputs) and rows_of_down.shape == (down.outputs, down.inputs)
    if not fits or not hasattr(module, "act_fn") or up.outputs != gate.outputs:
        raise _unknown(gate.module, "their parameters have other shapes than on disk")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8, gate.inputs, generator=generator).to(module.down_proj.device, module.down_proj.dtype)
    _, wanted = next(found.block.outputs(rows, torch.zeros(8, 1, dtype=torch.long, device=rows.device)))
    ours = found.between(rows, 0) @ found.weights(0)[2].t()
    if (ours - wanted).abs().max() > TOLERANCE * max(float(wanted.abs().max()), 1e-6) * (
        1 if rows.dtype == torch.float32 else 30
    ):
        raise _unknown(gate.module, "they compute something else than down(act(gate(x)) * up(x))")


def _unknown(module: str, cause: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"experts such as {module!r} cannot be calibrated",
        cause=cause,
        remedy="use method: rtn, which looks at weights alone",
    )


@dataclass(frozen=True)
class Traffic:
    """What went into the experts of a layer: hidden states [N, D] (on disk) and the ids [N, k] that tokens chose."""

    hidden: Tensor
    chosen: Tensor

    def of(self, expert: int) -> Tensor:
        """The rows that chose an expert."""
        return self.hidden[(self.chosen == expert).any(-1).nonzero().flatten()]

    def spread(self, count: int) -> Tensor:
        """At most `count` rows, evenly spread."""
        at = torch.linspace(0, len(self.hidden) - 1, min(count, len(self.hidden)), dtype=torch.float64).round().long()
        return self.hidden[at]


@torch.no_grad()
def traffic(found: FusedExperts, call: LayerCall, stream: Tensor, scratch: Path, device: torch.device) -> Traffic:
    """Run a layer on hidden states [N, T, D] and keep what its experts see."""
    tokens, width = stream.shape[0] * stream.shape[1], stream.shape[2]
    kept = mapped(scratch / "experts.bin", (tokens, width), stream.dtype)
    chosen: list[Tensor] = []
    position = [0]

    def see(_block: Block, hidden: Tensor, ids: Tensor, _weights: Tensor) -> None:
        kept[position[0] : position[0] + len(hidden)] = hidden.cpu()
        position[0] += len(hidden)
        chosen.append(ids.cpu())

    with watched([found.block], see):
        for part in stream.split(BATCH):
            call.run(part.to(device))
    return Traffic(kept[: position[0]], torch.cat(chosen))


def round_experts(
    found: FusedExperts,
    seen: Traffic,
    device: torch.device,
    settle: Callable[[Linear, Tensor, Moments], None],
    *,
    full: bool,
) -> Iterator[tuple[Linear, str]]:
    """Round every expert: `settle` rounds a matrix and writes what came out into the weight that it was given.

    Yields the matrices that were not rounded for an expert's own tokens, with the reason.
    """

    def moments(inputs: int, rows: Tensor, enters: Callable[[Tensor], Tensor] = lambda part: part) -> Moments:
        made = Moments.empty(inputs, device, full=full and len(rows) >= inputs)
        for part in rows.split(AT_ONCE):
            made.see(enters(part))
        return made

    for expert, (gate, up, down) in enumerate(found.names):
        weights = found.weights(expert)
        rows, reason = seen.of(expert), ""
        widest = max(gate.inputs, down.inputs)
        if len(rows) < ENOUGH * widest:
            reason = f"{len(rows)} tokens chose it: rounded for all tokens of the layer"
            rows = seen.spread(SHARED * widest)
        rows = rows.to(device)
        inputs = moments(gate.inputs, rows)
        for linear, weight in ((gate, weights[0]), (up, weights[1])):
            settle(linear, weight, inputs)
        settle(down, weights[2], moments(down.inputs, rows, partial(found.between, expert=expert)))
        if reason:
            yield from ((linear, reason) for linear in (gate, up, down))
