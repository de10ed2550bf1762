"""Results of visual_pruning on several transformers releases, each in a fresh process from which surgery is barred."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import copy
from typing import Any

import pytest
import torch

from tests.tiny_vision import FAMILIES, VIDEOS, clip_of, inputs_of, write_tiny_vision
from tests.visual_reference import (
    UNWANTED,
    convert,
    kept_mask,
    load,
    longer,
    masked,
    recomputed,
    sorted_best,
    with_scorer,
)
from tests.visual_stages_reference import cached, descended, layered, layered_greedy, with_scorers

REPOSITORY = Path(__file__).resolve().parents[2]
RELEASES = ("4.57.6", "5.0.0")  # the newest is what everything else runs on
TOO_OLD = "4.48.3"
NEW = 6
STAGES = {"0": 0.75, "2": 0.3}
USED = kept_mask, masked, longer, recomputed, layered, layered_greedy, cached

pytestmark = [pytest.mark.slow, pytest.mark.versions]
# Every family by one release, against the stock class of that release and against what another one wrote.
CHECKS = """
from __future__ import annotations
import inspect, json, sys, tempfile, warnings
from pathlib import Path
sys.modules["surgery"] = None
import torch, transformers
from transformers import AutoModelForImageTextToText
from transformers.utils import logging
torch.set_num_threads(1)
torch.set_grad_enabled(False)
logging.disable_progress_bar()
warnings.filterwarnings("error", module="transformers_modules")
done, place, UNWANTED, NEW = [], Path(sys.argv[1]), json.loads(sys.argv[3]), int(sys.argv[4])

REFERENCE

def load(folder):
    model, report = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    return model.eval(), {name: sorted(found) for name, found in report.items() if found}


def write(model, batch, **options):
    options = {"do_sample": False, "max_new_tokens": NEW, "suppress_tokens": UNWANTED, **options}
    return model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]


def loop(model, batch):
    output, mask, found = model(**batch), batch["attention_mask"], []
    for _ in range(NEW):
        logits = output.logits[:, -1]
        logits[:, UNWANTED] = float("-inf")
        found.append(logits.argmax(-1))
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        options = {"attention_mask": mask} if len(found) % 2 else {}
        output = model(input_ids=found[-1][:, None], past_key_values=output.past_key_values, **options)
    return torch.stack(found, 1)


def refused(call, word):
    try:
        call()
    except (ValueError, NotImplementedError) as error:
        return word in str(error)


def compare(family):
    stock, _ = load(place / family / "stock")
    takes = inspect.signature(stock.forward).parameters
    for kind in ("plain", "trained"):
        model, report = load(place / family / kind)
        for shown, (batch, written) in torch.load(place / family / "expected.pt")[kind].items():
            batch = {name: value for name, value in batch.items() if name in takes}
            output = model(**batch)
            keep = kept_mask(output.kept_indices, batch["input_ids"].shape[1])
            near = masked(stock, batch, keep)[keep] - output.logits[output.kept_indices >= 0]
            greedy = write(model, batch)
            checks = {
                "report": report == {},
                "everything": torch.equal(model(**batch, visual_reserve=1.0).logits, stock(**batch).logits),
                "everything written": torch.equal(write(model, batch, visual_reserve=1.0), write(stock, batch)),
                "kept": torch.equal(output.kept_indices, written["kept"]),
                "logits": near.abs().max() <= 2e-5,
                "greedy": torch.equal(greedy, recomputed(stock, batch, keep, NEW)),
                "loop": torch.equal(loop(model, batch), greedy),
                "cache": output.past_key_values.get_seq_length() == output.kept_indices.shape[1],
                "zero": refused(lambda: model(**batch, visual_reserve=0), "visual_reserve"),
            }
            for cache in ("static", "hybrid"):
                checks[cache] = refused(lambda: write(model, batch, cache_implementation=cache), "visual_reserve")
            if shown != "clip":  # whose places differ between releases
                checks["as elsewhere"] = torch.equal(greedy, written["greedy"])
            if shown == "images":  # beams of rows with several see those of other rows in some releases
                checks["beams"] = torch.equal(write(model, batch, num_beams=2), written["beams"])
            for what, holds in checks.items():
                assert holds, (kind, shown, what)
                done.append([family, kind, shown, what])
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        again, report = load(saved)
        assert report == {} and torch.equal(again(**batch).logits, output.logits), "saved"
    done.append([family, "saved"])


