"""The manifest: what to operate, on what data, how to store the result and what it must hold.

A manifest is a value. It comes from a YAML file, from options or from plain data, always through the same strict
check, and its canonical form (`to_json`, `to_yaml`) loads again to an equal one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeAlias, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.json_schema import models_json_schema

from surgery.document import CONSTANTS, Document, Keys, document_of, read_document
from surgery.errors import UsageError
from surgery.given import GivenFile
from surgery.operations import operations as known_operations
from surgery.operations.base import Count, Operation, Step
from surgery.overrides import document_of_operations, override
from surgery.sizes import parse_size
from surgery.suggestions import did_you_mean
from surgery.validation import validate

FORMAT = 1
SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"
COMMIT = "[0-9a-f]{40}"
# OUT.partial and OUT.replaced are folders that surgery makes on the way.
VARIANT = r"(?!.*\.(partial|replaced)$)[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}"
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./@-]*")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _shape(pattern: str, message: str) -> tuple[AfterValidator, WithJsonSchema]:
    """For text of one form: the check with a message for people, and the same for schemas."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(message)
        return value

    return AfterValidator(check), WithJsonSchema({"type": "string", "pattern": f"^({pattern})$"})


def _known_version(value: int) -> int:
    if value != FORMAT:
        raise ValueError(f"must be {FORMAT}, the version that this release reads")
    return value


# A plain int, because a literal 1 would take `true` as well.
Version: TypeAlias = Annotated[int, AfterValidator(_known_version), WithJsonSchema({"const": FORMAT})]
Pinned: TypeAlias = Annotated[
    str, *_shape(rf"[^@\s]+@{COMMIT}", "must be name@commit, with all 40 digits of the commit")
]
Base: TypeAlias = Annotated[
    str,
    *_shape(
        rf"([\w.-]+/)?[\w.-]+@{COMMIT}(:[\w./-]+)?|builtin:[\w-]+",
        "must be OWNER/NAME@COMMIT with all 40 digits of the commit, or builtin:NAME",
    ),
]


class Dataset(_Section):
    """A data set of the Hub, pinned."""

    dataset: Pinned = Field(description="name@commit, with the 40 digits of the commit")
    split: str = Field(default="train", description="which split is read")


TextWord: TypeAlias = Literal["self", "builtin", "builtin:code", "builtin:records", "builtin:mixed"]
_WORDS: tuple[str, ...] = get_args(TextWord)
_FILE_SCHEMA = {"type": "string", "minLength": 1}


def _text_kind(value: Any) -> str | None:
    if value in _WORDS:
        return "(word)"
    if isinstance(value, str | list | tuple):
        return "(files)"
    return "(dataset)" if isinstance(value, dict | Dataset) else None


def _files(value: Any) -> Any:
    if not isinstance(value, str):
        return tuple(value)
    # A lone word is rather a misspelt `self` than a file without a suffix.
    near = did_you_mean(value, _WORDS)
    if near:
        raise ValueError(f"must be self, builtin or names of files{near}")
    return (value,)


Text: TypeAlias = Annotated[
    Annotated[TextWord, Tag("(word)")]
    | Annotated[tuple[GivenFile, ...], Field(min_length=1), BeforeValidator(_files), Tag("(files)")]
    | Annotated[Dataset, Tag("(dataset)")],
    Discriminator(
        _text_kind,
        custom_error_type="text",
        custom_error_message="must be self, builtin, names of files, or {dataset: name@commit}",
    ),
    WithJsonSchema(
        {
            "anyOf": [
                _FILE_SCHEMA,
                {"type": "array", "items": _FILE_SCHEMA, "minItems": 1},
                Dataset.model_json_schema(),
            ]
        }
    ),
]


class Calibration(_Section):
    """The data that measuring operations see."""

    text: Text = Field(
        default="builtin",
        description="files of text or jsonl, relative to the manifest; `self` (the base writes it); `builtin` (text "
        "that every Python carries: documentation, or `builtin:code`, `builtin:records`, `builtin:mixed`); or "
        "{dataset: name@commit, split: train}",
    )
    field: str = Field(default="text", min_length=1, description="the key that holds the text, in jsonl and data sets")
    samples: int = Field(default=128, ge=1, le=1_000_000, description="windows of text")
    length: int = Field(default=512, ge=2, le=1_000_000, description="tokens in a window")
    seed: int = Field(default=0, ge=0, lt=2**63, description="which windows are taken, and what `self` writes")


