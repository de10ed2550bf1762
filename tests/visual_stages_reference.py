"""What tests of stages hold results against: a stock model that reads everything, whose layers have a mask each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import torch
from torch import Tensor

from tests.visual_reference import SCORER, UNWANTED, longer, placeholders, prefix, quota, runs

Pick = Callable[[int, Tensor, Tensor, int], Any]  # layer, visual [V, D], text [T, D], how many -> indices


def layered(base: Any, batch: dict[str, Tensor], keeps: dict[int, Tensor], choose: Any = None) -> Tensor:
    """Logits [B, L, V] where queries of a layer see the keys that the last `keeps` before it has, bool [B, L].

    For a layer where that is None, `choose` says it from the states before the layer.
    """
    length, handles = batch["input_ids"].shape[1], []

    def put_in(index: int) -> Any:
        def before(_layer: Any, args: Any, kwargs: Any) -> Any:
            if index in keeps and keeps[index] is None:
                keeps[index] = choose(index, args[0])
            seen = [keeps[layer] for layer in keeps if layer <= index]
            keep = seen[-1] if seen else batch["attention_mask"].bool()
            visible = torch.ones(length, length, dtype=torch.bool).tril() & keep[:, None]
            visible = visible | torch.eye(length, dtype=torch.bool)
            mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
            return args, {**kwargs, "attention_mask": mask[:, None]}

        return before

    for index, layer in enumerate(base.model.language_model.layers):
        handles.append(layer.register_forward_pre_hook(put_in(index), with_kwargs=True))
    try:
        with torch.no_grad():
            logits: Tensor = base(**batch, use_cache=False).logits
            return logits
    finally:
        for handle in handles:
            handle.remove()


def layered_greedy(base: Any, batch: dict[str, Tensor], keeps: dict[int, Tensor], count: int) -> Tensor:
    """Greedy tokens [B, count], for each of which the stock model reads everything again under the masks."""
    found = []
    for _ in range(count):
        logits = layered(base, batch, keeps)[:, -1]
        logits[:, UNWANTED] = float("-inf")
        found.append(logits.argmax(-1))
        batch = longer(batch, found[-1])
        one = torch.ones(len(logits), 1, dtype=torch.bool)
        keeps = {layer: torch.cat([keep, one], 1) for layer, keep in keeps.items()}
    return torch.stack(found, 1)


def descended(base: Any, batch: dict[str, Tensor], stages: dict[int, float], pick: Pick) -> dict[int, Tensor]:
    """What is seen from each stage on, bool [B, L], where at each `pick` chooses of what is left of every image."""
    ids, valid = batch["input_ids"], batch["attention_mask"].bool()
    visual, keeps = placeholders(ids), dict.fromkeys(stages)

    def choose(layer: int, states: Tensor) -> Tensor:
        before = [keeps[other] for other in stages if other < layer]
        keep = (before[-1] if before else valid).clone()
        for row in range(len(ids)):
            text = states[row, valid[row] & ~visual[row]]
            for image in runs(visual[row].tolist()):
                here = [at for at in image if keep[row, at]]
                chosen = pick(layer, states[row, here], text, quota(len(image), stages[layer]))
                keep[row, image] = False
                keep[row, [here[at] for at in chosen]] = True
        return keep

    layered(base, batch, keeps, choose)
    return keeps


def cached(batch: dict[str, Tensor], keeps: dict[int, Tensor], layers: int) -> list[int]:
    """Columns that each layer has to cache of a batch: those of its longest row."""
    found = []
    for index in range(layers):
        seen = [keep for layer, keep in keeps.items() if layer <= index]
        found.append(int((seen[-1] if seen else batch["attention_mask"]).sum(1).max()))
    return found


def with_scorers(plain: Path, out: Path) -> Path:
    """A copy of a result with scorers of random weights, one for each stage, as if they had been trained."""
    from safetensors.torch import load_file, save_file

    from surgery.operations.visual_pruning import Scorer, scorer_shapes

    copytree(plain, out)
    config = json.loads((out / "config.json").read_text())
    settings = config["surgery"]["visual_pruning"]
    settings["scorer"] = SCORER
    (out / "config.json").write_text(json.dumps(config))
    draw = torch.Generator().manual_seed(0)
    found = {
        f"{prefix(config)}{layer}.{name}": torch.randn(shape, generator=draw) / 3
        for layer in settings["stages"] for name, shape in scorer_shapes(64, Scorer(**SCORER)).items()
    }  # fmt: skip
    (file,) = out.glob("*.safetensors")
    save_file(load_file(file) | found, file, metadata={"format": "pt"})
    return out
