"""Operations on experts, and what they must refuse: one exact error, an exit code, and nothing left behind."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.calibration.store import load_statistics
from surgery.checkpoint import writer
from surgery.errors import (
    CorruptCheckpoint,
    InternalError,
    ManifestError,
    RefusedInput,
    SurgeryError,
    UnsupportedModel,
    UsageError,
)
from tests.expert_cases import CASES, Case, put, tiny
from tests.hostile_cases import CASES as HOSTILE
from tests.tiny import write_tiny

SELF = {"text": "self", "samples": 4, "length": 16}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def manifest(operation: str, settings: dict[str, Any], **sections: Any) -> surgery.Manifest:
    given = {"surgery": 1, "operations": [{operation: settings}], "calibration": SELF, "verify": False}
    return surgery.manifest_from_dict(given | sections)


def assert_error(error: SurgeryError, kind: type[SurgeryError], said: str, exit_code: int) -> None:
    assert type(error) is kind, error
    assert error.exit_code == exit_code
    assert said in f"{error}"
    for line in (error.problem, error.cause, error.remedy):
        assert line
        assert line.isprintable()
        assert len(line) < 400


def refused(tmp_path: Path, given: surgery.Manifest, *, headers: bool, **options: Any) -> list[SurgeryError]:
    """What planning (where headers suffice) and converting the base raise; nothing but it may be there afterwards."""
    before = sorted(path.name for path in tmp_path.iterdir())
    errors = []
    if headers:
        with pytest.raises(SurgeryError) as caught:
            surgery.plan(str(tmp_path / "base"), given, **options)
        errors.append(caught.value)
    options = {"statistics": tmp_path / "statistics"} | options
    with pytest.raises(SurgeryError) as caught:
        surgery.convert(str(tmp_path / "base"), tmp_path / "out", given, **options)
    assert [path.name for path in sorted(tmp_path.iterdir()) if path.name != "statistics"] == [
        name for name in before if name != "statistics"
    ]
    return [*errors, caught.value]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case, tmp_path: Path) -> None:
    case.build(tmp_path / "base")
    given = manifest(case.operation, dict(case.settings))
    for error in refused(tmp_path, given, headers=case.headers):
        assert_error(error, case.error, case.said, 3)
    assert not (tmp_path / "statistics").exists()


def test_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)


def test_a_tensor_in_two_shards_is_refused_before_any_operation():
    """test_hostile.py runs it through the reader, which every conversion opens its base with."""
    assert next(case for case in HOSTILE if case.name == "index-tensor-twice").error is CorruptCheckpoint


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_router_without_numbers_is_refused_when_the_model_runs(value, tmp_path):
    tiny("qwen3_moe", put("model.layers.0.mlp.gate.weight", value, 3, 0))(tmp_path / "base")
    (error,) = refused(tmp_path, manifest("expert_prune", {"keep": 2}), headers=False)
    assert_error(error, CorruptCheckpoint, "NaN", 3)


SETTINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    f"keep {keep!r}": ("expert_prune", {"keep": keep}, "keep")
    for keep in (0, -1, 0.0, 1.0, 1.5, -0.5, math.nan, [], [0, 2], [[]], [[0, -1]], [2, [0]], [2.0], "half", "0GB", True)
} | {
    "measured list": ("expert_prune", {"keep": [2, 2], "allocation": "measured"}, "allocation: measured only"),
    "measured ids": ("expert_prune", {"keep": [[0, 1]] * 2, "allocation": "measured"}, "allocation: measured only"),
    "required without text": ("expert_prune", {"criterion": "aimer", "calibration_required": True}, "calibration_required only"),
    "required of a die": ("expert_prune", {"criterion": "random", "calibration_required": True}, "calibration_required only"),
    "layerwise and measured": ("expert_prune", {"statistics": "layerwise", "allocation": "measured"}, "statistics: layerwise only"),
    "layerwise without text": ("expert_prune", {"statistics": "layerwise", "criterion": "router_norm"}, "statistics: layerwise only"),
    "layerwise die": ("expert_prune", {"statistics": "layerwise", "criterion": "random"}, "statistics: layerwise only"),
    "fallback without text": ("expert_prune", {"criterion": "aimer", "fallback": "man"}, "a fallback only"),
    "fallback of another kind": ("expert_prune", {"fallback": "ean"}, "fallback"),
    "unknown criterion": ("expert_prune", {"criterion": "best"}, "criterion"),
    "powers out of range": ("expert_prune", {"criterion": {"b": 0, "alpha": 3, "beta": 0}}, "alpha"),
    "aggregate out of range": ("expert_prune", {"criterion": {"b": 2, "alpha": 1, "beta": 0}}, "b"),
    "tokens": ("expert_prune", {"min_tokens": 0}, "min_tokens"),
    "seed": ("expert_prune", {"seed": -1}, "seed"),
    "unknown key": ("expert_prune", {"kept": 2}, "kept"),
    **{f"top k {k!r}": ("expert_top_k", {"top_k": k}, "top_k") for k in (0, -1, 1.0, [], [1, 0], "2", True)},
    "peak of zero": ("expert_top_k", {"top_k": {"first": 1, "peak": 0, "last": 1, "at": 0}}, "peak"),
    "peak before the first": ("expert_top_k", {"top_k": {"first": 1, "peak": 1, "last": 1, "at": -1}}, "at"),
    "half a schedule": ("expert_top_k", {"top_k": {"first": 1, "peak": 1}}, "'last' is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_refused(name):
    operation, settings, said = SETTINGS[name]
    with pytest.raises(ManifestError) as caught:
        manifest(operation, settings)
    assert_error(caught.value, ManifestError, said, 2)


@pytest.mark.parametrize("first", [[3, 5], [5, 3]])
def test_unequal_layers_are_not_cut_again(first, tmp_path):
    write_tiny(tmp_path / "base", "qwen3_moe", experts=6)
    again = [{"expert_prune": {"keep": first, "criterion": "random"}}, {"expert_prune": {"keep": 2}}]
    for error in refused(tmp_path, manifest("expert_prune", {}, operations=again), headers=True):
        assert_error(error, UnsupportedModel, "unequal numbers of experts already", 3)
    few, many = sorted(range(2), key=lambda layer: first[layer])
    ids = {few: [0, 2], many: [0, 4]}
    by_ids = [again[0], {"expert_prune": {"keep": [ids[0], ids[1]]}}]
    out = surgery.convert(str(tmp_path / "base"), tmp_path / "out", manifest("expert_prune", {}, operations=by_ids))
    assert out.lock["decisions"]["1.expert_prune"]["kept"] == {str(layer): ids[layer] for layer in range(2)}
    by_ids[1] = {"expert_prune": {"keep": [[0, 3] if layer == few else ids[layer] for layer in range(2)]}}
    for error in refused(tmp_path, manifest("expert_prune", {}, operations=by_ids), headers=True):
        assert_error(error, UnsupportedModel, f"expert 3 in MoE layer {few}, and there are 3", 3)


# Too little text


def test_too_few_tokens_are_refused_where_calibration_must_suffice(tmp_path):
    write_tiny(tmp_path / "base", "qwen3_moe")
    sparse = manifest("expert_prune", {"keep": 2, "calibration_required": True})  # 4 x 16 tokens x 2 of 4 experts
    (error,) = refused(tmp_path, sparse, headers=False)
    (stored,) = (tmp_path / "statistics").iterdir()
    tokens = load_statistics(stored).tensors["sums"][:, 0, 0]
    assert_error(error, RefusedInput, f"{int((tokens < 100).sum())} experts get fewer than 100 calibration tokens", 3)
    layer, expert = divmod(int(tokens.argmin()), 4)
    assert f"expert {expert} of layer {layer} gets {int(tokens.min())};" in error.cause
    enough = manifest("expert_prune", {"keep": 2, "calibration_required": True, "min_tokens": int(tokens.min())})
    surgery.convert(str(tmp_path / "base"), tmp_path / "out", enough, statistics=tmp_path / "statistics")
    told = manifest("expert_prune", {"keep": 2})
    notes = " ".join(surgery.convert(str(tmp_path / "base"), tmp_path / "told", told, statistics=stored).plan.notes)
    assert f"experts got fewer than 100 calibration tokens (layer 0 expert 0: {int(tokens[0, 0])}, " in notes


# Statistics of something else


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, Path]:
    """Statistics files: of experts of a 4-expert and an 8-expert model, and of kv_latent."""
    found = {}
    for name, operation, settings, options in (
        ("four", "expert_prune", {"keep": 2}, {}), ("eight", "expert_prune", {"keep": 4}, {"experts": 8}),
        ("three layers", "expert_prune", {"keep": 2}, {"num_hidden_layers": 3}),
        ("other config", "expert_prune", {"keep": 2}, {"rope_theta": 5000.0}),
        ("other family", "expert_prune", {"keep": 2}, {"family": "mixtral"}),
        ("layerwise", "expert_prune", {"keep": 2, "statistics": "layerwise"}, {}),
        ("kv_latent", "kv_latent", {"method": "stride", "qk_dim": 8, "refit_o": True}, {}),
    ):  # fmt: skip
        folder = tmp_path_factory.mktemp("measured")
        base = write_tiny(folder / "base", **{"family": "qwen3_moe"} | options)
        surgery.convert(str(base), folder / "out", manifest(operation, settings), statistics=folder / "statistics")
        (found[name],) = (folder / "statistics").iterdir()
    return found


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("eight", "other base"), ("three layers", "other base"), ("other config", "other base"),
        ("other family", "other family, base"), ("layerwise", "other settings"), ("kv_latent", "other operation, settings"),
    ],
)  # fmt: skip
def test_statistics_of_something_else_are_refused(name, said, measured, tmp_path):
    write_tiny(tmp_path / "base", "qwen3_moe")
    for error in refused(tmp_path, manifest("expert_prune", {"keep": 2}), headers=True, statistics=measured[name]):
        assert_error(error, UsageError, said, 2)


def test_the_right_statistics_are_taken(measured, tmp_path):
    write_tiny(tmp_path / "base", "qwen3_moe")
    assert not surgery.plan(str(tmp_path / "base"), manifest("expert_prune", {"keep": 2}), statistics=measured["four"]).estimated
    write_tiny(tmp_path / "tuned", "qwen3_moe", seed=1)  # equal in all but the weights
    with pytest.raises(UsageError) as caught:
        surgery.plan(str(tmp_path / "tuned"), manifest("expert_prune", {"keep": 2}), statistics=measured["four"])
    assert_error(caught.value, UsageError, "other weights", 2)


def _resaved(keep: str, change: Any = lambda tensors: None):
    def make(source: Path, path: Path) -> None:
        tensors = load_file(source)
        change(tensors)
        facts = dict(load_statistics(source).facts)
        metadata = {"facts": json.dumps(facts), "fingerprint": "x", "format": "pt"}
        save_file(tensors, path, {key: metadata[key] for key in metadata if key != keep} | ({"facts": "[1"} if keep == "json" else {}))

    return make


def _truncated(share: float):
    return lambda source, path: path.write_bytes(source.read_bytes()[: int(source.stat().st_size * share)])


BROKEN = {
    "empty": lambda source, path: path.write_bytes(b""),
    "garbage": lambda source, path: path.write_bytes(b"\xff" * 999),
    "text": lambda source, path: path.write_text("scores: 1\n"),
    "truncated header": lambda source, path: path.write_bytes(source.read_bytes()[:100]),
    "truncated data": _truncated(0.9),
    "without metadata": lambda source, path: save_file(load_file(source), path),
    "without facts": _resaved("facts"),
    "without fingerprint": _resaved("fingerprint"),
    "facts no JSON": _resaved("json"),
    "a model": lambda source, path: write_tiny(path.with_name("m"), "llama").joinpath("model.safetensors").rename(path),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("place", ["file", "folder"])
def test_broken_statistics_are_refused(name, place, measured, tmp_path):
    write_tiny(tmp_path / "base", "qwen3_moe")
    given = manifest("expert_prune", {"keep": 2})
    (folder := tmp_path / "statistics").mkdir()
    where = folder / "mine.safetensors"
    if place == "folder":  # a stored result that the disk or a person spoilt
        surgery.convert(str(tmp_path / "base"), tmp_path / "out", given, statistics=folder)
        shutil.rmtree(tmp_path / "out")
        (where,) = folder.iterdir()
        where.unlink()
    BROKEN[name](measured["four"], where)
    for error in refused(tmp_path, given, headers=True, statistics=where if place == "file" else folder):
        assert_error(error, UsageError, where.name, 2)


INCOMPLETE = {
    "sums": lambda tensors: tensors.pop("sums"),
    "peaks": lambda tensors: tensors.pop("peaks"),
    "sums'": lambda tensors: tensors.update(sums=tensors["sums"][..., :3].contiguous()),
    "peaks'": lambda tensors: tensors.update(peaks=tensors["peaks"][:1].contiguous()),
}


@pytest.mark.parametrize("name", INCOMPLETE)
def test_incomplete_statistics_are_refused(name, measured, tmp_path):
    write_tiny(tmp_path / "base", "qwen3_moe")
    where = tmp_path / "mine.safetensors"
    _resaved("", INCOMPLETE[name])(measured["four"], where)
    for error in refused(tmp_path, manifest("expert_prune", {"keep": 2}), headers=True, statistics=where):
        assert_error(error, UsageError, f"{name.rstrip(chr(39))!r} of 2 layers with 4 experts", 2)


def test_statistics_that_are_no_numbers_are_refused(measured, tmp_path):
    write_tiny(tmp_path / "base", "qwen3_moe")
    where = tmp_path / "mine.safetensors"
    _resaved("", lambda tensors: tensors["sums"].view(-1)[5:6].fill_(math.nan))(measured["four"], where)
    for error in refused(tmp_path, manifest("expert_prune", {"keep": 2}), headers=True, statistics=where):
        assert_error(error, CorruptCheckpoint, "NaN", 3)


# Experts that change places


def test_experts_that_are_swapped_while_writing_are_caught(monkeypatch, tmp_path):
    """Two kept experts whose projections change places would load, and be wrong."""
    write_tiny(tmp_path / "base", "qwen3_moe")
    one, two = (f"model.layers.1.mlp.experts.{expert}.gate_proj.weight" for expert in (2, 3))
    given = manifest("expert_prune", {"keep": [[0, 1], [2, 3]]}, verify={"text": None})
    whole = writer._stored

    def swapped(checkpoint, info, runs, finite):
        other = {one: two, two: one}.get(info.name)
        if other is None:
            return whole(checkpoint, info, runs, finite)
        taken = checkpoint.tensors[other]
        return whole(checkpoint, taken, [(taken.offset, taken.nbytes)], finite)

    monkeypatch.setattr(writer, "_stored", swapped)
    with pytest.raises(InternalError) as caught:
        surgery.convert(str(tmp_path / "base"), tmp_path / "out", given)
    assert_error(caught.value, InternalError, f"they should be those of '{one}'", 70)
    assert "experts.0.gate_proj.weight" in caught.value.problem
    assert not (tmp_path / "out").exists()


def test_a_wrong_cut_of_fused_experts_is_what_unsupported_means():
    """No case of the table is an error of a kind that reads as a defect of surgery."""
    assert {case.error for case in CASES} == {CorruptCheckpoint, UnsupportedModel}
