"""The command line: quick help, the form of answers and errors, exit codes, and examples that parse."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

import surgery.conversion
import surgery.verification
from surgery import cli
from surgery.cli.group import COMMANDS, LazyGroup
from surgery.cli.group import surgery as group
from surgery.cli.options import Command
from surgery.cli.output import Output, _stage_lines
from surgery.conversion import Conversion
from surgery.errors import DiskFull
from surgery.manifest import Manifest
from surgery.progress import Progress
from surgery.verification import Check, Verification

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.tiny import write_tiny

HEAVY = ("torch", "transformers", "huggingface_hub", "pydantic", "yaml", "rich", "numpy")
PASSTHROUGH = str(Path(__file__).parents[2] / "manifests" / "passthrough.yaml")


@pytest.fixture
def base(tmp_path: Path) -> str:
    return str(write_tiny(tmp_path / "base", "llama", shards=2))


def commands() -> list[Command]:
    context = LazyGroup.make_context(group, "surgery", ["schema"])
    found = [group.get_command(context, name) for name in COMMANDS]
    assert all(isinstance(command, Command) for command in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from surgery.cli import run
assert run({arguments!r}) == 0
print(*[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ""
    assert done.stdout


def test_help_is_quick() -> None:
    def seconds() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "surgery", "convert", "--help"], capture_output=True, check=True)
        return time.perf_counter() - started

    assert min(seconds() for _ in range(3)) < 0.5


def test_planning_imports_no_torch(base: str) -> None:
    code = f"""
import sys
from surgery.cli import run
assert run(["plan", {base!r}, "-o", "kv_latent:kv_ratio=0.75"]) == 0
assert run(["inspect", {base!r}]) == 0
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_every_command_shows_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands():
        assert command.examples, command.name
        assert cli.run([str(command.name), "--help"]) == 0
        shown = capsys.readouterr().out
        for example in command.examples:
            assert example in shown
            program, name, *arguments = shlex.split(example.split(" > ")[0])
            assert (program, name) == ("surgery", command.name)
            command.make_context(name, arguments, obj=Output())


def test_every_option_says_what_it_does() -> None:
    for command in commands():
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{command.name} {parameter.name}"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["convertt"], "(did you mean 'convert'?)"),
        (["plan", "x", "--manfest", "y"], "--manifest"),
        (["convert"], "Missing argument"),
        (["convert", "a", "b", "c"], "there are 3 places"),
        (["convert", "a", "b", "-o", "kv_latent", "--workers", "0"], "--workers"),
        (["plan", "x"], "neither manifest nor operation"),
        (["plan", "-m", PASSTHROUGH], "no base is named"),
        (["plan", "x", "-m", "absent.yaml"], "absent.yaml: cannot be read"),
        (["plan", "x", "-o", "kv_latentt"], "(did you mean 'kv_latent'?)"),
        (["plan", "x", "-o", "kv_latent", "--shard-size", "5"], "--set output.shard_size=5"),
        (["operations", "kv_latentt"], "(did you mean 'kv_latent'?)"),
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str) -> None:
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith("error: ")
    assert problem in lines[0]
    assert lines[1].startswith("  why:  ")
    assert lines[2].startswith("  next: ")
    assert len(lines) == 3


