"""Where calibration and evaluation text comes from."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from surgery.calibration.documents import calibration_source, evaluation_text, read_documents
from surgery.errors import MissingPackage, SourceUnavailable, UsageError
from surgery.manifest import Calibration, Dataset

COMMIT = "0123456789" * 4


def test_a_text_file_is_cut_at_the_separators_of_corpora(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n<|endoftext|>\n", encoding="utf-8")
    documents, source = read_documents([tmp_path / "a.txt"], "text")
    assert list(documents) == ["one", "two"]
    assert source["files"][0]["name"] == "a.txt"


def test_lines_of_json_give_the_field_that_was_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"story": "one"}\n\n{"story": "two"}\n', encoding="utf-8")
    assert list(read_documents([tmp_path / "a.jsonl"], "story")[0]) == ["one", "two"]


@pytest.mark.parametrize("line", ["{}", "[1]", "no json", '"text"'])
def test_a_line_without_the_field_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"a\.jsonl:2"):
        list(read_documents([tmp_path / "a.jsonl"], "text")[0])


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_is_no_text_is_refused(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(SourceUnavailable):
        read_documents([tmp_path / "a.txt"], "text")


def test_a_dataset_is_read_at_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def load_dataset(name: str, **named: object) -> list[dict[str, str]]:
        asked.update(name=name, **named)
        return [{"text": "one"}, {"text": "two"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    documents, source = read_documents(Dataset(dataset=f"owner/name@{COMMIT}", split="validation"), "text")
    assert list(documents) == ["one", "two"]
    assert asked == {"name": "owner/name", "split": "validation", "revision": COMMIT, "streaming": True}
    assert source == {"dataset": f"owner/name@{COMMIT}", "split": "validation"}


def test_a_dataset_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackage, match="datasets"):
        list(read_documents(Dataset(dataset=f"owner/name@{COMMIT}"), "text")[0])


def test_evaluation_never_takes_what_was_trained_on() -> None:
    trained = next(iter(read_documents("builtin", "text")[0]))
    held_out = evaluation_text("builtin")
    lines = {line for line in held_out.splitlines() if len(line) > 40}
    assert len(lines) > 500
    # Documentation repeats a sentence here and there; whole documents must not come back.
    assert len(lines & set(trained.splitlines())) < 0.02 * len(lines)
    with pytest.raises(UsageError):
        evaluation_text("self")


def test_a_source_changes_with_the_content_of_its_files(tmp_path: Path) -> None:
    def source() -> dict[str, object]:
        text = {"text": [str(tmp_path / "a.txt")]}
        return calibration_source(Calibration.model_validate(text, context={"folder": tmp_path}))

    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    before = source()
    (tmp_path / "a.txt").write_text("two", encoding="utf-8")
    assert source() != before
