"""Decoding: any picture becomes upright RGB, and anything else one clear message."""

from __future__ import annotations

import io
import os
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ipn_core.errors import ImageError
from ipn_core.images import check_image, content_key, crop, load_image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


RED = Image.new("RGB", (6, 4), (255, 0, 0))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_usual_format_is_read(kind: str) -> None:
    image = load_image(encoded(RED, kind))
    assert (image.mode, image.size) == ("RGB", (6, 4))
    red, green, blue = image.getpixel((3, 2))
    assert red > 240
    assert green < 20
    assert blue < 20


def test_paths_bytes_images_and_arrays_give_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(RED))
    sources = [path, str(path), path.read_bytes(), RED, np.asarray(RED)]
    assert len({content_key(load_image(s)) for s in sources}) == 1


def test_a_crop_is_cut_at_whole_pixels_and_never_empty_or_outside() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    image = Image.fromarray(pixels)
    assert np.array_equal(crop(image, (0.5, 0.25, 1, 0.75)), pixels[1:3, 3:6])
    assert np.array_equal(crop(image, (0, 0, 1, 1)), pixels)
    assert np.array_equal(crop(image, (0.34, 0.26, 0.35, 0.27)), pixels[1:2, 2:3])
    assert np.array_equal(crop(image, (0.999, 0.999, 1, 1)), pixels[3:4, 5:6])


def test_exif_turns_the_picture_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(encoded(RED, "JPEG", exif=exif)).size == (4, 6)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_become_white(mode: str) -> None:
    clear = Image.new("RGBA", (2, 2), (9, 9, 9, 0))
    data = encoded(clear.convert(mode)) if mode != "P" else encoded(clear, "GIF")
    assert load_image(data).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    deep = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert [load_image(encoded(deep)).getpixel((x, 0))[0] for x in range(3)] == [0, 127, 255]


@pytest.mark.parametrize("mode", ["I;16", "F", "I"])
def test_a_deep_picture_is_scaled_in_little_memory_and_alike_in_every_part(mode: str) -> None:
    ramp = np.arange(4_000_000, dtype=np.uint16).reshape(2000, 2000) % 60_000
    kinds = {"I;16": np.uint16, "F": np.float32, "I": np.int32}
    deep = Image.fromarray(ramp.astype(kinds[mode]))
    assert deep.mode == mode
    tracemalloc.start()
    try:
        image = load_image(deep)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    expected = (ramp / 65535.0 * 255).astype(np.uint8)
    assert np.array_equal(np.asarray(image)[:, :, 0], expected)
    assert peak < 20 * ramp.size, "bytes a pixel"


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV", "LAB", "F", "I"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert load_image(Image.new(mode, (3, 2))).mode == "RGB"


def test_an_animation_gives_its_first_frame() -> None:
    blue = Image.new("RGB", RED.size, "blue")
    data = encoded(RED, "GIF", save_all=True, append_images=[blue])
    assert load_image(data).getpixel((0, 0))[0] > 240


def test_the_key_is_of_the_pixels_not_of_the_file() -> None:
    assert content_key(load_image(encoded(RED, "PNG"))) == content_key(
        load_image(encoded(RED, "BMP"))
    )
    turned = load_image(RED.transpose(Image.Transpose.ROTATE_90))
    assert content_key(turned) != content_key(load_image(RED))


def test_a_picture_over_the_limit_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = encoded(Image.new("1", (9_000, 9_000)))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="9000×9000 pixels; at most 50,000,000 are accepted"):
        load_image(data)


