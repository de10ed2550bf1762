"""Variants in manifests: forms, names, mistakes with their lines, `--set`, the canonical form, the schema, the card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import surgery.manifest
from surgery.checkpoint.reader import open_checkpoint
from surgery.emission import card
from surgery.errors import ManifestError, UsageError
from surgery.manifest import VARIANT, Manifest, json_schema, load_manifest, manifest_from_dict
from surgery.operations import operations
from surgery.planning import open_draft
from tests.tiny import write_tiny
from tests.variants import PACK, SCALE

HEAD = "surgery: 1\noperations: [kv_latent]\n"


@pytest.fixture(autouse=True)
def _operations(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: operations()[name] for name in ("kv_latent", "expert_top_k", "heal")}
    monkeypatch.setattr(surgery.manifest, "known_operations", lambda: {**known, "scale": SCALE, "pack": PACK})


def load(tmp_path: Path, text: str, *overrides: str) -> Manifest:
    path = tmp_path / "m.yaml"
    path.write_text(text)
    return load_manifest(path, overrides=overrides)


def names(manifest: Manifest) -> dict[str, list[str]]:
    return {name: [step.operation.name for step in steps] for name, steps in manifest.variants.items()}


FULL = """\
surgery: 1
operations: [kv_latent]
variants:
  word: pack
  empty: {pack: }
  settings: {scale: {by: 3.0}}
  list: [scale, pack: {calibrated: true}]
  v1.5-b_2: [pack]
