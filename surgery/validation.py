"""From pydantic's errors to one ManifestError that names the line, what stands there, and the nearest allowed word."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from surgery.document import Document, Keys
from surgery.errors import ManifestError
from surgery.operations.base import Settings
from surgery.suggestions import did_you_mean

M = TypeVar("M", bound=BaseModel)

_WORDING = {
    "^Input should be": "must be",
    "a valid (dictionary|object).*|an object": "a mapping",
    "a valid string": "text",
    "a valid (array|list|tuple)": "a list",
    "a valid integer": "a whole number",
    "a valid boolean": "true or false",
    "a valid ": "a ",
}
_OLD_BOOLEANS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


def validate(model: type[M], document: Document, keys: Keys, folder: Path) -> M:
    """The part of `document` under `keys` as a `model`; relative files start at `folder`. Raises ManifestError.

    Data passes as JSON: pydantic's strict mode then takes lists for tuples, as a file cannot write a tuple.
    """
    try:
        return model.model_validate_json(json.dumps(document.at(keys)), context={"folder": folder})
    except ValidationError as error:
        raise _explain(error, model, document, keys) from error


def _explain(error: ValidationError, model: type[BaseModel], document: Document, keys: Keys) -> ManifestError:
    """Report the first place; of the members of a union, the one that the value came nearest to."""
    found: dict[Keys, list[Mapping[str, Any]]] = {}
    for detail in error.errors(include_url=False):
        inner = _keys_in(document.at(keys), detail["loc"])
        found.setdefault((*keys, *inner), []).append(detail)
    deepest = [place for place in found if not any(other[: len(place)] == place for other in found if other != place)]
    details = found[deepest[0]]
    more = f" (and {len(deepest) - 1} more)" if len(deepest) > 1 else ""
    problem, cause = _sentences(details, model, document, deepest[0])
    remedy = "correct the line; all keys and their meaning: surgery schema"
    if issubclass(model, Settings):
        remedy = f"see its settings: surgery operations {keys[-1]}"
    return document.place(deepest[0]).error(problem + more, cause=cause, remedy=remedy)


def _sentences(
    details: list[Mapping[str, Any]], model: type[BaseModel], document: Document, place: Keys
) -> tuple[str, str]:
    # Where one of several forms is a mapping and a mapping is there, it is that form, and lacks something.
    lacking = [detail for detail in details if detail["type"] == "missing"]
    first = (lacking or details)[0]
    name = _spelled(place)
    if first["type"] in {"extra_forbidden", "missing"}:
        allowed = _fields_at(model, first["loc"])
        if first["type"] == "missing":
            return f"{first['loc'][-1]!r} is missing", f"{name} must have it; allowed here: {', '.join(allowed)}"
        word = str(place[-1])
        return f"unknown key {word!r}{did_you_mean(word, allowed)}", f"allowed here: {', '.join(allowed) or 'no key'}"
    value = document.at(place)
    details = [detail for detail in details if detail["type"] == "value_error"] or details
    wanted = " or ".join(dict.fromkeys(_wanted(detail) for detail in details)).replace(" or must be ", " or ")
    words = [word for detail in details for word in _literals(detail)]
    hint = did_you_mean(value, words) if isinstance(value, str) else ""
    if isinstance(value, str) and value.lower() in _OLD_BOOLEANS and any(d["type"].startswith("bool") for d in details):
        hint = f" (did you mean {_OLD_BOOLEANS[value.lower()]}?)"
    shown = "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)[:80]
    shown = "nothing" if value is None else shown
    return f"{name} {wanted}{hint}", f"found {shown}"


def _spelled(place: Keys) -> str:
    """Keys as users write them; an operation is called by its name, without its number."""
    shown = place[2:] if place[:1] == ("operations",) and len(place) > 2 else place
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in shown)
    return text.removeprefix(".") or "the manifest"


def _wanted(detail: Mapping[str, Any]) -> str:
    """A pydantic message as the end of our sentence."""
    message = str(detail["msg"]).removeprefix("Value error, ")
    for theirs, ours in _WORDING.items():
        message = re.sub(theirs, ours, message)
    return message


def _literals(detail: Mapping[str, Any]) -> list[str]:
    expected = detail.get("ctx", {}).get("expected", "") if detail["type"] == "literal_error" else ""
    return re.findall(r"'([^']*)'", str(expected))


def _keys_in(data: Any, location: tuple[int | str, ...]) -> Keys:
    """The part of a pydantic location that is in the data; the rest names members of unions, or a missing key."""
    keys: Keys = ()
    for part in location:
        if isinstance(data, dict) and part in data:
            data = data[str(part)]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            continue
        keys = (*keys, part)
    return keys


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys allowed where `location` ends, in the order of their declaration."""
    models = [model]
    for part in location[:-1]:
        fields = [m.model_fields[part] for m in models if isinstance(part, str) and part in m.model_fields]
        if fields:
            models = [inner for field in fields for inner in _models_in(field.annotation)]
    return list(dict.fromkeys(name for m in models for name in m.model_fields))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
