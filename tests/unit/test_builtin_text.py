"""The text that the built-in models learn from, and the folders that they are."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from surgery.builtin import text as module
from surgery.builtin.text import DOMAINS, heldout_documents, heldout_text, training_documents, training_text

ROOT = Path(__file__).resolve().parents[2]
BUILTIN = ROOT / "surgery" / "builtin"


def long_paragraphs(documents: tuple[str, ...]) -> list[str]:
    joined = [" ".join(paragraph.split()) for text in documents for paragraph in text.split("\n\n")]
    return [paragraph for paragraph in joined if len(paragraph) >= module.SHORTEST_REPEAT]


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_paragraph_is_in_both_parts_or_twice_in_one(domain):
    training, heldout = (long_paragraphs(take(domain)) for take in (training_documents, heldout_documents))
    assert len(set(training)) == len(training)
    assert len(set(heldout)) == len(heldout)
    assert not set(training) & set(heldout)


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_domain_is_large_enough_to_learn_and_to_judge(domain):
    assert len(training_text(domain)) > 1_000_000
    assert len(heldout_text(domain)) > 100_000


def test_documentation_is_what_no_domain_means():
    assert training_documents() == training_documents("docs")
    assert heldout_text() == heldout_text("docs")


def test_domains_share_no_long_paragraph():
    found = [set(long_paragraphs(training_documents(domain) + heldout_documents(domain))) for domain in DOMAINS]
    assert len(found[0] & found[1]) < 5  # documentation quotes a line of code here and there
    assert not found[2] & (found[0] | found[1])


def test_code_has_neither_docstrings_nor_comments():
    code = heldout_text("code")
    assert not re.search(r"^ *#", code, re.MULTILINE)
    assert not re.search(r'^ *("""|r""")', code, re.MULTILINE)
    assert "def __init__(self" in code


def test_what_is_left_of_a_body_that_was_only_a_docstring_is_valid(tmp_path, monkeypatch):
    source = '"""About."""\n# note\nclass A:\n    """A."""\n\ndef f(x):\n    """F."""\n    return "x"  # kept\n'
    (tmp_path / "given.py").write_text(source)
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path))
    assert module._module_code("given") == "class A:\n    pass\n\ndef f(x):\n    return 'x'"
    assert module._module_code("missing") == ""


def test_another_process_invents_the_same_records():
    code = "import hashlib; from surgery.builtin.text import training_text as t; print(hashlib.sha256(t('records').encode()).hexdigest())"
    command = [sys.executable, "-X", "utf8", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env={"PYTHONHASHSEED": "7"})
    assert run.stdout.strip() == hashlib.sha256(training_text("records").encode()).hexdigest()


def test_records_keep_their_promises():
    text = heldout_text("records")
    people = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert people
    assert all(person["age"] == 2025 - person["born"] for person in people)
    sums = re.findall(r"^(\d+) ([-+*]) (\d+) = (-?\d+)$", text, re.MULTILINE)
    assert {sign for _, sign, _, _ in sums} == set("+-*")
    results = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    assert all(results[sign](int(first), int(second)) == int(result) for first, sign, second, result in sums)


@pytest.mark.parametrize("name", ["llama", "moe"])
def test_a_builtin_folder_is_small_and_complete(name):
    files = {path.name: path.stat().st_size for path in (BUILTIN / name).iterdir()}
    assert sum(files.values()) <= 3_000_000
    assert files.keys() >= {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert json.loads((BUILTIN / f"{name}.json").read_text())["parameters"] > 1_000_000


def test_the_experts_are_stored_one_by_one():
    config = json.loads((BUILTIN / "moe" / "config.json").read_text())
    with safe_open(BUILTIN / "moe" / "model.safetensors", "np") as opened:
        names = set(opened.keys())
    mlps = [f"model.layers.{layer}.mlp" for layer in range(config["num_hidden_layers"])]
    parts = [f"{part}_proj.weight" for part in ("gate", "up", "down")]
    experts = {f"{mlp}.experts.{at}.{part}" for mlp in mlps for at in range(config["num_experts"]) for part in parts}
    shared = {f"{mlp}.shared_expert.{part}" for mlp in mlps for part in parts}
    gates = {f"{mlp}.{gate}.weight" for mlp in mlps for gate in ("gate", "shared_expert_gate")}
    assert {name for name in names if ".mlp." in name} == experts | shared | gates