"""


def test_every_form_is_read(tmp_path: Path) -> None:
    manifest = load(tmp_path, FULL)
    assert names(manifest) == {
        "word": ["pack"], "empty": ["pack"], "settings": ["scale"], "list": ["scale", "pack"], "v1.5-b_2": ["pack"],
    }  # fmt: skip
    assert manifest.variants["settings"][0].settings.by == 3.0
    assert manifest.variants["list"][1].settings.calibrated
    assert [step.operation.name for step in manifest.all_steps][:2] == ["kv_latent", "pack"]


def test_the_canonical_form_has_variants(tmp_path: Path) -> None:
    manifest = load(tmp_path, FULL)
    again = load(tmp_path, manifest.to_yaml())
    assert again == manifest == manifest_from_dict(manifest.to_json())
    assert hash(again) == hash(manifest)
    assert again.sha256() == manifest.sha256() != load(tmp_path, HEAD).sha256()
    assert manifest.to_json()["variants"]["word"] == [{"pack": {"calibrated": False, "package": ""}}]
    assert manifest.portable() == manifest
    with pytest.raises(TypeError):
        manifest.variants["more"] = ()  # type: ignore[index]


@pytest.mark.parametrize("text", [HEAD, HEAD + "variants: {}\n"])
def test_without_variants_there_is_no_key(tmp_path: Path, text: str) -> None:
    manifest = load(tmp_path, text)
    assert manifest == load(tmp_path, HEAD)
    assert "variants" not in manifest.to_json()


def test_a_variant_is_a_manifest_of_its_own(tmp_path: Path) -> None:
    manifest = load(tmp_path, FULL + "output: {dtype: bfloat16}\n")
    alone = manifest.variant("list")
    assert alone == load(
        tmp_path, "surgery: 1\noperations: [kv_latent, scale, pack: {calibrated: true}]\noutput: {dtype: bfloat16}\n"
    )
    assert alone.sha256() == manifest_from_dict(alone.to_json()).sha256()
    with pytest.raises(UsageError, match="did you mean 'list'"):
        manifest.variant("lost")


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("variants:\n", 3, "variants must be a mapping"),
        ("variants: [pack]\n", 3, "variants must be a mapping"),
        ("variants:\n  .hidden: pack\n", 4, "'.hidden' cannot be the name of a variant"),
        ("variants:\n  -x: pack\n", 4, "cannot be the name of a variant"),
        ("variants:\n  a/b: pack\n", 4, "cannot be the name of a variant"),
        ("variants:\n  a.partial: pack\n", 4, "does not end in .partial or .replaced"),
        ("variants:\n  int4: pack\n  Int4: scale\n", 5, "variants int4 and Int4 differ in upper and lower case alone"),
        ("variants:\n  '': pack\n", 4, "cannot be the name of a variant"),
        (f"variants:\n  {'x' * 65}: pack\n", 4, "at most 64"),
        ("variants:\n  a: pack\n  a: pack\n", 5, "'a' is there twice"),
        ("variants:\n  a:\n", 4, "not one operation"),
        ("variants:\n  a: 3\n", 4, "not one operation"),
        ("variants:\n  a: {pack: {}, scale: {}}\n", 4, "not one operation"),
        ("variants:\n  a: []\n", 4, "variant a has no operation"),
        ("variants:\n  a:\n  - pack\n  - [scale]\n", 6, "not one operation"),
        ("variants:\n  a: pakc\n", 4, "no operation 'pakc' (did you mean 'pack'?)"),
        ("variants:\n  a:\n    pack:\n      calibratd: true\n", 6, "(did you mean 'calibrated'?)"),
        ("variants:\n  a: {pack: {calibrated: 3}}\n", 4, "variants.a.pack.calibrated must be true or false"),
        ("variants:\n  a:\n  - scale\n  - scale: {by: x}\n", 6, "variants.a[1].scale.by must be a number"),
        ("variants:\n  a:\n  - pack\n  - scale\n", 6, "scale cannot come after pack"),
        ("variants:\n  a:\n  - scale\n  - heal\n", 6, "heal cannot be in a variant"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_their_line(tmp_path: Path, text: str, line: int, says: str) -> None:
    with pytest.raises(ManifestError) as caught:
        load(tmp_path, HEAD + text)
    message = str(caught.value).replace(str(tmp_path) + "/", "")
    assert message.startswith(f"m.yaml:{line}: ")
    assert says in message
    assert len(message.splitlines()) == 3


def test_order_rules_hold_after_the_operations_before(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"m\.yaml:4: kv_latent cannot come after heal"):
        load(tmp_path, "surgery: 1\noperations: [kv_latent, heal]\nvariants:\n  a: kv_latent\n")
    with pytest.raises(ManifestError, match=r"m\.yaml:4: scale cannot come after pack"):
        load(tmp_path, "surgery: 1\noperations: [kv_latent, pack]\nvariants:\n  a: scale\n")
    load(tmp_path, "surgery: 1\noperations: [kv_latent, heal]\nvariants:\n  a: pack\n  b: scale\n")


def test_overrides(tmp_path: Path) -> None:
    manifest = load(
        tmp_path, FULL, "variants.word.pack.calibrated=true", "variants.list.pack.calibrated=false",
        "variants.v1.5-b_2.pack.package=x", "variants.list.scale.0.by=5.0", "variants.settings={pack: {package: y}}",
        "variants.new=scale", "kv_latent.qk_dim=8",
    )  # fmt: skip
    found = manifest.variants
    assert found["word"][0].settings.calibrated
    assert [found["list"][0].settings.by, found["list"][1].settings.calibrated] == [5.0, False]
    assert [found["v1.5-b_2"][0].settings.package, found["settings"][0].settings.package] == ["x", "y"]
    assert names(manifest)["new"] == ["scale"]
    assert manifest.steps[0].settings.qk_dim == 8
    assert load(tmp_path, FULL, "variants={}").variants == {}
    assert names(load(tmp_path, HEAD, "variants.int8=pack")) == {"int8": ["pack"]}
    assert names(load_manifest(operations=["kv_latent"], overrides=["variants.int8=pack"])) == {"int8": ["pack"]}


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("variants.wrod.pack.calibrated=true", "no variant is called 'wrod' (did you mean 'word'?)"),
        ("variants.word.pakc.calibrated=true", "nothing is called 'pakc' (did you mean 'pack'?)"),
        ("variants.new.pack.package=x", "no variant is called 'new'"),
        ("variants.word.pack=1", "write variants.word.pack.SETTING=VALUE"),
        ("variants.word.pack.calibratd=true", "(did you mean 'calibrated'?)"),
        ("variants.list.scale.1.by=2", "no scale number 1"),
        ("variants.word=pakc", "no operation 'pakc'"),
        ("variants=3", "variants must be a mapping"),
        ("variants.=pack", "cannot be the name of a variant"),
        ("variant.word=pack", "(did you mean 'variants'?)"),
    ],
)
def test_mistakes_in_overrides_name_the_option(tmp_path: Path, option: str, says: str) -> None:
    with pytest.raises(ManifestError) as caught:
        load(tmp_path, FULL, option)
    assert str(caught.value).startswith(f"--set {option}: ")
    assert says in str(caught.value)


def test_an_option_says_which_of_two_is_meant(tmp_path: Path) -> None:
    text = HEAD + "variants: {a: [scale, scale]}\n"
    with pytest.raises(ManifestError, match=r"write variants\.a\.scale\.0\.by for the first one"):
        load(tmp_path, text, "variants.a.scale.by=3.0")
    assert [step.settings.by for step in load(tmp_path, text, "variants.a.scale.1.by=3.0").variants["a"]] == [2.0, 3.0]


def test_the_schema_describes_variants() -> None:
    schema = json_schema()
    found = schema["properties"]["variants"]
    assert found["description"]
    assert found["propertyNames"] == {"pattern": f"^({VARIANT})$"}
    entry = schema["properties"]["operations"]["items"]
    one, listed = found["additionalProperties"]["anyOf"][:-1], found["additionalProperties"]["anyOf"][-1]
    assert one == entry["anyOf"]
    assert listed == {"type": "array", "items": entry, "minItems": 1}


def test_a_card_tells_the_hub_what_is_quantized(tmp_path: Path) -> None:
    base = open_checkpoint(write_tiny(tmp_path / "base", "llama"), source="OWNER/NAME", revision="a" * 40)

    def front(*entries: Any) -> dict[str, Any]:
        steps = manifest_from_dict({"surgery": 1, "operations": list(entries)}).steps
        return yaml.safe_load(card.front_matter(base, steps, None, images=False).strip("-"))

    assert front("scale")["base_model_relation"] == "finetune"
    assert front("scale", "pack")["base_model_relation"] == "quantized"


def test_a_card_of_packed_weights_claims_no_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_checkpoint(write_tiny(tmp_path / "base", "llama"))
    monkeypatch.setattr(card, "TESTED", tmp_path / "tested_versions.json")
    card.TESTED.write_text(json.dumps({"versions": ["4.48.3"], "families": {}}))
    plain, packed = (manifest_from_dict({"surgery": 1, "operations": [name]}).steps for name in ("scale", "pack"))
    assert "4.48.3" in card.checked(base, plain, None)
    assert "4.48.3" not in card.checked(base, packed, None)
    assert "quantization_config" in card.limits(open_draft(base), packed, custom=False)
    assert "quantization_config" not in card.limits(open_draft(base), plain, custom=False)
