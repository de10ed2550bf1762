"""Strict YAML: plain data, and for every value the place where it was written.

Scalars follow YAML 1.2, so `no` is a word and `1e-3` a number. Refused are tags, duplicate keys, second documents,
numbers that are not finite or that two versions of YAML read differently, and anything large or deep.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from yaml.reader import ReaderError

from surgery.errors import ManifestError

MAX_BYTES = 1 << 20
MAX_VALUES = 20_000
MAX_DEPTH = 32
MAX_DIGITS = 40

Keys: TypeAlias = tuple[str | int, ...]

CONSTANTS = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value was written: `file:line` or the option, and what is written there."""

    where: str
    text: str

    def error(self, problem: str, *, cause: str, remedy: str) -> ManifestError:
        """The error that names this place."""
        reads = f"it reads: {_printable(self.text)}; " if self.text else ""
        return ManifestError(f"{_printable(self.where)}: {problem}", cause=reads + cause, remedy=remedy)


@dataclass(frozen=True)
class Document:
    """Plain data (mappings with text keys, lists, text, numbers, true, false, null) and the places of its values."""

    data: Any
    places: Mapping[Keys, Place] = field(default_factory=dict)

    def at(self, keys: Keys) -> Any:
        """The value under `keys`."""
        value = self.data
        for key in keys:
            value = value[key]
        return value

    def place(self, keys: Keys) -> Place:
        """The place of the value under `keys`, or of the nearest value around it."""
        while keys not in self.places and keys:
            keys = keys[:-1]
        return self.places[keys]

    def with_value(self, keys: Keys, value: Any, place: Place) -> Document:
        """A copy in which `value`, written at `place`, stands under `keys`; mappings on the way are made."""
        root: dict[Any, Any] = {"": copy.deepcopy(self.data)}
        inner: Any = root
        for outer, key in zip(("", *keys[:-1]), keys, strict=True):
            if not isinstance(inner[outer], dict | list):
                inner[outer] = {}
            inner = inner[outer]
            if isinstance(inner, dict):
                inner.setdefault(key, None)
        inner[keys[-1]] = value
        kept = {other: found for other, found in self.places.items() if other[: len(keys)] != keys}
        return Document(root[""], {**kept, keys: place})


def read_document(path: Path) -> Document:
    """Read a YAML file. Raises ManifestError naming file and line."""
    place = Place(str(path), "")
    try:
        if not path.is_file():
            raise FileNotFoundError("there is no such file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise place.error("cannot be read", cause=str(error), remedy="check the path of the manifest") from error
    if len(content) > MAX_BYTES:
        raise place.error("is too large", cause=f"over {MAX_BYTES} bytes", remedy="check that this is the manifest")
    return parse_document(content, str(path))


def parse_document(content: bytes, name: str) -> Document:
    """Read YAML from bytes; `name` stands for the file in messages. Raises ManifestError."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise Place(f"{name}:{line}", "").error(
            f"byte {content[error.start]:#04x} is not UTF-8", cause=error.reason, remedy="save the file as UTF-8"
        ) from error
    lines = text.splitlines() or [""]
    return _parse(text, lambda line: Place(f"{name}:{line + 1}", lines[min(line, len(lines) - 1)].strip()))


def parse_value(text: str, place: Place) -> Any:
    """Read one value written in YAML's one-line forms, as options carry them. Raises ManifestError naming `place`."""
    return _parse(text, lambda _: place).data if text.strip() else None


def document_of(data: Any, name: str) -> Document:
    """Take over data that a program made; `name` stands for it in messages. Raises ManifestError."""
    places: dict[Keys, Place] = {}
    return Document(_take(data, (), name, places), places)


class _Loader(yaml.SafeLoader):
    """PyYAML's composer with limits; nothing is ever constructed."""

    depth = 0
    count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        self.count += 1
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(None, None, f"the tag {event.tag!r} is refused", event.start_mark)
        if self.count > MAX_VALUES or self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(None, None, "there is too much in it, or nested too deeply", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _parse(text: str, place: Callable[[int], Place]) -> Document:
    node = _compose(_loader(text, place), place)
    if node is None:
        raise place(0).error(
            "it is empty",
            cause="a manifest has at least `surgery: 1` and `operations: []`",
            remedy="see: surgery schema",
        )
    reading = _Reading(place)
    return Document(reading.plain(node, ()), reading.places)


def _loader(text: str, place: Callable[[int], Place]) -> _Loader:
    try:
        return _Loader(text)
    except ReaderError as error:
        line = text.count("\n", 0, error.position)
        raise place(line).error("this is not YAML", cause=error.reason, remedy="remove the character") from error


def _compose(loader: _Loader, place: Callable[[int], Place]) -> yaml.Node | None:
    try:
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = place(mark.line if mark else 0)
        raise at.error("this is not the YAML that manifests are written in", **_yaml_reason(error)) from error
    except (ValueError, OverflowError) as error:
        # PyYAML lets Python's own errors through, for instance for the escape "\UFFFFFFFF".
        raise place(loader.line).error("this is not YAML", cause=str(error), remedy="check the characters") from error


def _yaml_reason(error: yaml.MarkedYAMLError) -> dict[str, str]:
    problem = str(error.problem)
    if "'\\t'" in problem:
        return {"cause": "a tab stands where YAML wants spaces", "remedy": "indent with spaces"}
    if "expected a single document" in f"{error.context} {problem}":
        return {"cause": "a second document begins", "remedy": "keep one manifest a file, without `---` in between"}
    return {"cause": problem, "remedy": "correct the line, or one just before it"}


@dataclass
class _Reading:
    """The walk from YAML nodes to plain data; aliases count as often as they are used."""

    place: Callable[[int], Place]
    places: dict[Keys, Place] = field(default_factory=dict)

    def plain(self, node: yaml.Node, keys: Keys) -> Any:
        place = self.place(node.start_mark.line)
        self.places.setdefault(keys, place)
        if len(keys) > MAX_DEPTH or len(self.places) > MAX_VALUES:
            raise place.error("there is too much in it", cause="nested or repeated through aliases without end",
                              remedy="write the values out")  # fmt: skip
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node.value, node.style, place)
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item, (*keys, number)) for number, item in enumerate(node.value)]
        return self._mapping(node, keys)

    def _mapping(self, node: yaml.Node, keys: Keys) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in node.value:
            place = self.place(key.start_mark.line)
            if not isinstance(key, yaml.ScalarNode):
                raise place.error(
                    "a key must be a word", cause="a list or a mapping stands there", remedy="quote the text"
                )
            name = _text(key.value, place)
            if name in found:
                first = self.places[(*keys, name)].where
                raise place.error(
                    f"the key {name!r} is there twice", cause=f"first in {first}", remedy="keep one of them"
                )
            self.places[(*keys, name)] = place
            found[name] = self.plain(value, (*keys, name))
        return found


