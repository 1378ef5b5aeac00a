"""What identifies a data set: how many images it has, their names or labels, a few contents."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.data.decoding import content_of, shown
from common.runtime.errors import UserError
from common.runtime.ranks import Ranks

if TYPE_CHECKING:
    from common.data.archive import Entry

CONTENTS = ", contents "


def fingerprint(names: Iterable[str], files: Sequence[Path | Entry] = ()) -> str:
    """Identify a set by the names of its images, relative to its folder, in their order.

    The first folder of a name is the image's class, so the labels are identified too.

    Args:
        files: the images; the contents of the first, the middle and the last are identified too.
    """
    count, checksum = 0, 0
    for name in names:
        checksum = zlib.crc32(os.fsencode(name) + b"\0", checksum)
        count += 1
    contents = []
    for index in sorted({0, len(files) // 2, len(files) - 1} if files else ()):
        with suppress(OSError, ValueError):  # told where it is decoded
            contents.append(f"{zlib.crc32(content_of(files[index])):08x}")
    found = f"{count} images, checksum {checksum:08x}"
    return found + CONTENTS * bool(contents) + " ".join(contents)


def is_same_set(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same images.

    One content in common is enough: a broken file may have been restored. A fingerprint without
    contents, as of a run that an older version began, is compared by the names.
    """
    names, _, contents = one.partition(CONTENTS)
    other_names, _, other_contents = other.partition(CONTENTS)
    if not contents or not other_contents:
        return names == other_names
    return names == other_names and not set(contents.split()).isdisjoint(other_contents.split())


def require_same_images(found: str, source: str, ranks: Ranks) -> None:
    """Refuse to train where processes found different images; all ranks wait for each other.

    Args:
        found: this rank's `fingerprint`.
        source: where the images are from, for the message.

    Raises:
        UserError: on every rank.
    """
    words = found.partition(CONTENTS)[0].split()
    count, checksum = int(words[0]), int(words[-1], 16)
    own = torch.tensor([[count], [checksum]], device=ranks.device)
    counts, checksums = ranks.join(own).tolist()
    sets = [f"{n} images, checksum {c:08x}" for n, c in zip(counts, checksums, strict=True)]
    if len(set(sets)) > 1:
        each = "; ".join(f"process {rank} found {text}" for rank, text in enumerate(sets))
        raise UserError(
            f"the processes found different images in {shown(source)}: {each}; give every machine "
            "the same files"
        )
    if not ranks.agree(found):
        raise UserError(
            f"the processes found files of the same names and other contents in {shown(source)}; "
            "give every machine the same files"
        )
