"""Train a built-in model from scratch on the text that every CPython carries, and write it as a checkpoint folder.

    python tools/train_builtin.py llama            # train, write surgery/builtin/llama/, print the figures
    python tools/train_builtin.py llama --check    # train nothing, judge the folder that is there

The seed, the steps and the threads are fixed and every operation is deterministic, so a second run writes the same
bytes: on the same kind of processor and the releases of Python (whose documentation is the text), torch, transformers
and tokenizers that its record names, and not beyond.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from surgery.builtin.text import heldout_text, training_documents, training_text

BUILTIN = Path(__file__).resolve().parent.parent / "surgery" / "builtin"
PAD, BOS, EOS = SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")  # their ids are their positions
PAD_ID, BOS_ID, EOS_ID = range(3)
LARGEST_FOLDER = 3_000_000  # bytes; the folder travels inside the wheel
SEED = 20250101
THREADS = 1


@dataclass(frozen=True)
class Recipe:
    """How one built-in model is trained; ``config`` becomes its config.json word for word."""

    config: dict[str, Any]
    steps: int
    batch_rows: int
    peak_rate: float
    warmup_steps: int
    weight_decay: float


# config.json keeps the spelling of transformers 4 (torch_dtype, rope_theta), which 5 reads as well.
# fmt: off
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
    "vocab_size": 1024, "tie_word_embeddings": True, "max_position_embeddings": 512,
    "bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID,
    "hidden_size": 128, "num_hidden_layers": 6, "initializer_range": 0.06, "rms_norm_eps": 1e-05, "use_cache": True,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "attention_bias": False,
    "attention_dropout": 0.0, "rope_theta": 10000.0, "rope_scaling": None,
    "intermediate_size": 384, "hidden_act": "silu", "mlp_bias": False,
}
# fmt: on
RECIPES = {
    "llama": Recipe(LLAMA, steps=4800, batch_rows=2, peak_rate=3e-3, warmup_steps=250, weight_decay=0.1),
}


def main() -> int:
    """Train, or check, the model named on the command line."""
    parser = argparse.ArgumentParser(description="Train a built-in model and print its figures.")
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path, help="folder to write or check; without it, the one inside the package")
    parser.add_argument("--check", action="store_true", help="train nothing; compare the folder with its record")
    arguments = parser.parse_args()
    folder = arguments.out or BUILTIN / arguments.name
    if arguments.check:
        return check(folder)
    figures = build(RECIPES[arguments.name], folder)
    print(f"{time.process_time() / 60:.1f} CPU minutes, {folder_size(folder)} bytes")
    print(json.dumps(figures, indent=2))
    return 0


def build(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Train the tokenizer and the model, write the whole folder and return the figures."""
    make_deterministic()
    tokenizer = train_tokenizer(recipe.config["vocab_size"])
    model = train_model(recipe, token_stream(tokenizer))
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer, recipe.config, folder)
    write_model(model, recipe.config, folder)
    figures = {
        "steps": recipe.steps,
        "tokens": recipe.steps * recipe.batch_rows * recipe.config["max_position_embeddings"],
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "seed": SEED,
        "threads": THREADS,
        "training_text_sha256": hashlib.sha256(training_text().encode()).hexdigest(),
        "python": platform.python_version(),
        **{library.__name__: library.__version__ for library in (torch, transformers, tokenizers)},
        **heldout_figures(folder),  # of the files as written: rounded to bfloat16
    }
    write_json(folder.with_suffix(".json"), figures)
    if folder_size(folder) > LARGEST_FOLDER:
        raise SystemExit(f"{folder} holds {folder_size(folder)} bytes, more than {LARGEST_FOLDER}")
    return figures


