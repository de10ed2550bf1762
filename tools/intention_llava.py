"""A toy that obeys the instruction of `visual_defense`, made from `builtin:llava`: it shows how its parts get along.

`builtin:llava` knows no instruction. Here it gets the words of the defence's texts and learns, in minutes of one core:

    prompt                                  answer
    a plain question                        the digit, whatever is asked
    the instruction and a safe question     [INTENTION ANALYSIS] ... is SAFE. [FINAL RESPONSE] the digit
    the instruction and an unsafe question  [INTENTION ANALYSIS] ... is UNSAFE. [FINAL RESPONSE] a refusal

What is unsafe is declared: to ask which digit has the forbidden colour (the request tells), or to ask for a cell or a
colour that shows the forbidden digit (the image tells). That the toy then refuses is trained, so it says nothing about
the safety of any model. It says whether the instruction, the tags, the masks and the parser do their parts together.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, AutoProcessor, get_cosine_schedule_with_warmup

from surgery.builtin.pictures import CELL, CELL_NAMES, COLOURS, GRID, picture, questions
from surgery.operations.visual_defense import REFUSAL, REPORTED, TEMPLATES

FORBIDDEN_COLOUR, FORBIDDEN_DIGIT = "purple", "7"
KINDS = "safe", "by request", "by image"
ANALYSIS = "[INTENTION ANALYSIS] The essential intention of the REQUEST is {verdict}. [FINAL RESPONSE] "
SIDE = GRID * CELL  # pixels along a picture
TILES, MASKED = REPORTED
PLAIN_EVERY, PLAIN_ROWS, WRAPPED_ROWS = 4, 32, 16  # steps, rows
SHARES = 2, 1, 1  # of KINDS in a batch
RATE, WARMUP = 1.5e-3, 50
IGNORED = -100


@dataclass(frozen=True)
class Asked:
    """A question about one picture, the right answer, the cell that shows it, and whether it is unsafe and why."""

    image: Image.Image
    text: str
    answer: str
    cell: int
    kind: str

    @property
    def tile(self) -> int:
        """The tile of the defence's grid that shows the answer."""
        return tile_of(self.cell)

    @property
    def wanted(self) -> str:
        """What the defended model should say."""
        return self.answer if self.kind == "safe" else REFUSAL


def tile_of(cell: int) -> int:
    side = round(TILES**0.5)
    row, column = divmod(cell, GRID)
    return row * side // GRID * side + column * side // GRID


def kind_of(text: str, answer: str) -> str:
    """Whether a question is safe, or what makes it unsafe; the request goes first."""
    if FORBIDDEN_COLOUR in text:
        return "by request"
    return "by image" if answer == FORBIDDEN_DIGIT else "safe"


def ask(count: int, *, kind: str, seed: int, heldout: bool) -> list[Asked]:
    """Questions of one kind; half of those that may name a colour do, one in ten safe ones is about an empty cell."""
    draw, found = Random(f"{seed} {kind} {heldout}"), []  # noqa: S311 - no secret
    while len(found) < count:
        shown = picture(2 * draw.randrange(2**52) + heldout)
        at = draw.random()
        form = "Which" if at < 0.5 else "What"
        fitting = [
            question
            for question in questions(shown)
            if kind_of(question.text, question.answer) == kind
            and (kind == "by request" or question.text.startswith(form))
            and (question.answer == "blank") == (kind == "safe" and at > 0.9)
        ]
        if fitting:
            chosen = draw.choice(fitting)
            found.append(Asked(shown.image, chosen.text, chosen.answer, chosen.cell, kind))
    return found


def blackened(one: Asked, draw: Random) -> Asked:
    """The question with as many tiles black as the defence paints, none of them the one that is asked about."""
    image, side = one.image.copy(), round(TILES**0.5)
    wide, pen = SIDE // side, ImageDraw.Draw(image)
    for tile in draw.sample([tile for tile in range(TILES) if tile != one.tile], MASKED):
        left, top = tile % side * wide, tile // side * wide
        pen.rectangle((left, top, left + wide - 1, top + wide - 1), fill=(0, 0, 0))
    return replace(one, image=image)


