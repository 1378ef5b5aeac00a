"""The image files of a zip archive, used as those of a folder; nothing is unpacked to disk.

Python's zipfile keeps half a kilobyte of objects for each entry, which every loader process would
copy. Here the archive's directory stays the block of bytes that it is in the file, with the
position of each image's record in it.
"""

from __future__ import annotations

import os
import re
import struct
import threading
import zlib
from collections.abc import Collection, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from common.data.decoding import shown
from common.data.folder import Found, by_folder, is_image
from common.data.zip_records import (
    DEFLATED,
    ENCRYPTED,
    LOCAL,
    STORED,
    Header,
    read_directory,
    read_header,
)
from common.runtime.errors import UserError

# As many bytes as the pixels have of the largest image that Pillow opens.
LARGEST = 2**29
LONGEST_NAME = 4096  # bytes, as paths on Linux
# An empty part, "." or ".."; separators of Windows, which would hide parts; the end of a C text.
UNSAFE = re.compile(rb"(?:^|/)\.{0,2}(?:/|\Z)|[\\\0]")
CURRENT_FOLDER = re.compile(rb"\A(?:\./)+")  # as in "./a.jpg"; some programs write it
UNSAFE_REASON = "entries whose names are no relative paths with '/'"


class Entry(NamedTuple):
    """An image file in an archive."""

    archive: str  # path
    header: Header

    def __fspath__(self) -> str:
        """For messages: the archive's path and the name in it."""
        return f"{self.archive}/{os.fsdecode(self.header.name)}"

    def read(self) -> np.ndarray:
        """Its content, uint8 `[size]`.

        Raises:
            OSError: if the archive cannot be read.
            ValueError: if the entry is damaged, encrypted, or of another compression method.
        """
        header = self.header
        if header.flags & ENCRYPTED:
            raise ValueError("it is encrypted")
        if header.method not in (STORED, DEFLATED):
            raise ValueError(f"its compression method {header.method} is neither store nor deflate")
        packed = self._packed()
        content = packed
        if header.method == DEFLATED:
            unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
            try:
                # A byte more than stated shows a larger content without unpacking all of it.
                content = bytearray(unpacker.decompress(packed, header.size + 1))
            except zlib.error:
                raise ValueError("its compressed content is damaged") from None
        if len(content) != header.size or zlib.crc32(content) != header.crc:
            raise ValueError("its size or checksum differs from what the archive states")
        return np.frombuffer(content, np.uint8)

    def _packed(self) -> bytearray:
        """Its bytes in the archive."""
        header = self.header
        file = _open(self.archive, os.getpid(), threading.get_ident())
        file.seek(header.offset)
        # Extra fields are rarely longer than 64 bytes, so that one request reads the entry.
        block = bytearray(file.read(LOCAL.size + len(header.name) + 64 + header.packed))
        if len(block) < LOCAL.size:
            raise ValueError("the archive ends before it")
        signature, name_length, extra_length = LOCAL.unpack_from(block)
        start = LOCAL.size + name_length + extra_length
        if signature != b"PK\3\4" or block[LOCAL.size : start - extra_length] != header.name:
            raise ValueError("the archive has something else in its place")
        block += file.read(max(0, start + header.packed - len(block)))
        return block[start : start + header.packed]


@cache
def _open(path: str, process: int, thread: int) -> BinaryIO:
    """The archive, opened once by each thread of each process: they must not share a position."""
    return Path(path).open("rb")


class Entries(Sequence[Entry]):
    """Image files of an archive, in two blocks of memory, as `Files` are."""

    def __init__(self, archive: Path, directory: bytes, shift: int, positions: np.ndarray) -> None:
        self.archive = archive
        self.directory = directory
        self.shift = shift
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Entry:
        header = read_header(self.directory, int(self.positions[index]))
        header = header._replace(offset=header.offset + self.shift)
        return Entry(os.fspath(self.archive), header)


