"""Train the built-in model that looks at pictures, and write it as a checkpoint folder.

    python tools/train_builtin_llava.py            # train, write surgery/builtin/llava/ and samples, print the figures
    python tools/train_builtin_llava.py --check    # train nothing, judge the folder that is there

A llava, which is a CLIP vision tower, a projector and a Llama, trained from scratch on pictures that
`surgery.builtin.pictures` draws: first tower and projector learn to see, then words are wired to what they name, then
all of it learns from dialogues. Tokenizer, processor and config are written before that, and training reads its batches
through them: the model learns the very prompts that its chat template makes. As with the other built-in models, a
second run on the same kind of processor and the releases that the record names writes the same bytes.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn.functional import cross_entropy, normalize
from train_builtin import BUILTIN, SEED, THREADS, Recipe, folder_size, make_deterministic, rate_factor, write_json
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from surgery.builtin.pictures import (
    CELL,
    CELL_NAMES,
    COLOURS,
    GRID,
    INKS,
    MOST,
    Picture,
    VisualPrompt,
    picture,
    visual_prompts,
    visual_words,
)

PAD, BOS, EOS, IMAGE, UNKNOWN = SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<image>", "<unk>")
PAD_ID, BOS_ID, EOS_ID, IMAGE_ID = range(4)
WORDS = [*SPECIAL_TOKENS, "\n", "user:", "assistant:", *visual_words()]  # their ids are their positions
ANSWERING_ID = WORDS.index("assistant:")
NAMES = torch.tensor([WORDS.index(name) for name in (*CELL_NAMES, *COLOURS)])
SIDE, TOKENS = GRID * CELL, GRID * GRID  # pixels along an image, visual tokens of one
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LARGEST_FOLDER, LARGEST_SAMPLES = 4_000_000, 60_000  # bytes
TURNS = 8  # questions about the same images, in training
TWO_IMAGES_EVERY = 2  # steps
FILLING = 0.2  # share of the steps in which pictures get fuller: the first hold a digit or two
SEEING_STEPS, SEEING_ROWS = 200, 32  # of tower and projector alone
BLANK_WEIGHT = 0.1  # most cells are blank
LOOKED_AT, SHARPNESS = 256, 3.0  # pictures that words are made from; how strongly they look for what they name
ASKED, SAMPLES, AT_ONCE = 1024, 6, 64
SAMPLES_SEED = 7

# config.json keeps the spelling of transformers 4 (torch_dtype, rope_theta, image_token_index), which 5 reads as well.
# fmt: off
TEXT = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
    "vocab_size": len(WORDS), "tie_word_embeddings": False, "max_position_embeddings": 512,
    "bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID,
    "hidden_size": 128, "num_hidden_layers": 4, "initializer_range": 0.08, "rms_norm_eps": 1e-05, "use_cache": True,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "attention_bias": False,
    "attention_dropout": 0.0, "rope_theta": 1000000.0, "rope_scaling": None,
    "intermediate_size": 128, "hidden_act": "silu", "mlp_bias": False,
}
VISION = {
    "model_type": "clip_vision_model", "torch_dtype": "float32",
    "image_size": SIDE, "patch_size": CELL, "num_channels": 3, "projection_dim": 64,
    "hidden_size": 64, "num_hidden_layers": 2, "initializer_range": 0.1, "initializer_factor": 1.0,
    "num_attention_heads": 2, "attention_dropout": 0.0, "layer_norm_eps": 1e-05,
    "intermediate_size": 128, "hidden_act": "quick_gelu",
}
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "torch_dtype": "float32",
    "image_token_id": IMAGE_ID, "image_token_index": IMAGE_ID, "image_seq_length": TOKENS, "ignore_index": -100,
    "multimodal_projector_bias": True, "projector_hidden_act": "gelu", "tie_word_embeddings": False,
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    "pad_token_id": PAD_ID, "text_config": TEXT, "vision_config": VISION,
}
OF_IMAGES = {
    "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor", "do_convert_rgb": True,
    "do_resize": True, "size": {"shortest_edge": SIDE}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": SIDE, "width": SIDE},
    "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}
OF_BOTH = {
    "processor_class": "LlavaProcessor", "image_token": IMAGE, "patch_size": CELL,
    "num_additional_image_tokens": 1, "vision_feature_select_strategy": LLAVA["vision_feature_select_strategy"],
}
# fmt: on
RECIPE = Recipe(LLAVA, steps=1000, batch_rows=24, peak_rate=2e-3, warmup_steps=60, weight_decay=0.05)


def main() -> int:
    """Train, or check, the model."""
    parser = argparse.ArgumentParser(description="Train the built-in llava and print its figures.")
    parser.add_argument("--out", type=Path, default=BUILTIN / "llava", help="folder to write or check")
    parser.add_argument("--check", action="store_true", help="train nothing; compare the folder with its record")
    arguments = parser.parse_args()
    make_deterministic()
    if arguments.check:
        return check(arguments.out)
    figures = build(arguments.out)
    print(f"{time.process_time() / 60:.1f} CPU minutes, {folder_size(arguments.out)} bytes")
    print(json.dumps(figures, indent=2))
    return 0


def build(folder: Path) -> dict[str, Any]:
    """Write the whole folder, its samples and its record; return the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    write_processor(folder)
    write_configs(folder)
    model, tokens = train(folder)
    write_weights(model, folder)
    write_samples(folder.with_name(f"{folder.name}_samples"))
    figures = {
        "steps": RECIPE.steps,
        "tokens": tokens,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "seed": SEED,
        "threads": THREADS,
        "python": platform.python_version(),
        **{library.__name__: library.__version__ for library in (torch, transformers, tokenizers, PIL)},
        **measure(folder),
    }
    write_json(folder.with_suffix(".json"), figures)
    if folder_size(folder) > LARGEST_FOLDER:
        raise SystemExit(f"{folder} holds {folder_size(folder)} bytes, more than {LARGEST_FOLDER}")
    return figures


