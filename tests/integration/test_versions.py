"""Converted checkpoints on several transformers releases, each in a fresh process from which surgery is barred.

`tools/compat` installs the releases into `.compat`; `tools/test` does that before the tests run. The full matrix of
twelve releases is `tools/compat`'s own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.architectures import architectures
from surgery.verification import run_probes
from tests import moe_cases
from tests.moe_cases import KEEPS, base_of, prune, top_k
from tests.tiny import FAMILIES, write_tiny

REPOSITORY = Path(__file__).resolve().parents[2]
RELEASES = ("4.48.3", "4.57.6", "5.0.0", "5.23.0")
SHARED = REPOSITORY.parent / "shared/data/models"
# What conversions can break; the rest of the checks run on one family on every release.
CORE = [
    "loading_report", "finite_logits", "rope_frequencies", "cached_decode_equals_full_forward", "left_padded_batch",
    "eager_equals_sdpa", "cache_bytes", "save_reload", "no_warnings",
]  # fmt: skip
STOCK = {"method": "stride", "kv_ratio": 0.5}
LATENT = {"method": "stride", "qk_dim": 8, "vo_dim": 4}
NATIVE_FAMILIES = [
    name for name, family in architectures().items() if family.attention.native_head_dim and not family.attention.unlike
]

pytestmark = [pytest.mark.slow, pytest.mark.versions]
# Logits of every folder in a place, by one release, from which surgery is barred.
LOGITS = """
import sys
from pathlib import Path
sys.modules["surgery"] = None
import torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
place, found = Path(sys.argv[1]), {}
tokens = load_file(place / "tokens.safetensors")["tokens"]
for folder in sorted(path for path in place.iterdir() if path.is_dir()):
    if not (Path(transformers.__file__).parent / "models" / folder.name.partition("-")[0]).is_dir():
        continue
    name = "dtype" if hasattr(transformers.PretrainedConfig(), "dtype") else "torch_dtype"
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **{name: torch.float32})
    assert not any(report.values()), (folder.name, report)
    with torch.no_grad():
        found[folder.name] = model.eval()(tokens).logits
