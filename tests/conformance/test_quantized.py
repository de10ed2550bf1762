"""What `quantize` writes, in every family: the file by hand, and the model that plain transformers makes of it.

Everything is loaded once, in a fresh process that cannot import surgery (`tests/quantized_cases.py`), and held against
the dense decode of `tests/quant_reference.py` bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.errors import SurgeryError, UnsupportedModel
from tests import quant_reference
from tests.moe_cases import raw
from tests.quantized_cases import Loaded, config_of, convert, load_all, packed_of, prepare, shared, tensors_of
from tests.tiny import FAMILIES, MOE_FAMILIES, write_tiny
from tests.tiny_moe import MOE_ONLY

RECIPES: dict[str, dict[str, Any]] = {
    "int4": {"group_size": 32, "scales": "none"},
    "int8": {"bits": 8},
    "fp8": {"bits": 8, "type": "float"},
    "w8a8": {"bits": 8, "activations": "dynamic"},
    "gptq": {"method": "gptq", "group_size": 32, "scales": "none"},
}
FUSED = ("gpt_oss", "granitemoe")  # experts in three dimensions, which stay dense
SEPARATE = tuple(family for family in (*MOE_FAMILIES, *MOE_ONLY) if family not in FUSED)
# Beside those of every family: another recipe, type, tied embeddings, files and sizes.
MORE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama-fp8_dynamic": ("llama", {"bits": 8, "type": "float", "activations": "dynamic"}, {}),
    "llama-int4_bfloat16": ("llama", RECIPES["int4"], {"dtype": torch.bfloat16}),
    "llama-int8_bfloat16": ("llama", RECIPES["int8"], {"dtype": torch.bfloat16}),
    "qwen2_moe-int4_bfloat16": ("qwen2_moe", RECIPES["int4"], {"dtype": torch.bfloat16}),
    "qwen2_moe-fp8_bfloat16": ("qwen2_moe", RECIPES["fp8"], {"dtype": torch.bfloat16}),
    "llama-int4_tied": ("llama", RECIPES["int4"], {"tie_word_embeddings": True}),
    "qwen3-gptq_tied": ("qwen3", RECIPES["gptq"], {"tie_word_embeddings": True}),
    "qwen2_moe-int4_tied": ("qwen2_moe", RECIPES["int4"], {"tie_word_embeddings": True}),
    "llama-int4_shards": ("llama", RECIPES["int4"], {"shards": 3}),
    "qwen3_moe-int4_many": ("qwen3_moe", RECIPES["int4"], {"num_hidden_layers": 12, "experts": 12}),
    "deepseek_v3-int4_some": ("deepseek_v3", RECIPES["int4"], {"num_hidden_layers": 3, "first_k_dense_replace": 1}),
    # 24 and 40 inputs: whole words of four bits, and no group of 32
    "qwen2_moe-int4_narrow": ("qwen2_moe", RECIPES["int4"], {"moe_intermediate_size": 40, "shared_expert_intermediate_size": 24}),
    "llama-int4_odd": ("llama", RECIPES["int4"], {"intermediate_size": 68}),  # no whole words: stays dense
    "llama-int4_mse": ("llama", RECIPES["int4"] | {"scales": "mse"}, {}),
    "qwen2_moe-int4_mse": ("qwen2_moe", RECIPES["int4"] | {"scales": "mse"}, {}),
    "qwen3_moe-gptq_defaults": ("qwen3_moe", {"method": "gptq"}, {}),
    "llama-int4_ignore": ("llama", RECIPES["int4"] | {"ignore": [r"layers\.0\..*down_proj$", "v_proj"]}, {}),
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    f"{family}-{recipe}": (family, settings, {})
    for family in (*FAMILIES, *MOE_ONLY)
    for recipe, settings in RECIPES.items()
    if recipe != "w8a8" or family not in SEPARATE
} | MORE
# Modules that have a matrix and must not be touched, and thin low-rank factors.
KEPT = re.compile(
    r"lm_head|model\.embed_tokens|.*\.(mlp|block_sparse_moe)\.(gate|router)(\.layer)?|.*\.shared_expert_gate"
    r"|.*\.self_attn\.(q_a_proj|q_b_proj|kv_b_proj|kv_a_proj_with_mqa)"
)
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base and the result of every case, and what a fresh process says of it; made once, however many workers."""

    def make(folder: Path) -> None:
        for name, (family, settings, overrides) in CASES.items():
            base = write_tiny(folder / "bases" / name, family, seed=5, **overrides)
            case = folder / "cases" / name
            output = {"output": {"shard_size": "100KB"}} if "shards" in overrides else {}
            convert(base, case / "quantized", {"quantize": settings}, **output)
            prepare(case, "bfloat16" if "dtype" in overrides else "float32")
        load_all(folder / "cases", folder / "found")

    return shared(tmp_path_factory, "quantized", make)


