"""What results under M-RoPE are held against: stock models whose own rotation turns what is left of keys.

Nothing here uses surgery, so it runs beside any release of transformers.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

LOSSLESS = {"method": "solved", "reserve_ratio": 1.0, "theta_k": 1.0, "theta_v": 1.0, "bits": 16}
UNWANTED = [2, 5, 6, 7, 8]  # ends, and what stands for images
Batch = dict[str, Tensor]


def understood(model: Any, batch: Batch) -> Batch:
    """Those of the inputs that the installed release takes."""
    takes = inspect.signature(model.forward).parameters
    return {name: value for name, value in batch.items() if name in takes}


def layers_of(model: Any) -> Any:
    return [layer.self_attn for layer in model.model.language_model.layers]


class Masked(nn.Module):
    """A norm over each head, [B, T, G, d], after which only some channels of each head are left."""

    def __init__(self, norm: nn.Module, keep: Tensor) -> None:
        super().__init__()
        self.norm, self.keep = norm, keep

    def forward(self, states: Tensor) -> Tensor:
        found: Tensor = self.norm(states) * self.keep
        return found


@torch.no_grad()
def widened(stock: Any, folder: Path) -> Any:
    """A stock model as wide as the base, with the projections of a `kv_latent` result in `folder`, zeros beside them."""
    model, latent = deepcopy(stock), latent_settings(folder)
    stored: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    for index, (attention, layer) in enumerate(zip(layers_of(model), latent["layers"], strict=True)):
        prefix = next(name for name in stored if f".layers.{index}.self_attn.q_proj" in name).partition("q_proj")[0]
        width, pairs = attention.head_dim, torch.tensor(layer["rope_pairs"])
        groups = len(pairs)
        channels = torch.cat([pairs, pairs + width // 2], 1)
        assert abs(layer["scaling"] - attention.scaling) < 1e-9
        if latent["select_after_norm"]:
            keep = torch.zeros(groups, width).scatter_(1, channels, 1.0)
            attention.k_norm = Masked(attention.k_norm, keep)
        for name in ("q_proj", "k_proj", "v_proj"):
            module = getattr(attention, name)
            for kind in ("weight", "bias"):
                rows = stored.get(f"{prefix}{name}.{kind}")
                if rows is None:
                    continue
                heads = module.weight.shape[0] // width
                rows = rows.unflatten(0, (heads, -1))
                wide = rows.new_zeros(heads, width, *rows.shape[2:])
                if name == "v_proj" or latent["select_after_norm"]:
                    wide[:, : rows.shape[1]] = rows
                else:
                    for head in range(heads):
                        wide[head, channels[head * groups // heads]] = rows[head]
                getattr(module, kind).copy_(wide.flatten(0, 1))
        heads = attention.q_proj.weight.shape[0] // width
        columns = stored[f"{prefix}o_proj.weight"].unflatten(1, (heads, -1))
        wide = columns.new_zeros(len(columns), heads, width)
        wide[..., : columns.shape[-1]] = columns
        attention.o_proj.weight.copy_(wide.flatten(1))
        if f"{prefix}o_proj.bias" in stored:
            attention.o_proj.bias = nn.Parameter(stored[f"{prefix}o_proj.bias"])
    return model


def latent_settings(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    found: dict[str, Any] = config["text_config"]["surgery"]["latent_attention"]
    return found


def held(cache: Any, index: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a coded cache has of layer `index`, by column: keys and values [B, G, S, d], and which there are [B, G, S]."""
    layer = cache.stored[index]
    batch, groups = layer.key.shape[:2]
    key, value = torch.zeros(batch, groups, layer.seen, width), torch.zeros(batch, groups, layer.seen, width)
    there = torch.zeros(batch, groups, layer.seen, dtype=torch.bool)
    for row in range(batch):
        for group in range(groups):
            head = layer.heads[row][group]
            raw = layer.position[row] >= 0
            for columns, keys, values in (
                (head.position, head.key.dense(), head.value.dense()),
                (layer.position[row][raw].long(), layer.key[row, group][raw], layer.value[row, group][raw]),
            ):
                key[row, group, columns], value[row, group, columns] = keys, values
                there[row, group, columns] = True
    return key, value, there


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def continued(stock: Any, batch: Batch, cache: Any, tokens: Tensor) -> Tensor:
    """Logits of `tokens` [B, T] after a prompt of which a stock model has what the coded `cache` holds.

    The stock model projects the prompt, its keys and values are replaced by the decoded ones, and it turns these itself.
    What was evicted is masked. Call it before the cache takes the tokens in.
    """
    attentions = layers_of(stock)
    states = [held(cache, index, attention.head_dim) for index, attention in enumerate(attentions)]

    def decoded(of: Tensor, _module: Any, _args: Any, out: Tensor) -> Tensor:
        return of.transpose(1, 2).reshape(out.shape)

    handles = []
    for attention, (key, value, _) in zip(attentions, states, strict=True):
        last = attention.k_norm if hasattr(attention, "k_norm") else attention.k_proj
        handles.append(last.register_forward_hook(partial(decoded, key)))
        handles.append(attention.v_proj.register_forward_hook(partial(decoded, value)))
    with hooked(handles):
        past = stock(**understood(stock, batch), use_cache=True).past_key_values
    inputs = after(stock, batch, tokens)

    def seen(there: Tensor, _module: Any, args: Any, kwargs: Any) -> Any:
        heads = stock.config.get_text_config().num_attention_heads
        own = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
        before = there.repeat_interleave(heads // there.shape[1], 1)[:, :, None].expand(-1, -1, len(own), -1)
        visible = torch.cat([before, own.expand(*before.shape[:2], -1, -1)], -1)
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        return args, kwargs | {"attention_mask": mask}

    pairs = zip(attentions, states, strict=True)
    handles = [at.register_forward_pre_hook(partial(seen, there), with_kwargs=True) for at, (*_, there) in pairs]
    with hooked(handles):
        logits: Tensor = stock(**inputs, past_key_values=past, use_cache=True).logits
    return logits


@torch.no_grad()
def after(model: Any, batch: Batch, tokens: Tensor) -> Batch:
    """Inputs for `tokens` [B, T] behind a prompt that is cached, whose positions go on after the prompt's highest."""
    found: list[Tensor] = []

    def look(_module: Any, _args: Any, kwargs: Any) -> None:
        found.append(kwargs["position_ids"][-3:])

    with hooked([model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)]):
        model(**understood(model, batch), use_cache=False)
    highest = found[0].masked_fill(batch["attention_mask"] == 0, 0).amax((0, 2))
    position = highest[:, None] + 1 + torch.arange(tokens.shape[1])
    mask = torch.cat([batch["attention_mask"], torch.ones_like(tokens)], 1)
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": position.expand(3, -1, -1)}