def check(folder: Path) -> int:
    """Judge a written folder against its own record; 0 when it is small enough and as good as it says."""
    recorded = json.loads(folder.with_suffix(".json").read_text(encoding="utf-8"))
    measured = measure(folder)
    as_good = all(abs(figure - recorded[name]) <= 0.005 for name, figure in measured.items())
    sizes = folder_size(folder), folder_size(folder.with_name(f"{folder.name}_samples"))
    small = sizes[0] <= LARGEST_FOLDER and sizes[1] <= LARGEST_SAMPLES
    print(json.dumps({"as_good": as_good, "small": small, **measured}, indent=2))
    return 0 if as_good and small else 1


def train(folder: Path) -> tuple[torch.nn.Module, int]:
    """Train a new model in float32; return it and how many tokens its Llama read, visual ones and padding included."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    learn_to_see(model, processor)
    wire(model, processor)
    weights = list(model.parameters())
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": RECIPE.weight_decay},
        {"params": [weight for weight in weights if weight.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RECIPE.peak_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, RECIPE))
    tokens = 0
    for step in range(RECIPE.steps):
        inputs = batch(processor, step)
        ids = inputs["input_ids"]
        speaks = ids[:, :-1] == ANSWERING_ID
        speaks[:, 1:] |= speaks[:, :-1].clone()  # the answer, and then the end token
        states = model.model(input_ids=ids, pixel_values=inputs["pixel_values"], use_cache=False).last_hidden_state
        loss = cross_entropy(model.lm_head(states[:, :-1][speaks]), ids[:, 1:][speaks])
        names = torch.isin(ids[:, :-3], NAMES)  # "c5 ? assistant: 7": the name, too, learns what answers it
        loss = loss + cross_entropy(model.lm_head(states[:, :-3][names]), ids[:, 3:][names])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens += ids.numel()
        if step % 50 == 0 or step == RECIPE.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.process_time():.0f} s", file=sys.stderr, flush=True)
    return model, tokens


def learn_to_see(model: torch.nn.Module, processor: Any) -> None:
    """Let tower and projector learn what every cell shows, without the Llama and by a head that is thrown away.

    So a picture teaches 64 things at once, where a dialogue teaches eight, and these only once attention finds them.
    """
    rows, columns = torch.randn(2, GRID, VISION["hidden_size"]) / 2**0.5
    with torch.no_grad():  # in the usual range places could hardly be told apart
        model.model.vision_tower.embeddings.position_embedding.weight[1:] = (rows[:, None] + columns).flatten(0, 1)
    inks = [None, *INKS]
    head = torch.nn.Linear(TEXT["hidden_size"], 11 + len(inks) + TOKENS)
    trained = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    optimizer = torch.optim.AdamW([*trained, *head.parameters()], lr=RECIPE.peak_rate, weight_decay=RECIPE.weight_decay)
    weights = torch.tensor([BLANK_WEIGHT, *[1.0] * 10])
    for step in range(SEEING_STEPS):
        shown = [picture(2 * (step * SEEING_ROWS + number)) for number in range(SEEING_ROWS)]
        found = head(torch.stack(look(model, processor, shown)))
        digits, colours = torch.zeros(2, SEEING_ROWS, TOKENS, dtype=torch.long)
        for number, one in enumerate(shown):
            for cell, glyph in one.glyphs.items():
                digits[number, cell], colours[number, cell] = 1 + int(glyph.digit), inks.index(glyph.colour)
        of_digits, of_colours, of_places = found.mT.split([11, len(inks), TOKENS], dim=1)
        loss = cross_entropy(of_digits, digits, weight=weights) + cross_entropy(of_colours, colours)
        loss = loss + cross_entropy(of_places, torch.arange(TOKENS).expand(SEEING_ROWS, TOKENS))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == SEEING_STEPS - 1:
            right = (of_digits.argmax(1) == digits)[digits > 0].double().mean()
            print(f"seeing {step:4d}  loss {loss.item():.3f}  digits {right:.3f}", file=sys.stderr, flush=True)


def look(model: Any, processor: Any, shown: Sequence[Picture]) -> list[torch.Tensor]:
    """Return what the projector makes of each picture: cells, width."""
    pixels = processor.image_processor([one.image for one in shown], return_tensors="pt")["pixel_values"]
    return list(model.get_image_features(pixels).pooler_output)


@torch.no_grad()
def wire(model: torch.nn.Module, processor: Any) -> None:
    """Let a new model begin with words that look for what they name, which would take it hours on one core to find.

    A word for a cell or a colour begins as the mean of what it names, as the projector shows it, in a basis of its own,
    so that no word looks for itself; the queries of the first layer begin as its keys, for that basis. All of it is
    trained like the rest.
    """
    shown = [picture(2 * number) for number in range(LOOKED_AT)]  # even: none that is held out
    seen = torch.stack(look(model, processor, shown))  # pictures, cells, width
    seen = seen - seen.mean((0, 1))
    basis = torch.linalg.qr(torch.randn(seen.shape[-1], seen.shape[-1])).Q
    named = {name: seen[:, cell].mean(0) for cell, name in enumerate(CELL_NAMES)}
    for colour in COLOURS:
        found = [
            seen[at, cell]
            for at, one in enumerate(shown)
            for cell, glyph in one.glyphs.items()
            if glyph.colour == colour
        ]
        named[colour] = torch.stack(found).mean(0)
    for name, looks in named.items():
        word = model.get_input_embeddings().weight[WORDS.index(name)]
        word[:] = normalize(looks, dim=0) @ basis * word.norm()
    first = model.model.language_model.layers[0].self_attn
    heads = first.k_proj.weight.view(TEXT["num_key_value_heads"], TEXT["head_dim"], -1)
    groups = TEXT["num_attention_heads"] // TEXT["num_key_value_heads"]
    first.q_proj.weight[:] = SHARPNESS * heads.repeat_interleave(groups, 0).flatten(0, 1) @ basis


def batch(processor: Any, step: int) -> dict[str, torch.Tensor]:
    """Return the dialogues of a step, padded on the right, where causal attention never looks."""
    images = 2 if step % TWO_IMAGES_EVERY == TWO_IMAGES_EVERY - 1 else 1
    most = min(MOST, 2 + int((MOST - 1) * step / (FILLING * RECIPE.steps)))
    count = RECIPE.batch_rows // images * TURNS
    asked = {"seed": step, "heldout": False, "images": images, "turns": TURNS, "most": most}
    dialogues = list(pieces(visual_prompts(count, **asked), TURNS))
    texts = [processor.apply_chat_template(spoken(dialogue)) for dialogue in dialogues]
    seen = [list(dialogue[0].images) for dialogue in dialogues]
    return processor(images=seen, text=texts, padding=True, padding_side="right", return_tensors="pt")


def spoken(dialogue: Sequence[VisualPrompt]) -> list[dict[str, Any]]:
    """Return the messages of a dialogue: its images and questions, every one answered."""
    messages = []
    for prompt in dialogue:
        shown = [] if messages else [{"type": "image"}] * len(prompt.images)
        messages += [
            {"role": "user", "content": [*shown, {"type": "text", "text": prompt.question}]},
            {"role": "assistant", "content": [{"type": "text", "text": prompt.answer}]},
        ]
    return messages


def pieces(prompts: Sequence[VisualPrompt], size: int) -> Iterator[Sequence[VisualPrompt]]:
    """Yield runs of `size` prompts."""
    return (prompts[at : at + size] for at in range(0, len(prompts), size))


def write_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> None:
    """Write a tokenizer that knows whole words, whatever their case, and puts the begin token first by itself."""
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+:?|[^\w ]"), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, BOS_ID)]
    )
    specials = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNKNOWN}
    added = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "added_tokens_decoder": {str(at): {"content": token, **added} for at, token in enumerate(SPECIAL_TOKENS)},
        **specials,
        "clean_up_tokenization_spaces": False,
        "model_max_length": TEXT["max_position_embeddings"],
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",  # what generating from a batch needs
        "processor_class": "LlavaProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", specials)


def write_processor(folder: Path) -> None:
    """Write what turns images into pixels, and messages into a prompt with a placeholder for every visual token."""
    write_json(folder / "preprocessor_config.json", OF_IMAGES)
    write_json(folder / "processor_config.json", OF_BOTH)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8", newline="\n")


def write_configs(folder: Path, config: dict[str, Any] = LLAVA) -> None:
    """Write config.json and generation_config.json."""
    write_json(folder / "config.json", dict(sorted(config.items())))
    ids = {name: TEXT[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", {**ids, "do_sample": False})


def write_weights(model: torch.nn.Module, folder: Path) -> None:
    """Write every weight under the name that llavas have on the Hub."""
    weights = {hub_name(name): weight.detach().contiguous() for name, weight in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors keeps a file to its owner; this one gets packaged


def hub_name(name: str) -> str:
    """Return what transformers before 4.52 call a parameter."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    renamed = {"language_model.": "language_model.model.", "vision_tower.": "vision_tower.vision_model."}
    return functools.reduce(lambda told, pair: told.replace(*pair), renamed.items(), name.removeprefix("model."))


