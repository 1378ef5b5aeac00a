"""Nearest images against a loop over plain cosines, and where the picture shows them."""

from __future__ import annotations

import math

import numpy
import torch

from common.evaluation.neighbours import nearest, picture_neighbours


def test_the_nearest_are_those_of_a_loop_and_never_the_image_itself() -> None:
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    features[7] = 3 * features[2]  # nearly the same direction, another length
    features[7, 0] += 0.01
    queries = torch.tensor([2, 7, 29])
    found = nearest(features, queries, 4).tolist()
    rows = features.tolist()

    def cosine(a: list[float], b: list[float]) -> float:
        product = sum(x * y for x, y in zip(a, b, strict=True))
        return product / math.hypot(*a) / math.hypot(*b)

    for query, indices in zip(queries.tolist(), found, strict=True):
        others = [index for index in range(30) if index != query]
        others.sort(key=lambda index: -cosine(rows[query], rows[index]))
        assert indices == others[:4]
    assert (found[0][0], found[1][0]) == (7, 2)


def test_the_picture_shows_each_image_and_its_nearest_in_order() -> None:
    """Twelve grey images whose features turn by 10 degrees each: the nearest are the next ones."""
    images = (20 * torch.arange(12, dtype=torch.uint8))[:, None, None, None].expand(12, 3, 96, 96)
    angles = torch.arange(12) * math.radians(10) * torch.tensor([1.0])
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    picture = torch.from_numpy(numpy.array(picture_neighbours(images, features)))
    assert picture.shape[0] == 10 * (96 + 8)
    first_row = picture[4 + 48]
    # The image at x = 4..99; the eight others from 104 + 12 + 4 on, 104 pixels apart.
    levels = [first_row[50, 0].item()]
    levels += [first_row[116 + 4 + 48 + 104 * place, 0].item() for place in range(8)]
    assert levels == [0, 20, 40, 60, 80, 100, 120, 140, 160]
    last_row = picture[9 * 104 + 52]
    assert last_row[50, 0] == 220
    assert last_row[116 + 52, 0] == 200


def test_two_images_are_enough() -> None:
    images = torch.zeros(2, 3, 200, 200, dtype=torch.uint8)
    picture = picture_neighbours(images, torch.eye(2))
    assert picture.height == 2 * 208
