"""What identifies a data set: how many images it has, and a checksum of their names or labels."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable

import torch

from common.data.decoding import shown
from common.runtime.errors import UserError
from common.runtime.ranks import Ranks


def fingerprint(names: Iterable[str]) -> str:
    """Identify a set by the names of its images, relative to its folder, in their order.

    The first folder of a name is the image's class, so the labels are identified too. The files
    themselves are not read.
    """
    count, checksum = 0, 0
    for name in names:
        checksum = zlib.crc32(os.fsencode(name) + b"\0", checksum)
        count += 1
    return f"{count} images, checksum {checksum:08x}"


def require_same_images(found: str, source: str, ranks: Ranks) -> None:
    """Refuse to train where processes found different images; all ranks wait for each other.

    Args:
        found: this rank's `fingerprint`.
        source: where the images are from, for the message.

    Raises:
        UserError: on every rank.
    """
    count, checksum = int(found.split()[0]), int(found.split()[-1], 16)
    own = torch.tensor([[count], [checksum]], device=ranks.device)
    counts, checksums = ranks.join(own).tolist()
    sets = [f"{n} images, checksum {c:08x}" for n, c in zip(counts, checksums, strict=True)]
    if len(set(sets)) > 1:
        each = "; ".join(f"process {rank} found {text}" for rank, text in enumerate(sets))
        raise UserError(
            f"the processes found different images in {shown(source)}: {each}; give every machine "
            "the same files"
        )
