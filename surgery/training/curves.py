"""What training recorded: one JSON object a line while it runs; JSON and a picture beside the output at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from surgery.checkpoint.writer import environment_errors

Entry: TypeAlias = dict[str, Any]


def append(path: Path, entry: Entry) -> None:
    """Add one line."""
    with environment_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def read(path: Path) -> list[Entry]:
    """All whole lines; a line that a crash tore is left out."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]


def keep(path: Path, wanted: Callable[[Entry], bool]) -> list[Entry]:
    """Drop what an interrupted run recorded beyond the state it is resumed from; returns what is left."""
    kept = [entry for entry in read(path) if wanted(entry)]
    if path.is_file():
        with environment_errors(path):
            whole = path.with_suffix(".writing")
            whole.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
            whole.replace(path)
    return kept


def publish(place: Path, summary: Entry, entries: Sequence[Entry]) -> None:
    """Write `place`.json (summary and every entry) and `place`.png."""
    with environment_errors(place):
        text = json.dumps({**summary, "history": list(entries)}, indent=1)
        place.with_name(place.name + ".json").write_text(text + "\n", encoding="utf-8")
        _draw(place.with_name(place.name + ".png"), entries)


def _draw(path: Path, entries: Sequence[Entry]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stages = list(dict.fromkeys(entry["stage"] for entry in entries))
    figure = Figure(figsize=(6.5 * max(len(stages), 1), 4.2))
    FigureCanvasAgg(figure)
    for number, stage in enumerate(stages, 1):
        panel = figure.add_subplot(1, len(stages), number)
        of_stage = [entry for entry in entries if entry["stage"] == stage]
        for layer in dict.fromkeys(entry.get("layer") for entry in of_stage):
            of_layer = [entry for entry in of_stage if entry.get("layer") == layer]
            _line(panel, of_layer, "loss", "training" if layer is None else f"layer {layer}")
            _line(panel, of_layer, "heldout", "held out")
        panel.set(title=stage, xlabel="tokens", ylabel="loss", yscale="log")
        panel.grid(visible=True, which="both", alpha=0.3)
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _line(panel: Any, entries: Sequence[Entry], key: str, label: str) -> None:
    points = [(entry["tokens"], entry[key]) for entry in entries if entry.get(key)]
    if points:
        panel.plot(*zip(*points, strict=True), label=label, marker="o" if key == "heldout" else None, linewidth=1)
