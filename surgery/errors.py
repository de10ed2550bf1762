"""Every error that surgery raises on purpose.

    SurgeryError                    exit
    ├── UsageError                     2   the command or the manifest is wrong
    │   ├── ManifestError                  a manifest line is wrong
    │   └── OutputExists                   OUT is there already
    ├── RefusedInput                   3   the checkpoint cannot be operated on
    │   ├── UnsafeCheckpoint               pickle, remote code, a path that leaves the folder
    │   ├── CorruptCheckpoint              headers, index, sizes or values contradict each other
    │   └── UnsupportedModel               no such family, or the operation does not fit the model
    ├── EnvironmentFailure             4   this machine cannot do it
    │   ├── DiskFull
    │   ├── MissingPackage
    │   └── SourceUnavailable              the Hub or a file cannot be reached
    ├── VerificationFailure            5   the output is there but does not hold what was promised
    │   └── TrainingDiverged               training left what it should approach; nothing is put in place
    └── InternalError                 70   a defect of surgery

Each carries three single lines: what happened, why, and what to do next.
"""

from __future__ import annotations


class SurgeryError(Exception):
    """Base of the tree: `problem`, `cause` and `remedy` are one line each, `exit_code` is the process status."""

    exit_code = 70

    def __init__(self, problem: str, *, cause: str, remedy: str) -> None:
        super().__init__(problem)
        self.problem, self.cause, self.remedy = (_one_line(text) for text in (problem, cause, remedy))

    def __str__(self) -> str:
        return f"{self.problem}\n  why:  {self.cause}\n  next: {self.remedy}"


class UsageError(SurgeryError):
    """The command line or the manifest asks for something that cannot be asked."""

    exit_code = 2


class ManifestError(UsageError):
    """A manifest that does not parse or does not validate; names file and line."""


class OutputExists(UsageError):
    """OUT exists and may not be replaced."""


class RefusedInput(SurgeryError):
    """The input is not something surgery will operate on."""

    exit_code = 3


class UnsafeCheckpoint(RefusedInput):
    """Reading the input would run code or leave its folder."""


class CorruptCheckpoint(RefusedInput):
    """The parts of the input contradict each other."""


class UnsupportedModel(RefusedInput):
    """The model's family or a property of it is outside what the operation can do exactly."""


class EnvironmentFailure(SurgeryError):
    """The machine lacks something."""

    exit_code = 4


class DiskFull(EnvironmentFailure):
    """Not enough free space where the output goes."""


class MissingPackage(EnvironmentFailure):
    """An optional dependency is needed for what was asked."""


class SourceUnavailable(EnvironmentFailure):
    """The base or a text cannot be fetched or read."""


class VerificationFailure(SurgeryError):
    """The written checkpoint does not behave as the plan promised."""

    exit_code = 5


class TrainingDiverged(VerificationFailure):
    """A loss that is not finite, or grows instead of falling."""


class InternalError(SurgeryError):
    """A defect of surgery itself."""

    exit_code = 70


def _one_line(text: str) -> str:
    return " ".join(str(text).split())
