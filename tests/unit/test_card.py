"""Properties of the model card: it can be parsed, it is true, it leaks nothing, and no base can write into it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import surgery
from surgery.checkpoint.journal import Finished
from surgery.checkpoint.reader import SideFile, open_checkpoint
from surgery.checkpoint.writer import hash_file
from surgery.emission import card
from surgery.emission.checkpoint import result_code
from surgery.manifest import load_manifest, manifest_from_dict
from surgery.operations import find_operation
from surgery.planning import make_plan, open_draft

BASE = Path(surgery.__file__).parent / "builtin" / "llama"
LATENT = {"method": "stride", "qk_dim": 8, "vo_dim": 16}
MEASURED = {"perplexity": 60.0, "base_perplexity": 50.0, "kl": 0.125, "agreement": 0.75, "tokens": 4080}


def verification(**measurements: float) -> SimpleNamespace:
    checks = [
        SimpleNamespace(name=name, status=status) for name, status in (("beam_4", "pass"), ("static_cache", "skip"))
    ]
    versions = {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"}
    return SimpleNamespace(checks=tuple(checks), measurements=measurements, versions=versions)


def make_card(
    base: Path, settings: dict[str, Any] | None, *, verified: Any = None, side: str = "", **source: Any
) -> str:
    """The card of an imagined conversion of `base`: real plan, draft and code, invented hashes of the weights."""
    checkpoint = open_checkpoint(base, **source)
    if side:
        checkpoint = replace(
            checkpoint, side_files=(*checkpoint.side_files, SideFile(side, 1, "a | reason\n# of mine"))
        )
    data = {"surgery": 1, "operations": [] if settings is None else [{"kv_latent": settings}]}
    manifest = manifest_from_dict(data | {"verify": {"text": ["/srv/somebody/secret/heldout.txt"]}})
    steps = manifest.steps
    plan, draft = make_plan(checkpoint, manifest), open_draft(checkpoint)
    for step in steps:
        step.edit(draft, None)
    outputs = {"model.safetensors": Finished("model.safetensors", 1000, "0" * 64)}
    outputs |= {name: hash_file(base / name) for name in plan.side_files if (base / name).is_file()}
    outputs |= {name: Finished(name, len(content), sha(content)) for name, content in result_code(draft).items()}
    return card.card_bytes(checkpoint, plan, draft, manifest, outputs, verified).decode()


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def metadata(text: str) -> dict[str, Any]:
    opening, front, _ = text.split("---\n", 2)
    assert not opening
    return yaml.safe_load(front)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the built-in model that a test may deface."""
    return Path(shutil.copytree(BASE, tmp_path / "some model"))


def test_front_matter_is_what_the_hub_reads(base):
    (base / "README.md").write_text("---\nlicense: llama3.2\ntags: [x]\n---\n# A model\n")
    found = metadata(make_card(base, LATENT, source="OWNER/NAME@main", revision="a" * 40))
    assert found == {
        "license": "llama3.2",
        "base_model": "OWNER/NAME",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["surgery", "kv_latent"],
    }


def test_a_local_base_is_named_by_its_folder_and_nothing_else(base):
    text = make_card(base, LATENT, verified=verification(**MEASURED))
    assert "some model" in text
    assert "base_model" not in metadata(text)
    assert str(base.parent) not in text
    assert "/srv" not in text
    assert not re.search(r"(?<![\w.<])/(?!/)\w+/\w+", text.replace("https://huggingface.co/", ""))


def test_equal_conversions_give_equal_cards(base):
    assert make_card(base, LATENT, verified=verification(**MEASURED)) == make_card(
        base, LATENT, verified=verification(**MEASURED)
    )


def test_code_is_listed_with_the_hash_and_purpose_it_has(base):
    text = make_card(base, LATENT)
    checkpoint = open_checkpoint(base)
    draft = open_draft(checkpoint)
    operation = find_operation("kv_latent")
    operation.edit(draft, operation.settings.model_validate(LATENT), None)
    emitted = result_code(draft)
    rows = {row[1].strip(" `"): row for row in (line.split("|") for line in text.splitlines() if ".py`" in line)}
    assert rows.keys() == emitted.keys()
    for name, content in emitted.items():
        assert rows[name][3].strip(" `") == sha(content)
        assert len(rows[name][2].strip()) > 20
    assert "trust_remote_code=True" in text
    assert 'revision="<40-hex commit>"' in text
    assert "llama.cpp" in text


def test_a_stock_result_asks_for_no_trust(base):
    text = make_card(base, {"method": "stride", "qk_dim": 8, "vo_dim": 8})
    assert "Native: no code" in text
    assert "trust_remote_code" not in text


