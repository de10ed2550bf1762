"""Conversions as a whole: interrupted, resumed, repeated, out of disk, over what is already there."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import surgery
from surgery.errors import (
    DiskFull,
    EnvironmentFailure,
    OutputExists,
    RefusedInput,
    UnsafeCheckpoint,
    VerificationFailure,
)
from surgery.manifest import Manifest
from surgery.progress import Progress
from tests.hostile_cases import CASES, Case
from tests.tiny import write_tiny

STRIDE = {"surgery": 1, "operations": [{"kv_latent": {"method": "stride", "kv_ratio": 0.5}}], "verify": False}
PASS = {"surgery": 1, "operations": [], "verify": False}
CALIBRATED = {
    "surgery": 1,
    "operations": [{"kv_latent": {"qk_dim": 8, "vo_dim": 12}}],
    "calibration": {"text": "self", "samples": 8, "length": 32},
    "verify": False,
}

# Says when everything is imported, so that only the conversion itself is killed.
CHILD = """
import sys, json, torch, surgery, surgery.conversion, surgery.checkpoint.evaluate
manifest = surgery.manifest_from_dict(json.loads(sys.argv[3]))
print("ready", flush=True)
surgery.convert(sys.argv[1], sys.argv[2], manifest)
"""


def manifest(data: dict) -> Manifest:
    return surgery.manifest_from_dict(data)


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    write_tiny(folder, "llama")
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 30 MB in several shards: long enough to be killed in the middle."""
    single = tmp_path_factory.mktemp("bases") / "single"
    write_tiny(single, "llama", hidden_size=256, head_dim=64, intermediate_size=1024, num_hidden_layers=8)
    out = single.with_name("large")
    surgery.convert(str(single), out, manifest({**PASS, "output": {"shard_size": "4MB"}}))
    (out / "surgery.lock.json").unlink()
    return out


def test_pass_through_keeps_every_byte_of_the_weights(base: Path, tmp_path: Path) -> None:
    surgery.convert(str(base), tmp_path / "out", manifest(PASS))
    assert (tmp_path / "out/model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_to_the_same_bytes(large: Path, tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    started = time.monotonic()
    surgery.convert(str(large), undisturbed, manifest(STRIDE))
    duration = time.monotonic() - started
    expected, chance, resumed, killed = hashes(undisturbed), random.Random(0), 0, 0
    for number in range(6):
        out = tmp_path / "killed"
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(large), str(out), json.dumps(STRIDE)], stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        time.sleep(chance.uniform(0, duration))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        complete = out.exists()  # killed between the rename and the removal of OUT.partial, or not at all
        killed += not complete
        if not complete:
            resumed += surgery.convert(str(large), out, manifest(STRIDE)).resumed_files
        assert hashes(out) == expected, f"kill {number} left other bytes"
        assert complete or not out.with_name("killed.partial").exists()
        shutil.rmtree(out)
        shutil.rmtree(out.with_name("killed.partial"), ignore_errors=True)
    assert killed >= 3, "most conversions must have been caught in the middle"
    assert resumed > 0, "some finished shard must have been taken over"