@pytest.mark.parametrize(
    "arguments", [["plan", "x", "--json", "--nope"], ["plan", "nowhere/at/all", "-o", "kv_latent", "--json"]]
)
def test_json_errors_are_one_document(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code = cli.run(arguments)
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert set(error) == {"problem", "cause", "remedy", "exit_code"}
    assert error["exit_code"] == code != 0
    assert err == ""


def test_inspect(capsys: pytest.CaptureFixture[str], base: str) -> None:
    assert cli.run(["inspect", base]) == 0
    shown = capsys.readouterr().out
    assert "4 heads, 2 KV heads, width 16" in shown
    assert cli.run(["inspect", base, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["structure"]["kv_heads"] == 2
    assert found["cache_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    assert found["operations"]["kv_latent"] is None
    assert cli.run(["inspect", base, "-q"]) == 0
    assert capsys.readouterr().out.split() == [name for name, reason in found["operations"].items() if reason is None]


def test_operations(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["operations", "-q"]) == 0
    assert "kv_latent" in capsys.readouterr().out.split()
    assert cli.run(["operations", "kv_latent", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"name", "type", "default", "description"} == set(found["settings"][0])
    assert all(setting["description"] for setting in found["settings"])
    assert found["families"]["Llama"] is None
    assert cli.run(["operations", "kv_latent"]) == 0
    shown = capsys.readouterr().out
    assert all(setting["name"] in shown for setting in found["settings"])


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["schema"]) == 0
    human = capsys.readouterr().out
    assert cli.run(["schema", "--json"]) == 0
    assert json.loads(human) == json.loads(capsys.readouterr().out)


def test_plan(capsys: pytest.CaptureFixture[str], base: str) -> None:
    arguments = ["plan", base, "-o", "kv_latent:method=stride,qk_dim=8,vo_dim=8"]
    assert cli.run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cache_bytes_after"] * 2 == found["cache_bytes_before"]
    assert "tensors" not in found
    assert cli.run(arguments) == 0
    assert (
        f"{found['cache_bytes_before']:,} -> {found['cache_bytes_after']:,} bytes a token (50.0%)"
        in capsys.readouterr().out
    )
    assert cli.run([*arguments, "-v"]) == 0
    assert "model.layers.1.self_attn.k_proj.weight" in capsys.readouterr().out
    assert cli.run(["plan", base, "-m", PASSTHROUGH]) == 0
    assert "native: no code" in capsys.readouterr().out


def test_dry_run_is_the_plan(capsys: pytest.CaptureFixture[str], base: str, tmp_path: Path) -> None:
    assert cli.run(["plan", base, "-m", PASSTHROUGH, "--json"]) == 0
    plan = capsys.readouterr().out
    assert cli.run(["convert", base, str(tmp_path / "out"), "-m", PASSTHROUGH, "--dry-run", "--json"]) == 0
    assert capsys.readouterr().out == plan
    assert not (tmp_path / "out").exists()


def _converting(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]) -> None:
    monkeypatch.setattr(surgery.conversion, "convert", function)


def test_details_are_told_now_and_then_with_the_time_that_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr("surgery.cli.output.time.monotonic", lambda: now[0])
    report = _stage_lines()
    for step in (0, 10, 20, 30, 100):
        report(Progress("heal", step, 100, "steps", f"loss {step}"))
        now[0] += 20
    assert capsys.readouterr().err.splitlines() == [
        "heal ...",
        "heal: 20/100, loss 20, 0:02:40 left",  # 40 s for a fifth
        "heal: 100/100, loss 100",
    ]


def test_of_several_processes_only_the_first_one_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], base: str
) -> None:
    ran: list[str] = []
    _converting(monkeypatch, lambda base, *_, **__: ran.append(base))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert cli.run(["convert", base, "OUT", "-m", PASSTHROUGH]) == 0
    assert ran == [base]
    assert capsys.readouterr() == ("", "")


def test_convert_hands_every_option_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], base: str
) -> None:
    seen: dict[str, Any] = {}
    plan = SimpleNamespace(to_json=dict, bytes_written=5, notes=("look here",))

    def convert(base: str, out: Path, manifest: Manifest, **options: Any) -> Any:
        options["report"](Progress("write", 1, 2, "B"))
        seen.update(options, base=base, out=out, manifest=manifest)
        checks = (Check("load", "pass"),)
        found = Verification(checks, {"ratio": float("nan")}, {})
        return Conversion(out, plan, {}, found, 1.0, 0)

    _converting(monkeypatch, convert)
    options = (
        "--no-resume --overwrite --link --device cuda --workers 3 --statistics S --teacher T --dtype bfloat16 --shard-size 1GB "
        "--no-verify --trust-remote-code --allow-pickle --explain"
    )
    arguments = ["convert", base, "OUT", "-m", PASSTHROUGH, *options.split()]
    assert cli.run([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["verification"] == {
        "passed": True, "measurements": {"ratio": None}, "versions": {},
        "checks": [{"name": "load", "status": "pass", "detail": "", "value": None, "limit": None}],
    }  # fmt: skip
    assert err == ""
    manifest = seen.pop("manifest")
    assert (manifest.output.dtype, manifest.output.shard_bytes, manifest.verify) == ("bfloat16", 10**9, None)
    del seen["report"]
    switches = dict.fromkeys(("overwrite", "link", "trust_remote_code", "allow_pickle", "explain"), True)
    values = {
        "base": base,
        "out": Path("OUT"),
        "resume": False,
        "device": "cuda",
        "workers": 3,
        "statistics": Path("S"),
        "teacher": "T",
    }
    assert seen == switches | values
    assert cli.run([*arguments, "-q"]) == 0
    assert capsys.readouterr().out == "OUT\n"
    assert cli.run(arguments) == 0
    out, err = capsys.readouterr()
    assert "wrote OUT" in out
    assert "note: look here" in out
    assert err == "write ...\n"


def test_the_base_of_the_manifest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[str] = []

    def convert(base: str, *_: Any, **__: Any) -> Any:
        seen.append(base)
        raise DiskFull("full", cause="it is", remedy="wait")

    _converting(monkeypatch, convert)
    manifest = tmp_path / "m.yaml"
    manifest.write_text("surgery: 1\nbase: builtin:llama\noperations: []\n")
    assert cli.run(["convert", "OUT", "-m", str(manifest)]) == 4
    assert cli.run(["convert", "named", "OUT", "-m", str(manifest)]) == 4
    assert seen == ["builtin:llama", "named"]


def test_interruption(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def convert(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    _converting(monkeypatch, convert)
    assert cli.run(["convert", "base", "OUT", "-m", PASSTHROUGH]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_no_memory_is_no_defect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("surgery.inspection.inspect", fail)
    assert cli.run(["inspect", "builtin:llama"]) == 4
    assert "not enough memory" in capsys.readouterr().err


def test_defects_are_told_apart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def convert(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("oops")

    _converting(monkeypatch, convert)
    arguments = ["convert", "base", "OUT", "-m", PASSTHROUGH]
    assert cli.run(arguments) == 70
    err = capsys.readouterr().err
    assert "ZeroDivisionError: oops" in err
    assert "test_cli.py:" in err
    assert "Traceback" not in err
    assert cli.run([*arguments, "-v"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_a_failed_verification_is_shown_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = (Check("hashes", "pass", "3 files"), Check("cache", "fail", "512 is not 256", 512.0, 256.0))
    monkeypatch.setattr(surgery.verification, "verify", lambda *_, **__: Verification(checks, {}, {"torch": "2"}))
    assert cli.run(["verify", "OUT"]) == 5
    out, err = capsys.readouterr()
    assert "512 is not 256" in out
    assert "1 of 2 checks failed" in err
    assert cli.run(["verify", "OUT", "--json"]) == 5
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is False
    assert found["error"]["exit_code"] == 5


def test_verify_finds_the_base_by_its_name(monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    seen: dict[str, Any] = {}

    def verify(out: Path, **options: Any) -> Verification:
        seen.update(options, out=out)
        return Verification((), {}, {})

    monkeypatch.setattr(surgery.verification, "verify", verify)
    assert cli.run(["verify", "OUT", "--against", base]) == 0
    assert {"out": Path("OUT"), "against": Path(base), "trust_base_code": False}.items() <= seen.items()


def test_names_of_strangers_do_not_reach_the_terminal_as_codes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    base = write_tiny(tmp_path / "base", "llama", model_type="\x1b[31mred[bold]")
    assert cli.run(["inspect", str(base)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "?[31mred[bold]" in shown
