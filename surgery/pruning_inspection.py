"""Which visual tokens of an image a finished checkpoint keeps for a question, in figures and as a picture.

The model that chooses is the code that lies in the checkpoint, so nothing runs before that is what its lock says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.asking import (
    ANSWER,
    Put,
    asking_errors,
    base_view_notes,
    checked_share,
    plain_report,
    put,
    refuse_other_class,
    settings_of,
    shown_image,
)  # fmt: skip
from surgery.emission.pictures import View
from surgery.finished import open_result, quiet, stage
from surgery.progress import Report, silent
from surgery.pruning_picture import draw_pruning

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
        return plain_report(self)

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
    file, opened = Path(image), open_result(Path(checkpoint), "visual_pruning")
    settings = settings_of(opened, "visual_pruning", "prunes no visual tokens")
    share = checked_share(settings["reserve"] if reserve is None else reserve)
    shown = shown_image(file)
    with quiet():
        tokens = settings["token_ids"]
        asked = put(opened, shown, question, tokens, device=device, trusted=trust_remote_code, report=report)
        prunes = hasattr(getattr(asked.model, "model", None), "visual_tokens")
        refuse_other_class(asked.model, has=prunes, does="prune")
        with stage(report, "answer", "question"):
            whole, whole_bytes, whole_answer = _run(asked, EVERYTHING)
            stay, few_bytes, answer = _run(asked, share)
    count, kept = len(asked.visual), tuple(number for number, column in enumerate(asked.visual) if column in stay)
    return PruningReport(
        file.name, question, share, count, len(kept), len(kept) / count, len(whole), len(stay), whole_bytes, few_bytes,
        whole_answer, answer, kept, base_view_notes(asked.view, count), view=asked.view,
    )  # fmt: skip


def _run(asked: Put, reserve: float) -> tuple[set[int], int, str]:
    """Columns of the prompt that stay, the bytes of their cache, and the answer; what defends is switched off."""
    import torch

    model, inputs, count = asked.model, asked.inputs, asked.inputs["input_ids"].shape[1]
    own = {"past_key_values": model.surgery_cache()} if hasattr(model, "surgery_cache") else {}
    plain = {"defense": False} if "visual_defense" in model.config.surgery else {}
    with torch.no_grad(), asking_errors(inputs, "reserve=1.0 where that is what the line above says"):
        output = model(**inputs, **own, use_cache=True, visual_reserve=reserve, logits_to_keep=1)
        written = model.generate(
            **inputs, **plain, visual_reserve=reserve, max_new_tokens=ANSWER, do_sample=False, num_beams=1
        )
    kept = getattr(output, "kept_indices", None)
    columns = range(count) if kept is None else kept[0].tolist()
    return set(columns), _bytes(output.past_key_values), asked.text(written[0, count:])


def _bytes(cache: Any) -> int:
    """What a cache takes; one that is coded counts itself."""
    if hasattr(cache, "report"):
        return int(cache.report()["bytes"])
    return sum(part.nbytes for keys, values, *_ in cache for part in (keys, values))
