"""What is measured of experts on text, against the same sums in float64 from the weights on disk.

Only the hidden states that enter each block come from the loaded model; how each family routes and what its experts
compute stands here.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from surgery.operations.experts.blocks import moe_blocks
from surgery.operations.experts.measuring import measure_usage
from tests.moe_cases import ALL, GROUPED, base_of, config_of, load, tokens

WINDOWS = tokens(48, rows=5)
CASES = [
    *(pytest.param(family, {}, id=family) for family in ALL),
    *(pytest.param(family, more, id=f"{family}-groups") for family, more in GROUPED.items()),
    *(pytest.param(family, {"norm_topk_prob": True}, id=f"{family}-sum-one") for family in ("qwen2_moe", "olmoe")),
    pytest.param("deepseek_v2", {"norm_topk_prob": True}, id="deepseek_v2-sum-ignored"),
    *(
        pytest.param(f, {"norm_topk_prob": False}, id=f"{f}-as-they-are")
        for f in ("qwen3_moe", "deepseek_v3", "glm4_moe")
    ),
    pytest.param("deepseek_v3", {"first_k_dense_replace": 1, "num_hidden_layers": 3}, id="deepseek_v3-dense-first"),
]
BLOCK = {"mixtral": "block_sparse_moe", "granitemoe": "block_sparse_moe"}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def entering(model, layers):
    """{layer: hidden states [tokens, width] that enter its block}, in float64."""
    found = {layer: [] for layer in layers}

    def hook_of(layer):
        return lambda _module, positional, named: found[layer].append((*positional, *named.values())[0].flatten(0, 1))

    for layer in layers:
        decoder = model.model.layers[layer]
        block = decoder.mlp if hasattr(decoder, "mlp") else decoder.block_sparse_moe
        block.register_forward_pre_hook(hook_of(layer), with_kwargs=True)
    with torch.no_grad():
        model.model(input_ids=WINDOWS, use_cache=False)
    return {layer: torch.cat(parts).double() for layer, parts in found.items()}


def routed(config, tensors, prefix, hidden):
    """(ids [tokens, k], weights [tokens, k]) by the rule of the family."""
    family, count = config["model_type"], config["num_experts_per_tok"]
    name = {"gpt_oss": "router", "granitemoe": "router.layer"}.get(family, "gate")
    logits = hidden @ tensors[f"{prefix}.{name}.weight"].T
    if family in {"gpt_oss", "granitemoe"}:
        logits = logits + tensors.get(f"{prefix}.{name}.bias", 0.0)
        best, ids = logits.topk(count)
        return ids, best.softmax(-1)
    if family in {"deepseek_v3", "glm4_moe"}:
        scores = logits.sigmoid()
        order = scores + tensors[f"{prefix}.gate.e_score_correction_bias"]
        worth = order.unflatten(-1, (config["n_group"], -1)).topk(2).values.sum(-1)
        weighed = config["norm_topk_prob"]
    else:
        scores = order = logits.softmax(-1)
        worth = None
        if config.get("topk_method") == "group_limited_greedy":
            worth = order.unflatten(-1, (config["n_group"], -1)).amax(-1)
        weighed = family == "mixtral" or (family != "deepseek_v2" and config.get("norm_topk_prob", False))
    if worth is not None:
        among = torch.zeros_like(worth).scatter(-1, worth.topk(config["topk_group"]).indices, 1.0).bool()
        order = order.masked_fill(~among.repeat_interleave(order.shape[-1] // worth.shape[-1], -1), -torch.inf)
    ids = order.topk(count).indices
    weights = scores.gather(-1, ids)
    if weighed:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids, weights * config.get("routed_scaling_factor", 1.0)


def output(config, tensors, prefix, expert, hidden):
    """What one expert makes of every hidden state."""
    silu = torch.nn.functional.silu
    if config["model_type"] == "gpt_oss":
        wide = (
            hidden @ tensors[f"{prefix}.experts.gate_up_proj"][expert]
            + tensors[f"{prefix}.experts.gate_up_proj_bias"][expert]
        )
        gate, up = wide[:, 0::2].clamp(max=7.0), wide[:, 1::2].clamp(-7.0, 7.0)
        inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        return (
            inner @ tensors[f"{prefix}.experts.down_proj"][expert] + tensors[f"{prefix}.experts.down_proj_bias"][expert]
        )
    if config["model_type"] == "granitemoe":
        gate, up = (hidden @ tensors[f"{prefix}.input_linear.weight"][expert].T).chunk(2, -1)
        return (silu(gate) * up) @ tensors[f"{prefix}.output_linear.weight"][expert].T
    names = ("w1", "w3", "w2") if config["model_type"] == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    gate, up, down = (tensors[f"{prefix}.experts.{expert}.{name}.weight"] for name in names)
    return (silu(hidden @ gate.T) * (hidden @ up.T)) @ down.T


@pytest.mark.parametrize(("family", "overrides"), CASES)
def test_sums_of_routed_weights_and_outputs(family, overrides, tmp_path):
    base = base_of(tmp_path / "base", family, top_k=3, **overrides)
    config = config_of(base)
    tensors = {name: tensor.double() for name, tensor in load_file(base / "model.safetensors").items()}
    model = load(base)
    layers = list(range(config.get("first_k_dense_replace", 0), config["num_hidden_layers"]))
    blocks = moe_blocks(model)
    assert list(blocks) == layers
    with torch.no_grad():
        usage = measure_usage(model, list(blocks.values()), WINDOWS, lambda _: None)
    assert usage.sums.shape == (len(layers), 3, 3, 8)
    assert usage.sums.dtype == usage.peaks.dtype == torch.float64
    for row, (layer, hidden) in enumerate(entering(model, layers).items()):
        prefix = f"model.layers.{layer}.{BLOCK.get(family, 'mlp')}"
        ids, weights = routed(config, tensors, prefix, hidden)
        assert len(hidden) == WINDOWS.numel()
        for expert in range(8):
            takes = ids == expert
            mine = takes.any(-1)
            weight = (weights * takes).sum(-1)[mine]
            out = output(config, tensors, prefix, expert, hidden[mine])
            norms = out.square().sum(-1).sqrt()
            assert usage.sums[row, 0, 0, expert].item() == mine.sum().item() > 0
            for alpha in range(3):
                for beta in range(3):
                    wanted = (weight**alpha * norms**beta).sum()
                    torch.testing.assert_close(usage.sums[row, alpha, beta, expert], wanted, rtol=1e-5, atol=0)
            torch.testing.assert_close(usage.peaks[row, expert], out.abs().max(), rtol=1e-5, atol=0)
        assert usage.sums[row, 0, 0].sum().item() == WINDOWS.numel() * 3