def test_bytes_are_those_of_the_draft(base):
    text = make_card(base, LATENT)
    config = json.loads((base / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    cached = config["num_hidden_layers"] * config["num_key_value_heads"] * 4  # float32 or two of them in bfloat16
    row = next(line for line in text.splitlines() if line.startswith("| cache bytes"))
    before, after, ratio = (cell.strip().replace(",", "") for cell in row.split("|")[2:5])
    assert int(before) in {cached * 2 * head, cached * head}
    assert float(ratio) == pytest.approx(int(after) / int(before), abs=1e-4)
    assert int(after) * 2 * head == int(before) * (8 + 16)


def test_quality_is_what_was_measured_or_said_to_be_missing(base):
    text = make_card(base, LATENT, verified=verification(**MEASURED))
    assert "| perplexity per token | 50.0000 | 60.0000 | 1.2000 |" in text
    assert "0.12500" in text
    assert "4,080 tokens of `heldout.txt`" in text
    for unmeasured in (None, verification()):
        assert "not measured" in make_card(base, LATENT, verified=unmeasured)
    assert "passed: `beam_4`" in text
    assert "transformers 5.23.0" in text


def test_every_setting_has_a_row(base):
    text = make_card(base, LATENT)
    for name in find_operation("kv_latent").settings.model_fields:
        assert f"| `{name}` |" in text


def test_the_manifest_in_the_card_is_the_manifest(base, tmp_path):
    recipe = re.search(r"```yaml\n(.*?)```", make_card(base, LATENT), re.DOTALL)
    (tmp_path / "manifest.yaml").write_text(recipe[1])
    found = load_manifest(tmp_path / "manifest.yaml")
    assert found.steps[0].settings.qk_dim == 8
    assert found.verify.text[0].given == "heldout.txt"


def test_a_copy_is_called_a_copy(base):
    text = make_card(base, None)
    assert "a copy" in text
    assert len(text.splitlines()) < 100


def test_the_card_stays_short(base):
    assert len(make_card(base, LATENT, verified=verification(**MEASURED)).splitlines()) <= 130


@pytest.mark.parametrize(
    "front",
    [
        "license: !!python/object/apply:os.system ['touch owned']",
        "license: [mit]",
        "license: {a: b}",
        'license: "mit\\n---\\n# I write your card"',
        "license: MIT | <script>",
        "license: 2001-99-99",
        "license: *nothing",
        "license: " + "[" * 20_000,
        "a: &a {x: y}\nb: &b {<<: [*a, *a]}\nlicense: *b",
        "license: " + "m" * 10_000_000,
        "license: 'mit",
        "\x00\x01",
    ],
    ids=lambda front: front[:30],
)
def test_a_hostile_card_of_the_base_adds_nothing(base, front):
    (base / "README.md").write_text("---\ntitle: none\n---\n")
    clean = make_card(base, LATENT)
    (base / "README.md").write_text(f"---\n{front}\n---\n")
    assert make_card(base, LATENT) == clean
    assert "license" not in metadata(clean)
    assert "names no licence" in clean


@pytest.mark.parametrize("content", [b"\xff\xfe---", b"---", b"---\n---", b"-" * 10_000_000, b"---\n- a\n---\n"])
def test_a_card_that_is_none_is_no_error(base, content):
    (base / "README.md").write_bytes(content)
    assert "license" not in metadata(make_card(base, LATENT))


def test_a_link_that_leaves_the_base_is_not_read(base, tmp_path):
    (tmp_path / "elsewhere.md").write_text("---\nlicense: mit\n---\n")
    (base / "README.md").unlink(missing_ok=True)
    (base / "README.md").symlink_to(tmp_path / "elsewhere.md")
    assert card.base_licence(replace_readme_check(base)) is None


def replace_readme_check(base: Path) -> Any:
    """Opened before the link was there, as an attacker would time it."""
    (base / "README.md").rename(base.parent / "link")
    checkpoint = open_checkpoint(base)
    (base.parent / "link").rename(base / "README.md")
    return checkpoint


def test_a_licence_text_is_recognised(base):
    (base / "README.md").unlink()
    shutil.copy(Path(__file__).parents[2] / "LICENSE", base / "LICENSE")
    assert metadata(make_card(base, LATENT))["license"] == "apache-2.0"
    (base / "LICENSE").write_text("All rights reserved.")
    assert "license" not in metadata(make_card(base, LATENT))


def test_file_names_cannot_break_a_table_or_a_line(base):
    side = "a|b`c\n\n# heading <b>[x](y)\u202e.bin"
    text = make_card(base, LATENT, side=side)
    line = next(line for line in text.splitlines() if "heading" in line)
    assert line.startswith("- not carried: `a")
    assert "\n# heading" not in text
    assert "\n# of mine" not in text
    assert "\u202e" not in text


def test_tested_versions_come_from_the_matrix(tmp_path, monkeypatch):
    monkeypatch.setattr(card, "TESTED", tmp_path / "tested_versions.json")
    assert card.tested_versions("llama") == []
    card.TESTED.write_text(json.dumps({"versions": ["4.48.3", "5.23.0"], "families": {"phi3": ["5.23.0"]}}))
    assert card.tested_versions("phi3") == ["5.23.0"]
    assert card.tested_versions("llama") == []
    card.TESTED.write_text(json.dumps({"versions": ["4.48.3", "5.23.0"], "families": {}}))
    assert card.tested_versions("llama") == ["4.48.3", "5.23.0"]


def test_what_sees_images_is_loaded_with_its_processor() -> None:
    blind = make_card(BASE, None)
    seeing = make_card(BASE.parent / "llava", None)
    assert yaml.safe_load(blind.split("---")[1])["pipeline_tag"] == "text-generation"
    assert yaml.safe_load(seeing.split("---")[1])["pipeline_tag"] == "image-text-to-text"
    assert 'AutoTokenizer.from_pretrained("OWNER/NAME"' in blind
    assert 'AutoModelForImageTextToText.from_pretrained("OWNER/NAME"' in seeing
    assert 'processor = AutoProcessor.from_pretrained("OWNER/NAME"' in seeing
