"""One image file to pixels: the same for training and for prediction, and without torch.

Finding files works on strings, because it runs for every image at every start, and Path objects take longer.
"""
# ruff: noqa: PTH113, PTH116, PTH118, PTH122, PTH123, PTH202

import hashlib
import io
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, TILELENGTH, TILEWIDTH, TiffImageFile

FORMATS = ("JPEG", "PNG", "WebP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
"""What is read. No other: for PostScript, for instance, Pillow would start Ghostscript."""
_NAMES = "jpg jpeg jpe jfif png apng webp bmp gif tif tiff ppm pgm pbm pnm avif jp2 jpf jpx"
SUFFIXES = {f".{name}" for name in _NAMES.split(" ")}
"""How the names of image files end, in any case; a file whose name has no ending is told by its first bytes."""
HELPERS = {
    *("@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "@__thumb", "__macosx", "lost+found", "$recycle.bin"),
    *("system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", ".ipynb_checkpoints", "__pycache__"),
}
"""What storage boxes, systems and notebooks put among anybody's files, in lower case."""
SMALL = 16_384  # bytes; to decode a smaller file is mostly the interpreter's work, and threads would wait for it
MAX_PIXELS = 250_000_000  # above 200 megapixels, the largest that telephones make; 750 MB as RGB
_BEGINNING = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|II\*\0|MM\0\*|RIFF....WEBP|BM....\0\0\0\0|P[1-6]\s"
    rb"|....ftypavi[fs]|\0\0\0\x0cjP  ",
    re.DOTALL,
)

Image.MAX_IMAGE_PIXELS = None  # Pillow warns at its limit and refuses at twice that; `_check_size` has ours
PngImagePlugin.MAX_TEXT_CHUNK = 1 << 26  # an image is no worse for a long comment: Pillow's limit of 1 MB refuses some
PngImagePlugin.MAX_TEXT_MEMORY = 1 << 28


class ImageError(Exception):
    """A file cannot be read as an image; the message is the reason, without the name of the file."""


class DeepImageError(ImageError):
    """A gray image has more than 8 bits, and nobody has said yet which level is white; `levels` is what it needs."""

    def __init__(self, levels: int) -> None:
        super().__init__(f"has gray levels up to {levels}")
        self.levels = levels


def printable(path: str | Path) -> str:
    r"""A path that can be printed and stored: bytes that are not UTF-8 become ``\xe9`` and the like."""
    return os.fsencode(path).decode(errors="backslashreplace")


def digest(data: bytes) -> int:
    """64-bit fingerprint, by which equal files and equal pixels are found whatever they are called."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


# --- finding ----------------------------------------------------------------------------------------------------------


def image_paths(
    folder: str | Path,
    failed: Callable[[OSError], object],
    passed_over: Callable[[str], object] = lambda path: None,
    depth: int = 0,
) -> Iterator[str]:
    """Find the images in a folder and the folders in it, each once, by name; without hidden files or circles of links.

    ``failed`` is called where a folder cannot be looked into, ``passed_over`` with each other file and with `HELPERS`.
    What is linked into several folders, so many levels down, is found in each of these.
    """
    top, seen = os.path.join(os.path.realpath(folder), ""), set[str]()
    for place, inner, files in os.walk(folder, onerror=failed, followlinks=True):
        here, folders = os.path.join(os.path.realpath(place), ""), sorted(inner)
        inner.clear()  # what os.walk goes into
        if len(Path(place).relative_to(folder).parts) == depth:
            seen = {os.path.join(os.path.realpath(above), "") for above in Path(place).parents[:depth]}
        if here in seen:
            continue
        seen.add(here)
        for name in folders:
            path = os.path.join(place, name)
            target = os.path.join(os.path.realpath(path), "")
            if name.lower() in HELPERS:
                passed_over(path)
            elif not (name.startswith(".") or here.startswith(target) or top.startswith(target)):
                inner.append(name)
        for name in sorted(files):
            path = os.path.join(place, name)
            if name.lower() in HELPERS or not (name.startswith(".") or is_image(path)):
                passed_over(path)
            elif not name.startswith("."):
                yield path


def is_image(path: str) -> bool:
    """Whether a file is one, going by the end of its name, or by its first bytes if its name has none."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix and not suffix[1:].isdigit():
        return suffix in SUFFIXES
    try:
        with open(path if os.path.isfile(path) else os.devnull, "rb") as file:  # not a pipe
            return bool(_BEGINNING.match(file.read(16)))
    except OSError:
        return False


def decoding_threads(paths: Sequence[str | Path]) -> int:
    """How many threads decode such files in the shortest time, going by the size of a few."""
    sizes = []
    for path in paths[:: max(1, len(paths) // 100)]:
        with suppress(OSError):  # decoding reports it
            sizes.append(os.path.getsize(path))
    return (os.cpu_count() or 1) if sum(sizes) > SMALL * len(sizes) else 1


def mean_bytes(paths: Sequence[str | Path]) -> int:
    """Bytes of an image when it is decoded, the mean of a few; JPEGs are decoded at a fraction of their size."""
    sizes = [0]
    for path in paths[:: max(1, len(paths) // 100)]:
        with suppress(ImageError), _opened(path) as image:  # decoding reports it
            sizes.append(0 if image.format in ("JPEG", "MPO") else 3 * image.width * image.height)
    return sum(sizes) // len(sizes)


# --- decoding ---------------------------------------------------------------------------------------------------------


def visible(image: Any) -> Any:
    """The channels of an image (C, H, W) that can be shown: three, or the first one."""
    return image[:3] if len(image) >= 3 else image[:1]


def side_and_gray(path: Path) -> tuple[int, bool]:
    """The shorter side of an image, and whether it shows only gray, which colour formats can hold too."""
    with _opened(path) as image:
        side = min(image.size)
        if image.mode in ("1", "L", "LA", "La") or _is_deep(image):
            return side, True
        image.draft(None, (32, 32))  # small, and so fast
        red, green, blue = read_image(image, 3)
    return side, np.array_equal(red, green) and np.array_equal(green, blue)


def read_file(
    path: str | Path | io.BytesIO, channels: int, levels: int | None = 65535, least: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """Decode an image file, or what it holds, turn it upright, convert it to gray or RGB: uint8 (C, H, W).

    Of an animation or a document the first frame or page counts. What is transparent becomes white, as on a page:
    drawings with a transparent ground are dark as a rule, and would vanish on black. ``levels`` says which level is
    white in gray images of more than 8 bits; with None they raise `DeepImageError`. Where a height and width of
    ``least`` will do, a JPEG of over twice that is decoded at a half, a quarter or an eighth, which is much faster.
    Raises ImageError.
    """
    with _opened(path) as image:
        if least:
            image.draft(None, (2 * max(least), 2 * max(least)))
        return read_image(image, channels, levels)


def read_image(image: Image.Image, channels: int, levels: int | None = 65535) -> NDArray[np.uint8]:
    """Do with an image that is open already what `read_file` does with a file; the image itself may change."""
    _check_size(image)
    image.load()  # a TIFF turns itself
    orientation = 1
    with suppress(Exception):  # EXIF can be broken where the image can be seen
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation != 1:
        for name in ("exif", "Raw profile type exif"):  # which is read by now, and would be written anew, odd tags too
            image.info.pop(name, None)
        ImageOps.exif_transpose(image, in_place=True)  # a copy of each image would cost a quarter more time
    pixels = np.asarray(_converted(image, "L" if channels == 1 else "RGB", levels))  # (H, W) or (H, W, C)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


@contextmanager
def _opened(path: str | Path | io.BytesIO) -> Iterator[Image.Image]:
    """Open an image; whatever goes wrong with it inside the "with" is an `ImageError`."""
    try:
        if not isinstance(path, io.BytesIO):
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("not a file but a folder or a pipe")  # which would be waited for
            if status.st_size < SMALL:  # one reading instead of Pillow's many
                with open(path, "rb", buffering=0) as file:
                    path = io.BytesIO(file.read())
        with Image.open(path, formats=FORMATS) as image:
            _check_size(image)
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        empty = isinstance(path, io.BytesIO) and not path.getvalue()
        raise ImageError("the file is empty" if empty else f"not an image in {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders raise all kinds of things at broken or hostile files
        reason = getattr(error, "strerror", None) or str(error)  # without the path, which the caller prints
        raise ImageError(reason or type(error).__name__) from error


def pixel_count(image: Image.Image) -> int:
    """How many pixels are decoded for an image."""
    pixels = image.width * image.height
    if isinstance(image, TiffImageFile):  # whose tiles may be larger than the image
        pixels = max(pixels, image.tag_v2.get(TILEWIDTH, 0) * image.tag_v2.get(TILELENGTH, 0))
    return pixels


def _check_size(image: Image.Image) -> None:
    limit, pixels = float(os.environ.get("LIT_NN_MAX_PIXELS") or MAX_PIXELS), pixel_count(image)
    if pixels > limit:
        raise ImageError(
            f"refused as a decompression bomb: it has {pixels:,} pixels, more than {limit:,.0f}; "
            "the environment variable LIT_NN_MAX_PIXELS raises the limit"
        )


def _is_deep(image: Image.Image) -> bool:
    """Whether an image is gray with 16 bits, which Pillow may hold in 32, or with 32 bits, whole or floating-point."""
    return image.mode.startswith(("I", "F"))


def _converted(image: Image.Image, mode: str, levels: int | None) -> Image.Image:
    """To gray or RGB, where Pillow alone would lose something."""
    if _is_deep(image):
        image = _scaled(image, levels)
    elif image.mode == "LAB":
        image = image.convert("RGB")  # Pillow knows no way from LAB to gray
    elif image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")  # there is no direct way from La
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _scaled(image: Image.Image, levels: int | None) -> Image.Image:
    """Bring a deep gray image from 0..levels to 0..255; of 65535 levels that keeps the upper byte."""
    values = np.asarray(image)  # (H, W)
    clear = values == image.info.get("transparency", np.nan)
    seen = values[~clear]
    if not np.isfinite(seen).all() or seen.min(initial=0) < 0:
        raise ImageError("has negative or undefined gray levels; save it with 8 or 16 bits")
    largest = float(seen.max(initial=0))
    # The next full number of bits, so that a slightly brighter image changes nothing.
    is_share = image.mode == "F" and largest <= 1  # floats from 0 to 1, but if all are far below it, no such ones: 0
    needed = int(largest > 1 / 8) if is_share else max(255, (1 << math.ceil(largest).bit_length()) - 1)
    if levels is None:
        raise DeepImageError(needed)
    if needed > levels or not levels or (is_share and levels > 1 and largest > 0):
        raise ImageError(f"has gray levels from 0 to {largest:g}, which is another range than 0 to {levels or 1}")
    if isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0:
        values = levels - values  # 0 is white, which Pillow heeds only for 8 bits
    scaled = values * np.float32(255 if levels == 1 else 256 / (levels + 1))
    return Image.fromarray(np.where(clear, 255, scaled).astype(np.uint8))
