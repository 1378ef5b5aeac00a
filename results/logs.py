"""Reading the logs of a campaign's finished runs, for its tables and its plot."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = Path(__file__).resolve().parent
COLOURS = {"baseline": "tab:gray", "joint": "tab:red", "dssl": "tab:blue"}
Rows = list[dict[str, float]]


def read(folder: Path, name: str, seed: str = "*") -> list[Rows]:
    """The metrics of a configuration's finished seeds, or of one.

    Args:
        folder: of the campaign's results.
        name: of the runs, without their seed.
    """
    paths = sorted(folder.glob(f"{name}-seed{seed}/metrics.jsonl"))
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]


def last(rows: Rows, key: str) -> float:
    """The last value that a run logged under a name."""
    return [row[key] for row in rows if key in row][-1]


def knn_at_half(rows: Rows) -> float:
    """kNN at the epoch in the middle: after as many passes as a whole run of two views makes."""
    knn = {row["epoch"]: row["knn"] for row in rows if "knn" in row}
    return knn[max(knn) // 2]


def summary(values: list[float]) -> str:
    """Mean ± standard deviation over the seeds, and their number; empty if there is none."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.1f} (1 seed)"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} ({len(values)})"


def raw_pixels() -> dict[str, float]:
    """The kNN accuracies that raw_pixels.py printed, by the name in its lines."""
    path = RESULTS / "raw_pixels.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    pairs = [line.removesuffix(" %").split(": kNN ") for line in lines]
    return {name: float(accuracy) for name, accuracy in pairs}


def draw_raw_pixels(axis: Axes, right: float) -> None:
    """Dotted lines at the raw pixels' kNN accuracies, named at the right end."""
    for name, knn in raw_pixels().items():
        axis.axhline(knn, color="black", lw=0.6, ls=":")
        axis.text(right, knn, name, va="bottom", ha="right", fontsize=7)


def draw(
    axis: Axes, runs: list[Rows], key: str, colour: str, label: str, scale: float = 1, ls: str = "-"
) -> None:
    """One curve for each run: its values of `key` by epoch, times `scale`."""
    for index, rows in enumerate(runs):
        points = [(scale * row["epoch"], row[key]) for row in rows if key in row]
        only_once = label if index == 0 else None
        axis.plot(*zip(*points, strict=True), color=colour, alpha=0.8, label=only_once, ls=ls)
