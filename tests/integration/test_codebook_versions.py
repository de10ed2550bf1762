"""Results with a codebook cache on several transformers releases, each in a fresh process from which surgery is barred."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.codebook_reference import convert
from tests.tiny import write_tiny

REPOSITORY = Path(__file__).resolve().parents[2]
RELEASES = ("4.48.3", "4.57.6", "5.0.0")  # the newest is what everything else runs on
LATENT = {"kv_latent": {"method": "stride", "qk_dim": 8, "vo_dim": 4}}
UNEVEN = {"kv_latent": {"qk_dim": [6, 10], "vo_dim": [12, 6]}}
PRUNE = {"expert_prune": {"keep": [[3, 0, 2], [1, 3]]}}
WINDOWS = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
# (family, what comes before, changes of the config); a result's reference is the result without our operation.
CASES: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "llama": ("llama", [], {}),
    "phi3": ("phi3", [], {}),
    "olmoe": ("olmoe", [], {}),
    "qwen2_moe": ("qwen2_moe", [], {}),
    "mistral-uneven": ("mistral", [UNEVEN], {}),
    "qwen3_moe-unequal": ("qwen3_moe", [LATENT, PRUNE], {}),
    "qwen2-windows": ("qwen2", [], WINDOWS),
}  # fmt: skip
# What is looked at closely; of the others only what is written where nothing is lost, and where something is.
CLOSELY = "llama"

pytestmark = [pytest.mark.slow, pytest.mark.versions]
# Every pair of folders against each other by one release; prints what was checked, and stops where something is not so.
CHECKS = """
import json, sys, warnings
from pathlib import Path
sys.modules["surgery"] = None
import torch, transformers
from transformers.utils import logging
torch.set_num_threads(1)
torch.set_grad_enabled(False)
logging.disable_progress_bar()
warnings.filterwarnings("error", module="transformers_modules")
SMALL = {"min_prompt": 8, "window": 6, "sinks": 2, "residual": 4}
EXACT = {**SMALL, "reserve_ratio": 1.0}
name = "dtype" if hasattr(transformers.PretrainedConfig(), "dtype") else "torch_dtype"
done = []


def load(folder, attention):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, attn_implementation=attention, **{name: torch.float32}).eval()


def write(model, ids, mask, count=30, **options):
    torch.manual_seed(0)
    options = {"do_sample": False, "min_new_tokens": count, **options}
    return model.generate(ids, attention_mask=mask, max_new_tokens=count, **options)


def check(case, what, holds):
    assert holds, (transformers.__version__, case, what)
    done.append([case, what])


