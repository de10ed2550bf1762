"""The documentation is true: its code runs, its commands parse, its links lead somewhere, public names have words."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import yaml

from surgery.architectures import Architecture, architectures
from surgery.cli.group import COMMANDS, surgery
from surgery.manifest import load_manifest
from surgery.operations import operations

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted(ROOT.glob("docs/*.md")),
]
FENCE = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# file: (\S+)")
# Lines that need the Hub are parsed and not run.
NEEDS_NETWORK = "OWNER/NAME"
# Conversions see less text here than in the documentation, and recipes verify theirs: what is tested is that they run.
LITTLE_TEXT = ["--set", "calibration.samples=4", "--set", "calibration.length=64", "--no-verify"]


@dataclass(frozen=True)
class Block:
    """A fenced block of a document; `file` is the name that its first line gives it."""

    document: Path
    language: str
    text: str

    @property
    def file(self) -> str | None:
        found = FILE.match(self.text)
        return found[1] if found else None

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command line of a bash block, comments left out."""
        lines = self.text.replace("\\\n", " ").splitlines() if self.language == "bash" else []
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(document: Path) -> list[Block]:
    return [
        Block(document, language, text) for _, language, text in FENCE.findall(document.read_text(encoding="utf-8"))
    ]


def prose(document: Path) -> str:
    return FENCE.sub("", document.read_text(encoding="utf-8"))


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
COMMAND_LINES = sorted({shlex.join(words) for block in BLOCKS for words in block.commands})


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_command_lines_are_commands(line):
    words = shlex.split(line)
    if words[0] == "surgery":
        command = surgery.get_command(click.Context(surgery), words[1])
        assert command is not None
        command.make_context(words[1], words[2:], parent=click.Context(surgery, info_name="surgery"))
    elif words[0].startswith("tools/"):
        assert os.access(ROOT / words[0], os.X_OK)
    else:
        assert words[0] in {"git", "python", "cd"}


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language == "yaml"], ids=lambda block: block.text[:40]
)
def test_yaml_is_a_manifest_or_a_family(block, tmp_path):
    data = yaml.safe_load(block.text)
    if "model_type" in data:
        family = Architecture.model_validate(data)
        for module, names in (
            (family.classes.modeling, (family.classes.model, family.classes.causal_lm)),
            (family.classes.configuration, (family.classes.config,)),
        ):
            assert all(hasattr(importlib.import_module(module), name) for name in names)
        return
    if all(name in operations() for step in data["operations"] for name in step):
        (tmp_path / "manifest.yaml").write_text(block.text)
        load_manifest(tmp_path / "manifest.yaml")
    else:  # of a plug-in that the document itself defines; running the document loads it
        assert block.file


@pytest.mark.slow
@pytest.mark.parametrize("document", [path for path in DOCUMENTS if blocks(path)], ids=named)
def test_documents_run(document, tmp_path):
    """Every block from top to bottom in one folder, as a reader would."""
    for number, block in enumerate(blocks(document)):
        if block.file:
            (tmp_path / block.file).write_text(block.text, encoding="utf-8")
        if block.language == "toml":
            install(tomllib.loads(block.text), tmp_path)
        elif block.language == "python":
            script = tmp_path / (block.file or f"block_{number}.py")
            script.write_text(block.text, encoding="utf-8")
            run(tmp_path, script.name)
        for words in block.commands:
            if words[0] == "surgery" and not any(NEEDS_NETWORK in word for word in words):
                run(tmp_path, "-m", *words, *(LITTLE_TEXT if words[1] == "convert" else ()))


def install(project: dict, site: Path) -> None:
    """What installing a project with entry points leaves behind."""
    name, version = project["project"]["name"], project["project"]["version"]
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = project["project"]["entry-points"].items()
    lines = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items()) for group, points in groups
    ]
    (folder / "entry_points.txt").write_text("\n".join(lines))


def run(folder: Path, *arguments: str) -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]),
        "HF_HUB_OFFLINE": "1",
        "HOME": str(folder / "home"),
        "HF_HOME": str(folder / "home"),
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if not target.startswith(("https://", "http://", "#")):
            assert (document.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_named_files_exist(document):
    for name in re.findall(r"`\.?/?((?:surgery|tools|tests|manifests|docs)/[\w./-]*)", prose(document)):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_no_path_of_a_machine(document):
    found = re.findall(
        r"(?<![\w.])(?:/(?:home|root|tmp|work|Users|mnt)/|[A-Z]:\\\\)\S*", document.read_text(encoding="utf-8")
    )
    assert not found


def test_the_file_tree_of_the_readme_is_the_tree():
    tree = next(block.text for block in blocks(ROOT / "README.md") if block.text.startswith("surgery/\n"))
    parent = ROOT
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            parent = ROOT / name
        assert (parent / name if line.startswith(" ") else parent).exists(), name
    listed = {
        line.split()[0].rstrip("/")
        for line in tree.splitlines()
        if line.startswith(" ") and line.split()[0].endswith("/")
    }
    folders = {path.name for path in (ROOT / "surgery").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert listed == folders


def test_the_readme_names_everything_a_user_can_choose():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in COMMANDS:
        assert f"`surgery {command}" in readme
    for family in architectures():
        assert re.search(rf"\b{family}\b", readme)
    for name in operations():
        assert f"[`{name}`](docs/{name}.md)" in readme


def test_generated_tables_are_up_to_date():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools/docs.py"), "--check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\nrun: python tools/docs.py"


def undocumented(path: Path) -> Iterator[str]:
    """Public modules, classes, functions and methods without a docstring; what functions contain is nobody's API."""
    tree = ast.parse(path.read_bytes())
    if tree.body and not ast.get_docstring(tree):
        yield "the module"
    waiting: list[tuple[str, ast.stmt]] = [("", node) for node in tree.body]
    while waiting:
        prefix, node = waiting.pop()
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            waiting += [(f"{prefix}{node.name}.", inner) for inner in node.body]


@pytest.mark.parametrize("path", sorted((ROOT / "surgery").rglob("*.py")), ids=named)
def test_public_names_have_docstrings(path):
    assert not list(undocumented(path))
