"""Decoding pictures: the one place where untrusted image bytes become RGB pixels.

Resizing and normalising belong to the Perceiver; here a picture is opened, turned upright by its
EXIF orientation, flattened to RGB and held to a pixel limit before any pixel is decoded.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias, Union

from ipn_core.errors import ImageError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    ImageLike: TypeAlias = Union[str, os.PathLike[str], bytes, "Image.Image", "np.ndarray"]

__all__ = [
    "FORMATS",
    "KEPT_SIDE",
    "MAX_PIXELS",
    "check_image",
    "content_key",
    "crop",
    "load_image",
    "shrunk",
]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What is read, JPEG with several pictures (MPO, as phones write it) among it. Of the forty other
formats that Pillow knows nobody sends any, and for one, EPS, it runs Ghostscript."""

MAX_PIXELS = 50_000_000
"""Largest accepted width × height; larger files are refused before they are decoded."""
KEPT_SIDE = 2048
"""Pixels of the longer side of a picture that a server keeps: more than any encoder looks at, and
what a stranger's picture may take of the memory while it waits is bounded."""
_PART = 1_000_000
"""Pixels of a 16-bit picture that are scaled at once: in double precision they need eight bytes."""


def load_image(source: ImageLike, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open a picture as upright RGB.

    Args:
        source: a path, encoded bytes, a PIL image, or an array (h, w), (h, w, 3) or (h, w, 4),
            uint8.
        max_pixels: the largest width × height to accept.

    Returns:
        A PIL image in mode RGB, transparent parts on white, first frame of an animation.

    Raises:
        ImageError: the file is missing, no image, damaged, empty, or over the pixel limit.
    """
    from PIL import Image, ImageOps

    with _explained(source, max_pixels):
        image = _open(source, max_pixels)
        if image.format == "PNG" and not isinstance(source, Image.Image):
            # Once it has all pixels, Pillow does not miss the rest of a file.
            image.verify()
            image = _open(source, max_pixels)
        image.load()
        image = ImageOps.exif_transpose(image)
        return _to_rgb(image)


def check_image(source: ImageLike, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Find out from its beginning whether a picture can be opened; it may still be cut short.

    Args:
        source: as for `load_image`.
        max_pixels: the largest width × height to accept.

    Returns:
        Its width and height as they are stored, before it is turned upright.

    Raises:
        ImageError: the file is missing, no image, empty, or over the pixel limit.
    """
    with _explained(source, max_pixels):
        width, height = _open(source, max_pixels).size
    return width, height


def shrunk(image: Image.Image, longest: int) -> Image.Image:
    """Return a picture whose longer side has so many pixels at most."""
    scale = longest / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height))


@contextmanager
def _explained(source: ImageLike, max_pixels: int) -> Iterator[None]:
    """Turn whatever decoders raise into an `ImageError`, and their warnings into nothing."""
    from PIL import Image, UnidentifiedImageError

    name = _describe(source)
    try:
        with warnings.catch_warnings():
            # Pillow warns of bombs at a limit of its own, and of oddities that harm nobody.
            warnings.simplefilter("ignore")
            yield
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"no such file: {name}. Give the path of a picture.") from None
    except IsADirectoryError:
        raise ImageError(f"{name} is a folder. Give the path of a picture.") from None
    except PermissionError:
        raise ImageError(f"{name} may not be read. Check its permissions.") from None
    except UnidentifiedImageError:
        raise ImageError(
            f"{name} is not an image of a kind that is read. "
            "Give a PNG, JPEG, WebP, GIF, BMP or TIFF file."
        ) from None
    except Image.DecompressionBombError as error:
        # Raised before there is an image to ask; only the text has the size.
        found = re.search(r"\d+", str(error))
        got = f"{int(found[0]):,}" if found else "far more"
        raise ImageError(_too_large(name, got, max_pixels)) from None
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, OverflowError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            # It could not be opened, such as a name that is too long.
            raise ImageError(
                f"{name} cannot be read ({error.strerror}). Give the path of a picture."
            ) from None
        raise ImageError(
            f"{name} is damaged or cut short ({error}). Save or fetch it again."
        ) from None
    except Exception as error:  # decoders of damaged files raise whatever they stumble over
        raise ImageError(
            f"{name} cannot be decoded ({type(error).__name__}: {error}). Save or fetch it again."
        ) from None


def content_key(image: Image.Image) -> str:
    """Return a key of the decoded pixels, the same for the same picture in any file format."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{image.mode}:{image.width}x{image.height}:".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def crop(image: Image.Image, edges: Sequence[float]) -> Image.Image:
    """Cut a part out of a picture, at least one pixel a side.

    Args:
        image: any picture.
        edges: left, top, right and bottom as fractions of its sides.
    """
    left, top, right, bottom = edges
    x = min(round(left * image.width), image.width - 1)
    y = min(round(top * image.height), image.height - 1)
    end = (max(round(right * image.width), x + 1), max(round(bottom * image.height), y + 1))
    return image.crop((x, y, *end))


def _describe(source: ImageLike) -> str:
    if isinstance(source, (str, os.PathLike)):
        return f"'{os.fspath(source)}'"
    if isinstance(source, bytes):
        return f"the image ({len(source)} bytes)"
    return "the image"


def _open(source: ImageLike, max_pixels: int) -> Image.Image:
    """Open a picture whose size is accepted; files are not decoded yet."""
    image = _opened(source)
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{_describe(source)} is empty ({width}×{height} pixels).")
    if width * height > max_pixels:
        raise ImageError(_too_large(_describe(source), f"{width}×{height}", max_pixels))
    return image


def _opened(source: ImageLike) -> Image.Image:
    from PIL import Image

    if isinstance(source, Image.Image):
        return source
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source), formats=FORMATS)
    if isinstance(source, (str, os.PathLike)):
        return Image.open(_checked(os.fspath(source)), formats=FORMATS)
    import numpy as np

    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8:
            raise ImageError(f"an image array must be uint8, got {source.dtype}.")
        if not (source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (3, 4))):
            raise ImageError(
                f"an image array must be (h, w), (h, w, 3) or (h, w, 4), got {source.shape}."
            )
        if 0 in source.shape:
            raise ImageError(f"the image is empty: {source.shape}.")
        return Image.fromarray(source)
    raise ImageError(
        f"an image must be a path, bytes, a PIL image or an array, got {type(source).__name__}."
    )


def _checked(path: str) -> str:
    """Return a path, unless it could not be opened or would be waited for, such as a pipe."""
    if "\0" in path:
        raise ImageError("a path cannot hold a null character. Give the path of a picture.")
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise ImageError(f"'{path}' is no ordinary file. Give the path of a picture.")
    return path


def _too_large(name: str, got: str, max_pixels: int) -> str:
    return f"{name} has {got} pixels; at most {max_pixels:,} are accepted. Scale it down first."


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode in ("I", "I;16", "I;16L", "I;16B", "F"):
        image = _to_eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale a 16-bit or float picture, which Pillow would clip at 255; a part at a time."""
    import numpy as np
    from PIL import Image

    raw = np.asarray(image)
    parts = np.array_split(raw.reshape(-1), raw.size // _PART + 1)
    peaks = (np.nan_to_num(part.astype(np.float64)).max(initial=0) for part in parts)
    top = 65535.0 if any(peak > 255 for peak in peaks) else 255.0
    scaled = [
        (np.clip(np.nan_to_num(part.astype(np.float64)) / top, 0, 1) * 255).astype(np.uint8)
        for part in parts
    ]
    return Image.fromarray(np.concatenate(scaled).reshape(raw.shape))
