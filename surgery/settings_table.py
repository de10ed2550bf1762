"""The settings of an operation as rows of text: for help, documentation and model cards."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from surgery.given import TextFile

_WORDS = {
    int: "whole number", float: "number", str: "text", bool: "true | false", type(None): "none", TextFile: "file",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting; `default` is `required` where there is none."""

    name: str
    type: str
    default: str
    description: str


def settings_table(settings: type[BaseModel]) -> tuple[Setting, ...]:
    """The settings in the order of their declaration; those of a section are named `section.setting`."""
    return tuple(_rows(settings))


def _rows(settings: type[BaseModel], prefix: str = "") -> Iterator[Setting]:
    for name, field in settings.model_fields.items():
        section = _section(field.annotation)
        kind, default = (_bounded(field), _default(field)) if section is None else ("section", _begins(field))
        yield Setting(prefix + name, kind, default, field.description or "")
        if section is not None:
            yield from _rows(section, f"{prefix}{name}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model of a field that is a section, or one or none."""
    kinds = [part for part in (get_args(annotation) or (annotation,)) if part is not type(None)]
    found = kinds[0] if len(kinds) == 1 else None
    return found if isinstance(found, type) and issubclass(found, BaseModel) else None


def _begins(field: FieldInfo) -> str:
    """What a section is where nobody writes it."""
    return "none" if field.get_default(call_default_factory=True) is None else "as below"


def _default(field: FieldInfo) -> str:
    return "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _bounded(field: FieldInfo) -> str:
    return " ".join([_type(field.annotation), *_bounds(field.metadata)])


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = [bound for item in arguments[1:] for bound in _bounds(getattr(item, "metadata", [item]))]
        return " ".join([_type(arguments[0]), *bounds])
    if origin is Literal:
        return " | ".join(_shown(value) for value in arguments)
    if origin in {Union, types.UnionType}:
        return " | ".join(_type(part) for part in arguments)
    if origin in {list, tuple, set, frozenset}:
        return f"list of ({_type(arguments[0])})"
    if origin is dict:
        return f"mapping to ({_type(arguments[1])})"
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _bounds(metadata: list[Any]) -> list[str]:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [(sign, getattr(item, name, None)) for item in metadata for name, sign in signs.items()]
    return [f"{sign} {bound}" for sign, bound in found if bound is not None]