@pytest.fixture(scope="session")
def loaded(place: Path) -> dict[str, Loaded]:
    return Loaded.read(place / "found")


def expected_modules(name: str, base: Path) -> set[str]:
    """The matrices of the layers that this test says must be packed."""
    ignored = CASES[name][1].get("ignore", [])
    found = set()
    for tensor, (_, shape, _) in raw(base).items():
        module, _, kind = tensor.rpartition(".")
        odd = CASES[name][1].get("bits", 4) * (shape[-1] if shape else 0) % 32
        if kind == "weight" and len(shape) == 2 and not KEPT.fullmatch(module) and not odd:
            found.add(module)
    return {module for module in found if not any(re.search(pattern, module) for pattern in ignored)}


@every_case
def test_only_matrices_of_layers_are_rounded_and_the_rest_keeps_its_bytes(name: str, place: Path) -> None:
    base, out = raw(place / "bases" / name), raw(place / "cases" / name / "quantized")
    modules = set(packed_of(place / "cases" / name / "quantized"))
    assert modules == expected_modules(name, place / "bases" / name)
    assert modules
    parts = {tensor for tensor in out if tensor.rpartition(".")[0] in modules and not tensor.endswith(".bias")}
    assert {tensor: out[tensor] for tensor in out.keys() - parts} == {
        tensor: entry for tensor, entry in base.items() if tensor.removesuffix(".weight") not in modules
    }
    if "shards" in CASES[name][2]:
        assert len(list((place / "cases" / name / "quantized").glob("*.safetensors"))) > 1


def steps(name: str, place: Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor, bool]]:
    """Of every packed module: its weight in the base and decoded, both [out, groups, n], scales, whether in float8."""
    case = place / "cases" / name / "quantized"
    base, stored, dense = tensors_of(place / "bases" / name), tensors_of(case), quant_reference.decoded(case)
    for module in packed_of(case):
        scale = stored[f"{module}.weight_scale"].float()
        was, now = (found[f"{module}.weight"].float().view(*scale.shape, -1) for found in (base, dense))
        eight = f"{module}.weight" in stored and stored[f"{module}.weight"].dtype == torch.float8_e4m3fn
        yield module, was, now, scale.unsqueeze(-1), eight


@pytest.mark.parametrize("name", [name for name, (_, settings, _) in CASES.items() if settings.get("method") != "gptq"])
def test_rounding_is_to_the_nearest(name: str, place: Path) -> None:
    wide = "dtype" not in CASES[name][2]
    reach = 448.0 if "fp8" in name else 127.5 if CASES[name][1].get("bits") == 8 else 7.5
    for module, was, now, scale, eight in steps(name, place):
        largest = was.abs().amax(-1, keepdim=True)
        full = largest / reach
        searched = CASES[name][1].get("scales") == "mse"
        if searched:
            assert ((scale <= full) & (scale >= full * 0.499)).all(), module
            assert (scale < full).any()
        else:
            assert torch.equal(scale, full if wide else full.bfloat16().float()), module
        half = scale.double() / 2
        if eight:  # three bits of mantissa down to 2^-6, then even steps
            half = half * 2.0 ** ((now.double() / scale).abs().clamp(min=2**-6).log2().floor() - 3)
        # A quotient of float32 may fall on either side of a half; a scale of bfloat16 cuts a little off the largest.
        bound = half + largest * (2**-22 if wide else 2**-8)
        kept = was.abs() <= scale * reach if searched else torch.ones_like(was, dtype=torch.bool)
        error = (was.double() - now.double()).abs()
        assert (error <= bound)[kept].all(), module
        assert error.amax() > half.amin() / 2


