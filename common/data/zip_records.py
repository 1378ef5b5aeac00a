"""The records of the zip format (PKWARE's APPNOTE.TXT): an archive's directory and its entries."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

LOCAL = struct.Struct("<4s22x2H")  # signature, lengths of the name and of the extra field
CENTRAL = struct.Struct("<4sxB2x2H4x3L3H4x2L")
END = struct.Struct("<4s3HH2LH")
END_64 = struct.Struct("<4s20x4Q")
LOCATOR_64 = struct.Struct("<4s16x")
ONLY_IN_64 = 2**32 - 1  # a number that does not fit, and is in the extra field
UNIX, FILE_TYPE, REGULAR = 3, 0o170000, 0o100000  # host system; bits of a file's mode
STORED, DEFLATED = 0, 8
ENCRYPTED = 0x2041  # flags


class Header(NamedTuple):
    """What the archive's directory says about an entry."""

    name: bytes
    is_regular: bool
    flags: int
    method: int
    crc: int
    packed: int  # bytes in the archive
    size: int  # bytes when unpacked
    offset: int  # of its local record
    end: int  # position of the next header


def read_header(directory: bytes, position: int) -> Header:
    """The header at a position of the directory.

    Raises:
        struct.error: if there is none.
    """
    fields = CENTRAL.unpack_from(directory, position)
    signature, host, flags, method, crc, packed, size, *lengths, attributes, offset = fields
    if signature != b"PK\1\2":
        raise struct.error("no header")
    start = position + CENTRAL.size
    name_end = start + lengths[0]
    end = name_end + lengths[1] + lengths[2]
    if end > len(directory):
        raise struct.error("the directory ends within a header")
    if ONLY_IN_64 in (size, packed, offset):
        extra = directory[name_end : name_end + lengths[1]]
        size, packed, offset = _from_extra_field(extra, (size, packed, offset))
    mode = attributes >> 16 & FILE_TYPE if host == UNIX else 0
    is_regular = mode in (0, REGULAR)
    name = directory[start:name_end]
    return Header(name, is_regular, flags, method, crc, packed, size, offset, end)


def _from_extra_field(extra: bytes, numbers: Sequence[int]) -> list[int]:
    """Replace the numbers that are only in the extra field, which has them in this order."""
    position = 0
    while position < len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        position += 4
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, position))
            return [next(wide, n) if n == ONLY_IN_64 else n for n in numbers]
        position += length
    return list(numbers)


def read_directory(file: BinaryIO) -> tuple[bytes, int, int]:
    """The central directory.

    Returns:
        Its bytes; what is to be added to the offsets in it, where the archive is preceded by other
        data; and the number of its entries.

    Raises:
        ValueError: if it is not there.
    """
    length = file.seek(0, os.SEEK_END)
    start = max(0, length - END.size - 2**16 - LOCATOR_64.size - END_64.size)
    file.seek(start)
    tail = file.read()
    for match in re.finditer(re.escape(b"PK\5\6"), tail):
        end = match.start()
        if end + END.size <= len(tail):
            _, part, _, _, count, size, offset, comment = END.unpack_from(tail, end)
            if end + END.size + comment == len(tail):
                break
    else:
        raise ValueError("its end is missing")
    if part not in (0, 2**16 - 1):
        raise ValueError("it is one part of several")
    locator = end - LOCATOR_64.size
    if locator >= END_64.size and tail.startswith(b"PK\6\7", locator):
        end = locator - END_64.size
        signature, _, count, size, offset = END_64.unpack_from(tail, end)
        if signature != b"PK\6\6":
            raise ValueError("its directory is missing")
    shift = start + end - size - offset
    if shift < 0 or size > start + end:
        raise ValueError("a part of it is missing")
    file.seek(offset + shift)
    return file.read(size), shift, count
