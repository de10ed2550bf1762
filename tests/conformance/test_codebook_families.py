"""The codebook cache in every family that has one, alone and after other operations."""

import json
import sys
from pathlib import Path

import pytest
import torch
from test_runtime_attention import needs

import surgery
from surgery.errors import SurgeryError

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.codebook_reference import LOSSLESS, SELF, SMALL, convert, load, tokens
from tests.tiny import FAMILIES, MOE_FAMILIES, write_tiny

LATENT = {"kv_latent": {"method": "stride", "qk_dim": 8, "vo_dim": 4}}
UNEVEN = {"kv_latent": {"qk_dim": [6, 10], "vo_dim": [12, 6]}}  # each head its own pairs, each layer its own widths
PRUNE = {"expert_prune": {"keep": [[3, 0, 2], [0, 1, 3]]}}
UNEQUAL = {"expert_prune": {"keep": [[3, 0, 2], [1, 3]]}}
TOP_K = {"expert_top_k": {"top_k": 1}}
BEFORE = {
    "alone": [], "latent": [LATENT], "uneven": [UNEVEN],
    "pruned": [PRUNE], "unequal": [UNEQUAL], "top-k": [TOP_K], "all": [LATENT, UNEQUAL, TOP_K],
}  # fmt: skip
CASES = [(family, name) for family in FAMILIES for name in ("alone", "latent")] + [("llama", "uneven")]
CASES += [(family, "all") for family in MOE_FAMILIES] + [("qwen3_moe", "unequal"), ("olmoe", "pruned")]
QUICK = [("llama", "alone"), ("phi3", "latent"), ("qwen3_moe", "all")]
EAGER = [("llama", "uneven"), ("phi3", "alone"), ("qwen3_moe", "all")]
PROMPT, NEW = 60, 16

_made = {}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


@pytest.fixture
def folders(request, tmp_path_factory):
    """(without our operation, with it) of the family and the operations that a test names."""
    family, name = request.param
    needs(family)
    if request.param not in _made:
        place, before = tmp_path_factory.mktemp(family), BEFORE[name]
        reference = write_tiny(place / "base", family)
        out = convert(reference, place / "out", *before)
        if before:
            reference = without(place / "base", place / "without", before)
        _made[request.param] = reference, out
    return _made[request.param]


def of_cases(cases, quick=()):
    params = [
        pytest.param(case, id="-".join(case), marks=[] if case in quick else [pytest.mark.slow]) for case in cases
    ]
    return pytest.mark.parametrize("folders", params, indirect=True)


def without(base, out, before):
    data = {"surgery": 1, "operations": before, "calibration": SELF, "verify": False}
    return surgery.convert(str(base), out, surgery.manifest_from_dict(data)).out


def written(model, ids, mask, count=NEW, **options):
    options = {"do_sample": False, "attention_mask": mask} | options
    return model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)


def batch(lengths=(PROMPT, 44), total=PROMPT):
    mask = torch.stack([torch.arange(total) >= total - length for length in lengths]).long()
    return tokens(total, rows=len(lengths)) * mask, mask


@of_cases(CASES, [*QUICK, ("olmoe", "alone"), ("qwen3", "alone")])
def test_what_holds_everything_is_what_it_was(folders):
    assert_same_as_before(folders, "sdpa")


def assert_same_as_before(folders, attention):
    reference, out = (load(folder, attention) for folder in folders)
    ids, mask = batch()
    expected = written(reference, ids, mask)
    assert torch.equal(written(out, ids, mask, surgery_cache=LOSSLESS), expected)
    assert torch.equal(written(out, ids, mask, surgery_cache=None), expected)
    assert out.surgery_cache_report()["ratio"] > 0.9
    assert torch.equal(out(ids, use_cache=False).logits, reference(ids, use_cache=False).logits)

    one = tokens(PROMPT + 20)
    cache = out.surgery_cache(**LOSSLESS)
    logits = [out(part, past_key_values=cache).logits for part in one.split([PROMPT, 1, 1, 1, 17], 1)]
    assert all(layer.heads is not None for layer in cache.stored.values())
    assert (torch.cat(logits, 1) - reference(one, use_cache=False).logits).abs().max() <= 1e-4


@of_cases(EAGER)
def test_eager_is_what_it_was(folders):
    assert_same_as_before(folders, "eager")


@of_cases(CASES, [("llama", "alone"), ("qwen3_moe", "all")])
def test_what_holds_less_decodes_and_is_smaller(folders):
    out = load(folders[1])
    ids, mask = batch(lengths=(200, 150), total=200)
    for settings in ({"reserve_ratio": 0.3}, {"method": "paper", "reserve_ratio": 0.3}):
        got = written(
            out, ids, mask, surgery_cache={**SMALL, **settings}, return_dict_in_generate=True, output_logits=True
        )
        assert all(logits.isfinite().all() for logits in got.logits)
        assert got.past_key_values.get_seq_length() == 200 + NEW - 1
        report = out.surgery_cache_report()
        assert report["bytes"] < 0.75 * report["stock_bytes"]
        assert len(report["layers"]) == 2
    prompt = out.surgery_cache(**SMALL, reserve_ratio=0.3)
    out(ids[:1], past_key_values=prompt)
    assert prompt.report()["ratio"] <= 0.32


