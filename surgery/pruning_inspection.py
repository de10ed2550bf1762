"""Which visual tokens of an image a finished checkpoint keeps for a question, in figures and as a picture.

The model that chooses is the code that lies in the checkpoint, so nothing runs before that is what its lock says.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint.reader import Checkpoint, reading_errors
from surgery.errors import CorruptCheckpoint, MissingPackage, SourceUnavailable, UsageError
from surgery.finished import load_result, loading_errors, memory_errors, open_result, quiet, refuse_changed, stage
from surgery.progress import Report, silent
from surgery.pruning_picture import View, draw_pruning, seen

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

ANSWER = 16  # tokens, at most
EVERYTHING = 1.0


@dataclass(frozen=True)
class PruningReport:
    """What of one image stays for a question, and what that saves.

    `reserve` is the share of visual tokens that was asked for, `share` the one that stays. `kept` has the numbers of
    those that stay, from 0 in the order of the prompt. A cache's bytes are those after the prompt, as the model ran.
    `view` is what the vision tower sees, `notes` what is worth knowing beside it.
    """

    image: str
    question: str
    reserve: float
    visual_tokens: int
    kept_tokens: int
    share: float
    prompt_tokens_before: int
    prompt_tokens_after: int
    cache_bytes_before: int
    cache_bytes_after: int
    answer_with_all: str
    answer: str
    kept: tuple[int, ...]
    notes: tuple[str, ...] = ()
    view: View = field(repr=False, compare=False, kw_only=True)

    @property
    def said(self) -> dict[str, str]:
        """The question and both answers, by what they are called."""
        return {
            "question": self.question,
            f"answer with all {self.visual_tokens:,} visual tokens": self.answer_with_all,
            f"answer with the {self.kept_tokens:,} that stay": self.answer,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the view."""
        plain = {name: value for name, value in vars(self).items() if name != "view"}
        return {**plain, "kept": list(self.kept), "notes": list(self.notes)}

    def draw(self, path: Path | str) -> None:
        """Draw what stays as the PNG `path`. Raises UsageError, OutputExists, MissingPackage or EnvironmentFailure."""
        draw_pruning(Path(path), self)


def pruning_report(
    checkpoint: Path | str,
    *,
    image: Path | str,
    question: str,
    reserve: float | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
    report: Report = silent,
) -> PruningReport:
    """Ask the folder `checkpoint`, a result of `visual_pruning`, about an image file, and tell which of it stays.

    `reserve` is the share of visual tokens that stays, by default that of the checkpoint. The checkpoint's code runs in
    this process: without `trust_remote_code`, UnsafeCheckpoint is raised unless its files have the hashes of its lock.
    Raises the other errors of `surgery.errors` too.
    """
    folder, file = Path(checkpoint), Path(image)
    opened = open_result(folder, "visual_pruning")
    settings = _settings(opened)
    share = _share(settings["reserve"] if reserve is None else reserve)
    shown = _shown(file)
    if not trust_remote_code:
        with stage(report, "hash", "folder"):
            refuse_changed(folder)
    with quiet():
        with stage(report, "load", "model"):
            processor = _processor(opened)
            model = load_result(opened, device)
        if not hasattr(getattr(model, "model", None), "visual_tokens"):
            raise CorruptCheckpoint(
                "the model does not prune although its config says so", cause=f"its class is {type(model).__name__}",
                remedy="convert it again; auto_map of config.json must name the code that surgery wrote",
            )  # fmt: skip
        inputs = _inputs(processor, shown, question)
        visual = _visual(inputs["input_ids"][0], settings["token_ids"])
        view = seen(inputs, model.config, processor, len(visual))
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        with stage(report, "answer", "question"):
            whole, whole_bytes, whole_answer = _run(model, processor, inputs, EVERYTHING)
            stay, few_bytes, answer = _run(model, processor, inputs, share)
    kept = tuple(number for number, column in enumerate(visual) if column in stay)
    notes, drawn = [], view.rows * view.columns
    if view.first + drawn < len(visual):
        notes.append(f"a picture shows the base view, {drawn:,} of {len(visual):,} visual tokens; others see closer")
    return PruningReport(
        file.name, question, share, len(visual), len(kept), len(kept) / len(visual), len(whole), len(stay),
        whole_bytes, few_bytes, whole_answer, answer, kept, tuple(notes), view=view,
    )  # fmt: skip


