"""What `expert_prune` and `expert_top_k` write, in every family, against the base in which the rest is never chosen.

The references are `tests/moe_reference.py`, which changes the loaded base, and bytes of the base on disk.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.emission.lint import MAX_LINES, lint
from tests import moe_reference
from tests.moe_cases import (
    ALL,
    GROUPED,
    GROUPED_KEEPS,
    KEEPS,
    base_of,
    by_layer,
    close,
    code_of,
    config_of,
    convert,
    differs,
    expected,
    load,
    logits,
    prune,
    raw,
    tokens,
    top_k,
)
from tests.tiny import MOE_FAMILIES
from tests.tiny_moe import EXPERT_KEYS, TOP_K_KEYS

CASES = [
    *(pytest.param(family, {}, KEEPS, id=family) for family in ALL),
    *(pytest.param(family, more, GROUPED_KEEPS, id=f"{family}-groups") for family, more in GROUPED.items()),
]
every_case = pytest.mark.parametrize(("family", "overrides", "keeps"), CASES)
every_family = pytest.mark.parametrize("family", ALL)
every_kind = pytest.mark.parametrize("kind", ["uniform", "per_layer"])
STRIDE = {"kv_latent": {"method": "stride", "kv_ratio": 0.5}}
FRESH = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("error")
import torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
sys.modules["surgery"] = None
place, found = Path(sys.argv[1]), {}
for folder in sorted(path for path in place.iterdir() if path.is_dir() and path.name != "modules"):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True)
    assert not any(report.values()), (folder.name, report)
    with torch.no_grad():
        found[folder.name] = model.eval()(load_file(place / "tokens.safetensors")["tokens"]).logits
save_file(found, place / "logits.safetensors")
"""


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def is_stock(folder, family, count=None, chosen=None):
    """Nothing in the folder says that it was converted, but the numbers of experts and of those that a token takes."""
    config = config_of(folder)
    assert code_of(folder) == {}
    assert not {"surgery", "auto_map"} & set(config)
    assert config["model_type"] == family
    for keys, number in ((EXPERT_KEYS[family], count), (TOP_K_KEYS[family], chosen)):
        assert number is None or [config[key] for key in keys] == [number] * len(keys)


def has_code(folder, family, counts=None, chosen=None):
    """Code that lint has nothing against, and lists of numbers over decoder layers."""
    config, files = config_of(folder), code_of(folder)
    assert config["model_type"] == f"surgery_{family}"
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert {"surgery_experts.py", f"modeling_surgery_{family}.py", f"configuration_surgery_{family}.py"} <= set(files)
    assert lint(files) == []
    assert all(content.count(b"\n") < MAX_LINES for content in files.values())
    ours = config["surgery"]["experts"]
    for key, keys, numbers in (
        ("num_experts", EXPERT_KEYS[family], counts), ("num_experts_per_tok", TOP_K_KEYS[family], chosen),
    ):  # fmt: skip
        assert numbers is None or ours[key] == numbers
        assert {config[name] for name in keys} == {max(n for n in ours[key] if n is not None)}


@every_kind
@every_case
def test_a_pruned_model_is_the_base_with_the_rest_masked(family, overrides, keeps, kind, tmp_path):
    base = base_of(tmp_path / "base", family, **overrides)
    keep = keeps[kind]
    out = convert(base, tmp_path / "out", prune(keep))
    if kind == "uniform":
        is_stock(out, family, len(keep[0]), 2)
    else:
        has_code(out, family, [len(ids) for ids in keep], [2, 2])
    whole = load(base)
    before = logits(whole)
    wanted = logits(moe_reference.masked(whole, by_layer(keep)))
    assert differs(wanted, before)
    model = load(out)
    close(logits(model), wanted)
    assert [len(router.weight) for _, _, router in moe_reference.moe_blocks(model)] == [len(ids) for ids in keep]


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_case
def test_each_kept_expert_has_the_bytes_it_had(family, overrides, keeps, dtype, kind, tmp_path):
    base = base_of(tmp_path / "base", family, dtype=dtype, shards=3, **overrides)
    wanted = expected(base, by_layer(keeps[kind]))
    out = convert(base, tmp_path / "out", prune(keeps[kind]))
    found = raw(out)
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if found[name] != wanted[name]] == []
    whole = raw(base)
    shared = [name for name in whole if ".shared_expert" in name]
    assert bool(shared) == (family in {"qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe"})
    assert all(found[name] == whole[name] for name in shared)


