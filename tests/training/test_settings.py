"""The ranges that headers declare: what is refused, and with which words."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from common.runtime.errors import UserError
from common.training.settings import Count, Fraction, Magnitude, NumOps, Rate, Width, check_settings
from scripts import ROOT


@dataclass(frozen=True)
class Config:
    steps: Count = 3
    momentum: Fraction = 0.9
    first_width: Width = 64
    randaug: tuple[NumOps, Magnitude] = (2, 9)
    rates: tuple[Rate, ...] = (0.1, 0.2)
    name: str = "any"


@pytest.mark.parametrize(
    "allowed",
    [{"steps": 0}, {"momentum": 0}, {"momentum": 1.0}, {"first_width": 8}, {"rates": ()}],
)
def test_what_is_within_the_range_passes(allowed: dict[str, object]) -> None:
    check_settings(Config(**allowed))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": -1}, "--steps must be between 0 and 1,000,000,000; it is -1"),
        ({"steps": 10**10}, "--steps must be between 0 and 1,000,000,000; it is 10000000000"),
        ({"momentum": math.nan}, "--momentum must be between 0 and 1; it is nan"),
        ({"momentum": math.inf}, "--momentum must be between 0 and 1; it is inf"),
        ({"momentum": 1.0001}, "--momentum must be between 0 and 1; it is 1.0001"),
        (
            {"first_width": 12},
            "--first-width must be between 8 and 4,096 and a multiple of 8; it is 12",
        ),
        ({"randaug": (2, 31)}, "--randaug must be between 0 and 30; it is 31"),
        ({"randaug": (0, 9)}, "--randaug must be between 1 and 100; it is 0"),
        ({"rates": (0.1, -math.inf)}, "--rates must be between 0 and 1,000; it is -inf"),
    ],
)
def test_what_is_outside_is_refused_by_its_name(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as refused:
        check_settings(Config(**wrong))
    assert str(refused.value) == message


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/run.py")), ids=lambda path: path.parent.name)
def test_every_number_of_every_script_has_a_range_that_holds_its_default(path: Path) -> None:
    config = importlib.import_module(f"{path.parent.name}.run").Config
    check_settings(config())
    for field in fields(config):
        if isinstance(field.default, bool | str):
            continue
        wrong = (math.nan,) * 2 if isinstance(field.default, tuple) else math.nan
        if str(field.type).startswith("Literal"):
            continue  # tyro refuses what is not in the list
        with pytest.raises(UserError, match=field.name.replace("_", "-")):
            check_settings(config(**{field.name: wrong}))
