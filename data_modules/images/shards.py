"""Images in shards, read where and when they are needed: windows of shuffled shards, a bounded cache, workers.

The order of an epoch is a function of (seed, epoch), the window and the number of processes, and a place in it is a
number of batches. litdata writes the shards (`shard_writer`), and its own reader can read them. Here they are mapped
into memory instead, because that reader drops a shard as soon as another one is read, which a window does with nearly
every image, and does not go on exactly inside an epoch (litData#775).
"""

import io
import os
import signal
import struct
import weakref
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from data_modules.batches import Batch, BatchLoader, seeded_generator
from data_modules.errors import DataError
from data_modules.files import atomic_path
from data_modules.images.cache import prepare_file
from data_modules.images.decode import ImageError
from data_modules.images.store import Store

OPEN = 256  # shards that a process has mapped
LOCKS = 64  # downloads that wait for one another only by chance
DOWNLOADS = 8  # at once, of each worker


def shard_name(part: str, shard: int) -> str:
    """Name of a shard's file, litdata's."""
    return f"{part}/chunk-0-{shard}.bin"


class Shards:
    """The images of a part, which take the place of a uint8 tensor (N, C, H, W): indexing reads and decodes them.

    Args:
        store: Where the shards lie.
        part: Name of the part.
        index: What `shard_writer` has written about all of them.
        cache: Folder for what is downloaded.
        cache_bytes: How much of that stays there; what was not used for longest goes first.
    """

    dtype, device, is_cuda = torch.uint8, torch.device("cpu"), False

    def __init__(self, store: Store, part: str, index: dict[str, Any], cache: Path, cache_bytes: float) -> None:
        self.store, self.part, self.cache, self.cache_bytes = store, part, cache, cache_bytes
        self.shape = torch.Size((index["parts"][part]["images"], *index["image_shape"]))
        self.sums, self.per_shard = index["parts"][part]["shards"], index["images_per_shard"]
        self._decoded, self._levels, self._fit = index["kind"] == "decoded", index["levels"], index["fit"]
        self._maps: dict[int, NDArray[np.uint8]] = {}
        self._checked = set[int]()

    def __getstate__(self) -> dict[str, Any]:  # a worker maps shards itself
        return vars(self) | {"_maps": {}}

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Tensor:
        """Images of a row, uint8 (C, H, W), or of rows as a slice or an int64 tensor (B,): (B, C, H, W)."""
        if not isinstance(rows, Tensor):
            rows = torch.tensor(range(len(self))[rows], dtype=torch.int64)
        images = np.empty((rows.numel(), *self.shape[1:]), np.uint8)
        contents = [self._content(row) for row in rows.view(-1).tolist()]
        with ExitStack() as stack:
            run: Any = map
            if not self._decoded and get_worker_info() is None:  # nobody else decodes
                run = stack.enter_context(ThreadPoolExecutor(os.cpu_count())).map
            for place, image in enumerate(run(self._decode, contents)):
                images[place] = image
        return torch.from_numpy(images).view(*rows.shape, *self.shape[1:])

    def index_select(self, dim: int, rows: Tensor) -> Tensor:
        """Images of some rows."""
        return self[rows]

    def split(self, count: int) -> Iterator[Tensor]:
        """All images, so many at a time."""
        return (self[start : start + count] for start in range(0, len(self), count))

    def _content(self, row: int) -> NDArray[np.uint8]:
        """An image as it lies in its shard."""
        shard, inside = divmod(row, self.per_shard)
        content = self._map(shard)
        begin, end = struct.unpack_from("<II", content.data, 4 + 4 * inside)
        return content[begin + 8 : end - 8]  # after the sizes of image and label, before the label

    def _decode(self, content: NDArray[np.uint8]) -> NDArray[np.uint8]:
        channels, height, width = self.shape[1:]
        if self._decoded:
            return content.reshape(channels, height, width)
        try:
            return prepare_file(io.BytesIO(content.tobytes()), (height, width), channels, self._levels, self._fit)
        except ImageError as error:
            raise DataError(f"an image of {self.store.place}/{self.part} cannot be read: {error}") from error

    def _map(self, shard: int) -> NDArray[np.uint8]:
        while shard not in self._maps:
            path = self.fetch(shard)
            with suppress(FileNotFoundError):  # another process has just made room
                if shard not in self._checked and not self.store.is_remote:
                    self._check(shard, path)
                if len(self._maps) >= OPEN:
                    del self._maps[next(iter(self._maps))]
                self._maps[shard] = np.asarray(np.memmap(path, np.uint8, "r"))
                self._checked.add(shard)
        return self._maps[shard]

    def _check(self, shard: int, path: Path) -> None:
        if [path.stat().st_size, zlib.crc32(path.read_bytes())] != self.sums[shard]:
            where = f"{self.store.place}/{shard_name(self.part, shard)}"
            raise DataError(f"{where} is damaged: not what prepare_data.py wrote; copy or write the shards again")

    def fetch(self, shard: int) -> Path:
        """Path of a shard on this machine, where it is downloaded if it has to be; raises DataError."""
        name = shard_name(self.part, shard)
        path, is_remote = self.store.path(name), self.store.is_remote
        try:
            if is_remote:
                path = self.cache / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(self.cache / f"{shard % LOCKS}.lock"):
                    if not path.exists():
                        with atomic_path(path) as temporary:
                            self._make_room(temporary, self.sums[shard][0])
                            with temporary.open("rb+") as file:
                                file.write(self.store.read(name))
                            self._check(shard, temporary)
                    os.utime(path)
            elif not path.exists():
                raise FileNotFoundError(name)
        except FileNotFoundError as error:
            raise DataError(f"{self.store.place} has no {name}; copy or write the shards again") from error
        except OSError as error:
            raise DataError(
                f"the cache of shards cannot be written to {self.cache} ({error.strerror or error}); name another "
                "folder with --data.cache_dir, or give a smaller --data.cache_gb"
            ) from error
        return path

    def _make_room(self, new: Path, needed: int) -> None:
        """Reserve the place of a new file, for which those go that were not used for longest."""
        with FileLock(self.cache / "room.lock"):
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
            with new.open("wb") as file:
                file.truncate(needed)


