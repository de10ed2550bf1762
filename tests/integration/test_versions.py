"""Converted checkpoints on several transformers releases, each in a fresh process from which surgery is barred.

`tools/compat` installs the releases into `.compat`; `tools/test` does that before the tests run. The full matrix of
twelve releases is `tools/compat`'s own.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import surgery
from surgery.architectures import architectures
from surgery.verification import run_probe
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
NATIVE_FAMILIES = [name for name, family in architectures().items() if family.attention.native_head_dim]

pytestmark = [pytest.mark.slow, pytest.mark.versions]


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
    job = {
        "checkpoint": str(out), "trust_remote_code": True, "checks": checks, "static_cache": True,
        "kv_bytes_per_token": plan.cache_bytes_after, "kv_dtype": plan.cache_dtype,
    }  # fmt: skip
    result = run_probe(job, transformers=release, timeout=600)
    assert result["transformers"] == release.name
    statuses = {check["name"]: check["status"] for check in result["checks"]}
    assert set(checks or CORE) <= set(statuses), "every check that was asked for must have run"
    return [f"{check['name']}: {check['detail']}" for check in result["checks"] if check["status"] == "fail"]


@pytest.mark.parametrize("family", FAMILIES)
def test_latent_heads_work_on_every_release(family: str, release: Path, tmp_path: Path) -> None:
    if not has(release, family):
        pytest.skip(f"{family} is not in transformers {release.name}")
    write_tiny(tmp_path / "base", family)
    # Before 4.57 transformers cannot load code from a local folder with a dot in its name; convert says so.
    out = tmp_path / ("out" if release.name == "4.48.3" else "out.with.dots")
    plan = converted(tmp_path / "base", out, LATENT)
    assert plan.code
    assert any("4.57" in note for note in plan.notes) == ("." in out.name)
    assert failures(release, out, plan, None if family == "llama" else CORE) == []


@pytest.mark.parametrize("family", [family for family in NATIVE_FAMILIES if "qwen3" not in family])
def test_a_stock_result_is_stock_on_every_release(family: str, release: Path, tmp_path: Path) -> None:
    write_tiny(tmp_path / "base", family)
    plan = converted(tmp_path / "base", tmp_path / "out", STOCK)
    assert not plan.code
    assert failures(release, tmp_path / "out", plan, CORE) == []


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
