"""Planning from Python: a base by its name, and its plan."""

from __future__ import annotations

from surgery.checkpoint.resolve import open_base
from surgery.manifest import Manifest
from surgery.planning import Plan, make_plan


def plan(base: str, manifest: Manifest, *, trust_remote_code: bool = False, allow_pickle: bool = False) -> Plan:
    """Tell what converting `base` as `manifest` says would do; reads headers only, never weights.

    Raises the errors of `surgery.errors`.
    """
    checkpoint = open_base(base, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, headers_only=True)
    return make_plan(checkpoint, manifest)
