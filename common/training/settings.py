"""The range of each setting, declared in a script's header and checked before anything else.

epochs: Positive = 100
momentum: Fraction = 0.9
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from common.runtime.errors import require


class Range(NamedTuple):
    """Least and greatest value of a number, both included."""

    low: float
    high: float
    multiple_of: int = 1

    def __str__(self) -> str:
        steps = f" and a multiple of {self.multiple_of}" if self.multiple_of > 1 else ""
        return f"between {self.low:,.15g} and {self.high:,.15g}{steps}"

    def holds(self, value: float) -> bool:
        """Whether a value is finite, within the range and a multiple of what it has to be."""
        is_inside = math.isfinite(value) and self.low <= value <= self.high
        return is_inside and (self.multiple_of == 1 or value % self.multiple_of == 0)


Count = Annotated[int, Range(0, 10**9)]
Positive = Annotated[int, Range(1, 10**9)]
Width = Annotated[int, Range(8, 4096, multiple_of=8)]  # channels of a convolution
Dimension = Annotated[int, Range(1, 2**17)]  # of a head's layer
Pixels = Annotated[int, Range(8, 4096)]  # of an image's side
BatchSize = Annotated[int, Range(1, 2**20)]  # images
Workers = Annotated[int, Range(-1, 1024)]  # of each rank; -1: its share of the usable cores
Seed = Annotated[int, Range(0, 2**63 - 1)]
Fraction = Annotated[float, Range(0, 1)]
Rate = Annotated[float, Range(0, 1000)]  # a learning rate
SweptRate = Annotated[float, Range(0, 1e30)]  # one that diverges is reported, not refused
Decay = Annotated[float, Range(0, 1)]  # a weight decay
Temperature = Annotated[float, Range(1e-3, 1e3)]
Minutes = Annotated[float, Range(0, 10**6)]
Magnitude = Annotated[int, Range(0, 30)]  # M of RandAugment(N, M)
NumOps = Annotated[int, Range(1, 100)]  # N of RandAugment(N, M)


def check_settings(config: Any) -> None:
    """Refuse values outside the ranges that the fields of a dataclass declare.

    Raises:
        UserError: with the setting's name as on the command line, its range and its value.
    """
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        for limits, value in _limited(hint, getattr(config, name)):
            flag = f"--{name.replace('_', '-')}"
            require(limits.holds(value), f"{flag} must be {limits}; it is {value}")


def _limited(hint: Any, value: Any) -> Iterator[tuple[Range, float]]:
    """The ranges that a type declares, each with the value it is for; of a tuple, its items'."""
    if get_origin(hint) is tuple:
        hints = get_args(hint)
        if hints[-1] is ...:
            hints = (hints[0],) * len(value)
        for item_hint, item in zip(hints, value, strict=True):
            yield from _limited(item_hint, item)
    elif get_origin(hint) is Annotated:
        for metadata in hint.__metadata__:
            if isinstance(metadata, Range):
                yield metadata, value