save_file(found, sys.argv[2], metadata={"transformers": transformers.__version__})
"""


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest) -> Path:
    folder = REPOSITORY / ".compat" / request.param
    if not folder.is_dir():
        pytest.skip(f"transformers {request.param} is not installed: run tools/compat")
    return folder


def has(release: Path, family: str) -> bool:
    return (release / "transformers/models" / family).is_dir()


def converted(base: Path, out: Path, settings: dict) -> surgery.Plan:
    data = {"surgery": 1, "operations": [{"kv_latent": settings}], "verify": False}
    return surgery.convert(str(base), out, surgery.manifest_from_dict(data)).plan


def failures(release: Path, out: Path, plan: surgery.Plan, checks: list[str] | None) -> list[str]:
    return failures_of(release, {"it": (out, plan, checks)}).get("it", [])


def failures_of(
    release: Path, results: dict[str, tuple[Path, surgery.Plan, list[str] | None]]
) -> dict[str, list[str]]:
    """What fails of each result, in one process: importing a release takes longer than most checks."""
    jobs = [
        {
            "checkpoint": str(out), "trust_remote_code": True, "checks": checks, "static_cache": True,
            "kv_bytes_per_token": plan.cache_bytes_after, "kv_dtype": plan.cache_dtype,
        }
        for out, plan, checks in results.values()
    ]  # fmt: skip
    found = {}
    for (name, (_, _, checks)), result in zip(
        results.items(), run_probes(jobs, transformers=release, timeout=900), strict=True
    ):
        assert result["transformers"] == release.name
        statuses = {check["name"]: check["status"] for check in result["checks"]}
        assert set(checks or CORE) <= set(statuses), "every check that was asked for must have run"
        found[name] = [f"{check['name']}: {check['detail']}" for check in result["checks"] if check["status"] == "fail"]
    return {name: failed for name, failed in found.items() if failed}


def test_latent_heads_work_on_every_release(release: Path, tmp_path: Path) -> None:
    results = {}
    for family in (family for family in FAMILIES if has(release, family)):
        write_tiny(tmp_path / family / "base", family)
        # Before 4.57 transformers cannot load code from a local folder with a dot in its name; convert says so.
        out = tmp_path / family / ("out" if release.name == "4.48.3" else "out.with.dots")
        plan = converted(tmp_path / family / "base", out, LATENT)
        assert plan.code
        assert any("4.57" in note for note in plan.notes) == ("." in out.name)
        results[family] = out, plan, None if family == "llama" else CORE
    assert len(results) == len(FAMILIES) - 2 * (release.name == "4.48.3")  # which has no qwen3
    assert failures_of(release, results) == {}


def test_a_stock_result_is_stock_on_every_release(release: Path, tmp_path: Path) -> None:
    results = {}
    for family in (family for family in NATIVE_FAMILIES if "qwen3" not in family):
        write_tiny(tmp_path / family / "base", family)
        plan = converted(tmp_path / family / "base", tmp_path / family / "out", STOCK)
        assert not plan.code
        results[family] = tmp_path / family / "out", plan, CORE
    assert failures_of(release, results) == {}


@pytest.mark.parametrize("name", ["builtin:llama", "stories260K", "babyllama-tok105"])
def test_a_base_of_the_newest_release_loads_on_the_oldest(name: str, release: Path, tmp_path: Path) -> None:
    base = name if name.startswith("builtin:") else str(SHARED / name)
    if base != name and not Path(base).is_dir():
        pytest.skip("the shared models are not on this machine")
    data = {"surgery": 1, "operations": [{"kv_latent": LATENT}], "verify": False}
    done = surgery.convert(base, tmp_path / "out", surgery.manifest_from_dict(data))
    assert failures(release, tmp_path / "out", done.plan, [*CORE, "tokenizer"]) == []


def test_a_snapshot_of_the_hub_s_cache_loads(release: Path, tmp_path: Path) -> None:
    """Files there are links into `blobs`, which is how everybody downstream meets a checkpoint."""
    write_tiny(tmp_path / "base", "llama")
    plan = converted(tmp_path / "base", tmp_path / "out", LATENT)
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted((tmp_path / "out").iterdir())):
        file.rename(repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert failures(release, snapshot, plan, ["loading_report", "finite_logits", "cached_decode_equals_full_forward"]) == []


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, surgery.Plan]]:
    """A folder with results of every family, uniform and not, and the plan of each; written once."""
    place, plans = tmp_path_factory.mktemp("pruned"), {}
    (place / "bases").mkdir()
    (place / "results").mkdir()
    for family in moe_cases.ALL:
        base = base_of(place / "bases" / family, family)
        for kind, operations in (
            ("uniform", [prune(KEEPS["uniform"])]),
            ("per_layer", [prune(KEEPS["per_layer"]), top_k([2, 1])]),
        ):
            data = {"surgery": 1, "operations": operations, "verify": False}
            name = f"{family}-{kind}"
            done = surgery.convert(str(base), place / "results" / name, surgery.manifest_from_dict(data))
            plans[name] = done.plan
    tokens = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(1))
    save_file({"tokens": tokens}, place / "results" / "tokens.safetensors")
    return place / "results", plans


def experts_on(release: str) -> Iterator[str]:
    """Names of results: those with code on every release, stock ones on the oldest that has the family.

    Elsewhere stock ones are loaded, and held against the others, by the test of logits below.
    """
    for family in moe_cases.ALL:
        since = [int(part) for part in architectures()[family].since.split(".")]
        having = [name for name in RELEASES if [int(part) for part in name.split(".")] >= since]
        if release in having:
            yield f"{family}-per_layer"
        if release == having[0]:
            yield f"{family}-uniform"


def test_fewer_experts_work_on_every_release(release: Path, pruned: tuple[Path, dict[str, surgery.Plan]]) -> None:
    place, plans = pruned
    results = {}
    for name in experts_on(release.name):
        assert bool(plans[name].code) == name.endswith("per_layer")
        results[name] = place / name, plans[name], CORE
    assert failures_of(release, results) == {}


def test_fewer_experts_give_the_same_logits_on_every_release(
    pruned: tuple[Path, dict[str, surgery.Plan]], tmp_path: Path
) -> None:
    place, plans = pruned
    found = {}
    for name in RELEASES:
        folder = REPOSITORY / ".compat" / name
        if not folder.is_dir():
            pytest.skip(f"transformers {name} is not installed: run tools/compat")
        environment = os.environ | {
            "PYTHONPATH": str(folder), "HF_MODULES_CACHE": str(tmp_path / f"modules-{name}"), "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        command = [sys.executable, "-c", LOGITS, str(place), str(tmp_path / name)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found[name] = load_file(tmp_path / name)
    assert set(found["4.57.6"]) == set(found["5.23.0"]) == set(plans)
    for name in RELEASES[:-1]:
        for case, logits in found[name].items():
            difference = (logits - found["5.23.0"][case]).abs().max().item()
            assert difference <= 1e-4, (name, case, difference)
