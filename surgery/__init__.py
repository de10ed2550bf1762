"""Operates on trained models: read a checkpoint, apply a manifest's operations, write a checkpoint that loads anywhere.

    import surgery

    manifest = surgery.load_manifest("kv.yaml")
    print(surgery.plan("builtin:llama", manifest).cache_bytes_after)
    surgery.convert("builtin:llama", "OUT", manifest)

Names are imported when they are first used: importing `surgery` imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from surgery.version import __version__

if TYPE_CHECKING:
    from surgery import operations
    from surgery.api import plan
    from surgery.cache_inspection import CacheReport, cache_report
    from surgery.conversion import Conversion, convert
    from surgery.defense_inspection import DefenseReport, defense_report
    from surgery.errors import SurgeryError
    from surgery.inspection import Inspection, inspect
    from surgery.manifest import Manifest, json_schema, load_manifest, manifest_from_dict
    from surgery.planning import Plan
    from surgery.pruning_inspection import PruningReport, pruning_report
    from surgery.reproduction import reproduce
    from surgery.verification import Verification, verify

__all__ = [
    "CacheReport",
    "Conversion",
    "DefenseReport",
    "Inspection",
    "Manifest",
    "Plan",
    "PruningReport",
    "SurgeryError",
    "Verification",
    "__version__",
    "cache_report",
    "convert",
    "defense_report",
    "inspect",
    "json_schema",
    "load_manifest",
    "manifest_from_dict",
    "operations",
    "plan",
    "pruning_report",
    "reproduce",
    "verify",
]

_PLACES = {
    "CacheReport": "cache_inspection",
    "Conversion": "conversion",
    "DefenseReport": "defense_inspection",
    "Inspection": "inspection",
    "Manifest": "manifest",
    "Plan": "planning",
    "PruningReport": "pruning_inspection",
    "SurgeryError": "errors",
    "Verification": "verification",
    "cache_report": "cache_inspection",
    "convert": "conversion",
    "defense_report": "defense_inspection",
    "inspect": "inspection",
    "json_schema": "manifest",
    "load_manifest": "manifest",
    "manifest_from_dict": "manifest",
    "plan": "api",
    "pruning_report": "pruning_inspection",
    "reproduce": "reproduction",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        value = getattr(import_module(f"surgery.{_PLACES[name]}"), name)
    elif name == "operations":  # the package itself: surgery.operations.operations() lists them
        value = import_module("surgery.operations")
    else:
        raise AttributeError(f"module 'surgery' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
