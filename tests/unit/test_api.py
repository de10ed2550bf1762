"""The Python API: lazy, complete, and with no name that a module could take."""

from __future__ import annotations

import dataclasses
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import surgery
from surgery.errors import CorruptCheckpoint, SurgeryError
from surgery.operations import operations
from surgery.settings_table import settings_table
from surgery.sizes import human_count, human_size, parse_size

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.tiny import FAMILIES, write_tiny

PASSTHROUGH = {"surgery": 1, "operations": []}


def test_importing_imports_nothing() -> None:
    code = "import surgery, sys; print(*[n for n in ('torch', 'transformers', 'pydantic', 'yaml') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_public_name_is_there() -> None:
    for name in surgery.__all__:
        assert getattr(surgery, name) is not None
        assert name in dir(surgery)
    with pytest.raises(AttributeError, match="no attribute 'convertt'"):
        _ = surgery.convertt  # type: ignore[attr-defined]


def test_no_module_shadows_a_public_name() -> None:
    modules = {module.name for module in pkgutil.iter_modules(surgery.__path__)}
    assert modules & set(surgery.__all__) == {"operations"}
    assert surgery.operations.operations is operations


def test_plan_and_inspect_agree(tmp_path: Path) -> None:
    base = str(write_tiny(tmp_path / "base", "qwen3"))
    plan = surgery.plan(base, surgery.manifest_from_dict(PASSTHROUGH))
    found = surgery.inspect(base)
    assert plan.parameters_before == plan.parameters_after == found.parameters
    assert plan.cache_bytes_before == found.cache_bytes_per_token
    assert found.bytes == found.parameters * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_inspects_every_family(tmp_path: Path, family: str) -> None:
    found = surgery.inspect(str(write_tiny(tmp_path / "base", family)))
    structure = found.structure
    assert structure is not None
    assert (structure.layers, structure.heads, structure.kv_heads, structure.head_dim) == (2, 4, 2, 16)
    assert structure.rope is not None
    assert structure.rope.width == 16
    assert structure.window is None
    assert structure.qkv_bias == family.startswith("qwen2")
    assert structure.qk_norm == {"qwen3": "head", "qwen3_moe": "head", "olmoe": "full"}.get(family, "none")
    assert found.model_type == family
    assert set(found.operations) == set(operations())
    assert dataclasses.is_dataclass(found)
    assert found.to_json()["structure"]["rope"]["kind"] == "default"


def test_inspects_a_family_that_nobody_described(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base", "llama", model_type="novel")
    (base / "tokenizer.json").write_text("{}")
    (base / "old.bin").write_bytes(b"")
    found = surgery.inspect(str(base))
    assert found.family is None
    assert found.structure is None
    assert found.to_json()["structure"] is None
    assert set(found.operations.values()) == {"no architecture describes its family"}
    assert found.side_files["tokenizer.json"] == ""
    assert found.side_files["old.bin"]


def test_inspects_what_an_operation_refuses(tmp_path: Path) -> None:
    scaled = write_tiny(tmp_path / "rope", "llama", partial_rotary_factor=0.5)
    assert "partial rotation" in (surgery.inspect(str(scaled)).operations["kv_latent"] or "")
    wrong = write_tiny(tmp_path / "wrong", "llama")
    config = (wrong / "config.json").read_text()
    (wrong / "config.json").write_text(config.replace('"hidden_size": 64', '"hidden_size": 0'))
    with pytest.raises(CorruptCheckpoint):
        surgery.inspect(str(wrong))


def test_errors_share_one_base() -> None:
    with pytest.raises(SurgeryError):
        surgery.manifest_from_dict({})
    assert surgery.SurgeryError is SurgeryError


def test_settings_are_described() -> None:
    for operation in operations().values():
        rows = settings_table(operation.settings)
        assert [row.name for row in rows if "." not in row.name] == list(operation.settings.model_fields)
        assert all(row.description and row.type for row in rows)
    ratio = next(row for row in settings_table(operations()["kv_latent"].settings) if row.name == "kv_ratio")
    assert (ratio.type, ratio.default) == ("number > 0 <= 1 | none", "none")


@pytest.mark.parametrize(
    ("text", "count"), [("1KB", 1000), ("5GB", 5 * 10**9), ("200 MB", 2 * 10**8), ("1.5GiB", 3 << 29), ("4KiB", 4096)]
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize(
    "text", ["", "5", "GB", "5 gigabytes", "-1GB", "0GB", "1e3KB", "5GBs", "\u0665GB", "1" * 40 + "GB"]
)
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as 5GB"):
        parse_size(text)


def test_sizes_are_written() -> None:
    assert [human_size(n) for n in (0, 999, 1234, 999_600, 5 * 10**9, 10**17)] == [
        "0 B", "999 B", "1.23 KB", "1 MB", "5 GB", "1e+05 TB",
    ]  # fmt: skip
    assert [human_count(n) for n in (12, 1234, 1_236_000_000)] == ["12", "1.23 K", "1.24 B"]
