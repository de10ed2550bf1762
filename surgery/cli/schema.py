"""`surgery schema`."""

from __future__ import annotations

import json

import click

from surgery.cli.options import command
from surgery.cli.output import Output

EXAMPLES = ("surgery schema > manifest.schema.json",)


@command("schema", EXAMPLES)
@click.pass_obj
def _command(output: Output, /) -> int:
    """Print the JSON Schema of manifests.

    It has the settings of every operation. Editors complete and check a manifest that begins with the line
    # yaml-language-server: $schema=manifest.schema.json
    """
    from surgery.manifest import json_schema

    schema = json_schema()
    text = json.dumps(schema, indent=2, ensure_ascii=False)
    return output.result(schema, [text], text)


command = _command