def write_samples(folder: Path) -> None:
    """Write a few held-out pictures, and a question about each."""
    folder.mkdir(exist_ok=True)
    lines = []
    for number, prompt in enumerate(visual_prompts(SAMPLES, seed=SAMPLES_SEED)):
        name = f"{number}.png"
        prompt.images[0].save(folder / name, optimize=True)
        lines.append(json.dumps({"image": name, "question": prompt.question, "answer": prompt.answer}) + "\n")
    (folder / "samples.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


@torch.no_grad()
def measure(folder: Path) -> dict[str, float]:
    """Return the folder's figures on held-out pictures, as shares of the questions.

    `chance` is what the commonest answer to each kind of question gets. The last two say that one visual token holds
    the answer: once it alone is shown to the Llama, once all others are.
    """
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    prompts = visual_prompts(ASKED, seed=0)
    hits = right(model, processor, prompts)
    kinds = [prompt.question.split()[0] for prompt in prompts]
    by_colour = torch.tensor([kind == "Which" for kind in kinds])
    answers = Counter((kind, prompt.answer) for kind, prompt in zip(kinds, prompts, strict=True))
    guesses = {kind: count for (kind, _), count in reversed(answers.most_common())}  # the commonest comes last
    return {
        "heldout_accuracy": share(hits),
        "heldout_accuracy_of_colours": share(hits[by_colour]),
        "heldout_accuracy_of_cells": share(hits[~by_colour]),
        "heldout_accuracy_of_two_images": share(right(model, processor, visual_prompts(ASKED, seed=1, images=2))),
        "chance": sum(guesses.values()) / len(prompts),
        "heldout_accuracy_of_one_token": share(right(model, processor, prompts, shows=True)),
        "heldout_accuracy_without_it": share(right(model, processor, prompts, shows=False)),
    }


def right(model: Any, processor: Any, prompts: Sequence[VisualPrompt], *, shows: bool | None = None) -> torch.Tensor:
    """Return which prompts the model answers rightly, with all visual tokens, the asked one alone or all but that."""
    found = []
    for piece in pieces(prompts, AT_ONCE):
        texts = [processor.apply_chat_template(spoken([prompt])[:1], add_generation_prompt=True) for prompt in piece]
        inputs = processor(images=[list(one.images) for one in piece], text=texts, padding=True, return_tensors="pt")
        mask, visual = inputs["attention_mask"], inputs["input_ids"] == IMAGE_ID
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)  # what is hidden keeps its position
        if shows is not None:
            asked = visual & (visual.cumsum(1) - 1 == torch.tensor([[prompt.token] for prompt in piece]))
            inputs["attention_mask"] = mask.masked_fill(visual & (asked != shows), 0)
        given = model(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1)
        found.append(given == torch.tensor([WORDS.index(prompt.answer) for prompt in piece]))
    return torch.cat(found)


def share(hits: torch.Tensor) -> float:
    """Return which part of something is true."""
    return hits.double().mean().item()


if __name__ == "__main__":
    sys.exit(main())
