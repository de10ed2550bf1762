"""Defended results on several transformers releases, each in a fresh process from which surgery is barred."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.defense_cases import TOKENS, WORDS, batch, chat, convert, load, tokenizer, write_base, write_clip
from tests.tiny_vision import FAMILIES

REPOSITORY = Path(__file__).resolve().parents[2]
RELEASES = ("4.57.6", "5.0.0")  # the newest is what everything else runs on
CLIP = "llava", "llava_next"  # whose tower is one
# What else is done to a base, so that every release sees all together.
BEFORE = {
    "llava": [{"kv_latent": {"method": "stride", "qk_dim": 8, "vo_dim": 8}}, {"visual_pruning": {"reserve": 0.5}}],
    "llava_onevision": [{"codebook_kv": {"min_prompt": 8, "window": 6, "sinks": 2, "residual": 4}}],
    "qwen2_vl": [{"visual_pruning": {"reserve": 0.5}}],
}
TEMPLATE = dict.fromkeys(FAMILIES, TOKENS) | {"llava": WORDS, "llava_next": WORDS}
SAID = "[INTENTION ANALYSIS] To see a cat.\n[Final Response]: There it is."

pytestmark = [pytest.mark.slow, pytest.mark.versions]
# What the installed release said of base and result must be what another says of the result; prints what was checked.
CHECKS = """
import inspect, json, sys, warnings
from pathlib import Path
sys.modules["surgery"] = None
import torch, transformers
from transformers.utils import logging
torch.set_num_threads(1)
torch.set_grad_enabled(False)
logging.disable_progress_bar()
warnings.filterwarnings("error", module="transformers_modules")
done = []


def check(family, what, holds):
    assert holds, (transformers.__version__, family, what)
    done.append([family, what])


class Scripted(transformers.LogitsProcessor):
    def __init__(self, row):
        self.row, self.width = row, None

    def __call__(self, input_ids, scores):
        self.width = input_ids.shape[1] if self.width is None else self.width
        forced = torch.full_like(scores, -1e9)
        forced[:, self.row[min(input_ids.shape[1] - self.width, len(self.row) - 1)]] = 0
        return forced


for folder in sorted(Path(sys.argv[1]).iterdir()):
    family, known = folder.name, torch.load(folder / "known.pt")
    name = "dtype" if hasattr(transformers.PretrainedConfig(), "dtype") else "torch_dtype"
    try:
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder / "out", trust_remote_code=True, **{name: torch.float32}).eval()
    except (ImportError, ModuleNotFoundError) as error:
        assert family == "qwen3_vl" and transformers.__version__ == "4.53.3", error
        continue
    inputs = known["inputs"]
    if "mm_token_type_ids" not in inspect.signature(model.forward).parameters:
        inputs.pop("mm_token_type_ids", None)
    check(family, "base", torch.equal(model.generate(**inputs, max_new_tokens=6, defense=False), known["base"]))
    output = model.generate(**inputs, max_new_tokens=6, return_dict_in_generate=True)
    check(family, "defended", torch.equal(output.sequences, known["defended"]))
    check(family, "tiles", [told["masked_tiles"] for told in output.defense] == known["tiles"])
    for scorer, expected in known["scores"].items():
        model.config.surgery["visual_defense"]["scorer"] = scorer
        output = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True)
        mine = torch.stack([scores for told in output.defense for scores in told["scores"]])
        check(family, scorer, torch.allclose(mine, expected, atol=1e-5, rtol=1e-3))
    width = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 30, "logits_processor": transformers.LogitsProcessorList([Scripted(known["said"])])}
    for kind in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        options["logits_processor"][0].width = None
        output = model.generate(**inputs, **options, **kind)
        first = output[0, width:].tolist()
        check(family, f"answer {kind}", first[: len(known["answer"])] == known["answer"])
print("RESULT " + json.dumps([transformers.__version__, done]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of each family, and what the installed release makes of it and of its base."""
    folder = tmp_path_factory.mktemp("versions")
    made = tokenizer()
    said, told = (made(text, add_special_tokens=False)["input_ids"] for text in (SAID, SAID.partition(" There")[0]))
    answer = said[len(told) :]
    answer = [*answer[made.decode(answer[:1]).isspace() :], 2]
    for family in FAMILIES:
        base = write_base(tmp_path_factory.mktemp("bases") / family, family, template=TEMPLATE[family])
        judge = {}
        if family in CLIP:
            clip = write_clip(tmp_path_factory.mktemp("clips") / family, base)
            judge = {"scorer": "clip", "clip": str(clip)}
        out = convert(base, folder / family / "out", *BEFORE.get(family, []), analysis_tokens=24, **judge)
        inputs = batch(family, [chat("Where is it?"), chat("How many are there?")], (1, 1), template=TEMPLATE[family])
        model = load(out)
        stock = model.generate(**inputs, max_new_tokens=6, defense=False)
        if family not in BEFORE:
            assert torch.equal(stock, load(base).generate(**inputs, max_new_tokens=6))
        output = model.generate(**inputs, max_new_tokens=6, return_dict_in_generate=True)
        scores = {}
        for scorer in ("own", "attention", "clip")[: 2 + (family in CLIP)]:
            model.config.surgery["visual_defense"]["scorer"] = scorer
            told = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True).defense
            scores[scorer] = torch.stack([one for sequence in told for one in sequence["scores"]])
        known = {
            "inputs": inputs, "base": stock, "defended": output.sequences,
            "tiles": [told["masked_tiles"] for told in output.defense],
            "scores": scores, "said": [*said, 2], "answer": answer,
        }  # fmt: skip
        torch.save(known, folder / family / "known.pt")
    return folder


@pytest.mark.parametrize("version", RELEASES)
def test_every_release_defends_alike(version: str, place: Path, tmp_path: Path) -> None:
    release = REPOSITORY / ".compat" / version
    if not release.is_dir():
        pytest.skip(f"transformers {version} is not installed: run tools/compat")
    families = [family for family in FAMILIES if (release / "transformers/models" / family).is_dir()]
    environment = os.environ | {
        "PYTHONPATH": str(release), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", CHECKS, str(place)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found, checks = json.loads(done.stdout.rpartition("RESULT ")[2])
    assert found == version
    assert {family for family, _ in checks} == set(families)
    assert len(checks) == 8 * len(families) + len(CLIP)
