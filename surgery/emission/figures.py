"""The figures of a model card: the base and the result side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING

from surgery.checkpoint.journal import Finished
from surgery.checkpoint.reader import Checkpoint
from surgery.emission.markdown import code, table
from surgery.metrics.cache import cache_bytes_per_token
from surgery.planning import Draft, active_count, open_draft, storage_dtype

if TYPE_CHECKING:
    from surgery.manifest import Manifest
    from surgery.verification import Verification


def figures(
    base: Checkpoint,
    draft: Draft,
    manifest: Manifest,
    outputs: Mapping[str, Finished],
    verification: Verification | None,
) -> str:
    """The base and this side by side: bytes as they are, quality as far as it was measured."""
    found = verification.measurements if verification is not None else {}
    measured = list(quality_rows(found))
    rows = [*bytes_rows(base, draft, outputs), *measured]
    on = f"Quality was measured on {int(found.get('tokens', 0)):,} tokens of {_heldout(manifest, found)}."
    missing = "Quality was not measured. Measure it on text of your own before relying on this model."
    return "\n".join([*table(("", "base", "this", "ratio"), rows), "", on if measured else missing])


def bytes_rows(base: Checkpoint, draft: Draft, outputs: Mapping[str, Finished]) -> Iterator[tuple[str, ...]]:
    """Parameters, bytes on disk and cache bytes per token."""
    family = draft.architecture
    text_config = base.config[family.text_config] if family and family.text_config else base.config
    dtypes = storage_dtype(base), str(draft.config.get("torch_dtype") or draft.config.get("dtype") or "float32")
    weights = sum(file.bytes for name, file in outputs.items() if name.endswith(".safetensors"))
    yield "parameters", *_compared(base.parameter_count, sum(prod(of.spec.shape) for of in draft.tensors.values()), ",")
    before, after = active_count(open_draft(base)), active_count(draft)
    if before is not None and after is not None:
        yield "parameters that a token goes through", *_compared(before, after, ",")
    yield "bytes of weight files", *_compared(sum(header.file_bytes for header in base.shards.values()), weights, ",")
    cached = cache_bytes_per_token(text_config, dtypes[0]), cache_bytes_per_token(draft.config, dtypes[1])
    if None not in cached:
        yield f"cache bytes per token, {' → '.join(dict.fromkeys(dtypes))}", *_compared(*cached, ",")


def quality_rows(found: Mapping[str, float]) -> Iterator[tuple[str, ...]]:
    """What verification measured of perplexity, divergence and agreement."""
    if "perplexity" in found and "base_perplexity" in found:
        yield "perplexity per token", *_compared(found["base_perplexity"], found["perplexity"], ".4f")
    if "kl" in found:
        yield "KL(base, this), nats per token", "0", f"{found['kl']:.5f}", ""
    if "agreement" in found:
        yield "share of tokens with the same first choice", "1", f"{found['agreement']:.4f}", ""


def _compared(before: float | None, after: float | None, form: str) -> tuple[str, str, str]:
    before, after = before or 0, after or 0
    return f"{before:{form}}", f"{after:{form}}", f"{after / before:.4f}" if before else ""


def _heldout(manifest: Manifest, found: Mapping[str, float]) -> str:
    """The text that quality was measured on; files by their names alone."""
    named = manifest.verify.text if manifest.verify else None
    if "perplexity" not in found:
        return "random tokens, as there was no text or no tokenizer"
    if isinstance(named, tuple):
        return ", ".join(code(file.path.name) for file in named)
    known = {
        "builtin": "Python documentation", "builtin:code": "Python code", "builtin:records": "made-up records",
        "builtin:mixed": "Python documentation, Python code and made-up records",
    }  # fmt: skip
    return f"{known[named]} held out" if named in known else code(str(getattr(named, "dataset", named)))