def longer(batch: Batch, tokens: Tensor) -> Batch:
    """A batch with `tokens` [B, T] at the end of the rows."""
    ones = torch.ones_like(tokens)
    more = {"input_ids": tokens, "attention_mask": ones, "mm_token_type_ids": 0 * ones}
    return {name: torch.cat([old, more[name]], 1) if name in more else old for name, old in batch.items()}


@torch.no_grad()
def recomputed(model: Any, batch: Batch, count: int) -> Tensor:
    """Greedy tokens [B, count], for each of which the model reads everything again."""
    found = []
    for _ in range(count):
        logits = model(**understood(model, batch), use_cache=False).logits[:, -1]
        logits[:, UNWANTED] = float("-inf")
        found.append(logits.argmax(-1))
        batch = longer(batch, found[-1][:, None])
    return torch.stack(found, 1)


@torch.no_grad()
def written(model: Any, batch: Batch, count: int, **options: Any) -> Tensor:
    """Greedy tokens [B, count] of `generate`."""
    options = {"do_sample": False, "max_new_tokens": count, "suppress_tokens": UNWANTED, "pad_token_id": 0} | options
    made: Tensor = model.generate(**understood(model, batch), **options)
    return made[:, batch["input_ids"].shape[1] :]


@torch.no_grad()
def distance(found: Any, expected: Any, batch: Batch) -> float:
    """The largest difference of two models' logits, padding aside."""
    logits = [model(**understood(model, batch)).logits[batch["attention_mask"].bool()] for model in (found, expected)]
    return float((logits[0] - logits[1]).abs().max())


def check_latent(stock: Any, model: Any, folder: Path, batches: dict[str, Batch], new: int = 4) -> dict[str, Any]:
    """What fails of: logits, and greedy tokens with a cache, are those of the stock model as wide as the base."""
    wide, failed = widened(stock, folder), {}
    for name, batch in batches.items():
        if not (far := distance(model, wide, batch)) <= 2e-5:
            failed[f"{name}: logits"] = far
        if distance(model, stock, batch) < 1e-2:
            failed[f"{name}: nothing is lost"] = 0
        if not torch.equal(written(model, batch, new), recomputed(wide, batch, new)):
            failed[f"{name}: written"] = new
    return failed


@torch.no_grad()
def check_coded(stock: Any, model: Any, batches: dict[str, Batch], new: int = 8) -> dict[str, Any]:
    """What fails of: where all is kept it is the stock model; coded, logits are those of what is decoded."""
    failed: dict[str, Any] = {}
    draw = torch.Generator().manual_seed(5)
    for name, batch in batches.items():
        expected = recomputed(stock, batch, new)
        for what, settings in {"stock cache": None, "lossless": LOSSLESS, "uncoded": {"min_prompt": 10_000}}.items():
            if not torch.equal(written(model, batch, new, surgery_cache=settings), expected):
                failed[f"{name}: {what}"] = settings
        tokens = torch.randint(10, 128, (len(batch["input_ids"]), 3), generator=draw)
        for what, settings in {"evicted": {"reserve_ratio": 0.3}, "rounded": {"reserve_ratio": 0.6, "bits": 4}}.items():
            cache = model.surgery_cache(**settings)
            model(**understood(model, batch), past_key_values=cache, use_cache=True)
            wanted = continued(stock, batch, cache, tokens)
            found = model(**after(model, batch, tokens), past_key_values=cache, use_cache=True).logits
            if not (far := float((found - wanted).abs().max())) <= 2e-5:
                failed[f"{name}: {what}"] = far
            exact = stock(**understood(stock, longer(batch, tokens))).logits[:, -3:]
            if float((found - exact).abs().max()) < 1e-2:
                failed[f"{name}: {what}: nothing is lost"] = 0
    return failed
