"""Pickled weights: the same tensors come out, and nothing in the file is ever run."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from surgery.checkpoint.resolve import open_base
from surgery.errors import CorruptCheckpoint, RefusedInput, SurgeryError, UnsafeCheckpoint
from tests.hostile_cases import CONFIG, SINGLE, sound

PICKLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def pickled(folder: Path, found: Any, config: dict[str, Any] | None = None, **options: Any) -> Path:
    (sound(folder) / SINGLE).unlink()
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    torch.save(found, folder / PICKLE, **options)
    return folder


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    return {
        "plain": base,
        "turned": base.T,
        "part": base[1:3, ::2],
        "half": torch.randn(3).bfloat16(),
        "byte": torch.tensor([1, 2, 3]).byte(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "double": torch.randn(5).double(),
        "flag": torch.tensor([True]),
    }


@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.parametrize(
    "kind",
    [
        dict,
        OrderedDict,
        lambda found: {k: torch.nn.Parameter(v) if v.dtype == torch.float32 else v for k, v in found.items()},
    ],
)
def test_the_same_tensors(tmp_path: Path, modern: bool, kind: Callable[..., Any]) -> None:
    base = pickled(tmp_path / "base", kind(tensors()), _use_new_zipfile_serialization=modern)
    (base / "tokenizer.json").write_text("{}")
    (base / "README.md").write_text("card")
    (base / "optimizer.pt").write_bytes(b"x")
    checkpoint = open_base(str(base), allow_pickle=True)
    assert checkpoint.source == str(base)
    found = load_file(checkpoint.path(SINGLE))
    assert found.keys() == tensors().keys()
    assert all(
        torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors().items()
    )
    assert sorted(path.name for path in checkpoint.folder.iterdir()) == [
        "README.md",
        "config.json",
        SINGLE,
        "tokenizer.json",
    ]
    assert (checkpoint.folder.stat().st_mode & 0o777) == 0o700
    assert sorted(path.name for path in base.iterdir()) == sorted(
        ["README.md", "config.json", "optimizer.pt", PICKLE, "tokenizer.json"]
    )


def test_the_base_is_known_again(tmp_path: Path) -> None:
    base = pickled(tmp_path / "base", tensors())
    prints = {open_base(str(base), allow_pickle=True).fingerprint() for _ in range(2)}
    assert len(prints) == 1
    os.utime(base / PICKLE, ns=(1, 1))
    assert open_base(str(base), allow_pickle=True).fingerprint() not in prints


def test_sharded(tmp_path: Path) -> None:
    base = pickled(tmp_path / "base", {"a": torch.ones(2)})
    (base / PICKLE).rename(base / "one.bin")
    torch.save({"b": torch.zeros(3)}, base / "two.bin")
    (base / INDEX).write_text(json.dumps({"weight_map": {"a": "one.bin", "b": "two.bin"}}))
    checkpoint = open_base(str(base), allow_pickle=True)
    assert {name: info.shard for name, info in checkpoint.tensors.items()} == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
    }
    torch.save({"a": torch.zeros(3)}, base / "two.bin")
    with pytest.raises(CorruptCheckpoint, match="two files"):
        open_base(str(base), allow_pickle=True)


@pytest.mark.parametrize(
    ("ties", "shared", "left"), [(True, True, False), (True, False, True), (False, True, True), (None, True, True)]
)
def test_tied_embeddings(tmp_path: Path, ties: bool | None, shared: bool, left: bool) -> None:
    embedding = torch.randn(5, 3)
    found = {"lm_head.weight": embedding if shared else embedding.clone(), "model.embed_tokens.weight": embedding}
    config = CONFIG | ({} if ties is None else {"tie_word_embeddings": ties})
    checkpoint = open_base(str(pickled(tmp_path / "base", found, config)), allow_pickle=True)
    assert ("lm_head.weight" in checkpoint.tensors) == left
    assert "model.embed_tokens.weight" in checkpoint.tensors


@pytest.mark.parametrize(
    "found",
    [
        [torch.ones(1)],
        torch.ones(1),
        {"model": {"w": torch.ones(1)}},
        {"step": 3},
        {1: torch.ones(1)},
        {},
        None,
        {"sparse": torch.ones(2, 2).to_sparse()},
        {"meta": torch.ones(2, device="meta")},
        {"c": torch.ones(2, dtype=torch.complex128)},
        {"bad\nname": torch.ones(1)},
    ],
)
def test_what_is_no_map_of_tensors(tmp_path: Path, found: Any) -> None:
    base = pickled(tmp_path / "base", found)
    with pytest.raises(CorruptCheckpoint):
        open_base(str(base), allow_pickle=True)


class Run:
    """Unpickled carelessly, it runs a command."""

    def __init__(self, marker: Path, call: Any = os.system) -> None:
        touch = f"__import__('pathlib').Path({str(marker)!r}).touch()"
        self.call, self.argument = call, f"touch {marker}" if call is os.system else touch

    def __reduce__(self) -> Any:
        return self.call, (self.argument,)


@pytest.mark.parametrize("call", [os.system, exec, eval])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("archive", [True, False])
def test_nothing_is_run(tmp_path: Path, call: Any, protocol: int, archive: bool) -> None:
    marker = tmp_path / "executed"
    bomb = {"w": torch.ones(1), "bomb": Run(marker, call)}
    if archive:
        base = pickled(tmp_path / "base", bomb, pickle_protocol=max(protocol, 2))
    else:
        base = pickled(tmp_path / "base", {})
        (base / PICKLE).write_bytes(pickle.dumps(Run(marker, call), protocol=protocol))
    with pytest.raises(UnsafeCheckpoint, match="more than tensors") as caught:
        open_base(str(base), allow_pickle=True)
    assert caught.value.exit_code == 3
    assert not marker.exists()
    pickle.loads(pickle.dumps(Run(marker, call)))
    assert marker.exists()


@pytest.mark.parametrize(
    "content", [b"", b"x", b"PK\x03\x04" + b"\0" * 50, b"\x80", b"\x80\x02.", b"\0" * 4096, b"<html>"]
)
def test_broken_files(tmp_path: Path, content: bytes) -> None:
    base = pickled(tmp_path / "base", {})
    (base / PICKLE).write_bytes(content)
    with pytest.raises(RefusedInput):
        open_base(str(base), allow_pickle=True)


def test_truncated_archive(tmp_path: Path) -> None:
    base = pickled(tmp_path / "base", {"w": torch.randn(1000)})
    content = (base / PICKLE).read_bytes()
    for cut in range(0, len(content), 499):
        (base / PICKLE).write_bytes(content[:cut])
        with pytest.raises(RefusedInput):
            open_base(str(base), allow_pickle=True)


def _link(base: Path) -> None:
    (base.parent / "w.bin").write_bytes((base / PICKLE).read_bytes())
    (base / PICKLE).unlink()
    (base / PICKLE).symlink_to(base.parent / "w.bin")


def _side_link(base: Path) -> None:
    (base.parent / "secret").write_text("x")
    (base / "tokenizer.json").symlink_to(base.parent / "secret")


def _card_link(base: Path) -> None:
    (base.parent / "secret").write_text("x")
    (base / "README.md").symlink_to(base.parent / "secret")


def _pipe(base: Path) -> None:
    (base / PICKLE).unlink()
    os.mkfifo(base / PICKLE)


def _index(content: Any) -> Callable[[Path], None]:
    def build(base: Path) -> None:
        (base / PICKLE).rename(base / "one.bin")
        (base / INDEX).write_text(json.dumps(content))

    return build


def _code(base: Path) -> None:
    (base / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "m.M"}}))


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (_link, UnsafeCheckpoint),
        (_side_link, UnsafeCheckpoint),
        (_card_link, UnsafeCheckpoint),
        (_pipe, UnsafeCheckpoint),
        (_code, UnsafeCheckpoint),
        (_index({"weight_map": {"w": "../one.bin"}}), UnsafeCheckpoint),
        (_index({"weight_map": {"w": "gone.bin"}}), CorruptCheckpoint),
        (_index({"weight_map": {}}), CorruptCheckpoint),
        (_index([]), CorruptCheckpoint),
    ],
)
def test_hostile_folders(tmp_path: Path, build: Callable[[Path], None], error: type[SurgeryError]) -> None:
    base = pickled(tmp_path / "base", {"w": torch.ones(1)})
    build(base)
    with pytest.raises(error):
        open_base(str(base), allow_pickle=True)


def test_safetensors_come_first(tmp_path: Path) -> None:
    (sound(tmp_path) / PICKLE).write_bytes(pickle.dumps(Run(tmp_path / "executed")))
    assert len(open_base(str(tmp_path), allow_pickle=True).tensors) == 2
    assert not (tmp_path / "executed").exists()
