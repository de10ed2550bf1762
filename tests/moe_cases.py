"""What the tests of the operations on experts share: conversions of tiny bases with eight experts, loaded and run.

`expected` says from the base's bytes alone, by the names of the Hub, what every tensor of a result must be.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import surgery
from tests.tiny import MOE_FAMILIES, write_tiny
from tests.tiny_moe import MOE_ONLY

ALL = (*MOE_FAMILIES, *MOE_ONLY)
COUNT = 8
# Not in order, and of another length in each layer where a stock class could not hold it.
KEEPS = {"uniform": [[7, 0, 3, 2, 5], [1, 2, 4, 6, 7]], "per_layer": [[1, 3, 4, 6, 7], [5, 0, 2]]}
# Two groups of four, of which a token takes one.
GROUPED = {
    "deepseek_v2": {"topk_method": "group_limited_greedy", "q_lora_rank": 24, "n_group": 2, "topk_group": 1},
    "deepseek_v3": {"n_group": 2, "topk_group": 1},
    "glm4_moe": {"n_group": 2, "topk_group": 1},
}
GROUPED_KEEPS = {"uniform": [[0, 1, 3, 7, 6, 4], [1, 2, 3, 4, 5, 7]], "per_layer": [[0, 1, 3, 4, 6, 7], [1, 2, 5, 7]]}

Raw = dict[str, tuple[str, tuple[int, ...], bytes]]


def base_of(folder: Path, family: str, **overrides: Any) -> Path:
    return write_tiny(folder, family, **{"seed": 3, "experts": COUNT, "top_k": 2} | overrides)


def convert(base: Path, out: Path, *operations: dict[str, Any]) -> Path:
    data = {"surgery": 1, "operations": list(operations), "verify": False}
    return surgery.convert(str(base), out, surgery.manifest_from_dict(data)).out


def prune(keep: Any, **settings: Any) -> dict[str, Any]:
    return {"expert_prune": {"keep": keep, **settings}}


def top_k(count: Any) -> dict[str, Any]:
    return {"expert_top_k": {"top_k": count}}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def code_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.py")}


def by_layer(keep: list[list[int]], layers: list[int] | None = None) -> dict[int, list[int]]:
    """{decoder layer: ids in the order in which they must be stored}."""
    return {layer: sorted(ids) for layer, ids in zip(layers or range(len(keep)), keep, strict=True)}


def load(folder: Path, *, ignored: str = "", told: str = "", **kwargs: Any) -> Any:
    """The model, whole and without a word from transformers.

    Unexpected keys that match `ignored` are no fault, nor are log lines that match `told`.
    """
    import transformers

    with logged() as lines:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=bool(code_of(folder)), output_loading_info=True, **kwargs
        )
    found = {kind: [key for key in map(str, keys) if not (ignored and kind == "unexpected_keys" and re.match(ignored, key))]
             for kind, keys in report.items()}  # fmt: skip
    assert set(found) >= {"missing_keys", "unexpected_keys", "mismatched_keys"}
    assert {kind: keys for kind, keys in found.items() if keys} == {}
    if ignored:  # told of in one line with the table of keys
        lines = [line for line in lines if "LOAD REPORT" not in line]
    assert [line for line in lines if not (told and re.search(told, line))] == []
    return model.eval()


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    """What transformers logs as a warning or worse meanwhile."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    listener, library = Listener(logging.WARNING), logging.getLogger("transformers")
    library.addHandler(listener)
    try:
        yield lines
    finally:
        library.removeHandler(listener)


def tokens(count: int = 40, rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 128, (rows, count), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)


def differs(found: torch.Tensor, other: torch.Tensor) -> bool:
    """By so much that `close` is no accident."""
    return (found - other).abs().max().item() > 0.05


def raw(folder: Path) -> Raw:
    """Type, shape and bytes of every tensor, read without a library."""
    found: Raw = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        for name, at in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = (8 + length + offset for offset in at["data_offsets"])
                assert name not in found
                found[name] = at["dtype"], tuple(at["shape"]), data[start:end]
    return found


SEPARATE = re.compile(r"(model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.)(\d+)(\..+)")
# Experts on the first axis, and routers: one slice or row each.
STACKED = re.compile(
    r"model\.layers\.(\d+)\.(?:mlp\.(?:experts\.(?:gate_up|down)_proj.*|(?:gate|router)\.\w+)"
    r"|block_sparse_moe\.(?:input_linear|output_linear|router\.layer|gate)\.weight)"
)


def expected(base: Path, kept: dict[int, list[int]]) -> Raw:
    """The tensors of a result in which the experts `kept[layer]` stay."""
    found: Raw = {}
    for name, (dtype, shape, data) in raw(base).items():
        one, stacked = SEPARATE.fullmatch(name), STACKED.fullmatch(name)
        if one and int(one[2]) in kept:
            ids = kept[int(one[2])]
            if int(one[3]) in ids:
                found[f"{one[1]}{ids.index(int(one[3]))}{one[4]}"] = dtype, shape, data
        elif stacked and int(stacked[1]) in kept:
            ids, width = kept[int(stacked[1])], len(data) // shape[0]
            rows = b"".join(data[expert * width : (expert + 1) * width] for expert in ids)
            found[name] = dtype, (len(ids), *shape[1:]), rows
        else:
            found[name] = dtype, shape, data
    return found
