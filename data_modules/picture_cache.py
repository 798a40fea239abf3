"""Picture files decoded once, in parallel, into one memory-mapped array that later runs and other processes reuse."""

import hashlib
import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from data_modules.base import DataError
from data_modules.files import atomic_path, open_tensor
from data_modules.pictures import PictureError, is_gray, picture_digest, picture_header, prepare_picture, printable

VERSION = 2  # raise it whenever `prepare_picture` gives other pixels: caches of other versions are made again
BLOCK = 32  # pictures per task: few enough for the bar to move, enough for numpy to work on whole arrays
SAMPLED = 1000  # of so many pictures at least, and fewer than twice as many, the headers decide on size and channels
LARGEST_DEFAULT_SIZE = 224  # pixels, what most published networks take


class ListedPicture(NamedTuple):
    """A picture file as the file system lists it; any change of these makes the cache be built again."""

    path: str
    """Relative to the folder of the data set."""
    size: int
    """In bytes; -1 if the file cannot be looked at."""
    modified: int
    """When the contents changed, in nanoseconds."""
    changed: int
    """When contents or permissions changed, in nanoseconds; unlike the other time, nobody can set it back."""


@dataclass(frozen=True)
class PictureCache:
    """Decoded pictures, in the order of their listing."""

    images: Tensor
    """uint8 (N, C, S, S), memory-mapped; black where a picture could not be read."""
    moments: NDArray[np.float32]
    """Mean and mean square of each picture's channels, with pixels scaled to [0, 1]: (N, 2, C)."""
    digests: NDArray[np.uint64]
    """Fingerprint of each picture's pixels, (N,)."""
    failures: dict[int, str]
    """Why a picture could not be read, by its row."""


def cache_folder() -> Path:
    """Where caches lie: ``$LIT_NN_CACHE``, or else ``~/.cache/lit-nn``; a folder of pictures may be read-only."""
    return Path(os.environ.get("LIT_NN_CACHE") or Path.home() / ".cache" / "lit-nn")


def cached_pictures(
    root: Path, listing: list[ListedPicture], image_size: int | None, channels: int | None, keep_failures: bool
) -> PictureCache:
    """Decode pictures, or find them decoded by an earlier run; of several processes one works and the others wait.

    Args:
        root: The folder of the data set.
        listing: The pictures.
        image_size: Width and height in pixels; None for the median of the pictures' shorter sides, at most 224.
        channels: 1 for gray, 3 for colour; None for gray if all that were sampled are gray, else colour.
        keep_failures: Whether a later run may reuse a cache in which pictures are missing.

    Returns:
        The pictures.

    Raises:
        DataError: If the cache cannot be written.
    """
    options = f"{root.resolve()}\n{image_size}\n{channels}"
    name = f"{printable(root.resolve().name)}-{hashlib.sha256(os.fsencode(options)).hexdigest()[:16]}"
    index_path, images_path = cache_folder() / f"{name}.index.npz", cache_folder() / f"{name}.npy"
    # One cache for a folder and options, replaced when the listing changes, so that old ones do not pile up.
    content = repr((VERSION, listing))
    key = hashlib.sha256(content.encode()).hexdigest()
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with FileLock(cache_folder() / f"{name}.lock"):
            cache = _read(index_path, images_path, key)
            if cache is None:
                # The index is removed first and written last: while it is there, the images are complete.
                index_path.unlink(missing_ok=True)
                paths = [root / picture.path for picture in listing]
                _build(paths, image_size, channels, key, index_path, images_path)
                cache = _read(index_path, images_path, key)
                assert cache is not None
            if cache.failures and not keep_failures:
                index_path.unlink(missing_ok=True)
            return cache
    except OSError as error:
        raise DataError(
            f"the cache of {root} cannot be written to {cache_folder()} ({error.strerror or error}); "
            "name another folder in the environment variable LIT_NN_CACHE"
        ) from error


def _read(index_path: Path, images_path: Path, key: str) -> PictureCache | None:
    """The cache if it is there, complete and of this key."""
    try:
        with np.load(index_path, allow_pickle=False) as index:
            if str(index["key"]) != key:
                return None
            failures = {int(row): reason for row, reason in json.loads(str(index["failures"])).items()}
            return PictureCache(open_tensor(images_path), index["moments"], index["digests"], failures)
    except (OSError, ValueError, KeyError, DataError):
        return None


def _build(
    paths: list[Path], image_size: int | None, channels: int | None, key: str, index_path: Path, images_path: Path
) -> None:
    suggested_size, suggested_channels = _suggestion(paths)
    image_size, channels = image_size or suggested_size, channels or suggested_channels
    shape = (len(paths), channels, image_size, image_size)
    needed, free = math.prod(shape), shutil.disk_usage(images_path.parent).free
    if needed > free:  # writing to a full disk through a memory map would crash the process
        raise DataError(
            f"{len(paths):,} pictures of {image_size} x {image_size} pixels need {needed / 1e9:.1f} GB in "
            f"{images_path.parent}, where {free / 1e9:.1f} GB are free; choose a smaller --data.image_size, or "
            "name another folder in the environment variable LIT_NN_CACHE"
        )
    with atomic_path(images_path) as temporary:
        index = _decode(paths, shape, temporary)
    with atomic_path(index_path) as temporary:
        np.savez(temporary, key=key, **index)


def _decode(paths: list[Path], shape: tuple[int, int, int, int], images_path: Path) -> dict[str, Any]:
    """Decode all pictures into a file, which nothing holds open afterwards: Windows could not rename it.

    Returns:
        What else is kept of the N pictures: "moments", the means of the pixels and of their squares, (N, 2, C);
        "digests" (N,); and "failures", the reasons why some could not be read, as JSON.
    """
    _, channels, image_size, _ = shape
    moments, digests = np.zeros((len(paths), 2, channels), np.float32), np.zeros(len(paths), np.uint64)
    failures: dict[int, str] = {}
    images = np.lib.format.open_memmap(images_path, "w+", np.uint8, shape)

    def decode(start: int) -> int:
        rows = slice(start, min(start + BLOCK, len(paths)))
        block = np.zeros((rows.stop - start, *shape[1:]), np.uint8)
        for place, path in enumerate(paths[rows]):
            try:
                block[place] = prepare_picture(path, image_size, channels)
            except PictureError as error:
                failures[start + place] = str(error)
            digests[start + place] = picture_digest(block[place])
        pixels = block.reshape(*block.shape[:2], -1).astype(np.float32) / 255  # (n, C, S * S)
        moments[rows, 0], moments[rows, 1] = pixels.mean(2), (pixels * pixels).mean(2)
        images[rows] = block
        return len(block)

    # Threads, because Pillow lets others run while it decodes, and they need no start-up of their own.
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(paths), unit=" pictures", desc="decoding") as bar,
    ):
        for count in pool.map(decode, range(0, len(paths), BLOCK)):
            bar.update(count)
    images.flush()
    return {"failures": json.dumps(failures), "moments": moments, "digests": digests}


def _suggestion(paths: list[Path]) -> tuple[int, int]:
    """Image size and channels that suit the pictures, from all of them or, of many, 1,000 to 1,999 spread evenly."""
    sides, gray = [], True
    for path in paths[:: max(1, len(paths) // SAMPLED)]:
        with suppress(PictureError):  # decoding reports it
            sides.append(min(picture_header(path)[:2]))
            gray = gray and is_gray(path)
    # Without a readable picture nothing will come of it, whatever the size.
    return min(int(np.median(sides or [1])), LARGEST_DEFAULT_SIZE), 1 if gray else 3
