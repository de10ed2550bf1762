"""What the benchmark of compressed caches runs in a process of its own: a model, a way to hold its cache, what is left.

    python tools/kv.py SPEC.json < jobs > answers      a job and an answer a line, both JSON

It imports torch and transformers only, and kvpress where a job asks for it, so that it runs in the Python that
tools/kvpress made as well as in ours. Every method answers the same items: ids that are prefilled at once, then ids
that are fed one by one through what the method left of the cache. What a method says is held against the stock cache
in the same process, in the same arithmetic.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib.metadata
import json
import resource
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

PACKAGES = ("torch", "transformers", "kvpress", "hqq", "optimum-quanto")
WARM_UP = 4


# The logits after a prompt, the cache, and its bytes.
Prefilled = tuple[tuple[Tensor, Any], dict[str, int]]
# What a method may say no with; anything else is a fault of this file.
NO = (AssertionError, AttributeError, ImportError, NotImplementedError, RuntimeError, TypeError, ValueError)


@dataclass
class Worker:
    """Models by folder, items by task, and what the stock cache said about them."""

    base: str
    dtype: torch.dtype
    tasks: dict[str, list[dict[str, Any]]]
    ours: str | None = None
    models: dict[str, Any] = field(default_factory=dict)
    expected: dict[str, list[Tensor]] = field(default_factory=dict)

    def model(self, method: dict[str, Any], *, timed: bool = False) -> Any:
        """The checkpoint that a method runs on: its own for ours, the base for all others."""
        folder = str(self.ours) if method["family"] == "ours" else self.base
        if folder not in self.models:
            own = {"trust_remote_code": True} if folder == self.ours else {}
            self.models[folder] = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype, **own).eval()
            if not timed:
                widen(self.models[folder])
        return self.models[folder]

    def measure(self, task: str, method: dict[str, Any], batch: int) -> dict[str, Any]:
        """By item: KL to the stock cache, log-likelihood and agreement per token, and whether the answer is right."""
        if task not in self.expected:
            self.expected[task] = self._said(task, {"family": "stock"}, batch)[0]
        said, sizes = self._said(task, method, batch)
        found: dict[str, Any] = {"kl": [], "nll": [], "agreement": [], "right": []}
        for item, got, expected in zip(self.tasks[task], said, self.expected[task], strict=True):
            targets = torch.tensor(item["continuation"][item["start"] :])
            best = got.argmax(-1)
            found["kl"].append(float((expected.exp() * (expected - got)).sum(-1).mean()))
            found["nll"].append(-float(got.gather(-1, targets[:, None]).mean()))
            found["agreement"].append(float((best == expected.argmax(-1)).float().mean()))
            # Fed with the right tokens, it is right everywhere exactly if greedy decoding gives the whole answer.
            found["right"].append(int(bool((best == targets).all())))
        return {**sizes, **found}

    def sizes(self, task: str, method: dict[str, Any], items: int) -> dict[str, Any]:
        """Bytes alone, of so many prompts, no two alike and from all over the task."""
        prompts = [*{tuple(item["prefill"]): item for item in self.tasks[task]}.values()]
        step = max(len(prompts) // items, 1)
        held = [self._prefilled(method, [item])[1] for item in prompts[::step][:items]]
        return summed(held)

    def _said(self, task: str, method: dict[str, Any], batch: int) -> tuple[list[Tensor], dict[str, Any]]:
        """Log-probabilities at the judged tokens of each item, and the bytes of all caches."""
        items = self.tasks[task]
        found: list[Tensor | None] = [None] * len(items)
        held = []
        for sharing in shared(items, batch):
            (first, cache), sizes = self._prefilled(method, [items[place] for place in sharing[0]])
            held.append(sizes)
            # Questions that come after one and the same prompt have a copy of its cache each.
            for places in sharing:
                rows = [items[place] for place in places]
                own = cache if places is sharing[-1] else copy.deepcopy(cache)
                for row, place, item in zip(self._continued(method, own, first, rows), places, rows, strict=True):
                    judged = row[item["start"] : len(item["continuation"])]
                    found[place] = judged.float().log_softmax(-1)
        return [each for each in found if each is not None], summed(held)

    def _prefilled(self, method: dict[str, Any], rows: list[dict[str, Any]]) -> Prefilled:
        """The logits after the prompt, the cache as the method leaves it, and its bytes beside the stock cache's."""
        model = self.model(method)
        ids = torch.tensor([row["prefill"] for row in rows])
        logits, cache, masked = prefill(model, ids, method)
        stock = stock_bytes(model, ids, self.dtype)
        sizes = {"bytes": cache_bytes(cache, model) - masked, "stock_bytes": stock}
        if method["family"] == "ours":
            told = model.surgery_cache_report(cache)
            sizes |= {"told_bytes": told["bytes"], "told_stock_bytes": told["stock_bytes"]}
        return (logits, cache), sizes

    def _continued(self, method: dict[str, Any], cache: Any, first: Tensor, rows: list[dict[str, Any]]) -> Tensor:
        """[batch, position, vocabulary]: what stands at a position is what was expected there."""
        model, at = self.model(method), len(rows[0]["prefill"])
        # Shorter ones are filled up behind their end, which no judged token sees.
        longest = max(len(row["continuation"]) for row in rows)
        ids = torch.tensor([row["continuation"] + [0] * (longest - len(row["continuation"])) for row in rows])
        after = [decode(model, cache, ids[:, step : step + 1], at + step) for step in range(longest - 1)]
        return torch.stack([first, *after], 1)

    def speed(self, method: dict[str, Any], length: int, tokens: int) -> dict[str, Any]:
        """Tokens per second after a prompt of random ids, and the most memory that this process ever took."""
        model = self.model(method, timed=True)
        torch.manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (1, length + WARM_UP + tokens))
        started = time.perf_counter()
        _, cache, masked = prefill(model, ids[:, :length], method)
        filled = time.perf_counter() - started
        gc.collect()
        stock = stock_bytes(model, ids[:, :length], self.dtype)
        sizes = {"bytes": cache_bytes(cache, model) - masked, "stock_bytes": stock}
        seconds = []
        for at in range(length, length + WARM_UP + tokens):
            started = time.perf_counter()
            decode(model, cache, ids[:, at : at + 1], at)
            seconds.append(time.perf_counter() - started)
        timed = sorted(seconds[WARM_UP:])
        return {
            **sizes,
            "ratio": sizes["bytes"] / sizes["stock_bytes"],
            "prefill_seconds": filled,
            "decode_tokens_per_second": tokens / sum(timed),
            "median_tokens_per_second": 1 / timed[len(timed) // 2],
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def widen(model: nn.Module) -> None:
    """Multiply in float32 and round to the model's type: that is what sums mean there, and far quicker on most CPUs."""

    def multiply(layer: nn.Linear, x: Tensor) -> Tensor:
        bias = None if layer.bias is None else layer.bias.float()
        return nn.functional.linear(x.float(), layer.weight.float(), bias).to(x.dtype)

    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(multiply, module)


def batches(items: Sequence[dict[str, Any]], size: int) -> Iterator[list[int]]:
    """Places of items that can be prefilled together, being of one length."""
    by_length: dict[int, list[int]] = {}
    for place, item in enumerate(items):
        by_length.setdefault(len(item["prefill"]), []).append(place)
    for places in by_length.values():
        yield from (places[start : start + size] for start in range(0, len(places), size))


def shared(items: Sequence[dict[str, Any]], size: int) -> Iterator[list[list[int]]]:
    """Batches of places; those that come together have the same prompts."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for place, item in enumerate(items):
        by_prompt.setdefault(tuple(item["prefill"]), []).append(place)
    if max(map(len, by_prompt.values())) == 1:
        yield from ([places] for places in batches(items, size))
    else:
        yield from ([[place] for place in places] for places in by_prompt.values())


def summed(held: list[dict[str, int]]) -> dict[str, Any]:
    """Bytes of many caches together, and their ratio."""
    total: dict[str, Any] = {name: sum(each[name] for each in held) for name in held[0]}
    return {**total, "ratio": total["bytes"] / total["stock_bytes"]}


@torch.no_grad()
def prefill(model: Any, ids: Tensor, method: dict[str, Any]) -> tuple[Tensor, Any, int]:
    """The last logits, the cache, and how many of its bytes are only masked where a real implementation drops them."""
    # Attention of kvpress keeps what was masked for the prompt before until it sees another one.
    for module in model.modules():
        if getattr(module, "masked_key_indices", None) is not None:
            module.masked_key_indices = None
    cache = empty_cache(model, ids, method)
    with press_of(method)(model) if "press" in method else contextlib.nullcontext():
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    masked = sum(
        len(module.masked_key_indices[0])
        for module in model.modules()
        if getattr(module, "masked_key_indices", None) is not None
    )
    return out.logits[:, -1], out.past_key_values, masked * entry_bytes(model)


@torch.no_grad()
def decode(model: Any, cache: Any, ids: Tensor, at: int) -> Tensor:
    """The logits after one token. Its position is told, because a cache that was cut knows only what is left."""
    position = torch.full_like(ids, at)
    return model(input_ids=ids, past_key_values=cache, position_ids=position, use_cache=True).logits[:, -1]


def empty_cache(model: Any, ids: Tensor, method: dict[str, Any]) -> Any:
    """What the prompt is written into."""
    if method["family"] == "ours":
        return model.surgery_cache(prompt_length=ids.shape[1], **method["settings"])
    if "cache" in method:
        from transformers import QuantizedCache

        return QuantizedCache(config=model.config, **method["cache"])
    return DynamicCache()


def press_of(method: dict[str, Any]) -> Any:
    """A press of kvpress; a name of two, such as AdaKV(SnapKV), wraps the second into the first."""
    import kvpress

    outer, _, inner = method["press"].rstrip(")").partition("(")
    scorer = getattr(kvpress, f"{inner or outer}Press")(
        compression_ratio=method["compression_ratio"], **method.get("settings", {})
    )
    return getattr(kvpress, f"{outer}Press")(scorer) if inner else scorer


def head_width(model: Any) -> int:
    """Numbers in one key."""
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def entry_bytes(model: Any) -> int:
    """A key and a value of one head in the stock cache."""
    return 2 * head_width(model) * model.dtype.itemsize


def stock_bytes(model: Any, ids: Tensor, dtype: torch.dtype) -> int:
    """What the stock cache holds for these prompts."""
    config = model.config
    heads = config.num_hidden_layers * config.num_key_value_heads
    return ids.numel() * heads * 2 * head_width(model) * dtype.itemsize


def cache_bytes(cache: Any, model: nn.Module) -> int:
    """Bytes of every storage that can be reached from a cache, each once, but for those of the model's own weights."""
    own = {each.untyped_storage().data_ptr() for each in [*model.parameters(), *model.buffers()]}
    seen: set[int] = set()
    storages: dict[int, int] = {}
    waiting = [cache]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (nn.Module, type, ModuleType, FunctionType, MethodType, str, bytes)):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            inner = getattr(value, "__tensor_flatten__", None)
            if inner is not None and type(value) is not Tensor:
                waiting += [getattr(value, name) for name in inner()[0]]
                continue
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += value
        else:
            waiting += vars(value).values() if hasattr(value, "__dict__") else ()
            names = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
            waiting += [getattr(value, name) for name in names if hasattr(value, name)]
    return sum(size for pointer, size in storages.items() if pointer not in own)


def versions() -> dict[str, str]:
    """Of what has a part in the figures."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def answer(worker: Worker, job: dict[str, Any]) -> dict[str, Any]:
    """Do a job; what a method cannot do is an answer too."""
    kind = job.pop("kind")
    if kind == "versions":
        return versions()
    try:
        return getattr(worker, kind)(**job)
    except NO as error:
        return {"refused": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"}


def main() -> None:
    """Answer jobs until there are no more."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["threads"])
    warnings.simplefilter("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    if spec.get("kvpress"):
        # Its import makes attention aware of masked keys, for models that are loaded before or after.
        import kvpress  # noqa: F401
    worker = Worker(spec["base"], getattr(torch, spec["dtype"]), spec["tasks"], spec.get("ours"))
    for line in sys.stdin:
        print(json.dumps(answer(worker, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