class Data(_Section):
    """The text that training stages learn from."""

    text: Text = Field(
        default="builtin", description="as in calibration.text; `self` is written by the base, the teacher"
    )
    field: str = Field(
        default="text", min_length=1, description="the key that holds the text, or a list of chat messages"
    )
    length: int = Field(default=2048, ge=2, le=1_000_000, description="tokens in a window; texts are packed into them")
    tokens: Count | None = Field(
        default=None, description="tokens of text used at most, over and over (default: as many as are trained on)"
    )
    eos: bool = Field(default=True, description="end every text by the tokenizer's eos, as most models were trained")
    heldout: float = Field(default=0.02, gt=0, le=0.5, description="share of the text that measures and never trains")
    seed: int = Field(default=0, ge=0, lt=2**63, description="which documents are held out, and what `self` writes")


class Output(_Section):
    """How the result is stored."""

    dtype: Literal["keep", "float32", "bfloat16", "float16"] = Field(
        default="keep", description="type of all floating tensors; `keep` leaves each as it is"
    )
    shard_size: str = Field(
        default="keep", description="largest file, such as 5GB or 500MiB; `keep` divides the tensors as the base does"
    )

    @field_validator("shard_size")
    @classmethod
    def _known_size(cls, value: str) -> str:
        if value != "keep":
            parse_size(value)
        return value

    @property
    def shard_bytes(self) -> int | None:
        """The largest file in bytes; None for `keep`."""
        return None if self.shard_size == "keep" else parse_size(self.shard_size)


def tuple_of_list(value: Any) -> Any:
    """A list of a document as the tuple that a frozen section holds."""
    return tuple(value) if isinstance(value, list) else value


QuantizedCache: TypeAlias = Literal["fp8", "hqq-8", "hqq-4", "hqq-2", "quanto-4", "quanto-2"]


class Verify(_Section):
    """What the result must hold beside what every operation promises."""

    text: Text | None = Field(
        default="builtin", description="held-out text for perplexity, as in calibration.text; null measures none"
    )
    max_perplexity_ratio: float | None = Field(
        default=None, gt=0, lt=1e6, description="the result's perplexity over the base's may be at most this"
    )
    quantized_cache: Annotated[tuple[QuantizedCache, ...], BeforeValidator(tuple_of_list)] = Field(
        default=(),
        description="kinds of transformers' quantized KV cache whose cost is measured; a card recommends one only "
        "where it costs at most 0.01 nats per token",
    )

    @model_validator(mode="after")
    def _measurable(self) -> Verify:
        if self.max_perplexity_ratio is not None and self.text is None:
            raise ValueError("max_perplexity_ratio needs a text to measure it on")
        return self


class _Format(_Section):
    """A manifest of surgery: operations on a trained model, in order."""

    surgery: Version = Field(description="version of this format")
    base: Base | None = Field(
        default=None,
        description="OWNER/NAME@COMMIT with 40 digits, or builtin:NAME; the command line may name another",
    )
    operations: list[Any] = Field(description="what is done, in order; an empty list copies the base")
    calibration: Calibration = Field(default=Calibration(), description="the data that measuring operations see")
    data: Data = Field(default=Data(), description="the text that training stages learn from")
    output: Output = Field(default=Output(), description="how the result is stored")
    verify: Verify | bool = Field(default=True, description="what the result must hold; false verifies nothing")
    variants: dict[str, Any] = Field(
        default={}, description="further results, each by more operations after the others: NAME is written to OUT-NAME"
    )


