"""Which tiles of an image a finished checkpoint masks for a question, and what it answers, with and without a defence.

The code that masks is that of the checkpoint, so nothing runs before that is what its lock says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

from surgery.asking import (
    ANSWER,
    asking_errors,
    base_view_notes,
    checked_share,
    plain_report,
    put,
    refuse_other_class,
    settings_of,
    shown_image,
)  # fmt: skip
from surgery.defense_picture import draw_defense
from surgery.emission.pictures import View
from surgery.errors import UsageError
from surgery.finished import open_result, quiet, stage
from surgery.progress import Report, silent


@dataclass(frozen=True)
class DefenseReport:
    """What of one image is masked for a question, and what becomes of the answer.

    `tiles` is how many there are, `side` along a side; `masked` has the numbers of those that are black, from 0 row by
    row, and `scores` the relevance of each; None where nothing judged them. `answer_undefended` is that of
    `defense=False`. With an intention analysis, `analysis` is what the model wrote before its answer, and `tag_found`
    whether it marked that. `prompt_tokens` are those of the question as it was put, `prompt_tokens_read` those that
    the language model reads. Of a result that also prunes, `kept` has the numbers of the visual tokens that stay under
    the masks; None where it does not. `view` is what the vision tower would see without masks.
    """

    image: str
    question: str
    tiles: int
    masked: tuple[int, ...]
    scores: tuple[float, ...] | None
    visual_tokens: int
    kept: tuple[int, ...] | None
    prompt_tokens: int
    prompt_tokens_read: int
    answer_undefended: str
    answer: str
    analysis: str | None
    tag_found: bool | None
    notes: tuple[str, ...] = ()
    view: View = field(repr=False, compare=False, kw_only=True)

    @property
    def side(self) -> int:
        """Tiles along a side."""
        return isqrt(self.tiles)

    @property
    def said(self) -> dict[str, str]:
        """The question and the answers, by what they are called."""
        analysis = {} if self.analysis is None else {"intention": self.analysis}
        return {
            "question": self.question,
            "answer without defence": self.answer_undefended,
            **analysis,
            "answer": self.answer,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the view."""
        return plain_report(self)

    def draw(self, path: Path | str) -> None:
        """Draw the masks as the PNG `path`. Raises UsageError, OutputExists, MissingPackage or EnvironmentFailure."""
        draw_defense(Path(path), self)


def defense_report(
    checkpoint: Path | str,
    *,
    image: Path | str,
    question: str,
    masked_tiles: Sequence[int] | None = None,
    reserve: float | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
    report: Report = silent,
) -> DefenseReport:
    """Ask the folder `checkpoint`, a result of `visual_defense`, about an image file, and tell what it masks.

    `masked_tiles` are masked in place of those that the checkpoint chooses; `reserve`, for a result that also prunes,
    is the share of visual tokens that stays. The checkpoint's code runs in this process: without `trust_remote_code`,
    UnsafeCheckpoint is raised unless its files have the hashes of its lock. Raises the other errors of
    `surgery.errors` too.
    """
    file, opened = Path(image), open_result(Path(checkpoint), "visual_defense")
    settings = settings_of(opened, "visual_defense", "masks nothing")
    _check_masks(settings, masked_tiles)
    prunes = "visual_pruning" in opened.config["surgery"]
    if reserve is not None and not prunes:
        raise UsageError(
            "a reserve is given, and this result prunes nothing", cause="its config.json has no surgery.visual_pruning",
            remedy="leave the reserve out",
        )  # fmt: skip
    kept = {} if reserve is None else {"visual_reserve": checked_share(reserve)}
    masks = {} if masked_tiles is None else {"masked_tiles": [list(masked_tiles)]}
    shown, tokens = shown_image(file), settings["token_ids"]
    with quiet():
        asked = put(opened, shown, question, tokens, device=device, trusted=trust_remote_code, report=report)
        refuse_other_class(asked.model, has=hasattr(asked.model, "set_defense_templates"), does="defend")
        from surgery.probe.asked import ask

        with stage(report, "answer", "question"), asking_errors(asked.inputs, "a result with fewer tiles"):
            plain = ask(asked.model, asked.inputs, count=ANSWER, defense=False, **kept)
            found = ask(asked.model, asked.inputs, count=ANSWER, **kept, **masks)
    told: Mapping[str, Any] = found.defense or {}
    of_image = {name: (told.get(name) or [None])[0] for name in ("masked_tiles", "scores")}
    scores, analysis = of_image["scores"], told.get("analysis_ids")
    count, stay = found.visual(tokens)
    return DefenseReport(
        image=file.name, question=question, tiles=settings["tiles"], masked=tuple(of_image["masked_tiles"] or ()),
        scores=None if scores is None else tuple(scores.tolist()), visual_tokens=count, kept=stay if prunes else None,
        prompt_tokens=asked.inputs["input_ids"].shape[1], prompt_tokens_read=len(found.kept),
        answer_undefended=asked.text(plain.answer), answer=asked.text(found.answer),
        analysis=None if analysis is None else asked.text(analysis), tag_found=told.get("tag_found"),
        notes=base_view_notes(asked.view, count), view=asked.view,
    )  # fmt: skip


def _check_masks(settings: Mapping[str, Any], given: Sequence[int] | None) -> None:
    """Raise UsageError for tiles that are none, and where only the caller can say them and does not."""
    tiles = settings["tiles"]
    if given is None:
        if settings["scorer"] == "given" and settings["masked_patches"]:
            raise UsageError(
                "this result masks what its caller says", cause="it was made with scorer: given",
                remedy="say which tiles are black: --masked-tiles 0,5,9 (masked_tiles=[0, 5, 9])",
            )  # fmt: skip
        return
    wrong = [tile for tile in given if isinstance(tile, bool) or not isinstance(tile, int) or not 0 <= tile < tiles]
    if wrong:
        raise UsageError(
            f"{wrong[0]!r} is no tile", cause=f"tiles are numbered row by row, from 0 to {tiles - 1}",
            remedy="give numbers of tiles",
        )  # fmt: skip