def test_a_bomb_that_pillow_itself_refuses_is_an_image_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(ImageError, match="has 24 pixels; at most 50,000,000 are accepted"):
        load_image(encoded(RED))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_file_cut_short_is_refused(kind: str, part: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    with pytest.raises(ImageError, match=r"damaged or cut short|not an image|cannot be decoded"):
        load_image(data[: int(len(data) * part)])


@pytest.mark.parametrize("lost", [5, 12, 13, 20])
def test_a_png_that_lacks_no_pixel_but_its_end_is_refused(lost: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    path.write_bytes(encoded(RED)[:-lost])
    for source in (path, path.read_bytes()):
        with pytest.raises(ImageError, match="damaged or cut short"):
            load_image(source)


def test_a_moving_png_gives_its_first_frame(tmp_path: Path) -> None:
    blue = Image.new("RGB", RED.size, "blue")
    path = tmp_path / "a.png"
    path.write_bytes(encoded(RED, save_all=True, append_images=[blue]))
    assert load_image(path).getpixel((0, 0)) == (255, 0, 0)


def test_what_pillow_thinks_of_a_damaged_file_is_no_news(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(ImageError):
        load_image(encoded(RED, "TIFF")[:-20])
    assert not recwarn.list


@pytest.mark.timeout(20)
def test_what_is_no_ordinary_file_is_refused_unread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match=r"pipe.png' is no ordinary file. Give the path"):
        load_image(tmp_path / "pipe.png")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("", "no such file: ''. Give the path of a picture"),
        ("missing.png", "no such file: 'missing.png'. Give the path of a picture"),
        ("a\0b", "cannot hold a null character"),
        ("x" * 5000, r"cannot be read \(File name too long\). Give the path of a picture"),
        (b"", "not an image|damaged"),
        (b"hello", r"the image \(5 bytes\) is not an image of a kind that is read. Give a PNG"),
        (np.zeros((2, 2), np.float32), "must be uint8, got float32"),
        (np.zeros((2, 2, 2), np.uint8), r"must be \(h, w\), .* got \(2, 2, 2\)"),
        (np.zeros((0, 2, 3), np.uint8), "the image is empty"),
        (3, "must be a path, bytes, a PIL image or an array, got int"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_picture_is_refused(source: Any, text: str) -> None:
    with pytest.raises(ImageError, match=text):
        load_image(source)


def test_a_glance_finds_what_is_no_picture_or_too_large_and_decodes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(encoded(RED))
    (tmp_path / "b.png").write_text("no picture")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert check_image(tmp_path / "a.png") == (6, 4)
    with pytest.raises(ImageError, match=r"b.png' is not an image"):
        check_image(tmp_path / "b.png")
    with pytest.raises(ImageError, match="has 6×4 pixels; at most 20 are accepted"):
        check_image(tmp_path / "a.png", max_pixels=20)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for Ghostscript is a shell script")
def test_no_picture_starts_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gs, called = tmp_path / "gs", tmp_path / "called"
    gs.write_text(f"#!/bin/sh\necho $* >> {called}\ntest $1 = --version\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # what an earlier test found
    (tmp_path / "a.png").write_bytes(EPS)
    for source in (EPS, tmp_path / "a.png"):
        for call in (load_image, check_image):
            with pytest.raises(ImageError, match="is not an image of a kind that is read"):
                call(source)
    assert not called.exists()
    with pytest.raises(subprocess.CalledProcessError, match="non-zero"):
        Image.open(io.BytesIO(EPS)).load()
    assert called.exists(), "Pillow starts it no more of its own accord, so that this shows nothing"


@pytest.mark.parametrize("kind", ["PPM", "TGA", "ICO", "PCX", "PDF"])
def test_other_formats_are_refused_even_those_that_pillow_knows(kind: str) -> None:
    with pytest.raises(ImageError, match="Give a PNG, JPEG, WebP, GIF, BMP or TIFF file"):
        load_image(encoded(RED, kind))


def test_a_jpeg_of_several_pictures_is_read_as_phones_write_it() -> None:
    both = encoded(RED, "MPO", save_all=True, append_images=[RED])
    assert Image.open(io.BytesIO(both)).format == "MPO"
    assert load_image(both).size == RED.size


def test_a_file_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever runs this may be allowed everything, so that it is Pillow that refuses here."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ImageError, match=r"a\.png' may not be read\. Check its permissions\.$"):
        load_image(tmp_path / "a.png")


def test_a_folder_and_a_text_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"is a folder. Give the path of a picture"):
        load_image(tmp_path)
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ImageError, match=r"a.png' is not an image"):
        load_image(tmp_path / "a.png")
