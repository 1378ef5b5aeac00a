"""Whether two runs ended with the same checkpoint, to the bit, and with the same metrics.

python results/slurm/compare.py runs/uninterrupted runs/requeued
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch


def leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Every tensor and plain value of nested dictionaries and lists, with its path."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from leaves(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def checkpoint(folder: Path) -> dict[str, object]:
    return dict(leaves(torch.load(folder / "last.pt", map_location="cpu", weights_only=True)))


def metrics(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if name != "images_per_second"} for row in rows]


def equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return one == other


def main(first: Path, second: Path) -> None:
    one, other = checkpoint(first), checkpoint(second)
    different = [name for name in one.keys() | other.keys() if name not in one or name not in other]
    different += [name for name in one.keys() & other.keys() if not equal(one[name], other[name])]
    tensors = sum(isinstance(value, torch.Tensor) for value in one.values())
    print(f"last.pt: {tensors} tensors and {len(one) - tensors} other values")
    print(f"different: {', '.join(sorted(different)) or 'none'}")
    same = metrics(first) == metrics(second)
    print(f"metrics but images/s: {'the same' if same else 'different'}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
