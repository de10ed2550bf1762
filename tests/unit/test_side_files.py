"""What comes with a base arrives as it was, or with a note."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from surgery.checkpoint.journal import Finished
from surgery.checkpoint.reader import open_checkpoint
from surgery.emission.side_files import carry, repairs
from surgery.errors import CorruptCheckpoint, EnvironmentFailure, SourceUnavailable, SurgeryError, UnsafeCheckpoint
from tests.hostile_cases import sound

GREEDY = {"do_sample": False, "max_length": 99, "eos_token_id": [1, 2]}


def put(folder: Path, name: str, content: Any) -> bytes:
    """Write a side file, as it is or as JSON in an unusual spelling that must survive."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content, indent=7).encode() + b"\n\n")
    return path.read_bytes()


def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_bytes(tmp_path: Path) -> None:
    base, target = sound(tmp_path / "base"), out(tmp_path)
    contents = {
        "tokenizer.json": b"\xef\xbb\xbf not even JSON",
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"},
        "generation_config.json": {"do_sample": True, "temperature": 0.6},
        "LICENSE": b"terms\r\n",
        "NOTICE": b"",
        "USE_POLICY.md": b"x",
        "chat_template.jinja": b"{{ x }}",
        "additional_chat_templates/tool.jinja": b"{{ y }}",
        "preprocessor_config.json": {"a": 1},
        "picture.png": os.urandom(5_000_000),
    }
    written = {name: put(base, name, content) for name, content in contents.items()}
    for name in ("README.md", "pytorch_model.bin", "handler.py", ".gitattributes", "surgery.lock.json"):
        put(base, name, b"{}")
    checkpoint = open_checkpoint(base)
    files = carry(checkpoint, target)
    assert repairs(checkpoint) == ()
    assert {
        path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()
    } == written
    assert sorted(files, key=lambda file: file.file) == sorted(
        (Finished(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in written.items()),
        key=lambda f: f.file,
    )


def test_again_into_the_same_folder(tmp_path: Path) -> None:
    base, target = sound(tmp_path / "base"), out(tmp_path)
    put(base, "additional_chat_templates/tool.jinja", b"x")
    assert carry(open_checkpoint(base), target) == carry(open_checkpoint(base), target)


def test_names_that_are_written_already(tmp_path: Path) -> None:
    base, target = sound(tmp_path / "base"), out(tmp_path)
    put(base, "a.txt", b"base")
    put(base, "b.txt", b"base")
    put(target, "a.txt", b"ours")
    assert [file.file for file in carry(open_checkpoint(base), target, already={"a.txt"})] == ["b.txt"]
    assert (target / "a.txt").read_bytes() == b"ours"


def test_tokenizer_of_a_newer_release(tmp_path: Path) -> None:
    base, target = sound(tmp_path / "base"), out(tmp_path)
    put(base, "tokenizer_config.json", {"z": 1, "tokenizer_class": "TokenizersBackend", "é": "ü"})
    checkpoint = open_checkpoint(base)
    (repair,) = repairs(checkpoint)
    assert "4.x" in repair.note
    carry(checkpoint, target)
    text = (target / "tokenizer_config.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"z": 1, "tokenizer_class": "PreTrainedTokenizerFast", "é": "ü"}
    assert next(iter(json.loads(text))) == "z"
    assert "ü" in text


@pytest.mark.parametrize(
    ("idle", "dropped"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, ["temperature", "top_p"]),
        ({"top_k": 20}, ["top_k"]),
        ({"min_p": 0.1}, ["min_p"]),
        ({"temperature": 0.0}, ["temperature"]),
        ({"top_k": 20, "temperature": 1.0}, ["top_k"]),
    ],
)
def test_sampling_settings_beside_greedy_decoding(tmp_path: Path, idle: dict[str, Any], dropped: list[str]) -> None:
    base, target = sound(tmp_path / "base"), out(tmp_path)
    put(base, "generation_config.json", GREEDY | idle)
    checkpoint = open_checkpoint(base)
    (repair,) = repairs(checkpoint)
    assert all(name in repair.note for name in dropped)
    (file,) = carry(checkpoint, target)
    content = (target / "generation_config.json").read_bytes()
    assert json.loads(content) == GREEDY | {k: v for k, v in idle.items() if k not in dropped}
    assert file == Finished("generation_config.json", len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize(
    "config",
    [
        {},
        GREEDY,
        {"do_sample": True, "temperature": 0.6},
        {"temperature": 0.6},
        GREEDY | {"temperature": 1.0, "top_p": 1, "top_k": 50},
        GREEDY | {"temperature": None, "top_p": None},
    ],
)
def test_settings_that_are_left_alone(tmp_path: Path, config: dict[str, Any]) -> None:
    base, target = sound(tmp_path / "base"), out(tmp_path)
    content = put(base, "generation_config.json", config)
    carry(open_checkpoint(base), target)
    assert (target / "generation_config.json").read_bytes() == content


def test_repaired_settings_can_be_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    base, target = sound(tmp_path / "base"), out(tmp_path)
    put(
        base,
        "generation_config.json",
        GREEDY | {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "typical_p": 0.5},
    )
    carry(open_checkpoint(base), target)
    settings = [json.loads((folder / "generation_config.json").read_text()) for folder in (base, target)]
    with pytest.raises(ValueError, match="do_sample"):
        transformers.GenerationConfig(**settings[0]).save_pretrained(tmp_path / "saved")
    transformers.GenerationConfig(**settings[1]).save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_configs_that_are_no_object(tmp_path: Path, name: str) -> None:
    base, target = sound(tmp_path / "base"), out(tmp_path)
    put(base, name, [1])
    with pytest.raises(CorruptCheckpoint, match=name):
        carry(open_checkpoint(base), target)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda path: path.unlink(), CorruptCheckpoint),
        (lambda path: (path.unlink(), path.symlink_to("/etc/hostname")), UnsafeCheckpoint),
        (lambda path: (path.unlink(), path.mkdir()), UnsafeCheckpoint),
    ],
)
def test_a_file_that_cannot_be_carried_is_an_error(tmp_path: Path, change: Any, error: type[SurgeryError]) -> None:
    base, target = sound(tmp_path / "base"), out(tmp_path)
    put(base, "LICENSE", b"terms")
    checkpoint = open_checkpoint(base)
    change(base / "LICENSE")
    with pytest.raises(error):
        carry(checkpoint, target)


def test_a_target_that_is_not_there(tmp_path: Path) -> None:
    base = sound(tmp_path / "base")
    put(base, "LICENSE", b"terms")
    with pytest.raises(EnvironmentFailure) as caught:
        carry(open_checkpoint(base), tmp_path / "nowhere")
    assert type(caught.value) is not SourceUnavailable
