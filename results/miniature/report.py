"""The tables (report.md) and the plot (report.png) of the miniature, from the runs' own logs.

    pip install -r results/requirements.txt
    python results/miniature/report.py

Cells without a finished run are empty.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from logs import COLOURS, draw, draw_raw_pixels, knn_at_half, last, raw_pixels, read, summary

FOLDER = Path(__file__).resolve().parent
METHODS = {"simclr": "SimCLR", "byol": "BYOL", "simsiam": "SimSiam"}


def cells(names: list[str], key: str) -> str:
    return " | ".join(summary([last(rows, key) for rows in read(FOLDER, name)]) for name in names)


def tables() -> str:
    lines = ["| kNN % | SimCLR | BYOL | SimSiam |", "|---|---|---|---|"]
    for regime in COLOURS:
        names = [f"{method}-{regime}" for method in METHODS]
        lines.append(f"| {regime} | {cells(names, 'knn')} |")
    halves = " | ".join(
        summary([knn_at_half(rows) for rows in read(FOLDER, f"{method}-dssl")])
        for method in METHODS
    )
    lines.append(f"| dssl after half its epochs (the cost of a whole baseline) | {halves} |")
    untrained = " | ".join(
        summary([rows[0]["knn"] for rows in read(FOLDER, f"{method}-baseline")])
        for method in METHODS
    )
    lines.append(f"| untrained | {untrained} |")
    lines += ["", *(f"{name}: kNN {knn:.1f} %\n" for name, knn in raw_pixels().items())]
    for key, title in (("linear", "linear %"), ("spread", "`spread` in the last epoch")):
        lines += ["", f"| {title} | SimCLR | BYOL | SimSiam |", "|---|---|---|---|"]
        for regime in COLOURS:
            names = [f"{method}-{regime}" for method in METHODS]
            if key == "spread":
                values = [[last(rows, key) for rows in read(FOLDER, name)] for name in names]
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
            pair = [
                f"{last(rows, 'knn'):.1f}" for name in names for rows in read(FOLDER, name, "0")
            ]
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
            for axis, key in zip(axes[:, column], ("knn", "spread"), strict=True):
                draw(axis, read(FOLDER, f"{method}-{regime}"), key, colour, regime)
        draw_raw_pixels(axes[0, column], 10)
        axes[0, column].set_title(title)
        axes[1, column].set_xlabel("epoch")
        axes[1, column].set_ylim(0, 1.1)
    axes[0, 0].set_ylabel("kNN accuracy, %")
    axes[1, 0].set_ylabel("spread (0: collapsed)")
    axes[1, 0].legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    text = tables()
    (FOLDER / "report.md").write_text(text)
    plot(FOLDER / "report.png")
    print(text, end="")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
