"""Whatever a base tries: one exact error in three lines, an exit code, and nothing written."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from surgery.checkpoint.expressions import Stored
from surgery.checkpoint.journal import start_journal
from surgery.checkpoint.layout import lay_out
from surgery.checkpoint.reader import open_checkpoint
from surgery.checkpoint.writer import Job, write_shards
from surgery.errors import SourceUnavailable, SurgeryError, UnsafeCheckpoint
from tests.hostile_cases import CASES, SECRET, Case, remote_code, sound


def _convert(base: Path, out: Path) -> None:
    """As a conversion does: open, and only then make a folder and write the weights."""
    checkpoint = open_checkpoint(base)
    shards = lay_out(checkpoint, {name: Stored(info) for name, info in checkpoint.tensors.items()}, None)
    out.mkdir(parents=True)
    write_shards(Job(checkpoint, out, "", start_journal(out, "test")), shards)


@pytest.fixture(autouse=True)
def _alarm() -> Iterator[None]:
    """A pipe that is opened would wait for ever; this ends it."""
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "parent" / "out"
    base.mkdir()
    case.build(base)
    with pytest.raises(SurgeryError) as caught:
        _convert(base, out)
    error = caught.value
    assert type(error) is case.error
    assert error.exit_code == (4 if case.error is SourceUnavailable else 3)
    for line in (error.problem, error.cause, error.remedy):
        assert line
        assert line.isprintable()
        assert len(line) < 400
        assert SECRET not in line
    assert not list((tmp_path / "parent").rglob("*.safetensors*"))
    assert case.name.split("-")[0] in {"nan", "infinity"} or not (tmp_path / "parent").exists()
    assert not (tmp_path / "executed").exists()


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "abc1234", "A" * 40, "0" * 39, "0" * 41, "0" * 40 + "\n"])
def test_remote_code_needs_a_whole_commit(tmp_path: Path, revision: str | None) -> None:
    remote_code(tmp_path)
    with pytest.raises(UnsafeCheckpoint, match="not pinned"):
        open_checkpoint(tmp_path, revision=revision, trust_remote_code=True)


def test_pinned_remote_code_is_carried_when_trusted(tmp_path: Path) -> None:
    remote_code(tmp_path)
    checkpoint = open_checkpoint(tmp_path, revision="0" * 40, trust_remote_code=True)
    assert checkpoint.remote_code
    assert {file.name: file.dropped for file in checkpoint.side_files} == {"modeling_x.py": ""}


def test_code_that_nothing_names_is_left_behind(tmp_path: Path) -> None:
    (sound(tmp_path) / "handler.py").write_text("raise SystemExit")
    checkpoint = open_checkpoint(tmp_path)
    assert not checkpoint.remote_code
    assert [file.dropped for file in checkpoint.side_files] == ["code that no config of the base uses"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "."])
def test_what_may_not_be_read(tmp_path: Path, name: str) -> None:
    base = sound(tmp_path / "base")
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    (base / name).chmod(0)
    os.seteuid(65534) if (root := os.geteuid() == 0) else None
    try:
        with pytest.raises(SourceUnavailable, match="cannot be read") as caught:
            open_checkpoint(base)
    finally:
        os.seteuid(0) if root else None
        (base / name).chmod(0o755)
    assert "PermissionError" in caught.value.cause