def _scalar(text: str, style: str | None, place: Place) -> Any:
    if style is not None:
        return _text(text, place)
    if text in CONSTANTS:
        return CONSTANTS[text]
    if _NOT_FINITE.fullmatch(text):
        raise place.error(f"{text} is refused", cause="numbers must be finite", remedy="write a finite number")
    number = _NUMBER.fullmatch(text)
    if not number:
        return _text(text, place)
    if len(text) > MAX_DIGITS:
        raise place.error(
            "the number is too long", cause=f"it has {len(text)} characters", remedy="quote it if it is text"
        )
    if "." in text or number[3]:
        return _finite(float(text), place)
    if len(text.lstrip("+-")) > 1 and text.lstrip("+-").startswith("0"):
        raise place.error(f"{text} is ambiguous", cause="YAML 1.1 reads octal, YAML 1.2 decimal",
                          remedy="leave out the leading zero, or quote it if it is text")  # fmt: skip
    return int(text)


def _finite(number: float, place: Place) -> float:
    if not math.isfinite(number):
        raise place.error(f"{number} is refused", cause="numbers must be finite", remedy="write a finite number")
    return number


def _text(text: str, place: Place) -> str:
    if _UNWRITABLE.search(text):
        raise place.error("the text holds a character that no file can", cause="NUL or half of a surrogate pair",
                          remedy="remove it")  # fmt: skip
    return text


def _take(value: Any, keys: Keys, name: str, places: dict[Keys, Place]) -> Any:
    dotted = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")
    where = f"{name}, {dotted}" if dotted else name
    if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
        raise Place(where, "").error("the number is too long", cause=f"over {MAX_DIGITS} digits", remedy="check it")
    shown = repr(value)[:80] if isinstance(value, str | int | float | None) else ""
    place = places[keys] = Place(where, shown)
    if len(keys) > MAX_DEPTH or len(places) > MAX_VALUES:
        raise place.error("there is too much in it", cause="nested without end, or too large", remedy="write less")
    if isinstance(value, Mapping):
        return {_key(key, place): _take(item, (*keys, key), name, places) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_take(item, (*keys, number), name, places) for number, item in enumerate(value)]
    if isinstance(value, float):
        return _finite(value, place)
    if isinstance(value, str):
        return _text(value, place)
    if value is None or isinstance(value, int):
        return value
    raise place.error(f"a {type(value).__name__} is no manifest value", cause="only what JSON can hold is accepted",
                      remedy="convert it to text, a number, a list or a mapping")  # fmt: skip


def _key(key: Any, place: Place) -> str:
    if not isinstance(key, str):
        raise place.error(f"the key {key!r} is no text", cause=f"it is a {type(key).__name__}", remedy="use text")
    return _text(key, place)


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text[:200])
