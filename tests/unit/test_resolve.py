"""Every way to name a base, and every way in which it is not there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.numpy import save

from surgery.checkpoint import resolve
from surgery.checkpoint.resolve import open_base
from surgery.errors import CorruptCheckpoint, SourceUnavailable, UnsafeCheckpoint
from tests.fake_hub import COMMIT, ID, FakeHub, fake_hub
from tests.hostile_cases import CONFIG, INDEX, SINGLE, pickled, sound, weights

BIG = save(
    {"big": np.ones((400, 400), np.float32), **{f"t{i:05d}": np.ones(1, np.float32) for i in range(2000)}},
    {"format": "pt"},
)
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "README.md": b"---\nlicense: mit\n---\n",
    "tokenizer.json": b"{}",
    "additional_chat_templates/tool.jinja": b"x",
    "onnx/model.onnx": b"x" * 1000,
    "consolidated.safetensors": b"x" * 1000,
    "pytorch_model.bin": b"x" * 1000,
    "one.safetensors": weights("a.weight"),
    "two.safetensors": BIG,
    INDEX: json.dumps(
        {
            "weight_map": {
                "a.weight": "one.safetensors",
                "big": "two.safetensors",
                **{f"t{i:05d}": "two.safetensors" for i in range(2000)},
            }
        }
    ).encode(),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(dict(FILES)) as running:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the fake Hub is on this machine
        monkeypatch.setattr(resolve, "_api", lambda: huggingface_hub.HfApi(endpoint=running.endpoint, token=False))
        yield running


def test_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    checkpoint = open_base("owner/name")  # a folder that is there comes before the Hub
    assert (checkpoint.source, checkpoint.revision) == ("owner/name", None)
    assert len(open_base(str(tmp_path / "owner" / "name")).tensors) == 2


@pytest.mark.parametrize(
    "base",
    [
        "",
        "nam",
        "./nothing",
        "/no/such/folder",
        "a/b/c",
        "owner/name@",
        "a b/c",
        "x\0y",
        "x" * 5000,
        "owner/name:../x",
        "owner/name:/etc",
        "owner/name@a@b",
        "-x/y",
        "owner/name\n",
    ],
)
def test_what_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceUnavailable):
        open_base(base)


def test_misspelt_folder(tmp_path: Path) -> None:
    sound(tmp_path / "my-model")
    with pytest.raises(SourceUnavailable, match="did you mean 'my-model'"):
        open_base(str(tmp_path / "my-modle"))


def test_builtin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound(tmp_path / "llama")
    monkeypatch.setattr(resolve, "BUILTIN_FOLDER", tmp_path)
    assert open_base("builtin:llama").source == "builtin:llama"
    with pytest.raises(SourceUnavailable, match="did you mean 'llama'") as caught:
        open_base("builtin:lama")
    assert caught.value.cause == "this package has llama"
    for name in ("", "..", "../llama", "/etc", "x\n"):
        with pytest.raises(SourceUnavailable):
            open_base(f"builtin:{name}")


@pytest.mark.parametrize("base", [ID, f"{ID}@main", f"{ID}@v1", f"{ID}@{COMMIT}"])
def test_hub(hub: FakeHub, base: str) -> None:
    checkpoint = open_base(base)
    assert (checkpoint.source, checkpoint.revision) == (base, COMMIT)
    assert len(checkpoint.tensors) == 2002
    assert checkpoint.path("two.safetensors").read_bytes() == BIG
    carried = {file.name for file in checkpoint.side_files if not file.dropped}
    assert carried == {"tokenizer.json", "additional_chat_templates/tool.jinja"}
    assert checkpoint.path("README.md").is_file()
    assert not set(hub.log) & {"onnx/model.onnx", "consolidated.safetensors", "pytorch_model.bin"}


def test_hub_twice_reads_nothing_again(hub: FakeHub) -> None:
    first = open_base(ID).fingerprint()
    hub.log.clear()
    assert open_base(ID).fingerprint() == first
    assert hub.log == {}


def test_hub_subfolder(hub: FakeHub) -> None:
    hub.files = {f"deep/er/{name}": content for name, content in FILES.items()} | {"LICENSE": b"x"}
    for headers_only in (True, False):
        checkpoint = open_base(f"{ID}@main:deep/er", headers_only=headers_only)
        assert len(checkpoint.tensors) == 2002
        assert "LICENSE" not in {file.name for file in checkpoint.side_files}
    with pytest.raises(SourceUnavailable, match="no files"):
        open_base(f"{ID}:deep/err")


def test_headers_only(hub: FakeHub) -> None:
    checkpoint = open_base(ID, headers_only=True)
    assert {name: header.file_bytes for name, header in checkpoint.shards.items()}["two.safetensors"] == len(BIG)
    sent = hub.log["two.safetensors"]
    assert sent < len(BIG) // 2
    header = 8 + int.from_bytes(BIG[:8], "little")
    assert header > resolve.HEAD_BYTES  # so that a second request was needed
    assert checkpoint.path("two.safetensors").read_bytes()[:header] == BIG[:header]
    assert checkpoint.revision == COMMIT
    assert (checkpoint.folder.stat().st_mode & 0o777) == 0o700
    assert open_base(ID).tensors == checkpoint.tensors


def test_headers_only_of_a_single_file(hub: FakeHub) -> None:
    hub.files = {"config.json": FILES["config.json"], SINGLE: weights()}
    assert len(open_base(ID, headers_only=True).tensors) == 2


@pytest.mark.parametrize("content", [b"", b"123", b"\xff" * 100, weights()[:-1], b"\xff\xff\xff\x05" + b"\0" * 200])
def test_headers_only_of_a_broken_file(hub: FakeHub, content: bytes) -> None:
    hub.files = {"config.json": FILES["config.json"], SINGLE: content}
    with pytest.raises(CorruptCheckpoint if content else SourceUnavailable):
        open_base(ID, headers_only=True)


def test_server_without_ranges(hub: FakeHub) -> None:
    hub.ranges = False
    with pytest.raises(SourceUnavailable, match="header"):
        open_base(ID, headers_only=True)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a\nb", "sub/x.safetensors"])
@pytest.mark.parametrize("headers_only", [True, False])
def test_hostile_index(hub: FakeHub, name: str, headers_only: bool) -> None:
    hub.files[INDEX] = json.dumps({"weight_map": {"a.weight": name}}).encode()
    with pytest.raises(UnsafeCheckpoint):
        open_base(ID, headers_only=headers_only)


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "RepoNotFound", "no repository"),
        (401, "RepoNotFound", "no repository"),
        (403, "GatedRepo", "gated"),
        (500, "", "cannot be fetched"),
    ],
)
def test_hub_that_refuses(hub: FakeHub, status: int, code: str, words: str) -> None:
    hub.status, hub.error = status, code
    with pytest.raises(SourceUnavailable, match=words) as caught:
        open_base(ID)
    assert caught.value.exit_code == 4
    assert caught.value.remedy


def test_no_such_revision(hub: FakeHub) -> None:
    assert hub.endpoint
    with pytest.raises(SourceUnavailable, match="no revision 'nope'"):
        open_base(f"{ID}@nope")


def test_no_such_repository_but_a_folder_nearly(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.endpoint
    (tmp_path / "outputs" / "latent").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceUnavailable) as caught:
        open_base("outputs/latnt")
    assert "did you mean 'latent'" in caught.value.cause


def test_nobody_listens(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.endpoint
    monkeypatch.setattr(resolve, "_api", lambda: huggingface_hub.HfApi(endpoint="http://127.0.0.1:9", token=False))
    with pytest.raises(SourceUnavailable, match="cannot be fetched"):
        open_base(ID)


def test_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OfflineModeIsEnabled("offline")

    online = open_base(ID)
    hub.log.clear()
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    again = open_base(f"{ID}@{COMMIT}")
    assert (again.tensors, again.revision) == (online.tensors, COMMIT)
    assert hub.log == {}
    for base in (ID, "owner/other", f"owner/other@{COMMIT}"):  # a branch may have moved: only a commit is known
        with pytest.raises(SourceUnavailable, match="not in the cache"):
            open_base(base)


CODE = {"config.json": json.dumps(CONFIG | {"auto_map": {"AutoModel": "m.M"}}).encode(), "m.py": b"raise SystemExit"}


@pytest.mark.parametrize(("base", "trust"), [(f"{ID}@{COMMIT}", False), (ID, False), (ID, True), (f"{ID}@v1", True)])
def test_remote_code_is_refused_before_the_weights_are_fetched(hub: FakeHub, base: str, trust: bool) -> None:
    hub.files |= CODE
    with pytest.raises(UnsafeCheckpoint):
        open_base(base, trust_remote_code=trust)
    assert "one.safetensors" not in hub.log


def test_remote_code_that_calls_itself_ours_still_needs_a_pin(hub: FakeHub) -> None:
    hub.files |= CODE | {"config.json": json.dumps(CONFIG | {"auto_map": {}, "surgery": {}}).encode()}
    with pytest.raises(UnsafeCheckpoint, match="not pinned"):
        open_base(ID, trust_remote_code=True)


def test_pinned_remote_code(hub: FakeHub) -> None:
    hub.files |= CODE
    checkpoint = open_base(f"{ID}@{COMMIT}", trust_remote_code=True)
    assert checkpoint.remote_code
    assert "m.py" in {file.name for file in checkpoint.side_files if not file.dropped}


def test_pickles_on_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    import torch

    torch.save({"w": torch.ones(3)}, tmp_path / "w.bin")
    hub.files = {"config.json": FILES["config.json"], "pytorch_model.bin": (tmp_path / "w.bin").read_bytes()}
    with pytest.raises(UnsafeCheckpoint, match="pickle"):
        open_base(ID)
    assert list(open_base(ID, allow_pickle=True).tensors) == ["w"]


def test_hostile_pickle_folder(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    pickled(base)
    for allow in (False, True):
        with pytest.raises(UnsafeCheckpoint):
            open_base(str(base), allow_pickle=allow)
    assert not (tmp_path / "executed").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
