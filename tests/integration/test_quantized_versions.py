"""Quantized results of every kind in several releases of transformers, each in a fresh process without surgery.

With the compressed-tensors of `.venv`: from 0.15 on it wants transformers 4.56, whose loader it needs; 0.12.2 loads the
same files in 4.48.3. transformers 5.0 to 5.12 cannot unpack experts that they fuse, which `EXPERTS_LOAD` tells.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.operations.quantize import EXPERTS_LOAD
from tests.moe_cases import KEEPS, code_of, prune, top_k
from tests.quantized_cases import ROOT, SELF, Loaded, config_of, convert, load_all, prepare, shared
from tests.tiny import write_tiny

pytestmark = [pytest.mark.slow, pytest.mark.versions]
RELEASES = ("4.57.6", "5.0.0", "5.23.0")
# What a release of .venv's compressed-tensors cannot be used with at all, and what it would say.
TOO_OLD = ("4.48.3", "4.53.3", "4.54.1")

INT4 = {"quantize": {"group_size": 32}}
INT8 = {"quantize": {"bits": 8}}
FP8 = {"quantize": {"bits": 8, "type": "float"}}
W8A8 = {"quantize": {"bits": 8, "activations": "dynamic"}}
GPTQ = {"quantize": {"method": "gptq", "group_size": 32}}
STRIDE = {"kv_latent": {"method": "stride", "qk_dim": 8, "vo_dim": 4}}
UNEVEN = {"kv_latent": {"qk_dim": [6, 10], "vo_dim": [12, 6]}}
MEASURED = {"kv_latent": {"kv_ratio": 0.6}}
# One window in eight is held out, and a mix must be better on several by more than two standard errors.
JUDGED = {"calibration": SELF | {"samples": 48}}
SOME, UNEQUAL = prune(KEEPS["uniform"]), prune(KEEPS["per_layer"])


def mixed(budget: float) -> dict[str, Any]:
    return {"quantize": {"bytes_per_weight": budget}}


DENSE: dict[str, tuple[str, list[dict[str, Any]]]] = {
    **{f"llama {name}": ("llama", [operation]) for name, operation in
       (("int4", INT4), ("int8", INT8), ("fp8", FP8), ("w8a8", W8A8), ("gptq", GPTQ), ("mixed", mixed(0.85)))},
    **{f"llama stride {name}": ("llama", [STRIDE, operation]) for name, operation in
       (("int4", INT4), ("fp8", FP8), ("w8a8", W8A8))},
    "llama uneven int4": ("llama", [UNEVEN, INT4]),
    "llama uneven gptq": ("llama", [UNEVEN, GPTQ]),
    "llama measured gptq": ("llama", [MEASURED, GPTQ]),
    "llama measured mixed": ("llama", [MEASURED, mixed(1.03)]),
    "qwen3 uneven int4": ("qwen3", [UNEVEN, INT4]),
    "qwen2 uneven int4": ("qwen2", [UNEVEN, INT4]),
    "phi3 uneven int4": ("phi3", [UNEVEN, INT4]),
    "gpt_oss unequal int4": ("gpt_oss", [UNEQUAL, INT4]),
    "granitemoe unequal int4": ("granitemoe", [UNEQUAL, INT4]),
}  # fmt: skip
SEPARATE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe")
EXPERTS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    **{f"{family} pruned int4": (family, [SOME, INT4]) for family in SEPARATE},
    **{f"{family} unequal int4": (family, [UNEQUAL, top_k([2, 1]), INT4]) for family in SEPARATE},
    "qwen2_moe pruned gptq": ("qwen2_moe", [SOME, GPTQ]),
    "qwen3_moe unequal gptq": ("qwen3_moe", [UNEQUAL, GPTQ]),
    "qwen3_moe unequal int8": ("qwen3_moe", [UNEQUAL, INT8]),
    "qwen3_moe unequal fp8": ("qwen3_moe", [UNEQUAL, FP8]),
    "qwen3_moe uneven unequal int4": ("qwen3_moe", [UNEVEN, UNEQUAL, INT4]),
    "mixtral uneven int4": ("mixtral", [UNEVEN, INT4]),
    "qwen2_moe mixed": ("qwen2_moe", [mixed(0.8)]),
    "deepseek_v3 mixed": ("deepseek_v3", [SOME, mixed(1.05)]),
    "qwen3_moe unequal mixed": ("qwen3_moe", [UNEQUAL, mixed(0.85)]),
}
CASES = DENSE | EXPERTS


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        torch.set_num_threads(1)
        for name, (family, operations) in CASES.items():
            count = {"experts": 8, "top_k": 2} if any("expert_prune" in of for of in operations) else {}
            base = write_tiny(folder / "bases" / name, family, seed=3, **count)
            case = folder / "cases" / name
            plan = convert(base, case / "quantized", *operations, **(JUDGED if "mixed" in name else {})).plan
            assert any(EXPERTS_LOAD in note for note in plan.notes) == (name in EXPERTS)
            prepare(case)

    return shared(tmp_path_factory, "quantized-versions", make)


@pytest.fixture(scope="session", params=RELEASES)
def release(request: pytest.FixtureRequest) -> Path:
    folder = ROOT / ".compat" / request.param
    if not folder.is_dir():
        pytest.skip(f"transformers {request.param} is not installed: run tools/compat")
    return folder


@pytest.fixture(scope="session")
def loaded(place: Path, release: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    def make(folder: Path) -> None:
        load_all(place / "cases", folder / "found", release)

    return Loaded.read(shared(tmp_path_factory, f"quantized-{release.name}", make) / "found")


@pytest.mark.parametrize("name", CASES)
def test_results_compute_what_their_files_say(name: str, loaded: dict[str, Loaded], release: Path) -> None:
    found = loaded[name]
    if name in EXPERTS and release.name == "5.0.0":
        assert found.error or found.report.get("missing_keys"), "it loads after all: say so in EXPERTS_LOAD"
        return
    assert found.error == ""
    assert found.report == {}
    assert found.lines == []
    assert found.relative <= 1e-5
    assert found.generated == found.greedy


@pytest.mark.parametrize("name", CASES)
def test_results_have_code_where_they_need_it(name: str, place: Path) -> None:
    coded = any("unequal" in name or part in name for part in ("stride", "uneven", "measured"))
    assert bool(code_of(place / "cases" / name / "quantized")) == coded


@pytest.mark.parametrize("name", [name for name in CASES if "mixed" in name])
def test_budgets_mix(name: str, place: Path) -> None:
    groups = config_of(place / "cases" / name / "quantized")["quantization_config"]["config_groups"]
    bits = [(of["weights"]["num_bits"], of["weights"]["group_size"]) for of in groups.values()]
    assert len(bits) > 1


@pytest.mark.parametrize("version", TOO_OLD)
def test_what_is_too_old_does_not_pass_for_loaded(version: str, place: Path, tmp_path: Path) -> None:
    """Older releases either fail or say that weights are missing; none loads random numbers without a word."""
    release = ROOT / ".compat" / version
    if not release.is_dir():
        pytest.skip(f"transformers {version} is not installed: run tools/compat")
    found = load_all(place / "cases", tmp_path / "found", release, ["llama int4"])["llama int4"]
    assert found.error or (found.report.get("missing_keys") and found.lines)
