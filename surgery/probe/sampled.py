"""A sample image, for a card to show: what of it is kept and what is masked, and what is answered.

What hinders this is no fault of the model: the check is then skipped, with the reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from .asked import Asked, ask, visual_columns
from .outcome import Outcome, passed, skipped
from .subject import Subject
from .views import shown

if TYPE_CHECKING:
    from PIL.Image import Image

ANSWER = 16  # tokens, at most
ENOUGH, ENLARGED = 64, 7  # visual tokens below which the sample is shown so many times larger


def visual_sample(subject: Subject) -> Outcome:
    """The model is asked about the job's sample; figures go to `subject.sample`, the image it saw to the job's file."""
    settings: dict[str, Any] = getattr(subject.model.config, "surgery", None) or {}
    pruning, defense = settings.get("visual_pruning") or {}, settings.get("visual_defense") or {}
    wanted = bool(defense) and defense["masked_patches"] > 0
    masks = wanted and defense["scorer"] != "given"
    if not pruning and not masks:
        return skipped("it prunes no visual tokens, and masks nothing by itself")
    processor, why = loaded_processor(subject)
    if processor is None:
        return skipped(why)
    tokens = (pruning or defense)["token_ids"]
    inputs = _prompt(subject, processor, tokens)
    whole = ({"visual_reserve": 1.0} if pruning else {}) | ({"defense": False} if defense else {})
    own: dict[str, Any] = {"masked_tiles": [[]]} if wanted and not masks else {}  # what the caller would have to say
    try:
        before = ask(subject.model, inputs, count=ANSWER, pad_token_id=0, **whole)
        after = ask(subject.model, inputs, count=ANSWER, pad_token_id=0, **own)
    except (ValueError, NotImplementedError) as error:  # what the code of a result refuses, it says in one of these
        return skipped(f"the model does not take the sample image: {error}")
    count, kept = after.visual(tokens)
    view = shown(inputs, subject.model.config, processor, count)
    if view is None:
        return skipped(f"how {count} visual tokens lie on an image is not known")
    sample = subject.job["sample"]
    view.image.save(sample["view"])
    subject.sample = {
        "question": sample["question"], "visual_tokens": count, "kept": list(kept) if pruning else None,
        "rows": view.rows, "columns": view.columns, "first": view.first,
        "side": defense["side"] if masks else None, **_masked(after),
        "answer_whole": _text(processor, before), "answer": _text(processor, after),
    }  # fmt: skip
    return passed()


def loaded_processor(subject: Subject) -> tuple[Any, str]:
    """What shows images to the model; None where the folder has none that can be used here, and why."""
    if not any((subject.folder / f"{name}.json").is_file() for name in ("preprocessor_config", "processor_config")):
        return None, "the folder has no processor, which shows images to the model"
    trust = bool(subject.job.get("trust_remote_code"))
    try:
        with subject.noise.muted():  # what a processor says of itself is the base's
            processor = transformers.AutoProcessor.from_pretrained(subject.folder, trust_remote_code=trust)
    except ImportError as error:  # some want torchvision
        return None, "its processor wants a package that is not installed: " + " ".join(str(error).split())
    except (OSError, ValueError) as error:  # none that transformers knows
        return None, "it has no processor that loads: " + " ".join(str(error).split())
    if not getattr(processor, "chat_template", None) or getattr(processor, "image_processor", None) is None:
        return None, "the folder has no processor with a chat template, which shows images to the model"
    return processor, ""


def prompt(processor: Any, image: Image, question: str, device: torch.device) -> dict[str, Any]:
    """What the model takes to answer a question about an image."""
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True)
    made = processor(images=[image], text=[text], return_tensors="pt")
    return {name: value.to(device) for name, value in made.items()}


def _prompt(subject: Subject, processor: Any, tokens: list[int]) -> dict[str, Any]:
    """The job's question about its image, which is enlarged for processors that make few tokens of a small one."""
    from PIL import Image

    sample = subject.job["sample"]
    with Image.open(Path(sample["image"])) as opened:
        image = opened.convert("RGB")
    inputs = prompt(processor, image, sample["question"], subject.device)
    if len(visual_columns(inputs["input_ids"][0], tokens)) >= ENOUGH:
        return inputs
    size = image.width * ENLARGED, image.height * ENLARGED
    return prompt(processor, image.resize(size, Image.Resampling.NEAREST), sample["question"], subject.device)


def _masked(asked: Asked) -> dict[str, Any]:
    """The black tiles of the one image, and the scores of all."""
    if asked.defense is None or not asked.defense["masked_tiles"]:
        return {"masked": None, "scores": None}
    scores = asked.defense["scores"][0]
    return {"masked": asked.defense["masked_tiles"][0], "scores": None if scores is None else scores.tolist()}


def _text(processor: Any, asked: Asked) -> str:
    return str(processor.tokenizer.decode(asked.answer, skip_special_tokens=True)).strip()
