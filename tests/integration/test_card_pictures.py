"""A card's picture, from a conversion to its repetition: in OUT, in the lock, and the same bytes again."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import surgery
from surgery import verification
from surgery.completion import SAMPLES
from surgery.emission.pictures import PLACE
from tests.tiny_vision import write_tiny_vision

MANIFEST: dict[str, Any] = {
    "surgery": 1,
    "operations": [{"visual_pruning": {}}, {"visual_defense": {"intention_analysis": False, "scorer": "own"}}],
    "verify": {"text": None},
}
WHY, HEADING = "there is no processor", "## What it sees"


class Probe:
    """Runs `real` once for the sample alone, and says the same again afterwards; without it says that none is shown."""

    def __init__(self, real: Callable[..., dict[str, Any]] | None) -> None:
        self.real, self.view, self.jobs = real, b"", list[Mapping[str, Any]]()
        check = {"name": "visual_sample", "status": "skip", "detail": WHY}
        versions = dict.fromkeys(("python", "torch", "transformers"), "1")
        self.said: dict[str, Any] = {"checks": [check], "measurements": {}, "sample": None, **versions}

    def __call__(self, job: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        self.jobs.append(job)
        if self.real is not None and not self.view:
            self.said = self.real({**job, "checks": ["visual_sample", "no_warnings"]}, **options)
            self.view = Path(job["sample"]["view"]).read_bytes()
        elif self.view:
            Path(job["sample"]["view"]).write_bytes(self.view)
        return self.said


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Probe:
    probe = Probe(None)
    monkeypatch.setattr(verification, "run_probe", probe)
    return probe


def convert(base: str, out: Path, **changes: Any) -> surgery.Conversion:
    return surgery.convert(base, out, surgery.manifest_from_dict(MANIFEST | changes))


@pytest.mark.slow
def test_a_picture_is_a_file_of_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "run_probe", Probe(verification.run_probe))
    done = convert("builtin:llava", tmp_path / "out")
    made = (tmp_path / "out" / PLACE).read_bytes()
    assert Image.open(io.BytesIO(made)).size == (384, 384)
    assert done.verification is not None
    assert [check.name for check in done.verification.checks if check.status == "pass"][-2:] == [
        "visual_sample",
        "no_warnings",
    ]
    sample = done.verification.sample
    assert sample is not None
    text = (tmp_path / "out/README.md").read_text()
    assert f"]({PLACE})" in text
    assert f"black: {', '.join(map(str, sample['masked']))} |" in text
    assert "16 of 64 kept" in text
    lock = json.loads((tmp_path / "out/surgery.lock.json").read_text())
    assert lock["outputs"][PLACE]["bytes"] == len(made)
    assert lock["verification"]["sample"] == sample
    assert verification.check_hashes(tmp_path / "out").status == "pass"
    again = surgery.reproduce(tmp_path / "out/surgery.lock.json", tmp_path / "again")
    assert (again.out / PLACE).read_bytes() == made
    (tmp_path / "out" / PLACE).write_bytes(made + b"\0")
    assert PLACE in verification.check_hashes(tmp_path / "out").detail


def test_a_picture_that_differs_is_no_other_result(tmp_path: Path, silent: Probe) -> None:
    """What was measured depends on the processor, as the card does: only files that are loaded have to be equal."""
    silent.view, silent.said["sample"] = (SAMPLES / "0.png").read_bytes(), {
        "question": "what?", "visual_tokens": 4, "kept": [1], "rows": 2, "columns": 2, "first": 0, "side": None,
        "masked": None, "scores": None, "answer_whole": "a", "answer": "b",
    }  # fmt: skip
    out = convert("builtin:llava", tmp_path / "out").out
    assert verification.check_hashes(out).status == "pass"
    lock = json.loads((out / "surgery.lock.json").read_text())
    assert lock["outputs"].pop(PLACE)["bytes"] == (out / PLACE).stat().st_size
    lock["outputs"][PLACE] = {"bytes": 1, "sha256": "0" * 64}
    (out / "surgery.lock.json").write_text(json.dumps(lock))
    surgery.reproduce(out / "surgery.lock.json", tmp_path / "again")


def test_where_nothing_can_be_shown_there_is_a_reason(tmp_path: Path, silent: Probe) -> None:
    done = convert("builtin:llava", tmp_path / "out")
    assert not (done.out / PLACE).parent.exists()
    assert f"{HEADING}\n\nThere is no picture: {WHY}." in (done.out / "README.md").read_text()
    assert silent.jobs[0]["sample"]["question"] == "Which digit is yellow?"
    assert Path(silent.jobs[0]["sample"]["image"]).name == "0.png"


def test_without_verification_nothing_is_said(tmp_path: Path) -> None:
    done = convert("builtin:llava", tmp_path / "out", verify=False)
    assert not (done.out / PLACE).parent.exists()
    text = (done.out / "README.md").read_text()
    assert not [words for words in (HEADING, PLACE, "There is no picture") if words in text]


def test_other_results_are_shown_nothing(tmp_path: Path, silent: Probe) -> None:
    convert("builtin:llava", tmp_path / "out", operations=[])
    assert silent.jobs[0]["sample"] is None


def test_a_picture_of_an_interrupted_run_does_not_stay(tmp_path: Path, silent: Probe) -> None:
    """The folder of a run that was killed after it drew, gone on with where nothing can be drawn."""
    base = str(write_tiny_vision(tmp_path / "base", "llava"))
    operations = [{"visual_pruning": {}}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgery.conversion.put_in_place", lambda *_, **__: _stop())
        with pytest.raises(KeyboardInterrupt):
            convert(base, tmp_path / "out", operations=operations)
    left = tmp_path / "out.partial/checkpoint" / PLACE
    left.parent.mkdir()
    left.write_bytes(b"a picture")
    out = convert(base, tmp_path / "out", operations=operations).out
    assert verification.check_hashes(out).status == "pass"
    assert not (out / PLACE).exists()


def _stop() -> None:
    raise KeyboardInterrupt
