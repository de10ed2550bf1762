"""Manifests on the command line: `-o NAME:SETTING=VALUE,…` makes one, `--set TARGET=VALUE` changes one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from surgery.document import Document, Keys, Place, parse_value
from surgery.suggestions import did_you_mean

SECTIONS = ("output", "calibration", "data", "verify")
_BRACKETS = {"[": 1, "{": 1, "]": -1, "}": -1}


def document_of_operations(options: Sequence[str]) -> Document:
    """The manifest of the operations that `-o` names, in their order. Raises ManifestError naming the option."""
    first = Place(f"-o {options[0]}", "")
    document = Document({"surgery": 1, "operations": []}, {(): first})
    entries: list[dict[str, Any]] = []
    for number, option in enumerate(options):
        place = Place(f"-o {option}", "")
        name, _, settings = option.partition(":")
        entries.append({name.strip(): dict(_setting(part, place) for part in _split(settings))})
        document = Document(document.data, {**document.places, ("operations", number): place})
    return Document({**document.data, "operations": entries}, document.places)


def override(document: Document, option: str) -> Document:
    """`document` with one value changed by `--set`. Raises ManifestError naming the option."""
    place = Place(f"--set {option}", "")
    target, value = _setting(option, place)
    parts = target.split(".")
    keys = _keys(document, parts, place)
    if not isinstance(document.data, dict):
        return document  # no manifest at all, which the check of the whole says best
    for count in range(1, len(keys)):
        inner = _look(document, keys[:count])
        if isinstance(inner, list) and not isinstance(keys[count], int):
            raise place.error(f"{keys[count - 1]!r} has no keys", cause="it is a list", remedy="set it as a whole")
    return document.with_value(keys, value, place)


def _setting(text: str, place: Place) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise place.error(f"{text!r} sets nothing", cause="a setting is NAME=VALUE", remedy="write NAME=VALUE")
    return name.strip(), parse_value(value, place)


def _split(settings: str) -> Iterator[str]:
    """The parts between commas that are outside of brackets and quotes."""
    depth, quote, part = 0, "", ""
    for char in settings:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        else:
            depth += _BRACKETS.get(char, 0)
        if char == "," and not depth and not quote:
            yield part
            part = ""
        else:
            part += char
    if settings:
        yield part


def _keys(document: Document, parts: list[str], place: Place) -> Keys:
    """Where in the document `--set` writes."""
    if parts[0] in SECTIONS or parts in (["base"], ["variants"]):
        return tuple(parts)
    if parts[0] == "variants":
        return _variant_keys(document, parts[1:], place)
    entries = _look(document, ("operations",))
    listed = entries if isinstance(entries, list) else []
    found: dict[Keys, Any] = {("operations", number): entry for number, entry in enumerate(listed)}
    return _operation_keys(found, "", parts, [*SECTIONS, "base", "variants"], place)


def _variant_keys(document: Document, parts: list[str], place: Place) -> Keys:
    """Within `variants`: the whole of one, known or new, or a setting in it. Names of variants may have dots."""
    variants = _look(document, ("variants",))
    known = [name for name in variants if isinstance(name, str)] if isinstance(variants, dict) else []
    name = ".".join(parts)
    rest: list[str] = []
    while name not in known and "." in name:
        name, _, last = name.rpartition(".")
        rest.insert(0, last)
    if name not in known and rest:
        raise place.error(
            f"no variant is called {name!r}{did_you_mean(name, known)}", cause=f"known: {', '.join(known) or 'none'}",
            remedy="name a variant of the manifest, or make one with variants.NAME={operation: {setting: value}}",
        )  # fmt: skip
    keys: Keys = ("variants", name)
    if not rest:
        return keys
    value = _look(document, keys)
    listed = {(*keys, number): entry for number, entry in enumerate(value)} if isinstance(value, list) else None
    entries: Mapping[Keys, Any] = {keys: value} if listed is None else listed
    return _operation_keys(entries, f"variants.{name}.", rest, [], place)


def _operation_keys(entries: Mapping[Keys, Any], path: str, parts: list[str], others: list[str], place: Place) -> Keys:
    """The keys of a setting of one of `entries`, which `path` leads to; `others` may be named beside them."""
    head, rest = parts[0], parts[1:]
    named = {keys: name for keys, entry in entries.items() if (name := _name(entry))}
    at = [keys for keys, name in named.items() if name == head]
    known = [*others, *dict.fromkeys(named.values())]
    if not at:
        raise place.error(
            f"nothing is called {head!r}{did_you_mean(head, known)}", cause=f"known: {', '.join(known)}",
            remedy="name a section, or an operation of the manifest",
        )  # fmt: skip
    if rest and rest[0].isdecimal():
        index, rest = int(rest[0][:9]), rest[1:]
        if index >= len(at):
            raise place.error(f"there is no {head} number {index}", cause=f"the last one is number {len(at) - 1}",
                              remedy="count from 0")  # fmt: skip
        at = [at[index]]
    if len(at) > 1:
        raise place.error(f"{head} occurs {len(at)} times", cause="the option does not say which one is meant",
                          remedy=f"write {path}{head}.0.{'.'.join(rest)} for the first one")  # fmt: skip
    if not rest:
        raise place.error(
            f"{head} alone cannot be set", cause="it is an operation", remedy=f"write {path}{head}.SETTING=VALUE"
        )
    return (*at[0], head, *rest)


def _name(entry: Any) -> str | None:
    if isinstance(entry, str):
        return entry
    return next(iter(entry)) if isinstance(entry, dict) and len(entry) == 1 else None


def _look(document: Document, keys: Keys) -> Any:
    value = document.data
    for key in keys:
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and isinstance(key, int):
            value = value[key]
        else:
            return None
    return value
