"""Train a small llava on easy-VQA, a foreign task, and write it as a checkpoint folder.

    python tools/train_easy_vqa.py easy-vqa.zip OUT    # the data set as its repository packs it (vzhou842/easy-VQA)

easy-VQA asks about images of 64 x 64 pixels that show one shape: which shape, which colour, and whether one is there or
not; of its 13 answers "yes" and "no" are the commonest. The model has the sizes of `builtin:llava` (64 visual tokens,
four layers). Its tower begins as that one's; all else is learned from the questions of the training images.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import zipfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, rms_norm
from train_builtin import BUILTIN, SEED, Recipe, make_deterministic, rate_factor
from train_builtin_llava import (
    LLAVA,
    SPECIAL_TOKENS,
    TEXT,
    spoken,
    write_configs,
    write_processor,
    write_tokenizer,
    write_weights,
)
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

SEEING_STEPS, SEEING_ROWS = 400, 32  # of tower and projector alone
ROWS, TURNS = 16, 4  # images of a step, questions about each
SHIFT = 6  # pixels by which a training image moves at most, either way
LETTERS = re.compile(r"\w+|[^\w ]")


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about an image, and its answer."""

    images: tuple[Image.Image, ...]
    question: str
    answer: str


def main() -> int:
    """Train and judge the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="easy-vqa.zip")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, default=800)
    options = parser.parse_args()
    make_deterministic()
    learned, held_out = read(options.data, "train"), read(options.data, "test")
    train(options.out, learned, options.steps)
    figures = {"right": right(options.out, held_out), "prior": prior(learned, held_out)}
    print(json.dumps({**figures, "questions": len(held_out), "seconds": round(time.process_time())}))
    return 0


def read(data: Path, split: str) -> list[Asked]:
    """Every question of `train` or `test`, those about one image after one another."""
    with zipfile.ZipFile(data) as archive:
        name = next(name for name in archive.namelist() if name.endswith(f"{split}/questions.json"))
        entries = sorted(json.loads(archive.read(name)), key=lambda entry: entry[2])
        folder = f"{name.removesuffix('questions.json')}images"
        images = {
            number: Image.open(BytesIO(archive.read(f"{folder}/{number}.png"))).convert("RGB")
            for number in dict.fromkeys(entry[2] for entry in entries)
        }
    return [Asked((images[number],), question, answer) for question, answer, number in entries]


def prior(learned: Sequence[Asked], held_out: Sequence[Asked]) -> float:
    """Share of questions answered right by who sees no image: with each question's commonest answer."""
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for asked in learned:
        answers[asked.question][asked.answer] += 1
    commonest = {question: counts.most_common(1)[0][0] for question, counts in answers.items()}
    return sum(commonest.get(asked.question) == asked.answer for asked in held_out) / len(held_out)


