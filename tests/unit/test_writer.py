"""Writing: byte-exact, aligned, resumable, and honest about what went wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save

from surgery.checkpoint import layout, writer
from surgery.checkpoint.evaluate import evaluate, to_bytes
from surgery.checkpoint.expressions import Computed, Rewrite, Stored, Tensors, TensorSpec, Value
from surgery.checkpoint.header import read_header
from surgery.checkpoint.journal import Finished, exclusive, read_journal, start_journal
from surgery.checkpoint.layout import index_bytes, lay_out
from surgery.checkpoint.reader import INDEX, Checkpoint, open_checkpoint
from surgery.checkpoint.writer import Job, copy_file, hash_file, write_file, write_shards
from surgery.errors import (
    CorruptCheckpoint,
    DiskFull,
    EnvironmentFailure,
    InternalError,
    OutputExists,
    SourceUnavailable,
    SurgeryError,
    UnsupportedModel,
)
from tests.hostile_cases import CONFIG, SINGLE, entry, raw_file, sharded, sound, weights

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
PT = {"format": "pt"}


def kept(checkpoint: Checkpoint) -> dict[str, Value]:
    return {name: Stored(info) for name, info in checkpoint.tensors.items()}


def write(
    checkpoint: Checkpoint,
    out: Path,
    tensors: dict[str, Value] | None = None,
    size: int | None = None,
    **options: object,
) -> dict[str, Finished]:
    """Write a checkpoint, resuming from the journal that is there, and check what was said of every file."""
    out.mkdir(exist_ok=True)
    shards = lay_out(checkpoint, kept(checkpoint) if tensors is None else tensors, size)
    found = read_journal(out)
    journal = found[1] if found else start_journal(out, "test")
    written = write_shards(Job(checkpoint, out, "folder/", journal, **options), shards)
    index = index_bytes(shards)
    if index is not None:
        write_file(out / index[0], index[1])
    (out / "config.json").write_text(json.dumps(CONFIG))
    assert list(written) == [shard.name for shard in shards]
    for name, file in written.items():
        content = (out / name).read_bytes()
        assert file == Finished(name, len(content), hashlib.sha256(content).hexdigest())
    assert not list(out.glob("*.writing"))
    return written


def read_all(folder: Path) -> dict[str, np.ndarray]:
    return {name: array for file in sorted(folder.glob("*.safetensors")) for name, array in load_file(file).items()}


def random_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """Several types, odd lengths, a scalar, an empty tensor."""
    rng = np.random.default_rng(seed)
    return {
        "half": rng.standard_normal((7, 3)).astype(np.float16),
        "double": rng.standard_normal((5,)),
        "float": rng.standard_normal((3, 3, 3)).astype(np.float32),
        "bytes": rng.integers(0, 255, (13,)).astype(np.uint8),
        "scalar": np.array(1.5, dtype=np.float32),
        "empty": np.zeros((0, 4), dtype=np.float32),
        "truth": rng.integers(0, 2, (5,)).astype(bool),
        "long": rng.integers(-9, 9, (4,)),
    }


def mixed(folder: Path) -> Checkpoint:
    (sound(folder) / SINGLE).write_bytes(save(random_arrays(), metadata=PT))
    return open_checkpoint(folder)


def test_single_file_passes_through_byte_for_byte(tmp_path: Path) -> None:
    checkpoint = mixed(tmp_path / "base")
    write(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / SINGLE).read_bytes() == checkpoint.path(SINGLE).read_bytes()


def test_shards_pass_through_byte_for_byte(tmp_path: Path) -> None:
    files = {ONE: save(random_arrays(), metadata=PT), TWO: weights("a", "b", "c")}
    weight_map = dict.fromkeys(random_arrays(), ONE) | dict.fromkeys(("a", "b", "c"), TWO)
    checkpoint = open_checkpoint(sharded(tmp_path / "base", weight_map, files))
    write(checkpoint, tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files
    assert json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"] == weight_map


def test_unusual_order_and_odd_header_pass_through(tmp_path: Path) -> None:
    header = {"__metadata__": PT | {"x": "y"}, "narrow": entry("U8", (3,), (0, 3)), "wide": entry("F32", (1,), (3, 7))}
    content = raw_file(header, b"\0" * 7)
    (sound(tmp_path / "base") / SINGLE).write_bytes(content)
    write(open_checkpoint(tmp_path / "base"), tmp_path / "out")
    assert (tmp_path / "out" / SINGLE).read_bytes() == content


@pytest.mark.parametrize("metadata", [None, {"format": "mlx"}, {}])
def test_other_metadata_is_replaced_and_the_data_kept(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    (sound(tmp_path / "base") / SINGLE).write_bytes(save(random_arrays(), metadata=metadata))
    write(open_checkpoint(tmp_path / "base"), tmp_path / "out")
    with safe_open(tmp_path / "out" / SINGLE, "np") as file:
        assert file.metadata() == PT
    assert _equal(read_all(tmp_path / "out"), random_arrays())


def test_files_keep_their_own_names_only_in_number(tmp_path: Path) -> None:
    names = {"a.safetensors": weights("a"), "b.safetensors": weights("b")}
    checkpoint = open_checkpoint(sharded(tmp_path / "base", {"a": "a.safetensors", "b": "b.safetensors"}, names))
    assert list(write(checkpoint, tmp_path / "out")) == [ONE, TWO]
    assert (tmp_path / "out" / TWO).read_bytes() == names["b.safetensors"]


@pytest.mark.parametrize("size", [1, 40, 100, 10**9])
def test_resharding_keeps_every_tensor(tmp_path: Path, size: int) -> None:
    checkpoint = mixed(tmp_path / "base")
    write(checkpoint, tmp_path / "out", size=size)
    assert _equal(read_all(tmp_path / "out"), random_arrays())
    again = open_checkpoint(tmp_path / "out")
    for header in again.shards.values():
        data = sum(t.nbytes for t in header.tensors)
        assert data <= size or sum(t.nbytes > 0 for t in header.tensors) == 1
    assert set(again.tensors) == set(checkpoint.tensors)


def _equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(
        found[k].dtype == expected[k].dtype
        and found[k].shape == expected[k].shape
        and np.array_equal(found[k], expected[k])
        for k in expected
    )


@pytest.mark.parametrize("permute", range(5))
def test_computed_files_are_aligned_whatever_the_order(tmp_path: Path, permute: int) -> None:
    checkpoint = mixed(tmp_path / "base")
    rng = np.random.default_rng(permute)
    names = list(rng.permutation(list(checkpoint.tensors)))
    tensors: dict[str, Value] = {f"new.{name}": kept(checkpoint)[name] for name in names}
    write(checkpoint, tmp_path / "out", tensors)
    sizes = {"F64": 8, "I64": 8, "F32": 4, "F16": 2}
    for info in read_header(tmp_path / "out" / SINGLE).tensors:
        assert info.offset % sizes.get(info.dtype, 1) == 0
    assert _equal(read_all(tmp_path / "out"), {f"new.{k}": v for k, v in random_arrays().items()})


def rewrite(
    inputs: dict[str, Value], outputs: dict[str, tuple[str, tuple[int, ...]]], function: Callable[[Tensors], Tensors]
) -> dict[str, Value]:
    made = Rewrite(inputs, {name: TensorSpec(*spec) for name, spec in outputs.items()}, function, "test")
    return {name: Computed(made, name) for name in outputs}


def test_identity_rewrite(tmp_path: Path) -> None:
    checkpoint = mixed(tmp_path / "base")
    tensors: dict[str, Value] = {}
    for name, value in kept(checkpoint).items():
        tensors |= rewrite({name: value}, {name: (value.spec.dtype, value.spec.shape)}, dict)
    write(checkpoint, tmp_path / "out", tensors)
    assert _equal(read_all(tmp_path / "out"), random_arrays())


def test_slices_nested_rewrites_and_groups(tmp_path: Path) -> None:
    arrays = {"w": np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32), "kept": np.ones(3, np.float32)}
    (sound(tmp_path / "base") / SINGLE).write_bytes(save(arrays, metadata=PT))
    checkpoint = open_checkpoint(tmp_path / "base")
    values = kept(checkpoint)
    rows = rewrite({"w": values["w"]}, {"w": ("F32", (4, 6))}, lambda t: {"w": t["w"][::2]})
    turned = rewrite({"w": rows["w"]}, {"w": ("F32", (6, 4))}, lambda t: {"w": t["w"].T})  # not contiguous
    group = rewrite(
        {"w": turned["w"], "again": rows["w"], "kept": values["kept"]},
        {"small": ("F16", (6, 4)), "wide": ("F64", (4, 6)), "count": ("I32", ())},
        lambda t: {
            "small": t["w"].half(),
            "wide": t["again"].double(),
            "count": torch.tensor(7, dtype=torch.int32),
            "unasked": t["w"],
        },
    )
    write(checkpoint, tmp_path / "out", {"kept": values["kept"], **group, "w": turned["w"]})
    expected = {
        "kept": arrays["kept"],
        "w": arrays["w"][::2].T,
        "small": arrays["w"][::2].T.astype(np.float16),
        "wide": arrays["w"][::2].astype(np.float64),
        "count": np.array(7, np.int32),
    }
    assert _equal(read_all(tmp_path / "out"), expected)


def _counted(checkpoint: Checkpoint, calls: list[int]) -> dict[str, Value]:
    """A rewrite of three outputs that counts how often it runs."""

    def function(tensors: Tensors) -> Tensors:
        calls.append(1)
        return {"x": tensors["float"], "y": tensors["float"].double(), "z": tensors["float"].half()}

    shape = (3, 3, 3)
    outputs = {"x": ("F32", shape), "y": ("F64", shape), "z": ("F16", shape)}
    return rewrite({"float": kept(checkpoint)["float"]}, outputs, function)


@pytest.mark.parametrize("size", [None, 1])
def test_a_group_is_evaluated_once(tmp_path: Path, size: int | None) -> None:
    checkpoint, calls = mixed(tmp_path / "base"), []
    group = _counted(checkpoint, calls)
    tensors = {"x": group["x"], "bytes": kept(checkpoint)["bytes"], "y": group["y"], "z": group["z"]}
    write(checkpoint, tmp_path / "out", tensors, size)
    assert len(calls) == 1


def test_outputs_left_out_or_used_twice(tmp_path: Path) -> None:
    checkpoint, calls = mixed(tmp_path / "base"), []
    group = _counted(checkpoint, calls)
    write(checkpoint, tmp_path / "out", {"one": group["x"], "two": group["x"], "z": group["z"]})
    found = read_all(tmp_path / "out")
    assert np.array_equal(found["one"], found["two"])
    assert len(calls) == 1


def test_outputs_of_one_rewrite_stand_together(tmp_path: Path) -> None:
    """Otherwise all packed weights of a shard would wait in memory for their scales."""
    base = sound(tmp_path / "base")
    base.joinpath(SINGLE).write_bytes(weights(*(f"w{i}" for i in range(4))))
    checkpoint = open_checkpoint(base)
    tensors: dict[str, Value] = {}
    for name, value in kept(checkpoint).items():
        outputs = {f"{name}.scale": ("F16", (4,)), f"{name}.packed": ("I32", (4,))}
        tensors |= rewrite({name: value}, outputs, lambda _: {})
    (shard,) = lay_out(checkpoint, tensors, None)
    assert list(shard.tensors)[:4] == ["w0.packed", "w0.scale", "w1.packed", "w1.scale"]


@pytest.mark.parametrize(("dtype", "shape"), [("F32", (3, 2)), ("F16", (2, 3)), ("F32", (6,))])
def test_a_rewrite_that_breaks_its_promise(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    checkpoint = open_checkpoint(sound(tmp_path / "base"))
    tensors = rewrite({"a.weight": kept(checkpoint)["a.weight"]}, {"a.weight": (dtype, shape)}, dict)
    with pytest.raises(InternalError, match="gave torch"):
        write(checkpoint, tmp_path / "out", tensors)


def test_a_rewrite_that_makes_nan(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sound(tmp_path / "base"))
    spec = {"a.weight": ("F32", (2, 3))}
    tensors = rewrite({"a.weight": kept(checkpoint)["a.weight"]}, spec, lambda t: {"a.weight": t["a.weight"] / 0})
    with pytest.raises(CorruptCheckpoint, match="NaN"):
        write(checkpoint, tmp_path / "out", tensors)


def test_a_type_that_torch_lacks(tmp_path: Path) -> None:
    (sound(tmp_path / "base") / SINGLE).write_bytes(raw_file({"a": entry("F4", (16,))}, b"\0" * 8))
    checkpoint = open_checkpoint(tmp_path / "base")
    made = rewrite({"a": kept(checkpoint)["a"]}, {"a": ("F4", (16,))}, dict)
    with pytest.raises(UnsupportedModel):
        evaluate(checkpoint, made["a"].rewrite)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (3, 0)])
def test_bytes_of_tensors(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape).to(dtype)
    assert bytes(to_bytes(tensor)) == b"\0" * (tensor.numel() * tensor.itemsize)


def test_resuming_trusts_only_what_it_finds(tmp_path: Path) -> None:
    checkpoint, out = open_checkpoint(sharded(tmp_path / "base")), tmp_path / "out"
    first = write(checkpoint, out)
    times = {name: (out / name).stat().st_ino for name in first}
    seen: list[int] = []
    assert write(checkpoint, out, progress=seen.append) == first
    assert {name: (out / name).stat().st_ino for name in first} == times
    assert sum(seen) == checkpoint.tensor_bytes
    content = bytearray((out / ONE).read_bytes())
    content[-1] ^= 1
    (out / ONE).write_bytes(content)
    (out / TWO).write_bytes(b"short")
    assert write(checkpoint, out) == first


def test_resuming_after_a_torn_journal(tmp_path: Path) -> None:
    checkpoint, out = open_checkpoint(sharded(tmp_path / "base")), tmp_path / "out"
    first = write(checkpoint, out, workers=1)
    lines = (out / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (out / "journal.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:20])
    (out / (TWO + ".writing")).write_bytes(b"left by the crash")
    _, journal = read_journal(out) or pytest.fail("no journal")
    assert list(journal.finished) == ["folder/" + ONE]
    assert write(checkpoint, out) == first
    _, journal = read_journal(out) or pytest.fail("no journal")
    assert len(journal.finished) == 2


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"{}\n", b"[]\n", b'{"surgery": 2, "fingerprint": "x"}\n', b"\xff\n", b'{"surgery": 1']
)
def test_a_journal_that_cannot_be_used(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal.jsonl").write_bytes(content)
    assert read_journal(tmp_path) is None


def test_second_conversion_into_the_same_place(tmp_path: Path) -> None:
    with exclusive(tmp_path), pytest.raises(OutputExists, match="another conversion"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass


def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(EnvironmentFailure, match="cannot be locked"), exclusive(tmp_path):
        pass


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, DiskFull),
        (errno.EDQUOT, DiskFull),
        (errno.EIO, EnvironmentFailure),
        (errno.EFBIG, EnvironmentFailure),
    ],
)
def test_errors_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[SurgeryError]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(writer, "_write_all", fail)
    with pytest.raises(error) as caught:
        write(open_checkpoint(sound(tmp_path / "base")), tmp_path / "out")
    assert type(caught.value) is error
    assert os.strerror(number) in caught.value.cause
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["journal.jsonl"]


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(DiskFull, match="full"):
        write_file(tmp_path / "full", b"x")


def test_a_base_that_changes_meanwhile(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path / "base"))
    checkpoint.path(TWO).write_bytes(weights("b.weight")[:-4])
    with pytest.raises(CorruptCheckpoint, match="shorter"):
        write(checkpoint, tmp_path / "out")
    checkpoint.path(TWO).unlink()
    with pytest.raises(SourceUnavailable, match="cannot be read"):
        write(checkpoint, tmp_path / "out")


def test_one_failure_stops_the_others(tmp_path: Path) -> None:
    """The first shard fails while the second is in its work; the others are never begun."""
    names = [f"w{i}" for i in range(6)]
    files = {f"s{i}.safetensors": weights(name) for i, name in enumerate(names)}
    checkpoint = open_checkpoint(sharded(tmp_path / "base", dict(zip(names, files, strict=True)), files))
    running, begun = threading.Event(), []

    def failing(_: Tensors) -> Tensors:
        running.wait(10)
        raise UnsupportedModel("the true error", cause="of the test", remedy="none")

    def slow(name: str) -> Callable[[Tensors], Tensors]:
        def function(tensors: Tensors) -> Tensors:
            begun.append(name)
            running.set()
            return {name: tensors[name]}

        return function

    tensors: dict[str, Value] = {}
    for name, value in kept(checkpoint).items():
        tensors |= rewrite({name: value}, {name: ("F32", (2, 3))}, failing if name == "w0" else slow(name))
    with pytest.raises(UnsupportedModel, match="the true error"):
        write(checkpoint, tmp_path / "out", tensors, workers=2)
    assert not list((tmp_path / "out").glob("*.writing"))


def test_a_failure_stops_a_shard_in_its_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BLOCK", 64)
    long = save({"long": np.zeros(40_000, np.float32)}, metadata=PT)
    files = {"a.safetensors": weights("bad"), "b.safetensors": long, "c.safetensors": weights("c")}
    weight_map = {"bad": "a.safetensors", "long": "b.safetensors", "c": "c.safetensors"}
    checkpoint = open_checkpoint(sharded(tmp_path / "base", weight_map, files))
    under_way, seen = threading.Event(), []

    def progress(count: int) -> None:
        seen.append(count)
        if len(seen) > 10:
            under_way.set()
        time.sleep(0.005)

    def failing(_: Tensors) -> Tensors:
        under_way.wait(10)
        raise UnsupportedModel("the true error", cause="of the test", remedy="none")

    values = kept(checkpoint)
    tensors = {**values, **rewrite({"bad": values["bad"]}, {"bad": ("F32", (2, 3))}, failing)}
    with pytest.raises(UnsupportedModel, match="the true error"):
        write(checkpoint, tmp_path / "out", tensors, workers=2, progress=progress)
    assert 10 < len(seen) < 1000
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["journal.jsonl"]


def test_outputs_are_let_go_once_written(tmp_path: Path) -> None:
    checkpoint = mixed(tmp_path / "base")
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def function(tensors: Tensors) -> Tensors:
        alive.append(sum(reference() is not None for reference in made))
        outputs = {f"{name}{i}": tensors["float"] + i for i in range(3) for name in tensors if name != "float"}
        made.extend(weakref.ref(tensor) for tensor in outputs.values())
        return outputs

    tensors: dict[str, Value] = {}
    for name in ("half", "double", "bytes"):
        inputs = {"float": kept(checkpoint)["float"], name: kept(checkpoint)[name]}
        tensors |= rewrite(inputs, {f"{name}{i}": ("F32", (3, 3, 3)) for i in range(3)}, function)
        del tensors[f"{name}1"]  # an output that nobody wants is no reason to keep it
    write(checkpoint, tmp_path / "out", tensors, workers=1)
    assert alive[0] == 0
    assert max(alive) <= 1  # the block being written
    assert all(reference() is None for reference in made)


def test_links_share_the_bytes(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path / "base"))
    plain = write(checkpoint, tmp_path / "plain")
    assert write(checkpoint, tmp_path / "linked", link=True) == plain
    for name in plain:
        assert (tmp_path / "linked" / name).samefile(checkpoint.path(name))
        assert not (tmp_path / "plain" / name).samefile(checkpoint.path(name))


def test_links_are_copies_across_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_device(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_device)
    checkpoint = open_checkpoint(sound(tmp_path / "base"))
    write(checkpoint, tmp_path / "out", link=True)
    assert (tmp_path / "out" / SINGLE).read_bytes() == checkpoint.path(SINGLE).read_bytes()
    assert not (tmp_path / "out" / SINGLE).samefile(checkpoint.path(SINGLE))


def test_links_are_checked_for_nan_too(tmp_path: Path) -> None:
    header = {"__metadata__": PT, "a": entry()}
    (sound(tmp_path / "base") / SINGLE).write_bytes(raw_file(header, b"\0\0\xc0\x7f" * 2))
    with pytest.raises(CorruptCheckpoint, match="NaN"):
        write(open_checkpoint(tmp_path / "base"), tmp_path / "out", link=True)
    assert not (tmp_path / "out" / SINGLE).exists()


def test_blocks_smaller_than_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BLOCK", 16)
    monkeypatch.setattr(writer, "WRITEBACK", 32)
    checkpoint = mixed(tmp_path / "base")
    write(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / SINGLE).read_bytes() == checkpoint.path(SINGLE).read_bytes()
    assert hash_file(checkpoint.path(SINGLE)).sha256 == hashlib.sha256(checkpoint.path(SINGLE).read_bytes()).hexdigest()


def test_copying_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    assert copy_file(tmp_path / "a", tmp_path / "b") == Finished("b", 100, hashlib.sha256(b"x" * 100).hexdigest())
    assert (tmp_path / "b").read_bytes() == b"x" * 100
    with pytest.raises(SourceUnavailable):
        copy_file(tmp_path / "missing", tmp_path / "c")


def test_header_names_every_tensor_in_order(tmp_path: Path) -> None:
    checkpoint = mixed(tmp_path / "base")
    shard = layout.Shard("x.safetensors", kept(checkpoint))
    assert len(shard.header) % 8 == 0
    assert list(json.loads(shard.header[8:]))[1:] == list(checkpoint.tensors)
