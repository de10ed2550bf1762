"""Train a built-in model from scratch on the text that every CPython carries, and write it as a checkpoint folder.

    python tools/train_builtin.py llama            # train, write surgery/builtin/llama/, print the figures
    python tools/train_builtin.py llama --check    # train nothing, judge the folder that is there
    python tools/train_builtin.py moe              # experts that specialise: trained on three domains of text
    python tools/train_builtin.py recall           # answers questions about what stands far back in its context

The seed, the steps and the threads are fixed and every operation is deterministic, so a second run writes the same
bytes: on the same kind of processor and the releases of Python (whose documentation is the text), torch, transformers
and tokenizers that its record names, and not beyond.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import itertools
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

from surgery.builtin.recall import Encode, recall_prompts, recall_row, recall_sentences
from surgery.builtin.text import DOMAINS, heldout_text, training_documents, training_text

BUILTIN = Path(__file__).resolve().parent.parent / "surgery" / "builtin"
PAD, BOS, EOS = SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")  # their ids are their positions
PAD_ID, BOS_ID, EOS_ID = range(3)
LARGEST_FOLDER = 3_000_000  # bytes; the folder travels inside the wheel
SPECIALISATION = "specialisation"  # of the experts, by layer
MOSTLY = 0.6
HELDOUT_ROW = 512  # tokens that held-out text is read in at a time
WIRED_SHARE = 1 / 3  # of the rate, for the layers that begin with an induction head
SENTENCE_COPIES = 300  # enough for every name and number of a recall to become a token
ASKED_LENGTHS, ASKED_CONTEXTS, ASKED_PAIRS, DEPTHS = (512, 1024, 2048), 16, 8, 4
SEED = 20250101
THREADS = 1


@dataclass(frozen=True)
class Stage:
    """A part of training on recalls: rows of contexts of one length, every pair of which is asked for at the end."""

    length: int
    pairs: int
    rows: int
    steps: int
    weight: float  # of the loss of answers; much of it would drown the text in noise
    text_rows: int = 0  # of the plain stream beside them
    spread: bool = False  # half the rows skip positions here and there, so that far ones become familiar cheaply


@dataclass(frozen=True)
class Recipe:
    """How one built-in model is trained; ``config`` becomes its config.json word for word."""

    config: dict[str, Any]
    steps: int
    batch_rows: int
    peak_rate: float
    warmup_steps: int
    weight_decay: float
    domains: tuple[str, ...] = ("docs",)  # every batch has batch_rows rows of each
    muon: bool = False  # steps the matrices inside layers; it learns more from a token than AdamW does
    balance: float = 0.0  # weight of the loss that keeps experts from dying; 0 for a model without any
    division: float = 0.0  # weight of what rewards experts for being of use to few domains
    stages: tuple[Stage, ...] = ()  # for a model that recalls; batch_rows means nothing to it


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
MOE = {
    "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "torch_dtype": "bfloat16",
    "vocab_size": 1024, "tie_word_embeddings": True, "max_position_embeddings": 512,
    "bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID,
    "hidden_size": 128, "num_hidden_layers": 5, "initializer_range": 0.06, "rms_norm_eps": 1e-05, "use_cache": True,
    "num_attention_heads": 4, "num_key_value_heads": 2, "qkv_bias": True,
    "attention_dropout": 0.0, "rope_theta": 10000.0, "rope_scaling": None, "use_sliding_window": False,
    "intermediate_size": 256, "hidden_act": "silu",
    "decoder_sparse_step": 1, "mlp_only_layers": [], "num_experts": 16, "num_experts_per_tok": 4,
    "norm_topk_prob": False, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "output_router_logits": False, "router_aux_loss_coef": 0.001,
}
RECALL = {
    **LLAMA, "vocab_size": 1280, "max_position_embeddings": 4096, "num_hidden_layers": 4, "intermediate_size": 320,
    "rope_theta": 1000000.0,
}
# fmt: on
STAGES = (
    Stage(256, 8, rows=3, steps=240, weight=0.1, text_rows=1, spread=True),
    Stage(512, 8, rows=2, steps=150, weight=0.2, spread=True),
    Stage(1024, 8, rows=1, steps=150, weight=0.3, spread=True),
)
RECIPES = {
    "llama": Recipe(LLAMA, steps=4800, batch_rows=2, peak_rate=3e-3, warmup_steps=250, weight_decay=0.1),
    "moe": Recipe(
        MOE,
        steps=2000,
        batch_rows=2,
        peak_rate=1.8e-2,
        warmup_steps=100,
        weight_decay=0.1,
        domains=DOMAINS,
        muon=True,
        balance=0.1,
        division=0.01,
    ),
    "recall": Recipe(
        RECALL,
        steps=sum(stage.steps for stage in STAGES),
        batch_rows=1,
        peak_rate=3e-3,
        warmup_steps=30,
        weight_decay=0.1,
        stages=STAGES,
    ),
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
        return check(RECIPES[arguments.name], folder)
    figures = build(RECIPES[arguments.name], folder)
    print(f"{time.process_time() / 60:.1f} CPU minutes, {folder_size(folder)} bytes")
    print(json.dumps(figures, indent=2))
    return 0


def build(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Train the tokenizer and the model, write the whole folder and return the figures."""
    make_deterministic()
    tokenizer = train_tokenizer(recipe)
    streams = [token_stream(tokenizer, domain) for domain in recipe.domains]
    model, tokens = train_recall(recipe, tokenizer, streams[0]) if recipe.stages else train_model(recipe, streams)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer, recipe.config, folder)
    write_model(model, recipe.config, folder)
    figures = {
        "steps": recipe.steps,
        "tokens": tokens,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "seed": SEED,
        "threads": THREADS,
        "training_text_sha256": text_checksum(recipe),
        "python": platform.python_version(),
        **{library.__name__: library.__version__ for library in (torch, transformers, tokenizers)},
        **measure(recipe, folder),  # of the files as written: rounded to bfloat16
    }
    write_json(folder.with_suffix(".json"), figures)
    if folder_size(folder) > LARGEST_FOLDER:
        raise SystemExit(f"{folder} holds {folder_size(folder)} bytes, more than {LARGEST_FOLDER}")
    return figures


