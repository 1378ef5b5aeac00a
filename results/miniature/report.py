"""The tables (report.md) and the plot (report.png) of the miniature, from the runs' own logs.

    pip install -r results/requirements.txt
    python results/miniature/report.py

Cells without a finished run stay empty.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
METHODS = {"simclr": "SimCLR", "byol": "BYOL", "simsiam": "SimSiam"}
REGIMES = {"baseline": "baseline", "joint": "joint", "dssl": "dssl"}
COLOURS = {"baseline": "tab:gray", "joint": "tab:red", "dssl": "tab:blue"}
Rows = list[dict[str, float]]


def read(name: str, seed: str = "*") -> list[Rows]:
    """The metrics of a configuration's finished seeds, or of one."""
    paths = sorted(FOLDER.glob(f"{name}-seed{seed}/metrics.jsonl"))
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]


def last(rows: Rows, key: str) -> float:
    return [row[key] for row in rows if key in row][-1]


def at_half(rows: Rows) -> float:
    """kNN at the epoch in the middle: after as many passes as a whole run of two views makes."""
    knn = {row["epoch"]: row["knn"] for row in rows if "knn" in row}
    return knn[max(knn) // 2]


def summary(values: list[float]) -> str:
    """Mean ± standard deviation over the seeds, and how many they are."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.1f} (1 seed)"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} ({len(values)})"


def raw_pixels() -> dict[str, float]:
    """The kNN accuracies that raw_pixels.py printed, by what they are of."""
    path = FOLDER / "raw_pixels.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    pairs = [line.removesuffix(" %").split(": kNN ") for line in lines]
    return {name: float(accuracy) for name, accuracy in pairs}


def cells(names: list[str], key: str) -> str:
    return " | ".join(summary([last(rows, key) for rows in read(name)]) for name in names)


def tables() -> str:
    lines = ["| kNN % | SimCLR | BYOL | SimSiam |", "|---|---|---|---|"]
    for regime in REGIMES:
        names = [f"{method}-{regime}" for method in METHODS]
        lines.append(f"| {regime} | {cells(names, 'knn')} |")
    halves = " | ".join(
        summary([at_half(rows) for rows in read(f"{method}-dssl")]) for method in METHODS
    )
    lines.append(f"| dssl after half its epochs (the cost of a whole baseline) | {halves} |")
    untrained = " | ".join(
        summary([rows[0]["knn"] for rows in read(f"{method}-baseline")]) for method in METHODS
    )
    lines.append(f"| untrained | {untrained} |")
    lines += ["", *(f"{name}: kNN {knn:.1f} %\n" for name, knn in raw_pixels().items())]
    for key, title in (("linear", "linear %"), ("spread", "`spread` in the last epoch")):
        lines += ["", f"| {title} | SimCLR | BYOL | SimSiam |", "|---|---|---|---|"]
        for regime in REGIMES:
            names = [f"{method}-{regime}" for method in METHODS]
            if key == "spread":
                values = [[last(rows, key) for rows in read(name)] for name in names]
                row = " | ".join(f"{statistics.mean(v):.2f}" if v else "" for v in values)
            else:
                row = cells(names, key)
            lines.append(f"| {regime} | {row} |")
    lines += [
        "",
        "| BYOL, kNN / linear % | RA(2, 9) | RA(4, 10) | RA(8, 16) |",
        "|---|---|---|---|",
    ]
    for regime in ("joint", "dssl"):
        names = [f"byol-{regime}", f"byol-ra4-10-{regime}", f"byol-ra8-16-{regime}"]
        knn, linear = (cells(names, key).split(" | ") for key in ("knn", "linear"))
        pairs = zip(knn, linear, strict=True)
        lines.append(f"| {regime} | " + " | ".join(" / ".join(pair) for pair in pairs) + " |")
    lines += ["", "| kNN %, seed 0 | 30 px, as in the paper | in proportion |", "|---|---|---|"]
    for method in ("simclr", "simsiam"):
        for regime in ("joint", "dssl"):
            names = [f"{method}-{regime}", f"{method}-relative-{regime}"]
            pair = [f"{last(rows, 'knn'):.1f}" for name in names for rows in read(name, "0")]
            if len(pair) == 2:
                lines.append(f"| {METHODS[method]}, {regime} | {pair[0]} | {pair[1]} |")
    return "\n".join(lines) + "\n"


def plot(path: Path) -> None:
    import matplotlib as mpl  # here, so that the tables do without it
    from matplotlib import pyplot as plt

    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 3, figsize=(9, 5), sharex=True, sharey="row")
    for column, (method, title) in enumerate(METHODS.items()):
        for regime, colour in COLOURS.items():
            for index, rows in enumerate(read(f"{method}-{regime}")):
                for axis, key in zip(axes[:, column], ("knn", "spread"), strict=True):
                    points = [(row["epoch"], row[key]) for row in rows if key in row]
                    label = regime if index == 0 else None
                    axis.plot(*zip(*points, strict=True), color=colour, alpha=0.8, label=label)
        for name, knn in raw_pixels().items():
            axes[0, column].axhline(knn, color="black", lw=0.6, ls=":")
            axes[0, column].text(10, knn, name, va="bottom", ha="right", fontsize=7)
        axes[0, column].set_title(title)
        axes[1, column].set_xlabel("epoch")
        axes[1, column].set_ylim(0, 1.1)
    axes[0, 0].set_ylabel("kNN accuracy, %")
    axes[1, 0].set_ylabel("spread (0: collapsed)")
    axes[1, 0].legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    (FOLDER / "report.md").write_text(tables())
    plot(FOLDER / "report.png")
    print(tables(), end="")
