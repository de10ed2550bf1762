"""Interrupted, repeated, and other measurements in between: a result rests on one choice of experts, the lock's."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

import surgery
from surgery.architectures.experts import renumbered
from surgery.checkpoint import writer
from surgery.errors import UnsupportedModel, UsageError
from surgery.manifest import manifest_from_dict
from tests.tiny import write_tiny


def manifest(settings, **sections):
    calibration = {"text": "self", "samples": 4, "length": 16}
    return manifest_from_dict(
        {"surgery": 1, "operations": [{"expert_prune": settings}], "calibration": calibration, "verify": False} | sections
    )


def measured(base, folder, seed):
    """A file of statistics of `base`, on text of another seed."""
    calibration = {"text": "self", "samples": 4, "length": 16, "seed": seed}
    surgery.convert(
        str(base), folder / f"by{seed}", manifest({"keep": 2}, calibration=calibration), statistics=folder / f"s{seed}"
    )
    (found,) = (folder / f"s{seed}").iterdir()
    return found


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_going_on_with_other_statistics_begins_anew(family, tmp_path, monkeypatch):
    base = write_tiny(tmp_path / "base", family, shards=3, experts=8)
    first = measured(base, tmp_path, 0)
    kept = json.loads((tmp_path / "by0/surgery.lock.json").read_text())["decisions"]["0.expert_prune"]["kept"]
    for seed in range(1, 9):
        other = measured(base, tmp_path, seed)
        again = json.loads((tmp_path / f"by{seed}/surgery.lock.json").read_text())["decisions"]["0.expert_prune"]["kept"]
        if again != kept:
            break
    assert again != kept, "no seed gives another choice: the test would show nothing"
    real, written = writer._shard, []

    def interrupted(job, shard, stop):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard.name)
        return real(job, shard, stop)

    monkeypatch.setattr(writer, "_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        surgery.convert(str(base), tmp_path / "out", manifest({"keep": 2}), statistics=first, workers=1)
    monkeypatch.setattr(writer, "_shard", real)
    done = surgery.convert(str(base), tmp_path / "out", manifest({"keep": 2}), statistics=other, workers=1)
    assert done.lock["decisions"]["0.expert_prune"]["kept"] == again
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / f"by{seed}" / file.name).read_bytes(), file.name


def test_a_given_measurement_is_needed_again(tmp_path):
    base = write_tiny(tmp_path / "base", "qwen3_moe", experts=8)
    given = measured(base, tmp_path, 3)
    surgery.convert(str(base), tmp_path / "out", manifest({"keep": 2}), statistics=given)
    lock = tmp_path / "out/surgery.lock.json"
    assert json.loads(lock.read_text())["statistics"]["0.expert_prune"]["given"] is True
    with pytest.raises(UsageError, match="given as a file"):
        surgery.reproduce(lock, tmp_path / "again", base=str(base))
    surgery.reproduce(lock, tmp_path / "again", base=str(base), statistics=given)
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert left.keys() == right.keys()
    assert all(left[name].equal(right[name]) for name in left)


@pytest.mark.parametrize("criterion", ["aimer", "router_norm", "random"])
def test_what_reads_no_text_needs_none(criterion, tmp_path):
    base = write_tiny(tmp_path / "base", "qwen3_moe")
    nowhere = {"text": [str(tmp_path / "nowhere.txt")]}
    made = manifest({"keep": 2, "criterion": criterion}, calibration=nowhere)
    done = surgery.convert(str(base), tmp_path / "out", made, statistics=tmp_path / "statistics")
    surgery.reproduce(done.out / "surgery.lock.json", tmp_path / "again", base=str(base))


def test_a_statistics_file_that_is_not_there_is_said(tmp_path):
    base = write_tiny(tmp_path / "base", "qwen3_moe")
    with pytest.raises(UsageError, match="is not there"):
        surgery.convert(str(base), tmp_path / "out", manifest({"keep": 2}), statistics=tmp_path / "lost.safetensors")
    assert not list(tmp_path.glob("out*"))


def test_names_in_quantization_configs_follow():
    names, gone = {"model.m.experts.3": "model.m.experts.2"}, frozenset({"model.m.experts.1"})
    config = {"extra": {"model.m.experts.3": {"bits": 8}, "model.m.experts.1": {}}, "ignore": [r"re:.*experts\..*"], "n": 1}
    found = renumbered(config, names, gone)
    assert found == {"extra": {"model.m.experts.2": {"bits": 8}}, "ignore": [r"re:.*experts\..*"], "n": 1}
    with pytest.raises(UnsupportedModel, match="by the pattern"):
        renumbered({"ignore": [r"re:.*experts\.3\..*"]}, names, gone)