def _settings(opened: Checkpoint) -> Mapping[str, Any]:
    """Those of the operation. Raises UsageError where the checkpoint prunes nothing."""
    found = (opened.config.get("surgery") or {}).get("visual_pruning")
    if not isinstance(found, Mapping):
        raise UsageError(
            f"{opened.folder} prunes no visual tokens", cause="its config.json has no surgery.visual_pruning",
            remedy=f"make one that does: surgery convert {opened.folder} OUT -o visual_pruning",
        )  # fmt: skip
    return found


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise UsageError(
            f"reserve is {value!r}", cause="it is the share of visual tokens that stays",
            remedy="give a number above 0 and at most 1",
        )  # fmt: skip
    return float(value)


def _shown(file: Path) -> Image:
    """The image of a file. Raises SourceUnavailable where there is none, MissingPackage without Pillow."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingPackage(
            "images are read with Pillow, which is not installed", cause=str(error),
            remedy="pip install 'surgery[vision]'",
        ) from error  # fmt: skip
    with reading_errors(file):
        if not file.is_file():
            raise SourceUnavailable(
                f"there is no image {file}", cause="no such file", remedy="check the path: --image FILE"
            )
        with file.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return Image.open(stream).convert("RGB")
            except MemoryError:
                raise
            except Exception as error:
                raise SourceUnavailable(
                    f"{file} is no image that can be read", cause=f"{type(error).__name__}: {error}"[:300],
                    remedy="give a whole PNG, JPEG or another file that Pillow knows",
                ) from error  # fmt: skip


def _processor(opened: Checkpoint) -> Any:
    """What makes images and questions into inputs. Raises UsageError where the checkpoint has none."""
    from transformers import AutoProcessor

    with loading_errors(opened.folder, "processor"):
        found = AutoProcessor.from_pretrained(str(opened.folder), trust_remote_code=opened.remote_code)
    if not (hasattr(found, "image_processor") and getattr(found, "chat_template", None)):
        raise UsageError(
            f"{opened.folder} has no processor with a chat template", cause="it says how a question is put to a model",
            remedy="convert a base that has preprocessor_config.json, a tokenizer and chat_template.jinja",
        )  # fmt: skip
    return found


def _inputs(processor: Any, image: Image, question: str) -> dict[str, Tensor]:
    """The prompt of one question about one image. Raises UsageError for a question that cannot be put."""
    mark = getattr(processor, "image_token", None)
    if mark and mark in question:
        raise UsageError(
            f"the question has the word {mark!r}", cause="it stands for an image, and is put there by itself",
            remedy="leave it out",
        )  # fmt: skip
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    try:
        text = processor.apply_chat_template(turn, add_generation_prompt=True)
        return dict(processor(images=[image], text=[text], return_tensors="pt"))
    except Exception as error:
        raise UsageError(
            "the processor makes no prompt of this image and this question",
            cause=f"{type(error).__name__}: {error}"[:300], remedy="give another image, or another question",
        ) from error  # fmt: skip


def _visual(ids: Tensor, tokens: list[int]) -> list[int]:
    """Columns of the visual tokens of a prompt [L]."""
    import torch

    found: list[int] = torch.isin(ids, torch.tensor(tokens)).nonzero()[:, 0].tolist()
    if not found:
        raise CorruptCheckpoint(
            "the prompt has no visual token", cause="processor, chat template and model do not agree on what it is",
            remedy="use the processor that the model was trained with",
        )  # fmt: skip
    return found


def _run(model: Any, processor: Any, inputs: Mapping[str, Tensor], reserve: float) -> tuple[set[int], int, str]:
    """Columns of the prompt that stay, the bytes of their cache, and the answer."""
    import torch

    count = inputs["input_ids"].shape[1]
    own = {"past_key_values": model.surgery_cache()} if hasattr(model, "surgery_cache") else {}
    try:
        with torch.no_grad(), memory_errors(count, "ask about a smaller image"):
            output = model(**inputs, **own, use_cache=True, visual_reserve=reserve, logits_to_keep=1)
            written = model.generate(
                **inputs, visual_reserve=reserve, max_new_tokens=ANSWER, do_sample=False, num_beams=1
            )
    except (ValueError, NotImplementedError) as error:
        raise UsageError(
            "the model does not take this image and this question", cause=str(error)[:300],
            remedy="give another image, or reserve=1.0 where that is what the line above says",
        ) from error  # fmt: skip
    kept = getattr(output, "kept_indices", None)
    columns = range(count) if kept is None else kept[0].tolist()
    answer = processor.tokenizer.decode(written[0, count:], skip_special_tokens=True)
    return set(columns), _bytes(output.past_key_values), answer.strip()


def _bytes(cache: Any) -> int:
    """What a cache takes; one that is coded counts itself."""
    if hasattr(cache, "report"):
        return int(cache.report()["bytes"])
    return sum(part.nbytes for keys, values, *_ in cache for part in (keys, values))
