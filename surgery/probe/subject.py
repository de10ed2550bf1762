"""The model under test, how it is loaded, and the tokens it is tried on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from .noise import Noise

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
DEFAULT_PROMPTS = ("Once upon a time, there was a little girl who lived in a small house.", "The answer to this is")
LONGEST_PROMPT = 24

# Relative to the largest logit. One order above what summation order costs a model of 80 layers, three below a fault.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Where inputs are rounded to eight bits, a difference in the last place of a number may grow to one of a code.
ROUNDED_INPUTS = 5e-2


class Subject:
    """A job, its model once loaded, and prompts of two lengths, each of shape (1, tokens)."""

    def __init__(self, job: Mapping[str, Any], noise: Noise) -> None:
        self.noise = noise
        self.folder = Path(job["checkpoint"])
        self.config: dict[str, Any] = read_config(self.folder)
        self.job = job
        self.model: Any = None
        self.report: Mapping[str, Any] = {}
        self.tokenizer: Any = None
        self.prompts: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
        self.measurements: dict[str, float | int] = {}
        self.sample: dict[str, Any] | None = None
        self._variant: tuple[str, Any] = ("", None)

    def load(self) -> None:
        """Load the model; raises whatever from_pretrained raises."""
        self.model, self.report = load_model(self.folder, self.job)

    def prepare(self) -> None:
        """Load the tokenizer, where there is one, and choose prompts: real ones with it, else seeded random tokens."""
        self.prompts = self.random_tokens(13).to(self.device), self.random_tokens(7, seed=1).to(self.device)
        if not any((self.folder / name).is_file() for name in TOKENIZER_FILES):
            return
        trust = bool(self.job.get("trust_remote_code"))
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, trust_remote_code=trust)
        texts = list(self.job.get("prompts") or DEFAULT_PROMPTS)
        rows = [self.tokenizer(text, return_tensors="pt").input_ids[:, :LONGEST_PROMPT] for text in texts]
        short, long = sorted((rows[0], rows[-1]), key=lambda row: row.shape[1])
        if short.shape[1] == long.shape[1]:
            short = short[:, : -(-short.shape[1] // 2)]
        self.prompts = long.to(self.device), short.to(self.device)

    def random_tokens(self, count: int, *, seed: int = 0) -> Tensor:
        """`count` tokens that stand for text: none of the ids that config.json gives a meaning."""
        size = text_config(self.model.config).vocab_size
        taken = set(_special_ids(self.config))
        usable = torch.tensor([token for token in range(size) if token not in taken])
        generator = torch.Generator().manual_seed(int(self.job.get("seed", 0)) + seed)
        return usable[torch.randint(len(usable), (1, count), generator=generator)]

    def with_attention(self, name: str) -> Any:
        """The model with attention implementation `name`; the last one loaded is kept."""
        if self.model.config._attn_implementation == name:  # noqa: SLF001 - the only spelling all versions share
            return self.model
        if self._variant[0] != name:
            self.release()
            model, _ = load_model(self.folder, self.job, attention=name)
            loaded = model.config._attn_implementation  # noqa: SLF001
            if loaded != name:
                raise ValueError(f"attention {name!r} was asked for, {loaded!r} was loaded")
            self._variant = name, model
        return self._variant[1]

    def release(self) -> None:
        """Forget the variant, before another model is loaded."""
        self._variant = ("", None)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.job.get("device", "cpu"))

    @property
    def tolerance(self) -> float:
        """Largest difference of two ways to the same logits, relative to the largest logit."""
        return max(self.precision, ROUNDED_INPUTS) if self._rounds_inputs() else self.precision

    @property
    def precision(self) -> float:
        """The same for two ways that do the same arithmetic."""
        # Kernels for GPTQ files compute in 16 bits, whatever type was asked for.
        gptq = (self.config.get("quantization_config") or {}).get("quant_method") == "gptq"
        return TOLERANCES[torch.bfloat16 if gptq else self.model.dtype]

    def _rounds_inputs(self) -> bool:
        groups = (self.config.get("quantization_config") or {}).get("config_groups") or {}
        return any(group.get("input_activations") for group in groups.values())


def load_model(
    folder: Path, job: Mapping[str, Any], *, attention: str | None = None, base: bool = False
) -> tuple[Any, Mapping[str, Any]]:
    """The model in evaluation mode and its loading report."""
    config = read_config(folder)
    dtype = "auto" if job.get("dtype") == "auto" else getattr(torch, job.get("dtype", "float32"))
    # `torch_dtype` became `dtype`, with a warning, in the version in which configurations got the attribute.
    options: dict[str, Any] = {"dtype" if hasattr(transformers.PretrainedConfig(), "dtype") else "torch_dtype": dtype}
    if attention is not None:
        options["attn_implementation"] = attention
    trust = bool(job.get("trust_remote_code_of_base" if base else "trust_remote_code"))
    model, report = _auto_class(config).from_pretrained(
        folder, trust_remote_code=trust, output_loading_info=True, **options
    )
    if config.get("quantization_config") and dtype != "auto":
        # transformers unpacks experts to the type of their scales, whatever type was asked for.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype) if parameter.is_floating_point() else parameter.data
    return model.to(torch.device(job.get("device", "cpu"))).eval(), report


def report_problems(report: Mapping[str, Any]) -> list[str]:
    """Every key of a loading report that is not where it should be."""
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return [f"{kind.split('_')[0]} {entry}" for kind in kinds for entry in sorted(map(str, report[kind]))]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands in the file."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def text_config(config: Any) -> Any:
    """The language model's part of a loaded configuration."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def coded_cache(config: Any) -> dict[str, Any] | None:
    """The settings of a codebook cache, where the checkpoint brings one."""
    found: dict[str, Any] | None = (getattr(text_config(config), "surgery", None) or {}).get("codebook_cache")
    return found


def relative(difference: Tensor, reference: Tensor) -> float:
    """Largest absolute entry of `difference`, relative to the largest of `reference`; inf where one is not finite."""
    if not (difference.isfinite().all() and reference.isfinite().all()):
        return float("inf")
    largest = difference.abs().max().item()
    return largest / reference.abs().max().item() if largest else 0.0


def divergence(expected: Tensor, found: Tensor) -> float:
    """Mean KL in nats of the distributions that logits `found` [..., V] stand for from those of `expected`."""
    theirs, ours = (logits.float().log_softmax(-1) for logits in (expected, found))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def _auto_class(config: Mapping[str, Any]) -> Any:
    """The Auto class that a user of this checkpoint would call."""
    named = config.get("auto_map") or {}
    architecture = (config.get("architectures") or [""])[0]
    several = "AutoModelForImageTextToText" in named or architecture.endswith("ForConditionalGeneration")
    if several and "AutoModelForCausalLM" not in named:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def _special_ids(config: Mapping[str, Any]) -> list[int]:
    ids: list[int] = []
    for key, value in config.items():
        if isinstance(value, dict):
            ids += _special_ids(value)
        elif key.endswith(("_token_id", "_token_index")):
            ids += value if isinstance(value, list) else [value]
    return [token for token in ids if isinstance(token, int)]
