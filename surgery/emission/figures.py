"""The figures of a model card: the base and the result side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.checkpoint.journal import Finished
from surgery.checkpoint.reader import Checkpoint
from surgery.emission.checkpoint import result_code
from surgery.emission.markdown import code, table
from surgery.metrics.cache import cache_bytes_per_token
from surgery.planning import Draft, count_parameters, open_draft, storage_dtype

if TYPE_CHECKING:
    from surgery.manifest import Manifest
    from surgery.operations.base import Step
    from surgery.verification import Verification


@dataclass(frozen=True)
class Compared:
    """One of several results: its weight files, what it costs in quality over the base, and whether it needs code.

    `name` is empty for the main result; what was not measured is None. `operations` are all that made it.
    """

    name: str
    operations: tuple[str, ...]
    weight_bytes: int
    bytes_ratio: float | None
    perplexity_ratio: float | None
    kl: float | None
    agreement: float | None
    code: tuple[str, ...]


HEADERS = (
    "operations", "weight bytes", "of the base", "perplexity ratio", "KL(base, this)", "same first choice", "code",
)  # fmt: skip


def compared(
    name: str,
    base: Checkpoint,
    steps: Sequence[Step],
    draft: Draft,
    outputs: Mapping[str, Finished],
    verification: Verification | None,
) -> Compared:
    """The figures of one result among several."""
    found = verification.measurements if verification is not None else {}
    before, after = file_bytes(base), weight_bytes(outputs)
    perplexity = found.get("perplexity"), found.get("base_perplexity")
    return Compared(
        name=name,
        operations=tuple(step.operation.name for step in steps),
        weight_bytes=after,
        bytes_ratio=after / before if before else None,
        perplexity_ratio=perplexity[0] / perplexity[1] if perplexity[0] is not None and perplexity[1] else None,
        kl=found.get("kl"),
        agreement=found.get("agreement"),
        code=tuple(result_code(draft)),
    )


def compared_cells(of: Compared) -> tuple[str, ...]:
    """The figures under HEADERS, in words."""
    return (
        ", ".join(of.operations) or "a copy",
        f"{of.weight_bytes:,}",
        _shown(of.bytes_ratio, ".1%"),
        _shown(of.perplexity_ratio, ".4f"),
        _shown(of.kl, ".5f"),
        _shown(of.agreement, ".1%"),
        "yes" if of.code else "native",
    )


def _shown(figure: float | None, form: str) -> str:
    return "not measured" if figure is None else f"{figure:{form}}"


def variants_text(compared_with: Sequence[Compared], name: str) -> str:
    """The table of all results that were made together, in the card of the one called `name`."""
    rows = [
        (code(of.name) if of.name else "main result", "this" if of.name == name else "", *compared_cells(of))
        for of in compared_with
    ]
    how = "One manifest made all of these, from the same stages; perplexity and KL are held against the base."
    return "\n".join([how, "", *table(("", "", *HEADERS), rows)])


def file_bytes(base: Checkpoint) -> int:
    """Bytes of the weight files of a base."""
    return sum(header.file_bytes for header in base.shards.values())


def weight_bytes(outputs: Mapping[str, Finished]) -> int:
    """Bytes of the weight files of a result."""
    return sum(file.bytes for name, file in outputs.items() if name.endswith(".safetensors"))


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
    text_config = base.config.get(family.text_config, base.config) if family and family.text_config else base.config
    dtypes = storage_dtype(base), str(draft.config.get("torch_dtype") or draft.config.get("dtype") or "float32")
    before, after = count_parameters(open_draft(base)), count_parameters(draft)
    yield "parameters", *_compared(base.parameter_count, after.all, ",")
    if before.active is not None and after.active is not None:
        yield "parameters that a token goes through", *_compared(before.active, after.active, ",")
    yield "bytes of weight files", *_compared(file_bytes(base), weight_bytes(outputs), ",")
    cached = cache_bytes_per_token(text_config, dtypes[0]), cache_bytes_per_token(draft.config, dtypes[1])
    if None not in cached:
        yield f"cache bytes per token, {' → '.join(dict.fromkeys(dtypes))}", *_compared(*cached, ",")


def quality_rows(found: Mapping[str, float]) -> Iterator[tuple[str, ...]]:
    """What verification measured of perplexity, divergence and agreement."""
    if "perplexity" in found and "base_perplexity" in found:
        yield "perplexity per token", *_compared(found["base_perplexity"], found["perplexity"], ".4f")
    if "kl" in found:
        yield "KL(base, this), nats per token", "0", f"{found['kl']:.5f}", ""
    if "codebook_cache_ratio" in found:
        tokens, share = int(found["codebook_cache_tokens"]), found["codebook_cache_ratio"]
        yield f"cache bytes of a prompt of {tokens:,} tokens", "1", f"{share:.3f}", f"{share:.4f}"
        yield "KL(full cache, coded cache), nats per token", "0", f"{found['kl_codebook_cache']:.5f}", ""
    if "agreement" in found:
        yield "share of tokens with the same first choice", "1", f"{found['agreement']:.4f}", ""


def sample_rows(sample: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What became of a sample image, in words; all texts are the model's, or anybody's."""
    yield "question", code(sample["question"])
    if sample["kept"] is not None:
        yield "visual tokens", f"{len(sample['kept']):,} of {sample['visual_tokens']:,} kept"
        drawn = sample["rows"] * sample["columns"]
        if sample["first"] + drawn < sample["visual_tokens"]:
            yield "in the picture", f"the {drawn:,} of the whole image; the others see closer"
    if sample["side"] is not None:
        numbers = ", ".join(map(str, sample["masked"] or ())) or "none"
        yield "tiles", f"of {sample['side'] ** 2}, numbered row by row from 0, black: {numbers}"
    yield "answer to the whole image", code(sample["answer_whole"])
    yield "answer of this", code(sample["answer"])


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
