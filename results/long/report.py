"""The table (report.md) and the plot (report.png) of the long campaign, from the runs' own logs.

    pip install -r results/requirements.txt
    python results/long/report.py

Cells without a finished run are empty; a run may be there without its linear accuracy.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from logs import COLOURS, draw, draw_raw_pixels, knn_at_half, last, raw_pixels, read, summary

FOLDER = Path(__file__).resolve().parent
# Of SimSiam: the run's name, and its passes of a view in units of 100 epochs of baseline.
RUNS = {
    "baseline": ("simsiam-baseline", 1.0),
    "joint": ("simsiam-joint", 1.0),
    "dssl": ("simsiam-dssl", 2.0),
    "baseline, 200 epochs": ("simsiam-200-epochs-baseline", 2.0),
}
TITLE = "| {}, 100 epochs | cost | kNN % | linear % | `spread` |"


def table(title: str, runs: dict[str, tuple[str, float]]) -> list[str]:
    lines = [TITLE.format(title), "|---|---|---|---|---|"]
    for label, (name, cost) in runs.items():
        seeds = read(FOLDER, name)
        accuracies = [
            summary([last(rows, key) for rows in seeds if any(key in row for row in rows)])
            for key in ("knn", "linear")
        ]
        spread = [last(rows, "spread") for rows in seeds]
        shown = f"{statistics.mean(spread):.2f}" if spread else ""
        lines.append(f"| {label} | {cost:g} | {' | '.join(accuracies)} | {shown} |")
    return lines


def knn_by_epoch() -> list[str]:
    """Mean kNN accuracy in percent at some epochs."""
    lines = ["| kNN % after epoch | 10 | 25 | 50 | 75 | 100 |", "|---|---|---|---|---|---|"]
    for label, (name, _) in RUNS.items():
        seeds = [
            {row["epoch"]: row["knn"] for row in rows if "knn" in row}
            for rows in read(FOLDER, name)
        ]
        cells = [
            f"{statistics.mean(knn[epoch] for knn in seeds):.1f}" if seeds else ""
            for epoch in (10, 25, 50, 75, 100)
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def tables() -> str:
    lines = table("SimSiam", RUNS)
    half = summary([knn_at_half(rows) for rows in read(FOLDER, "simsiam-dssl")])
    lines.append(f"| dssl after 50 of its 100 epochs | 1 | {half} | | |")
    untrained = [rows[0]["knn"] for name, _ in RUNS.values() for rows in read(FOLDER, name)]
    lines += ["", f"untrained: kNN {summary(untrained)} %"]
    lines += [f"\n{name}: kNN {knn:.1f} %" for name, knn in raw_pixels().items()]
    lines += ["", *knn_by_epoch()]
    heavier = {
        regime: (f"byol-ra8-16-{regime}", cost) for regime, cost in (("joint", 1.0), ("dssl", 2.0))
    }
    lines += ["", *table("BYOL, RandAugment(8, 16)", heavier)]
    return "\n".join(lines) + "\n"


def plot(path: Path) -> None:
    import matplotlib as mpl  # here, so that the tables do without it
    from matplotlib import pyplot as plt

    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (by_epoch, by_cost, spreads) = plt.subplots(1, 3, figsize=(10, 3.4))
    for label, (name, cost) in RUNS.items():
        seeds = read(FOLDER, name)
        epochs = 200 if "200" in label else 100
        style = "--" if "200" in label else "-"
        colour = COLOURS[label.split(",")[0]]
        draw(by_epoch, seeds, "knn", colour, label, ls=style)
        draw(by_cost, seeds, "knn", colour, label, 100 * cost / epochs, style)
        draw(spreads, seeds, "spread", colour, label, ls=style)
    draw_raw_pixels(by_epoch, 200)
    by_epoch.set(xlabel="epoch", xlim=(-5, 205), ylabel="kNN accuracy, %", title="at equal epochs")
    by_cost.set(xlabel="cost, in epochs of baseline", title="at equal cost", ylabel="")
    spreads.set(xlabel="epoch", ylabel="spread (0: collapsed)", ylim=(0, 1.1))
    if by_epoch.get_legend_handles_labels()[0]:
        spreads.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    text = tables()
    (FOLDER / "report.md").write_text(text)
    plot(FOLDER / "report.png")
    print(text, end="")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