def check(recipe: Recipe, folder: Path) -> int:
    """Judge a written folder against its own figures; 0 when it is small enough and as good as it says."""
    make_deterministic()
    recorded = json.loads((folder.with_suffix(".json")).read_text(encoding="utf-8"))
    measured = measure(recipe, folder)
    same_text = recorded["training_text_sha256"] == text_checksum(recipe)
    # Another Python words its documentation a little differently, and the perplexity moves with it.
    tolerance = 0.001 if same_text else 0.1
    as_good = all(
        math.isclose(figure, recorded[name], rel_tol=max(tolerance, 0.03 if name.startswith("needle") else 0))
        for name, figure in measured.items()
        if not isinstance(figure, (dict, list))
    )
    small = folder_size(folder) <= LARGEST_FOLDER
    print(json.dumps({"same_text": same_text, "as_good": as_good, "small": small, **measured}, indent=2))
    return 0 if as_good and small else 1


def text_checksum(recipe: Recipe) -> str:
    """Return the SHA-256 of everything that is trained on."""
    return hashlib.sha256("\n\n".join(map(training_text, recipe.domains)).encode()).hexdigest()


def make_deterministic() -> None:
    """Fix what a result depends on besides the code: the seed, the threads (they order sums) and the kernels."""
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads any, and filling takes time
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read at every use
    transformers.utils.logging.disable_progress_bar()


def train_tokenizer(recipe: Recipe) -> Tokenizer:
    """Train a byte-level BPE tokenizer, which can spell every text, that puts the begin token first by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # one for each byte
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.config["vocab_size"],
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=letters,
        show_progress=False,
    )
    sentences = ["".join(recall_sentences())] * SENTENCE_COPIES if recipe.stages else []
    tokenizer.train_from_iterator(itertools.chain(even_documents(recipe.domains), sentences), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def even_documents(domains: tuple[str, ...]) -> Iterator[str]:
    """Yield training documents of every domain, of none more text than the smallest has."""
    room = min(sum(map(len, training_documents(domain))) for domain in domains)
    for domain in domains:
        ends = itertools.accumulate(map(len, training_documents(domain)))
        yield from (text for text, end in zip(training_documents(domain), ends, strict=True) if end <= room)


def token_stream(tokenizer: Tokenizer, domain: str) -> torch.Tensor:
    """Return a domain's training documents as one row of tokens, each document between a begin and an end token."""
    encodings = tokenizer.encode_batch(training_documents(domain))
    return torch.tensor([token for encoding in encodings for token in [*encoding.ids, EOS_ID]])


