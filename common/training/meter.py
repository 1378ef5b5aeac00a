"""Means over an epoch of what its steps report; no step waits for them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.runtime.errors import UserError
from common.runtime.ranks import Ranks, send

REMEDY = (
    "the checkpoint before it is kept. Start a new run with --fresh and a lower learning rate, or "
    "with --precision fp32"
)


def require_finite(network: nn.Module) -> None:
    """Check weights before they are saved: those of the last step have not given a loss yet.

    Raises:
        UserError: if a parameter or a running average is not finite.
    """
    for name, value in itertools.chain(network.named_parameters(), network.named_buffers()):
        if not value.isfinite().all():
            raise UserError(f"the weights {name} are no longer finite; {REMEDY}")


class Pending(NamedTuple):
    """A step's numbers being copied to the CPU: sums over ranks of values, then of requests."""

    names: list[str]  # of the values; those of one name are summed
    requests: list[str]
    packed: Tensor
    event: torch.cuda.Event | None


class Meter:
    """Sums scalars over the steps of an epoch, averaged over ranks.

    On CUDA a step's values are read after the next step has been queued, so that the device never
    waits; on other devices at once. A request of any rank reaches all ranks with the values, in the
    same step.

    Args:
        ranks: this process's place.
        sums, steps: of the epoch's steps before the run was continued.
        remedy: what a user can do about a loss that is not finite.
    """

    def __init__(
        self, ranks: Ranks, sums: Mapping[str, float], steps: int, remedy: str = REMEDY
    ) -> None:
        self.ranks = ranks
        self.sums = dict(sums)
        self.steps = steps
        self.remedy = remedy
        self.latest: dict[str, float] = {}
        self._requested: set[str] = set()
        self._current: list[tuple[str, Tensor]] = []
        self._pending: Pending | None = None

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add detached scalars on the device to the current step's, by name."""
        self._current += values.items()

    def end_step(self, requests: Mapping[str, bool]) -> None:
        """End the current step, and read the one before it (on CPU and MPS: this one).

        Args:
            requests: by name, whether this rank asks all ranks for it, such as for a checkpoint.

        Raises:
            UserError: if a value read is not finite.
        """
        current, self._current = self._current, []
        names, values = [name for name, _ in current], [value for _, value in current]
        flags = send(torch.tensor([float(flag) for flag in requests.values()]), self.ranks.device)
        packed = self.ranks.sum(torch.cat([torch.stack(values).float(), flags]))
        before, self._pending = self._pending, None
        if packed.device.type == "cuda":
            host = torch.empty(packed.shape, pin_memory=True)
            host.copy_(packed, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending = Pending(names, [*requests], host, event)
        else:
            self._pending = Pending(names, [*requests], packed, None)
            self.flush()
        if before is not None:
            self._read(before)

    def flush(self) -> None:
        """Read what is pending: before a checkpoint and at the end of an epoch."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._read(pending)

    def _read(self, pending: Pending) -> None:
        if pending.event is not None:
            pending.event.synchronize()
        self.steps += 1
        numbers = pending.packed.tolist()
        asked = numbers[len(pending.names) :]
        self._requested.update(
            name for name, ranks in zip(pending.requests, asked, strict=True) if ranks > 0
        )
        self.latest = dict.fromkeys(pending.names, 0.0)
        for name, total in zip(pending.names, numbers, strict=False):
            value = total / self.ranks.world_size
            if not math.isfinite(value):
                raise UserError(
                    f"the {name} became {value} in step {self.steps} of this epoch; {self.remedy}"
                )
            self.latest[name] += value
            self.sums[name] = self.sums.get(name, 0.0) + value

    def take_request(self, name: str) -> bool:
        """Whether a rank made this request in a step read so far; the request is then removed."""
        asked = name in self._requested
        self._requested.discard(name)
        return asked

    def means(self) -> dict[str, float]:
        """Means over the steps read so far."""
        return {name: total / max(1, self.steps) for name, total in self.sums.items()}
