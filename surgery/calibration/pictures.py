"""Questions about images: read from jsonl or drawn, and made into batches by the base's own processor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.checkpoint.reader import Checkpoint
from surgery.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

IGNORED = -100  # a label that is none
FORM = 'a line is {"image": "a.png", "question": "...", "answer": "..."}, or has `conversations` as LLaVA\'s data'


@dataclass(frozen=True, slots=True)
class Question:
    """A question about images, and its answer."""

    images: tuple[Path | Image, ...]
    text: str
    answer: str


def drawn_questions(count: int, *, seed: int, heldout: bool) -> list[Question]:
    """Questions about the pictures that `builtin:llava` knows; those held out are of other pictures."""
    from surgery.builtin.pictures import visual_prompts

    prompts = visual_prompts(count, seed=seed, heldout=heldout)
    return [Question(prompt.images, prompt.question, prompt.answer) for prompt in prompts]


def read_questions(file: Path, given: str) -> list[Question]:
    """Every question of a jsonl file; of LLaVA's conversations each turn alone. Raises UsageError, naming the line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{given} cannot be read", cause=f"{type(error).__name__}: {error}", remedy="name a jsonl file"
        ) from error
    found = [
        question
        for number, line in enumerate(lines, 1)
        if line.strip()
        for question in _questions(line, file.parent, f"{given}, line {number}")
    ]
    if not found:
        raise UsageError(f"{given} has no question", cause="it has no line", remedy=FORM)
    return found


def _questions(line: str, folder: Path, where: str) -> Iterator[Question]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON", cause=str(error), remedy=FORM) from error
    if not isinstance(entry, dict):
        raise UsageError(f"{where} is not an object", cause=f"it is a {type(entry).__name__}", remedy=FORM)
    named = entry.get("image", [])
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{where} names no image", cause=f"its image is {named!r}"[:200], remedy=FORM)
    images = tuple(_inside(folder, name, where) for name in names)
    turns = entry.get("conversations")
    if turns is None:
        pairs = [(entry.get("question"), entry.get("answer"))]
    elif isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        values = [turn.get("value") for turn in turns]
        pairs = list(zip(values[::2], values[1::2], strict=False))
    else:
        pairs = []
    if not pairs or not all(isinstance(text, str) and isinstance(answer, str) and answer for text, answer in pairs):
        raise UsageError(f"{where} has no question with an answer", cause="both must be text", remedy=FORM)
    for text, answer in pairs:
        yield Question(images, str(text).replace("<image>", "").strip(), str(answer))


def _inside(folder: Path, name: str, where: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise UsageError(
            f"{where} names an image outside of its folder", cause=name[:200], remedy="put images beside the file"
        )
    if not path.is_file():
        raise UsageError(f"{where} names an image that is not there", cause=str(path), remedy="check the name")
    return path


def _opened(image: Path | Image) -> Image:
    from PIL import Image as Images

    if not isinstance(image, Path):
        return image
    with Images.open(image) as opened:
        return opened.convert("RGB")


@dataclass(frozen=True)
class Batch:
    """What the model takes, with answers behind the prompts; `labels` [B, L] has their ids and IGNORED elsewhere."""

    inputs: dict[str, Tensor]
    labels: Tensor


class Batches:
    """Makes batches of questions. Raises UsageError where the base has no processor with a chat template."""

    def __init__(self, checkpoint: Checkpoint, device: str) -> None:
        from transformers import AutoProcessor

        try:
            self._processor: Any = AutoProcessor.from_pretrained(
                str(checkpoint.folder), trust_remote_code=checkpoint.remote_code
            )
            self._tokenizer = self._processor.tokenizer
        except (OSError, ValueError, AttributeError) as error:
            raise UsageError(
                "the base has no processor that loads", cause=f"{type(error).__name__}: {error}"[:400],
                remedy="put the files of the processor that it was trained with beside its weights",
            ) from error  # fmt: skip
        if not getattr(self._processor, "chat_template", None):
            raise UsageError(
                "the base's processor has no chat template", cause="it says how a question is put to the model",
                remedy="add chat_template.jinja to the base",
            )  # fmt: skip
        self._tokenizer.padding_side = "left"
        self._device = device

    def __call__(self, questions: Sequence[Question]) -> Batch:
        """The batch of these questions; every answer ends with the token that ends answers."""
        prompts = self.prompts(questions)
        ends = self._tokenizer.eos_token_id
        answers = [
            self._tokenizer(question.answer, add_special_tokens=False).input_ids + ([] if ends is None else [ends])
            for question in questions
        ]
        width = max(map(len, answers))
        extra = torch.tensor([ids + [IGNORED] * (width - len(ids)) for ids in answers], device=self._device)
        inputs = dict(prompts)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], extra.clamp(min=0)], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], (extra >= 0).long()], 1)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(extra)], 1)
        labels = torch.cat([torch.full_like(prompts["input_ids"], IGNORED), extra], 1)
        return Batch(inputs, labels)

    def prompts(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        """What the model takes to answer, padded on the left."""
        images, texts = [], []
        for question in questions:
            images += [_opened(image) for image in question.images]
            content = [{"type": "image"} for _ in question.images] + [{"type": "text", "text": question.text}]
            turn = [{"role": "user", "content": content}]
            texts.append(self._processor.apply_chat_template(turn, add_generation_prompt=True))
        made = self._processor(images=images, text=texts, padding=True, return_tensors="pt")
        return {name: value.to(self._device) for name, value in made.items()}