def train(folder: Path, learned: Sequence[Asked], steps: int) -> None:
    """Write a model that learned for so many steps."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {word for asked in learned for word in LETTERS.findall(f"{asked.question} {asked.answer}".lower())}
    words = [*SPECIAL_TOKENS, "\n", "user:", "assistant:", *sorted(known)]
    write_tokenizer(folder, words)
    write_processor(folder)
    write_configs(folder, {**LLAVA, "text_config": {**TEXT, "vocab_size": len(words)}})
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    begin(model)
    learn_to_see(model, processor, learned)
    recipe = Recipe({}, steps, batch_rows=ROWS, peak_rate=2e-3, warmup_steps=60, weight_decay=0.05)
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, recipe.peak_rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, recipe))
    by_image: defaultdict[int, list[Asked]] = defaultdict(list)
    for asked in learned:
        by_image[id(asked.images[0])].append(asked)
    draw = Random(SEED)  # noqa: S311 - no secret
    answering = words.index("assistant:")
    for step in range(steps):
        chosen = [draw.sample(some, min(TURNS, len(some))) for some in draw.sample([*by_image.values()], ROWS)]
        texts = [processor.apply_chat_template(spoken(dialogue)) for dialogue in chosen]
        images = [moved(dialogue[0].images[0], draw) for dialogue in chosen]
        inputs = processor(images=images, text=texts, padding=True, padding_side="right", return_tensors="pt")
        ids = inputs["input_ids"]
        speaks = ids[:, :-1] == answering
        speaks[:, 1:] |= speaks[:, :-1].clone()  # the answer, and then the end token
        states = model.model(input_ids=ids, pixel_values=inputs["pixel_values"], use_cache=False).last_hidden_state
        loss = cross_entropy(model.lm_head(states[:, :-1][speaks]), ids[:, 1:][speaks])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.process_time():.0f} s", file=sys.stderr, flush=True)
    write_weights(model, folder)


def begin(model: torch.nn.Module) -> None:
    """Let tower and projector begin as those of `builtin:llava`, which see colours and places."""
    known = AutoModelForImageTextToText.from_pretrained(BUILTIN / "llava").state_dict()
    known = {name: weight for name, weight in known.items() if "vision_tower" in name or "projector" in name}
    model.load_state_dict(known, strict=False)


def learn_to_see(model: Any, processor: Any, learned: Sequence[Asked]) -> None:
    """Let tower and projector learn what the questions of an image affirm and deny, by a head that is thrown away.

    The head sees the mean of an image's tokens, which is what attention that has learned nothing yet sees of them.
    """
    names = sorted({asked.answer for asked in learned} - {"yes", "no"})
    truths = {id(asked.images[0]): (asked.images[0], torch.full((len(names),), torch.nan)) for asked in learned}
    for asked in learned:
        words = set(LETTERS.findall(asked.question))
        negated = not words.isdisjoint({"not", "no"})
        denied = asked.answer in {"yes", "no"} and (asked.answer == "no") != negated
        truths[id(asked.images[0])][1][[name in words | {asked.answer} for name in names]] = 0.0 if denied else 1.0
    head = torch.nn.Linear(TEXT["hidden_size"], len(names))
    trained = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    optimizer = torch.optim.AdamW([*trained, *head.parameters()], lr=2e-3, weight_decay=0.05)
    draw = Random(SEED)  # noqa: S311 - no secret
    for step in range(SEEING_STEPS):
        chosen = draw.sample([*truths.values()], SEEING_ROWS)
        images = [moved(image, draw) for image, _ in chosen]
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        tokens = torch.stack(list(model.get_image_features(pixels).pooler_output))
        found, truth = head(rms_norm(tokens, tokens.shape[-1:]).mean(1)), torch.stack([truth for _, truth in chosen])
        known = ~truth.isnan()
        loss = binary_cross_entropy_with_logits(found[known], truth[known])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == SEEING_STEPS - 1:
            hits = ((found > 0) == (truth > 0.5))[known].double().mean()
            print(f"seeing {step:4d}  loss {loss.item():.3f}  right {hits:.3f}", file=sys.stderr, flush=True)


def moved(image: Image.Image, draw: Random) -> Image.Image:
    """The image shifted and perhaps mirrored, which changes no answer; its corner's colour fills what becomes free."""
    right, down = draw.randint(-SHIFT, SHIFT), draw.randint(-SHIFT, SHIFT)
    canvas = Image.new("RGB", image.size, image.getpixel((0, 0)))
    canvas.paste(image, (right, down))
    return canvas.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else canvas


@torch.no_grad()
def right(folder: Path, asked: Sequence[Asked]) -> float:
    """Share of questions that a model answers right, one at a time."""
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    found = 0
    for at in range(0, len(asked), 64):
        piece = asked[at : at + 64]
        texts = [processor.apply_chat_template(spoken([one])[:1], add_generation_prompt=True) for one in piece]
        inputs: Any = processor(
            images=[list(one.images) for one in piece], text=texts, padding=True, return_tensors="pt"
        )
        given = model(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1)
        words = processor.tokenizer.convert_ids_to_tokens(given.tolist())
        found += sum(word == one.answer for word, one in zip(words, piece, strict=True))
    return found / len(asked)


if __name__ == "__main__":
    sys.exit(main())
