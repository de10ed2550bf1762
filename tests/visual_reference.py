"""What the tests of visual pruning hold it against: a stock model that sees everything under a mask, and brute force.

Nothing here uses the code under test, except `convert` and what loads a result.
"""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from shutil import copytree
from typing import Any

import torch
from torch import Tensor

import surgery
from tests.tiny_vision import IMAGE, VIDEO

SCORER = {"width": 32, "heads": 2, "layers": 1}
WEIGHTS = "model-scorer.safetensors"
UNWANTED = [2, 5, 6, 7, 8]  # ends, and what stands for images
PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids")


def convert(base: Path, out: Path, **settings: Any) -> Path:
    data = {"surgery": 1, "operations": [{"visual_pruning": settings}], "verify": False}
    return surgery.convert(str(base), out, surgery.manifest_from_dict(data)).out


def prefix(config: dict[str, Any]) -> str:
    """What the names of a scorer's tensors begin with: where `AutoModel` finds those of the base too."""
    return "visual_scorer." if config["surgery"]["base_model_type"] in {"qwen2_vl", "qwen2_5_vl"} else "model.visual_scorer."


def with_scorer(plain: Path, out: Path, *, seed: int = 0, leave_out: str = "") -> Path:
    """A copy of a result with the weights of a scorer, random ones, as if it had been trained."""
    from safetensors.torch import load_file, save_file

    from surgery.operations.visual_pruning import Scorer, scorer_shapes

    copytree(plain, out)
    config = json.loads((out / "config.json").read_text())
    config["surgery"]["visual_pruning"]["scorer"] = SCORER
    (out / "config.json").write_text(json.dumps(config))
    draw = torch.Generator().manual_seed(seed)
    shapes = scorer_shapes(64, Scorer(**SCORER))
    found = {prefix(config) + name: torch.randn(shape, generator=draw) / 3 for name, shape in shapes.items()}
    found = {name: tensor for name, tensor in found.items() if not leave_out or leave_out not in name}
    files = sorted(out.glob("*.safetensors"))
    assert len(files) == 1
    save_file(load_file(files[0]) | found, files[0], metadata={"format": "pt"})
    index = out / "model.safetensors.index.json"
    if index.exists():
        data = json.loads(index.read_text())
        data["weight_map"] |= dict.fromkeys(found, files[0].name)
        index.write_text(json.dumps(data))
    return out


def load(folder: Path, attention: str = "sdpa", **options: Any) -> Any:
    from transformers import AutoModelForImageTextToText

    options = {"trust_remote_code": True, "attn_implementation": attention} | options
    return AutoModelForImageTextToText.from_pretrained(folder, **options).eval()


def placeholders(ids: Tensor) -> Tensor:
    return (ids == IMAGE) | (ids == VIDEO)


def runs(row: list[bool]) -> list[list[int]]:
    """Columns of each stretch of True."""
    found: list[list[int]] = []
    for at, here in enumerate(row):
        if here and at and row[at - 1]:
            found[-1].append(at)
        elif here:
            found.append([at])
    return found


def quota(count: int, reserve: float, least: int = 1) -> int:
    """The share rounded up, of the fraction that its decimal digits say."""
    return min(count, max(least, math.ceil(Fraction(repr(reserve)) * count)))


def kept_mask(kept: Tensor, length: int) -> Tensor:
    """`kept_indices` [B, L'] -> bool [B, L]."""
    keep = torch.zeros(len(kept), length, dtype=torch.bool)
    for row, columns in enumerate(kept.tolist()):
        keep[row, [at for at in columns if at >= 0]] = True
    return keep


def masked(base: Any, batch: dict[str, Tensor], keep: Tensor) -> Tensor:
    """Logits [B, L, V] of a stock model that reads everything, and whose queries see only keys in `keep` [B, L]."""
    length = keep.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & keep[:, None, :]
    seen = seen | torch.eye(length, dtype=torch.bool)
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]

    def put_in(_module: Any, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"attention_mask": mask}

    handle = base.model.language_model.register_forward_pre_hook(put_in, with_kwargs=True)
    try:
        with torch.no_grad():
            logits: Tensor = base(**batch, use_cache=False).logits
            return logits
    finally:
        handle.remove()


def padded(batch: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """More padding on the left."""
    more = {
        name: torch.cat([value.new_zeros(len(value), count), value], 1)
        for name, value in batch.items()
        if name in PER_TOKEN
    }
    return batch | more


def longer(batch: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """A batch with a token more in each row."""
    more = {"input_ids": tokens[:, None], "attention_mask": torch.ones(len(tokens), 1, dtype=torch.long)}
    more["mm_token_type_ids"] = torch.zeros_like(more["attention_mask"])
    return {name: torch.cat([old, more[name]], 1) if name in more else old for name, old in batch.items()}


def recomputed(base: Any, batch: dict[str, Tensor], keep: Tensor, count: int) -> Tensor:
    """Greedy tokens [B, count], for each of which the stock model reads everything again under the mask."""
    found = []
    for _ in range(count):
        logits = masked(base, batch, keep)[:, -1]
        logits[:, UNWANTED] = float("-inf")
        found.append(logits.argmax(-1))
        batch = longer(batch, found[-1])
        keep = torch.cat([keep, torch.ones(len(keep), 1, dtype=torch.bool)], 1)
    return torch.stack(found, 1)


def entering(base: Any, batch: dict[str, Tensor]) -> Tensor:
    """What a stock model gives its language model, [B, L, D]."""
    found = []

    def look(_module: Any, _args: Any, kwargs: Any) -> None:
        found.append(kwargs["inputs_embeds"])

    handle = base.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        base(**batch)
    handle.remove()
    return found[0]


def sorted_best(scores: list[float], count: int) -> list[int]:
    """Of equal scores the first."""
    return sorted(sorted(range(len(scores)), key=lambda at: (-scores[at], at))[:count])


def greedy_dpp(visual: Tensor, count: int) -> list[int]:
    """Greedily the set whose kernel has the largest determinant, by a determinant for every candidate, in float64."""
    visual = visual.double()
    salience = torch.stack([(token - visual.mean(0)).norm() for token in visual])
    kernel = torch.cosine_similarity(visual[:, None], visual[None], dim=-1) * salience.outer(salience).sqrt()
    kernel = kernel / salience.max()  # so that its determinants are none too small to tell
    chosen: list[int] = []
    size, least = 0.0, 1e-4  # what differs by this share alone is equal
    for _ in range(count):
        left = [at for at in range(len(visual)) if at not in chosen]
        sizes = [float(torch.linalg.slogdet(kernel[[*chosen, at]][:, [*chosen, at]])[1]) for at in left]
        gains = [math.exp(found - size) for found in sizes]
        gains = [gain if gain > least * kernel[at, at] else 0.0 for at, gain in zip(left, gains, strict=True)]
        best = next(number for number, gain in enumerate(gains) if gain >= (1 - least) * max(gains))
        if not gains[best]:  # no token adds anything
            return sorted([*chosen, *left[: count - len(chosen)]])
        chosen.append(left[best])
        size = sizes[best]
    return sorted(chosen)
