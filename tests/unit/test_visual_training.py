"""What trains the scorer of visual tokens: its data, its relaxation, and the settings around it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import surgery
from surgery.calibration.pictures import Question, read_questions
from surgery.errors import ManifestError, UnsupportedModel, UsageError
from surgery.operations.visual_pruning import Scorer, scorer_shapes
from surgery.runtime.surgery_visual_scorer import VisualScorer
from surgery.training.visual import COST, against, relaxed


def lines(folder: Path, *entries: object) -> Path:
    (folder / "a.png").write_bytes(b"")
    file = folder / "data.jsonl"
    file.write_text("\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries))
    return file


def test_both_forms_of_lines_are_read(tmp_path: Path) -> None:
    turns = [("human", "<image>\nWhat?"), ("gpt", "A cat."), ("human", "Where?"), ("gpt", "Here.")]
    file = lines(
        tmp_path,
        {"image": "a.png", "question": "Which?", "answer": "this"},
        "",
        {"image": ["a.png", "a.png"], "conversations": [{"from": who, "value": text} for who, text in turns]},
    )
    one = (tmp_path / "a.png").resolve()
    assert read_questions(file, "data.jsonl") == [
        Question((one,), "Which?", "this"), Question((one, one), "What?", "A cat."), Question((one, one), "Where?", "Here."),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1 is not JSON"),
        ("[1]", "not an object"),
        ({"question": "q", "answer": "a"}, "names no image"),
        ({"image": 3, "question": "q", "answer": "a"}, "names no image"),
        ({"image": "../x.png", "question": "q", "answer": "a"}, "outside of its folder"),
        ({"image": "/etc/hosts", "question": "q", "answer": "a"}, "outside of its folder"),
        ({"image": "b.png", "question": "q", "answer": "a"}, "not there"),
        ({"image": "a.png", "question": "q"}, "no question with an answer"),
        ({"image": "a.png", "question": "q", "answer": ""}, "no question with an answer"),
        ({"image": "a.png", "conversations": [3]}, "no question with an answer"),
        ({"image": "a.png", "conversations": [{"value": "q"}]}, "no question with an answer"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_questions(lines(tmp_path, line), "data.jsonl")


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_questions(tmp_path / "none.jsonl", "none.jsonl")
    with pytest.raises(UsageError, match="has no question"):
        read_questions(lines(tmp_path), "data.jsonl")


@pytest.mark.parametrize("count", [1, 5, 16])
def test_what_is_relaxed_keeps_exactly_so_many_and_has_a_gradient(count: int) -> None:
    torch.manual_seed(0)
    scores = torch.randn(16, requires_grad=True)
    hidden = relaxed(scores, count)
    assert hidden.tolist().count(0.0) == count
    assert sorted(set(hidden.tolist())) == ([-COST, 0.0] if count < 16 else [0.0])
    (hidden * torch.randn(16)).sum().backward()
    assert scores.grad is not None
    assert bool(scores.grad.abs().max() > 0) or count == 16


def test_a_hidden_token_still_sees_itself() -> None:
    added = against(torch.tensor([[0.0, -3.0]]))
    assert added.tolist() == [[[[0.0, -3.0], [0.0, 0.0]]]]


@pytest.mark.parametrize("size", [Scorer(width=16, heads=2), Scorer(width=32, heads=4, layers=3)])
def test_planned_shapes_are_those_of_the_module(size: Scorer) -> None:
    made = VisualScorer(24, size.width, size.heads, size.layers)
    assert scorer_shapes(24, size) == {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reserve": 0}, "greater than 0"), ({"reserve": 1.5}, "less than or equal to 1"), ({"reserve": True}, "reserve"),
        ({"reserve": float("nan")}, "reserve"), ({"min_keep": 0}, "min_keep"), ({"reservee": 0.5}, "reserve"),
        ({"train": {}}, "images"), ({"train": {"images": ""}}, "name of a file"),
        ({"train": {"images": "a.jsonl", "scorer": {"width": 20, "heads": 8}}}, "multiple of heads"),
        ({"train": {"images": "a.jsonl", "epochs": 0}}, "epochs"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ManifestError, match=said):
        surgery.manifest_from_dict({"surgery": 1, "operations": [{"visual_pruning": settings}]})


def test_a_model_without_eyes_is_refused() -> None:
    manifest = surgery.manifest_from_dict({"surgery": 1, "operations": ["visual_pruning"]})
    with pytest.raises(UnsupportedModel, match="visual_pruning does not fit"):
        surgery.plan("builtin:llama", manifest)
