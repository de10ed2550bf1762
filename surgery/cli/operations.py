"""`surgery operations`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import command
from surgery.cli.output import Human, Output, Table

if TYPE_CHECKING:
    from surgery.operations.base import Operation

EXAMPLES = (
    "surgery operations",
    "surgery operations kv_latent",
)


@command("operations", EXAMPLES)
@click.argument("name", required=False)
@click.pass_obj
def _command(output: Output, /, name: str | None) -> int:
    """List the operations, or describe one.

    With NAME: its settings, and the model families that it fits.
    """
    from surgery.operations import find_operation, operations

    if name is None:
        rows = [(known.name, known.title, known.source) for known in operations().values()]
        data = {"operations": [dict(zip(("name", "title", "source"), row, strict=True)) for row in rows]}
        return output.result(data, [Table(rows, ("name", "what it does", "source"))], "\n".join(row[0] for row in rows))
    return _show(output, find_operation(name))


command = _command


def _show(output: Output, operation: Operation[Any]) -> int:
    from surgery.inspection import fitting_families
    from surgery.settings_table import settings_table

    settings = [asdict(setting) for setting in settings_table(operation.settings)]
    families = dict(fitting_families(operation))
    data = {
        "name": operation.name, "title": operation.title, "source": operation.source, "settings": settings,
        "families": families,
    }  # fmt: skip
    names = "\n".join(setting["name"] for setting in settings)
    return output.result(data, _human(operation, settings, families), names)


def _human(operation: Operation[Any], settings: list[dict[str, str]], families: Mapping[str, str | None]) -> Human:
    yield f"{operation.name}: {operation.title}"
    yield f"source: {operation.source}"
    yield ""
    yield Table([tuple(setting.values()) for setting in settings], ("setting", "type", "default", "meaning"))
    yield ""
    yield f"fits: {', '.join(title for title, reason in families.items() if reason is None) or 'none by default'}"
    for title, reason in families.items():
        if reason is not None:
            yield f"does not fit {title}: {reason}"
