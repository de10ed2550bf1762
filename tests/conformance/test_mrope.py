"""`kv_latent` and `codebook_kv` on language models whose tokens have three positions: time, height and width (M-RoPE)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import surgery
from surgery.architectures import Model, find_family
from surgery.operations.codebook_kv import CodebookKVSettings
from surgery.operations.codebook_kv import refuses as unfit_for_cache
from surgery.operations.kv_latent import KVLatentSettings
from surgery.operations.kv_latent import refuses as unfit_for_latent
from tests.mrope_reference import LOSSLESS, check_coded, check_latent, written
from tests.tiny_vision import clip_of, inputs_of, write_tiny_vision

REPOSITORY = Path(__file__).resolve().parents[2]
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
RELEASES = ("4.57.6", "5.0.0")  # 4.53.3 by hand; the newest is what everything else runs on
LATENT = {"kv_latent": {"qk_dim": [16, 6, 10], "vo_dim": [16, 12, 6]}}  # each head its own pairs; one layer whole
SMALL_CACHE = {"codebook_kv": {"min_prompt": 8, "window": 6, "sinks": 2, "residual": 4}}
RESULTS = {"latent": [LATENT], "coded": [SMALL_CACHE]}
ALONG = ("input_ids", "attention_mask", "mm_token_type_ids")  # with a column for each token
NEW = 4


def convert(base: Path, out: Path, operations: list[Any]) -> Path:
    calibration = {"text": "self", "samples": 4, "length": 32}
    manifest = {"surgery": 1, "operations": operations, "calibration": calibration, "verify": False}
    return surgery.convert(str(base), out, surgery.manifest_from_dict(manifest), statistics=out.with_name("kept")).out


def load(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    options = {"trust_remote_code": True, "output_loading_info": True}
    model, report = AutoModelForImageTextToText.from_pretrained(folder, **options)
    assert not [key for keys in report.values() for key in keys]
    return model.eval()


def batches_of(family: str) -> dict[str, dict[str, Tensor]]:
    """Rows with one, two and no images, padded on the left; and one row with an image, text, a clip and text."""
    image, clip = inputs_of(family, (1,)), clip_of(family)
    both = {name: torch.cat([image[name], clip[name]], 1) for name in ALONG}
    return {"images": inputs_of(family, (1, 2, 0)), "image and clip": {**image, **clip, **both}}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each family the base, a stock config that all releases read, results, and inputs."""
    folder = tmp_path_factory.mktemp("mrope")
    for family in QWEN:
        at = folder / family
        base = write_tiny_vision(at / "base", family)
        for name, operations in RESULTS.items():
            convert(base, at / name, operations)
        (at / "stock").mkdir()
        copy(base / "model.safetensors", at / "stock")
        config = json.loads((at / "coded/config.json").read_text())
        config |= {"model_type": family, "architectures": [config["architectures"][0].removeprefix("Surgery")]}
        del config["auto_map"], config["surgery"], config["text_config"]["surgery"]
        (at / "stock/config.json").write_text(json.dumps(config))
        torch.save(inputs_of(family, (1, 2, 0)), at / "images.pt")
    return folder


@pytest.mark.parametrize("family", QWEN)
def test_narrow_heads_are_the_base_without_the_pairs(family: str, place: Path) -> None:
    at = place / family
    assert check_latent(load(at / "stock"), load(at / "latent"), at / "latent", batches_of(family), NEW) == {}


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_what_is_calibrated_is_the_language_model(family: str, place: Path, tmp_path: Path) -> None:
    """On text alone, under which it is Qwen2 or Qwen3 with one position."""
    at, alone = place / family, family.removesuffix("_vl")
    (tmp_path / "alone").mkdir()
    config = json.loads((at / "base/config.json").read_text())["text_config"]
    rope = {name: config["rope_parameters"][name] for name in ("rope_type", "rope_theta")}
    config |= {"model_type": alone, "architectures": [f"{alone.title()}ForCausalLM"], "rope_parameters": rope}
    (tmp_path / "alone/config.json").write_text(json.dumps(config))
    within = "model.language_model." if family == "qwen3_vl" else "model."
    base = load_file(at / "base/model.safetensors")
    tensors = {name.replace(within, "model."): tensor for name, tensor in base.items() if "visual" not in name}
    save_file(tensors, tmp_path / "alone/model.safetensors", metadata={"format": "pt"})
    found = load_file(at / "latent/model.safetensors")
    expected = load_file(convert(tmp_path / "alone", tmp_path / "out", [LATENT]) / "model.safetensors")
    assert len(expected) >= len(tensors)  # output biases may come on top
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name.replace("model.", within, 1)], tensor, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", QWEN)
def test_a_coded_cache_is_the_base_with_decoded_keys(family: str, place: Path) -> None:
    assert check_coded(load(place / family / "stock"), load(place / family / "coded"), batches_of(family), NEW) == {}


