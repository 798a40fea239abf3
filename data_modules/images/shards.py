"""Images in shards, read where and when they are needed: windows of shuffled shards, a bounded cache, threads.

The order of an epoch is a function of (seed, epoch), the window and the number of processes, and a place in it is a
number of batches. litdata writes the shards (`shard_writer`), and its own reader can read them. Here they are mapped
into memory instead, because that reader drops a shard as soon as another one is read, which a window does with nearly
every image, and does not go on exactly inside an epoch (litData#775).
"""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from data_modules.batches import Batch, BatchLoader, one_ahead, seeded_generator
from data_modules.errors import DataError
from data_modules.images.cache import kept, prepare_file
from data_modules.images.decode import ImageError
from data_modules.images.store import Store

DOWNLOADS = 8  # at once


def shard_name(part: str, shard: int) -> str:
    """Name of a shard's file, litdata's."""
    return f"{part}/chunk-0-{shard}.bin"


class Shards:
    """The images of a part, which take the place of a uint8 tensor (N, C, H, W): indexing reads and decodes them.

    Threads do it, because Pillow and torch let others run while they work. ``index`` is what `shard_writer` has
    written. So much of what is downloaded stays in ``cache``, without what was not used for longest.
    """

    dtype, is_cuda = torch.uint8, False

    def __init__(self, store: Store, part: str, index: dict[str, Any], cache: Path, cache_bytes: float) -> None:
        self.store, self.part, self.cache, self.cache_bytes = store, part, cache, cache_bytes
        self.shape = torch.Size((index["parts"][part]["images"], *index["image_shape"]))
        self.per_shard, self._sums = index["images_per_shard"], index["parts"][part]["shards"]
        self._decoded, self._levels, self._fit = index["kind"] == "decoded", index["levels"], index["fit"]
        self._downloads = ThreadPoolExecutor(DOWNLOADS)
        self.use(os.cpu_count() or 1, 16)

    def use(self, workers: int, window: int) -> None:
        """Choose how many threads read, and of how many shards at a time; those and the next ones stay open."""
        self._workers, self._pool = workers, ThreadPoolExecutor(workers)
        self.opened = lru_cache(2 * window + DOWNLOADS)(self._begin_to_open)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Tensor:
        """Images of a row, uint8 (C, H, W), or of rows as a slice or an int64 tensor (B,): (B, C, H, W)."""
        if not isinstance(rows, Tensor):
            rows = torch.tensor(range(len(self))[rows], dtype=torch.int64)
        images = torch.empty((rows.numel(), *self.shape[1:]), dtype=torch.uint8)
        some = max(1, len(images) // (4 * self._workers))  # so that all end at about the same time
        try:
            list(self._pool.map(self._read, images.split(some), rows.view(-1).split(some)))
        except DataError:
            self._downloads.shutdown(wait=False, cancel_futures=True)  # the end of the process would wait for them
            raise
        return images.view(*rows.shape, *self.shape[1:])

    def index_select(self, dim: int, rows: Tensor) -> Tensor:
        """Images of some rows."""
        return self[rows]

    def _read(self, images: Tensor, rows: Tensor) -> None:
        channels, height, width = self.shape[1:]
        for image, row in zip(images.numpy(), rows.tolist(), strict=True):
            number, inside = divmod(row, self.per_shard)
            shard = self.opened(number).result()
            begin, end = struct.unpack_from("<II", shard, 4 + 4 * inside)
            content = shard[begin + 8 : end - 8]  # after the sizes of image and label, before the label
            if self._decoded:
                image[:] = np.frombuffer(content, np.uint8).reshape(image.shape)
                continue
            try:
                image[:] = prepare_file(io.BytesIO(content), (height, width), channels, self._levels, self._fit)
            except ImageError as error:
                raise DataError(f"an image of {self.store.place}/{self.part} cannot be read: {error}") from error

    def _begin_to_open(self, number: int) -> Future[mmap]:
        return self._downloads.submit(self._open, number)

    def _open(self, number: int) -> mmap:
        """Map a shard, which is downloaded if it has to be; raises DataError."""
        name = shard_name(self.part, number)

        def checked(path: Path) -> mmap:
            with path.open("rb") as file:
                shard = mmap(file.fileno(), 0, access=ACCESS_READ)
            if [len(shard), zlib.crc32(shard)] != self._sums[number]:
                damaged = f"{self.store.place}/{name} is damaged"
                raise DataError(
                    f"{damaged}: not what prepare_data.py wrote; copy it again, or write all to another place"
                )
            if self.store.is_remote:
                os.utime(path)  # it is in use
            return shard

        def download(path: Path) -> None:
            content = self.store.read(name)
            with FileLock(self.cache / "room.lock"):
                self._make_room(len(content))
                path.write_bytes(content)

        try:
            if self.store.is_remote:
                return kept(self.cache / name, download, checked)
            return checked(self.store.path(name))
        except FileNotFoundError as error:
            raise DataError(
                f"{self.store.place} has no {name}; copy it again, or write all to another place"
            ) from error

    def _make_room(self, needed: int) -> None:
        """Remove what was not used for longest, until so many bytes may come."""
        found = []
        for path in self.cache.glob("*/*.bin"):
            with suppress(FileNotFoundError):  # it has just got its name
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        excess = sum(size for _, size, _ in found) + needed - self.cache_bytes
        for _, size, path in sorted(found):
            if excess > 0:
                with suppress(OSError):  # somebody is using it, on Windows
                    path.unlink()
                excess -= size


class StreamLoader(BatchLoader):
    """Cuts batches from `Shards`.

    For training the shards are shuffled, and laid out in a line that is cut into equal parts, one for each process;
    each shuffles its part within windows of so many shards. What is left out is what makes no batch for all processes
    at the end of the line, other images in each epoch.
    """

    images: Shards  # type: ignore[assignment]
    window = 1  # shards that are shuffled together

    @property
    def order_depends_on(self) -> list[int]:
        """The window and the number of processes."""
        return [self.window, self.world_size]

    def order(self) -> Tensor:
        """Rows of this process's images in the current epoch's order, int64."""
        if not self.shuffle:
            return super().order()
        per_shard, total = self.images.per_shard, len(self.indices)
        generator = seeded_generator(self.seed, self.epoch)
        shards = torch.randperm(-(-total // per_shard), generator=generator)
        ends = torch.where((shards + 1) * per_shard > total, total - shards * per_shard, per_shard).cumsum(0)
        share = self._used() // self.world_size
        places = torch.arange(self.rank * share, (self.rank + 1) * share)  # in the line of all shards
        numbers = torch.searchsorted(ends, places, right=True)
        starts = torch.cat([ends.new_zeros(1), ends])
        rows = shards[numbers] * per_shard + places - starts[numbers]
        windows = rows.split(self.window * per_shard)
        drawn = [seeded_generator(self.seed, self.epoch, self.rank, number) for number in range(len(windows))]
        return torch.cat([w[torch.randperm(len(w), generator=g)] for w, g in zip(windows, drawn, strict=True)])

    def __iter__(self) -> Iterator[Batch]:
        """Read the batches of the current epoch, from where a restored state left off."""
        first, self._first_batch = self._first_batch, 0
        order, size, per_shard = self.order(), self.batch_size, self.images.per_shard
        reach = self.window * per_shard  # images ahead of a batch whose shards are opened already

        def cut(batch: int) -> Batch:
            start, end = batch * size, (batch + 1) * size
            for shard in (order[start + reach * (batch > first) : end + reach] // per_shard).unique().tolist():
                self.images.opened(shard)  # what goes wrong is said when the shard is needed
            return self._cut(order[start:end])

        for batch, images_and_labels in enumerate(one_ahead(map(cut, range(first, len(self)))), first + 1):
            self.batches_done = batch
            yield images_and_labels
