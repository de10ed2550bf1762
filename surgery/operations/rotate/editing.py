"""How `rotate` changes a draft: one rewrite for each tensor, so that one tensor at a time is in memory.

The weight of a norm is an input to the rewrite of everything that reads behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from surgery.architectures import Model
from surgery.architectures.residual import Stream, Use, residual_stream, value_heads
from surgery.checkpoint.dtypes import element_count
from surgery.checkpoint.expressions import Computed, Rewrite, Tensors, Value
from surgery.errors import CorruptCheckpoint, UnsupportedModel
from surgery.operations.base import Settings, Statistics
from surgery.operations.experts.layers import drop_drafts
from surgery.planning import Draft
from surgery.sizes import human_size

# Elements that are turned at once, and how many copies of them are held meanwhile, in float64.
CHUNK = 1 << 18
COPIES = 6


class RotateSettings(Settings):
    """Which matrices turn a model."""

    seed: int = Field(default=0, ge=0, lt=2**63, description="which random matrices")
    heads: bool = Field(
        default=True,
        description="turn the values of each head too (R2), where that is possible, not only the stream (R1)",
    )
    drafts: Literal["refuse", "drop"] = Field(
        default="refuse", description="a model with draft (MTP) layers is refused, or they are left out"
    )


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `start` to `stop` of a tensor, and the label of the matrix that turns them among themselves, or None."""

    start: int
    stop: int
    label: str | None


def tied(model: Model) -> bool:
    """Whether the head is the embeddings."""
    return bool(model.config.get("tie_word_embeddings"))


def edit(draft: Draft, settings: RotateSettings, _statistics: Statistics | None) -> None:
    """Fold the norms and turn every reader and writer, a tensor at a time."""
    if settings.drafts == "drop" and draft.model.architecture.experts is not None:
        drop_drafts(draft, "rotate: drafts: drop")
    model = draft.model
    stream = _stream(model)
    editing = _Editing(dict(draft.tensors), f"surgery rotate {settings.seed}")
    own = _value_pieces(draft, editing.label) if settings.heads else {}
    joined = tied(model)
    made: dict[str, Value] = {}
    for use in stream.uses:
        if not (joined and use.name == stream.head):
            made[use.name] = editing.turn(use.name, use, own.pop(use.name, ()))
    made |= {name: editing.turn(name, None, pieces) for name, pieces in own.items()}
    made |= {name: editing.ones(name) for name in stream.norms}
    if joined:
        made[stream.head] = editing.untied(stream)
        draft.config["tie_word_embeddings"] = draft.root["tie_word_embeddings"] = False
        size = human_size(draft.spec(stream.embedding).nbytes)
        draft.notes.append(f"rotate: the head is no longer tied to the embeddings, which takes {size} more")
    draft.tensors.update(made)


@dataclass(frozen=True)
class _Editing:
    """The values of a draft as they were, and the label of R1."""

    before: dict[str, Value]
    label: str

    def turn(self, name: str, use: Use | None, pieces: tuple[Piece, ...]) -> Value:
        """A tensor times the norm's weight, if it reads, in the new bases."""
        axis, norm = (use.axis, use.norm) if use else (None, None)

        def function(tensors: Tensors) -> Tensors:
            from surgery.operations.rotate.orthogonal import turned

            return {name: turned(tensors[name], axis, self.label, tensors[norm] if norm else None, pieces)}

        widest = max((piece.stop - piece.start for piece in pieces if piece.label), default=1)
        work = COPIES * 8 * max(CHUNK, widest * _row(self.before[name].spec.shape, axis))
        why = "rotate: turned" + (f", times {norm}" if norm else "")
        return self._computed(name, [name, norm] if norm else [name], function, why, work)

    def ones(self, norm: str) -> Value:
        """A norm whose weight went elsewhere."""

        def function(tensors: Tensors) -> Tensors:
            return {norm: tensors[norm].new_ones(tensors[norm].shape)}

        return self._computed(norm, [norm], function, "rotate: its weight is in what reads behind it", 0)

    def untied(self, stream: Stream) -> Value:
        """A head made of the embeddings that it was tied to."""
        head, embedding, norm = stream.head, stream.embedding, stream.norms[-1]

        def function(tensors: Tensors) -> Tensors:
            from surgery.operations.rotate.orthogonal import turned

            if head in tensors and not tensors[head].equal(tensors[embedding]):
                raise CorruptCheckpoint(
                    f"tensor {head!r} is not equal to {embedding!r}", cause="config.json says that they are tied",
                    remedy="set tie_word_embeddings as the model was trained",
                )  # fmt: skip
            return {head: turned(tensors[embedding], 1, self.label, tensors[norm])}

        stored = [head] if head in self.before else []
        work = COPIES * 8 * max(CHUNK, _row(self.before[embedding].spec.shape, 1))
        return self._computed(head, [embedding, norm, *stored], function, f"rotate: untied, times {norm}", work)

    def _computed(
        self, name: str, inputs: list[str], function: Callable[[Tensors], Tensors], why: str, work: int
    ) -> Value:
        """One tensor, of inputs that others may have too; the first says its type and shape."""
        outputs = {name: self.before[inputs[0]].spec}
        work = max(work, 4 * element_count(outputs[name].shape))  # afterwards, to see that all is finite
        return Computed(Rewrite({key: self.before[key] for key in inputs}, outputs, function, why, work), name)


def _stream(model: Model) -> Stream:
    found = residual_stream(model)
    if isinstance(found, str):
        raise UnsupportedModel("rotate does not fit this model", cause=found, remedy="see: surgery operations rotate")
    return found


def _row(shape: tuple[int, ...], axis: int | None) -> int:
    """Elements of one step along the first axis that is not `axis`."""
    others = [size for at, size in enumerate(shape) if at != axis]
    return element_count(shape) // others[0] if others else element_count(shape)


def _value_pieces(draft: Draft, label: str) -> dict[str, tuple[Piece, ...]]:
    """How values and outputs are divided into heads, by tensor; empty where that cannot be."""
    model = draft.model
    found: dict[str, tuple[Piece, ...]] = {}
    for layer in range(model.num_hidden_layers):
        at = value_heads(model, layer)
        if isinstance(at, str):
            draft.notes.append(f"rotate: values keep their basis: {at}")
            return {}
        heads = [f"{label} layer {layer} head {head}" for head in range(at.heads)]
        first = (Piece(0, at.start, None),) if at.start else ()
        rows = (*first, *_divided(at.start, at.width, heads))
        found |= {name: rows for name in (f"{at.value}.weight", f"{at.value}.bias") if model.has(name)}
        columns = [head for head in heads for _ in range(at.repeats)]
        found[f"{at.output}.weight"] = tuple(_divided(0, at.width, columns))
    return found


def _divided(start: int, width: int, labels: Sequence[str]) -> Iterator[Piece]:
    for number, label in enumerate(labels):
        yield Piece(start + number * width, start + (number + 1) * width, label)