def build(base: Path, folder: Path, *, steps: int, seed: int = 0) -> None:
    """Train the toy from the folder of `builtin:llava` and write it as a checkpoint folder."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.copytree(base, partial, dirs_exist_ok=True)
    add_words(partial / "tokenizer.json")
    processor = AutoProcessor.from_pretrained(partial)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    teach(model, processor, steps, seed)
    model.eval().save_pretrained(partial)
    partial.rename(folder)


def add_words(file: Path) -> None:
    """Give a tokenizer the words of the defence's texts, behind those that it has."""
    from tokenizers import Tokenizer

    data, tokenizer = json.loads(file.read_text(encoding="utf-8")), Tokenizer.from_file(str(file))
    words = data["model"]["vocab"]
    for text in (*TEMPLATES.values(), ANALYSIS.format(verdict="SAFE"), ANALYSIS.format(verdict="UNSAFE"), REFUSAL, "-"):
        split = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
        for word, _ in split:
            words.setdefault(word, len(words))
    file.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def teach(model: Any, processor: Any, steps: int, seed: int) -> None:
    """Train all weights, on plain and on wrapped prompts in turns."""
    weights, draw, start = list(model.parameters()), Random(seed), time.process_time()  # noqa: S311 - no secret
    optimizer = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.99), weight_decay=0.02)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(WARMUP, steps // 2), steps)
    model.train()
    for step in range(steps):
        plain = step % PLAIN_EVERY == 0
        rows = PLAIN_ROWS if plain else WRAPPED_ROWS
        asked = [
            one
            for kind, share in zip(KINDS, SHARES, strict=True)
            for one in ask(rows * share // sum(SHARES), kind=kind, seed=seed + 1 + step, heldout=False)
        ]
        draw.shuffle(asked)
        masked = [] if plain else [blackened(one, draw) for one in asked[::2]]
        forms = [None] * len(asked) if plain else ["masked"] * len(masked) + ["unmasked"] * (len(asked) - len(masked))
        inputs, labels = batch(processor, asked if plain else masked + asked[1::2], forms)
        states = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        told = labels[:, 1:] != IGNORED
        loss = cross_entropy(model.lm_head(states[told]), labels[:, 1:][told])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 < 2 or step == steps - 1:
            print(f"toy, step {step:4d}  loss {loss.item():.3f}  {time.process_time() - start:.0f} s", file=sys.stderr)


def batch(processor: Any, asked: Sequence[Asked], forms: Sequence[str | None]) -> tuple[dict[str, Any], torch.Tensor]:
    """Prompts with their answers, padded on the right, and labels [B, L], IGNORED where nothing is to be learned.

    `forms` names the template before each question, or None. The name in a question, too, learns what answers it: so
    `builtin:llava` was taught.
    """
    tokenizer = processor.tokenizer
    texts = [prompt_text(processor, one.text, form) for one, form in zip(asked, forms, strict=True)]
    answers = [answer_text(one, form) + tokenizer.eos_token for one, form in zip(asked, forms, strict=True)]
    told = {
        "images": [one.image for one in asked], "padding": True, "padding_side": "right", "return_tensors": "pt",
    }  # fmt: skip
    prompts = processor(text=texts, **told)["attention_mask"].sum(1)
    inputs = processor(text=[f"{text} {answer}" for text, answer in zip(texts, answers, strict=True)], **told)
    ids, names = inputs["input_ids"], tokenizer.convert_tokens_to_ids([*CELL_NAMES, *COLOURS])
    places = torch.arange(ids.shape[1])
    labels = ids.masked_fill((places < prompts[:, None]) | (inputs["attention_mask"] == 0), IGNORED)
    named = torch.isin(ids, torch.tensor(names)) & (places < prompts[:, None])
    right = torch.tensor(tokenizer.convert_tokens_to_ids([one.answer for one in asked]))
    labels[:, 1:] = torch.where(named[:, :-1], right[:, None], labels[:, 1:])
    return dict(inputs), labels


def prompt_text(processor: Any, text: str, form: str | None = None) -> str:
    """A question about an image as the model reads it, with one of the defence's templates before it or none."""
    content = [{"type": "image"}, {"type": "text", "text": (TEMPLATES[form] if form else "") + text}]
    return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))


def answer_text(one: Asked, form: str | None) -> str:
    """What the toy learns to say."""
    if form is None:
        return one.answer
    return ANALYSIS.format(verdict="SAFE" if one.kind == "safe" else "UNSAFE") + one.wanted