@every_family
def test_keeping_every_expert_changes_nothing(family, tmp_path):
    base = base_of(tmp_path / "base", family)
    out = convert(base, tmp_path / "out", prune([list(range(8)), [*range(7, -1, -1)]]))
    passed = convert(base, tmp_path / "passed")
    assert raw(out) == raw(passed) == raw(base)
    assert config_of(out) == config_of(passed)
    assert code_of(out) == {}


@pytest.mark.parametrize("family", [*ALL, "deepseek_v3-groups"])
def test_fewer_experts_per_token_are_the_base_s_first_choices(family, tmp_path):
    family, _, grouped = family.partition("-")
    more = {"num_hidden_layers": 3} | (GROUPED[family] if grouped else {})
    base = base_of(tmp_path / "base", family, top_k=3, **more)
    schedule = {"first": 3, "peak": 1, "last": 2, "at": 1}
    for name, setting, counts in (("one", 2, [2, 2, 2]), ("list", [1, 3, 2], [1, 3, 2]), ("line", schedule, [3, 1, 2])):
        out = convert(base, tmp_path / name, top_k(setting))
        if name == "one":
            is_stock(out, family, 8, 2)
        else:
            has_code(out, family, [8, 8, 8], counts)
        assert raw(out) == raw(base)
        whole = load(base)
        before = logits(whole)
        wanted = logits(moe_reference.top_k(whole, dict(enumerate(counts))))
        assert differs(wanted, before)
        close(logits(load(out)), wanted)


@pytest.mark.parametrize(
    ("first", "at", "last", "resolved"),
    [
        ((2, 6, 2), 2, 5, [2, 4, 6, 4, 2]),
        ((6, 4, 2), 4, 5, [6, 6, 5, 5, 4]),  # halves go up
        ((2, 6, 2), 0, 5, [6, 5, 4, 3, 2]),
        ((1, 2, 1), 1, 3, [1, 2, 1]),
    ],
)
def test_a_schedule_is_two_lines(first, at, last, resolved, tmp_path):
    start, peak, end = first
    base = base_of(tmp_path / "base", "olmoe", top_k=6, num_hidden_layers=last)
    setting = {"first": start, "peak": peak, "last": end, "at": at}
    has_code(convert(base, tmp_path / "out", top_k(setting)), "olmoe", [8] * last, resolved)


@every_kind
@every_family
def test_fewer_experts_and_fewer_per_token_together(family, kind, tmp_path):
    base = base_of(tmp_path / "base", family, top_k=3)
    counts = [2, 2] if kind == "uniform" else [1, 2]
    operations = prune(KEEPS[kind]), top_k(counts[1] if kind == "uniform" else counts)
    out, other = convert(base, tmp_path / "out", *operations), convert(base, tmp_path / "other", *reversed(operations))
    if kind == "uniform":
        is_stock(out, family, 5, 2)
    else:
        has_code(out, family, [5, 3], counts)
    assert config_of(out) == config_of(other)
    assert raw(out) == raw(other) == expected(base, by_layer(KEEPS[kind]))
    whole = moe_reference.masked(load(base), by_layer(KEEPS[kind]))
    close(logits(load(out)), logits(moe_reference.top_k(whole, dict(enumerate(counts)))))


def test_numbers_that_become_equal_need_no_code(tmp_path):
    base = base_of(tmp_path / "base", "qwen3_moe", top_k=3)
    out = convert(base, tmp_path / "out", top_k([3, 2]), top_k(2))
    is_stock(out, "qwen3_moe", 8, 2)
    again = convert(base, tmp_path / "again", prune(KEEPS["per_layer"]), prune([[0, 2, 4], [0, 1, 2]]))
    is_stock(again, "qwen3_moe", 3, 3)
    assert raw(again) == expected(base, {0: [1, 4, 7], 1: [0, 2, 5]})


