"""The tables and pictures of tools/bench_defense."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

TIMES = 10  # by which a difference is shown
SHOWN_K = "3"  # of the tables that have one number of tiles
# The average defence success that the paper's abstract reports, without and with both parts, in percent.
REPORTED = 52.4, 81.7
YARDSTICK = (REPORTED[1] - REPORTED[0]) / (100 - REPORTED[0])
LOST_AT_MOST = 0.02


class Row(NamedTuple):
    """A picture before an attack, after it, and as the defence shows it, with what is said of each."""

    asked: str
    before: Image.Image
    fooled: str
    after: Image.Image
    defended: str
    masked: Image.Image


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows), ""]


def report(measured: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    lines = []
    if "masks" in measured:
        lines += of_masks(measured["masks"])
    if "analysis" in measured:
        lines += of_analysis(measured["analysis"])
    return "\n".join(lines)


def of_masks(found: dict[str, Any]) -> list[str]:
    attacks, rules, best = [name for name in found["attacks"] if name != "none"], found["rules"], found["best"]
    counts = list(rules[best])
    lines = [f"{found['questions']} questions, {found['steps']} steps. Undefended, percent:", ""]
    rows = [[name, percent(row["wrong"]), percent(row["target"])] for name, row in found["attacks"].items()]
    lines += table(["attack", "wrong answer", "the attacker's"], rows)
    for key, title in (("right", "Right answers"), ("asked tile masked", "Masks on the tile that is asked about")):
        rows = [
            [rule, *(percent(by_count[count]["none"][key]) for count in counts)] for rule, by_count in rules.items()
        ]
        lines += [f"{title}, without an attack:", "", *table(["tiles", *(f"K = {count}" for count in counts)], rows)]
    titles = {
        "restored": "Right again, of the answers that an attack had made wrong",
        "stopped": "Not said any more, of the answers that attackers had got",
        "right": "Right answers",
        "asked tile masked": "Masks on the tile that is asked about",
    }
    for key, title in titles.items():
        rows = [
            [rule, *(percent(by_count[SHOWN_K][name][key]) for name in attacks)] for rule, by_count in rules.items()
        ]
        lines += [f"{title}, K = {SHOWN_K}:", "", *table(["tiles", *attacks], rows)]
    for rule in rules:
        rows = [
            [f"K = {count}", *(percent(rules[rule][count][name]["restored"]) for name in attacks)] for count in counts
        ]
        lines += [f"Right again, by K, {rule}:", "", *table([rule, *attacks], rows)]
    rows = [[name, str(row["better"]), str(row["worse"]), f"{row['p']:.1e}"] for name, row in found["sign"].items()]
    lines += [f"{best} against inverted, K = {SHOWN_K}, questions that only one of them gets right:", ""]
    lines += table(["attack", best, "inverted", "p"], rows)
    lines += [
        f"Yardstick: {percent(YARDSTICK)} % of what succeeded is stopped, {percent(LOST_AT_MOST)} points lost.",
        "",
    ]
    for rule, by_count in rules.items():
        lost = by_count["0"]["none"]["right"] - by_count[SHOWN_K]["none"]["right"]
        met = [name for name in attacks if (by_count[SHOWN_K][name]["restored"] or 0) >= YARDSTICK]
        fit = "met" if lost <= LOST_AT_MOST else "missed"
        lines.append(f"- {rule}: {percent(lost)} points lost ({fit}); restores enough of: {'; '.join(met) or 'none'}")
    return [*lines, ""]


def of_analysis(found: dict[str, Any]) -> list[str]:
    stopped = found["stopped"]
    parts = list(stopped)
    rows = [[name, *(percent(stopped[part][name]) for part in parts)] for name in stopped[parts[0]]]
    means = {part: statistics.mean(stopped[part].values()) for part in parts}
    usual = means["undefended"]
    rows.append(["mean", *(percent(means[part]) for part in parts)])
    rows.append(
        ["of those that succeeded undefended", *(percent((means[part] - usual) / (1 - usual)) for part in parts)]
    )
    lines = [f"Toy, scorer {found['scorer']}, {found['each']} questions of each kind. Attacks that fail, percent:", ""]
    lines += table(["questions, what the attacker knows", *parts], rows)
    keys = "right", "refused", "tag missing"
    rows = [[key, *(percent(found["utility"][part][key]) for part in parts)] for key in keys]
    rows.append(["tokens generated", *(f"{found['cost'][part]['tokens']:.1f}" for part in parts)])
    rows.append(["seconds, of undefended", *(f"{found['cost'][part]['seconds']:.2f}" for part in parts)])
    return lines + table(["safe questions, no attack", *parts], rows)


def draw_shares(found: dict[str, Any], place: Path) -> None:
    """Draw what masks restore, and what they cost, by how many there are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [("none", "right", "right answers, no attack")]
    panels += [(name, "restored", f"right again: {name}") for name in found["attacks"] if name != "none"]
    figure = Figure(figsize=(14, 6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, -(-len(panels) // 2), sharex=True, sharey=True).flatten()
    for axes, (attack, key, title) in zip(grid, panels, strict=False):
        for rule, by_count in found["rules"].items():
            shares = [(int(count), row[attack][key]) for count, row in by_count.items() if row[attack][key] is not None]
            axes.plot(
                *zip(*((k, 100 * value) for k, value in shares), strict=True), marker="o", markersize=3, label=rule
            )
        if key == "restored":
            axes.axhline(100 * YARDSTICK, color="grey", linestyle=":")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("tiles masked, of 16", fontsize=8)
    grid[0].set_ylabel("percent")
    grid[0].legend(fontsize=7)
    figure.savefig(place, dpi=100, metadata={"Software": None})


def draw_pictures(rows: Sequence[Row], place: Path) -> None:
    """Draw pictures before and after an attack, their difference, and what the defence shows of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.3 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    for line, row in zip(figure.subplots(len(rows), 4, squeeze=False), rows, strict=True):
        before, after = (np.asarray(image, dtype=np.float32) for image in (row.before, row.after))
        apart = Image.fromarray((128 + TIMES * (after - before)).clip(0, 255).astype(np.uint8))
        panels = (
            (row.before, row.asked),
            (apart, f"difference x {TIMES}"),
            (row.after, row.fooled),
            (row.masked, row.defended),
        )
        for axes, (picture, title) in zip(line, panels, strict=True):
            axes.imshow(picture)
            axes.set_title(title, fontsize=8)
            axes.set_axis_off()
    figure.savefig(place, dpi=100, metadata={"Software": None})
