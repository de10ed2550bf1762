"""What opens, and what an open checkpoint says about itself."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from surgery.checkpoint.header import MAX_JSON_VALUES, parse_json
from surgery.checkpoint.reader import contained, open_checkpoint, read_into
from surgery.errors import CorruptCheckpoint, SourceUnavailable, UnsafeCheckpoint
from tests.hostile_cases import CONFIG, INDEX, SINGLE, entry, raw_file, sharded, sound, weights


def test_single_file(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sound(tmp_path), source="somewhere")
    assert checkpoint.source == "somewhere"
    assert checkpoint.revision is None
    assert checkpoint.config == CONFIG
    assert list(checkpoint.shards) == [SINGLE]
    assert list(checkpoint.tensors) == ["a.weight", "b.weight"]
    assert checkpoint.parameter_count == 12
    assert checkpoint.tensor_bytes == 48
    assert checkpoint.side_files == ()
    assert not checkpoint.remote_code


def test_source_is_the_folder_by_default(tmp_path: Path) -> None:
    assert open_checkpoint(sound(tmp_path)).source == str(tmp_path)


def test_offsets_are_where_the_bytes_are(tmp_path: Path) -> None:
    array = np.arange(5, dtype=np.int32)
    (sound(tmp_path) / SINGLE).write_bytes(save({"x": array, "y": array.astype(np.int64)}))
    content = (tmp_path / SINGLE).read_bytes()
    for info in open_checkpoint(tmp_path).tensors.values():
        dtype = {"I32": np.int32, "I64": np.int64}[info.dtype]
        assert np.frombuffer(content[info.offset : info.offset + info.nbytes], dtype).tolist() == array.tolist()


def test_sharded(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path))
    assert list(checkpoint.shards) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert checkpoint.tensors["b.weight"].shard == "model-00002-of-00002.safetensors"


def test_an_index_of_a_single_file_is_fine_where_it_agrees(tmp_path: Path) -> None:
    (sound(tmp_path) / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(("a.weight", "b.weight"), SINGLE)}))
    assert list(open_checkpoint(tmp_path).shards) == [SINGLE]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a.weight": SINGLE}}))
    with pytest.raises(CorruptCheckpoint, match="disagree"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("header", [
    {"a": entry()},  # no metadata at all
    {"__metadata__": {}, "a": entry()},
    {"__metadata__": {"format": "pt", "note": "x" * 1000}, "a": entry()},
    {"a/b/../c": entry()},  # a name is only a name
    {"a b é": entry()},
    {"a": entry(shape=(2, 1, 1, 1))},
    {"a": entry("F64", ())},
    {"a": entry("F4", (4, 4))},
    {"a": entry("F8_E4M3", (8,))},
    {"a": entry(), "empty": entry(shape=(0, 7), offsets=(8, 8)), "also": entry(shape=(0,), offsets=(8, 8))},
    {"first": entry(shape=(0,), offsets=(0, 0)), "a": entry()},
    {"later": entry("U8", (4,), (4, 8)), "earlier": entry("U8", (4,), (0, 4))},
])  # fmt: skip
def test_unusual_headers_that_are_sound(tmp_path: Path, header: dict[str, object]) -> None:
    (sound(tmp_path) / SINGLE).write_bytes(raw_file(header, b"\0" * 8))
    tensors = open_checkpoint(tmp_path).tensors
    assert set(tensors) == set(header) - {"__metadata__"}
    assert [t.offset for t in tensors.values()] == sorted(t.offset for t in tensors.values())


def test_padded_header(tmp_path: Path) -> None:
    (sound(tmp_path) / SINGLE).write_bytes(raw_file(json.dumps({"a": entry()}).encode() + b" " * 100, b"\0" * 8))
    assert open_checkpoint(tmp_path).tensors["a"].nbytes == 8


def test_config_may_hold_what_python_writes(tmp_path: Path) -> None:
    (sound(tmp_path) / "config.json").write_text('{"time_step_limit": [0.0, Infinity], "x": NaN, "y": -Infinity}')
    assert open_checkpoint(tmp_path).config["time_step_limit"] == [0.0, float("inf")]


def test_side_files_are_carried_or_have_a_reason(tmp_path: Path) -> None:
    sound(tmp_path)
    carried = [
        "LICENSE",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "x.png",
    ]
    dropped = [
        ".gitattributes", "README.md", "consolidated.safetensors", "handler.py", "model.gguf", "optimizer.pt",
        "pytorch_model.bin", "pytorch_model.bin.index.json", "surgery.lock.json",
    ]  # fmt: skip
    for name in (*carried, *dropped):
        (tmp_path / name).write_text("{}")
    for folder in ("additional_chat_templates", "additional_chat_templates/deeper", "onnx", ".git", ".cache"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tool.jinja").write_text("{}")
    files = {file.name: file.dropped for file in open_checkpoint(tmp_path).side_files}
    template = "additional_chat_templates/tool.jinja"
    assert sorted(name for name, reason in files.items() if not reason) == sorted([*carried, template])
    folders = ["additional_chat_templates/deeper/", "onnx/"]
    assert sorted(name for name, reason in files.items() if reason) == sorted([*dropped, *folders])


def _cache(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint in the layout of the Hub's cache: names are links to blobs of the same repository."""
    repository = tmp_path / "models--owner--name"
    snapshot = sharded(repository / "snapshots" / ("0" * 40))
    (snapshot / "tokenizer.json").write_text("{}")
    (snapshot / "additional_chat_templates").mkdir()
    (snapshot / "additional_chat_templates" / "tool.jinja").write_text("x")
    blobs = repository / "blobs"
    blobs.mkdir()
    for number, file in enumerate([path for path in snapshot.rglob("*") if path.is_file()]):
        file.rename(blobs / str(number))
        file.symlink_to(os.path.relpath(blobs / str(number), file.parent))
    return snapshot, blobs