def test_a_changed_manifest_starts_over(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        surgery.convert(str(large), out, manifest(STRIDE), workers=1, report=interrupting(after=0.5))
    assert out.with_name("out.partial").exists()
    done = surgery.convert(str(large), out, manifest(PASS))
    assert done.resumed_files == 0
    surgery.convert(str(large), tmp_path / "fresh", manifest(PASS))
    assert hashes(out) == hashes(tmp_path / "fresh")


def test_no_resume_starts_over(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        surgery.convert(str(large), out, manifest(PASS), workers=1, report=interrupting(after=0.5))
    assert surgery.convert(str(large), out, manifest(PASS), resume=False).resumed_files == 0


def interrupting(after: float):
    def report(progress: Progress) -> None:
        if progress.stage == "write" and progress.done > after * progress.total:
            raise KeyboardInterrupt

    return report


def test_a_finished_shard_that_was_tampered_with_is_written_again(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        surgery.convert(str(large), out, manifest(PASS), workers=1, report=interrupting(after=0.6))
    shard = next(iter(sorted((tmp_path / "out.partial/checkpoint").glob("*.safetensors"))))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    surgery.convert(str(large), out, manifest(PASS))
    surgery.convert(str(large), tmp_path / "fresh", manifest(PASS))
    assert hashes(out) == hashes(tmp_path / "fresh")


def test_too_little_disk_is_told_before_the_first_byte(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))
    with pytest.raises(DiskFull) as caught:
        surgery.convert(str(base), tmp_path / "out", manifest(PASS))
    assert caught.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_disk_that_fills_up_leaves_no_output_and_the_base_untouched(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("this container may not mount a tmpfs")
    before = hashes(large)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    try:
        with pytest.raises(DiskFull):
            surgery.convert(str(large), small / "out", manifest(PASS))
        assert not (small / "out").exists()
        assert hashes(large) == before
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_an_unwritable_place_is_an_environment_error(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFailure):
        surgery.convert(str(base), tmp_path / "file" / "out", manifest(PASS))


def test_what_exists_is_not_replaced_unasked(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    surgery.convert(str(base), out, manifest(PASS))
    with pytest.raises(OutputExists):
        surgery.convert(str(base), out, manifest(STRIDE))
    surgery.convert(str(base), out, manifest(STRIDE), overwrite=True)
    assert json.loads((out / "config.json").read_text())["head_dim"] == 8
    assert sorted(place.name for place in tmp_path.iterdir()) == ["out"]


def test_what_surgery_did_not_write_is_never_replaced(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("ten years")
    with pytest.raises(OutputExists):
        surgery.convert(str(base), out, manifest(PASS), overwrite=True)
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial/thesis.txt").write_text("ten years")
    with pytest.raises(OutputExists):
        surgery.convert(str(base), tmp_path / "other", manifest(PASS))
    assert (out / "thesis.txt").exists()
    assert (tmp_path / "other.partial/thesis.txt").exists()


@pytest.mark.parametrize("place", ["", "inside", ".."])
def test_the_base_is_never_written_to(base: Path, place: str) -> None:
    before = hashes(base)
    with pytest.raises(OutputExists):
        surgery.convert(str(base), base / place if place != ".." else base.parent, manifest(PASS), overwrite=True)
    assert hashes(base) == before


def test_two_conversions_into_one_place_exclude_each_other(base: Path, tmp_path: Path) -> None:
    def second(progress: Progress) -> None:
        surgery.convert(str(base), tmp_path / "out", manifest(PASS))

    with pytest.raises(OutputExists):
        surgery.convert(str(base), tmp_path / "out", manifest(PASS), report=second)


def test_linked_files_share_their_bytes(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    surgery.convert(str(large), out, manifest(PASS), link=True)
    shards = sorted(large.glob("*.safetensors"))
    assert shards
    assert all((out / shard.name).stat().st_ino == shard.stat().st_ino for shard in shards)


def test_reproduce_gives_the_same_bytes(base: Path, tmp_path: Path) -> None:
    surgery.convert(str(base), tmp_path / "out", manifest(CALIBRATED), statistics=tmp_path / "s1")
    done = surgery.reproduce(tmp_path / "out/surgery.lock.json", tmp_path / "again", base=str(base))
    assert hashes(done.out) == hashes(tmp_path / "out")


def test_reproduce_names_the_input_that_changed(base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    surgery.convert(str(copy), tmp_path / "out", manifest(STRIDE))
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-2] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(RefusedInput, match=r"model\.safetensors"):
        surgery.reproduce(tmp_path / "out/surgery.lock.json", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_reproduce_names_the_output_that_differs(base: Path, tmp_path: Path) -> None:
    surgery.convert(str(base), tmp_path / "out", manifest(STRIDE))
    lock = tmp_path / "out/surgery.lock.json"
    found = json.loads(lock.read_text())
    found["outputs"]["model.safetensors"]["sha256"] = "0" * 64
    lock.write_text(json.dumps(found))
    with pytest.raises(VerificationFailure, match=r"model\.safetensors"):
        surgery.reproduce(lock, tmp_path / "again", base=str(base))


def test_a_failed_verification_puts_nothing_in_place(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The emitted class forgets its cache: fluent, and wrong from the second token on.
    from surgery.emission import code

    original = (code.RUNTIME / "surgery_latent_attention.py").read_text()
    for file in code.RUNTIME.glob("*.py"):
        shutil.copy(file, tmp_path)
    broken = original.replace("cache = past_key_values if past_key_values is not None else past_key_value", "cache = None")
    assert broken != original
    (tmp_path / "surgery_latent_attention.py").write_text(broken)
    monkeypatch.setattr(code, "RUNTIME", tmp_path)
    wanted = {"surgery": 1, "operations": [{"kv_latent": {"method": "stride", "qk_dim": 8, "vo_dim": 16}}]}
    with pytest.raises(VerificationFailure, match="cached_decode"):
        surgery.convert(str(base), tmp_path / "out", manifest(wanted))
    assert not (tmp_path / "out").exists()


def test_operations_chain_through_a_checkpoint_in_between(base: Path, tmp_path: Path) -> None:
    chained = {
        **CALIBRATED,
        "operations": [{"kv_latent": {"method": "stride", "kv_ratio": 0.5}}, {"kv_latent": {"qk_dim": 4, "vo_dim": 6}}],
    }
    done = surgery.convert(str(base), tmp_path / "out", manifest(chained), statistics=tmp_path / "s")
    assert [stage.kind for stage in done.plan.stages] == ["edit", "measure", "edit"]
    layers = json.loads((tmp_path / "out/config.json").read_text())["surgery"]["latent_attention"]["layers"]
    assert {(layer["qk_dim"], layer["vo_dim"]) for layer in layers} == {(4, 6)}


def test_an_output_dtype_is_applied_and_named(base: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    surgery.convert(str(base), tmp_path / "out", manifest({**PASS, "output": {"dtype": "bfloat16"}}))
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.bfloat16"}  # noqa: SIM118
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_base_is_refused_with_nothing_written(case: Case, tmp_path: Path) -> None:
    base, place = tmp_path / "base", tmp_path / "place"
    base.mkdir()
    place.mkdir()
    case.build(base)
    with pytest.raises(case.error):
        surgery.convert(str(base), place / "out", manifest(PASS))
    assert list(place.iterdir()) == []


def test_the_command_line_ends_with_the_error_s_exit_code(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.error is UnsafeCheckpoint)
    (tmp_path / "base").mkdir()
    case.build(tmp_path / "base")
    command = [sys.executable, "-m", "surgery", "convert", str(tmp_path / "base"), str(tmp_path / "out"), "-o", "kv_latent"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 3
    assert [line.split()[0] for line in ended.stderr.strip().splitlines()] == ["error:", "why:", "next:"]
    assert sorted(place.name for place in tmp_path.iterdir()) == ["base"]


def test_a_device_that_is_not_there_is_told_in_three_lines(base: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailure, match="cannot be used"):
        surgery.convert(str(base), tmp_path / "out", manifest(CALIBRATED), device="cuda:99", statistics=tmp_path / "s")
    assert not (tmp_path / "out").exists()