@torch.no_grad()
@pytest.mark.parametrize("name", RESULTS)
def test_rows_of_a_batch_are_what_they_are_alone(name: str, place: Path) -> None:
    model, batch = load(place / "qwen2_5_vl" / name), inputs_of("qwen2_5_vl", (2, 1))
    pixels, grids = batch["pixel_values"].split(96), batch["image_grid_thw"].split(2)  # of two images, and of one
    together = written(model, batch, 6)
    for row, mask in enumerate(batch["attention_mask"].bool()):
        single = {name: batch[name][row : row + 1, mask] for name in ALONG}
        single |= {"pixel_values": pixels[row], "image_grid_thw": grids[row]}
        assert torch.equal(written(model, single, 6)[0], together[row])


@torch.no_grad()
def test_what_moves_in_a_cache_takes_its_positions_along(place: Path) -> None:
    """Beams reorder them, drafts are taken back, and a cache that is emptied starts anew."""
    at = place / "qwen2_vl"
    stock, model, batch = load(at / "stock"), load(at / "coded"), inputs_of("qwen2_vl", (1, 1))
    one = {name: value[: len(value) // 2] for name, value in batch.items()}
    for rows, options in ((batch, {"num_beams": 3}), (one, {"prompt_lookup_num_tokens": 3})):
        found = written(model, rows, 8, surgery_cache=LOSSLESS, **options)
        assert torch.equal(found, written(stock, rows, 8, **options))
    cache = model.surgery_cache(**LOSSLESS)
    once = model(**batch, past_key_values=cache, use_cache=True).logits
    order = torch.tensor([1, 0, 1])
    before = cache.grid.clone()
    cache.batch_select_indices(order)
    assert torch.equal(cache.grid, before[:, order])
    cache.crop(-2)
    assert torch.equal(cache.grid, before[:, order, :-2])
    cache.reset()
    assert torch.equal(model(**batch, past_key_values=cache, use_cache=True).logits, once)


@torch.no_grad()
def test_both_keep_what_pruning_leaves(place: Path) -> None:
    at = place / "qwen2_vl"
    pruning = {"visual_pruning": {"reserve": 0.5}}
    out = convert(at / "base", at / "pruned", [LATENT, SMALL_CACHE, pruning])
    model, batch = load(out), inputs_of("qwen2_vl", (2, 1), texts=20)
    kept = model(**batch).kept_indices
    assert kept.shape[1] < batch["input_ids"].shape[1]
    exact = written(model, batch, 6, surgery_cache=None)
    assert torch.equal(written(model, batch, 6, surgery_cache=LOSSLESS), exact)
    written(model, batch, 6)
    report = model.surgery_cache_report()
    assert report["layers"][0]["seen_tokens"] == 2 * (int((kept >= 0).sum()) + 2 * 5)  # the last token is not read
    assert report["ratio"] < 0.8
    plain = load(convert(at / "base", at / "narrow and pruned", [LATENT, pruning]))
    assert torch.equal(exact, written(plain, batch, 6))


def test_positions_are_counted_in_the_bytes(place: Path) -> None:
    model, batch = load(place / "qwen2_vl/coded"), inputs_of("qwen2_vl", (1, 2))
    written(model, batch, 1)
    report, seen = model.surgery_cache_report(), batch["input_ids"].numel()
    in_layers = sum(layer["bytes"] for layer in report["layers"])
    assert report["bytes"] - in_layers == 3 * 2 * seen + 2 * 8  # int16, and a count for each row
    assert report["ratio"] == report["bytes"] / report["stock_bytes"]
    text = {"input_ids": torch.randint(10, 128, (1, 400), generator=torch.Generator().manual_seed(0))}
    for ratio in (0.2, 0.3, 0.45):
        cache = model.surgery_cache(reserve_ratio=ratio, window=4, sinks=1, residual=4)
        model(**text, past_key_values=cache, use_cache=True)
        assert model.surgery_cache_report(cache)["ratio"] <= ratio + 8 / report["stock_bytes"]


@torch.no_grad()
@pytest.mark.parametrize("name", RESULTS)
def test_a_flat_config_is_read_as_a_nested_one(name: str, place: Path) -> None:
    """As the Hub has Qwen2-VL: fields of the language model beside those of the whole, and `type: mrope`."""
    at = place / "qwen2_vl"
    flat = at / f"flat {name}"
    flat.mkdir()
    copy(at / "base/model.safetensors", flat)
    config = json.loads((at / "base/config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"]}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    (flat / "config.json").write_text(json.dumps(text | config))
    model, nested = load(convert(flat, at / f"from flat {name}", RESULTS[name])), load(at / name)
    batch = inputs_of("qwen2_vl", (1, 2))
    assert torch.equal(model(**batch).logits, nested(**batch).logits)
    assert torch.equal(written(model, batch, NEW), written(nested, batch, NEW))


def test_the_papers_spectrum_has_no_place_for_three_positions(place: Path) -> None:
    base = str(place / "qwen2_vl/base")
    manifest = surgery.manifest_from_dict({"surgery": 1, "operations": [{"kv_latent": {"method": "paper"}}]})
    with pytest.raises(surgery.errors.UnsupportedModel, match="time, height or width"):
        surgery.plan(base, manifest)


def test_layers_that_all_slide_are_refused(place: Path) -> None:
    config = json.loads((place / "qwen2_vl/base/config.json").read_text())
    config["text_config"] |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    del config["text_config"]["layer_types"]
    unfit = unfit_for_cache(Model(find_family(config), config["text_config"], {}), CodebookKVSettings())
    assert unfit is not None
    assert "sliding window" in unfit


def test_sections_must_be_known() -> None:
    config = {"model_type": "qwen2_vl", "hidden_size": 64, "num_attention_heads": 4, "rope_theta": 1e4}
    with pytest.raises(surgery.errors.UnsupportedModel, match="mrope_section"):
        unfit_for_latent(Model(find_family(config), config, {}), KVLatentSettings())


CHECKS = """
import json, sys, warnings
from pathlib import Path
sys.modules["surgery"] = None
import torch, transformers
sys.path.insert(0, sys.argv[1])
from mrope_reference import check_coded, check_latent
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)
warnings.filterwarnings("error", module="transformers_modules")
failed, place, new = {}, Path(sys.argv[2]), int(sys.argv[4])


def load(folder):
    options = {"trust_remote_code": True, "output_loading_info": True}
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(folder, **options)
    assert not [key for keys in report.values() for key in keys], (folder, report)
    return model.eval()


for family in json.loads(sys.argv[3]):
    at = place / family
    stock, batches = load(at / "stock"), {"images": torch.load(at / "images.pt")}
    failed[family] = [check_latent(stock, load(at / "latent"), at / "latent", batches, new)]
    failed[family].append(check_coded(stock, load(at / "coded"), batches, new))
print("RESULT", json.dumps([transformers.__version__, failed]))
"""


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.parametrize("version", RELEASES)
def test_other_releases_say_the_same(version: str, place: Path, tmp_path: Path) -> None:
    release = REPOSITORY / ".compat" / version
    if not release.is_dir():
        pytest.skip(f"transformers {version} is not installed: run tools/compat")
    there = [family for family in QWEN if (release / "transformers/models" / family).is_dir()]
    cache = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    arguments = str(REPOSITORY / "tests"), str(place), json.dumps(there), "2"
    done = subprocess.run(
        [sys.executable, "-c", CHECKS, *arguments], env=os.environ | {"PYTHONPATH": str(release)} | cache, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.rpartition("RESULT ")[2]) == [version, {family: [{}, {}] for family in there}]
    assert there == list(QWEN if version != "4.53.3" else QWEN[:2])