@every_kind
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_latent_heads_and_pruned_experts_in_either_order(family, kind, tmp_path):
    base = base_of(tmp_path / "base", family)
    keep = KEEPS[kind]
    alone = convert(base, tmp_path / "alone", STRIDE)
    first = convert(base, tmp_path / "first", STRIDE, prune(keep))
    last = convert(base, tmp_path / "last", prune(keep), STRIDE)
    latent = load(alone)
    before = logits(latent)
    assert differs(before, logits(load(base)))
    wanted = logits(moe_reference.masked(latent, by_layer(keep)))
    assert differs(wanted, before)
    assert raw(first) == raw(last) == expected(alone, by_layer(keep))
    assert config_of(first) == config_of(last)
    assert set(code_of(first)) == set(code_of(last))
    if kind == "uniform" and not code_of(alone):
        is_stock(first, family, 5)
    for out in (first, last):
        found = logits(load(out))
        close(found, wanted)
        if code_of(out):
            assert lint(code_of(out)) == []
            assert ("surgery_experts.py" in code_of(out)) == (kind == "per_layer")
            assert ("experts" in config_of(out)["surgery"]) == (kind == "per_layer")


def test_results_in_folders_of_one_name_have_their_own_models(tmp_path):
    """transformers keeps classes by folder name and code of the configuration, and finds models by the latter."""
    base = base_of(tmp_path / "base", "olmoe")
    latent = load(convert(base, tmp_path / "latent" / "out", STRIDE))
    before = logits(latent)
    fewer = load(convert(base, tmp_path / "fewer" / "out", STRIDE, top_k([1, 2])))
    wanted = logits(moe_reference.top_k(latent, {0: 1}))
    assert differs(wanted, before)
    close(logits(fewer), wanted)


@every_kind
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_draft_layers_follow_the_last_layer_or_go(family, kind, tmp_path):
    base = base_of(tmp_path / "base", family, mtp=True)
    keep = KEEPS[kind]
    wanted = logits(moe_reference.masked(load(base, ignored=r"model\.layers\.2\."), by_layer(keep)))
    pruned = convert(base, tmp_path / "pruned", prune(keep))
    assert raw(pruned) == expected(base, by_layer([*keep, keep[-1]]))
    assert config_of(pruned)["num_nextn_predict_layers"] == 1
    dropped = convert(base, tmp_path / "dropped", prune(keep, drafts="drop"))
    rest = {name: tensor for name, tensor in raw(pruned).items() if not name.startswith("model.layers.2.")}
    assert len(rest) < len(raw(pruned))
    assert raw(dropped) == rest
    assert config_of(dropped)["num_nextn_predict_layers"] == 0
    close(logits(load(pruned, ignored=r"model\.layers\.2\.")), wanted)
    close(logits(load(dropped)), wanted)


def test_notes_say_of_how_many_experts_some_stay(tmp_path):
    base = base_of(tmp_path / "base", "olmoe")
    data = {"surgery": 1, "operations": [prune([[0, 1, 2], [0, 1, 3]])], "verify": False}
    notes = surgery.plan(str(base), surgery.manifest_from_dict(data)).notes
    assert any("keeps 3 of 8 experts in 2 layers" in note for note in notes)
    assert any("no multiple of 8" in note for note in notes)


def test_operations_after_a_cut_know_how_many_experts_draft_layers_have(tmp_path):
    base = base_of(tmp_path / "base", "deepseek_v3", mtp=True)
    keep, again = KEEPS["per_layer"], [[0, 2], [1, 2]]
    out = convert(base, tmp_path / "out", prune(keep), top_k([1, 2]), prune(again))
    assert raw(out) == expected(base, by_layer([[1, 4], [2, 5], [2, 5]]))
    has_code(out, "deepseek_v3", [2, 2], [1, 2])
    whole = moe_reference.masked(load(base, ignored=r"model\.layers\.2\."), {0: [1, 4], 1: [2, 5]})
    close(logits(load(out, ignored=r"model\.layers\.2\.")), logits(moe_reference.top_k(whole, {0: 1})))