class _Reader:
    """What a worker is asked: rows of a batch, and shards that will be needed soon; its answer may be an error."""

    def __init__(self, images: Shards) -> None:
        self.images, self._pool = images, dict[int, ThreadPoolExecutor]()  # of each process

    def __getitem__(self, job: tuple[Tensor, list[int]]) -> Tensor | DataError:
        rows, ahead = job
        for shard in ahead:  # what goes wrong is said when the shard is needed
            self._pool.setdefault(os.getpid(), ThreadPoolExecutor(DOWNLOADS)).submit(self.images.fetch, shard)
        try:
            return self.images[rows]
        except DataError as error:  # raised in a worker, it would come with a traceback
            return error


def _leave_signals(over: Any, worker: int) -> None:
    """Leave them to the main process, which saves: terminals and clusters send them to the workers too."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        signal.signal(getattr(signal, name, signal.SIGINT), signal.SIG_IGN)

    def end() -> None:  # by SIGTERM, as multiprocessing would have it, the worker no longer does
        over.acquire()
        os._exit(0)

    Thread(target=end, daemon=True).start()


class StreamLoader(BatchLoader):
    """Cuts batches from `Shards`, whose images are read and decoded by workers.

    For training the shards are shuffled, and laid out in a line that is cut into equal parts, one for each process;
    each shuffles its part within windows of so many shards. What is left out is what makes no batch for all processes
    at the end of the line, other images in each epoch.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.window = 1
        self._jobs: Any = []  # what the workers are asked, in order: rows, and the shards that will be needed soon

    def open(self, window: int, workers: int) -> "StreamLoader":
        """Choose how many shards are shuffled together, and how many processes decode."""
        self.window = window
        options: dict[str, Any] = {"num_workers": workers, "pin_memory": self.pin_memory}
        options["persistent_workers"] = workers > 0
        options["generator"] = torch.Generator()  # else each epoch would draw from the one that dropout draws from
        if workers:
            over = torch.multiprocessing.get_context().Semaphore(0)
            for _ in range(workers):
                weakref.finalize(self, over.release)  # once nobody can ask them, or at the end of the process
            options["worker_init_fn"] = partial(_leave_signals, over)
        reader: Any = _Reader(self.images)  # type: ignore[arg-type]
        self._batches = DataLoader(reader, None, sampler=self._jobs, **options)
        return self

    @property
    def order_depends_on(self) -> list[int]:
        """The window and the number of processes."""
        return [self.window, self.world_size]

    def order(self) -> Tensor:
        """Rows of this process's images in the current epoch's order, int64."""
        if not self.shuffle:
            return super().order()
        per_shard, total = self.images.per_shard, len(self.indices)  # type: ignore[attr-defined]
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
        order, size = self.order(), self.batch_size
        order = order[first * size :]
        ahead: list[list[int]] = [[] for _ in range(first, len(self))]
        if self.images.store.is_remote and ahead:  # type: ignore[attr-defined]
            per_shard = self.images.per_shard  # type: ignore[attr-defined]
            shards, places = np.unique((order // per_shard).numpy(), return_index=True)
            for shard, place in sorted(zip(shards.tolist(), places.tolist(), strict=True), key=lambda pair: pair[1]):
                ahead[max(0, (place - self.window * per_shard) // size)].append(shard)
        self._jobs[:] = [(order[k * size : (k + 1) * size], soon) for k, soon in enumerate(ahead)]
        for batch, ((rows, _), images) in enumerate(zip(list(self._jobs), self._batches, strict=True), first + 1):
            if isinstance(images, DataError):
                raise images
            labels = self.labels.index_select(0, rows)
            self.batches_done = batch
            yield images, labels.pin_memory() if self.pin_memory else labels
