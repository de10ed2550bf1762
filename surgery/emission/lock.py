"""`surgery.lock.json`: what went in, what came out, and with which versions, so that it can be done again."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from surgery.checkpoint.journal import Finished
from surgery.checkpoint.reader import Checkpoint
from surgery.emission.checkpoint import json_bytes
from surgery.version import __version__

if TYPE_CHECKING:
    from surgery.manifest import Manifest
    from surgery.operations.base import Statistics
    from surgery.planning import Plan
    from surgery.verification import Verification

LOCK = "surgery.lock.json"
FORMAT = 1


def make_lock(
    base: Checkpoint,
    manifest: Manifest,
    plan: Plan,
    measured: Mapping[str, Statistics],
    inputs: Mapping[str, Finished],
    verification: Verification | None,
) -> dict[str, Any]:
    """The lock without its outputs. Holds no time and no path of this machine, so that equal runs give equal locks."""
    return {
        "lock": FORMAT,
        "base": {
            "source": portable_source(base),
            "revision": base.revision,
            "files": {name: {"sha256": file.sha256, "bytes": file.bytes} for name, file in sorted(inputs.items())},
        },
        "manifest": manifest.portable().to_json(),
        "promises": {
            "kv_bytes_per_token": None if plan.cache_coded else plan.cache_bytes_after,
            "kv_dtype": plan.cache_dtype,
        },
        "statistics": {name: _measurement(found) for name, found in measured.items()},
        "verification": None if verification is None else asdict(verification),
        "versions": versions(),
    }


def _measurement(found: Statistics) -> dict[str, Any]:
    """What a measurement saw; `given` where it was made elsewhere, and is needed again to do this again."""
    given = {"given": True} if found.facts.get("given") else {}
    return {**found.facts.get("provenance", {}), **given}


def lock_bytes(lock: Mapping[str, Any]) -> bytes:
    """The lock as it is written."""
    return json_bytes(lock)


def portable_source(base: Checkpoint) -> str:
    """How strangers may name the base: a Hub id or a built-in as it was given, a local folder by its last name."""
    if base.source.startswith("builtin:") or base.revision is not None:
        return base.source
    return base.folder.resolve().name


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version(), "surgery": __version__}
    for package in ("torch", "transformers", "safetensors", "tokenizers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found