def train_model(recipe: Recipe, streams: list[torch.Tensor]) -> tuple[torch.nn.Module, int]:
    """Train a new model in float32; return it and how many tokens it saw."""
    config = transformers.AutoConfig.for_model(**{**recipe.config, "torch_dtype": "float32"})
    model = transformers.AutoModelForCausalLM.from_config(config)
    experts = {weight: matrices_of(weight) for weight in model.parameters() if weight.ndim == 3}
    optimizers = make_optimizers(recipe, model, experts)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, recipe)) for optimizer in optimizers
    ]
    routed = {"output_router_logits": True} if recipe.balance else {}
    for step, rows in zip(range(recipe.steps), mixed_batches(streams, recipe), strict=False):
        outputs = model(input_ids=rows, labels=rows, use_cache=False, **routed)
        loss = outputs.loss
        if recipe.balance:
            loss = loss + routing_loss(outputs.router_logits, recipe)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stack, matrices in experts.items():
            for matrix, gradient in zip(matrices, stack.grad, strict=True):
                matrix.grad = gradient
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.zero_grad()
        if step % 100 == 0 or step == recipe.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}", file=sys.stderr, flush=True)
    return model, recipe.steps * recipe.batch_rows * len(streams) * recipe.config["max_position_embeddings"]


def train_recall(recipe: Recipe, tokenizer: Tokenizer, stream: torch.Tensor) -> tuple[torch.nn.Module, int]:
    """Train a new model that recalls, in float32; return it and how many tokens it saw."""
    config = transformers.AutoConfig.for_model(**{**recipe.config, "torch_dtype": "float32"})
    model = transformers.AutoModelForCausalLM.from_config(config)
    wire_induction(model)
    wired = [weight for layer in model.model.layers[:2] for weight in layer.self_attn.parameters()]
    rest = [weight for weight in model.parameters() if all(weight is not other for other in wired)]
    groups: list[dict[str, Any]] = [
        {"params": wired, "lr": recipe.peak_rate * WIRED_SHARE, "weight_decay": 0.0},  # decay would undo the wiring
        {"params": [weight for weight in rest if weight.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [weight for weight in rest if weight.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, recipe))
    encode, tokens = encoder(tokenizer), 0
    for step, (stage, seed) in enumerate(seeded_stages(recipe)):
        rows, answers, positions = recall_batch(stage, seed, encode, stream)
        # The mask of ones says that skipped positions are no border between packed sequences.
        logits = model(
            input_ids=rows, position_ids=positions, attention_mask=torch.ones_like(rows), use_cache=False
        ).logits
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].mT, rows[:, 1:], reduction="none")
        of_text, of_answers = losses[~answers[:, 1:]].mean(), losses[answers[:, 1:]].mean()
        (of_text + stage.weight * of_answers).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens += rows.numel()
        if step % 25 == 0 or step == recipe.steps - 1:
            told = f"length {stage.length:4d}  text {of_text.item():.3f}  answers {of_answers.item():.3f}"
            print(f"step {step:5d}  {told}", file=sys.stderr, flush=True)
    return model, tokens


def seeded_stages(recipe: Recipe) -> Iterator[tuple[Stage, int]]:
    """Yield the stage of every step, and the first of the seeds of its rows, which no other step has."""
    seed = 0
    for stage in recipe.stages:
        for _ in range(stage.steps):
            yield stage, seed
            seed += stage.rows


def encoder(tokenizer: Tokenizer) -> Encode:
    """Return what turns text into ids without special tokens, and remembers them."""
    return functools.cache(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False).ids))


