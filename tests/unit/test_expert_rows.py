"""Renaming, slicing and dropping in a draft, the ledger's account of it, and what the writer makes of slices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from safetensors.torch import load_file, save_file

import surgery
from surgery.checkpoint.dtypes import SAFETENSORS_NAMES
from surgery.checkpoint.evaluate import evaluate, load_rows
from surgery.checkpoint.expressions import Computed, Rows, Stored, TensorSpec, sources
from surgery.checkpoint.header import TensorInfo
from surgery.checkpoint.journal import start_journal
from surgery.checkpoint.layout import lay_out
from surgery.checkpoint.reader import open_checkpoint
from surgery.checkpoint.writer import Job, write_shards
from surgery.errors import CorruptCheckpoint, InternalError
from surgery.planning import ledger, make_plan, open_draft
from tests.tiny import write_fp8, write_mxfp4, write_tiny

NAMES = ("a", "b", "c", "d")


@pytest.fixture
def base(tmp_path):
    """Four tensors of types of every width."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(6, 3, generator=generator),
        "b": torch.randint(0, 256, (6, 2, 5), generator=generator).to(torch.uint8),
        "c": torch.randn(6, generator=generator).to(torch.float8_e4m3fn),
        "d": torch.randn(4, 2, generator=generator).to(torch.bfloat16),
    }
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "unlisted"}')
    return folder


def written(draft, checkpoint, out):
    out.mkdir(exist_ok=True)
    write_shards(Job(checkpoint, out, "", start_journal(out, "test")), lay_out(checkpoint, draft.tensors, None))
    return load_file(out / "model.safetensors")


def same(found, wanted):
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    return torch.equal(found.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))


def fates(checkpoint, draft):
    return {entry.name: (entry.fate, entry.why) for entry in ledger(checkpoint, draft)}


def test_rows_over_stored_rows_and_computed(base, tmp_path):
    checkpoint = open_checkpoint(base)
    draft, whole = open_draft(checkpoint), load_file(base / "model.safetensors")
    draft.take_rows("a", [5, 0, 1, 3], "first")
    assert draft.tensors["a"] == Rows(checkpoint.tensors["a"], (5, 0, 1, 3), "first")
    draft.take_rows("a", [3, 0], "second")  # of those: 3 and 5
    assert draft.tensors["a"] == Rows(checkpoint.tensors["a"], (3, 5), "second")
    draft.rewrite(["d"], {"d": TensorSpec("BF16", (4, 2))}, lambda t: {"d": t["d"] * 2}, why="twice")
    draft.take_rows("d", [2, 1], "third")
    assert isinstance(draft.tensors["d"], Computed)
    assert draft.spec("d") == TensorSpec("BF16", (2, 2))
    draft.take_rows("b", [1, 2, 4], "bytes")
    draft.take_rows("c", [0, 5], "floats of eight bits")
    found = written(draft, checkpoint, tmp_path / "out")
    wanted = {"a": whole["a"][[3, 5]], "b": whole["b"][[1, 2, 4]], "d": (whole["d"] * 2)[[2, 1]]}
    wanted["c"] = whole["c"].view(torch.uint8)[[0, 5]].view(torch.float8_e4m3fn)
    assert {name: same(found[name], tensor) for name, tensor in wanted.items()} == dict.fromkeys(NAMES, True)
    assert fates(checkpoint, draft) == {
        "a": ("rewritten", "second"), "b": ("rewritten", "bytes"), "c": ("rewritten", "floats of eight bits"),
        "d": ("rewritten", "third"),
    }  # fmt: skip


def test_a_rewrite_may_read_rows(base):
    checkpoint = open_checkpoint(base)
    draft, whole = open_draft(checkpoint), load_file(base / "model.safetensors")
    draft.take_rows("a", [4, 2], "rows")
    draft.rewrite(["a"], {"a": TensorSpec("F32", (2, 3))}, lambda t: {"a": -t["a"]}, why="turned")
    assert [info.name for info in sources(draft.tensors["a"])] == ["a"]
    assert same(evaluate(checkpoint, draft.tensors["a"].rewrite)["a"], -whole["a"][[4, 2]])


def test_renamed_tensors_keep_their_bytes(base, tmp_path):
    checkpoint = open_checkpoint(base)
    draft, whole = open_draft(checkpoint), load_file(base / "model.safetensors")
    draft.drop(["a"], "not wanted")
    before = list(draft.tensors)
    draft.rename({"b": "a", "c": "d", "d": "c"})
    assert list(draft.tensors) == [{"b": "a", "c": "d", "d": "c"}[name] for name in before]
    found = written(draft, checkpoint, tmp_path / "out")
    assert {name: same(found[name], whole[old]) for name, old in (("a", "b"), ("c", "d"), ("d", "c"))} == {
        "a": True, "c": True, "d": True,
    }  # fmt: skip
    assert fates(checkpoint, draft) == {
        "a": ("dropped", "not wanted"), "b": ("renamed", ""), "c": ("renamed", ""), "d": ("renamed", ""),
    }  # fmt: skip


def test_two_tensors_of_one_name_are_a_defect(base):
    draft = open_draft(open_checkpoint(base))
    with pytest.raises(InternalError, match="two tensors one name"):
        draft.rename({"a": "b"})
    draft.rename({"a": "a", "strange": "other"})
    assert set(draft.tensors) == set(NAMES)


def test_names_that_go_are_accounted_for_by_their_sources(base):
    checkpoint = open_checkpoint(base)
    draft = open_draft(checkpoint)
    draft.take_rows("a", [0], "cut")
    draft.rename({"b": "x"})
    draft.drop(["a", "x"], "gone")
    assert fates(checkpoint, draft) == {"a": ("dropped", "gone"), "b": ("dropped", "gone"), "c": ("kept", ""), "d": ("kept", "")}
    del draft.tensors["c"]
    with pytest.raises(InternalError, match="'c' is unaccounted for"):
        ledger(checkpoint, draft)


