"""`surgery inspect`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from surgery.cli.options import base_options, command
from surgery.cli.output import Human, Output, Table
from surgery.sizes import human_count, human_size

if TYPE_CHECKING:
    from surgery.inspection import Inspection, Structure

EXAMPLES = (
    "surgery inspect builtin:llama",
    "surgery inspect path/to/checkpoint --json",
)


@command("inspect", EXAMPLES)
@click.argument("base")
@base_options
@click.pass_obj
def _command(output: Output, /, base: str, *, trust_remote_code: bool, allow_pickle: bool) -> int:
    """Show what BASE is, and which operations fit it.

    BASE is a checkpoint folder, id@revision of the Hub, or builtin:NAME. No weight is read.
    """
    from surgery.inspection import inspect

    found = inspect(base, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    fitting = "\n".join(name for name, reason in found.operations.items() if reason is None)
    return output.result(found.to_json(), _human(found), fitting)


command = _command


def _human(found: Inspection) -> Human:
    kinds = ", ".join(f"{kind} {human_count(count)}" for kind, count in found.dtypes.items())
    rows = [
        (
            "base",
            found.source + (f" @ {found.revision}" if found.revision and found.revision not in found.source else ""),
        ),
        ("family", f"{found.family or 'no family file'} ({found.model_type})"),
        *(_structure(found.structure) if found.structure else ()),
        ("parameters", f"{human_count(found.parameters)} in {kinds}"),
        ("weights", f"{human_size(found.bytes)} in {len(found.shards)} file{'s' * (len(found.shards) > 1)}"),
        ("KV cache", _cache(found)),
        ("code", "its own, not run" if found.remote_code else "native"),
        *((name, "fits" if reason is None else f"does not fit: {reason}") for name, reason in found.operations.items()),
        ("carried files", ", ".join(name for name, reason in found.side_files.items() if not reason) or "none"),
        *(("not carried", f"{name}: {reason}") for name, reason in found.side_files.items() if reason),
    ]
    return [Table(rows)]


def _cache(found: Inspection) -> str:
    if found.cache_bytes_per_token is None:
        return "unknown"
    return f"{found.cache_bytes_per_token:,} bytes a token in {found.cache_dtype}"


def _structure(structure: Structure) -> Iterator[tuple[str, str]]:
    rope = structure.rope
    biases = [name for name, there in (("q, k, v", structure.qkv_bias), ("output", structure.output_bias)) if there]
    yield "layers", f"{structure.layers} of width {structure.hidden_size}"
    yield "attention", f"{structure.heads} heads, {structure.kv_heads} KV heads, width {structure.head_dim}"
    yield "rope", f"{rope.kind}, theta {rope.theta:g}, width {rope.width}" if rope else "several tables"
    yield "biases", "; ".join(biases) or "none"
    yield "query-key norm", structure.qk_norm
    if structure.experts is not None and structure.active_parameters is not None:
        taken = (
            f"{structure.experts} in each of {structure.expert_layers} layers, {structure.experts_per_token} a token"
        )
        yield "experts", f"{taken}; {human_count(structure.active_parameters)} parameters active"
    yield "sliding window", f"{structure.window} tokens" if structure.window else "none"
