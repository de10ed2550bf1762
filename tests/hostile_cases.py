"""Checkpoints that must be refused: each a builder of a folder, and the exact error it must end in.

`build(folder)` fills an empty folder; what must stay private is put beside it. The same table is run through the
reader here and through the command line elsewhere.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from surgery.errors import CorruptCheckpoint, SourceUnavailable, SurgeryError, UnsafeCheckpoint

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
SECRET = "not for publication"

Build = Callable[[Path], object]


class Case(NamedTuple):
    """`build` makes the folder; opening or converting it must raise exactly `error`."""

    name: str
    build: Build
    error: type[SurgeryError]


def arrays(*names: str, count: int = 6) -> dict[str, np.ndarray]:
    """Small float tensors under the names given."""
    return {name: np.arange(count, dtype=np.float32).reshape(2, -1) for name in names or ("a.weight", "b.weight")}


def weights(*names: str) -> bytes:
    """A sound safetensors file."""
    return save(arrays(*names), metadata={"format": "pt"})


def raw_file(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with exactly this header, given as bytes or as what JSON is made of."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape,
            "data_offsets": list(offsets) if isinstance(offsets, tuple) else offsets, **more}  # fmt: skip


def sound(folder: Path) -> Path:
    """A checkpoint of one file that opens."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / SINGLE).write_bytes(weights())
    return folder


