"""Weights in pickle files, read without running what is in them, and written out as safetensors.

torch unpickles with `weights_only`, which admits tensors and plain containers and calls nothing else. One file is
open at a time, mapped and not read, so that memory follows the largest tensor.
"""

from __future__ import annotations

import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint.dtypes import BITS, SAFETENSORS_NAMES
from surgery.checkpoint.expressions import TensorSpec
from surgery.checkpoint.layout import header_bytes
from surgery.checkpoint.private import copy_small_files, private_folder
from surgery.checkpoint.reader import INDEX, SINGLE, contained, read_json, reading_errors
from surgery.checkpoint.writer import environment_errors
from surgery.errors import CorruptCheckpoint, UnsafeCheckpoint

if TYPE_CHECKING:
    from torch import Tensor

PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"


def has_only_pickles(folder: Path) -> bool:
    """Whether a folder's weights are there as pickle files, and not as safetensors."""
    there = {name: (folder / name).exists() for name in (SINGLE, INDEX, PICKLE, PICKLE_INDEX)}
    return (there[PICKLE] or there[PICKLE_INDEX]) and not (there[SINGLE] or there[INDEX])


def as_safetensors(folder: Path) -> Path:
    """A private copy of a checkpoint folder with its pickled weights as safetensors.

    Raises UnsafeCheckpoint (a pickle that wants more than tensors), CorruptCheckpoint, DiskFull.
    """
    with reading_errors(folder):
        config = read_json(folder, "config.json")
        tied = isinstance(config, dict) and config.get("tie_word_embeddings") is True
        names = pickle_names(folder)
        target = private_folder()
        copy_small_files(folder, target)
    count = len(names)
    weight_map: dict[str, str] = {}
    for number, name in enumerate(names, 1):
        shard = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        tensors = _load(contained(folder, name), tied=tied)
        _save(tensors, target / shard)
        # The time of the original, so that an interrupted conversion knows its base again.
        os.utime(target / shard, ns=(0, contained(folder, name).stat().st_mtime_ns))
        twice = next((key for key in tensors if key in weight_map), None)
        if twice is not None:
            raise CorruptCheckpoint(
                f"tensor {twice!r} is in two files", cause=f"{weight_map[twice]} and {shard}",
                remedy="download the checkpoint again",
            )  # fmt: skip
        weight_map.update(dict.fromkeys(tensors, shard))
    if count > 1:
        (target / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return target


def pickle_names(folder: Path) -> list[str]:
    """The pickle files of a checkpoint, in order. Raises CorruptCheckpoint for an index that is none."""
    if (folder / PICKLE).exists():
        return [PICKLE]
    index = read_json(folder, PICKLE_INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CorruptCheckpoint(
            f"{PICKLE_INDEX} has no usable weight_map", cause="it must map tensor names to file names",
            remedy="download the index again",
        )  # fmt: skip
    return sorted(set(weight_map.values()))


def _load(path: Path, *, tied: bool) -> dict[str, Tensor]:
    """The tensors of one file, widest elements first, without the copy of a tied weight."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old formats; what cannot be read is told below
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpoint(
            f"{path.name} holds more than tensors", cause="loading it would run code of its own; nothing was run",
            remedy="do not use this file; look for a safetensors version of the checkpoint",
        ) from error  # fmt: skip
    except Exception as error:  # a broken archive makes torch raise almost anything
        raise CorruptCheckpoint(
            f"{path.name} cannot be read", cause=f"{type(error).__name__} while torch read it",
            remedy="download the file again",
        ) from error  # fmt: skip
    tensors = _plain_tensors(found, path.name)
    copies = _tied_copies(tensors) if tied else set()
    kept = {name: tensor for name, tensor in tensors.items() if name not in copies}
    return dict(sorted(kept.items(), key=lambda item: -BITS[_dtype(item[1])]))


def _plain_tensors(found: Any, file: str) -> Mapping[str, Tensor]:
    import torch

    problem = ""
    if not isinstance(found, dict):
        problem = f"it holds a {type(found).__name__}, not a map of tensors"
    else:
        for name, value in found.items():
            if not isinstance(name, str) or not isinstance(value, torch.Tensor):
                problem = f"under {ascii(name)[:80]} it holds a {type(value).__name__}"
            elif value.layout is not torch.strided or value.is_quantized or value.is_meta or not _dtype(value):
                problem = f"the tensor {ascii(name)[:80]} is of a kind that safetensors does not have"
    if problem:
        raise CorruptCheckpoint(
            f"{file} is no plain map of tensors",
            cause=problem,
            remedy="look for a safetensors version of the checkpoint",
        )
    return {name: tensor.detach() for name, tensor in found.items()}


def _tied_copies(tensors: Mapping[str, Tensor]) -> set[str]:
    """Output embeddings that are the very memory of another tensor; loaders make them from that one."""
    places: dict[tuple[int, tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            places.setdefault((tensor.data_ptr(), tuple(tensor.shape), tensor.stride()), []).append(name)
    return {name for names in places.values() if len(names) > 1 for name in names if name.endswith("lm_head.weight")}


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    from surgery.checkpoint.evaluate import to_bytes

    specs = {name: TensorSpec(_dtype(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()}
    with environment_errors(path), path.open("wb") as file:
        file.write(header_bytes(specs))
        for tensor in tensors.values():
            file.write(to_bytes(tensor))


def _dtype(tensor: Tensor) -> str:
    """The safetensors name of a tensor's type, or nothing where it has none."""
    return SAFETENSORS_NAMES.get(str(tensor.dtype).removeprefix("torch."), "")