# A result whose tokens leave before two layers, against the stock class with a mask for each layer.
def compare_stages(family):
    stock, _ = load(place / family / "stock")
    model, report = load(place / family / "staged")
    batch, keeps, written = torch.load(place / family / "staged.pt")
    batch = {name: value for name, value in batch.items() if name in inspect.signature(stock.forward).parameters}
    output, last = model(**batch), keeps[max(keeps)]
    near = layered(stock, batch, keeps)[last] - output.logits[output.kept_indices >= 0]
    past = output.past_key_values
    held = [past.get_seq_length(layer) for layer in range(len(model.model.language_model.layers))]
    checks = {
        "report": report == {},
        "everything": torch.equal(model(**batch, visual_reserve=1.0).logits, stock(**batch).logits),
        "kept": torch.equal(kept_mask(output.kept_indices, last.shape[1]), last),
        "logits": near.abs().max() <= 2e-5,
        "greedy": torch.equal(write(model, batch), layered_greedy(stock, batch, keeps, NEW)),
        "as elsewhere": torch.equal(write(model, batch), written),
        "loop": torch.equal(loop(model, batch), written),
        "cache": held == cached(batch, keeps, len(held)),
        "static": refused(lambda: write(model, batch, cache_implementation="static"), "visual_reserve"),
    }
    past.crop(-1)
    checks["cropped"] = refused(lambda: model(input_ids=batch["input_ids"][:, :1], past_key_values=past), "cropped")
    for what, holds in checks.items():
        assert holds, ("staged", what)
        done.append([family, "staged", what])


failed = {}
for family in json.loads(sys.argv[2]):
    try:
        compare(family)
        compare_stages(family)
    except Exception as error:  # the others are told of too
        failed[family] = f"{type(error).__name__}: {error}"
print("RESULT", json.dumps([transformers.__version__, len(done), failed]))
""".replace("REFERENCE", "\n\n".join(map(inspect.getsource, USED)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("visual")
    for family in FAMILIES:
        make(folder / family, family)
    return folder


def make(folder: Path, family: str) -> None:
    """A stock model, two results, and what they have to write."""
    plain = convert(write_tiny_vision(folder / "base", family), folder / "plain", reserve=0.5)
    with_scorer(convert(folder / "base", folder / "more", reserve=0.3), folder / "trained")
    (folder / "stock").mkdir()
    copy(plain / "model.safetensors", folder / "stock")
    config = json.loads((plain / "config.json").read_text())  # which all releases read
    config |= {"model_type": family, "architectures": [config["architectures"][0].removeprefix("Surgery")]}
    kept = {name: value for name, value in config.items() if name not in {"auto_map", "surgery"}}
    (folder / "stock/config.json").write_text(json.dumps(kept))
    base = load(folder / "base")
    shown = {"mixed": inputs_of(family, (1, 2, 0)), "images": inputs_of(family, (1, 1))}
    if family in VIDEOS:
        shown["clip"] = clip_of(family)
    expected: dict[str, dict[str, Any]] = {}
    for kind in ("plain", "trained"):
        model = load(folder / kind)
        expected[kind] = {name: (batch, reference(base, model, batch)) for name, batch in shown.items()}
    torch.save(expected, folder / "expected.pt")
    model = load(with_scorers(convert(folder / "base", folder / "few", stages=STAGES), folder / "staged"))

    @torch.no_grad()
    def pick(layer: int, visual: torch.Tensor, text: torch.Tensor, count: int) -> list[int]:
        return sorted_best(model.model.visual_scorer[str(layer)](visual, text).tolist(), count)

    keeps = descended(base, shown["mixed"], {int(layer): share for layer, share in STAGES.items()}, pick)
    written = layered_greedy(base, shown["mixed"], keeps, NEW)
    torch.save((shown["mixed"], keeps, written), folder / "staged.pt")


@torch.no_grad()
def reference(base: Any, model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    output, length = model(**batch), batch["input_ids"].shape[1]
    options = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": UNWANTED}
    return {
        "kept": output.kept_indices,
        "greedy": recomputed(base, batch, kept_mask(output.kept_indices, length), NEW),
        "beams": model.generate(**batch, **options, num_beams=2)[:, length:],
    }  # fmt: skip


def run(version: str, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    release = REPOSITORY / ".compat" / version
    if not release.is_dir():
        pytest.skip(f"transformers {version} is not installed: run tools/compat")
    environment = os.environ | {
        "PYTHONPATH": str(release), "HF_MODULES_CACHE": str(cache / "modules"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", *arguments], env=environment, cwd=cache, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("version", RELEASES)
def test_it_is_the_base_or_the_base_under_a_mask(version: str, place: Path, tmp_path: Path) -> None:
    there = [name for name in FAMILIES if (REPOSITORY / ".compat" / version / "transformers/models" / name).is_dir()]
    done = run(version, tmp_path, CHECKS, str(place), json.dumps(there), json.dumps(UNWANTED), str(NEW))
    assert done.returncode == 0, done.stderr[-3000:]
    found, count, failed = json.loads(done.stdout.rpartition("RESULT ")[2])
    assert failed == {}
    assert found == version
    assert len(there) == (5 if version == "4.53.3" else 6)
    assert count == (51 + 10) * len(there) + 22 * len(set(VIDEOS) & set(there))


LOADS = """
import sys
from transformers import AutoModelForImageTextToText
AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
"""


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])  # one of each kind: all share the check
def test_a_release_that_is_too_old_says_so(family: str, place: Path, tmp_path: Path) -> None:
    done = run(TOO_OLD, tmp_path, LOADS, str(place / family / "plain"))
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: This checkpoint")
    assert TOO_OLD in last
    assert "pip install -U transformers" in last