def test_hub_cache(tmp_path: Path) -> None:
    snapshot, _ = _cache(tmp_path)
    checkpoint = open_checkpoint(snapshot)
    assert {file.name for file in checkpoint.side_files} == {"tokenizer.json", "additional_chat_templates/tool.jinja"}
    assert len(checkpoint.tensors) == 2


def test_hub_cache_reached_through_a_link(tmp_path: Path) -> None:
    snapshot, _ = _cache(tmp_path)
    (tmp_path / "shortcut").symlink_to(snapshot)
    assert len(open_checkpoint(tmp_path / "shortcut").tensors) == 2


def test_blob_that_is_a_link_out_of_the_cache(tmp_path: Path) -> None:
    snapshot, blobs = _cache(tmp_path)
    (tmp_path / "secret").write_text("{}")
    (blobs / "link").symlink_to(tmp_path / "secret")
    (snapshot / "vocab.txt").symlink_to("../../blobs/link")
    with pytest.raises(UnsafeCheckpoint, match="leaves"):
        open_checkpoint(snapshot)


def test_blob_of_another_repository(tmp_path: Path) -> None:
    snapshot, _ = _cache(tmp_path)
    other = tmp_path / "models--other--name" / "blobs"
    other.mkdir(parents=True)
    (other / "x").write_text("{}")
    (snapshot / "vocab.txt").symlink_to(other / "x")
    with pytest.raises(UnsafeCheckpoint, match="leaves"):
        open_checkpoint(snapshot)


def test_dropped_files_are_never_opened(tmp_path: Path) -> None:
    os.mkfifo(sound(tmp_path) / "pytorch_model.bin")
    (tmp_path / "README.md").symlink_to("/nowhere")
    assert all(file.dropped for file in open_checkpoint(tmp_path).side_files)


def test_link_inside_the_folder(tmp_path: Path) -> None:
    (sound(tmp_path) / "vocab.txt").write_text("x")
    (tmp_path / "merges.txt").symlink_to("vocab.txt")
    assert contained(tmp_path, "merges.txt") == tmp_path / "merges.txt"
    assert len(open_checkpoint(tmp_path).side_files) == 2


def test_fingerprint(tmp_path: Path) -> None:
    (sound(tmp_path) / "vocab.txt").write_text("x")
    first = open_checkpoint(tmp_path).fingerprint()
    assert open_checkpoint(tmp_path).fingerprint() == first
    (tmp_path / "README.md").write_text("a card is replaced anyway")
    assert open_checkpoint(tmp_path).fingerprint() == first
    seen = {first}
    for name, content in (("vocab.txt", b"yy"), ("config.json", b"{}"), (SINGLE, weights("c.weight"))):
        (tmp_path / name).write_bytes(content)
        seen.add(open_checkpoint(tmp_path).fingerprint())
    os.utime(tmp_path / SINGLE, ns=(1, 1))
    seen.add(open_checkpoint(tmp_path).fingerprint())
    assert len(seen) == 5


def test_fingerprint_of_a_base_that_went_away(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sound(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(SourceUnavailable, match="cannot be read"):
        checkpoint.fingerprint()


def test_read_into_says_where_a_file_ended(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    with (tmp_path / "x").open("rb") as file:
        buffer = bytearray(3)
        read_into(file.fileno(), memoryview(buffer), 2, "x")
        assert buffer == b"345"
        with pytest.raises(CorruptCheckpoint, match="shorter"):
            read_into(file.fileno(), memoryview(buffer), 3, "x")


def test_json_of_many_values_is_refused_before_it_is_built() -> None:
    with pytest.raises(CorruptCheckpoint) as caught:
        parse_json(b"[" + b"1," * (MAX_JSON_VALUES + 1) + b"1]", "x")
    assert "values" in caught.value.cause


def test_messages_name_the_key_that_is_there_twice() -> None:
    with pytest.raises(CorruptCheckpoint) as caught:
        parse_json(b'{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}', "x.json")
    assert caught.value.cause == "the key 'c' appears twice"
    assert "x.json" in caught.value.problem
