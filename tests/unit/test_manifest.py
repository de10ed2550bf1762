"""Manifests: what is accepted, what every mistake is answered with, and that the canonical form is canonical."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

import surgery.manifest
from surgery.errors import ManifestError, UsageError
from surgery.manifest import Manifest, json_schema, load_manifest, manifest_from_dict
from surgery.operations.base import Operation, Settings

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HEAD = "surgery: 1\noperations: [cut]\n"


class Cut(Settings):
    """Settings in every shape that operations use."""

    width: int | list[int] | None = Field(default=None, description="how wide")
    ratio: float | None = Field(default=None, gt=0, le=1, description="how much")
    select: Literal["stride", "energy"] = Field(default="stride", description="how chosen")
    pairs: tuple[int, ...] = Field(default=(), description="which")
    exact: bool = Field(default=False, description="whether")


def nothing(*_: Any) -> None:
    """Refuses nothing and edits nothing."""


def operation(name: str, **rules: frozenset[str]) -> Operation[Cut]:
    return Operation(name, f"{name} it", "us", Cut, nothing, nothing, **rules)


OPERATIONS = {
    "cut": operation("cut"),
    "heal": operation("heal", after=frozenset({"cut"}), never_with=frozenset({"burn"})),
    "burn": operation("burn"),
}


@pytest.fixture(autouse=True)
def _operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgery.manifest, "known_operations", lambda: OPERATIONS)


def load(tmp_path: Path, text: str | bytes, *overrides: str) -> Manifest:
    path = tmp_path / "m.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_manifest(path, overrides=overrides)


def refuse(tmp_path: Path, text: str | bytes, *overrides: str) -> str:
    with pytest.raises(ManifestError) as caught:
        load(tmp_path, text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(str(tmp_path) + "/", "")


FULL = f"""\
surgery: 1
base: owner/name@{COMMIT}
operations:
  - cut
  - cut: {{width: [32, 16], ratio: 1e-1, select: energy, pairs: [1, 2], exact: true}}
  - heal:
