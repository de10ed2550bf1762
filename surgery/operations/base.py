"""What an operation is: a value made of typed settings and a few pure functions.

Most operations need only `refuses` and `edit`. Those that must see activations also say when (`measures`) and how
(`measure`); the statistics come back into `edit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from surgery.architectures import Model, carries_own_code
from surgery.errors import InternalError, UnsupportedModel
from surgery.progress import Report
from surgery.sizes import parse_count

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.calibration.streamed import Layers
    from surgery.checkpoint.expressions import Tensors
    from surgery.checkpoint.reader import Checkpoint
    from surgery.manifest import Data
    from surgery.planning import Draft


class Settings(BaseModel):
    """Base of every operation's settings: frozen, strict, unknown keys refused.

    Each field has a description with its unit, and the paper's symbol where it has one; help texts, the JSON Schema
    and the tables of the docs and the card are generated from them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


S = TypeVar("S", bound=Settings)

Count: TypeAlias = Annotated[
    int,
    BeforeValidator(lambda value: parse_count(value) if isinstance(value, str) else value),
    Field(ge=1),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "string", "pattern": r"^[0-9]{1,15}(\.[0-9]{1,9})? ?[KMBT]?$"},
            ]
        }
    ),
]


@dataclass(frozen=True)
class Statistics:
    """What a measurement found: tensors, plain facts, and the fingerprint of what they were measured on."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    fingerprint: str = ""


def from_training(name: str, statistics: Statistics | None, *, key: str | None = None) -> Callable[[Tensors], Tensors]:
    """The function of a rewrite that makes tensor `name` what training found for it, under `key` where that differs."""

    def function(_: Tensors) -> Tensors:
        if statistics is None:
            raise InternalError(
                f"{name!r} was not trained", cause="a plan was evaluated as if it were a result",
                remedy="report this as a defect, with the manifest",
            )  # fmt: skip
        return {name: statistics.tensors[key or name]}

    return function


@dataclass(frozen=True)
class Measuring:
    """What a measurement may use.

    `network` is the loaded transformers model in eval mode (parts of it may be offloaded by accelerate; None for what
    needs weights only), `model` its sizes and names, `tensor` reads a stored tensor by name, `windows` are the
    calibration tokens [N, T]. `progress` takes (done, of). An operation that goes layer by layer has `layers` in place
    of a whole network; `scratch` is a folder that is gone afterwards.
    """

    network: Any
    model: Model
    tensor: Callable[[str], Tensor]
    windows: Tensor
    seed: int
    progress: Callable[[int, int], None] = lambda done, of: None
    layers: Layers | None = None
    scratch: Path = Path()


@dataclass(frozen=True)
class Training:
    """What a training stage may use.

    student      the checkpoint that is trained, as the stages before wrote it; `model` is its sizes and names
    teacher      the base, which the student is to resemble
    changes      groups of parameters that the operations before declared as theirs
    data         the text to learn from, already held against the one that judges the result
    folder       where state is kept, so that a killed stage goes on; it survives the process
    fingerprint  equal for runs that may go on from each other's state
    record       where loss curves go, without a suffix: `.json` and `.png` are added
    """

    student: Checkpoint
    teacher: Checkpoint
    model: Model
    changes: frozenset[str]
    data: Data
    folder: Path
    fingerprint: str
    device: str
    record: Path
    report: Report


@dataclass(frozen=True)
class Explanation:
    """Why an operation decided as it did: a table for people, plain data, and a picture.

    `draw` writes a PNG to a path; `lines` say what the table cannot.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[str, ...]
    data: Mapping[str, Any]
    draw: Callable[[Path], None]


def all_settings(settings: Any) -> Any:
    """For operations whose measurement depends on every setting."""
    return settings.model_dump(mode="json")


def never(_settings: Any) -> bool:
    """For operations that measure nothing, or train nothing."""
    return False


def none_needed(_settings: Any) -> Mapping[str, str]:
    """For operations whose results transformers loads alone."""
    return {}


@dataclass(frozen=True)
class Operation(Generic[S]):
    """One surgery.

    name        as manifests spell it
    title       a short line for tables
    source      paper and section, or whose idea it is
    settings    the type of its settings
    refuses     a reason why the operation does not fit a model with these settings, or None
    edit        changes the draft; `statistics` is None while planning, and wherever `measures` is False
    measures    whether these settings need calibration
    measure     runs the model and returns statistics
    measured_by what of its settings a measurement depends on: where that is equal, a stored one is used again
    weights_only  whether these settings measure weights, without text and without running the model
    by_layers   whether measuring goes layer by layer, with `Measuring.layers`
    explain     tells from statistics what was decided and why
    trains      whether these settings need training
    train       trains the result of the operations before and returns the changed tensors as statistics
    usage       Markdown for the card: what callers of a result can say to it at run time
    limits      what users of a result should not expect, a sentence each, for its card
    changes     groups of parameters (see `surgery.training.groups`) that training after it should adapt
    quantizes   whether it packs weights: `output.dtype` is applied before it, and nothing comes after it
    packages    what loading a result needs beside transformers: module -> what to install
    reshapes    whether it changes names, shapes or config; if not, it also takes checkpoints that carry our code
    after       operations it may follow in one manifest; `never_with` cannot be combined at all
    """

    name: str
    title: str
    source: str
    settings: type[S]
    refuses: Callable[[Model, S], str | None]
    edit: Callable[[Draft, S, Statistics | None], None]
    measures: Callable[[S], bool] = never
    measure: Callable[[Measuring, S], Statistics] | None = None
    measured_by: Callable[[S], Any] = all_settings
    weights_only: Callable[[S], bool] = never
    by_layers: Callable[[S], bool] = never
    explain: Callable[[Model, S, Statistics | None], Explanation] | None = None
    trains: Callable[[S], bool] = never
    train: Callable[[Training, S], Statistics] | None = None
    usage: str = ""
    limits: tuple[str, ...] = ()
    changes: frozenset[str] = field(default_factory=frozenset)
    quantizes: bool = False
    packages: Callable[[S], Mapping[str, str]] = none_needed
    reshapes: bool = True
    after: frozenset[str] = field(default_factory=frozenset)
    before: frozenset[str] = field(default_factory=frozenset)
    never_with: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        if self.measure is not None and self.train is not None:  # one process measures, every process trains
            raise TypeError(f"operation {self.name!r} measures and trains; make two of it")


@dataclass(frozen=True)
class Step:
    """An operation with the settings that a manifest gave it."""

    operation: Operation[Any]
    settings: Any

    @property
    def measures(self) -> bool:
        """Whether this step needs calibration."""
        return self.operation.measures(self.settings)

    @property
    def weights_only(self) -> bool:
        """Whether measuring reads weights and needs neither text nor a running model."""
        return self.operation.weights_only(self.settings)

    @property
    def trains(self) -> bool:
        """Whether this step needs training."""
        return self.operation.trains(self.settings)

    def check(self, model: Model) -> None:
        """Raises UnsupportedModel where the operation does not fit."""
        if self.operation.reshapes and model.own_code:
            raise carries_own_code(model.config["model_type"])
        reason = self.operation.refuses(model, self.settings)
        if reason is not None:
            raise UnsupportedModel(
                f"{self.operation.name} does not fit this model", cause=reason,
                remedy=f"see: surgery operations {self.operation.name}",
            )  # fmt: skip

    def edit(self, draft: Draft, statistics: Statistics | None) -> None:
        """Apply the operation to a draft."""
        self.operation.edit(draft, self.settings, statistics)
        draft.changes.update(self.operation.changes)