DENSE = [
    ("deepseek_v3", {"first_k_dense_replace": 1}, 3, [1, 2]),
    ("deepseek_v2", {"first_k_dense_replace": 1}, 3, [1, 2]),
    ("glm4_moe", {"first_k_dense_replace": 1}, 3, [1, 2]),
    ("qwen2_moe", {"decoder_sparse_step": 2}, 4, [1, 3]),
    ("qwen3_moe", {"mlp_only_layers": [1]}, 3, [0, 2]),
]


@every_kind
@pytest.mark.parametrize(("family", "overrides", "layers", "sparse"), DENSE, ids=[case[0] for case in DENSE])
def test_lists_leave_dense_layers_out(family, overrides, layers, sparse, kind, tmp_path):
    base = base_of(tmp_path / "base", family, seed=5, num_hidden_layers=layers, top_k=3, **overrides)  # no ties
    if family.startswith("qwen"):
        dense_layers(base, [layer for layer in range(layers) if layer not in sparse])
    keep = KEEPS[kind]
    kept = by_layer(keep, sparse)
    out = convert(base, tmp_path / "out", prune(keep))
    assert raw(out) == expected(base, kept)
    close(logits(load(out)), logits(moe_reference.masked(load(base), kept)))
    skipping = convert(base, tmp_path / "skipping", top_k([1, 2]))
    numbers = {**dict.fromkeys(range(layers)), **dict(zip(sparse, [1, 2], strict=True))}
    has_code(skipping, family, chosen=list(numbers.values()))
    wanted = moe_reference.top_k(load(base), dict(zip(sparse, [1, 2], strict=True)))
    close(logits(load(skipping)), logits(wanted))
    if kind == "per_layer":
        has_code(out, family, [len(kept[layer]) if layer in kept else None for layer in range(layers)])


def dense_layers(base, layers):
    """Write dense feed-forwards in place of the experts of `layers`, as qwen families have them."""
    tensors, config = load_file(base / "model.safetensors"), config_of(base)
    hidden, inner, chance = config["hidden_size"], config["intermediate_size"], torch.Generator().manual_seed(9)
    for layer in layers:
        prefix = f"model.layers.{layer}.mlp."
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            tensors[f"{prefix}{name}_proj.weight"] = torch.randn(shape, generator=chance) * shape[1] ** -0.5
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
def test_a_saved_result_is_the_same_in_a_fresh_process(tmp_path):
    place, wanted = tmp_path / "saved", {}
    for family in ALL:
        base = base_of(tmp_path / family, family)
        model = load(convert(base, tmp_path / f"{family}_pruned", prune(KEEPS["per_layer"]), top_k([2, 1])))
        wanted[family] = logits(model)
        model.save_pretrained(place / family)
        assert set(code_of(place / family)) == set(code_of(tmp_path / f"{family}_pruned"))
    save_file({"tokens": tokens()}, place / "tokens.safetensors")
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(place)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_file(place / "logits.safetensors")
    assert sorted(found) == sorted(ALL)
    for family in ALL:
        close(found[family], wanted[family])


@every_family
def test_how_experts_are_computed_can_be_chosen_as_in_the_base(family, tmp_path):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    base = base_of(tmp_path / "base", family)
    out = convert(base, tmp_path / "out", prune(KEEPS["per_layer"]))
    native, model = load(base), load(out)
    assert native._can_set_experts_implementation()
    assert model._can_set_experts_implementation()
    wanted = logits(model)
    for name in ("grouped_mm", "batched_mm", "eager"):
        chosen = load(out, experts_implementation=name)
        assert load(base, experts_implementation=name).config._experts_implementation == name
        assert chosen.config._experts_implementation == name
        close(logits(chosen), wanted)
    calls = []
    grouped = ALL_EXPERTS_FUNCTIONS["grouped_mm"]

    def counted(experts, *args, **kwargs):
        calls.append(experts)
        return grouped(experts, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", counted)
        model.set_experts_implementation("eager")
        logits(model)
        assert calls == []
        model.set_experts_implementation("grouped_mm")
        close(logits(model), wanted)
    assert [id(experts) for experts in calls] == [id(layer.experts) for _, layer, _ in moe_reference.moe_blocks(model)]