@pytest.mark.parametrize("family", [*FAMILIES, *MOE_ONLY])
def test_gptq_keeps_scales_and_moves_codes(family: str, place: Path) -> None:
    """Scales are those of rounding to the nearest, as they are fixed before; codes are not, and stay near."""
    plain = {module: (now, scale) for module, _, now, scale, _ in steps(f"{family}-int4", place)}
    moved, raised = 0, 0
    for module, was, now, scale, _ in steps(f"{family}-gptq", place):
        to_nearest, same = plain[module]
        if scale.shape != same.shape or not torch.equal(scale, same):  # 8 bits, as 4 were too few for its outputs
            raised += 1
            assert torch.equal(scale, was.abs().amax(-1, keepdim=True) / 127.5)
            continue
        moved += int((now != to_nearest).sum())
        assert ((was - now).norm() / was.norm()) < 0.35
    assert moved > 100
    assert raised < len(plain)


@every_case
def test_plain_transformers_computes_what_the_file_says(name: str, loaded: dict[str, Loaded]) -> None:
    found = loaded[name]
    assert found.error == ""
    assert found.report == {}
    assert found.lines == []
    assert torch.isfinite(found.quantized).all()
    assert torch.equal(found.quantized, found.dense)


@every_case
def test_generation_is_greedy_decoding(name: str, loaded: dict[str, Loaded]) -> None:
    found = loaded[name]
    assert len(found.generated) == 6
    # A token whose logits tie is no fault: the cache may order sums differently.
    assert found.generated == found.greedy


@every_case
def test_embeddings_stay_tied_or_apart(name: str, loaded: dict[str, Loaded], place: Path) -> None:
    config = config_of(place / "cases" / name / "quantized")
    assert loaded[name].tied == config["tie_word_embeddings"]
    head = "lm_head.weight" in raw(place / "cases" / name / "quantized")
    assert head != config["tie_word_embeddings"]


def test_rounding_costs_what_bits_say(place: Path, loaded: dict[str, Loaded]) -> None:
    """That results differ from one another, so that equality above is no accident."""
    for family in (*FAMILIES, *MOE_ONLY):
        four, eight = loaded[f"{family}-int4"], loaded[f"{family}-int8"]
        assert (four.dense - eight.dense).abs().max() > 1e-2


def test_inputs_are_rounded_where_the_config_says(loaded: dict[str, Loaded]) -> None:
    for name in (name for name in CASES if name.endswith(("w8a8", "fp8_dynamic"))):
        plain = loaded[name.partition("-")[0] + ("-fp8" if "fp8" in name else "-int8")]
        assert (loaded[name].quantized - plain.quantized).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["int", "float"])
@pytest.mark.parametrize("family", SEPARATE)
def test_experts_with_rounded_inputs_are_refused(family: str, kind: str, tmp_path: Path) -> None:
    refused(tmp_path, family, {"bits": 8, "type": kind, "activations": "dynamic"}, "rounded inputs")


@pytest.mark.parametrize("family", SEPARATE)
def test_experts_that_would_stay_dense_are_refused(family: str, tmp_path: Path) -> None:
    first = "w1" if family == "mixtral" else "gate_proj"
    refused(tmp_path, family, {"ignore": [rf"layers\.0\..*experts\.0\.{first}$"]}, "would stay as it is")


@pytest.mark.parametrize("family", SEPARATE)
def test_leaving_all_experts_dense_is_refused(family: str, tmp_path: Path) -> None:
    refused(tmp_path, family, {"ignore": [r"\.experts\."]}, "would stay as it is")


def test_experts_that_fill_no_words_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "qwen2_moe", {}, "would stay as it is", moe_intermediate_size=36)


@pytest.mark.parametrize("family", [*MOE_FAMILIES, *MOE_ONLY])
def test_the_gptq_format_is_refused_for_experts(family: str, tmp_path: Path) -> None:
    refused(tmp_path, family, {"format": "gptq", "group_size": 32}, "GPTQ files of models with experts")


def test_what_is_quantized_is_not_quantized_again(place: Path, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError) as caught:
        convert(place / "cases" / "llama-int4" / "quantized", tmp_path / "out", {"quantize": {}})
    assert "quantized already" in str(caught.value) + caught.value.cause
    assert not (tmp_path / "out").exists()


def refused(folder: Path, family: str, settings: dict[str, Any], cause: str, **overrides: Any) -> None:
    base = write_tiny(folder / "base", family, **overrides)
    with pytest.raises(UnsupportedModel, match="quantize does not fit") as caught:
        convert(base, folder / "out", {"quantize": settings})
    assert cause in caught.value.cause
    assert not (folder / "out").exists()