@dataclass(frozen=True)
class Manifest:
    """A manifest that was checked. `verify` is None where nothing is to be verified.

    `variants` are the operations, after `steps`, of each further result.
    """

    steps: tuple[Step, ...] = ()
    base: str | None = None
    calibration: Calibration = field(default_factory=Calibration)
    data: Data = field(default_factory=Data)
    output: Output = field(default_factory=Output)
    verify: Verify | None = field(default_factory=Verify)
    variants: Mapping[str, tuple[Step, ...]] = field(default_factory=lambda: MappingProxyType({}), hash=False)

    @property
    def all_steps(self) -> tuple[Step, ...]:
        """The steps of the result, and those of every variant."""
        return (*self.steps, *(step for steps in self.variants.values() for step in steps))

    def variant(self, name: str) -> Manifest:
        """The manifest that makes one variant alone. Raises UsageError where there is no such variant."""
        if name not in self.variants:
            raise UsageError(
                f"there is no variant {name!r}{did_you_mean(name, self.variants)}",
                cause=f"known: {', '.join(self.variants) or 'none'}", remedy="name one of the manifest",
            )  # fmt: skip
        return replace(self, steps=(*self.steps, *self.variants[name]), variants=MappingProxyType({}))

    def to_json(self) -> dict[str, Any]:
        """The canonical form as plain data: every setting written out, files as the manifest gave them.

        Without `data` where nothing trains on it, and without `variants` where there are none.
        """
        variants = {name: _steps_json(steps) for name, steps in self.variants.items()}
        sections = {
            "operations": _steps_json(self.steps),
            "calibration": self.calibration.model_dump(mode="json"),
            **({"data": self.data.model_dump(mode="json")} if any(step.trains for step in self.steps) else {}),
            "output": self.output.model_dump(mode="json"),
            "verify": self.verify.model_dump(mode="json") if self.verify else False,
            **({"variants": variants} if variants else {}),
        }
        return {"surgery": FORMAT, **({"base": self.base} if self.base else {}), **sections}

    def to_yaml(self) -> str:
        """The canonical form as a manifest file."""
        return yaml.dump(self.to_json(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)

    def portable(self) -> Manifest:
        """The manifest with files that were named by absolute paths named by their last parts, fit for strangers."""

        def named(section: Any) -> Any:
            if not section or not isinstance(section.text, tuple):
                return section
            names = (file.path.name if Path(file.given).is_absolute() else file.given for file in section.text)
            files = (replace(file, given=name) for file, name in zip(section.text, names, strict=True))
            return section.model_copy(update={"text": tuple(files)})

        return replace(self, calibration=named(self.calibration), data=named(self.data), verify=named(self.verify))

    def sha256(self) -> str:
        """A hash of the canonical form, equal for manifests that mean the same."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def _steps_json(steps: Sequence[Step]) -> list[dict[str, Any]]:
    return [{step.operation.name: step.settings.model_dump(mode="json")} for step in steps]


def load_manifest(
    path: Path | str | None = None, *, operations: Sequence[str] = (), overrides: Sequence[str] = ()
) -> Manifest:
    """Load a manifest from the file `path`, or make one of `operations`, and apply `overrides`.

    operations  as the option -o has them: `kv_latent` or `kv_latent:kv_ratio=0.75,qk_dim=32`
    overrides   as the option --set has them: `output.shard_size=1GB`, `kv_latent.qk_dim=32`, `kv_latent.0.qk_dim=32`

    Relative files start at the folder of `path`, or at the current folder. Raises ManifestError.
    """
    if (path is None) == (not operations):
        raise UsageError(
            "there are both a manifest and operations" if operations else "there is neither manifest nor operation",
            cause="a conversion follows one manifest, or operations on the command line",
            remedy="name one with -m FILE, or operations with -o NAME:SETTING=VALUE; change a manifest with --set",
        )  # fmt: skip
    document = document_of_operations(operations) if path is None else read_document(Path(path))
    for text in overrides:
        document = override(document, text)
    return _manifest(document, Path() if path is None else Path(path).parent)


def manifest_from_dict(data: Mapping[str, Any], *, folder: Path | str = "", name: str = "manifest") -> Manifest:
    """Make a manifest of plain data in the form of the file.

    Relative files start at `folder`; `name` stands for the data in messages. Raises ManifestError.
    """
    return _manifest(document_of(data, name), Path(folder))


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of manifests, with the settings of every operation."""
    known = known_operations()
    models = [(_Format, "validation"), *((operation.settings, "validation") for operation in known.values())]
    references, definitions = models_json_schema(models, ref_template="#/$defs/{model}")  # type: ignore[arg-type]
    entries = [
        {
            "type": "object", "description": operation.title, "required": [name], "additionalProperties": False,
            "properties": {name: {"anyOf": [references[operation.settings, "validation"], {"type": "null"}]}},
        }
        for name, operation in known.items()
    ]  # fmt: skip
    definitions = definitions["$defs"]
    schema = definitions.pop(_Format.__name__)
    entry = {"anyOf": [{"enum": list(known)}, *entries]}
    schema["properties"]["operations"]["items"] = entry
    schema["properties"]["variants"] |= {
        "propertyNames": {"pattern": f"^({VARIANT})$"},
        "additionalProperties": {"anyOf": [*entry["anyOf"], {"type": "array", "items": entry, "minItems": 1}]},
    }
    return {"$schema": SCHEMA_DIALECT, **schema, "title": "surgery manifest", "$defs": definitions}


def _manifest(document: Document, folder: Path) -> Manifest:
    form = validate(_Format, document, (), folder)
    steps = _steps(document, [("operations", number) for number in range(len(form.operations))], folder)
    _check_order(document, steps)
    variants = {name: _variant(document, steps, name, folder) for name in form.variants}
    _check_names(document, [*variants])
    verify = form.verify if isinstance(form.verify, Verify) else Verify() if form.verify else None
    return Manifest(
        tuple(steps.values()), form.base, form.calibration, form.data, form.output, verify, MappingProxyType(variants)
    )  # fmt: skip


def _steps(document: Document, entries: Sequence[Keys], folder: Path) -> dict[Keys, Step]:
    """The steps by the places of their entries."""
    return {keys: _step(document, keys, folder) for keys in entries}


def _variant(document: Document, shared: Mapping[Keys, Step], name: str, folder: Path) -> tuple[Step, ...]:
    """The steps of one variant, checked to fit after the shared ones."""
    keys: Keys = ("variants", name)
    place, value = document.place(keys), document.at(keys)
    if not re.fullmatch(VARIANT, name):
        raise place.error(
            f"{name[:80]!r} cannot be the name of a variant",
            cause="a name has letters, digits, dots, dashes and underscores, no dot or dash first, at most 64 in all, "
            "and does not end in .partial or .replaced",
            remedy="give it another name, such as int4: it is written to OUT-int4",
        )  # fmt: skip
    if value == []:
        raise place.error(
            f"variant {name} has no operation", cause="without one it is the result itself",
            remedy="name an operation, or leave the variant out",
        )  # fmt: skip
    entries = [(*keys, number) for number in range(len(value))] if isinstance(value, list) else [keys]
    steps = _steps(document, entries, folder)
    for at, step in steps.items():
        if step.trains:
            raise document.place(at).error(
                f"{step.operation.name} cannot be in a variant", cause="it trains, and one training serves all results",
                remedy="put it in operations, or make another manifest",
            )  # fmt: skip
    _check_order(document, {**shared, **steps})
    return tuple(steps.values())


def _step(document: Document, keys: Keys, folder: Path) -> Step:
    entry = document.at(keys)
    if isinstance(entry, str):
        document = document.with_value(keys, {entry: {}}, document.place(keys))
        entry = document.at(keys)
    if not isinstance(entry, dict) or len(entry) != 1:
        raise document.place(keys).error(
            "this is not one operation", cause="an entry is `- name`, or `- name: {setting: value}`",
            remedy="begin each operation with a dash, and indent its settings below its name",
        )  # fmt: skip
    (name,) = entry
    operation = _operation(document, (*keys, name), name)
    if entry[name] is None:
        document = document.with_value((*keys, name), {}, document.place((*keys, name)))
    return Step(operation, validate(operation.settings, document, (*keys, name), folder))


def _operation(document: Document, keys: Keys, name: str) -> Operation[Any]:
    known = known_operations()
    if name not in known:
        raise document.place(keys).error(
            f"there is no operation {name!r}{did_you_mean(name, known)}",
            cause=f"known: {', '.join(sorted(known)) or 'none'}", remedy="list them with: surgery operations",
        )  # fmt: skip
    return known[name]


def _check_names(document: Document, names: Sequence[str]) -> None:
    """Refuse variants that are one folder to some file systems."""
    for number, name in enumerate(names):
        twin = next((other for other in names[:number] if other.lower() == name.lower()), None)
        if twin is not None:
            raise document.place(("variants", name)).error(
                f"variants {twin} and {name} differ in upper and lower case alone",
                cause="some file systems take OUT-NAME of both for one folder", remedy="give one of them another name",
            )  # fmt: skip


def _check_order(document: Document, steps: Mapping[Keys, Step]) -> None:
    """Hold every pair against what either side declares. A pair that nobody speaks of is free."""
    for later, (keys, second) in enumerate(steps.items()):
        for first in list(steps.values())[:later]:
            reason = _clash(first.operation, second.operation)
            if reason:
                raise document.place(keys).error(
                    f"{second.operation.name} cannot come after {first.operation.name}",
                    cause=reason[0],
                    remedy=reason[1],
                )


def _clash(first: Operation[Any], second: Operation[Any]) -> tuple[str, str] | None:
    a, b = first.name, second.name
    if b in first.never_with or a in second.never_with:
        return f"{a} and {b} are never combined", f"keep one of {a} and {b}"
    if first.quantizes:
        return f"{a} packs the weights, and nothing can change them afterwards", f"put {a} last"
    turned = a in second.before or b in first.after
    if turned and not (b in first.before or a in second.after):
        return f"{b} works on what it finds before {a}", f"put {b} before {a}"
    return None


class _Dumper(yaml.SafeDumper):
    """Quotes what would not read back as the same text, by our rules as well as by PyYAML's."""


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = _PLAIN.fullmatch(text) and text not in CONSTANTS
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _write_text)
