"""Why these experts: a table by layer, all scores as data, and a heat map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgery.architectures import Model
from surgery.architectures.experts import main_layers
from surgery.operations.base import Explanation
from surgery.operations.expert_prune.decision import Decision
from surgery.operations.expert_prune.settings import ExpertPruneSettings

HEADERS = ("layer", "kept", "dropped, with what each was worth", "mass kept", "never routed", "super")


def explanation(model: Model, settings: ExpertPruneSettings, decision: Decision) -> Explanation:
    """The explanation of a decision."""
    layers = [_layer(model, decision, layer) for layer in decision.kept]
    rows = tuple(_row(at) for at in layers)
    unrouted = sum(len(at["never_routed"]) for at in layers)
    lines = [f"{unrouted} experts got no calibration token"] if unrouted else []
    if decision.fell_back:
        lines.append(f"layers ranked by {settings.fallback}: {_ids(sorted(decision.fell_back))}")
    plain = settings.model_dump(mode="json")
    data = {"criterion": plain["criterion"], "keep": plain["keep"], "layers": layers}
    return Explanation(HEADERS, rows, tuple(lines), data, lambda path: _draw(path, layers, str(plain["criterion"])))


def _row(at: dict[str, Any]) -> tuple[str, ...]:
    mass = "" if at["mass_kept"] is None else f"{at['mass_kept']:.3f}"
    return (
        str(at["layer"]), _ids(at["kept"]), _dropped(at), mass, _ids(at["never_routed"]), _ids(at["super_experts"]),
    )  # fmt: skip


def _layer(model: Model, decision: Decision, layer: int) -> dict[str, Any]:
    kept, scores = decision.kept[layer], decision.scores.get(layer, [])
    count = len(scores) or _stored(model, layer)
    tokens = decision.tokens.get(layer, [])
    finite = [None if score == float("-inf") else score for score in scores]
    return {
        "layer": layer,
        "kept": kept,
        "dropped": [expert for expert in range(count) if expert not in set(kept)],
        "scores": finite,
        "tokens": tokens,
        "mass_kept": decision.mass.get(layer),
        "never_routed": [expert for expert, n in enumerate(tokens) if n == 0],
        "super_experts": sorted(decision.protected.get(layer, ())),
    }


def _stored(model: Model, layer: int) -> int:
    return next(at.count for at in main_layers(model) if at.layer == layer)


def _ids(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def _dropped(at: dict[str, Any]) -> str:
    if not at["scores"]:
        return _ids(at["dropped"])
    worth = ((expert, at["scores"][expert]) for expert in at["dropped"])
    return " ".join(f"{expert} ({'unused' if score is None else format(score, '.3g')})" for expert, score in worth)


def _draw(path: Path, layers: list[dict[str, Any]], criterion: str) -> None:
    """A row per layer, a column per expert; each score as a share of its layer's largest, dropped ones crossed out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(len(at["kept"]) + len(at["dropped"]) for at in layers)
    table = [_shares(at, columns) for at in layers]
    figure = Figure(figsize=(min(2 + 0.22 * columns, 40), min(1.5 + 0.28 * len(layers), 40)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    crossed = [(expert, row) for row, at in enumerate(layers) for expert in at["dropped"]]
    columns_of, rows_of = [expert for expert, _ in crossed], [row for _, row in crossed]
    axes.scatter(columns_of, rows_of, marker="x", color="white", linewidths=0.8, s=12)
    axes.set_xlabel("expert (crossed out: dropped)")
    axes.set_ylabel("layer")
    axes.set_yticks(range(len(layers)), [str(at["layer"]) for at in layers])
    axes.set_title(f"worth of experts by {criterion}, within each layer")
    figure.colorbar(image, ax=axes, label="0: the layer's least, 1: its most")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _shares(at: dict[str, Any], columns: int) -> list[float]:
    scores = at["scores"] or [1.0 if expert in set(at["kept"]) else 0.0 for expert in range(columns)]
    known = [score for score in scores if score is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    width = (high - low) or 1.0
    shares = [0.0 if score is None else (score - low) / width for score in scores]
    return [*shares, *([0.0] * (columns - len(shares)))]
