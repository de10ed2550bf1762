"""What trains the scorer of visual tokens: its data, its relaxation, and the settings around it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.calibration.pictures import IGNORED, Batch, Question, read_questions
from surgery.checkpoint.resolve import open_base
from surgery.errors import ManifestError, UnsupportedModel, UsageError
from surgery.operations.visual_pruning import Scorer, VisualPruningSettings, scorer_shapes
from surgery.runtime.surgery_visual_scorer import VisualScorer
from surgery.training import visual
from surgery.training.visual import COST, Model, _Run, against, relaxed
from tests.tiny_vision import IMAGE, VIDEO, inputs_of, write_tiny_vision
from tests.visual_reference import convert, load
from tests.visual_stages_reference import with_scorers


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


SCHEDULE = {"0": 0.75, "1": 0.5, "2": 0.2}


def scheduled(settings: dict[str, object]) -> VisualPruningSettings:
    return VisualPruningSettings.model_validate_json(json.dumps(settings))


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_what_leaves_in_training_is_what_leaves_a_result(family: str, tmp_path: Path) -> None:
    """Masks of layers there, fewer columns here: the same tokens, and the same logits of answers."""
    schedule = SCHEDULE if family == "llava" else {"0": 0.75, "2": 0.2}
    size = {"width": 32, "heads": 2, "layers": 1}
    settings = scheduled({"stages": schedule, "train": {"images": "builtin", "scorer": size}})
    base = write_tiny_vision(tmp_path / "base", family)
    result = load(with_scorers(convert(base, tmp_path / "plain", stages=schedule), tmp_path / "out"))
    training: Any = SimpleNamespace(student=open_base(str(base)), device="cpu")
    model = Model(training, [IMAGE, VIDEO])
    assert settings.train is not None
    run = _Run(training, settings, settings.train, model, training)
    inputs = inputs_of(family, (1, 2))
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    prompt = model.prompt(Batch(inputs, labels))
    scorers = {int(layer): scorer for layer, scorer in result.model.visual_scorer.items()}
    with torch.no_grad():
        found = run._descended(prompt, run._by(scorers))
        logits = model.logits(found, found.earlier)
        output = result(**inputs, labels=labels)
    kept = torch.zeros_like(prompt.valid)
    for row, columns in enumerate(output.kept_indices):
        kept[row, columns[columns >= 0]] = True
    assert found.gone is not None
    assert torch.equal(kept, prompt.valid & ~found.gone)
    torch.testing.assert_close(logits, output.logits[:, -4:-1].flatten(0, 1), rtol=0, atol=2e-5)
    loss = run._answer_loss(scorers[2])(run._descended(prompt, run._by(scorers), until=2))
    loss.backward()
    learned = {layer for layer, scorer in scorers.items() if scorer.score.weight.grad is not None}
    assert learned == {2}
    assert float(scorers[2].score.weight.grad.abs().max()) > 0


def test_scorers_of_several_layers_learn_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visual, "MOST_HELD_OUT", 16)
    monkeypatch.setattr(visual, "CALIBRATED", 16)
    size = {"width": 16, "heads": 2, "layers": 1}
    train = {"images": "builtin", "questions": 64, "batch_size": 16, "learning_rate": 1e-3, "scorer": size}
    operation = {"visual_pruning": {"stages": {"1": 0.5, "3": 0.25}, "train": train}}
    manifest = surgery.manifest_from_dict({"surgery": 1, "operations": [operation], "verify": False})
    out = surgery.convert("builtin:llava", tmp_path / "out", manifest).out
    (file,) = out.glob("*.safetensors")
    found = {name: tensor.shape for name, tensor in load_file(file).items() if "scorer" in name}
    shapes = scorer_shapes(128, Scorer(**size))
    assert found == {f"model.visual_scorer.{layer}.{name}": size for layer in "13" for name, size in shapes.items()}
    record = json.loads((tmp_path / "out.0.visual_pruning.json").read_text())
    assert set(record["stages"]) == {"1", "3"}
    assert [entry["stage"] for entry in record["history"]] == [
        f"{stage} before layer {layer}" for layer in (1, 3) for stage in ("attention", "answers")
    ]
    assert load(out).model.visual_scorer.keys() == {"1", "3"}
