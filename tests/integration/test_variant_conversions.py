"""Variants: each is byte for byte what its manifest makes alone, the stages before run once, all appear or none."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import surgery
import surgery.manifest
import surgery.verification
from surgery import cli
from surgery.checkpoint.reader import open_checkpoint
from surgery.errors import EnvironmentFailure, MissingPackage, OutputExists, UnsupportedModel, VerificationFailure
from surgery.manifest import Manifest
from surgery.operations import operations
from surgery.progress import Progress
from surgery.verification import Check, Verification
from tests.tiny import write_tiny
from tests.variants import MEASURED, PACK, SCALE

STRIDE = {"kv_latent": {"method": "stride", "kv_ratio": 0.5}}
NARROW = {"kv_latent": {"method": "stride", "qk_dim": 4, "vo_dim": 2}}
CALIBRATED = {"kv_latent": {"qk_dim": 8, "vo_dim": 12}}
TWO = {"narrow": NARROW, "packed": ["pack"]}

CHILD = """
import json, os, sys, pathlib
import surgery, surgery.conversion, surgery.checkpoint.evaluate
left, rename = int(sys.argv[4]), pathlib.Path.rename
def renaming(path, target):
    global left
    if left == 0:
        os._exit(9)
    left -= 1
    return rename(path, target)
