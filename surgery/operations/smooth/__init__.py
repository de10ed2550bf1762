"""Smoothing: channels in which activations stand out lend some of their size to the weights that read them.

SmoothQuant (arXiv 2211.10438). Each channel of what a group of matrices reads is divided by s, and their columns are
multiplied by it; the division is folded into what makes the channel: the norm before them or, where `folds` asks for
it, values and up-projections. What the model computes stays the same. It helps where activations are rounded too.
"""

from __future__ import annotations

from surgery.architectures import Model
from surgery.operations.base import Measuring, Operation, Statistics
from surgery.operations.smooth.editing import edit
from surgery.operations.smooth.folds import SmoothSettings, find_folds


def refuses(model: Model, settings: SmoothSettings) -> str | None:
    """Why the operation does not fit, or None. Raises CorruptCheckpoint where config and tensors disagree."""
    found = find_folds(model, settings)
    return found if isinstance(found, str) else None


def measure(measuring: Measuring, settings: SmoothSettings) -> Statistics:
    """The largest magnitude of each channel (see `measuring.py`)."""
    from surgery.operations.smooth.measuring import largest_magnitudes

    return largest_magnitudes(measuring, settings)


OPERATION = Operation(
    name="smooth",
    title="Smoothing: activations that round well",
    source="SmoothQuant (arXiv 2211.10438); values and up as in AWQ (arXiv 2306.00978)",
    settings=SmoothSettings,
    refuses=refuses,
    edit=edit,
    measures=lambda _: True,
    measure=measure,
    measured_by=lambda settings: sorted(settings.folds),
    limits=("Channels have other scales than the base's: adapters and deltas made for the base do not fit it.",),
    reshapes=False,
    after=frozenset({"kv_latent", "expert_prune", "expert_top_k", "heal", "rotate"}),
    before=frozenset({"quantize"}),
)
