"""Arbitrary and mutated input: a value or a refusal, never another exception, and never for long."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from surgery.checkpoint.dtypes import BITS
from surgery.checkpoint.header import Header, parse_header, parse_json, read_header
from surgery.checkpoint.journal import Finished, Journal, read_journal
from surgery.checkpoint.reader import Checkpoint, open_checkpoint
from surgery.errors import CorruptCheckpoint, RefusedInput, SourceUnavailable, SurgeryError
from tests.hostile_cases import INDEX, SINGLE, raw_file, sharded, sound, weights

GOOD = weights()
HEADER = GOOD[8 : 8 + int.from_bytes(GOOD[:8], "little")]
bounded = settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.too_slow])

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)
numbers = st.integers(-5, 70) | st.integers() | st.booleans() | st.floats() | st.none()
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "F31"]) | json_values,
        "shape": st.lists(numbers, max_size=4) | json_values,
        "data_offsets": st.lists(numbers, min_size=2, max_size=2) | json_values,
    },
    optional={"extra": json_values},
)
headers = st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]) | st.text(), entries | json_values, max_size=4)


def _mutate(content: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """Replace, insert and delete: each edit puts bytes in place of `count` bytes at a position."""
    for position, count, new in edits:
        at = position % (len(content) + 1)
        content = content[:at] + new + content[at + count :]
    return content


edits = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 12), st.binary(max_size=12)), min_size=1, max_size=6)


def _parse(raw: bytes, size: int) -> Header | None:
    try:
        header = parse_header(raw, "x.safetensors", size)
    except CorruptCheckpoint as error:
        assert error.cause.isprintable()  # noqa: PT017
        return None
    position = 8 + len(raw)
    for tensor in header.tensors:
        assert tensor.offset == position
        assert tensor.nbytes >= 0
        position += tensor.nbytes
    assert position == size
    return header


@bounded
@given(st.binary(max_size=400), st.integers(0, 1 << 70))
@example(b"", 8)
@example(b"{}", 10)
def test_header_of_any_bytes(raw: bytes, size: int) -> None:
    _parse(raw, size)


@bounded
@given(headers, st.integers(0, 100))
def test_header_of_any_json(header: object, data: int) -> None:
    raw = json.dumps(header).encode("utf-8", "surrogatepass")
    _parse(raw, 8 + len(raw) + data)


@bounded
@given(edits)
def test_mutated_header(changes: list[tuple[int, int, bytes]]) -> None:
    raw = _mutate(HEADER, changes)
    _parse(raw, 8 + len(raw) + 48)


@bounded
@given(st.lists(st.tuples(st.sampled_from([*BITS]), st.lists(st.integers(0, 9), max_size=3)), min_size=1, max_size=6))
def test_every_sound_header_is_read(tensors: list[tuple[str, list[int]]]) -> None:
    header, position = {}, 0
    for number, (dtype, shape) in enumerate(tensors):
        elements = 8  # keeps types under a byte whole
        for size in shape:
            elements *= size
        length = elements * BITS[dtype] // 8
        header[f"t{number}"] = {"dtype": dtype, "shape": [8, *shape], "data_offsets": [position, position + length]}
        position += length
    raw = json.dumps(header).encode()
    parsed = _parse(raw, 8 + len(raw) + position)
    assert parsed is not None
    assert {tensor.name for tensor in parsed.tensors} == set(header)


@bounded
@given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass")))
def test_json_of_any_bytes(raw: bytes) -> None:
    for constants in (False, True):
        try:
            parse_json(raw, "x.json", constants=constants)
        except CorruptCheckpoint as error:
            assert error.cause  # noqa: PT017 - most inputs are fine, none may raise anything else


def _open(folder: Path) -> Checkpoint | None:
    try:
        return open_checkpoint(folder)
    except (RefusedInput, SourceUnavailable) as error:
        assert error.cause.isprintable()  # noqa: PT017
        return None


@bounded
@given(edits, st.sampled_from(["config.json", SINGLE]))
def test_mutated_files(changes: list[tuple[int, int, bytes]], name: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = sound(Path(place))
        (folder / name).write_bytes(_mutate((folder / name).read_bytes(), changes))
        _open(folder)


@bounded
@given(
    json_values
    | st.fixed_dictionaries(
        {
            "weight_map": json_values
            | st.dictionaries(
                st.sampled_from(["a.weight", "b.weight", "c"]),
                st.sampled_from(["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
                | st.text(max_size=30),
            )
        }
    )
)
def test_any_index(index: object) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = sharded(Path(place))
        (folder / INDEX).write_bytes(json.dumps(index).encode("utf-8", "surrogatepass"))
        found = _open(folder)
        assert found is None or set(found.tensors) <= {"a.weight", "b.weight"}


@bounded
@given(edits)
def test_mutated_index(changes: list[tuple[int, int, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = sharded(Path(place))
        (folder / INDEX).write_bytes(_mutate((folder / INDEX).read_bytes(), changes))
        _open(folder)


@bounded
@given(st.binary(max_size=300), st.none() | st.integers(0, (1 << 64) - 1))
def test_any_file(data: bytes, length: int | None) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "x.safetensors"
        path.write_bytes(data if length is None else raw_file(data, length=length))
        try:
            read_header(path)
        except SurgeryError as error:
            assert type(error) is CorruptCheckpoint  # noqa: PT017


@bounded
@given(
    st.binary(max_size=300)
    | st.lists(json_values, max_size=5).map(
        lambda lines: (
            b'{"surgery": 1, "fingerprint": "f"}\n' + b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        )
    )
)
def test_any_journal(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "journal.jsonl").write_bytes(content)
        found = read_journal(Path(place))
        assert found is None or isinstance(found[1], Journal)
        assert found is None or all(isinstance(entry, Finished) for entry in found[1].finished.values())
