"""Files that are either complete or not there, downloads that end in one message, memory-mapped arrays."""

import csv
import ctypes
import mmap
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_modules.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

TIMEOUT = 60  # seconds without a byte after which a server counts as dead


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name beside it, and give it its own name only once it is complete and on disk.

    Yields where to write, with the same suffix: "images.part.npy" for "images.npy". After a crash at any moment
    ``path`` is what it was before; at most the temporary file stays behind, and the next attempt overwrites it. Two
    processes must not write the same path at once: hold a ``filelock.FileLock``.
    """
    temporary = path.with_name(f"{path.stem}.part{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # else a power cut can leave the new name on an empty file
        _replace(temporary, path)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(path)  # the name that the user knows
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Write a table, whose first row is its header."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _replace(source: Path, target: Path) -> None:
    """Rename a file over another; on Windows somebody, a virus scanner perhaps, may have it open for a moment."""
    deadline = time.monotonic() + 3
    while True:
        try:
            source.replace(target)
            return
        except OSError as error:
            if getattr(error, "winerror", None) not in (5, 32, 33) or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def open_tensor(path: Path) -> "Tensor":
    """Map a .npy file into memory, read-only and without a copy; DataError if it is damaged or holds pickles."""
    import torch

    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete it, and it will be made again") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array)


def will_need(array: "Tensor", rows: "Tensor") -> None:
    """Let the system read rows (B,) of images (N, ...) in a mapped file, each as a whole and before it is touched.

    Page by page it takes longer, and much longer where the system reads far ahead at each touch.
    """
    if sys.platform != "win32" and (size := array[0].nbytes) >= 16 * mmap.PAGESIZE:  # small ones are a touch or two
        libc = ctypes.CDLL(None)
        for start in (array.data_ptr() + rows * size).tolist():
            page = start - start % mmap.PAGESIZE
            libc.madvise(ctypes.c_void_p(page), ctypes.c_size_t(start + size - page), mmap.MADV_WILLNEED)


@contextmanager
def download(folder: Path, name: str, help_text: str) -> Iterator[None]:
    """Download into a folder inside the "with": one process at a time, and trouble becomes a `DataError`."""
    from filelock import FileLock

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torchvision would wait for ever
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name.lower().replace('-', '_')}.lock"):
            yield
    except Exception as error:  # of the network, the disk, damaged archives
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name} could not be had ({reason}).\n{help_text}") from error
    finally:
        socket.setdefaulttimeout(before)
