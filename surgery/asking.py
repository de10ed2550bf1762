"""A question about an image file, put to a finished checkpoint: what is read for it, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint.reader import Checkpoint, reading_errors
from surgery.emission.pictures import View
from surgery.errors import CorruptCheckpoint, MissingPackage, SourceUnavailable, UsageError
from surgery.finished import load_result, loading_errors, memory_errors, refuse_changed, stage
from surgery.progress import Report
from surgery.pruning_picture import seen

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

ANSWER = 16  # tokens, at most


def settings_of(opened: Checkpoint, operation: str, does_not: str) -> Mapping[str, Any]:
    """Those of an operation. Raises UsageError where the checkpoint has none of it; `does_not` says what that means."""
    found = (opened.config.get("surgery") or {}).get(operation)
    if not isinstance(found, Mapping):
        raise UsageError(
            f"{opened.folder} {does_not}", cause=f"its config.json has no surgery.{operation}",
            remedy=f"make one that does: surgery convert {opened.folder} OUT -o {operation}",
        )  # fmt: skip
    return found


def checked_share(value: Any) -> float:
    """A share of visual tokens. Raises UsageError where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise UsageError(
            f"reserve is {value!r}", cause="it is the share of visual tokens that stays",
            remedy="give a number above 0 and at most 1",
        )  # fmt: skip
    return float(value)


def shown_image(file: Path) -> Image:
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


def processor_of(opened: Checkpoint) -> Any:
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


def prompt_of(processor: Any, image: Image, question: str) -> dict[str, Tensor]:
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


def visual_of(ids: Tensor, tokens: list[int]) -> list[int]:
    """Columns of the visual tokens of a prompt [L]. Raises CorruptCheckpoint where there is none."""
    from surgery.probe.asked import visual_columns

    found = visual_columns(ids, tokens)
    if not found:
        raise CorruptCheckpoint(
            "the prompt has no visual token", cause="processor, chat template and model do not agree on what it is",
            remedy="use the processor that the model was trained with",
        )  # fmt: skip
    return found


@dataclass(frozen=True)
class Put:
    """A question that was put to a loaded result: what the model takes, its visual columns, and the image it sees."""

    model: Any
    processor: Any
    inputs: dict[str, Tensor]
    visual: list[int]
    view: View

    def text(self, ids: Any) -> str:
        """What tokens say."""
        return str(self.processor.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def put(
    opened: Checkpoint, image: Image, question: str, tokens: list[int], *, device: str, trusted: bool, report: Report
) -> Put:
    """Load a result, whose code must be `trusted` or that of its lock, and make its prompt of an image and a question.

    `tokens` are those that stand for an image. Raises the errors of `surgery.errors`.
    """
    if not trusted:
        with stage(report, "hash", "folder"):
            refuse_changed(opened.folder)
    with stage(report, "load", "model"):
        processor = processor_of(opened)
        model = load_result(opened, device)
    inputs = prompt_of(processor, image, question)
    visual = visual_of(inputs["input_ids"][0], tokens)
    view = seen(inputs, model.config, processor, len(visual))
    return Put(model, processor, {name: value.to(model.device) for name, value in inputs.items()}, visual, view)


def refuse_other_class(model: Any, *, has: bool, does: str) -> None:
    """Raise CorruptCheckpoint where a model lacks what its config says it `does`."""
    if not has:
        raise CorruptCheckpoint(
            f"the model does not {does} although its config says so", cause=f"its class is {type(model).__name__}",
            remedy="convert it again; auto_map of config.json must name the code that surgery wrote",
        )  # fmt: skip


def plain_report(report: Any) -> dict[str, Any]:
    """The fields of a report as plain data, without its view."""
    fields = {name: value for name, value in vars(report).items() if name != "view"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def base_view_notes(view: View, visual: int) -> tuple[str, ...]:
    """A line where a picture shows fewer visual tokens than there are."""
    drawn = view.rows * view.columns
    if view.first + drawn >= visual:
        return ()
    return (f"a picture shows the base view, {drawn:,} of {visual:,} visual tokens; others see closer",)


@contextmanager
def asking_errors(inputs: Mapping[str, Tensor], otherwise: str) -> Iterator[None]:
    """What a model refuses is a UsageError, `otherwise` being what to do; too little memory an EnvironmentFailure."""
    try:
        with memory_errors(inputs["input_ids"].shape[1], "ask about a smaller image"):
            yield
    except (ValueError, NotImplementedError) as error:
        raise UsageError(
            "the model does not take this image and this question", cause=str(error)[:300],
            remedy=f"give another image, or {otherwise}",
        ) from error  # fmt: skip