@pytest.mark.parametrize(
    ("rows", "runs"),
    [
        ((0, 1, 2, 3), [(100, 48)]), ((1, 2), [(112, 24)]), ((0, 2), [(100, 12), (124, 12)]),
        ((3, 0, 1), [(136, 12), (100, 24)]), ((2, 1), [(124, 12), (112, 12)]), ((1, 1), [(112, 12), (112, 12)]), ((), []),
    ],
)  # fmt: skip
def test_neighbouring_rows_are_one_range(rows, runs):
    info = TensorInfo("a", "F32", (4, 3), "model.safetensors", 100, 48)
    assert list(Rows(info, rows, "").runs()) == runs


def test_numbers_are_looked_for_in_what_is_read(base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    tensors["a"][2, 1] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(base)
    draft = open_draft(checkpoint)
    draft.take_rows("a", [1, 2], "cut")
    with pytest.raises(CorruptCheckpoint, match="'a' holds NaN"):
        written(draft, checkpoint, tmp_path / "out")


DTYPES = (
    torch.uint8, torch.int8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.int16,
    torch.float32, torch.int32, torch.float64, torch.int64,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(some.data())
def test_written_slices_are_the_tensor_s(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("rows")
    (base := folder / "base").mkdir()
    tensors, wanted = {}, {}
    for number in range(data.draw(some.integers(1, 4))):
        shape = tuple(data.draw(some.lists(some.integers(1, 5), min_size=1, max_size=4)))
        dtype = data.draw(some.sampled_from(DTYPES))
        values = np.random.default_rng(data.draw(some.integers(0, 99))).integers(-9 if dtype != torch.uint8 else 0, 9, shape)
        tensors[f"t{number}"] = torch.from_numpy(np.asarray(values)).to(dtype)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text('{"model_type": "unlisted"}')
    checkpoint = open_checkpoint(base)
    draft = open_draft(checkpoint)
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).view(len(tensor), -1)
        taken = list(range(len(tensor)))
        for _ in range(data.draw(some.integers(0, 2))):
            rows = data.draw(some.lists(some.integers(0, len(taken) - 1), min_size=1, max_size=6))
            draft.take_rows(name, rows, "test")
            taken = [taken[row] for row in rows]
        wanted[name] = (tensor.dtype, (len(taken), *tensor.shape[1:]), raw[taken].numpy().tobytes())
        if isinstance(draft.tensors[name], Rows):
            assert same(load_rows(checkpoint, draft.tensors[name]), _tensor(*wanted[name]))
    found = written(draft, checkpoint, folder / "out")
    assert {name: same(found[name], _tensor(*parts)) for name, parts in wanted.items()} == dict.fromkeys(wanted, True)
    assert {name: draft.spec(name) for name in wanted} == {
        name: TensorSpec(SAFETENSORS_NAMES[str(dtype).removeprefix("torch.")], shape) for name, (dtype, shape, _) in wanted.items()
    }


def _tensor(dtype, shape, raw):
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype).view(shape)


# What expert_prune makes of them


IDS = [[1, 3], [0, 2]]


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "gpt_oss", "fp8", "mxfp4"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_cut_is_renames_rows_and_drops(kind, shards, tmp_path):
    write = {"fp8": write_fp8, "mxfp4": write_mxfp4}.get(kind)
    base = write(tmp_path / "base", shards=shards) if write else write_tiny(tmp_path / "base", kind, shards=shards)
    operations = [{"expert_prune": {"keep": IDS}}]
    manifest = surgery.manifest_from_dict({"surgery": 1, "operations": operations, "verify": False})
    entries = {entry.name: entry for entry in make_plan(open_checkpoint(base), manifest).ledger if entry.fate != "added"}
    whole = read(base)
    assert set(entries) == set(whole)
    surgery.convert(str(base), tmp_path / "out", manifest)
    found = read(tmp_path / "out")
    for name, tensor in whole.items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        if ".mlp.experts." in name and name.split(".")[5].isdigit():
            expert = int(name.split(".")[5])
            stays = expert in IDS[layer]
            new = name.replace(f".experts.{expert}.", f".experts.{IDS[layer].index(expert) if stays else -1}.")
            assert entries[name].fate == ("kept" if new == name else "renamed" if stays else "dropped")
            assert not stays or same(found.pop(new), tensor)
        elif ".mlp.gate." in name or ".mlp.router." in name or ".mlp.experts." in name:
            assert entries[name].fate == "rewritten"
            assert entries[name].why == "expert_prune by the ids given"
            raw = tensor.contiguous().view(torch.uint8).view(4, -1)[IDS[layer]]
            assert same(found[name], raw.view(tensor.dtype).view(2, *tensor.shape[1:])), name
            del found[name]
        else:
            assert entries[name].fate == "kept"
            assert same(found.pop(name), tensor)
    assert not found


def read(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_rows_are_of_stored_tensors_and_cost_no_memory(tmp_path):
    checkpoint = open_checkpoint(write_mxfp4(tmp_path))
    draft = open_draft(checkpoint)
    manifest = surgery.manifest_from_dict({"surgery": 1, "operations": [{"expert_prune": {"keep": IDS}}]})
    manifest.steps[0].edit(draft, None)
    assert {type(value) for value in draft.tensors.values()} == {Stored, Rows}
    dtypes = {value.spec.dtype for value in draft.tensors.values() if isinstance(value, Rows)}
    assert dtypes == {"BF16", "U8"}