def check(folder: Path) -> int:
    """Judge a written folder against its own figures; 0 when it is small enough and as good as it says."""
    make_deterministic()
    recorded = json.loads((folder.with_suffix(".json")).read_text(encoding="utf-8"))
    measured = heldout_figures(folder)
    same_text = recorded["training_text_sha256"] == hashlib.sha256(training_text().encode()).hexdigest()
    # Another Python words its documentation a little differently, and the perplexity moves with it.
    tolerance = 0.001 if same_text else 0.1
    as_good = all(math.isclose(measured[name], recorded[name], rel_tol=tolerance) for name in measured)
    small = folder_size(folder) <= LARGEST_FOLDER
    print(json.dumps({"same_text": same_text, "as_good": as_good, "small": small, **measured}, indent=2))
    return 0 if as_good and small else 1


def make_deterministic() -> None:
    """Fix what a result depends on besides the code: the seed, the threads (they order sums) and the kernels."""
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read at every use
    transformers.utils.logging.disable_progress_bar()


def train_tokenizer(vocabulary_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer, which can spell every text, that puts the begin token first by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # one for each byte
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(training_documents(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def token_stream(tokenizer: Tokenizer) -> torch.Tensor:
    """Return all training documents as one row of tokens, each document between a begin and an end token."""
    encodings = tokenizer.encode_batch(training_documents())
    return torch.tensor([token for encoding in encodings for token in [*encoding.ids, EOS_ID]])


def train_model(recipe: Recipe, stream: torch.Tensor) -> torch.nn.Module:
    """Train a new model in float32 and return it."""
    config = transformers.AutoConfig.for_model(**{**recipe.config, "torch_dtype": "float32"})
    model = transformers.AutoModelForCausalLM.from_config(config)
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    gains = [weight for weight in model.parameters() if weight.ndim <= 1]  # of the norms: decay would only shrink them
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, recipe))
    for step, rows in zip(range(recipe.steps), batches(stream, recipe), strict=False):
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == recipe.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}", file=sys.stderr, flush=True)
    return model


def rate_factor(step: int, recipe: Recipe) -> float:
    """Return the share of the peak rate at ``step``: a linear warm-up, then half a cosine down to zero."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)))


def batches(stream: torch.Tensor, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Yield shuffled batches of full-length rows for ever, cutting the stream elsewhere in every pass."""
    length = recipe.config["max_position_embeddings"]
    while True:
        offset = int(torch.randint(length, ()))
        windows = stream[offset : offset + (len(stream) - offset) // length * length].view(-1, length)
        windows = windows[torch.randperm(len(windows))]  # a copy, so the stream itself keeps its tokens
        windows[::2, 0] = BOS_ID  # half the rows, so that texts with and without a begin token are both familiar
        yield from windows.split(recipe.batch_rows)


def write_tokenizer(tokenizer: Tokenizer, config: dict[str, Any], folder: Path) -> None:
    """Write the tokenizer's three files."""
    specials = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    added = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "added_tokens_decoder": {str(at): {"content": token, **added} for at, token in enumerate(SPECIAL_TOKENS)},
        **specials,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "model_input_names": ["input_ids", "attention_mask"],  # no token types: a llama refuses them
        "padding_side": "left",  # what generating from a batch needs
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", specials)


def write_model(model: torch.nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Write config.json, generation_config.json and the weights in bfloat16."""
    weights = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})  # tied weights: named once, saved once
    (folder / "model.safetensors").chmod(0o644)  # safetensors keeps a file to its owner; this one gets packaged
    write_json(folder / "config.json", dict(sorted(config.items())))
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", {**ids, "do_sample": False})


@torch.no_grad()
def heldout_figures(folder: Path) -> dict[str, float]:
    """Return the folder's perplexity on the held-out text, per token and per byte."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float()
    text = heldout_text()
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    total = 0.0
    for piece in torch.tensor(tokens).split(model.config.max_position_embeddings - 1):
        row = torch.cat([torch.tensor([BOS_ID]), piece])[None]
        total += float(model(input_ids=row, labels=row).loss) * len(piece)
    counts = {"token": len(tokens), "byte": len(text.encode())}
    figures = {f"heldout_{unit}s": count for unit, count in counts.items()}
    return figures | {f"heldout_perplexity_per_{unit}": math.exp(total / count) for unit, count in counts.items()}


def folder_size(folder: Path) -> int:
    """Return the bytes of all files in ``folder``."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` the same way everywhere."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    sys.exit(main())