pathlib.Path.rename = renaming
surgery.convert(sys.argv[1], sys.argv[2], surgery.manifest_from_dict(json.loads(sys.argv[3])), overwrite=sys.argv[5] == "1")
"""


@pytest.fixture(autouse=True)
def _operations(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**operations(), "scale": SCALE, "pack": PACK}
    monkeypatch.setattr(surgery.manifest, "known_operations", lambda: known)
    MEASURED.clear()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("bases") / "tiny", "llama", shards=2)


def manifest(steps: list[Any], variants: dict[str, Any], **sections: Any) -> Manifest:
    calibration = {"text": "self", "samples": 8, "length": 32}
    data = {"surgery": 1, "operations": steps, "calibration": calibration, "verify": False, "variants": variants}
    return surgery.manifest_from_dict(data | sections)


def hashes(folder: Path, *, without: frozenset[str] = frozenset()) -> dict[str, str]:
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}
    return {name: digest for name, digest in found.items() if name not in without}


def lock_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "surgery.lock.json").read_text())


ROOT = Path(__file__).resolve().parents[2]
RECORDS = frozenset({"README.md", "surgery.lock.json"})  # which tell of each other


@pytest.mark.parametrize("output", [{}, {"dtype": "bfloat16", "shard_size": "40KB"}], ids=["kept", "recast"])
@pytest.mark.parametrize(
    ("family", "steps", "variants"),
    [
        ("llama", [], {"half": STRIDE, "packed": "pack", "mended": {"pack": {"calibrated": True}}}),
        ("llama", [STRIDE], {"narrow": NARROW, "both": [NARROW, "pack"], "mended": {"pack": {"calibrated": True}}}),
        ("llama", ["scale"], {"again": "scale", "more": [NARROW, "scale", {"pack": {"calibrated": True}}], "packed": "pack"}),
        ("phi3", [], {"latent": NARROW, "measured": CALIBRATED}),
        ("mixtral", [STRIDE], {"few": {"expert_top_k": {"top_k": 1}}, "fewer": {"expert_prune": {"keep": 2}}}),
        ("llama", [STRIDE], {"latent": {"kv_latent": {"qk_dim": 4, "vo_dim": 6}}}),
        ("qwen3_moe", [{"expert_prune": {"keep": 3}}], {"latent": CALIBRATED, "packed": "pack"}),
    ],
)  # fmt: skip
def test_a_variant_is_what_its_manifest_makes_alone(
    family: str, steps: list[Any], variants: dict[str, Any], output: dict[str, str], tmp_path: Path
) -> None:
    base = write_tiny(tmp_path / "base", family, shards=2)
    together = manifest(steps, variants, output=output)
    done = surgery.convert(str(base), tmp_path / "out", together, statistics=tmp_path / "s")
    assert list(done.variants) == list(variants)
    assert not (tmp_path / "out.partial").exists()
    planned = surgery.plan(str(base), together)
    for name in variants:
        alone = surgery.convert(str(base), tmp_path / "alone" / name, together.variant(name), statistics=tmp_path / "t")
        out = tmp_path / f"out-{name}"
        assert done.variants[name].out == out
        assert hashes(out, without=RECORDS) == hashes(alone.out, without=RECORDS)
        found, wanted = lock_of(out), lock_of(alone.out)
        assert found["outputs"].pop("README.md") != wanted["outputs"].pop("README.md")
        assert found == wanted
        assert done.variants[name].plan == alone.plan == done.plan.variants[name]
        assert planned.variants[name] == surgery.plan(str(base), together.variant(name))
        made = open_checkpoint(out, trust_remote_code=True)
        if output and not name.startswith(("packed", "mended", "both", "more")):
            assert {tensor.dtype for tensor in made.tensors.values()} == {"BF16"}
    main = surgery.convert(str(base), tmp_path / "main", manifest(steps, {}, output=output), statistics=tmp_path / "t")
    assert hashes(main.out, without=RECORDS) == hashes(tmp_path / "out", without=RECORDS)


def test_packed_weights_are_cast_before_and_scales_never(base: Path, tmp_path: Path) -> None:
    recast = manifest(["pack"], {}, output={"dtype": "bfloat16"})
    done = surgery.convert(str(base), tmp_path / "out", recast)
    made = open_checkpoint(done.out)
    dtypes = {name.rpartition(".")[2]: info.dtype for name, info in made.tensors.items() if "q_proj" in name}
    assert dtypes == {"weight": "I8", "weight_scale": "F32"}
    assert made.tensors["model.norm.weight"].dtype == "BF16"
    assert "packed from BF16" in done.plan.notes
    assert json.loads((done.out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert done.plan.parameters_after == done.plan.parameters_before
    assert [stage.kind for stage in done.plan.stages] == ["edit"]
    mended = manifest([{"pack": {"calibrated": True}}], {}, output={"dtype": "bfloat16"})
    done = surgery.convert(str(base), tmp_path / "mended", mended, statistics=tmp_path / "s")
    assert [stage.kind for stage in done.plan.stages] == ["edit", "measure", "edit"]
    assert hashes(done.out, without=RECORDS) == hashes(tmp_path / "out", without=RECORDS)


def test_shared_stages_run_once(base: Path, tmp_path: Path) -> None:
    three = {name: {"pack": {"calibrated": name != "c"}} for name in "abc"}
    done = surgery.convert(str(base), tmp_path / "out", manifest(["scale"], three), statistics=tmp_path / "s")
    assert MEASURED == ["ScaleSettings", "PackSettings"]  # b takes the stored result of a
    for name, variant in done.variants.items():
        assert list(variant.lock["statistics"]) == ["0.scale", *(["1.pack"] if name != "c" else [])]


def stopping(stage: str, error: type[BaseException] = KeyboardInterrupt) -> Any:
    def report(progress: Progress) -> None:
        if progress.stage == stage:
            raise error

    return report


def test_killed_between_two_variants_it_goes_on(base: Path, tmp_path: Path) -> None:
    wanted = manifest(["scale"], {"a": {"pack": {"calibrated": True}}, "b": [STRIDE, {"pack": {"calibrated": True}}]})
    out, place = tmp_path / "out", {"statistics": tmp_path / "s"}
    with pytest.raises(KeyboardInterrupt):
        surgery.convert(str(base), out, wanted, report=stopping("b: calibrate pack"), **place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "s"]
    measured = len(MEASURED)
    done = surgery.convert(str(base), out, wanted, **place)
    assert done.resumed_files == 6  # two shards each of the main result, of a, and of b's stage
    assert len(MEASURED) == measured + 1
    fresh = surgery.convert(str(base), tmp_path / "fresh", wanted, **place)
    for one, two in zip((done, *done.variants.values()), (fresh, *fresh.variants.values()), strict=True):
        assert hashes(one.out) == hashes(two.out)


def test_what_was_measured_on_an_intermediate_is_known_after_a_kill(base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "copy")
    (copy / "tokenizer.json").write_text("{}")
    wanted = manifest([STRIDE], {"a": {"pack": {"calibrated": True}}, "b": NARROW})
    with pytest.raises(KeyboardInterrupt):
        surgery.convert(str(copy), tmp_path / "out", wanted, report=stopping("b: write"), statistics=tmp_path / "s")
    surgery.convert(str(copy), tmp_path / "out", wanted, statistics=tmp_path / "s")
    assert MEASURED == ["PackSettings"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("renames", [0, 1, 2])
def test_killed_between_renames_it_goes_on(base: Path, tmp_path: Path, renames: int, overwrite: bool) -> None:
    data = {"surgery": 1, "operations": [STRIDE], "verify": False, "variants": {"a": NARROW, "b": [NARROW]}}
    wanted = surgery.manifest_from_dict(data)
    out = tmp_path / "out"
    if overwrite:
        surgery.convert(str(base), out, manifest([], {"a": STRIDE, "b": STRIDE}))
    arguments = [str(base), str(out), json.dumps(data), str(renames * (1 + overwrite)), str(int(overwrite))]
    killed = subprocess.run([sys.executable, "-c", CHILD, *arguments], check=False)
    assert killed.returncode == 9
    if not overwrite:
        there = sorted(path.name for path in tmp_path.iterdir())
        assert there == sorted(["out.partial", *["out-a", "out-b"][:renames]])
    done = surgery.convert(str(base), out, wanted, overwrite=overwrite)
    assert done.resumed_files == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-a", "out-b"]
    fresh = surgery.convert(str(base), tmp_path / "fresh", wanted)
    for one, two in zip((done, *done.variants.values()), (fresh, *fresh.variants.values()), strict=True):
        assert hashes(one.out) == hashes(two.out)


def test_what_only_looks_placed_is_not_touched(base: Path, tmp_path: Path) -> None:
    wanted, out = manifest([STRIDE], {"a": NARROW, "b": NARROW}), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        surgery.convert(str(base), out, wanted, report=stopping("b: write"))
    (tmp_path / "out-a").mkdir()
    (tmp_path / "out-a/surgery.lock.json").write_text("{}")
    with pytest.raises(OutputExists, match="out-a exists"):
        surgery.convert(str(base), out, wanted)
    assert (tmp_path / "out-a/surgery.lock.json").read_text() == "{}"


def test_a_rename_that_fails_takes_the_others_back(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, out, rename = manifest([STRIDE], {"a": NARROW, "b": NARROW}), tmp_path / "out", Path.rename
    surgery.convert(str(base), out, manifest([], {"a": STRIDE, "b": STRIDE}))
    before = [hashes(tmp_path / name) for name in ("out", "out-a", "out-b")]

    def renaming(path: Path, target: Path) -> Path:
        if path.name == "checkpoint" and target == out:
            raise PermissionError(13, "no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renaming)
    with pytest.raises(EnvironmentFailure):
        surgery.convert(str(base), out, wanted, overwrite=True)
    assert before == [hashes(tmp_path / name) for name in ("out", "out-a", "out-b")]
    monkeypatch.undo()


def fake_verify(failing: str = "") -> Any:
    def verify(folder: Path, **_: Any) -> Verification:
        name = folder.parent.name
        checks = (Check("logits", "fail" if failing and name == failing else "pass", "they differ"),)
        kl = {"out.partial": 0.25}.get(name, 0.5)
        figures = {"perplexity": 60.0, "base_perplexity": 50.0, "kl": kl, "agreement": 0.75, "tokens": 100.0}
        return Verification(checks, figures, {})

    return verify


def test_a_variant_that_fails_leaves_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgery.verification, "verify", fake_verify("b"))
    wanted = manifest([STRIDE], {"a": NARROW, "b": NARROW}, verify=True)
    with pytest.raises(VerificationFailure, match=r"^variant b: the result fails 1 of 1 checks: logits"):
        surgery.convert(str(base), tmp_path / "out", wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    monkeypatch.setattr(surgery.verification, "verify", fake_verify())
    assert surgery.convert(str(base), tmp_path / "out", wanted).resumed_files == 6


def test_a_variant_that_does_not_fit_is_named_before_anything_is_written(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"^variant few: expert_top_k does not fit"):
        surgery.convert(str(base), tmp_path / "out", manifest([], {"few": "expert_top_k"}))
    assert list(tmp_path.iterdir()) == []


def test_what_loading_needs_is_looked_for_first(base: Path, tmp_path: Path) -> None:
    wanted = {"int8": {"pack": {"package": "surely_absent"}}}
    with pytest.raises(MissingPackage, match="surely_absent>=1 is not installed, and results of pack") as caught:
        surgery.convert(str(base), tmp_path / "out", manifest([], wanted, verify=True))
    assert 'pip install "surely_absent>=1"' in caught.value.remedy
    assert caught.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []
    done = surgery.convert(str(base), tmp_path / "out", manifest([], wanted))
    assert 'pip install "surely_absent>=1"' in (done.variants["int8"].out / "README.md").read_text()
    assert "pip install" not in (done.out / "README.md").read_text()


def test_overwrite_replaces_what_surgery_wrote(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    surgery.convert(str(base), tmp_path / "out-a", manifest([], {}))
    wanted = manifest([STRIDE], {"a": NARROW, "b": NARROW})
    with pytest.raises(OutputExists, match="out-a exists"):
        surgery.convert(str(base), out, wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["out-a"]
    surgery.convert(str(base), out, wanted, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-a", "out-b"]
    shutil.rmtree(tmp_path / "out-b")
    (tmp_path / "out-b").mkdir()
    (tmp_path / "out-b/thesis.txt").write_text("ten years")
    with pytest.raises(OutputExists, match="out-b was not written by surgery"):
        surgery.convert(str(base), out, wanted, overwrite=True)


def test_a_variant_is_reproduced_alone_and_the_main_lock_makes_all(base: Path, tmp_path: Path) -> None:
    wanted = manifest(["scale"], TWO)
    surgery.convert(str(base), tmp_path / "out", wanted, statistics=tmp_path / "s")
    assert "variants" not in lock_of(tmp_path / "out-packed")
    done = surgery.reproduce(tmp_path / "out-packed/surgery.lock.json", tmp_path / "alone", base=str(base))
    assert not done.variants
    assert hashes(done.out, without=RECORDS) == hashes(tmp_path / "out-packed", without=RECORDS)
    done = surgery.reproduce(tmp_path / "out/surgery.lock.json", tmp_path / "again", base=str(base))
    for name in ("", *(f"-{name}" for name in TWO)):
        assert hashes(tmp_path / f"again{name}") == hashes(tmp_path / f"out{name}")
    lock = lock_of(tmp_path / "out")
    assert lock["variants"]["narrow"]["outputs"] == lock_of(tmp_path / "out-narrow")["outputs"]
    shard = next(name for name in lock["variants"]["packed"]["outputs"] if name.endswith(".safetensors"))
    lock["variants"]["packed"]["outputs"][shard]["sha256"] = "0" * 64
    (tmp_path / "out/surgery.lock.json").write_text(json.dumps(lock))
    with pytest.raises(VerificationFailure, match=f"^variant packed: 1 files differ from the lock: {shard}"):
        surgery.reproduce(tmp_path / "out/surgery.lock.json", tmp_path / "third", base=str(base))


@pytest.mark.parametrize("hostile", [3, {"a": 3}, {"a": {"outputs": []}}])
def test_a_lock_with_other_variants_is_none(base: Path, tmp_path: Path, hostile: Any) -> None:
    surgery.convert(str(base), tmp_path / "out", manifest([], {}))
    lock = tmp_path / "out/surgery.lock.json"
    lock.write_text(json.dumps(lock_of(tmp_path / "out") | {"variants": hostile}))
    with pytest.raises(surgery.SurgeryError, match="is not a lock"):
        surgery.reproduce(lock, tmp_path / "again", base=str(base))


def test_every_card_and_the_command_compare_all(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(surgery.verification, "verify", fake_verify())
    file = tmp_path / "m.yaml"
    file.write_text(manifest([STRIDE], TWO, verify=True).to_yaml())
    out = tmp_path / "out"
    assert cli.run(["convert", str(base), str(out), "-m", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["variants"]) == list(TWO)
    assert [each["name"] for each in told["comparison"]] == ["", *TWO]
    assert [each["perplexity_ratio"] for each in told["comparison"]] == [1.2] * 3
    weights = [
        sum(f.stat().st_size for f in p.glob("*.safetensors"))
        for p in (out, tmp_path / "out-narrow", tmp_path / "out-packed")
    ]
    assert [each["weight_bytes"] for each in told["comparison"]] == weights
    for name, others in (("", TWO), ("-narrow", TWO), ("-packed", TWO)):
        card = (tmp_path / f"out{name}/README.md").read_text()
        table = [
            line for line in card.partition("## Variants")[2].partition("## ")[0].splitlines() if "kv_latent" in line
        ]
        assert [line.split("|")[1].strip() for line in table] == ["main result", *(f"`{other}`" for other in others)]
        this = [line.split("|")[1].strip(" `") for line in table if line.split("|")[2].strip() == "this"]
        assert this == [name.removeprefix("-") or "main result"]
        assert "| 1.2000 | 0.25000 | 75.0% | native |" in table[0]
        assert table[1].endswith("| 1.2000 | 0.50000 | 75.0% | yes |")
    assert cli.run(["convert", str(base), str(out), "-m", str(file), "--overwrite"]) == 0
    shown = capsys.readouterr().out
    assert f"wrote {out}-packed" in shown
    assert "perplexity ratio" in shown
    assert cli.run(["convert", str(base), str(out), "-m", str(file), "--overwrite", "-q"]) == 0
    assert capsys.readouterr().out.split() == [str(out), f"{out}-narrow", f"{out}-packed"]
    assert cli.run(["plan", str(base), "-m", str(file)]) == 0
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if line.startswith("packed"))
    assert "native: no code" in row
    assert cli.run(["plan", str(base), "-m", str(file), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["variants"]) == list(TWO)


def test_explanations_of_variants_lie_beside_them(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base", "mixtral")
    explained = {"expert_prune": {"keep": 2}}
    pytest.importorskip("matplotlib")
    done = surgery.convert(
        str(base), tmp_path / "out", manifest([{"expert_prune": {"keep": 3}}], {"few": explained}), explain=True,
        statistics=tmp_path / "s",
    )  # fmt: skip
    assert list(done.explanations) == ["0.expert_prune"]
    assert list(done.variants["few"].explanations) == ["1.expert_prune"]
    assert (tmp_path / "out.0.expert_prune.json").is_file()
    assert (tmp_path / "out-few.1.expert_prune.json").is_file()
    assert not (tmp_path / "out-few.0.expert_prune.json").exists()


def test_processes_that_follow_make_no_variant(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import surgery.conversion
    import surgery.stages

    waited: list[bool] = []
    for module in (surgery.conversion, surgery.stages):
        monkeypatch.setattr(module, "wait_for_all", lambda device, last=False: waited.append(last))
    wanted = manifest([], {"a": [STRIDE, {"pack": {"calibrated": True}}], "b": NARROW})
    surgery.convert(str(base), tmp_path / "out", wanted, statistics=tmp_path / "s")
    assert waited == [True]
    monkeypatch.setattr(surgery.conversion, "leads", lambda: False)
    surgery.convert(str(base), tmp_path / "other", wanted, statistics=tmp_path / "s")
    assert waited == [True, True]
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_two_processes_train_and_one_makes_the_variants(base: Path, tmp_path: Path) -> None:
    small = {"tokens": 256, "learning_rate": 1e-3}
    heal = {"heal": {"layerwise": None, "batch_size": 2, "precision": "fp32", "end_to_end": small}}
    wanted = manifest([STRIDE, heal], {"int8": {"quantize": {"bits": 8}}}, data={"text": "self", "length": 32})
    (tmp_path / "m.yaml").write_text(wanted.to_yaml())
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "docs/accelerate/ddp.yaml"),
        "-m", "surgery", "convert", str(base), str(tmp_path / "out"), "-m", str(tmp_path / "m.yaml"),
    ]  # fmt: skip
    variables = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, env=variables, timeout=300, cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("wrote ") == 2
    assert lock_of(tmp_path / "out-int8")["training"]["stages"]["1.heal"]["processes"] == 2
    made = open_checkpoint(tmp_path / "out-int8")
    assert made.tensors["model.norm.weight"].dtype == "F32"
    assert any(info.dtype == "I32" for info in made.tensors.values())


@pytest.mark.slow
def test_variants_are_verified_each(tmp_path: Path) -> None:
    wanted = manifest([STRIDE], {"narrow": {"kv_latent": {"method": "stride", "qk_dim": 2, "vo_dim": 4}}}, verify=True)
    done = surgery.convert("builtin:llama", tmp_path / "out", wanted)
    narrow = done.variants["narrow"].verification
    assert done.verification is not None
    assert narrow is not None
    assert narrow.measurements["kl"] > done.verification.measurements["kl"] > 0
    assert done.comparison[1].kl == narrow.measurements["kl"]
    assert surgery.verify(tmp_path / "out-narrow").passed


def test_the_disk_that_all_need_is_told(base: Path, tmp_path: Path) -> None:
    def needed(steps: list[Any], variants: dict[str, Any], **sections: Any) -> Any:
        return surgery.plan(str(base), manifest(steps, variants, **sections))

    small = 64 << 20
    main = needed([STRIDE], {})
    alone = needed([STRIDE, "pack"], {})
    mended = {"pack": {"calibrated": True}}
    whole = open_checkpoint(base).tensor_bytes
    assert needed([STRIDE], {"a": "pack"}).disk_needed == main.disk_needed + alone.bytes_written + small
    assert needed([STRIDE], {"a": mended}).disk_needed == main.disk_needed + alone.bytes_written + small
    between = needed([STRIDE], {"a": ["scale", mended]}).disk_needed
    assert between == main.disk_needed + alone.bytes_written + small + whole
    recast = {"output": {"dtype": "bfloat16"}}
    found = needed([STRIDE], {"a": "scale"}, **recast)
    assert (
        found.disk_needed - needed([STRIDE], {}, **recast).disk_needed
        == found.variants["a"].bytes_written + small + whole
    )


def test_a_plan_shows_stages_of_variants(base: Path) -> None:
    plan = surgery.plan(str(base), manifest([STRIDE], {"a": {"pack": {"calibrated": True}}}))
    assert [stage.kind for stage in plan.stages] == ["edit"]
    assert [stage.kind for stage in plan.variants["a"].stages] == ["edit", "measure", "edit"]
    assert not plan.estimated
    assert plan.variants["a"].estimated
