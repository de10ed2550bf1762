"""The probe's check `dequantized_logits`: what it finds, what it cannot find, and that it decodes as the reference does.

It asks whether what is loaded computes what the files say. Files that were changed say something else: the lock's
hashes find that.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.probe.dequantized import decoded
from surgery.verification import LOCK, Trial, Verification, verify
from tests import quant_reference
from tests.quantized_cases import ROOT, config_of, convert, packed_of
from tests.tiny import write_tiny

ASKED = ("loading_report", "dequantized_logits")
CASES: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "int4": ("llama", {"group_size": 32}, torch.float32),
    "int4 uneven": ("deepseek_v2", {"group_size": 32}, torch.float32),
    "int4 experts": ("qwen2_moe", {"group_size": 32}, torch.float32),
    "int8": ("qwen2", {"bits": 8}, torch.float32),
    "w8a8": ("llama", {"bits": 8, "activations": "dynamic"}, torch.float32),
    "fp8": ("phi3", {"bits": 8, "type": "float"}, torch.float32),
    "fp8 inputs": ("llama", {"bits": 8, "type": "float", "activations": "dynamic"}, torch.float32),
    "gptq int4": ("llama", {"method": "gptq", "format": "gptq", "group_size": 32}, torch.float32),
    "gptq int8": ("qwen3", {"bits": 8, "format": "gptq", "group_size": 32}, torch.float32),
    "int4 bfloat16": ("qwen2_moe", {"group_size": 32}, torch.bfloat16),
    "int8 bfloat16": ("llama", {"bits": 8}, torch.bfloat16),
    "fp8 bfloat16": ("llama", {"bits": 8, "type": "float"}, torch.bfloat16),
    "gptq bfloat16": ("llama", {"format": "gptq", "group_size": 32}, torch.bfloat16),
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def made(folder: Path, name: str) -> Path:
    family, settings, dtype = CASES[name]
    base = write_tiny(folder / "base", family, seed=4, dtype=dtype)
    return convert(base, folder / "out", {"quantize": settings}).out


@pytest.mark.parametrize("name", CASES)
def test_the_probe_decodes_as_the_reference_does(name: str, tmp_path: Path) -> None:
    out = made(tmp_path, name)
    wanted, settings = quant_reference.decoded(out), config_of(out)["quantization_config"]
    for dtype in (torch.float32, torch.bfloat16):
        found = dict(decoded(out, settings, dict.fromkeys(packed_of(out), dtype)))
        assert found.keys() == wanted.keys()
        assert len(packed_of(out)) > 5
        for tensor, value in wanted.items():
            if tensor.removesuffix(".weight") not in packed_of(out):
                assert torch.equal(found[tensor], value)
            elif dtype == torch.float32:  # one product of float32 each, as in the reference
                assert torch.equal(found[tensor], value), tensor
            elif CASES[name][2] == torch.bfloat16 and "gptq" not in name:  # the scale is one, the product is rounded
                assert torch.equal(found[tensor], value.bfloat16()), tensor
            else:
                torch.testing.assert_close(found[tensor].float(), value, rtol=2**-7, atol=0)


def checked(folder: Path, **trial: Any) -> dict[str, Any]:
    result: Verification = verify(folder, trial=Trial(checks=ASKED, **trial))
    return {check.name: check for check in result.checks}


def copied(out: Path, folder: Path) -> Path:
    """The same without a lock, as somebody would have it who changed a file and knew of hashes."""
    shutil.copytree(out, folder)
    (folder / LOCK).unlink()
    return folder


def change(folder: Path, tensor: str, at: tuple[int, ...], value: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    was = tensors[tensor][at].clone()
    tensors[tensor][at] = value(was)
    assert not torch.equal(tensors[tensor][at], was)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("verified"), "int4")


@pytest.fixture(scope="module")
def rounded_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("verified"), "w8a8")


WORD = ("model.layers.1.mlp.up_proj.weight_packed", (3, 2), lambda was: was ^ 0x70)
SCALE = ("model.layers.0.self_attn.q_proj.weight_scale", (5, 1), lambda was: was * 2)


@pytest.mark.slow
def test_a_result_passes(result: Path) -> None:
    found = checked(result)
    assert {check.status for check in found.values()} == {"pass"}
    assert found["dequantized_logits"].value <= 1e-6


@pytest.mark.parametrize("changed", [WORD, SCALE], ids=["word", "scale"])
def test_hashes_find_another_word_or_scale(changed: tuple[Any, ...], result: Path, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(result, folder)
    change(folder, *changed)
    found = checked(folder)
    assert found["hashes"].status == "fail"
    assert "model.safetensors" in found["hashes"].detail
    assert "dequantized_logits" not in found  # nothing is run


@pytest.mark.slow
def test_without_a_lock_a_changed_file_is_another_model(result: Path, tmp_path: Path) -> None:
    """It loads as it says, so that the check must hold: both sides read the same words and scales."""
    folder = copied(result, tmp_path / "changed")
    change(folder, *WORD)
    change(folder, *SCALE)
    before, after = quant_reference.decoded(result), quant_reference.decoded(folder)
    changed = {name.rpartition(".")[0] + ".weight" for name, _, _ in (WORD, SCALE)}
    assert {name for name in before if not torch.equal(before[name], after[name])} == changed
    found = checked(folder)
    assert found["hashes"].status == "skip"
    assert found["dequantized_logits"].status == "pass"


def set_config(folder: Path, change_settings: Any) -> None:
    config = config_of(folder)
    change_settings(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
def test_a_config_that_leaves_out_a_packed_module_fails(result: Path, tmp_path: Path) -> None:
    folder = copied(result, tmp_path / "changed")
    set_config(folder, lambda settings: settings["ignore"].append("re:.*layers.1.mlp.up_proj$"))
    found = checked(folder)
    assert found["loading_report"].status == "fail"
    assert found["dequantized_logits"].status == "fail"


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [{"num_bits": 4}, None], ids=["four_bits", "none"])
def test_inputs_that_are_rounded_in_another_way_fail(
    wrong: dict[str, Any] | None, rounded_inputs: Path, tmp_path: Path
) -> None:
    """The loader follows the config and finds every weight; what the check computes has eight bits for each token."""
    folder = copied(rounded_inputs, tmp_path / "changed")

    def spoil(settings: dict[str, Any]) -> None:
        (group,) = settings["config_groups"].values()
        if wrong:
            group["input_activations"] |= wrong
        else:  # weights of one module alone, whose inputs the check rounds
            first = dict(group) | {"targets": ["re:.*layers.0.mlp.down_proj$"], "input_activations": None}
            settings["config_groups"] = {"group_0": first, "group_1": group}

    set_config(folder, spoil)
    found = checked(folder)
    assert found["loading_report"].status == "pass"
    assert found["dequantized_logits"].status == "fail"
    assert found["dequantized_logits"].value > found["dequantized_logits"].limit


@pytest.mark.slow
@pytest.mark.versions
def test_experts_that_are_not_loaded_fail(tmp_path: Path) -> None:
    release = ROOT / ".compat" / "5.0.0"
    if not release.is_dir():
        pytest.skip("transformers 5.0.0 is not installed: run tools/compat")
    found = checked(made(tmp_path, "int4 experts"), transformers=release)
    assert found["loading_report"].status == "fail"
    assert found["dequantized_logits"].status == "fail"
