"""The operations that ship, and those that other packages add through the entry-point group `surgery.operations`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from surgery.errors import MissingPackage, UsageError
from surgery.operations.base import Operation
from surgery.suggestions import did_you_mean

ENTRY_POINTS = "surgery.operations"
# An explicit table instead of a walk over the package: a walk hides import errors.
_NAMES = (
    "kv_latent", "expert_prune", "expert_top_k", "heal", "rotate", "smooth", "codebook_kv", "visual_pruning",
    "visual_defense",
    "quantize",
)  # fmt: skip
_SHIPPED = tuple(f"surgery.operations.{name}" for name in _NAMES)


@cache
def operations() -> Mapping[str, Operation[Any]]:
    """Every operation by name. Raises MissingPackage where an installed plug-in does not import."""
    shipped = [import_module(name).OPERATION for name in _SHIPPED]
    return {operation.name: operation for operation in (*shipped, *_plugged_in({o.name for o in shipped}))}


def find_operation(name: str) -> Operation[Any]:
    """The operation called `name`. Raises UsageError with the nearest name."""
    known = operations()
    if name not in known:
        raise UsageError(
            f"there is no operation {name!r}{did_you_mean(name, known)}", cause=f"known: {', '.join(sorted(known))}",
            remedy="list them with: surgery operations",
        )  # fmt: skip
    return known[name]


def _plugged_in(taken: set[str]) -> list[Operation[Any]]:
    found: list[Operation[Any]] = []
    for point in entry_points(group=ENTRY_POINTS):
        try:
            operation = point.load()
        except Exception as error:
            raise MissingPackage(
                f"the operation plug-in {point.name!r} cannot be imported", cause=f"{type(error).__name__}: {error}",
                remedy=f"repair or uninstall the package that provides {point.value}",
            ) from error  # fmt: skip
        if not isinstance(operation, Operation) or operation.name in taken:
            raise UsageError(
                f"the operation plug-in {point.name!r} is refused", cause="it is no Operation, or its name is taken",
                remedy=f"repair or uninstall the package that provides {point.value}",
            )  # fmt: skip
        taken.add(operation.name)
        found.append(operation)
    return found
