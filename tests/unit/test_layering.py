"""Imports point one way, the code that travels stands alone, and what only plans does not wait for torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "surgery"

# From the ground up; a module may import its own layer and those before it. The longest prefix counts.
LAYERS = [
    [
        f"surgery.{name}"
        for name in ("errors", "version", "suggestions", "progress", "sizes", "document", "given", "settings_table")
    ],
    ["surgery.checkpoint", "surgery.architectures", "surgery.metrics", "surgery.builtin", "surgery.quantization"],
    ["surgery.emission.code", "surgery.emission.config", "surgery.emission.lint", "surgery.emission.markdown"],
    ["surgery.planning"],
    ["surgery.operations", "surgery.calibration", "surgery.emission", "surgery.training"],
    ["surgery.validation", "surgery.overrides", "surgery.manifest", "surgery.calibration.stage"],
    ["surgery.verification", "surgery.inspection"],
    ["surgery.preconditions", "surgery.stages", "surgery.completion", "surgery.placing", "surgery.finished"],
    ["surgery.conversion", "surgery.reproduction", "surgery.api"],
    ["surgery.asking"]
    + [f"surgery.{of}_{what}" for of in ("cache", "defense", "pruning") for what in ("inspection", "picture")],
    ["surgery", "surgery.cli", "surgery.__main__"],
]
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}
SEPARATE = ("surgery.runtime", "surgery.probe")


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
LAYERED = sorted(name for name in MODULES if not name.startswith(SEPARATE))


def imports(name: str) -> Iterator[str]:
    """The modules that a module imports, at its top or inside functions; not those for type checkers alone."""
    tree = ast.parse(MODULES[name].read_bytes())
    ignored = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in ignored:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = "." * node.level + (node.module or "")
            dotted = [f"{home}.{alias.name}" for alias in node.names]
            yield from dict.fromkeys(name if name in MODULES else home for name in dotted)


def rank(name: str) -> int:
    """The layer of a module; a package that nobody placed is an error here."""
    parts = name.split(".")
    prefixes = [".".join(parts[:count]) for count in range(len(parts), 1, -1)] if len(parts) > 1 else parts
    placed = [prefix for prefix in prefixes if prefix in RANKS]
    assert placed, f"{name} has no place in LAYERS"
    return RANKS[placed[0]]


@pytest.mark.parametrize("name", LAYERED)
def test_a_module_imports_nothing_above_it(name):
    above = [other for other in imports(name) if other in MODULES and not other.startswith(SEPARATE)]
    above = [other for other in above if rank(other) > rank(name)]
    assert not above


# What trains a module that travels is alone in building it; who looks at a result asks it as the probe does.
TRAINED = {"surgery.training.visual": {"surgery.runtime.surgery_visual_scorer"}}
ASKING = {
    "surgery.asking": {"surgery.probe.asked"},
    "surgery.defense_inspection": {"surgery.probe.asked"},
    "surgery.pruning_picture": {"surgery.probe.views"},
}
ALLOWED = TRAINED | ASKING


@pytest.mark.parametrize("name", LAYERED)
def test_what_travels_is_imported_by_nothing(name):
    assert {other for other in imports(name) if other.startswith(SEPARATE)} <= ALLOWED.get(name, set())


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.startswith("surgery.runtime.")))
def test_what_travels_stands_alone(name):
    for other in imports(name):
        if other.startswith("."):
            assert other.count(".") <= 2
            assert (PACKAGE / "runtime" / f"{other.split('.')[1]}.py").is_file()
        else:
            top = other.partition(".")[0]
            assert top in {"torch", "transformers"} or top in sys.stdlib_module_names


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.startswith("surgery.probe")))
def test_the_probe_knows_nothing_of_surgery(name):
    for other in imports(name):
        top = other.partition(".")[0]
        assert not top or top in {"PIL", "safetensors", "torch", "transformers"} or top in sys.stdlib_module_names


@pytest.mark.parametrize(
    "name", ["surgery", "surgery.planning", "surgery.manifest", "surgery.operations", "surgery.cli"]
)
def test_planning_does_not_wait_for_torch(name):
    code = f"import sys, {name}; print(*sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == ""
