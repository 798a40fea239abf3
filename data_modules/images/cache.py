"""Image files decoded once, in parallel, into one memory-mapped array that later runs and other processes reuse."""

import hashlib
import io
import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from data_modules.errors import DataError
from data_modules.files import atomic_path, open_tensor
from data_modules.images import decode
from data_modules.images.fit import FITS, fit_to

VERSION = 4  # raise it whenever `prepare_file` gives other pixels: caches of other versions are made again
BLOCK = 32  # images per task: few enough for the bar to move, enough for numpy to work on whole arrays
SAMPLED = 1000  # of so many images at least, and fewer than twice as many, the headers decide on size and channels
LARGEST_DEFAULT_SIZE = 224  # pixels, what most published networks take
LOCKS = 64  # of a folder, so that files wait for one another only by chance
Read = TypeVar("Read")


class Settings(NamedTuple):
    """How images are decoded; None where the images themselves decide."""

    channels: int | None = None  # gray if all images that are sampled are gray, else colour
    height: int | None = None  # the median of their shorter sides, at most 224
    width: int | None = None
    levels: int | None = None  # what the largest level of all gray images of more than 8 bits needs
    fit: int = 0  # place of the way in which they are brought to that size in `FITS`


class ImageCache(NamedTuple):
    """Decoded images, in the order of their listing."""

    images: Tensor  # uint8 (N, C, H, W), memory-mapped; black where an image could not be read, or if none are kept
    moments: NDArray[np.float32]  # mean and mean square of each image's channels, as numbers from 0 to 1: (N, 2, C)
    digests: NDArray[np.int64]  # fingerprints of each image's file and of its pixels here, (N, 2)
    failures: dict[int, str]  # why an image could not be read, by its row
    levels: int | None  # which level became white in gray images of more than 8 bits; None if there are none


def cache_folder() -> Path:
    """Where caches lie: ``$LIT_NN_CACHE``, or else ``~/.cache/lit-nn``; a folder of images may be read-only."""
    try:
        return Path(os.environ.get("LIT_NN_CACHE") or "~/.cache/lit-nn").expanduser()
    except RuntimeError:  # an unknown user without $HOME, as in some containers
        return Path(tempfile.gettempdir(), "lit-nn-cache")


def kept(path: Path, make: Callable[[Path], object], read: Callable[[Path], Read], group: str = "") -> Read:
    """What ``read`` gives of a file, which ``make`` writes if it is missing or damaged, while others (of a group) wait.

    Raises DataError if it cannot be written, and FileNotFoundError if ``make`` does.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / f"{zlib.crc32((group or path.name).encode()) % LOCKS}.lock"):
            with suppress(Exception):
                return read(path)
            with atomic_path(path) as temporary:
                make(temporary)
            return read(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(
            f"the cache cannot be written to {path.parent} ({error.strerror or error}); "
            "name another folder in the environment variable LIT_NN_CACHE"
        ) from error


def cached_images(
    root: Path, files: list[str], settings: Settings, keep_failures: bool, listed_by: str, keep_images: bool = True
) -> ImageCache:
    """Decode images, or find them decoded by an earlier run, which may lack some if it had ``keep_failures``.

    Without ``keep_images`` only what is found out about them is kept. Raises DataError if it cannot be written.
    """
    # One cache for a folder, settings and who listed it, replaced when a file changes, so that old ones do not pile up.
    options = os.fsencode(f"{root.resolve()}\n{tuple(settings)}\n{listed_by}{'' if keep_images else ' as shards'}")
    name = root.resolve().name.encode("ascii", "ignore").decode()[:100]  # not every system can write other letters
    name = f"{name}-{hashlib.sha256(options).hexdigest()[:16]}"
    listing = [(file, _state(os.path.join(root, file))) for file in files]  # noqa: PTH118 (Path objects take longer)
    limit = os.environ.get("LIT_NN_MAX_PIXELS", "")  # with another one, others can be read
    key = hashlib.sha256(f"{(VERSION, listing)!r}{limit}".encode()).hexdigest()[:32]
    index, images = (cache_folder() / f"{name}-{key}{ending}" for ending in (".index.npz", ".npy"))

    def make(path: Path) -> None:
        for old in [old for old in path.parent.iterdir() if old.name.startswith(name)]:
            with suppress(OSError):  # somebody is using it, on Windows
                old.unlink()
        with atomic_path(images) if keep_images else nullcontext() as target:
            found = _decode([root / file for file in files], settings, target)
        np.savez(path, **found)  # the index comes last: while it is there, the images are complete

    def read(path: Path) -> ImageCache:
        with np.load(path, allow_pickle=False) as found:
            failures = {int(row): reason for row, reason in json.loads(str(found["failures"])).items()}
            black = torch.zeros((), dtype=torch.uint8).expand(found["shape"].tolist())
            pixels = open_tensor(images) if keep_images else black
            return ImageCache(pixels, found["moments"], found["digests"], failures, int(found["levels"]) or None)

    cache = kept(index, make, read, name)  # its `make` removes all caches of this name
    if cache.failures and not keep_failures:
        index.unlink(missing_ok=True)
    return cache


def _state(path: str) -> tuple[int, int, int] | None:
    """What tells that a file has changed; its ctime cannot be set back, but is on Windows when the file was made."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):  # a broken link, for instance; decoding will report it
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def prepare_file(
    path: Path | io.BytesIO, size: tuple[int, int], channels: int, levels: int | None, fit: str
) -> NDArray[np.uint8]:
    """Decode an image and bring it to a size (H, W): uint8 (C, H, W); raises what `decode.read_file` raises."""
    pixels = decode.read_file(path, channels, levels, size)
    if pixels.shape[1:] == size:
        return pixels
    return fit_to(torch.from_numpy(pixels.copy())[None], size, fit)[0].round().to(torch.uint8).numpy()