def sharded(folder: Path, weight_map: Any = None, files: dict[str, bytes] | None = None) -> Path:
    """A checkpoint of two files, with whatever index is asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    for name, content in ({one: weights("a.weight"), two: weights("b.weight")} if files is None else files).items():
        (folder / name).write_bytes(content)
    index = {"weight_map": {"a.weight": one, "b.weight": two} if weight_map is None else weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def _with_weights(content: bytes) -> Build:
    return lambda folder: (sound(folder) / SINGLE).write_bytes(content)


def _with_header(header: Any, data: bytes = b"\0" * 8) -> Build:
    return _with_weights(raw_file(header, data))


def _with_tensor(name: str = "a", data: bytes = b"\0" * 8, **fields: Any) -> Build:
    return _with_header({name: entry(**fields)}, data)


def _with_config(content: bytes) -> Build:
    return lambda folder: (sound(folder) / "config.json").write_bytes(content)


def _with_index(content: bytes) -> Build:
    return lambda folder: (sharded(folder) / INDEX).write_bytes(content)


def _mapped(shard: str) -> Build:
    return lambda folder: sharded(folder, {"a.weight": shard})


def _secret(folder: Path) -> Path:
    path = folder.parent / "secret.json"
    path.write_text(SECRET)
    return path


def _linked(name: str) -> Build:
    """A file of the folder that is a link to one outside."""

    def build(folder: Path) -> None:
        sound(folder)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(_secret(folder))

    return build


def _linked_shard(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes(weights("a.weight"))
    sharded(folder, {"a.weight": "linked.safetensors"}, {})
    (folder / "linked.safetensors").symlink_to(outside)


def _linked_folder(folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "tool.jinja").write_text(SECRET)
    (sound(folder) / "additional_chat_templates").symlink_to(outside)


def _loop(folder: Path) -> None:
    (sound(folder) / "tokenizer.json").symlink_to("tokenizer.json")


def _dangling(folder: Path) -> None:
    (sound(folder) / "tokenizer.json").symlink_to("nowhere.json")


def _pipe(name: str) -> Build:
    def build(folder: Path) -> None:
        sound(folder)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return build


def _device(folder: Path) -> None:
    (sound(folder) / "vocab.txt").symlink_to("/dev/zero")


def _socket(folder: Path) -> None:
    sound(folder)
    here = Path.cwd()
    os.chdir(folder)  # the address of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("merges.txt")
    finally:
        os.chdir(here)


def _directory(name: str) -> Build:
    def build(folder: Path) -> None:
        sound(folder)
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return build


def _directory_as_shard(folder: Path) -> None:
    sharded(folder, {"a.weight": "shard.safetensors"}, {})
    (folder / "shard.safetensors").mkdir()


def _odd_side_name(name: str) -> Build:
    return lambda folder: (sound(folder) / name).write_text("x")


def _both(folder: Path) -> None:
    (sharded(folder) / SINGLE).write_bytes(weights())


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def pickled(folder: Path) -> None:
    """Weights in a pickle that runs a command when it is loaded carelessly."""
    (sound(folder) / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(folder.parent / "executed")))


def _pickle_in_index(folder: Path) -> None:
    sharded(folder, {"a.weight": "pytorch_model.bin"}, {"pytorch_model.bin": b"\x80\x04N."})


def remote_code(folder: Path) -> None:
    """A base whose config names code that comes with it."""
    sound(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"auto_map": {"AutoModel": "modeling_x.X"}}))
    (folder / "modeling_x.py").write_text("raise SystemExit('executed')")


def _remote_tokenizer(folder: Path) -> None:
    auto_map = {"AutoTokenizer": ["other/repository--tokenization_x.X", None]}
    (sound(folder) / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))


def _remote_pipeline(folder: Path) -> None:
    config = CONFIG | {"custom_pipelines": {"text-generation": {"impl": "pipeline.P"}}}
    (sound(folder) / "config.json").write_text(json.dumps(config))


def _broken_tokenizer_config(folder: Path) -> None:
    (sound(folder) / "tokenizer_config.json").write_text("{'single': 'quotes'}")


def _not_finite(dtype: str, pattern: bytes) -> Build:
    count = 40_000
    data = bytearray(count * len(pattern))
    data[-len(pattern) :] = pattern
    return _with_header({"__metadata__": {"format": "pt"}, "a": entry(dtype, (count,), (0, len(data)))}, bytes(data))


def _missing_config(folder: Path) -> None:
    (sound(folder) / "config.json").unlink()


def _huge_config(folder: Path) -> None:
    sound(folder)
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 33)


def _lying_length(folder: Path) -> None:
    sound(folder)
    with (folder / SINGLE).open("wb") as file:
        file.write(struct.pack("<Q", 99_000_000_000))
        file.truncate(100_000_000_000)


_GOOD = weights()
_TWO = {"a": entry(), "b": entry(offsets=(8, 16))}
_DEEP = b"[" * 100_000 + b"]" * 100_000
_NESTED = b'{"x":' * 200 + b"1" + b"}" * 200
_DIGITS = b"1" + b"0" * 5000

CASES: tuple[Case, ...] = (
    # names and links that leave the folder
    Case("shard-absolute", _mapped("/etc/passwd"), UnsafeCheckpoint),
    Case("shard-parent", _mapped("../outside.safetensors"), UnsafeCheckpoint),
    Case("shard-hidden-parent", _mapped("x/../../outside.safetensors"), UnsafeCheckpoint),
    Case("shard-backslash", _mapped("..\\outside.safetensors"), UnsafeCheckpoint),
    Case("shard-dot-slash", _mapped("./model-00001-of-00002.safetensors"), UnsafeCheckpoint),
    Case("shard-sub-folder", _mapped("sub/model.safetensors"), UnsafeCheckpoint),
    Case("shard-dot", _mapped("."), UnsafeCheckpoint),
    Case("shard-dots", _mapped(".."), UnsafeCheckpoint),
    Case("shard-empty", _mapped(""), UnsafeCheckpoint),
    Case("shard-nul", _mapped("a\0b.safetensors"), UnsafeCheckpoint),
    Case("shard-newline", _mapped("a\nb.safetensors"), UnsafeCheckpoint),
    Case("shard-surrogate", _mapped("\ud800.safetensors"), UnsafeCheckpoint),
    Case("shard-very-long", _mapped("x" * 5000), CorruptCheckpoint),
    Case("shard-link-outside", _linked_shard, UnsafeCheckpoint),
    Case("single-link-outside", _linked(SINGLE), UnsafeCheckpoint),
    Case("config-link-outside", _linked("config.json"), UnsafeCheckpoint),
    Case("tokenizer-link-outside", _linked("tokenizer.json"), UnsafeCheckpoint),
    Case("tokenizer-config-link-outside", _linked("tokenizer_config.json"), UnsafeCheckpoint),
    Case("licence-link-outside", _linked("LICENSE"), UnsafeCheckpoint),
    Case("template-link-outside", _linked("additional_chat_templates/tool.jinja"), UnsafeCheckpoint),
    Case("template-folder-link-outside", _linked_folder, UnsafeCheckpoint),
    Case("link-loop", _loop, SourceUnavailable),
    Case("link-dangling", _dangling, CorruptCheckpoint),
    Case("side-file-newline", _odd_side_name("vocab\n.txt"), UnsafeCheckpoint),
    Case("side-file-escape", _odd_side_name("vocab\x1b[2J.txt"), UnsafeCheckpoint),
    Case("side-file-not-utf8", _odd_side_name(os.fsdecode(b"vocab\xff.txt")), UnsafeCheckpoint),
    Case("side-file-backslash", _odd_side_name("..\\vocab.txt"), UnsafeCheckpoint),
    # what is no file
    Case("config-pipe", _pipe("config.json"), UnsafeCheckpoint),
    Case("weights-pipe", _pipe(SINGLE), UnsafeCheckpoint),
    Case("tokenizer-pipe", _pipe("tokenizer.json"), UnsafeCheckpoint),
    Case("index-pipe", lambda folder: (_pipe(INDEX)(folder), (folder / SINGLE).unlink()), UnsafeCheckpoint),
    Case("side-file-device", _device, UnsafeCheckpoint),
    Case("side-file-socket", _socket, UnsafeCheckpoint),
    Case("weights-directory", _directory(SINGLE), SourceUnavailable),
    Case("config-directory", _directory("config.json"), SourceUnavailable),
    Case("shard-directory", _directory_as_shard, UnsafeCheckpoint),
    Case("empty-folder", lambda folder: folder.mkdir(exist_ok=True), SourceUnavailable),
    Case("no-folder", lambda folder: folder.rmdir(), SourceUnavailable),
    Case("no-config", _missing_config, SourceUnavailable),
    Case("no-weights", lambda folder: (sound(folder) / SINGLE).unlink(), SourceUnavailable),
    # config.json
    Case("config-empty", _with_config(b""), CorruptCheckpoint),
    Case("config-list", _with_config(b"[]"), CorruptCheckpoint),
    Case("config-null", _with_config(b"null"), CorruptCheckpoint),
    Case("config-not-utf8", _with_config(b'{"a": "\xff"}'), CorruptCheckpoint),
    Case("config-utf16", _with_config(json.dumps(CONFIG).encode("utf-16")), CorruptCheckpoint),
    Case("config-bom", _with_config(b"\xef\xbb\xbf{}"), CorruptCheckpoint),
    Case("config-recursive", _with_config(_DEEP), CorruptCheckpoint),
    Case("config-nested", _with_config(_NESTED), CorruptCheckpoint),
    Case("config-duplicate-key", _with_config(b'{"a": 1, "a": 2}'), CorruptCheckpoint),
    Case("config-huge-integer", _with_config(b'{"a": ' + _DIGITS + b"}"), CorruptCheckpoint),
    Case("config-trailing", _with_config(b"{} {}"), CorruptCheckpoint),
    Case("config-too-large", _huge_config, CorruptCheckpoint),
    Case("tokenizer-config-broken", _broken_tokenizer_config, CorruptCheckpoint),
    # the file around the header
    Case("weights-empty", _with_weights(b""), CorruptCheckpoint),
    Case("weights-seven-bytes", _with_weights(b"\0" * 7), CorruptCheckpoint),
    Case("weights-no-header", _with_weights(b"\0" * 8), CorruptCheckpoint),
    Case("weights-truncated", _with_weights(_GOOD[:-1]), CorruptCheckpoint),
    Case("weights-header-only", _with_weights(_GOOD[:-48]), CorruptCheckpoint),
    Case("weights-trailing", _with_weights(_GOOD + b"\0"), CorruptCheckpoint),
    Case("weights-second-file", _with_weights(_GOOD + _GOOD), CorruptCheckpoint),
    Case("weights-html", _with_weights(b"<!DOCTYPE html><html>404</html>"), CorruptCheckpoint),
    Case("weights-lfs-pointer", _with_weights(b"version https://git-lfs.github.com/spec/v1\n"), CorruptCheckpoint),
    Case("weights-zip", _with_weights(b"PK\x03\x04" + b"\0" * 60), CorruptCheckpoint),
    Case("header-length-max", _with_weights(b"\xff" * 8 + _GOOD[8:]), CorruptCheckpoint),
    Case("header-length-past-end", _with_weights(raw_file({"a": entry()}, length=1000)), CorruptCheckpoint),
    Case("header-length-giant", _lying_length, CorruptCheckpoint),
    Case("header-length-short", _with_weights(raw_file({"a": entry()}, b"\0" * 8, length=20)), CorruptCheckpoint),
    Case("header-not-json", _with_header(b"{not json}"), CorruptCheckpoint),
    Case("header-not-utf8", _with_header(b'{"\xff": 1}'), CorruptCheckpoint),
    Case("header-list", _with_header([entry()]), CorruptCheckpoint),
    Case("header-recursive", _with_header(_DEEP), CorruptCheckpoint),
    Case("header-nested", _with_header(_NESTED), CorruptCheckpoint),
    Case("header-many-values", _with_header(b"[" + b"[]," * 2_100_000 + b"[]]"), CorruptCheckpoint),
    Case("header-duplicate-tensor", _with_header(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    ), CorruptCheckpoint),
    Case("header-many-duplicates",
         _with_header(b"{" + b",".join(b'"%d":1' % i for i in range(100_000)) + b',"99999":1}'),
         CorruptCheckpoint),
    # tensors
    Case("offsets-overlap", _with_header(_TWO | {"b": entry(offsets=(4, 12))}, b"\0" * 12), CorruptCheckpoint),
    Case("offsets-same", _with_header(_TWO | {"b": entry()}), CorruptCheckpoint),
    Case("offsets-gap", _with_header(_TWO | {"b": entry(offsets=(16, 24))}, b"\0" * 24), CorruptCheckpoint),
    Case("offsets-gap-at-start", _with_tensor(offsets=(8, 16), data=b"\0" * 16), CorruptCheckpoint),
    Case("offsets-past-end", _with_tensor(shape=(200,), offsets=(0, 800)), CorruptCheckpoint),
    Case("offsets-reversed", _with_tensor(offsets=(8, 0)), CorruptCheckpoint),
    Case("offsets-negative", _with_tensor(offsets=(-8, 0)), CorruptCheckpoint),
    Case("offsets-three", _with_tensor(offsets=(0, 4, 8)), CorruptCheckpoint),
    Case("offsets-float", _with_tensor(offsets=(0.0, 8.0)), CorruptCheckpoint),
    Case("offsets-bool", _with_tensor(shape=(), dtype="U8", offsets=(False, True), data=b"\0"), CorruptCheckpoint),
    Case("offsets-text", _with_tensor(offsets="08"), CorruptCheckpoint),
    Case("offsets-huge", _with_tensor(offsets=(1 << 64, (1 << 64) + 8)), CorruptCheckpoint),
    Case("offsets-digits", _with_header(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,' + _DIGITS + b"]}}"), CorruptCheckpoint),
    Case("offsets-exponent",
         _with_header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,1e999]}}'), CorruptCheckpoint),
    Case("shape-disagrees", _with_tensor(shape=(3,)), CorruptCheckpoint),
    Case("shape-negative", _with_tensor(shape=(-1, -2)), CorruptCheckpoint),
    Case("shape-float", _with_tensor(shape=(2.0,)), CorruptCheckpoint),
    Case("shape-bool", _with_tensor(shape=(True, 2)), CorruptCheckpoint),
    Case("shape-null", _with_tensor(shape=None), CorruptCheckpoint),
    Case("shape-nan", _with_header(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'), CorruptCheckpoint),
    Case("shape-huge", _with_tensor(shape=(1 << 40, 1 << 40)), CorruptCheckpoint),
    Case("shape-huge-but-empty",
         _with_tensor(shape=(0, 1 << 61, 1 << 61), offsets=(0, 0), data=b""), CorruptCheckpoint),
    Case("shape-many-dimensions", _with_tensor(shape=(1,) * 100 + (2,)), CorruptCheckpoint),
    Case("shape-nested", _with_tensor(shape=([2],)), CorruptCheckpoint),
    Case("dtype-unknown", _with_tensor(dtype="F31"), CorruptCheckpoint),
    Case("dtype-lower-case", _with_tensor(dtype="f32"), CorruptCheckpoint),
    Case("dtype-number", _with_tensor(dtype=32), CorruptCheckpoint),
    Case("dtype-control", _with_tensor(dtype="F32\x1b[31m\n"), CorruptCheckpoint),
    Case("dtype-half-byte", _with_tensor(dtype="F4", shape=(3,), offsets=(0, 1), data=b"\0"), CorruptCheckpoint),
    Case("entry-extra-field", _with_tensor(extra=1), CorruptCheckpoint),
    Case("entry-missing-field", _with_header({"a": {"dtype": "F32", "shape": [2]}}), CorruptCheckpoint),
    Case("entry-list", _with_header({"a": [1, 2]}), CorruptCheckpoint),
    Case("name-empty", _with_tensor(name=""), CorruptCheckpoint),
    Case("name-newline", _with_tensor(name="a\nb"), CorruptCheckpoint),
    Case("name-escape", _with_tensor(name="a\x1b[2J"), CorruptCheckpoint),
    Case("name-right-to-left", _with_tensor(name="a\u202eb"), CorruptCheckpoint),
    Case("name-surrogate", _with_tensor(name="\ud800"), CorruptCheckpoint),
    Case("name-very-long", _with_tensor(name="a" * 10_000), CorruptCheckpoint),
    Case("metadata-not-strings", _with_header({"__metadata__": {"format": 1}, "a": entry()}), CorruptCheckpoint),
    Case("metadata-list", _with_header({"__metadata__": ["pt"], "a": entry()}), CorruptCheckpoint),
    Case("no-tensors", _with_header({"__metadata__": {"format": "pt"}}, b""), CorruptCheckpoint),
    # the index
    Case("index-empty", _with_index(b""), CorruptCheckpoint),
    Case("index-list", _with_index(b"[]"), CorruptCheckpoint),
    Case("index-no-map", _with_index(b'{"metadata": {}}'), CorruptCheckpoint),
    Case("index-empty-map", _with_index(b'{"weight_map": {}}'), CorruptCheckpoint),
    Case("index-map-of-numbers", _with_index(b'{"weight_map": {"a.weight": 1}}'), CorruptCheckpoint),
    Case("index-duplicate-key", _with_index(b'{"weight_map": {"a": "x", "a": "y"}}'), CorruptCheckpoint),
    Case("index-recursive", _with_index(_DEEP), CorruptCheckpoint),
    Case("index-missing-shard", lambda folder: sharded(folder, {"a.weight": "gone.safetensors"}), CorruptCheckpoint),
    Case("index-missing-tensor", lambda folder: sharded(folder, {
        "a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors",
        "c.weight": "model-00002-of-00002.safetensors"}), CorruptCheckpoint),
    Case("index-extra-tensor", lambda folder: sharded(folder, {"a.weight": "x.safetensors"}, {
        "x.safetensors": weights("a.weight", "b.weight")}), CorruptCheckpoint),
    Case("index-wrong-shard", lambda folder: sharded(folder, {
        "a.weight": "model-00002-of-00002.safetensors",
        "b.weight": "model-00001-of-00002.safetensors"}), CorruptCheckpoint),
    Case("index-tensor-twice", lambda folder: sharded(folder, files={
        "model-00001-of-00002.safetensors": weights("a.weight"),
        "model-00002-of-00002.safetensors": weights("a.weight", "b.weight")}), CorruptCheckpoint),
    Case("index-names-config", _mapped("config.json"), CorruptCheckpoint),
    Case("index-and-single", _both, CorruptCheckpoint),
    Case("index-truncated-shard", lambda folder: sharded(folder, files={
        "model-00001-of-00002.safetensors": weights("a.weight")[:-4],
        "model-00002-of-00002.safetensors": weights("b.weight")}), CorruptCheckpoint),
    # code
    Case("pickle", pickled, UnsafeCheckpoint),
    Case("pickle-in-index", _pickle_in_index, UnsafeCheckpoint),
    Case("remote-code", remote_code, UnsafeCheckpoint),
    Case("remote-tokenizer", _remote_tokenizer, UnsafeCheckpoint),
    Case("remote-pipeline", _remote_pipeline, UnsafeCheckpoint),
    # values, found while converting
    Case("nan-float32", _not_finite("F32", b"\0\0\xc0\x7f"), CorruptCheckpoint),
    Case("infinity-float32", _not_finite("F32", b"\0\0\x80\xff"), CorruptCheckpoint),
    Case("nan-bfloat16", _not_finite("BF16", b"\xc0\x7f"), CorruptCheckpoint),
    Case("infinity-float16", _not_finite("F16", b"\0\x7c"), CorruptCheckpoint),
    Case("nan-float64", _not_finite("F64", b"\1\0\0\0\0\0\xf0\x7f"), CorruptCheckpoint),
)  # fmt: skip