calibration: {{text: [a.txt, /b.jsonl], field: body, samples: 3, length: 64, seed: 7}}
output: {{dtype: bfloat16, shard_size: 1.5GiB}}
verify: {{text: heldout.txt, max_perplexity_ratio: 1}}
"""


def test_reads_everything(tmp_path: Path) -> None:
    manifest = load(tmp_path, FULL)
    assert [step.operation.name for step in manifest.steps] == ["cut", "cut", "heal"]
    assert manifest.steps[0].settings == Cut()
    assert manifest.steps[1].settings == Cut(width=[32, 16], ratio=0.1, select="energy", pairs=(1, 2), exact=True)
    assert manifest.base == f"owner/name@{COMMIT}"
    assert [Path(file) for file in manifest.calibration.text] == [tmp_path / "a.txt", Path("/b.jsonl")]
    assert manifest.output.dtype == "bfloat16"
    assert manifest.output.shard_bytes == 3 << 29
    assert manifest.verify is not None
    assert manifest.verify.max_perplexity_ratio == 1.0


def test_defaults(tmp_path: Path) -> None:
    manifest = load(tmp_path, "surgery: 1\noperations: []\n")
    assert manifest == Manifest()
    assert manifest.output.shard_bytes is None
    assert manifest.calibration.text == "builtin"
    assert manifest.verify is not None
    assert load(tmp_path, HEAD + "verify: false").verify is None


def test_the_canonical_form_loads_to_an_equal_manifest_elsewhere(tmp_path: Path) -> None:
    manifest = load(tmp_path, FULL)
    (tmp_path / "elsewhere").mkdir()
    again = load(tmp_path / "elsewhere", manifest.to_yaml())
    assert again == manifest == manifest_from_dict(manifest.to_json())
    assert again.sha256() == manifest.sha256() != Manifest().sha256()
    assert again.to_yaml() == manifest.to_yaml()
    assert str(tmp_path) not in manifest.to_yaml()


def test_meaning_decides_the_hash(tmp_path: Path) -> None:
    spelled = load(tmp_path, "surgery: 1\noperations:\n- cut: {select: stride}\noutput: {dtype: keep}\n")
    assert spelled.sha256() == load(tmp_path, HEAD).sha256()


@given(name=st.text(min_size=1).filter(str.strip))
@settings(max_examples=200, deadline=None)
def test_any_file_name_survives_the_canonical_form(name: str) -> None:
    try:
        manifest = manifest_from_dict({"surgery": 1, "operations": [], "calibration": {"text": [name]}})
    except ManifestError:
        return
    with tempfile.TemporaryDirectory() as folder:
        assert load(Path(folder), manifest.to_yaml()) == manifest


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("", 1, "it is empty"),
        ("# nothing\n", 1, "it is empty"),
        ("surgery: 1\n", 1, "'operations' is missing"),
        ("operations: []\n", 1, "'surgery' is missing"),
        ("surgery: 2\noperations: []\n", 1, "surgery must be 1, the version"),
        ("surgery: '1'\noperations: []\n", 1, "surgery must be a whole number"),
        ("surgery: true\noperations: []\n", 1, "surgery must be a whole number"),
        ("[1]", 1, "the manifest must be a mapping"),
        ("surgery: 1\noperations: cut\n", 2, "operations must be a list"),
        (HEAD + "outptu: {}\n", 3, "unknown key 'outptu' (did you mean 'output'?)"),
        (HEAD + "output:\n  dtype: keep\n  shard_sise: 1GB\n", 5, "'shard_sise' (did you mean 'shard_size'?)"),
        (HEAD + "output: {dtype: bf16}\n", 3, "(did you mean 'bfloat16'?)"),
        (HEAD + "output: {shard_size: 5}\n", 3, "output.shard_size must be text"),
        (HEAD + "output: {shard_size: 5Gb}\n", 3, "such as 5GB"),
        (HEAD + "output: {shard_size: 0GB}\n", 3, "such as 5GB"),
        (HEAD + "output:\n", 3, "output must be a mapping"),
        (HEAD + "verify: no\n", 3, "(did you mean false?)"),
        (HEAD + "verify: {text: null, max_perplexity_ratio: 1.1}\n", 3, "needs a text"),
        (HEAD + "verify: {texts: a.txt}\n", 3, "unknown key 'texts' (did you mean 'text'?)"),
        (HEAD + "calibration: {samples: 0}\n", 3, "calibration.samples must be greater than or equal to 1"),
        (HEAD + "calibration: {samples: 1.5}\n", 3, "calibration.samples must be a whole number"),
        (HEAD + "calibration: {samples: '3'}\n", 3, "calibration.samples must be a whole number"),
        (HEAD + "calibration: {samples: 010}\n", 3, "010 is ambiguous"),
        (HEAD + "calibration: {samples: " + "9" * 50 + "}\n", 3, "too long"),
        (HEAD + "calibration: {text: slef}\n", 3, "(did you mean 'self'?)"),
        (HEAD + "calibration: {text: []}\n", 3, "calibration.text"),
        (HEAD + "calibration: {text: [a.txt,\n  3]}\n", 4, "calibration.text[1] must be the name of a file"),
        (HEAD + "calibration: {text: 3}\n", 3, "must be self, builtin, names of files"),
        (HEAD + "calibration: {text: {dataset: a/b}}\n", 3, "all 40 digits"),
        (HEAD + f"calibration: {{text: {{dataset: a@{COMMIT}, splt: x}}}}\n", 3, "'splt' (did you mean 'split'?)"),
        (HEAD + "base: owner/name\n", 3, "base must be OWNER/NAME@COMMIT"),
        ("surgery: 1\noperations:\n- cutt\n", 3, "no operation 'cutt' (did you mean 'cut'?)"),
        ("surgery: 1\noperations:\n- cut:\n  ratio: 0.5\n", 3, "not one operation"),
        ("surgery: 1\noperations:\n- [cut]\n", 3, "not one operation"),
        ("surgery: 1\noperations:\n- cut: 3\n", 3, "cut must be a mapping"),
        ("surgery: 1\noperations:\n- heal\n- cut:\n    ratoi: 1\n", 5, "unknown key 'ratoi' (did you mean 'ratio'?)"),
        ("surgery: 1\noperations:\n- cut: {ratio: 7}\n", 3, "cut.ratio must be less than or equal to 1"),
        ("surgery: 1\noperations:\n- cut:\n    width:\n    - 1\n    - x\n", 6, "cut.width[1] must be a whole number"),
        ("surgery: 1\noperations:\n- cut: {width: x}\n", 3, "cut.width must be a whole number or a list"),
        ("surgery: 1\noperations:\n- cut: {select: enregy}\n", 3, "(did you mean 'energy'?)"),
        ("surgery: 1\noperations:\n- cut: {exact: yes}\n", 3, "(did you mean true?)"),
        ("surgery: 1\noperations:\n- cut: {ratio: .nan}\n", 3, "numbers must be finite"),
        ("surgery: 1\noperations:\n- cut: {ratio: 1e999}\n", 3, "numbers must be finite"),
        ("surgery: 1\noperations:\n- heal\n- cut\n", 4, "cut cannot come after heal"),
        ("surgery: 1\noperations:\n- burn\n- heal\n", 4, "burn and heal are never combined"),
        ("surgery: 1\noperations:\n- heal\n- burn\n", 4, "heal and burn are never combined"),
        ("surgery: 1\nsurgery: 1\noperations: []\n", 2, "'surgery' is there twice"),
        (HEAD + "\toutput: {}\n", 3, "a tab stands where"),
        (HEAD + "---\nsurgery: 1\n", 3, "a second document begins"),
        (HEAD + "base: !!python/object/apply:os.system [ls]\n", 3, "python/object/apply:os.system' is refused"),
        (HEAD + "base: !!str x\n", 3, "is refused"),
        (HEAD + "[a]: 1\n", 3, "a key must be a word"),
        (HEAD + 'base: "\\ud800"\n', 3, "no file can"),
        (HEAD + 'base: "\\UFFFFFFFF"\n', 3, "not YAML"),
        (HEAD + "base: a: b\n", 3, "not the YAML"),
        (HEAD + "base: \x07\n", 3, "not YAML"),
        (HEAD.encode() + b"base: \xff\n", 3, "0xff is not UTF-8"),
        ("a: &a [*a]\n", 1, "there is too much in it"),
        ("[" * 2000, 1, "there is too much in it"),
        ("{a: " * 2000, 1, "there is too much in it"),
        ("a: [" + "1," * 50_000 + "]", 1, "there is too much in it"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_their_line(tmp_path: Path, text: str | bytes, line: int, says: str) -> None:
    message = refuse(tmp_path, text)
    assert message.startswith(f"m.yaml:{line}: ")
    assert says in message
    assert len(message.splitlines()) == 3


def test_shows_what_is_written_there_and_what_may_be(tmp_path: Path) -> None:
    message = refuse(tmp_path, HEAD + "output:\n  dtpye: keep  # mine\n")
    assert "it reads: dtpye: keep  # mine".replace("  ", " ") in message
    assert "allowed here: dtype, shard_size" in message
    message = refuse(tmp_path, "surgery: 1\noperations:\n- cut: {x: 1}\n")
    assert "allowed here: width, ratio, select, pairs, exact" in message
    assert message.endswith("see its settings: surgery operations cut")


def test_alias_bombs_cost_nothing(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 31))
    assert "there is too much in it" in refuse(tmp_path, bomb)


def test_aliases_are_read(tmp_path: Path) -> None:
    manifest = load(tmp_path, "surgery: 1\noperations:\n- cut: &c {width: 4}\n- cut: *c\n")
    assert [step.settings.width for step in manifest.steps] == [4, 4]


def test_large_missing_and_strange_files(tmp_path: Path) -> None:
    assert "m.yaml: is too large" in refuse(tmp_path, b"#" * (1 << 20) + b"\n")
    for path in (tmp_path / "absent.yaml", tmp_path, Path("/dev/zero")):
        with pytest.raises(ManifestError, match="cannot be read"):
            load_manifest(path)


def test_words_of_yaml_1_1_stay_words(tmp_path: Path) -> None:
    manifest = load(tmp_path, HEAD + "calibration: {text: [no, 1_000, 1:30, 2001-01-01], field: off}\n")
    assert [file.given for file in manifest.calibration.text] == ["no", "1_000", "1:30", "2001-01-01"]
    assert manifest.calibration.field == "off"


def test_terminal_codes_in_a_manifest_are_not_printed() -> None:
    with pytest.raises(ManifestError) as caught:
        manifest_from_dict({"surgery": 1, "operations": ["\x1b[31mcut"]})
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (
            {"surgery": 1, "operations": [{"cut": {"ratio": "x"}}]},
            "operations[0].cut.ratio: cut.ratio must be a number",
        ),
        ({"surgery": 1, "operations": [{"cut": {"ratio": float("nan")}}]}, "finite"),
        ({"surgery": 1, "operations": [{"cut": {"width": 10**5000}}]}, "too long"),
        ({"surgery": 1, "operations": [], "base": Path("x")}, "PosixPath is no manifest value"),
        ({1: 2}, "the key 1 is no text"),
    ],
)
def test_python_data_is_held_to_the_same(data: dict[Any, Any], says: str) -> None:
    with pytest.raises(ManifestError, match=re.escape(says)):
        manifest_from_dict(data)


def test_python_data_that_contains_itself() -> None:
    data: dict[str, Any] = {"surgery": 1}
    data["operations"] = [data]
    with pytest.raises(ManifestError, match="too much"):
        manifest_from_dict(data)


def test_operations_from_options() -> None:
    manifest = load_manifest(operations=["cut:ratio=0.75,width=[32, 16],select=energy", "cut"])
    assert manifest.steps[0].settings == Cut(ratio=0.75, width=[32, 16], select="energy")
    assert manifest.steps[1].settings == Cut()


@pytest.mark.parametrize("given", [{}, {"path": "m.yaml", "operations": ["cut"]}])
def test_one_source_of_a_manifest(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="a manifest"):
        load_manifest(**given)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("cutt", "(did you mean 'cut'?)"),
        ("cut:ratoi=1", "(did you mean 'ratio'?)"),
        ("cut:ratio", "sets nothing"),
        ("cut:width=[1", "not the YAML"),
        ("cut:ratio=7", "less than or equal to 1"),
    ],
)
def test_mistakes_in_options_name_the_option(option: str, says: str) -> None:
    with pytest.raises(ManifestError) as caught:
        load_manifest(operations=[option])
    assert caught.value.problem.startswith(f"-o {option}: ")
    assert says in str(caught.value)


def test_overrides(tmp_path: Path) -> None:
    manifest = load(
        tmp_path, "surgery: 1\noperations: [cut, heal, heal]\nverify: false\n",
        "cut.width=[1, 2]", "heal.0.ratio=0.5", "heal.1.ratio=1e-1", "output.shard_size=1GB", "verify.text=x.txt",
        f"base=owner/name@{COMMIT}", "calibration.samples=5",
    )  # fmt: skip
    assert [step.settings.ratio for step in manifest.steps] == [None, 0.5, 0.1]
    assert manifest.steps[0].settings.width == [1, 2]
    assert manifest.output.shard_bytes == 10**9
    assert manifest.verify is not None
    assert manifest.verify.text is not None
    assert manifest.calibration.samples == 5
    assert load(tmp_path, HEAD, "verify=false").verify is None
    assert load(tmp_path, "surgery: 1\noperations: [cut: {width: 3}]", "cut.width=").steps[0].settings.width is None


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("outptu.dtype=keep", "(did you mean 'output'?)"),
        ("output.dtpye=keep", "(did you mean 'dtype'?)"),
        ("output=3", "output must be a mapping"),
        ("output", "sets nothing"),
        ("heal.ratio=1", "heal occurs 2 times"),
        ("heal.2.ratio=1", "no heal number 2"),
        ("cut=1", "cannot be set"),
        ("burn.ratio=1", "nothing is called 'burn'"),
        ("calibration.text.split=x", "it is a list"),
        ("cut.ratio=[", "not the YAML"),
        ("operations=[]", "nothing is called 'operations'"),
    ],
)
def test_mistakes_in_overrides_name_the_option(tmp_path: Path, option: str, says: str) -> None:
    text = "surgery: 1\noperations: [cut, heal, heal]\ncalibration: {text: [a.txt]}\n"
    message = refuse(tmp_path, text, option)
    assert message.startswith(f"--set {option}: ")
    assert says in message


def test_overrides_leave_the_rest_where_it_was(tmp_path: Path) -> None:
    message = refuse(tmp_path, HEAD + "output: {dtype: x}\n", "output.shard_size=1GB")
    assert message.startswith("m.yaml:3: output.dtype")


def test_schema_describes_every_key() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["required"]) == {"surgery", "operations"}
    entries = schema["properties"]["operations"]["items"]["anyOf"]
    assert entries[0] == {"enum": list(OPERATIONS)}
    assert [list(entry["properties"]) for entry in entries[1:]] == [[name] for name in OPERATIONS]
    references = set(re.findall(r"#/\$defs/(\w+)", repr(schema)))
    assert references <= set(schema["$defs"])
    for definition in (schema, *schema["$defs"].values()):
        assert definition["additionalProperties"] is False
        for name, value in definition["properties"].items():
            assert value.get("description"), name


def test_ready_made_manifests_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    files = sorted(Path(__file__).parents[2].joinpath("manifests").glob("*.yaml"))
    assert files
    for file in files:
        load_manifest(file)


def _attempt(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.yaml"
        path.write_bytes(content)
        try:
            manifest = load_manifest(path)
        except ManifestError:
            return
        assert isinstance(manifest, Manifest)
        again = load(Path(folder), manifest.to_yaml())
        assert again == manifest


_YAML_BITS = st.lists(
    st.sampled_from(
        [
            *"[]{}:,-?&*!|>'\"%@`#=\n\t ~",
            *("surgery: 1\n", "operations:", " []", "- cut", "cut", "\n  ", "*a", "&a ", "!!python/x ", "ratio: 0.5"),
            *("---\n", "...\n", "%YAML 1.1\n", "%TAG ! tag:x\n", "<<: ", "0x1f", "010", "1e5", ".inf", "null"),
            *("\\x00", '"\\', "\ufeff", "\u2028"),
            *("output: {dtype: keep}\n", "verify: false\n", "calibration: {text: self}\n"),
        ]
    ),
    max_size=30,
).map("".join)


@given(content=st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes(content: bytes) -> None:
    _attempt(content)


@given(text=st.text(max_size=200) | _YAML_BITS | _YAML_BITS.map(lambda bits: HEAD + bits))
@settings(max_examples=1000, deadline=None)
def test_any_text(text: str) -> None:
    _attempt(text.encode(errors="surrogatepass"))


_PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["cut", "heal", "self"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["cut", "heal", "width", "text", "dataset", "dtype", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(
    data=st.dictionaries(
        st.sampled_from(["surgery", "operations", "base", "calibration", "output", "verify", "x"]), _PLAIN | st.just(1)
    ),
    options=st.lists(
        st.text(max_size=20) | st.sampled_from(["cut.width=1", "output.dtype=keep", "verify.text=a"]), max_size=2
    ),
)
@settings(max_examples=500, deadline=None)
def test_any_data_and_any_override(data: dict[str, Any], options: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.yaml"
        path.write_text(yaml.safe_dump(data), encoding="utf-8")
        for attempt in (lambda: manifest_from_dict(data), lambda: load_manifest(path, overrides=options)):
            try:
                manifest = attempt()
            except ManifestError:
                continue
            assert manifest_from_dict(manifest.to_json()) == manifest
