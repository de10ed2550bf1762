"""What a coded cache takes: figures that add up, a picture, and everything that is refused before code runs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery import cli
from surgery.cache_inspection import FIGURES, CacheReport
from surgery.errors import (
    CorruptCheckpoint,
    EnvironmentFailure,
    MissingPackage,
    OutputExists,
    SourceUnavailable,
    UnsafeCheckpoint,
    UsageError,
)
from surgery.finished import check_picture
from tests.tiny import write_tiny

PNG = b"\x89PNG\r\n\x1a\n"
KINDS = ("raw", "codes", "indices", "lengths", "positions", "masks")


def convert(base: str, out: Path) -> Path:
    surgery.convert(base, out, surgery.load_manifest(operations=["codebook_kv"], overrides=["verify=false"]))
    return out


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert("builtin:llama", tmp_path_factory.mktemp("coded") / "coded")


@pytest.fixture
def copy(coded: Path, tmp_path: Path) -> Path:
    """One that a test may deface."""
    return Path(shutil.copytree(coded, tmp_path / "copied"))


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.run(["cache", *map(str, arguments)])
    return code, *capsys.readouterr()


def made_up(**more: Any) -> CacheReport:
    layers = [
        {"layer": layer, "bytes": 30 - layer, "stock_bytes": 100, "stored_tokens": 5, "seen_tokens": 9}
        | dict.fromkeys(KINDS, 0)
        | {"raw": 10, "codes": 20 - layer}
        for layer in range(8)
    ]
    total = sum(layer["bytes"] for layer in layers)
    return CacheReport(**{
        "tokens": 9, "bytes": total, "stock_bytes": 800, "ratio": total / 800, "layers": tuple(layers), "text": "x",
        **more,
    })  # fmt: skip


def test_bytes_add_up(coded: Path) -> None:
    found = surgery.cache_report(coded)
    assert isinstance(found, surgery.CacheReport)
    assert found.tokens == 512  # all that this model takes
    assert any("max_position_embeddings" in note for note in found.notes)
    assert found.kinds == KINDS
    assert [layer["layer"] for layer in found.layers] == list(range(6))
    for layer in found.layers:
        assert layer["bytes"] == sum(layer[kind] for kind in KINDS)
        assert layer["stock_bytes"] == 512 * 2 * 2 * 32 * 2  # tokens, keys and values, heads, width, bfloat16
        assert 0 < layer["stored_tokens"] <= layer["seen_tokens"] == 512 * 2
    assert found.bytes == sum(layer["bytes"] for layer in found.layers) + 8  # and a count of tokens
    assert found.stock_bytes == sum(layer["stock_bytes"] for layer in found.layers)
    assert found.ratio == found.bytes / found.stock_bytes <= 0.3 + 0.02
    assert json.loads(json.dumps(found.to_json()))["layers"][5]["layer"] == 5


def test_settings_go_over_those_of_the_config(coded: Path) -> None:
    tenth = surgery.cache_report(coded, tokens=300, settings={"reserve_ratio": 0.15})
    assert tenth.tokens == 300
    assert tenth.ratio <= 0.15 + 0.02
    assert not tenth.notes
    short = surgery.cache_report(coded, tokens=20)
    assert short.ratio >= 1
    assert "min_prompt" in short.notes[0]


def test_the_command_says_what_the_function_does(
    coded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (coded, "--method", "paper", "--tokens", 256)
    code, out, err = answer(capsys, *options, "--json", "--picture", tmp_path / "spindle.png")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert set(found) == {"tokens", "bytes", "stock_bytes", "ratio", "layers", "text", "notes", "picture"}
    assert all(set(layer) == {*FIGURES, *KINDS} for layer in found["layers"])
    assert found["picture"] == str(tmp_path / "spindle.png")
    drawn = (tmp_path / "spindle.png").read_bytes()
    assert drawn.startswith(PNG)
    assert len(drawn) > 5000
    assert [path.name for path in tmp_path.iterdir()] == ["spindle.png"]
    again = surgery.cache_report(coded, tokens=256, settings={"method": "paper"})
    assert {**again.to_json(), "picture": found["picture"]} == found
    assert answer(capsys, *options, "-q") == (0, f"{found['ratio']:.4f}\n", "")
    code, out, err = answer(capsys, *options)
    assert code == 0
    assert err.split() == ["hash", "...", "load", "...", "prompt", "..."]  # no bar and no warning of transformers
    lines = out.splitlines()
    assert lines[0].split() == ["layer", "stored", "tokens,", "all", "heads", "bytes", "stock", "bytes", "share"]
    assert lines[9].split() == ["layer", *KINDS]
    for first in (1, 10):
        assert [line.split()[0] for line in lines[first : first + 7]] == [*"012345", "all"]
    assert f"256 tokens of builtin: {found['bytes'] / 1000:.0f} KB of" in lines[18]


def test_a_file_is_a_text(coded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "words.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 12)
    found = surgery.cache_report(coded, text=text)
    assert 64 <= found.tokens < 512
    assert found.text == "words.txt"
    assert any("the text has" in note for note in found.notes)
    text.write_text("Hello.")
    for wanted in (1024, 100):
        with pytest.raises(UsageError, match="too short"):
            surgery.cache_report(coded, text=text, tokens=wanted)
    text.write_bytes(b"\xff\xfe\x00" * 50)
    assert answer(capsys, coded, "--text", text)[0] == SourceUnavailable.exit_code
    assert answer(capsys, coded, "--text", tmp_path / "absent.txt")[0] == SourceUnavailable.exit_code
    code, _, err = answer(capsys, coded, "--text", "builtin:cod")
    assert code == 2
    assert "did you mean 'builtin:code'?" in err


def test_without_a_tokenizer_tokens_are_random(copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(UnsafeCheckpoint):
        surgery.cache_report(copy)
    found, again = (surgery.cache_report(copy, tokens=200, trust_remote_code=True) for _ in range(2))
    assert found == again
    assert found.text == "random tokens"
    assert "no tokenizer" in found.notes[0]
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(CorruptCheckpoint, match="tokenizer"):
        surgery.cache_report(copy, tokens=200, trust_remote_code=True)


def test_layers_with_a_window_are_named(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base", "qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    found = surgery.cache_report(convert(str(base), tmp_path / "half"), tokens=160)
    assert [layer["layer"] for layer in found.layers] == [0]
    assert any("1 of 2 layers have a sliding window" in note for note in found.notes)


@pytest.mark.usefixtures("never")
def test_changed_code_does_not_run(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = copy / "surgery_codebook_model.py"
    mark = tmp_path / "it_ran"
    code.write_text(code.read_text() + f"\nopen({str(mark)!r}, 'w').close()\n")
    status, out, err = answer(capsys, copy)
    assert (status, out) == (UnsafeCheckpoint.exit_code, "")
    assert "surgery_codebook_model.py has another size" in err
    assert "--trust-remote-code" in err
    (copy / "surgery.lock.json").unlink()
    with pytest.raises(UnsafeCheckpoint, match=r"surgery\.lock\.json"):
        surgery.cache_report(copy)
    assert not mark.exists()


def test_changed_code_runs_where_it_is_trusted(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # In one process transformers keeps the classes of a folder's name, so each load here has a name of its own.
    trusted, broken = (copy.rename(copy.with_name("trusted")), copy.with_name("broken"))
    code = trusted / "surgery_codebook_model.py"
    code.write_text(code.read_text() + "\n# a line more\n")
    assert answer(capsys, trusted, "--tokens", 130, "--trust-remote-code", "-q")[0] == 0
    code.write_text("this is no Python")
    status, _, err = answer(capsys, trusted.rename(broken), "--trust-remote-code")
    assert status == CorruptCheckpoint.exit_code
    assert "does not load" in err


@pytest.mark.usefixtures("never")
def test_other_folders_are_refused(tmp_path: Path, coded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_tiny(tmp_path / "base", "llama")
    code, _, err = answer(capsys, base)
    assert code == 2
    assert "no codebook cache" in err
    assert f"surgery convert {base} OUT -o codebook_kv" in err
    for place in (tmp_path / "absent", coded / "config.json", "builtin:llama"):
        code, _, err = answer(capsys, place)
        assert code == SourceUnavailable.exit_code
        assert "is not a folder" in err


def test_numbers_that_mean_nothing_are_refused(coded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, value in [("--tokens", 0), ("--tokens", "x"), ("--reserve-ratio", 0), ("--reserve-ratio", 1.5)]:
        assert answer(capsys, coded, option, value)[0] == 2
    for tokens in (0, -1, True, 1.5):
        with pytest.raises(UsageError, match="tokens is"):
            surgery.cache_report(coded, tokens=tokens)  # type: ignore[arg-type]
    assert answer(capsys, coded, "--device", "nowhere")[0] == EnvironmentFailure.exit_code
    for settings in ({"reserve_ratio": 2}, {"reserve_ratio": float("nan")}, {"bits": 7}, {"nope": 1}, {1: 2}):
        with pytest.raises(UsageError, match="settings"):
            surgery.cache_report(coded, settings=settings)  # type: ignore[arg-type]
    code, _, err = answer(capsys, coded, "--method", "paper", "--reserve-ratio", "0.01")
    assert code == 2
    assert "beta" in err


def test_a_picture(tmp_path: Path) -> None:
    made_up().draw(tmp_path / "a.png")
    made_up().draw(str(tmp_path / "b.PNG"))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.PNG").read_bytes()
    with pytest.raises(OutputExists):
        made_up().draw(tmp_path / "a.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.PNG"]


@pytest.mark.usefixtures("never")
def test_a_picture_that_cannot_be_is_refused_first(
    coded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there.png"
    there.write_text("mine")
    for place, part in [
        (there, "exists"), (tmp_path / "picture.pdf", "PNG"), (tmp_path / "absent" / "p.png", "is not there"),
        (there / "p.png", "is not there"),
    ]:  # fmt: skip
        code, _, err = answer(capsys, coded, "--picture", place)
        assert code == 2, err
        assert part in err
    assert there.read_text() == "mine"
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    code, _, err = answer(capsys, coded, "--picture", tmp_path / "p.png")
    assert code == MissingPackage.exit_code
    assert "surgery[plots]" in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_nobody_may_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(EnvironmentFailure, match="cannot be written"):
        check_picture(tmp_path / "p.png")


def test_a_place_that_nothing_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("surgery.finished.tempfile.TemporaryFile", refuse)
    with pytest.raises(EnvironmentFailure, match=r"p\.png cannot be written"):
        check_picture(tmp_path / "p.png")
