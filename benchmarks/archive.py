"""A zip archive against the folder that is packed in it: listing, reading, decoding, memory.

    python benchmarks/archive.py --data-root DIR

DIR holds images, in any folders. Without it, 10,000 generated JPEGs of 32 px are used. All files
are in the page cache of a local disk: on a network file system, where each file is a request, a
folder costs more. In the part about memory the other side is Python's zipfile.
"""

from __future__ import annotations

import io
import multiprocessing
import random
import tempfile
import zipfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from PIL import Image

from common.data.decoding import decode
from common.data.folder import list_images
from common.data.listing import Listing, find_split
from common.data.shapes import shapes
from common.runtime.ranks import Ranks
from contest import Options, compare

GENERATED, READ = 10_000, 2000  # images: in the folder, and of them read in a round
ENTRIES = 400_000  # of the archive whose memory is measured
RANKS = Ranks(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class ArchiveOptions(Options):
    data_root: str = ""  # images; default: generated ones


def pack(folder: Path, path: Path, method: int) -> Path:
    with zipfile.ZipFile(path, "w", method, strict_timestamps=False) as archive:
        for file in list_images(folder):
            archive.write(file, file.relative_to(folder).as_posix())
    return path


def listing(root: Path) -> Listing:
    with redirect_stdout(io.StringIO()):
        return find_split(root, "train", RANKS)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure_memory(path: Path, name: str) -> None:
    """Print what an open archive adds to a process's memory."""
    before = resident_bytes()
    opened = zipfile.ZipFile(path) if name == "zipfile" else listing(path).files
    added = resident_bytes() - before
    print(f"  {name:<44} {added / 1e6:6.0f} MB  ({added / ENTRIES:.0f} bytes an entry)", flush=True)
    del opened


def memory(folder: Path) -> None:
    path = folder / "entries.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(ENTRIES):
            name = f"n{index // 1300:08}"
            archive.writestr(f"train/{name}/{name}_{index}.JPEG", b"")
    print(f"memory of a process that has opened an archive of {ENTRIES:,} entries")
    for name in ("zipfile", "ours"):
        process = multiprocessing.get_context("spawn").Process(
            target=measure_memory, args=(path, name)
        )
        process.start()
        process.join()
    compare(
        f"opening it, {ENTRIES:,} entries (ours also sorts and labels them)",
        {"zipfile": lambda: zipfile.ZipFile(path).close(), "ours": lambda: listing(path)},
        Options(rounds=3),
        items=ENTRIES,
        unit="entry",
        core_time=True,
    )


def main(options: ArchiveOptions) -> None:
    torch.set_num_threads(1)  # as a loader's worker has
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        root = Path(options.data_root or folder / "images")
        if not options.data_root:
            root.mkdir()
            for index, image in enumerate(shapes(GENERATED, 32, seed=0)[0]):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / f"{index}.jpg")
        roots = {
            "folder": root,
            "zip, deflated": pack(root, folder / "deflated.zip", zipfile.ZIP_DEFLATED),
            "zip, stored": pack(root, folder / "stored.zip", zipfile.ZIP_STORED),
        }
        listings = {name: listing(path) for name, path in roots.items()}
        count = len(listings["folder"].names)
        order = random.Random(0).sample(range(count), min(count, READ))

        def read(name: str) -> None:
            for index in order:
                file = listings[name].files[index]
                file.read_bytes() if isinstance(file, Path) else file.read()

        def decode_all(name: str) -> None:
            for index in order:
                decode(listings[name].files[index])

        for title, work, items in (
            (f"listing {count:,} images", lambda name: listing(roots[name]), count),
            ("reading images in random order", read, len(order)),
            ("reading and decoding them", decode_all, len(order)),
        ):
            contestants = {name: lambda work=work, name=name: work(name) for name in roots}
            compare(title, contestants, options, items, core_time=True)
        memory(folder)


if __name__ == "__main__":
    main(tyro.cli(ArchiveOptions, description=__doc__))
