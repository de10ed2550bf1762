"""Operations on text inside vision-language models: what they do there is what they do to the language model alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from tests.tiny_vision import IMAGE, inputs_of, write_tiny_vision

LATENT = {"kv_latent": {"method": "stride", "qk_dim": 8, "vo_dim": 8}}
UNEVEN = {"kv_latent": {"qk_dim": [6, 10, 8], "vo_dim": [12, 6, 8], "refit_q": True}}
INT4 = {"quantize": {"bits": 4, "group_size": 32, "method": "rtn"}}
GPTQ = {"quantize": {"bits": 4, "group_size": 32}}
SMALL_CACHE = {"codebook_kv": {"min_prompt": 8, "window": 6, "sinks": 2, "residual": 4}}
CASES = [("llava", [LATENT]), ("llava", [UNEVEN]), ("llava", [INT4]), ("llava", [GPTQ]), ("llava", [SMALL_CACHE]),
         ("llava", [LATENT, SMALL_CACHE]), ("llava_next", [LATENT]), ("llava_onevision", [UNEVEN])]  # fmt: skip


def convert(base: Path, out: Path, operations: list[dict[str, Any]]) -> Path:
    calibration = {"text": "self", "samples": 4, "length": 32}
    manifest = {"surgery": 1, "operations": operations, "calibration": calibration, "verify": False}
    return surgery.convert(str(base), out, surgery.manifest_from_dict(manifest), statistics=out.with_name("kept")).out


def load(folder: Path, kind: str) -> Any:
    import transformers

    found, report = getattr(transformers, kind).from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not [key for keys in report.values() for key in keys]
    return found.eval()


def language_model(base: Path, folder: Path) -> Path:
    """The language model of a checkpoint as a checkpoint of its own."""
    folder.mkdir()
    tensors = load_file(base / "model.safetensors")
    begins = "language_model."
    alone = {name.removeprefix(begins): tensor for name, tensor in tensors.items() if name.startswith(begins)}
    save_file(alone, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())["text_config"]
    config["architectures"] = [f"{config['model_type'].capitalize()}ForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def named(value: Any) -> str:
    return value if isinstance(value, str) else "-".join(next(iter(operation)) for operation in value)


@pytest.fixture
def base(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return write_tiny_vision(tmp_path / "base", request.param)


@torch.no_grad()
@pytest.mark.parametrize(("base", "operations"), CASES, indirect=["base"], ids=named)
def test_inside_it_is_what_it_is_alone(base: Path, operations: list[dict[str, Any]], tmp_path: Path) -> None:
    ids = torch.randint(10, 128, (2, 40), generator=torch.Generator().manual_seed(0))
    inside = load(convert(base, tmp_path / "inside", operations), "AutoModelForImageTextToText")
    alone = convert(language_model(base, tmp_path / "alone"), tmp_path / "result", operations)
    alone = load(alone, "AutoModelForCausalLM")
    torch.testing.assert_close(inside(input_ids=ids).logits, alone(input_ids=ids).logits, atol=2e-5, rtol=0)
    family = json.loads((base / "config.json").read_text())["model_type"]
    inputs = inputs_of(family, (1, 2, 0))
    single = inputs_of(family, (1,))
    assert inside(**inputs).logits.isfinite().all()
    written = inside.generate(**single, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert written.shape[1] > single["input_ids"].shape[1]
    assert bool((single["input_ids"] == IMAGE).any())


@torch.no_grad()
@pytest.mark.parametrize("base", ["llava"], indirect=True)
def test_a_whole_cache_is_the_base_with_images_too(base: Path, tmp_path: Path) -> None:
    native = load(base, "AutoModelForImageTextToText")
    coded = load(convert(base, tmp_path / "out", [SMALL_CACHE]), "AutoModelForImageTextToText")
    inputs = inputs_of("llava", (1, 2, 0))
    wanted = native.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    everything = {"reserve_ratio": 1.0, "theta_k": 1.0, "theta_v": 1.0}
    for settings in (None, everything):
        found = coded.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0, surgery_cache=settings)
        assert torch.equal(found, wanted)
    coded.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert coded.surgery_cache_report()["ratio"] < 0.7


@torch.no_grad()
@pytest.mark.parametrize("base", ["llava"], indirect=True)
def test_pruned_prompts_are_coded(base: Path, tmp_path: Path) -> None:
    out = convert(base, tmp_path / "out", [LATENT, SMALL_CACHE, {"visual_pruning": {"reserve": 0.5}}])
    model = load(out, "AutoModelForImageTextToText")
    inputs = inputs_of("llava", (2, 1), texts=20)
    model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    report = model.surgery_cache_report()
    seen = int(inputs["attention_mask"].sum()) - 3 * 8 + 2 * 3  # half of three images' tokens are gone
    assert report["layers"][0]["seen_tokens"] == seen * 2
    assert report["ratio"] < 0.8


@pytest.mark.parametrize("base", ["qwen2_vl", "qwen3_vl"], indirect=True)
@pytest.mark.parametrize("operation", ["heal", "rotate"])
def test_what_was_not_built_is_refused(base: Path, operation: str) -> None:
    with pytest.raises(surgery.errors.UnsupportedModel, match=f"{operation} does not fit"):
        surgery.plan(str(base), surgery.manifest_from_dict({"surgery": 1, "operations": [operation]}))