def _decode(paths: list[Path], settings: Settings, images_path: Path | None) -> dict[str, Any]:
    """Decode all images into a file, which nothing holds open afterwards; returns what else a cache keeps of them."""
    channels, height, width, levels, fit = settings
    if channels is None or height is None or width is None:
        suggested, side = _suggestion(paths)
        channels, height, width = channels or suggested, height or side, width or side
    count, shape = len(paths), (len(paths), channels, height, width)
    images = None
    if images_path:
        needed, free = math.prod(shape), shutil.disk_usage(images_path.parent).free
        if needed > free:  # writing to a full disk through a memory map would crash the process
            raise DataError(
                f"{count:,} images of {width} x {height} pixels need {needed / 1e9:.1f} GB in {images_path.parent}, "
                f"where {free / 1e9:.1f} GB are free; choose a smaller --data.image_size, or name another folder in "
                "the environment variable LIT_NN_CACHE"
            )
        images = np.lib.format.open_memmap(images_path, "w+", np.uint8, shape)
    moments, digests = np.zeros((count, 2, channels), np.float32), np.zeros((count, 2), np.int64)
    failures: dict[int, str] = {}
    deep: dict[int, int] = {}  # levels that gray images of more than 8 bits need, by row

    def decode_block(rows: list[int]) -> int:
        block = np.zeros((len(rows), *shape[1:]), np.uint8)
        for place, row in enumerate(rows):
            try:
                block[place] = prepare_file(paths[row], (height, width), channels, levels, FITS[fit])
                digests[row, 0] = decode.digest(paths[row].read_bytes())
            except decode.DeepImageError as error:
                deep[row] = error.levels
            except (decode.ImageError, OSError) as error:
                failures[row] = getattr(error, "strerror", None) or str(error)
            digests[row, 1] = decode.digest(block[place].tobytes())
        pixels = block.reshape(*block.shape[:2], -1).astype(np.float32) / 255  # (n, C, S * S)
        moments[rows, 0], moments[rows, 1] = pixels.mean(2), (pixels * pixels).mean(2)
        if images is not None:
            images[rows] = block
        return len(rows)

    # Threads, because Pillow lets others run while it decodes, and they need no start-up of their own.
    with (
        ThreadPoolExecutor(decode.decoding_threads(paths)) as pool,
        tqdm(total=count, unit=" images", desc="decoding", disable=None) as bar,
    ):
        rows = list(range(count))
        while rows:
            for done in pool.map(decode_block, [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]):
                bar.update(done)
            if rows := sorted(deep) if levels is None else []:  # now their one scale is known
                levels, bar.total = max(deep.values()), count + len(rows)
    if images is not None:
        images.flush()
    found = {"shape": shape, "moments": moments, "digests": digests, "levels": levels if deep else 0}
    return found | {"failures": json.dumps(failures)}


def _suggestion(paths: list[Path]) -> tuple[int, int]:
    """Channels and size that suit the images, from all of them or, of many, 1,000 to 1,999 spread evenly."""
    sides, gray = [], True
    for path in paths[:: max(1, len(paths) // SAMPLED)]:
        with suppress(decode.ImageError):  # decoding reports it
            side, shows_gray = decode.side_and_gray(path)
            sides.append(side)
            gray = gray and shows_gray
    # Without a readable image nothing will come of it, whatever the size.
    return 1 if gray else 3, min(int(np.median(sides or [1])), LARGEST_DEFAULT_SIZE)
