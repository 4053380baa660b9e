"""Pictures of every usual kind, and ways to damage a file of any kind."""

from __future__ import annotations

import io
import random
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from PIL import Image

__all__ = ["CORPUS", "ODD", "Damage", "damages"]

SIDE = 40


def _noise(mode: str = "RGB", size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    pixels = np.random.default_rng(7).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def _file(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _corpus() -> dict[str, bytes]:
    plain = _noise()
    deep = Image.fromarray(np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE) * 37)
    frames = {"save_all": True, "append_images": [plain.rotate(90), plain.rotate(180)]}
    found = {
        "jpeg": _file(plain, "JPEG"),
        "jpeg progressive": _file(plain, "JPEG", progressive=True),
        "jpeg cmyk": _file(plain.convert("CMYK"), "JPEG"),
        "jpeg grey": _file(plain.convert("L"), "JPEG"),
        "png": _file(plain, "PNG"),
        "png palette": _file(plain.convert("P"), "PNG", transparency=3),
        "png rgba": _file(_noise("RGBA"), "PNG"),
        "png 16-bit": _file(deep, "PNG"),
        "png 1-bit": _file(plain.convert("1"), "PNG"),
        "png moving": _file(plain, "PNG", **frames),
        "webp": _file(plain, "WEBP"),
        "webp lossless": _file(plain, "WEBP", lossless=True),
        "webp moving": _file(plain, "WEBP", **frames),
        "gif": _file(plain, "GIF"),
        "gif moving": _file(plain, "GIF", **frames),
        "tiff": _file(plain, "TIFF"),
        "tiff lzw": _file(plain, "TIFF", compression="tiff_lzw"),
        "tiff cmyk": _file(plain.convert("CMYK"), "TIFF"),
        "tiff 16-bit": _file(deep, "TIFF"),
        "tiff float": _file(Image.fromarray(np.asarray(deep, np.float32)), "TIFF"),
        "bmp": _file(plain, "BMP"),
        "line": _file(_noise(size=(1, 3000)), "PNG"),
        "row": _file(_noise(size=(3000, 1)), "JPEG"),
        "dot": _file(_noise(size=(1, 1)), "GIF"),
    }
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        found[f"jpeg turned {turn}"] = _file(plain, "JPEG", exif=exif)
    return found


CORPUS = _corpus()
"""Files that are read, by what they are."""


def _png(width: int, height: int, body: bytes, depth: int = 8, colour: int = 2) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _bmp(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head


def _gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b";"


ODD: dict[str, bytes] = {
    "bomb of zeros": _png(20_000, 20_000, zlib.compress(bytes(20_000_000), 9)),
    "bomb within the limit of sides": _png(50_001, 1_000, zlib.compress(bytes(1_000))),
    "header of 2^31 pixels a side": _png(2**31 - 1, 2**31 - 1, zlib.compress(b"\0" * 100)),
    "body that inflates to 100 MB": _png(8, 8, zlib.compress(bytes(100_000_000), 9)),
    "png of 0x0": _png(0, 0, zlib.compress(b"")),
    "png of 0xN": _png(0, 9, zlib.compress(b"")),
    "png of odd depth": _png(4, 4, zlib.compress(bytes(100)), depth=3),
    "png of odd colours": _png(4, 4, zlib.compress(bytes(100)), colour=5),
    "bmp of 0x0": _bmp(0, 0),
    "bmp of negative sides": _bmp(-5, -5),
    "bmp of 2^30 a side": _bmp(2**30, 2**30),
    "gif of 0x0": _gif(0, 0),
    "gif of 65535 a side": _gif(65535, 65535),
    "nothing": b"",
    "text": b"Is there a dog?\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "html": b"<!doctype html><html><body>404</body></html>",
    "zip": b"PK\x05\x06" + bytes(18),
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    "pdf": b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n",
    "zeros": bytes(5_000),
    "ones": b"\xff" * 5_000,
}
"""Files that are no pictures, or say that they are larger than they are."""


@dataclass(frozen=True)
class Damage:
    """What to do to a file; places are shares of its length."""

    kind: str
    place: float
    size: int
    seed: int

    def __call__(self, content: bytes, other: bytes = b"") -> bytes:
        """Return the damaged content.

        Args:
            content: of the file.
            other: of another file, for `splice`.
        """
        at = int(self.place * len(content))
        rng = random.Random(self.seed)
        end = min(at + self.size, len(content))
        match self.kind:
            case "cut":
                return content[:at]
            case "flip":
                changed = bytearray(content)
                for _ in range(min(self.size, 64)):
                    if changed:
                        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
                return bytes(changed)
            case "noise":
                return content[:at] + rng.randbytes(end - at) + content[end:]
            case "insert":
                return content[:at] + rng.randbytes(self.size) + content[at:]
            case "lose":
                return content[:at] + content[end:]
            case "repeat":
                return content[:end] + content[at:end] * 3 + content[end:]
            case "large":  # as a size that says far too much
                return content[:at] + b"\xff\xff\xff\x7f" + content[at + 4 :]
            case "splice":
                return content[:at] + other[int(self.place * len(other)) :]
        raise AssertionError(self.kind)


KINDS = ("cut", "flip", "noise", "insert", "lose", "repeat", "large", "splice")


def damages() -> st.SearchStrategy[Damage]:
    """Return a strategy of damages."""
    return st.builds(
        Damage,
        kind=st.sampled_from(KINDS),
        place=st.floats(0, 1, exclude_max=True),
        size=st.integers(1, 400),
        seed=st.integers(0, 2**31),
    )
