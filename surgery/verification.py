"""Does a written checkpoint hold what was promised: its files, and its behaviour in a process that has no surgery.

The files are checked here, without running anything. Only if they are what was written does `surgery/probe/` run, in a
fresh interpreter, offline, with an empty cache of remote code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from surgery.checkpoint.reader import Checkpoint, open_checkpoint, read_json
from surgery.checkpoint.writer import hash_file
from surgery.errors import SurgeryError, UsageError, VerificationFailure

LOCK = "surgery.lock.json"
PROBE = Path(__file__).with_name("probe")
NOT_OUTPUTS = frozenset({LOCK, ".gitattributes", ".gitignore"})
NOT_OUTPUT_FOLDERS = frozenset({".git", ".cache"})

Status = Literal["pass", "fail", "skip"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `value` was held against `limit` where something was measured."""

    name: str
    status: Status
    detail: str = ""
    value: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Verification:
    """All checks of one checkpoint, what was measured on the way, and with which versions.

    `sample` is what became of the image that was shown, where there was one (see `surgery/probe/sampled.py`).
    """

    checks: tuple[Check, ...]
    measurements: Mapping[str, float]
    versions: Mapping[str, str]
    sample: Mapping[str, Any] | None = None

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that do not hold."""
        return tuple(check for check in self.checks if check.status == "fail")

    @property
    def passed(self) -> bool:
        """Whether no check failed; one that was skipped says why in its detail."""
        return not self.failures

    def require(self) -> None:
        """Raise VerificationFailure unless every check holds."""
        if self.failures:
            first, count = self.failures[0], len(self.failures)
            raise VerificationFailure(
                f"{count} of {len(self.checks)} checks failed: {', '.join(check.name for check in self.failures)}",
                cause=f"{first.name}: {first.detail}"[:500],
                remedy="do not use this checkpoint; surgery verify OUT shows every check",
            )


@dataclass(frozen=True)
class Promises:
    """What a plan says of its output, for the probe to hold against the loaded model.

    `kv_bytes_per_token` counts floating numbers as `kv_dtype`; `inv_freq` are the rotary frequencies;
    `max_perplexity_ratio` is a bound on the perplexity over the base's; `identical` means equal logits.
    """

    kv_bytes_per_token: int | None = None
    kv_numbers_per_token: int | None = None
    kv_dtype: str | None = None
    inv_freq: tuple[float, ...] | None = None
    static_cache: bool = False
    max_perplexity_ratio: float | None = None
    identical: bool = False


@dataclass(frozen=True)
class Sample:
    """An image to show the model, what it is asked about it, and the PNG to write what its vision tower gets of it."""

    image: Path
    question: str
    view: Path


@dataclass(frozen=True)
class Trial:
    """On what and where the model is tried.

    `text` is held out and read in `windows` of `length` tokens; `transformers` is a folder that holds another version
    of it, put first on the path; `timeout` is in seconds; `checks` None asks for all; `quantized_cache` names kinds of
    cache, such as `fp8` or `hqq-4`, whose cost is measured; `sample` is for models that prune or mask.
    """

    prompts: Sequence[str] = ()
    text: Path | None = None
    windows: int = 16
    length: int = 256
    seed: int = 0
    device: str = "cpu"
    dtype: Literal["float32", "auto"] = "float32"
    checks: Sequence[str] | None = None
    transformers: Path | None = None
    timeout: float = 3600.0
    quantized_cache: Sequence[str] = ()
    sample: Sample | None = None


def verify(
    checkpoint: Path,
    *,
    against: Path | None = None,
    trust_base_code: bool = False,
    promises: Promises | None = None,
    trial: Trial | None = None,
) -> Verification:
    """Check the files of `checkpoint`, then load and run it in a fresh process, beside the base `against` if given.

    Raises UsageError where a promise needs a base or a text that is not given, and VerificationFailure where the
    fresh process dies or takes too long. Checks that fail are in the result: see `Verification.require`.
    """
    structure, opened = check_structure(checkpoint)
    promises, trial = promises or recorded_promises(checkpoint), trial or Trial()
    _check_question(against, promises, trial)
    files = (structure, check_hashes(checkpoint))
    if opened is None or any(check.status == "fail" for check in files):
        unsafe = Check("model", "skip", "nothing is run from a folder whose files are not what was written")
        return Verification((*files, unsafe), {}, {})
    job = {
        "checkpoint": str(checkpoint.resolve()),
        "against": None if against is None else str(against.resolve()),
        "trust_remote_code": opened.remote_code,
        "trust_remote_code_of_base": trust_base_code,
        "checks": None if trial.checks is None else list(trial.checks),
        "device": trial.device,
        "dtype": trial.dtype,
        "kv_bytes_per_token": promises.kv_bytes_per_token,
        "kv_numbers_per_token": promises.kv_numbers_per_token,
        "kv_dtype": promises.kv_dtype,
        "inv_freq": None if promises.inv_freq is None else list(promises.inv_freq),
        "texts": None if trial.text is None else {"heldout": str(trial.text.resolve())},
        "max_perplexity_ratio": promises.max_perplexity_ratio,
        "windows": trial.windows,
        "length": trial.length,
        "prompts": list(trial.prompts) or None,
        "quantized_cache": list(trial.quantized_cache),
        "sample": None if trial.sample is None else {name: str(value) for name, value in vars(trial.sample).items()},
        "seed": trial.seed,
        "static_cache": promises.static_cache,
        "expect_identical": promises.identical,
    }
    result = run_probe(job, transformers=trial.transformers, timeout=trial.timeout)
    checks = tuple(Check(**check) for check in result["checks"])
    versions = {name: result[name] for name in ("transformers", "torch", "python")}
    return Verification((*files, *checks), result["measurements"], versions, result["sample"])


def recorded_promises(folder: Path) -> Promises:
    """What the lock in `folder` says of the model; nothing where there is no lock that can be read."""
    if not (folder / LOCK).is_file():
        return Promises()
    try:
        promised = read_json(folder, LOCK)["promises"]
        bytes_per_token, dtype = promised["kv_bytes_per_token"], promised["kv_dtype"]
    except (SurgeryError, KeyError, TypeError):
        return Promises()  # `check_hashes` reports a lock that cannot be read
    return Promises(kv_bytes_per_token=bytes_per_token, kv_dtype=dtype, static_cache=True)


def check_structure(folder: Path) -> tuple[Check, Checkpoint | None]:
    """Whether config, index, headers and sizes agree and nothing unsafe lies there; reads no weights, runs no code."""
    try:
        opened = open_checkpoint(folder, trust_remote_code=True)
    except SurgeryError as error:
        return Check("structure", "fail", f"{error.problem}: {error.cause}"), None
    return Check("structure", "pass", f"{len(opened.tensors)} tensors in {len(opened.shards)} files"), opened


def check_hashes(folder: Path) -> Check:
    """Whether every file is there with the hash of the lock, and no file that the lock does not name."""
    if not (folder / LOCK).is_file():
        return Check("hashes", "skip", f"there is no {LOCK}")
    try:
        lock = read_json(folder, LOCK)
    except SurgeryError as error:
        return Check("hashes", "fail", f"{error.problem}: {error.cause}")
    outputs = lock.get("outputs") if isinstance(lock, dict) else None
    if not isinstance(outputs, dict) or not all(_is_entry(entry) for entry in outputs.values()):
        return Check("hashes", "fail", f"{LOCK} has no usable list of outputs")
    there = _files(folder)
    problems = [f"{name} is missing" for name in sorted(outputs.keys() - there.keys())]
    problems += [f"{name} is not in the lock" for name in sorted(there.keys() - outputs.keys())]
    for name in sorted(there.keys() & outputs.keys()):
        if not there[name].is_file() or there[name].stat().st_size != outputs[name]["bytes"]:
            problems.append(f"{name} has another size")
        elif hash_file(there[name]).sha256 != outputs[name]["sha256"]:
            problems.append(f"{name} has another hash")
    return Check("hashes", "fail" if problems else "pass", "; ".join(problems) or f"{len(outputs)} files")


def run_probe(job: Mapping[str, Any], *, transformers: Path | None, timeout: float) -> dict[str, Any]:
    """Run one job in a fresh interpreter and return its result; raises VerificationFailure where there is none."""
    return run_probes([job], transformers=transformers, timeout=timeout)[0]


def run_probes(jobs: Sequence[Mapping[str, Any]], *, transformers: Path | None, timeout: float) -> list[dict[str, Any]]:
    """Run jobs one after another in a fresh interpreter and return their results, as `run_probe`."""
    with tempfile.TemporaryDirectory(prefix="surgery-verify-") as place:
        work = Path(place)
        errors, files = work / "stderr", [(work / f"job{n}.json", work / f"result{n}.json") for n in range(len(jobs))]
        for job, (job_file, _) in zip(jobs, files, strict=True):
            job_file.write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, str(PROBE), *(str(file) for pair in files for file in pair)]
        with errors.open("wb") as stderr:
            try:
                status = subprocess.run(  # noqa: S603 - our own script, with our own interpreter
                    command,
                    env=_environment(work, transformers),
                    cwd=work,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    timeout=timeout,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired as error:
                raise VerificationFailure(
                    f"verification took longer than {timeout:g} s",
                    cause=f"it was at: {_last_line(errors)}",
                    remedy="raise the timeout, or ask for fewer checks",
                ) from error
        if status != 0 or not all(result.is_file() for _, result in files):
            raise VerificationFailure(
                f"the verification process ended with status {status}",
                cause=_last_line(errors),
                remedy="status -9 is most often too little memory; run surgery verify OUT to try again",
            )
        return [json.loads(result.read_text(encoding="utf-8")) for _, result in files]


def _check_question(against: Path | None, promises: Promises, trial: Trial) -> None:
    """A promise that cannot be looked at is a mistake of the caller, not of the checkpoint."""
    wanted = {
        "a perplexity ratio needs a base to compare with": promises.max_perplexity_ratio and against is None,
        "a perplexity ratio needs a held-out text": promises.max_perplexity_ratio and trial.text is None,
        "identical logits need a base to compare with": promises.identical and against is None,
    }
    for cause, missing in wanted.items():
        if missing:
            raise UsageError("verification cannot answer this", cause=cause, remedy="give --against BASE and a text")


def _environment(work: Path, transformers: Path | None) -> dict[str, str]:
    """The caller's variables, offline, with a cache of remote code that starts empty and goes with the folder."""
    environment = dict(os.environ) | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(work / "modules"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if transformers is not None:
        paths = [str(transformers.resolve()), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment


def _last_line(errors: Path) -> str:
    lines = [line for line in errors.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][-500:] if lines else "it wrote nothing"


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and isinstance(entry.get("bytes"), int)


def _files(folder: Path) -> dict[str, Path]:
    """Everything that lies in the folder, by its name relative to it."""
    found: dict[str, Path] = {}
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in NOT_OUTPUT_FOLDERS]
        # walk() does not enter a link to a folder: it counts as a file, and then as one that is not regular.
        entries = [*files, *(name for name in folders if (Path(place) / name).is_symlink())]
        found |= {(Path(place) / name).relative_to(folder).as_posix(): Path(place) / name for name in entries}
    return {name: path for name, path in found.items() if name not in NOT_OUTPUTS}