@of_cases(CASES, [*QUICK, ("olmoe", "alone"), ("qwen3", "alone")])
def test_weights_are_those_that_went_in(folders):
    reference, out = folders
    assert (reference / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


@of_cases(EAGER)
def test_eager_and_sdpa_agree(folders):
    ids, mask = batch()
    found = []
    for attention in ("eager", "sdpa"):
        out = load(folders[1], attention)
        cache = out.surgery_cache(**SMALL, reserve_ratio=0.4)
        out(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache)
        found.append(cache.report())
    assert found[0] == found[1]


# Sliding windows bound a layer's cache already.


def test_a_model_of_windows_alone_is_refused(tmp_path):
    write_tiny(tmp_path / "base", "mistral", sliding_window=32)
    with pytest.raises(SurgeryError, match="sliding window"):
        convert(tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "before", "attention"),
    [
        ("qwen2", [], "sdpa"),
        pytest.param("qwen2", [LATENT], "eager", marks=pytest.mark.slow),
        pytest.param("qwen3", [], "eager", marks=pytest.mark.slow),
    ],
    ids=["qwen2", "qwen2-latent-eager", "qwen3-eager"],
)
def test_layers_with_a_window_stay_as_they_are(tmp_path, before, attention, family):
    windows = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2, "num_hidden_layers": 4}
    write_tiny(tmp_path / "base", family, **windows)
    reference = tmp_path / "base"
    if before:
        reference = without(tmp_path / "base", tmp_path / "without", before)
    convert(tmp_path / "base", tmp_path / "out", *before)
    stock, out = load(reference, attention), load(tmp_path / "out", attention)
    ids, mask = batch()
    cache = out(ids, attention_mask=mask).past_key_values
    assert sorted(cache.stored) == [0, 1]
    assert len(cache) == 4
    assert torch.equal(written(out, ids, mask, surgery_cache=LOSSLESS), written(stock, ids, mask))
    assert torch.equal(
        written(out, ids, mask, num_beams=3, surgery_cache=LOSSLESS), written(stock, ids, mask, num_beams=3)
    )
    got = written(
        out, ids, mask, surgery_cache={**SMALL, "reserve_ratio": 0.3}, return_dict_in_generate=True, output_logits=True
    )
    assert all(logits.isfinite().all() for logits in got.logits)
    assert [layer["layer"] for layer in out.surgery_cache_report()["layers"]] == [0, 1]
    one = tokens(PROMPT + 20)
    cache = out.surgery_cache(**LOSSLESS)
    logits = [out(part, past_key_values=cache).logits for part in one.split([PROMPT, 1, 1, 18], 1)]
    assert (torch.cat(logits, 1) - stock(one, use_cache=False).logits).abs().max() <= 1e-4


# What is refused.


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_a_rotation_that_changes_is_refused(tmp_path, rope):
    family = "phi3" if rope == "longrope" else "llama"
    write_tiny(tmp_path / "base", family, rope)
    with pytest.raises(SurgeryError, match=rope):
        convert(tmp_path / "base", tmp_path / "out")


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "gpt_oss"])
def test_other_attention_is_refused(tmp_path, family):
    write_tiny(tmp_path / "base", family)
    with pytest.raises(SurgeryError):
        convert(tmp_path / "base", tmp_path / "out")


def test_it_is_given_once(tmp_path):
    write_tiny(tmp_path / "base", "llama")
    with pytest.raises(SurgeryError):
        convert(tmp_path / "base", tmp_path / "out", {"codebook_kv": {}})
    convert(tmp_path / "base", tmp_path / "once")
    with pytest.raises(SurgeryError, match=r"remote code|already"):
        convert(tmp_path / "once", tmp_path / "twice")


@pytest.mark.parametrize(
    "settings",
    [{"reserve_ratio": 0}, {"reserve_ratio": 1.5}, {"bits": 7}, {"theta_k": 0}, {"window": 0}, {"pool": 2}, {"ratio": 0.3},
     {"method": "paper", "beta": 0.5}, {"reserve_ratio": float("nan")}],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_refused_by_name(tmp_path, settings):
    write_tiny(tmp_path / "base", "llama")
    name = list(settings)[-1]
    with pytest.raises(SurgeryError, match=name):
        convert(tmp_path / "base", tmp_path / "out", **settings)


def test_settings_are_those_of_the_config(tmp_path):
    write_tiny(tmp_path / "base", "llama")
    out = convert(tmp_path / "base", tmp_path / "out", reserve_ratio=0.6, **SMALL)
    written_settings = json.loads((out / "config.json").read_text())["surgery"]["codebook_cache"]
    assert written_settings["reserve_ratio"] == 0.6
    model = load(out)
    assert model(tokens(200)).past_key_values.settings.reserve_ratio == 0.6
    assert 0.4 < model(tokens(200)).past_key_values.report()["ratio"] <= 0.62
    paper = convert(tmp_path / "base", tmp_path / "paper", method="paper", reserve_ratio=0.4)
    chosen = load(paper).surgery_cache().settings
    assert (chosen.method, chosen.theta_k, chosen.theta_v, chosen.heads, chosen.bits) == (
        "paper",
        0.98,
        0.95,
        "mask",
        16,
    )


def test_the_built_in_model_decodes(tmp_path):
    base = Path(surgery.__file__).parent / "builtin/llama"
    out = load(convert("builtin:llama", tmp_path / "out"), dtype=torch.float32)
    stock = load(base, dtype=torch.float32)
    ids = tokens(200, high=1000)
    mask = torch.ones_like(ids)
    assert torch.equal(written(out, ids, mask, surgery_cache={"reserve_ratio": 1.0}), written(stock, ids, mask))
    written(out, ids, mask)
    assert out.surgery_cache_report()["ratio"] < 0.5
