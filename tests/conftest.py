"""Data that several test files train on."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from common.data.shapes import CLASS_NAMES, shapes


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled image folder of generated pictures: 200 to train on, 30 to test."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 200), ("val", 30)):
        images, labels = shapes(count, 32, seed=len(split))
        for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            path = root / split / CLASS_NAMES[label] / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return root
