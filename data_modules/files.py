"""Files that are either complete or not there: atomic writing, resumable downloads, memory-mapped arrays."""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_modules.base import DataError

CHUNK = 1 << 16  # bytes read at a time; what a connection loses when it breaks off
TIMEOUT = 30  # seconds without a byte after which a server counts as dead
ATTEMPTS = 5  # how often a download that breaks off is taken up again on one server


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name beside it, and give it its own name only once it is complete and on disk.

    After a crash at any moment ``path`` is what it was before; at most the temporary file stays behind, and the next
    attempt overwrites it. Two processes must not write the same path at once: hold a ``filelock.FileLock``.

    Args:
        path: The file to write or replace; its folder must exist.

    Yields:
        Where to write, with the same suffix: "images.part.npy" for "images.npy".
    """
    temporary = path.with_name(f"{path.stem}.part{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # else a power cut can leave the new name on an empty file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def open_tensor(path: Path) -> Tensor:
    """Map an array file into memory, read-only and without a copy; processes on one machine share the memory.

    Args:
        path: A .npy file of a plain (not pickled) array.

    Returns:
        A tensor over the file. Writing to it would crash the process.

    Raises:
        DataError: If the file is missing or damaged.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete it, and it will be made again") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def download(urls: Sequence[str], path: Path, checksum: str) -> None:
    """Fetch a file from the first server that delivers it, with a progress bar.

    What has come so far lies in ``<path>.part``; a download that broke off, or a later call, goes on from there, on
    the same server or another. ``path`` appears only when the checksum is right.

    Args:
        urls: Addresses of the same file, in the order in which they are tried.
        path: Where to put it; its folder must exist.
        checksum: SHA-256 of the file, in hexadecimal.

    Raises:
        DataError: If no server delivers the file; the message holds what went wrong with each.
    """
    part = path.with_name(f"{path.name}.part")
    failures = []
    for url in urls:
        for _ in range(ATTEMPTS):
            before = part.stat().st_size if part.exists() else 0
            try:
                _fetch(url, part)
            except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: not an address
                failures.append(f"{url}: {error}")
                if part.exists() and part.stat().st_size > before:
                    continue  # it broke off, but got further
                break
            if sha256(part) == checksum:
                part.replace(path)
                return
            part.unlink()
            failures.append(f"{url}: wrong checksum")
            if before == 0:
                break  # the server has another file; otherwise it may have been the part that was already here
    raise DataError(f"{path.name} could not be downloaded. " + "; ".join(dict.fromkeys(failures)))


def _fetch(url: str, part: Path) -> None:
    """Append to ``part`` what it still lacks of the file at ``url``; raises OSError if the server breaks off."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is lacking: whether it is the right file, the checksum decides
        raise
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            start = 0  # the server sends everything
        length = response.headers["Content-Length"]
        total = start + int(length) if length else None
        with (
            part.open("ab" if start else "wb") as file,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem) as bar,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                file.flush()  # kept even if this process is killed
                bar.update(len(chunk))
            os.fsync(file.fileno())
            if total is not None and file.tell() < total:
                raise ConnectionError(f"broke off after {file.tell():,} of {total:,} bytes")
