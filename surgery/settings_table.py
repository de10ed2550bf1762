"""The settings of an operation as rows of text: for help, documentation and model cards."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_WORDS = {int: "whole number", float: "number", str: "text", bool: "true | false", type(None): "none"}


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting; `default` is `required` where there is none."""

    name: str
    type: str
    default: str
    description: str


def settings_table(settings: type[BaseModel]) -> tuple[Setting, ...]:
    """The settings in the order of their declaration."""
    return tuple(
        Setting(name, _bounded(field), _default(field), field.description or "")
        for name, field in settings.model_fields.items()
    )


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
