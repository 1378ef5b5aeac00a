"""Prints README.md's table of what was measured, from the runs' own logs in this folder.

python results/table.py
"""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
RUNS = {
    "demo": "`make demo`: 6,000 shapes, width 8",
    "narrow/baseline": "CIFAR-10 pixels, width 8, baseline",
    "narrow/joint": "the same, joint",
    "narrow/dssl": "the same, dssl",
    "full": "3,000 CIFAR-10 images, ResNet-18 as in the paper, dssl",
}


def main() -> None:
    print("| run | steps | loss, first and last epoch | spread | kNN % by epoch (0: untrained) |")
    print("|---|---|---|---|---|")
    for name, title in RUNS.items():
        lines = (FOLDER / name / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        config = json.loads((FOLDER / name / "config.json").read_text())["config"]
        trained = [row for row in rows if "loss" in row]
        steps = config["max_steps"] or f"{config['epochs']} epochs"
        knn = " → ".join(f"{row['knn']:.1f}" for row in rows if "knn" in row)
        loss = f"{trained[0]['loss']:.3f} → {trained[-1]['loss']:.3f}"
        print(f"| {title} | {steps} | {loss} | {trained[-1]['spread']:.2f} | {knn} |")


if __name__ == "__main__":
    main()
