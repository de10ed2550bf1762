"""Model families as data: one YAML file each, validated by `Architecture`, looked up by `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from surgery.architectures.family import Architecture, Composite
from surgery.architectures.model import AttentionTensors, Model, Rope
from surgery.errors import UnsupportedModel
from surgery.suggestions import did_you_mean

__all__ = [
    "Architecture",
    "AttentionTensors",
    "Model",
    "Rope",
    "architectures",
    "carries_own_code",
    "find_architecture",
    "find_family",
]


@cache
def architectures() -> Mapping[str, Architecture]:
    """Every family that ships, by `model_type`."""
    folder = Path(__file__).parent
    families = (Architecture.model_validate(yaml.safe_load(file.read_text())) for file in sorted(folder.glob("*.yaml")))
    return {family.model_type: family for family in families}


@cache
def composites() -> Mapping[str, Composite]:
    """Every family with a language model of another family inside, by `model_type`."""
    folder = Path(__file__).parent / "composites"
    families = (Composite.model_validate(yaml.safe_load(file.read_text())) for file in sorted(folder.glob("*.yaml")))
    return {family.model_type: family for family in families}


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """The family of a config.json. Raises UnsupportedModel, naming the families and what was found."""
    found = config.get("model_type")
    known = architectures()
    if isinstance(found, str) and found in known:
        return known[found]
    if isinstance(found, str) and found in composites():
        return _composed(composites()[found], config)
    if isinstance(config.get("surgery"), dict):
        raise carries_own_code(found)
    raise UnsupportedModel(
        f"no architecture describes model_type {found!r}{did_you_mean(str(found), known)}",
        cause=f"families known: {', '.join(sorted({*known, *composites()}))}",
        remedy="use manifests/passthrough.yaml, or add a file to surgery/architectures/ as CONTRIBUTING.md says",
    )


def find_family(config: Mapping[str, Any]) -> Architecture:
    """As `find_architecture`, but a checkpoint that carries our code has the family it was made from."""
    ours = config.get("surgery")
    base = ours.get("base_model_type") if isinstance(ours, dict) else None
    return find_architecture({**config, "model_type": base} if isinstance(base, str) else config)


def _composed(family: Composite, config: Mapping[str, Any]) -> Architecture:
    text = config.get(family.text_config)
    if not isinstance(text, dict):
        raise UnsupportedModel(
            f"config.json of a {family.title} model has no {family.text_config}",
            cause="it says of which family the language model inside is",
            remedy="load the base with transformers 4.48.3 or newer, and save it again",
        )
    return family.around(find_architecture(text))


def carries_own_code(model_type: object) -> UnsupportedModel:
    """The refusal of a checkpoint that surgery wrote, by an operation that would change its structure."""
    return UnsupportedModel(
        "this checkpoint was made by surgery and carries its own code",
        cause=f"model_type {model_type!r} is no stock family any more, and operations work on stock families",
        remedy="list all operations in one manifest and start from the original base",
    )
