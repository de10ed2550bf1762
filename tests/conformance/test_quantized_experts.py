"""GPTQ of experts: each for its own tokens, against Hessians that this file sums up itself in float64.

What an expert of the first layer sees is found without the operation: the dense decode of the result is run in plain
transformers, a hook reads what enters the block, and the routing is computed here from the router's weight.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from surgery.calibration.loading import loaded_model
from surgery.calibration.text import sampled_windows
from surgery.checkpoint.reader import open_checkpoint
from surgery.manifest import manifest_from_dict
from surgery.quantization.gptq import gptq
from surgery.quantization.schemes import Grid
from tests import quant_reference
from tests.quantized_cases import convert, tensors_of
from tests.tiny import write_tiny

GPTQ = {"quantize": {"method": "gptq", "group_size": 32, "raise_above": 100}}
RTN = {"quantize": {"group_size": 32}}
GRID = Grid(4, 32)
EXPERTS, CHOSEN, STARVED = 5, 2, 2
LAYER = "model.layers.0.mlp"
ENOUGH = {"text": "self", "samples": 48, "length": 24}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def write_base(folder: Path, *, starved: bool) -> Path:
    """Two layers of five experts of which two are chosen; where `starved`, never the third of the first layer."""
    base = write_tiny(folder, "qwen3_moe", seed=9, experts=EXPERTS, top_k=CHOSEN)
    tensors = load_file(base / "model.safetensors")
    router = tensors[f"{LAYER}.gate.weight"]
    if starved:  # two of the others are above zero for every token, and it is at zero
        router[1], router[4], router[STARVED] = -router[0], -router[3], 0
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return base


def seen_windows(base: Path, calibration: dict[str, Any]) -> Tensor:
    """The windows that rounding sees: one in eight, evenly spread, is held out."""
    manifest = manifest_from_dict({"surgery": 1, "operations": [GPTQ], "calibration": calibration})
    with loaded_model(open_checkpoint(base), "cpu") as network:
        tokens = sampled_windows(network, manifest.calibration, 256, 1).tokens
    held = max(len(tokens) // 8, 1)
    out = {round(at * (len(tokens) - 1) / max(held - 1, 1)) for at in range(held)}
    return tokens[[row for row in range(len(tokens)) if row not in out]]


def entering(out: Path, folder: Path, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states [N, D] that enter the first block of experts, and the experts [N, k] that each token chooses."""
    import transformers

    dense = quant_reference.write_dense(out, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(dense).eval()
    rows: list[Tensor] = []
    block = model.get_submodule(LAYER)
    handle = block.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        for window in tokens:
            model(window[None], use_cache=False)
    handle.remove()
    hidden = torch.cat(rows).double()
    scores = hidden @ tensors_of(dense)[f"{LAYER}.gate.weight"].double().t()
    best = scores.sort(-1, descending=True)
    assert (best.values[:, CHOSEN - 1] - best.values[:, CHOSEN]).min() > 1e-6  # no tie, so that routing is certain
    return hidden, best.indices[:, :CHOSEN]


def stored_codes(out: Path, module: str) -> tuple[Tensor, Tensor]:
    """Codes [out, in] and scales of a packed module, by the reference's decoding."""
    scale = tensors_of(out)[f"{module}.weight_scale"]
    weight = quant_reference.decoded(out)[f"{module}.weight"]
    return (weight.view(*scale.shape, -1) / scale.unsqueeze(-1)).round().view(weight.shape).to(torch.int8), scale


def differing(found: Tensor, wanted: Tensor) -> float:
    return float((found != wanted).float().mean())


def expert_inputs(rows: Tensor, out: Path, expert: int) -> dict[str, Tensor]:
    """What enters each matrix of an expert, in float64, once gate and up are rounded."""
    dense = quant_reference.decoded(out)
    gate, up = (dense[f"{LAYER}.experts.{expert}.{name}.weight"].double() for name in ("gate_proj", "up_proj"))
    between = torch.nn.functional.silu(rows @ gate.t()) * (rows @ up.t())
    return {"gate_proj": rows, "up_proj": rows, "down_proj": between}


def check_expert(base: Path, out: Path, expert: int, rows: Tensor, *, tolerance: float = 0.002) -> None:
    """The codes are those of `gptq` for these rows; few may differ, where float32 sums fall beside a half."""
    weights, nearest = tensors_of(base), 0.0
    for name, inputs in expert_inputs(rows, out, expert).items():
        module = f"{LAYER}.experts.{expert}.{name}"
        codes, scale = stored_codes(out, module)
        weight = weights[f"{module}.weight"]
        wanted = gptq(weight, inputs.t() @ inputs, scale, GRID)
        assert wanted is not None
        assert differing(codes, wanted.codes) <= tolerance, module
        plain = (weight.view(*scale.shape, -1) / scale.unsqueeze(-1)).round().clamp(-8, 7).view(weight.shape)
        nearest = max(nearest, differing(codes, plain.to(torch.int8)))
    assert nearest > 0.02  # rounding to the nearest is something else


@pytest.fixture(scope="module")
def starving(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Tensor, Tensor]:
    """A base whose expert 2 gets no token in the first layer, its conversion, and what enters that layer's experts."""
    folder = tmp_path_factory.mktemp("starving")
    base = write_base(folder / "base", starved=True)
    done = convert(base, folder / "out", GPTQ, calibration=ENOUGH)
    return base, done, *entering(done.out, folder / "dense", seen_windows(base, ENOUGH))


def test_an_expert_is_rounded_for_the_tokens_that_choose_it(starving: tuple[Path, Any, Tensor, Tensor]) -> None:
    base, done, hidden, chosen = starving
    counts = torch.bincount(chosen.flatten(), minlength=EXPERTS)
    for expert in (expert for expert in range(EXPERTS) if expert != STARVED):
        assert counts[expert] >= 2 * 64  # two tokens for each input
        rows = hidden[(chosen == expert).any(-1)]
        assert len(rows) < len(hidden)
        check_expert(base, done.out, expert, rows)


def test_other_tokens_would_give_other_codes(starving: tuple[Path, Any, Tensor, Tensor]) -> None:
    """So that the test above can tell one expert's tokens from another's and from all."""
    base, done, hidden, chosen = starving
    with pytest.raises(AssertionError, match="proj"):
        check_expert(base, done.out, 0, hidden)
    with pytest.raises(AssertionError, match="proj"):
        check_expert(base, done.out, 0, hidden[(chosen == 1).any(-1)])


def test_an_expert_without_tokens_is_rounded_for_those_of_the_layer(starving: tuple[Path, Any, Tensor, Tensor]) -> None:
    base, done, hidden, chosen = starving
    assert not (chosen == STARVED).any()
    spread = torch.linspace(0, len(hidden) - 1, 4 * 64).round().long()  # four for each input
    check_expert(base, done.out, STARVED, hidden[spread])
    weights, dense = tensors_of(base), quant_reference.decoded(done.out)
    for name in ("gate_proj", "up_proj", "down_proj"):
        module = f"{LAYER}.experts.{STARVED}.{name}.weight"
        assert (dense[module] != 0).float().mean() > 0.8
        assert (dense[module] - weights[module]).norm() < 0.2 * weights[module].norm()


def test_it_is_told_of_by_name(starving: tuple[Path, Any, Tensor, Tensor]) -> None:
    _, done, _, _ = starving
    (note,) = [note for note in done.plan.notes if "not rounded as asked" in note]
    assert "rounded for all tokens of the layer" in note
    named = re.findall(r"model\.layers\.\d+\.mlp\.experts\.\d+", note)
    assert f"{LAYER}.experts.{STARVED}" in named
    assert note.startswith("3 matrices")  # gate, up and down of the one
    assert f"{LAYER}.experts.{STARVED}" in (done.out / "README.md").read_text()


def test_too_few_tokens_for_all_mean_the_nearest(tmp_path: Path) -> None:
    """One window of 16 tokens, and 64 and 32 inputs: no moments could be inverted without inventing what was not seen."""
    base = write_base(tmp_path / "base", starved=False)
    few = {"text": "self", "samples": 2, "length": 16}
    done = convert(base, tmp_path / "out", GPTQ, calibration=few)
    plain = convert(base, tmp_path / "plain", RTN).out
    ours, theirs = tensors_of(done.out), tensors_of(plain)
    names = [name for name in ours if ".experts." in name and name.endswith("weight_packed")]
    assert len(names) == 2 * EXPERTS * 3
    assert [name for name in names if not torch.equal(ours[name], theirs[name])] == []
    notes = [note for note in done.plan.notes if "not rounded as asked" in note]
    assert any("rounded to the nearest" in note for note in notes)
    assert sum(int(note.split()[0]) for note in notes) == len(names)


def test_all_experts_get_one_scheme_though_their_outputs_are_off(tmp_path: Path) -> None:
    """`raise_above` gives dense parts 8 bits and never experts, which transformers 5 loads with one scheme or not at all."""
    base = write_base(tmp_path / "base", starved=False)
    settings = {"quantize": {"method": "gptq", "group_size": 32, "raise_above": 0.001}}
    done = convert(base, tmp_path / "out", settings)
    stored = tensors_of(done.out)
    widths = {name: tensor.shape[1] for name, tensor in stored.items() if name.endswith("weight_packed")}
    assert {widths[name] for name in widths if re.search(r"experts\.\d+\.(gate|up)_proj", name)} == {64 // 8}
    assert {widths[name] for name in widths if "_proj" in name and "self_attn.q" in name} == {64 // 4}
