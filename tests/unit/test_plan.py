"""Plans: what they say, what they cost, and that they equal what conversions then do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import surgery
from surgery.checkpoint.reader import open_checkpoint
from surgery.planning import make_plan
from tests.giant import write_giant
from tests.tiny import FAMILIES, write_tiny

MEASURED = """
import json, sys
from pathlib import Path
import surgery
manifest = surgery.manifest_from_dict({"surgery": 1, "operations": json.loads(sys.argv[2])})
plan = surgery.plan(sys.argv[1], manifest)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
print(json.dumps({"peak": peak, "torch": "torch" in sys.modules, "plan": plan.to_json()}))
"""


def plan_in_a_process(base: Path, operations: list) -> dict:
    command = [sys.executable, "-c", MEASURED, str(base), json.dumps(operations)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize(
    ("operations", "fates"),
    [([], {"kept"}), ([{"kv_latent": {"method": "stride", "kv_ratio": 0.5}}], {"kept", "rewritten"})],
)
def test_a_checkpoint_of_1_3_terabytes_is_planned_in_300_megabytes_without_torch(
    tmp_path: Path, operations: list, fates: set[str]
) -> None:
    total = write_giant(tmp_path / "giant")
    assert total > 650e9
    found = plan_in_a_process(tmp_path / "giant", operations)
    assert found["peak"] < 300e6
    assert not found["torch"]
    assert set(found["plan"]["ledger"]) == fates
    assert sum(found["plan"]["ledger"].values()) > 90_000


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard_size", ["keep", "40KB"])
def test_a_plan_says_what_the_conversion_does(family: str, shard_size: str, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    write_tiny(base, family)
    manifest = surgery.manifest_from_dict(
        {
            "surgery": 1,
            "operations": [{"kv_latent": {"method": "stride", "qk_dim": 8, "vo_dim": 4}}],
            "output": {"shard_size": shard_size},
            "verify": False,
        }
    )
    plan = surgery.plan(str(base), manifest)
    surgery.convert(str(base), out, manifest)
    written = open_checkpoint(out, trust_remote_code=True)
    assert set(plan.shards) == {file.name for file in out.iterdir() if "safetensors" in file.name}
    assert plan.bytes_written == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert plan.parameters_after == written.parameter_count
    assert (plan.cache_bytes_before, plan.cache_bytes_after) == (2 * 2 * 2 * 16 * 4, 2 * 2 * (8 + 4) * 4)


def test_every_base_tensor_is_in_the_ledger_once(tmp_path: Path) -> None:
    write_tiny(tmp_path / "base", "phi3")
    checkpoint = open_checkpoint(tmp_path / "base")
    manifest = surgery.manifest_from_dict({"surgery": 1, "operations": [{"kv_latent": {"method": "paper", "kv_ratio": 0.5}}]})
    entries = make_plan(checkpoint, manifest).ledger
    of_base = [entry for entry in entries if entry.fate != "added"]
    assert [entry.name for entry in of_base] == list(checkpoint.tensors)
    added = {entry.name for entry in entries if entry.fate == "added"}
    assert added == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in "qkv"}
    assert all(entry.why for entry in entries if entry.fate != "kept")