class Archive:
    """The directory of a zip archive.

    Attributes:
        positions: of each usable entry's header in the directory, by name; names of folders end
            with "/". Of entries with the same name the last is used, as when they are unpacked.
        problems: why entries cannot be used as images, by name.
        left_out: reason and name of each entry that is not used, whatever it is.

    Raises:
        UserError: if the file cannot be read, or is not a complete zip archive.
    """

    def __init__(self, path: Path) -> None:
        _open.cache_clear()  # the file may have been replaced
        self.path = path
        self.positions: dict[str, int] = {}
        self.problems: dict[str, str] = {}
        self.left_out: list[tuple[str, str]] = []
        try:
            with path.open("rb") as file:
                self.directory, self.shift, count = read_directory(file)
            position = found = 0
            while position < len(self.directory):
                position = self._add(position)
                found += 1
            if (found - count) % 2**16:  # the short form of the number has 16 bits
                raise ValueError(f"it states {count} entries and has {found}")
        except OSError as error:
            raise UserError(
                f"--data-root {shown(path)} cannot be read ({error.strerror})"
            ) from error
        except (ValueError, struct.error) as error:
            raise UserError(
                f"--data-root {shown(path)} is not a complete zip archive ({error}); copy or make "
                "it again, or give a folder"
            ) from error

    def _add(self, position: int) -> int:
        """Note the entry at a position; returns the next one's."""
        header = read_header(self.directory, position)
        plain = CURRENT_FOLDER.sub(b"", header.name)
        name = os.fsdecode(plain)
        if not plain and header.name:
            return header.end  # "./" itself
        if UNSAFE.search(plain.removesuffix(b"/")) or len(plain) > LONGEST_NAME:
            self.left_out.append((UNSAFE_REASON, name))
            return header.end
        if name in self.positions and not name.endswith("/"):
            self.left_out.append(("entries that a later one of the same name replaces", name))
            self.problems.pop(name, None)
        self.positions[name] = position
        if not header.is_regular:
            self.problems[name] = "not regular files"
        elif max(header.size, header.packed) > LARGEST:
            self.problems[name] = f"larger than {LARGEST >> 20} MiB"
        return header.end

    def folder(self, name: str) -> ArchiveFolder:
        """A folder in it; "" is the whole."""
        return ArchiveFolder(self, f"{name}/" if name else "")

    def top(self) -> str:
        """The one folder at the top that has all images; "" where there is none."""
        tops = {
            name.partition("/")[0] if "/" in name else ""
            for name in self.positions
            if is_image(name) and "/." not in f"/{name}"
        }
        return tops.pop() if len(tops) == 1 else ""


class ArchiveFolder:
    """A folder in an archive, with the methods of `Folder`."""

    def __init__(self, archive: Archive, prefix: str) -> None:
        self.archive = archive
        self.prefix = prefix
        self.path = archive.path / prefix

    def _has(self, name: str) -> bool:
        return name.startswith(self.prefix)

    def _names(self) -> list[str]:
        """Of all entries below it, relative to it."""
        return [name[len(self.prefix) :] for name in filter(self._has, self.archive.positions)]

    def exists(self) -> bool:
        return not self.prefix or any(map(self._has, self.archive.positions))

    def folders(self) -> list[str]:
        return sorted({name.partition("/")[0] for name in self._names() if "/" in name})

    def folder(self, name: str) -> ArchiveFolder:
        return ArchiveFolder(self.archive, f"{self.prefix}{name}/")

    def files(self, names: Sequence[str]) -> Entries:
        positions = (self.archive.positions[self.prefix + name] for name in names)
        return Entries(
            self.archive.path,
            self.archive.directory,
            self.archive.shift,
            np.fromiter(positions, np.int64, len(names)),
        )

    def find(self, only: Collection[str] | None = None) -> Found:
        found = Found(only)
        for reason, name in self.archive.left_out:
            if self._has(name):
                found.leave_out(reason, name.removeprefix(self.prefix))
            elif reason == UNSAFE_REASON:  # in no folder, so told with each
                found.leave_out(reason, name)
        entered = {"": True}
        for name in sorted(self._names(), key=by_folder):
            folder, _, file = name.rpartition("/")
            if folder not in entered:
                is_used = True
                for part in accumulate(folder.split("/"), "{}/{}".format):
                    if part not in entered:
                        entered[part] = is_used and found.enter(part)
                    is_used = entered[part]
            if file and entered[folder]:
                key = self.prefix + name
                found.add(name, lambda key=key: self.archive.problems.get(key, ""))
        return found