def compare(case, attention):
    place = Path(sys.argv[1]) / case
    stock, result = load(place / "reference", attention), load(place / f"{case}-out", attention)
    ids = torch.randint(3, 128, (2, 60), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    padded = mask.clone()
    padded[0, :21] = 0
    closely = case == sys.argv[3] and attention == "sdpa"
    case = f"{case} {attention}"
    check(case, "uncached", torch.equal(result(ids, use_cache=False).logits, stock(ids, use_cache=False).logits))
    check(case, "greedy", torch.equal(write(result, ids * padded, padded, surgery_cache=EXACT), write(stock, ids * padded, padded)))
    kept = result.surgery_cache_report()["ratio"] > 0.9
    long = torch.randint(3, 128, (2, 220), generator=torch.Generator().manual_seed(2))
    write(result, long, torch.ones_like(long), 10, surgery_cache={**SMALL, "reserve_ratio": 0.3})
    check(case, "coded", kept and result.surgery_cache_report()["ratio"] < 0.45)
    if not closely:
        return
    for what, options in {
        "greedy": {}, "beams": {"num_beams": 3}, "beams returned": {"num_beams": 3, "num_return_sequences": 2},
        "sampled": {"do_sample": True, "num_return_sequences": 2},
    }.items():
        for kind, held in (("even", mask), ("padded", padded)):
            expected = write(stock, ids * held, held, **options)
            got = write(result, ids * held, held, surgery_cache=EXACT, **options)
            check(case, f"{what} {kind}", torch.equal(got, expected))
            if kind == "padded" and what != "sampled":
                plain = write(result, ids * held, held, surgery_cache=None, **options)
                check(case, f"{what} {kind} without", torch.equal(plain, expected))
    again = ids[:1, :35].repeat(1, 4)
    free = {"min_new_tokens": None}  # with it some releases do not guess
    expected = write(stock, again, torch.ones_like(again), 80, **free)
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": stock}):
        got = write(result, again, torch.ones_like(again), 80, surgery_cache=EXACT, **free, **options)
        same = torch.equal(got[:, : expected.shape[1]], expected)  # until 5.0, guesses may be one token too long
        check(case, f"guesses by {next(iter(options))}", same)
    for part in (1, 7):
        cache = result.surgery_cache(**EXACT)
        logits = [result(ids[:, :30], past_key_values=cache).logits]
        logits += [result(one, past_key_values=cache).logits for one in ids[:, 30:].split(part, 1)]
        coded = all(layer.heads is not None for layer in cache.stored.values())
        near = (torch.cat(logits, 1) - stock(ids, use_cache=False).logits).abs().max() <= 1e-4
        check(case, f"parts of {part}", bool(coded and near and cache.get_seq_length() == 60))
    for method in ("solved", "paper"):
        settings = {**SMALL, "reserve_ratio": 0.3, "method": method}
        cache = result.surgery_cache(**settings)
        finite = bool(result(long, past_key_values=cache).logits.isfinite().all())
        ratio = cache.report()["ratio"]
        check(case, f"{method} bytes", 0.1 < ratio <= (0.32 if method == "solved" else 0.8))
        for one in long[:, :30].split(1, 1):
            finite = finite and bool(result(one, past_key_values=cache).logits.isfinite().all())
        check(case, f"{method} finite", finite and cache.get_seq_length() == 250)
        held = torch.ones_like(long)
        write(result, long, held, 10, num_beams=2, surgery_cache=settings)
        check(case, f"{method} beams", result.surgery_cache_report()["bytes"] > 0)
    got = write(result, long, held, 30)
    check(case, "defaults", got.shape == (2, 250) and result.surgery_cache_report()["ratio"] < 0.55)
    try:
        result.surgery_cache(bits=7)
        check(case, "refused", False)
    except ValueError as error:
        check(case, "refused", "bits" in str(error))


failed = {}
for case, attention in json.loads(sys.argv[2]):
    try:
        compare(case, attention)
    except Exception as error:  # the others are told of too
        failed[f"{case} {attention}"] = f"{type(error).__name__}: {error}"
print("RESULT", json.dumps([transformers.__version__, done, failed]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import surgery
    from tests.codebook_reference import SELF

    folder = tmp_path_factory.mktemp("codebook")
    for name, (family, before, changes) in CASES.items():
        base = write_tiny(folder / name / ("base" if before else "reference"), family, **changes)
        if before:
            data = {"surgery": 1, "operations": before, "calibration": SELF, "verify": False}
            surgery.convert(str(base), folder / name / "reference", surgery.manifest_from_dict(data))
        convert(base, folder / name / f"{name}-out", *before)
    return folder


def names(release: Path) -> list[str]:
    return [name for name, (family, _, _) in CASES.items() if (release / "transformers/models" / family).is_dir()]


@pytest.mark.parametrize("version", RELEASES)
def test_it_is_the_base_where_nothing_is_lost_and_smaller_elsewhere(version: str, place: Path, tmp_path: Path) -> None:
    release = REPOSITORY / ".compat" / version
    if not release.is_dir():
        pytest.skip(f"transformers {version} is not installed: run tools/compat")
    jobs = [(name, "sdpa") for name in names(release)] + [("llama", "eager")]
    environment = os.environ | {
        "PYTHONPATH": str(release), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", CHECKS, str(place), json.dumps(jobs), CLOSELY]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found, checks, failed = json.loads(done.stdout.rpartition("RESULT ")[2])
    assert failed == {}
    assert found == version
    assert {case for case, _ in checks} == {f"{name} {attention}" for name, attention in jobs}
    assert len(checks) == 3 * len(jobs) + 23