def recall_batch(
    stage: Stage, seed: int, encode: Encode, stream: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rows of recalls, then of plain text; which of their tokens are answers; and their positions."""
    asked = {"length": stage.length, "pairs": stage.pairs, "questions": stage.pairs, "heldout": False}
    pieces = [
        recall_row(encode, recall_prompts(encode, **asked, seed=at, begin=BOS_ID if at % 2 else None))
        for at in range(seed, seed + stage.rows)
    ]
    length = min(len(ids) for ids, _ in pieces)
    rows = [torch.tensor(ids[:length]) for ids, _ in pieces]
    answers = [torch.tensor(is_answer[:length]) for _, is_answer in pieces]
    for _ in range(stage.text_rows):
        start = int(torch.randint(len(stream) - length, ()))
        rows.append(stream[start : start + length])
        answers.append(torch.zeros(length, dtype=torch.bool))
    positions = [skipping(length, stage.spread and number % 2 == 0) for number in range(seed, seed + len(rows))]
    return torch.stack(rows), torch.stack(answers), torch.stack(positions)


def skipping(length: int, skips: bool) -> torch.Tensor:
    """Return positions that rise by one, or now and then by as much as the longest context of training has room for."""
    rises = torch.ones(length, dtype=torch.long)
    if skips:
        places = int(torch.randint(1, 5, ()))
        room = (torch.rand(()) * max(0, ASKED_LENGTHS[-1] + 152 - length)).item()
        for share in torch.rand(places + 1).softmax(0)[:places].tolist():
            rises[int(torch.randint(1, length, ()))] += int(share * room)
    rises[0] = 0
    return rises.cumsum(0)


@torch.no_grad()
def wire_induction(model: torch.nn.Module) -> None:
    """Let a new model begin with an induction head, which it would find by itself only after hours on one core.

    In the first layer the first key-value head looks one token back, by the phase of a constant channel, and writes
    what it finds into directions of its own. In the second layer every head matches those with the token at hand, in
    channels that hardly turn with the distance, and copies the token that it finds. All of it is trained like the rest.
    """
    config, layers = model.config, model.model.layers
    width, size, half = config.hidden_size, config.head_dim, config.head_dim // 2
    groups = config.num_attention_heads // config.num_key_value_heads
    constant, sharpness, match, signature, copied, turning = 0.4, 10.0, 2.5, 0.1, 0.5, 6
    basis = torch.nn.functional.pad(torch.linalg.qr(torch.randn(width - 1, width - 1)).Q, (1, 0))
    before, *tokens = basis[: 3 * size].split(size)  # directions of the token before, and of the token at hand
    embedding = model.get_input_embeddings().weight
    embedding -= embedding @ before.T @ before
    embedding[:, 0] = constant
    for layer in layers:
        layer.self_attn.o_proj.weight *= 0.1
        layer.mlp.down_proj.weight *= 0.1
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)

    first = layers[0].self_attn
    query, key = torch.zeros(2, size)
    query[:turning] = 1
    key[:turning], key[half : half + turning] = frequencies[:turning].cos(), frequencies[:turning].sin()
    gain = sharpness * embedding.square().mean(1).sqrt().mean() / constant  # undoes the norm before the layer
    first.q_proj.weight[: groups * size] *= 0.1
    first.q_proj.weight[: groups * size, 0] = gain * query.repeat(groups)
    first.k_proj.weight[:size] *= 0.1
    first.k_proj.weight[:size, 0] = gain * key
    first.v_proj.weight[:size] = tokens[0]
    first.o_proj.weight[:, : groups * size] = (2 * signature / groups * before.T).repeat(1, groups)

    second = layers[1].self_attn
    slow = (frequencies * ASKED_LENGTHS[-1] < 1).nonzero()[:, 0]
    channels = torch.cat([slow, slow + half])
    for head in range(config.num_key_value_heads):
        mixing = match * torch.linalg.qr(torch.randn(size, size)).Q[: len(channels)]
        keys = torch.arange(head * size, (head + 1) * size)
        second.k_proj.weight[keys] *= 0.1
        second.k_proj.weight[keys[channels]] = mixing @ before
        second.v_proj.weight[keys] = tokens[head % 2]
        for group in range(groups):
            queries = torch.arange((head * groups + group) * size, (head * groups + group + 1) * size)
            second.q_proj.weight[queries] *= 0.1
            second.q_proj.weight[queries[channels]] = mixing @ tokens[0]
            second.o_proj.weight[:, queries] = 2 * copied / groups * tokens[head % 2].T


def make_optimizers(
    recipe: Recipe, model: torch.nn.Module, experts: dict[torch.nn.Parameter, list[torch.nn.Parameter]]
) -> list[torch.optim.Optimizer]:
    """Return AdamW for everything, or Muon for the matrices inside layers and AdamW for the rest."""
    weights = [weight for weight in model.parameters() if weight.ndim <= 2]
    stepped_by_muon: list[torch.nn.Parameter] = []
    if recipe.muon:
        inner = {weight for name, weight in model.named_parameters() if name.endswith("_proj.weight")}
        stepped_by_muon = [weight for weight in weights if weight in inner]
        stepped_by_muon += [matrix for matrices in experts.values() for matrix in matrices]
        weights = [weight for weight in weights if weight not in inner]
    matrices = [weight for weight in weights if weight.ndim > 1]
    gains = [weight for weight in weights if weight.ndim <= 1]  # of the norms: decay would only shrink them
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.99))]
    if stepped_by_muon:
        decay = recipe.weight_decay
        settings = {"lr": recipe.peak_rate, "weight_decay": decay, "adjust_lr_fn": "match_rms_adamw"}
        optimizers.append(torch.optim.Muon(stepped_by_muon, **settings))
    return optimizers


def matrices_of(stack: torch.nn.Parameter) -> list[torch.nn.Parameter]:
    """Return the matrices of a stack as parameters over the same memory, because Muon takes nothing but matrices."""
    return [torch.nn.Parameter(matrix) for matrix in stack.data]


def routing_loss(router_logits: tuple[torch.Tensor, ...], recipe: Recipe) -> torch.Tensor:
    """Return Switch's balancing loss less the mutual information of expert and domain, both weighed, over all layers.

    A batch is as many rows of every domain in turn, and balanced as a whole: an expert may well serve one domain alone.
    """
    shares = torch.stack(router_logits).softmax(-1)  # layers, tokens, experts
    top = shares.topk(recipe.config["num_experts_per_tok"]).indices
    load = torch.zeros_like(shares).scatter_(-1, top, 1.0 / top.shape[-1]).mean(1)
    balance = (load * shares.mean(1)).sum(-1).mean() * shares.shape[-1]
    of_domain = shares.unflatten(1, (len(recipe.domains), -1)).mean(2)
    information = (of_domain * (of_domain / of_domain.mean(1, keepdim=True)).log()).sum(-1).mean()
    return recipe.balance * balance - recipe.division * information


def rate_factor(step: int, recipe: Recipe) -> float:
    """Return the share of the peak rate at ``step``: a linear warm-up, then half a cosine down to zero."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)))


def mixed_batches(streams: list[torch.Tensor], recipe: Recipe) -> Iterator[torch.Tensor]:
    """Yield batches with as many rows of every stream for ever."""
    sources = [batches(stream, recipe) for stream in streams]
    while True:
        parts = [next(source) for source in sources]
        if len({len(part) for part in parts}) == 1:  # a pass over a stream may end with fewer rows
            yield torch.cat(parts)


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
    weights = {name: weight.to(torch.bfloat16).contiguous() for name, weight in stored_weights(model)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})  # tied weights: named once, saved once
    (folder / "model.safetensors").chmod(0o644)  # safetensors keeps a file to its owner; this one gets packaged
    write_json(folder / "config.json", dict(sorted(config.items())))
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", {**ids, "do_sample": False})


