"""Planning from Python: a base by its name, and its plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from surgery.checkpoint.resolve import open_base
from surgery.manifest import Manifest
from surgery.planning import Plan, make_plan

if TYPE_CHECKING:
    from surgery.operations.base import Statistics, Step


def plan(
    base: str,
    manifest: Manifest,
    *,
    statistics: Path | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Plan:
    """Tell what converting `base` as `manifest` says would do; reads headers only, never weights.

    `statistics` is a folder of stored calibration results, or the file of one; what is there is not estimated. Raises
    the errors of `surgery.errors`.
    """
    checkpoint = open_base(
        base, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, headers_only=statistics is None,
    )  # fmt: skip
    if statistics is None:
        return make_plan(checkpoint, manifest)
    place = statistics

    def stored(step: Step) -> Statistics | None:
        from surgery.calibration.stage import stored_result

        return stored_result(checkpoint, step, manifest.calibration, place)

    return make_plan(checkpoint, manifest, stored=stored)
