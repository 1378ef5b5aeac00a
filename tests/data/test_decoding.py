"""common/data/decoding.py against Pillow, and against pixels worked out by hand."""

from __future__ import annotations

import io
import re
import struct
import zlib
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torchvision import transforms

from common.data.decoding import BrokenFile, decode, square
from pillow_reference import pictures, to_pillow


def put(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def rows(pixels: torch.Tensor) -> numpy.ndarray:
    """uint8 `[3, H, W]` as Pillow's `[H, W, 3]`."""
    assert pixels.dtype == torch.uint8
    assert pixels.shape[0] == 3
    return pixels.permute(1, 2, 0).numpy()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# File name, Pillow's mode, and how it is saved.
KINDS = [
    ("a.jpg", "RGB", {"quality": 90}),
    ("a.jpeg", "RGB", {"quality": 30, "subsampling": 0}),
    ("a.jpg", "RGB", {"subsampling": 1}),
    ("a.jpg", "RGB", {"progressive": True}),
    ("a.jpg", "RGB", {"exif": turned(3)}),
    ("a.jpg", "RGB", {"exif": turned(6)}),
    ("a.jpg", "L", {}),
    ("a.jpg", "CMYK", {"quality": 95}),
    ("a.png", "RGB", {}),
    ("a.png", "RGB", {"exif": turned(6)}),
    ("a.png", "L", {"transparency": 9}),
    ("a.png", "LA", {}),
    ("a.png", "RGBA", {}),
    ("a.png", "P", {}),
    ("a.png", "1", {}),
    ("a.gif", "P", {}),
    ("a.webp", "RGB", {"quality": 80}),
    ("a.webp", "RGBA", {"lossless": True}),
    ("a.bmp", "RGB", {}),
    ("a.tif", "RGB", {"compression": "tiff_lzw"}),
    ("a.tif", "CMYK", {}),
    ("a.ppm", "RGB", {}),
    ("a.pgm", "L", {}),
]


@pytest.mark.parametrize(("name", "mode", "options"), KINDS, ids=lambda value: str(value)[:30])
def test_every_kind_has_pillows_pixels(
    name: str, mode: str, options: dict[str, object], tmp_path: Path
) -> None:
    """To the bit; the orientation that a camera noted is ignored."""
    image = to_pillow(pictures(1, (53, 70)))[0]
    if mode.endswith("A"):
        image.putalpha(image.convert("L"))
    image = image.convert(mode)
    path = put(tmp_path / name, image, **options)
    with Image.open(path) as file:
        assert file.mode == mode
        expected = numpy.array(file.convert("RGB"))
    assert expected.shape == (53, 70, 3)
    assert numpy.array_equal(rows(decode(path)), expected)


def test_the_first_picture_of_several_counts(tmp_path: Path) -> None:
    first, second = to_pillow(pictures(2, (20, 30)))
    for name in ("a.gif", "a.webp"):
        path = tmp_path / name
        first.save(path, save_all=True, append_images=[second])
        with Image.open(path) as file:
            assert file.n_frames == 2
            assert numpy.array_equal(rows(decode(path)), numpy.array(file.convert("RGB"))), name


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["sequential", "progressive"])
def test_a_damaged_jpeg_is_what_pillow_makes_of_it(
    options: dict[str, object], tmp_path: Path
) -> None:
    """Cut off at any point it is refused; with other bytes it has Pillow's pixels or is refused."""
    path = put(tmp_path / "a.jpg", to_pillow(pictures(1, (40, 60)))[0], **options)
    content = path.read_bytes()
    damaged = [content[:length] for length in range(0, len(content), len(content) // 50)]
    damaged += [content[:-1], content[:-2]]
    generator = numpy.random.default_rng(0)
    for _ in range(60):
        other = bytearray(content)
        other[generator.integers(len(content))] = generator.integers(256)
        damaged.append(bytes(other))
    refused = []
    for index, text in enumerate(damaged):
        path.write_bytes(text)
        try:
            with Image.open(io.BytesIO(text)) as file:
                expected = numpy.array(file.convert("RGB"))
        except (OSError, SyntaxError):
            refused.append(index)
            with pytest.raises(BrokenFile, match=f"^{re.escape(str(path))} cannot be decoded \\("):
                decode(path)
        else:
            assert numpy.array_equal(rows(decode(path)), expected), index
    cut = len(damaged) - 60
    assert refused[:cut] == list(range(cut))
    assert len(refused) < len(damaged)


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


def test_an_absurd_size_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    png = tmp_path / "a.png"
    png.write_bytes(png_header(40000, 40000))
    jpeg = put(tmp_path / "a.jpg", to_pillow(pictures(1, (16, 16)))[0])
    content = bytearray(jpeg.read_bytes())
    frame = content.index(b"\xff\xc0") + 5  # the frame's height and width
    content[frame : frame + 4] = struct.pack(">HH", 60000, 60000)
    jpeg.write_bytes(content)
    for path in (png, jpeg):
        with pytest.raises(BrokenFile, match=r"cannot be decoded .*exceeds limit"):
            decode(path)


@pytest.mark.parametrize(
    "kind",
    [numpy.dtype("<f4"), numpy.dtype("<i4"), numpy.dtype("<u4")],
    ids=["float", "signed 32 bits", "32 bits"],
)
def test_values_of_other_than_8_or_16_bits_are_refused(kind: numpy.dtype, tmp_path: Path) -> None:
    values = (numpy.arange(256).reshape(16, 16) / 255).astype(kind)
    if kind == numpy.dtype("<u4"):
        path = put(tmp_path / "a.tif", Image.fromarray(values.astype("<i4")))
        content = path.read_bytes()  # its format of samples: 2 is signed, 1 unsigned
        tag = content.index(struct.pack("<HHI", 339, 3, 1)) + 8
        path.write_bytes(content[:tag] + b"\x01" + content[tag + 1 :])
    else:
        path = put(tmp_path / "a.tif", Image.fromarray(values))
    with pytest.raises(BrokenFile, match=r"a\.tif cannot be decoded .*neither of 8 nor of 16 bits"):
        decode(path)


def test_names_that_are_not_utf_8_can_be_printed(tmp_path: Path) -> None:
    path = Path(str(tmp_path), b"\xff.jpg".decode(errors="surrogateescape"))
    path.write_bytes(b"no picture")
    with pytest.raises(BrokenFile, match=r"\\xff\.jpg cannot be decoded") as caught:
        decode(path)
    str(caught.value).encode("utf-8")


# Modes and sizes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size",
    [
        (64, 64),
        (40, 50),
        (80, 48),  # 80 · 32/48 = 53.3
        (47, 33),  # 47 · 32/33 = 45.6, cut off to 45; the offset 6.5 is rounded to 6
        (375, 500),  # 42.7, cut off to 42
        (67, 32),  # cut only; the offset 17.5 is rounded to 18
        (32, 67),
        (32, 90),
        (8, 8),
        (1, 7),
    ],
    ids=str,
)
def test_other_sizes_are_resized_and_cut_as_by_torchvision(
    size: tuple[int, int], tmp_path: Path
) -> None:
    """Of width and height the shorter becomes 32 pixels, the middle is kept."""
    image = to_pillow(pictures(1, size[::-1]))[0]
    path = put(tmp_path / "picture.png", image)
    bicubic = transforms.InterpolationMode.BICUBIC
    expected = transforms.CenterCrop(32)(transforms.Resize(32, bicubic)(image))
    result = square(decode(path), 32)
    assert numpy.array_equal(rows(result), numpy.array(expected))


def test_all_modes_become_rgb(tmp_path: Path) -> None:
    """Pixel by pixel for lossless files, worked out by hand."""
    levels = torch.arange(256, dtype=torch.uint8).view(16, 16)
    coloured = torch.stack([levels, 255 - levels, levels // 2, levels], dim=2)  # the last: alpha
    put(tmp_path / "alpha.png", Image.fromarray(coloured.numpy()))
    put(tmp_path / "grey.png", Image.fromarray(levels.numpy()))
    put(tmp_path / "grey_alpha.png", Image.fromarray(coloured[..., :2].contiguous().numpy()))
    palette = Image.fromarray(levels.numpy(), "P")
    palette.putpalette([part for index in range(256) for part in (255 - index, index, 7)])
    put(tmp_path / "palette.png", palette)
    put(tmp_path / "palette.gif", palette)
    bits = Image.fromarray((levels >= 100).numpy())
    assert bits.mode == "1"
    put(tmp_path / "bits.png", bits)

    greys = levels[..., None].expand(-1, -1, 3)
    by_palette = torch.stack([255 - levels, levels, torch.full_like(levels, 7)], dim=2)
    expected = {
        "alpha.png": coloured[..., :3],  # the colour below the transparency
        "grey.png": greys,
        "grey_alpha.png": greys,
        "palette.png": by_palette,
        "palette.gif": by_palette,
        "bits.png": 255 * (greys >= 100).to(torch.uint8),
    }
    for name, pixels in expected.items():
        assert numpy.array_equal(rows(square(decode(tmp_path / name), 16)), pixels.numpy()), name


@pytest.mark.parametrize(
    ("name", "kind", "mode"),
    [
        ("picture.png", "<u2", "I;16"),
        ("picture.tif", "<u2", "I;16"),
        ("picture.tif", ">u2", "I;16B"),
        ("picture.ppm", "<i4", "I"),
    ],
)
def test_16_bits_are_scaled_to_8(name: str, kind: str, mode: str, tmp_path: Path) -> None:
    """65535 = 257 · 255: of 16 bits, 257 levels make one."""
    levels = numpy.arange(256).reshape(16, 16)
    for remainder in (0, 256):
        deep = (257 * levels + remainder).clip(0, 65535).astype(kind)
        path = put(tmp_path / name, Image.fromarray(deep))
        with Image.open(path) as image:
            assert image.mode == mode
        for channel in square(decode(path), 16).numpy():
            assert numpy.array_equal(channel, levels)


@pytest.mark.filterwarnings("error")  # Pillow warns when such a palette is converted to RGB at once
@pytest.mark.parametrize("transparency", [bytes(range(256)), 9], ids=["of each", "of one"])
def test_palette_with_transparency(transparency: bytes | int, tmp_path: Path) -> None:
    """The colour below the transparency counts, as for the other modes."""
    levels = numpy.arange(256, dtype=numpy.uint8).reshape(16, 16)
    palette = Image.fromarray(levels).convert("P")
    palette.putpalette([part for index in range(256) for part in (255 - index, index, 7)])
    path = put(tmp_path / "palette.png", palette, transparency=transparency)
    with Image.open(path) as image:
        assert (image.mode, image.info["transparency"]) == ("P", transparency)
    expected = numpy.stack([255 - levels, levels, numpy.full_like(levels, 7)], axis=2)
    assert numpy.array_equal(rows(square(decode(path), 16)), expected)


def test_cmyk_jpeg(tmp_path: Path) -> None:
    """Flat, so that JPEG keeps it: light passes (255 − ink)/255 of each ink and of black."""
    inks = numpy.array([200, 100, 20, 50], dtype=numpy.uint8)
    flat = Image.fromarray(numpy.broadcast_to(inks, (16, 16, 4)).copy(), "CMYK")
    path = put(tmp_path / "inks.jpg", flat, quality=100)
    expected = (255 - inks[:3].astype(float)) * (255 - 50) / 255
    assert numpy.abs(rows(square(decode(path), 16)) - expected).max() <= 3