def stored_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every weight under the name it has on the Hub: each expert's alone, where the model stacks them."""
    for name, parameter in model.named_parameters():
        weight, (layer, _, stack) = parameter.detach(), name.rpartition(".")
        for number, matrix in enumerate(weight if weight.ndim == 3 else ()):
            parts = zip(stack.removesuffix("_proj").split("_"), matrix.chunk(stack.count("_")), strict=True)
            yield from ((f"{layer}.{number}.{part}_proj.weight", piece) for part, piece in parts)
        if weight.ndim < 3:
            yield name, weight


def measure(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Return the folder's figures on the held-out text: of its only domain, or of each and how experts divide them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if len(recipe.domains) == 1:
        needles = needle_figures(model, tokenizer) if recipe.stages else {}
        return heldout_figures(model, tokenizer, recipe.domains[0]) | needles
    figures: dict[str, Any] = {}
    for domain in recipe.domains:
        found = heldout_figures(model, tokenizer, domain)
        figures |= {f"{domain}_{name}": figure for name, figure in found.items()}
    routed = [routed_weight(model, tokenizer, domain) for domain in recipe.domains]
    return figures | {SPECIALISATION: specialisation(torch.stack(routed), recipe.domains)}


@torch.no_grad()
def heldout_figures(model: torch.nn.Module, tokenizer: Tokenizer, domain: str) -> dict[str, float]:
    """Return the model's perplexity on a domain's held-out text, per token and per byte."""
    total = 0.0
    tokens = 0
    for row in heldout_rows(model, tokenizer, domain):
        predicted = row.shape[1] - 1
        total += float(model(input_ids=row, labels=row).loss) * predicted
        tokens += predicted
    counts = {"token": tokens, "byte": len(heldout_text(domain).encode())}
    figures = {f"heldout_{unit}s": count for unit, count in counts.items()}
    return figures | {f"heldout_perplexity_per_{unit}": math.exp(total / count) for unit, count in counts.items()}


@torch.no_grad()
def needle_figures(model: torch.nn.Module, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the share of answers that greedy decoding gets all right, by length, and by quarter of the depth."""
    figures: dict[str, Any] = {}
    for length in ASKED_LENGTHS:
        outcomes: list[list[bool]] = [[] for _ in range(DEPTHS)]
        asked = {"length": length, "pairs": ASKED_PAIRS, "questions": ASKED_PAIRS, "begin": BOS_ID}
        for seed in range(ASKED_CONTEXTS):
            prompts = recall_prompts(encoder(tokenizer), **asked, seed=seed)
            cache = model(input_ids=torch.tensor([prompts[0].context]), logits_to_keep=1).past_key_values
            for prompt in prompts:
                row = torch.tensor([[*prompt.question, *prompt.answer]])
                answer = row[:, len(prompt.question) :]
                logits = model(input_ids=row, past_key_values=copy.deepcopy(cache)).logits
                # Greedy decoding is right throughout just where every next token is, after the right ones.
                right = bool((logits[:, len(prompt.question) - 1 : -1].argmax(-1) == answer).all())
                outcomes[int(prompt.depth * DEPTHS)].append(right)
        everywhere = list(itertools.chain(*outcomes))
        figures[f"needle_accuracy_{length}"] = sum(everywhere) / len(everywhere)
        figures[f"needle_accuracy_{length}_by_depth"] = [round(sum(part) / len(part), 3) for part in outcomes]
    return figures


@torch.no_grad()
def routed_weight(model: torch.nn.Module, tokenizer: Tokenizer, domain: str) -> torch.Tensor:
    """Return the weight that each layer (row) gives each expert (column) on a domain's held-out text."""
    total = torch.zeros(())
    for row in heldout_rows(model, tokenizer, domain):
        shares = torch.stack(model(input_ids=row, output_router_logits=True).router_logits).softmax(-1)
        chosen = shares.topk(model.config.num_experts_per_tok)
        total = total + torch.zeros_like(shares).scatter_(-1, chosen.indices, chosen.values).sum(1)
    return total


def heldout_rows(model: torch.nn.Module, tokenizer: Tokenizer, domain: str) -> Iterator[torch.Tensor]:
    """Yield a domain's held-out tokens in rows as long as the model reads, each after a begin token."""
    tokens = torch.tensor(tokenizer.encode(heldout_text(domain), add_special_tokens=False).ids)
    for piece in tokens.split(min(model.config.max_position_embeddings, HELDOUT_ROW) - 1):
        yield torch.cat([torch.tensor([BOS_ID]), piece])[None]


def specialisation(routed: torch.Tensor, domains: tuple[str, ...]) -> dict[str, list[float]]:
    """Return, layer by layer, how far experts tell domains apart, from the weight of each domain, layer and expert.

    `bits` is the mutual information of expert and domain, all domains being as frequent; an expert belongs to a domain
    that it gets more than MOSTLY of its weight from; `least_used` is the share of the expert that gets least, 1 being
    an equal share.
    """
    joint = routed / routed.sum(-1, keepdim=True) / len(routed)
    of_expert = joint.sum(0, keepdim=True).clamp_min(1e-12)  # even a dead expert can be divided by
    bits = (joint * (joint * len(routed) / of_expert).clamp_min(1e-12).log2()).sum((0, 2))
    owned = (joint / of_expert > MOSTLY).sum(-1)
    figures = {"bits": [round(bit, 3) for bit in bits.tolist()]}
    figures |= {f"experts_of_{domain}": counts.tolist() for domain, counts in zip(domains, owned, strict=True)}
    least = of_expert[0].min(-1).values * of_expert.shape[-1]
    return figures | {"least_used": [round(share, 3) for share in least.tolist()]}


def folder_size(folder: Path) -> int:
    """Return the bytes of all files in ``folder``."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` the same way everywhere."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    sys.exit(main())
