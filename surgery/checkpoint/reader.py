"""Opening a checkpoint folder: config, index, headers and side files, with every file treated as hostile.

Nothing is executed, no tensor data is read, and no path outside the folder is opened. What opens here is accounted
for in full: each tensor has one place, each file is either carried or has a reason why not.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from surgery.checkpoint.dtypes import element_count
from surgery.checkpoint.header import Header, TensorInfo, parse_json, read_header
from surgery.errors import CorruptCheckpoint, SourceUnavailable, UnsafeCheckpoint

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_JSON_BYTES = 64_000_000
MAX_SHARDS = 100_000

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
OTHER_WEIGHTS = (
    ".safetensors", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack", ".tflite", ".ot", ".mlmodel"
)  # fmt: skip
CARRIED_FOLDER = "additional_chat_templates"
_REPLACED = {
    "README.md": "replaced by the model card of the result",
    "surgery.lock.json": "replaced by the lock of the result",
    ".gitattributes": "belongs to the repository, not to the model",
    ".gitignore": "belongs to the repository, not to the model",
}
_VERSION_CONTROL = (".git", ".cache")
# Keys by which transformers finds Python code, in any of the configs that a loader reads.
_CODE_KEYS = ("auto_map", "custom_pipelines")


# How many tensors tell one model from another, and how many bytes of each.
SAMPLED, SAMPLE_BYTES = 4096, 64


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file that is no weight: `name` is relative to the folder; `dropped` says why it is not carried, or is empty."""

    name: str
    size: int
    dropped: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was opened and found sound.

    `tensors` follows the shards in order and, inside a shard, the order of the bytes. `source` is what the user
    named (`id@revision`, a folder, `builtin:NAME`); `revision` is the commit where there is one.
    """

    folder: Path
    source: str
    revision: str | None
    config: Mapping[str, Any]
    shards: Mapping[str, Header]
    tensors: Mapping[str, TensorInfo]
    side_files: tuple[SideFile, ...]
    remote_code: bool

    def path(self, name: str) -> Path:
        """The path of a file of this checkpoint."""
        return self.folder / name

    @property
    def parameter_count(self) -> int:
        """Stored elements over all tensors."""
        return sum(element_count(tensor.shape) for tensor in self.tensors.values())

    @property
    def tensor_bytes(self) -> int:
        """Bytes of tensor data on disk."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def identity(self) -> str:
        """A hash of the config and of all tensors' names, types and shapes: the same on every machine; no weights."""
        digest = hashlib.sha256(json.dumps(dict(self.config), sort_keys=True).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\n".encode())
        return digest.hexdigest()

    def sample(self) -> str:
        """A hash of a few bytes from the middle of up to 4,096 tensors: tells models of one shape apart, cheaply."""
        digest = hashlib.sha256()
        names = sorted(self.tensors)
        for name in names[:: max(len(names) // SAMPLED, 1)]:
            tensor = self.tensors[name]
            piece = memoryview(bytearray(min(SAMPLE_BYTES, tensor.nbytes)))
            path = self.path(tensor.shard)
            with reading_errors(path), path.open("rb", buffering=0) as file:
                read_into(file.fileno(), piece, tensor.offset + (tensor.nbytes - len(piece)) // 2, tensor.shard)
            digest.update(piece)
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """A hash that changes when config, headers, sizes or times of the files that are read do; reads no weights."""
        digest = hashlib.sha256()
        with reading_errors(self.folder):
            digest.update(self.path("config.json").read_bytes())
            for name, header in self.shards.items():
                status = self.path(name).stat()
                digest.update(f"{name}\0{header.sha256}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
            for file in self.side_files:
                if not file.dropped:
                    status = self.path(file.name).stat()
                    digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def open_checkpoint(
    folder: Path, *, source: str = "", revision: str | None = None, trust_remote_code: bool = False
) -> Checkpoint:
    """Open `folder` as a checkpoint.

    Raises SourceUnavailable (no such folder or file, or it cannot be read), UnsafeCheckpoint (pickle, remote code,
    links and names that leave the folder) and CorruptCheckpoint (anything that does not agree with the rest).
    """
    with reading_errors(folder):
        if not folder.is_dir():
            raise SourceUnavailable(
                f"{folder} is not a folder", cause="a base is a checkpoint folder, id@revision or builtin:NAME",
                remedy="check the path, or run: surgery inspect builtin:llama",
            )  # fmt: skip
        files = _list_files(folder)
        config = _read_config(folder, files)
        remote_code = _check_remote_code(folder, files, config, revision, trusted=trust_remote_code)
        names, weight_map = _shard_names(folder, files)
        shards = {name: read_header(contained(folder, name)) for name in names}
        tensors = _account(shards, weight_map)
        side = side_files(folder, {"config.json", INDEX, *names}, remote_code=remote_code)
    return Checkpoint(folder, source or str(folder), revision, config, shards, tensors, side, remote_code)


def side_files(folder: Path, read: Collection[str], *, remote_code: bool) -> tuple[SideFile, ...]:
    """Every file of `folder` but those in `read`, each to be carried or with the reason why not.

    Raises as `contained` does for what would be carried: a link there would publish a file of somewhere else.
    """
    return tuple(
        _side_file(folder, name, size, remote_code=remote_code)
        for name, size in _list_files(folder).items()
        if name not in read
    )


def inner_path(folder: Path, name: str) -> Path:
    """The checked path of a side file by its relative name; raises as `contained` does."""
    inner = name.removeprefix(f"{CARRIED_FOLDER}/")
    return contained(folder if inner == name else folder / CARRIED_FOLDER, inner)


def uses_remote_code(folder: Path, *, revision: str | None, trusted: bool) -> bool:
    """Whether a folder, which may still lack its weights, brings code; raises UnsafeCheckpoint unless allowed."""
    with reading_errors(folder):
        files = _list_files(folder)
        return _check_remote_code(folder, files, _read_config(folder, files), revision, trusted=trusted)


class reading_errors:  # noqa: N801 - reads as a statement: `with reading_errors(path):`
    """Turns operating-system errors of reading into SourceUnavailable."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> Literal[False]:
        if isinstance(error, OSError):
            name = error.filename if isinstance(error.filename, str) else str(self.path)
            raise SourceUnavailable(
                f"{name[:200]} cannot be read", cause=f"{type(error).__name__}: {error.strerror}",
                remedy="check that the files are there and that you may read them",
            ) from error  # fmt: skip
        return False


def read_into(descriptor: int, buffer: memoryview, start: int, name: str) -> None:
    """Fill `buffer` from byte `start` of an open file named `name`. Raises CorruptCheckpoint where the file ends."""
    filled = 0
    while filled < len(buffer):
        count = os.preadv(descriptor, [buffer[filled:]], start + filled)
        if count == 0:
            raise CorruptCheckpoint(
                f"{name} became shorter while it was read", cause=f"it ends before byte {start + len(buffer)}",
                remedy="do not change the base during a conversion; start again",
            )  # fmt: skip
        filled += count


def contained(folder: Path, name: str) -> Path:
    """The path of file `name` of `folder`, refusing names and links that leave it. Raises UnsafeCheckpoint."""
    if not name.isprintable() or name in {"", ".", ".."} or "/" in name or "\\" in name:
        raise UnsafeCheckpoint(
            f"the file name {ascii(name)[:80]} is refused",
            cause="files of a checkpoint have printable base names inside its folder",
            remedy="do not use this checkpoint: a name in it points elsewhere",
        )
    path = folder / name
    try:
        real = path.resolve(strict=True)
    except PermissionError:
        raise
    except (OSError, RuntimeError) as error:
        raise CorruptCheckpoint(
            f"{name[:80]} is missing", cause=f"{type(error).__name__} when opening it",
            remedy="download the checkpoint again",
        ) from error  # fmt: skip
    if not any(real.is_relative_to(root) for root in _roots(folder)):
        raise UnsafeCheckpoint(
            f"{name} is a link that leaves the checkpoint folder", cause="reading it would copy a file from elsewhere",
            remedy="replace the link by the file it should be",
        )  # fmt: skip
    if not stat.S_ISREG(real.stat().st_mode):
        raise UnsafeCheckpoint(
            f"{name} is not a regular file", cause="pipes, devices and folders are not read",
            remedy="replace it by a file",
        )  # fmt: skip
    return path


def _roots(folder: Path) -> tuple[Path, ...]:
    """Where links may lead: the folder itself and, in a Hub cache, the blobs of the same repository."""
    real = folder.resolve()
    for place in (real, *real.parents):
        if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):
            return real, place.parent.parent / "blobs"
    return (real,)


def _list_files(folder: Path) -> dict[str, int]:
    """Names and sizes of the files, sorted; folders end in `/`, and of one the files are listed by relative names."""
    found: dict[str, int] = {}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda item: item.name):
            if entry.name == CARRIED_FOLDER and entry.is_dir(follow_symlinks=False):
                inner = _list_files(Path(entry.path))
                found.update({f"{entry.name}/{name}": size for name, size in inner.items()})
            elif entry.is_dir() and entry.name != CARRIED_FOLDER:
                if entry.name not in _VERSION_CONTROL:
                    found[f"{entry.name}/"] = 0
            else:
                found[entry.name] = entry.stat().st_size if entry.is_file() else 0
    return found


def _read_config(folder: Path, files: Mapping[str, int]) -> Mapping[str, Any]:
    if "config.json" not in files:
        raise SourceUnavailable(
            f"{folder} has no config.json", cause="a checkpoint is a folder with config.json and safetensors",
            remedy="name the folder that holds config.json (id@revision:subfolder on the Hub)",
        )  # fmt: skip
    config = read_json(folder, "config.json")
    if not isinstance(config, dict):
        raise CorruptCheckpoint(
            "config.json is not a JSON object", cause=f"it is a {type(config).__name__}", remedy="download it again"
        )
    return config


def read_json(folder: Path, name: str) -> Any:
    """Read one JSON file of a checkpoint folder strictly; raises as `contained` and `parse_json` do.

    NaN and Infinity are admitted: Python writes them into configs, for instance as limits of a time step.
    """
    path = contained(folder, name)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CorruptCheckpoint(f"{name} is too large", cause=f"over {MAX_JSON_BYTES} bytes", remedy="check the file")
    return parse_json(path.read_bytes(), name, constants=True)


def _check_remote_code(
    folder: Path, files: Mapping[str, int], config: Mapping[str, Any], revision: str | None, *, trusted: bool
) -> bool:
    """Whether loading this checkpoint would run code that came with it; refuses where that was not allowed."""
    others = (name for name in files if name.endswith("config.json") and "/" not in name and name != "config.json")
    configs = {"config.json": config, **{name: read_json(folder, name) for name in others}}
    using = [
        f"{key} in {name}"
        for name, data in configs.items()
        if isinstance(data, dict)
        for key in _CODE_KEYS
        if key in data
    ]
    if not using:
        return False
    if not trusted:
        code = [name for name in files if name.endswith(".py")]
        raise UnsafeCheckpoint(
            f"the base carries remote code ({', '.join([using[0], *code[:3]])})",
            cause="surgery never runs a base's code unasked",
            remedy="read the code, then pass --trust-remote-code with a base pinned as id@40-digit-commit",
        )
    ours = isinstance(config.get("surgery"), dict)
    if not ours and not is_commit(revision):
        raise unpinned()
    return True


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a whole commit hash, which cannot move."""
    return revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def unpinned() -> UnsafeCheckpoint:
    """The refusal of remote code whose commit was not named."""
    return UnsafeCheckpoint(
        "the base carries remote code but is not pinned", cause="code of a moving branch can change between runs",
        remedy="name it as id@40-digit-commit",
    )  # fmt: skip


def _shard_names(folder: Path, files: Mapping[str, int]) -> tuple[list[str], dict[str, str] | None]:
    """The weight files in order and, where there is an index, its map of tensor to shard."""
    if SINGLE in files and INDEX not in files:
        return [SINGLE], None
    if INDEX not in files:
        pickles = [name for name in files if name.endswith(PICKLES)]
        if pickles:
            raise refused_pickle(pickles[0])
        raise SourceUnavailable(
            f"{folder} has no weights", cause=f"neither {SINGLE} nor {INDEX} is there", remedy="download the weights"
        )
    index = read_json(folder, INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CorruptCheckpoint(
            f"{INDEX} has no usable weight_map", cause="it must map tensor names to file names",
            remedy="download the index again",
        )  # fmt: skip
    names = sorted(set(weight_map.values()))
    if SINGLE in files and names != [SINGLE]:  # some writers index even a single file
        raise CorruptCheckpoint(
            f"{INDEX} does not name {SINGLE}, which is there", cause="loaders disagree on which of the two counts",
            remedy="remove the one that is stale",
        )  # fmt: skip
    if len(names) > MAX_SHARDS:
        raise CorruptCheckpoint(
            f"{INDEX} names {len(names)} shards", cause=f"over {MAX_SHARDS}", remedy="check the index"
        )
    for name in names:
        if name.endswith(PICKLES):
            raise UnsafeCheckpoint(
                f"the index names the pickle file {ascii(name)[:80]}", cause="unpickling runs code",
                remedy="convert it to safetensors",
            )  # fmt: skip
        contained(folder, name)
    return names, weight_map


def refused_pickle(name: str) -> UnsafeCheckpoint:
    """The refusal of a checkpoint that has pickle file `name` for its weights."""
    return UnsafeCheckpoint(
        f"the weights are pickle files ({ascii(name)[1:-1][:80]})",
        cause="unpickling runs code; surgery reads safetensors",
        remedy="convert them to safetensors first, or pass --allow-pickle",
    )


def _account(shards: Mapping[str, Header], weight_map: dict[str, str] | None) -> dict[str, TensorInfo]:
    """Every tensor once, and exactly where the index says."""
    tensors: dict[str, TensorInfo] = {}
    for shard, header in shards.items():
        for tensor in header.tensors:
            if tensor.name in tensors:
                raise _disagree(f"tensor {tensor.name!r} is in {tensors[tensor.name].shard} and in {shard}")
            if weight_map is not None and weight_map.get(tensor.name) != shard:
                raise _disagree(f"{shard} holds {tensor.name!r}, the index says {weight_map.get(tensor.name)!r}")
            tensors[tensor.name] = tensor
    missing = sorted(set(weight_map or ()) - set(tensors))
    if missing:
        raise _disagree(f"the index names {missing[0]!r} and {len(missing) - 1} more that no shard holds")
    if not tensors:
        raise _disagree("there is no tensor in it")
    return tensors


def _disagree(cause: str) -> CorruptCheckpoint:
    return CorruptCheckpoint("the index and the shards disagree", cause=cause, remedy="download the checkpoint again")


def _side_file(folder: Path, name: str, size: int, *, remote_code: bool) -> SideFile:
    if name.endswith("/"):
        return SideFile(name, 0, "a sub-folder; only the checkpoint's own files are carried")
    if name in _REPLACED:
        return SideFile(name, size, _REPLACED[name])
    if name.endswith((*PICKLES, *OTHER_WEIGHTS)):
        return SideFile(name, size, "weights of another format, or a file that the index does not name")
    if name.endswith(".index.json"):
        return SideFile(name, size, "the index of weights of another format")
    if name.endswith(".py") and not remote_code:
        return SideFile(name, size, "code that no config of the base uses")
    inner_path(folder, name)
    return SideFile(name, size)
