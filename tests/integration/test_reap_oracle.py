"""Which experts REAP keeps, against llm-compressor's own: same tokens, same scores, same experts, in every family.

On one layer, where its scores do not depend on what it pruned before. Its rules: it drops int(experts * sparsity), of
groups round(drop / groups) each, and an expert that no token takes is worth 0.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import surgery
from surgery.calibration.loading import loaded_model
from surgery.calibration.store import load_statistics
from surgery.calibration.text import sampled_windows
from surgery.checkpoint.reader import open_checkpoint
from tests.tiny import write_tiny

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".oracle" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".oracle" / "installed").is_file(), reason="tools/oracle has not made .oracle, which needs a network"),
]

EXPERTS = 8
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "mixtral": ({}, 0.5), "qwen2_moe": ({}, 0.3), "qwen3_moe": ({}, 0.5), "olmoe": ({}, 0.6), "deepseek_v2": ({}, 0.3),
    "deepseek_v3": ({}, 0.5), "glm4_moe": ({}, 0.5), "gpt_oss": ({}, 0.5), "granitemoe": ({}, 0.3),
    "qwen3_moe whole": ({"norm_topk_prob": False, "top_k": 3}, 0.3),
    "deepseek_v3 groups": ({"n_group": 2, "topk_group": 1}, 0.4),  # 3 of 8: round(1.5) = 2 of each group
}  # fmt: skip

# One process for all, as most of its time goes into imports.
ALL = """
import contextlib, json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import reap
with contextlib.redirect_stdout(sys.stderr):
    found = {name: reap.reap(Path(base), Path(tokens), sparsity) for name, base, tokens, sparsity in json.loads(sys.argv[2])}
json.dump(found, sys.stdout)
"""


def dropped(sparsity: float, groups: int) -> int:
    return round(int(EXPERTS * sparsity) / groups) * groups


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """By case: what surgery kept and measured, and what the oracle says of the same tokens."""
    torch.set_num_threads(1)
    ours, asked = {}, []
    for name, (options, sparsity) in CASES.items():
        folder = tmp_path_factory.mktemp("reap")
        base = write_tiny(folder / "base", name.split()[0], **{"experts": EXPERTS, "top_k": 2, "num_hidden_layers": 1} | options)
        keep = EXPERTS - dropped(sparsity, options.get("n_group", 1))
        manifest = surgery.manifest_from_dict(
            {
                "surgery": 1,
                "operations": [{"expert_prune": {"keep": keep, "criterion": "reap", "protect_super_experts": False}}],
                "calibration": {"text": "self", "samples": 8, "length": 48},
                "verify": False,
            }
        )
        done = surgery.convert(str(base), folder / "out", manifest, statistics=folder / "statistics")
        with loaded_model(open_checkpoint(base), "cpu") as network:
            windows = sampled_windows(network, manifest.calibration, 256, 1)
        (stored,) = (folder / "statistics").iterdir()
        statistics = load_statistics(stored)
        assert statistics.facts["provenance"]["tokens_sha256"] == windows.fingerprint
        save_file({"tokens": windows.tokens}, folder / "tokens.safetensors")
        asked.append([name, str(base), str(folder / "tokens.safetensors"), sparsity])
        ours[name] = (done.lock["decisions"]["0.expert_prune"]["kept"], statistics.tensors["sums"])
    command = [str(PYTHON), "-c", ALL, str(ROOT / "tests" / "oracles"), json.dumps(asked)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # more only stand in each other's way in so small a model
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=one_thread)
    assert ran.returncode == 0, ran.stderr[-3000:]
    theirs = json.loads(ran.stdout)
    return {name: (ours[name], theirs[name]) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_experts_are_those_of_llm_compressor(name: str, results: dict[str, tuple[Any, Any]]) -> None:
    (kept, sums), theirs = results[name]
    tokens, worth = sums[0, 0, 0], sums[0, 1, 1]
    assert [int(count) for count in tokens] == theirs["routed"]["0"]
    scores = (worth / tokens.clamp(min=1)).tolist()
    assert scores == pytest.approx(theirs["scores"]["0"], rel=1e-5)
    assert len({f"{score:.5g}" for score in scores if score}) == sum(score > 0 for score in scores)  # no ties
    assert kept["0"] == sorted(theirs["kept"]["0"])
    assert len(kept["0"]) == EXPERTS - dropped(CASES[name][1], CASES[name][0].get("n_group", 1))
