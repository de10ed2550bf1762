"""Experts of quantized checkpoints are cut without a number being computed: FP8 with its scales, MXFP4 blocks."""

from __future__ import annotations

import json

import pytest
import torch

from surgery.errors import UnsupportedModel
from tests import moe_reference
from tests.moe_cases import (
    KEEPS,
    base_of,
    by_layer,
    close,
    code_of,
    config_of,
    convert,
    differs,
    expected,
    load,
    logits,
    prune,
    raw,
)
from tests.tiny import write_fp8, write_mxfp4

every_kind = pytest.mark.parametrize("kind", ["uniform", "per_layer"])
# Widths of more than one block of 128, the last one not whole.
WIDE = {"moe_intermediate_size": 160, "hidden_size": 192}
# Said of every MXFP4 checkpoint where its kernels do not run.
UNPACKED = r"^MXFP4 .*dequantiz"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@every_kind
@pytest.mark.parametrize("groups", [1, 2])
def test_fp8_weights_keep_their_bytes_and_scales(groups, kind, tmp_path):
    from transformers import FineGrainedFP8Config

    keep = (
        KEEPS[kind]
        if groups == 1
        else {"uniform": [[0, 1, 4, 7]] * 2, "per_layer": [[0, 1, 4, 7], [1, 2, 3, 5, 6, 7]]}[kind]
    )
    base = write_fp8(tmp_path / "base", 3, shards=2, experts=8, top_k=2, n_group=groups, **WIDE)
    scales = [name for name in raw(base) if name.endswith("_scale_inv") and ".experts." in name]
    assert {raw(base)[name][1] for name in scales} == {(2, 2)}
    out = convert(base, tmp_path / "out", prune(keep))
    assert raw(out) == expected(base, by_layer(keep))
    assert config_of(out)["quantization_config"] == config_of(base)["quantization_config"]
    assert bool(code_of(out)) == (kind == "per_layer")

    def plain(folder):
        return load(folder, quantization_config=FineGrainedFP8Config(dequantize=True)).float()

    whole = plain(base)
    before = logits(whole)
    wanted = logits(moe_reference.masked(whole, by_layer(keep)))
    assert differs(wanted, before)
    close(logits(plain(out)), wanted)


def test_mxfp4_blocks_and_scales_are_slices(tmp_path):
    from transformers import Mxfp4Config

    base = write_mxfp4(tmp_path / "base", 3, shards=2, experts=8, top_k=2)
    out = convert(base, tmp_path / "out", prune(KEEPS["uniform"]))
    found = raw(out)
    assert found == expected(base, by_layer(KEEPS["uniform"]))
    packed = {name: entry[:2] for name, entry in found.items() if name.endswith(("_blocks", "_scales"))}
    assert len(packed) == 8
    assert all(
        dtype == "U8" and shape[0] == len(KEEPS["uniform"][int(name.split(".")[2])])
        for name, (dtype, shape) in packed.items()
    )
    assert config_of(out)["quantization_config"] == config_of(base)["quantization_config"]
    assert not code_of(out)

    def plain(folder):
        return load(folder, told=UNPACKED, quantization_config=Mxfp4Config(dequantize=True)).float()

    whole = plain(base)
    before = logits(whole)
    wanted = logits(moe_reference.masked(whole, by_layer(KEEPS["uniform"])))
    assert differs(wanted, before)
    close(logits(plain(out)), wanted)


def test_mxfp4_loads_as_it_is_published(tmp_path):
    """Without a word about how; experts are unpacked into bfloat16 where their kernels do not run."""
    base = write_mxfp4(tmp_path / "base", 3, experts=8, top_k=2)
    out = convert(base, tmp_path / "out", prune(KEEPS["uniform"]))
    model, whole = load(out, told=UNPACKED), load(base, told=UNPACKED)
    wanted = moe_reference.masked(whole, by_layer(KEEPS["uniform"]))
    close(logits(model.float()), logits(wanted.float()))


def test_unequal_numbers_of_mxfp4_experts_are_refused(tmp_path):
    """Where its kernels run, the loader makes every layer by the one number of the config."""
    base = write_mxfp4(tmp_path / "base", 3, experts=8, top_k=2)
    with pytest.raises(UnsupportedModel, match="expert_prune does not fit") as caught:
        convert(base, tmp_path / "out", prune(KEEPS["per_layer"]))
    assert "MXFP4" in caught.value.cause


@pytest.mark.parametrize("key", ["ignore", "modules_to_not_convert"])
def test_lists_of_modules_follow_the_new_numbers(key, tmp_path):
    """Experts named there move with their weights or go with them; whatever else is named stays."""
    base = base_of(tmp_path / "base", "deepseek_v3")
    layer = "model.layers.{}.mlp.experts.{}"
    names = [
        "lm_head", layer.format(0, 0), layer.format(0, 3), layer.format(0, 1), layer.format(0, "3.up_proj"),
        layer.format(0, "6.down_proj"), layer.format(1, "0.gate_proj"), layer.format(1, "1.gate_proj"), layer.format(1, 7),
        "model.layers.0.mlp.shared_experts", "model.layers.0.mlp.gate", "model.layers.11.mlp.experts.3", r"re:.*\.gate$",
    ]  # fmt: skip
    config = config_of(base) | {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], key: names}
    }
    (base / "config.json").write_text(json.dumps(config))
    out = convert(base, tmp_path / "out", prune(KEEPS["uniform"]))  # 0 2 3 5 7 and 1 2 4 6 7
    assert config_of(out)["quantization_config"] == {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        key: [
            "lm_head", layer.format(0, 0), layer.format(0, 2), layer.format(0, "2.up_proj"), layer.format(1, "0.gate_proj"),
            layer.format(1, 4), *names[-4:],
        ],
    }  # fmt: skip
