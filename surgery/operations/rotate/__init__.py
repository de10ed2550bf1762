"""Rotation: another basis of the residual stream and of the values, in which no channel stands out.

The offline part of QuaRot (arXiv 2404.00456) and SpinQuant (arXiv 2405.16406). The weights of the norms are folded into
what reads behind them; then an orthogonal matrix, R1, turns what writes to the stream and is undone in what reads it,
and another one for each head, R2, does so between values and outputs. What the model computes stays the same.
"""

from __future__ import annotations

from surgery.architectures import Model
from surgery.architectures.residual import residual_stream, value_heads
from surgery.operations.base import Operation
from surgery.operations.rotate.editing import RotateSettings, edit, tied


def refuses(model: Model, settings: RotateSettings) -> str | None:
    """Why the operation does not fit, or None. Raises CorruptCheckpoint where config and tensors disagree."""
    stream = residual_stream(model)
    if isinstance(stream, str):
        return stream
    if stream.drafts and settings.drafts == "refuse":
        return "engines differ in what its draft (MTP) layers read of the main model; drafts: drop leaves them out"
    if stream.drafts and not (model.architecture.experts and model.architecture.experts.drafts):
        return f"tensor {stream.drafts[0]!r} is of a layer that config.json does not count"
    if not model.has(stream.head) and not tied(model):
        return f"it has no tensor {stream.head!r}, and config.json does not tie its embeddings"
    if settings.heads:
        for layer in range(model.num_hidden_layers):
            value_heads(model, layer)  # raises where heads do not fit
    return None


OPERATION = Operation(
    name="rotate",
    title="Rotation: weights and activations without outliers",
    source="the offline part (R1, R2) of QuaRot (arXiv 2404.00456) and SpinQuant (arXiv 2405.16406)",
    settings=RotateSettings,
    refuses=refuses,
    edit=edit,
    limits=("Its residual stream has another basis: adapters and deltas made for the base do not fit it.",),
    reshapes=False,  # except that tied embeddings part, which our code and its config take as stock classes do
    after=frozenset({"kv_latent", "expert_prune", "expert_top_k", "heal"}),
    before=frozenset({"smooth", "quantize"}),  # it would fold the scales of smooth into the weights again
)
