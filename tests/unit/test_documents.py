"""Where calibration and evaluation text comes from."""

from __future__ import annotations

import hashlib
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import surgery
from surgery.calibration.documents import (
    SEPARATOR,
    _separated,
    document_text,
    evaluation_text,
    read_documents,
    text_source,
)
from surgery.calibration.text import document_windows, text_windows, token_prefix
from surgery.errors import MissingPackage, SourceUnavailable, UsageError
from surgery.manifest import Calibration, Dataset

COMMIT = "0123456789" * 4
CHAT = ({"role": "user", "content": "Return the sum."}, {"role": "assistant", "content": "It is returned."})
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{{ eos_token }}"


@pytest.fixture
def tokenizer():
    """The one of the built-in model, which puts <s> before a text and has no chat template."""
    return AutoTokenizer.from_pretrained(Path(surgery.__file__).parent / "builtin" / "llama")


def write_lines(path: Path, values: list[object]) -> list[Path]:
    path.write_text("".join(json.dumps({"text": value}) + "\n" for value in values), encoding="utf-8")
    return [path]


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
        return text_source(Calibration.model_validate(text, context={"folder": tmp_path}))

    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    before = source()
    (tmp_path / "a.txt").write_text("two", encoding="utf-8")
    assert source() != before


def test_lines_of_json_end_where_lines_of_a_file_end(tmp_path: Path) -> None:
    line = json.dumps({"text": "one\u2028still one\x85"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(f"{line}\r\n{line}\n".encode())
    assert list(read_documents([tmp_path / "a.jsonl"], "text")[0]) == ["one\u2028still one\x85"] * 2


@given(st.lists(st.sampled_from(["a", "b\n", "\n", SEPARATOR, "<|endof", "text|>", "\r"]), max_size=12))
def test_a_file_read_in_lines_is_cut_as_the_whole_of_it(parts: list[str]) -> None:
    text = "".join(parts)
    assert list(_separated(text.splitlines(keepends=True))) == text.split(SEPARATOR)


def test_the_hash_of_a_file_is_that_of_its_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é\r\nb\rc\n".encode())
    found = read_documents([tmp_path / "a.txt"], "text")[1]["files"][0]["sha256"]
    assert found == hashlib.sha256("é\nb\nc\n".encode()).hexdigest()


def test_a_chat_is_a_document(tmp_path: Path) -> None:
    paths = write_lines(tmp_path / "a.jsonl", ["one", [{**CHAT[0], "name": None, "weight": 1}, CHAT[1]]])
    assert list(read_documents(paths, "text")[0]) == ["one", ({**CHAT[0], "weight": 1}, CHAT[1])]
    assert evaluation_text(paths) == "one\nReturn the sum.\nIt is returned."


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (3, "type int"),
        (None, "type NoneType"),
        ({"role": "user"}, "type dict"),
        ([], "an empty list"),
        (["one"], "a list with an entry of type str"),
        ([CHAT[0], 3], "of type int"),
        ([{"role": "user"}], "'content'"),
        ([{"content": "x"}], "'role'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "'content'"),
        ("\ud800", "surrogate"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
    ],
)
def test_what_is_neither_text_nor_chat_is_refused(
    value: object, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_lines(tmp_path / "a.jsonl", ["fine", value])
    with pytest.raises(UsageError, match=r"a\.jsonl:2 has no text under 'text'") as caught:
        list(read_documents(paths, "text")[0])
    assert why in caught.value.cause
    assert "set field to" in caught.value.remedy
    rows = [{"text": "fine"}, {"text": value}]
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda name, **_: rows))
    with pytest.raises(UsageError, match=f"row 2 of owner/name@{COMMIT}") as caught:
        list(read_documents(Dataset(dataset=f"owner/name@{COMMIT}"), "text")[0])
    assert why in caught.value.cause


def test_a_chat_is_written_out_by_the_template(tokenizer) -> None:
    assert document_text("as it is", tokenizer) == "as it is"
    with pytest.raises(UsageError, match="the tokenizer has no chat template"):
        document_text(CHAT, tokenizer)
    tokenizer.chat_template = TEMPLATE
    assert document_text(CHAT, tokenizer) == "<s>[user] Return the sum.\n[assistant] It is returned.\n</s>"


@pytest.mark.parametrize("template", ["{{ raise_exception('roles must alternate') }}", "{{ 'a' + 1 }}", "{% if %}"])
def test_a_template_that_fails_is_told(template: str, tokenizer) -> None:
    tokenizer.chat_template = template
    with pytest.raises(UsageError, match="cannot write out") as caught:
        document_text(CHAT, tokenizer)
    assert "no chat template" not in caught.value.cause


@pytest.mark.parametrize("bos", [True, False])
def test_a_chat_calibrates_without_a_second_bos(bos: bool, tokenizer, tmp_path: Path) -> None:
    tokenizer.chat_template = TEMPLATE if bos else TEMPLATE.replace("{{ bos_token }}", "")
    paths = write_lines(tmp_path / "a.jsonl", [CHAT, CHAT])
    calibration = Calibration.model_validate(
        {"text": [str(path) for path in paths], "samples": 2, "length": 8}, context={"folder": tmp_path}
    )
    tokens = text_windows(calibration, tokenizer, None).tokens
    (start,) = token_prefix(tokenizer)
    body = tokenizer("[user] Return the sum.", add_special_tokens=False)["input_ids"][:7]
    assert torch.equal(tokens, torch.tensor([[start, *body]] * 2))


def test_windows_of_texts_are_what_they_always_were(tokenizer) -> None:
    """Beginnings of documents while there are enough, else consecutive windows; in pieces of 2**18 characters."""
    text = "Return the sum of a and b.\n" * 12_000
    pieces = [tokenizer(text[at : at + (1 << 18)], add_special_tokens=False)["input_ids"] for at in (0, 1 << 18)]
    rows = [ids[at : at + 64] for ids in pieces for at in range(0, len(ids) - 63, 64)]
    assert document_windows([text], tokenizer, 64, 10_000) == rows
    assert document_windows([text, text], tokenizer, 64, 2) == [rows[0]] * 2
