"""One picture file to pixels: the same for training and for prediction, and without torch."""

import hashlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, TiffImageFile

Part = TypeVar("Part")

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
"""How the names of picture files end, in any case; other files are not looked at."""
FORMATS = ("JPEG", "PNG", "WebP", "BMP", "GIF", "TIFF")  # no other: for PostScript, Pillow would start Ghostscript

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such pictures are refused below


class PictureError(Exception):
    """A file cannot be read as a picture; the message is the reason, without the name of the file."""


def printable(path: str | Path) -> str:
    r"""A path that can be printed and stored: bytes that are not UTF-8 become ``\xe9`` and the like."""
    return os.fsencode(path).decode(errors="backslashreplace")


def picture_paths(folder: str | Path, failed: Callable[[OSError], object]) -> Iterator[str]:
    """Find the pictures in a folder and the folders in it; hidden ones are left out, links to folders not followed.

    Args:
        folder: Where to look.
        failed: Called with the reason where a folder cannot be looked into.

    Yields:
        Paths that begin with ``folder``, in the order of their names. Strings, because this runs for every picture at
        every start, and Path objects take longer.
    """
    for place, inner, names in os.walk(folder, onerror=failed):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:  # noqa: PTH122
                yield os.path.join(place, name)  # noqa: PTH118


def picture_header(path: Path) -> tuple[int, int, bool]:
    """Read what a picture file says of itself, without decoding it.

    Args:
        path: A picture file.

    Returns:
        Width and height in pixels as stored, and whether the format allows for gray levels only.

    Raises:
        PictureError: As `prepare_picture`.
    """
    with _opened(path) as image:
        return image.width, image.height, image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")


def is_gray(path: Path) -> bool:
    """Whether a picture shows only gray, which colour formats and palettes can hold too.

    Raises:
        PictureError: As `prepare_picture`.
    """
    if picture_header(path)[2]:
        return True
    red, green, blue = prepare_picture(path, 32, 3)  # small, and so fast
    return np.array_equal(red, green) and np.array_equal(green, blue)


def prepare_picture(path: Path, image_size: int, channels: int) -> NDArray[np.uint8]:
    """Decode a picture, turn it upright, convert it, scale its shorter side to ``image_size`` and cut out the centre.

    Of an animation or a document the first frame or page counts. 16-bit levels lose their lower byte. What is
    transparent becomes white, as on a page: drawings with a transparent ground are dark as a rule, and would vanish
    on black.

    Args:
        path: A picture file.
        image_size: Width and height of the result in pixels.
        channels: 1 for gray, 3 for red, green and blue.

    Returns:
        uint8 (C, H, W).

    Raises:
        PictureError: If the file is not a picture, cannot be read, or claims more pixels than Pillow allows.
    """
    with _opened(path) as image:
        # A JPEG far larger than needed is decoded at a half, a quarter or an eighth of its size: much faster.
        image.draft(None, (2 * image_size, 2 * image_size))
        return prepare_image(image, image_size, channels)


def prepare_image(image: Image.Image, image_size: int, channels: int) -> NDArray[np.uint8]:
    """Do with a picture that is open already what `prepare_picture` does with a file; the picture itself may change.

    Raises:
        ValueError: If its pixels cannot be converted.
    """
    try:
        image.getexif()
    except Exception:
        pass  # it is broken, but the picture can be seen
    else:
        ImageOps.exif_transpose(image, in_place=True)  # a copy of each picture would cost a quarter more time
    converted = _converted(image, "L" if channels == 1 else "RGB")
    if converted.size != (image_size, image_size):
        # Crops first, so that a strip of 20,000 x 10 is not scaled to a monster.
        converted = ImageOps.fit(converted, (image_size, image_size), Image.Resampling.BICUBIC)
    pixels = np.asarray(converted)  # (H, W) or (H, W, C)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def picture_digest(pixels: NDArray[np.uint8]) -> int:
    """64-bit fingerprint of a picture's pixels, by which equal pictures are found whatever their files are called."""
    return int.from_bytes(hashlib.blake2b(pixels.tobytes(), digest_size=8).digest(), "little")


def shared_pictures(digests: dict[Part, NDArray[np.uint64]]) -> list[tuple[Part, int, Part, int]]:
    """Find pictures that lie in more than one part of a data set.

    Args:
        digests: Fingerprints of each part's pictures, see `picture_digest`.

    Returns:
        For each of them, a part and its place there, and another part and its place there.
    """
    return [
        (one, int(place), other, int(other_place))
        for one, other in itertools.combinations(digests, 2)
        for place, other_place in zip(
            *np.intersect1d(digests[one], digests[other], return_indices=True)[1:], strict=True
        )
    ]


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open a picture; whatever goes wrong with it inside the "with" is a `PictureError`."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            # Pillow itself warns at its limit, and refuses only at twice that.
            if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except Exception as error:  # decoders raise all kinds of things at broken or hostile files
        raise PictureError(_reason(path, error)) from error


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """To gray or RGB, where Pillow alone would lose something."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow may hold in 32
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("has gray levels beyond 16 bits")
        if image.info.get("transparency") is not None:
            levels = np.where(levels == image.info["transparency"], 65535, levels)
        if isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0:
            levels = 65535 - levels  # 0 is white, which Pillow heeds only for 8 bits
        image = Image.fromarray((levels >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("has floating-point pixels, whose range is unknown; save it with 8 or 16 bits")
    elif image.mode == "LAB":
        image = image.convert("RGB")  # Pillow knows no way from LAB to gray
    elif image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")  # there is no direct way from La
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"refused as a decompression bomb: it has more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    if isinstance(error, UnidentifiedImageError):
        return "the file is empty" if path.stat().st_size == 0 else f"not a picture in {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the path, which the caller prints
    return str(error) or type(error).__name__
