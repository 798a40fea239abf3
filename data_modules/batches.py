"""The batch path: whole batches of uint8 images cut by index from one array, without Python for each image.

The order of an epoch is a function of (seed, epoch) alone, so a run that stopped anywhere can be continued exactly, and
every process of a distributed run can work out its own part of it.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_modules.errors import OptionError
from data_modules.files import will_need

Batch = tuple[Tensor, Tensor]  # uint8 images (B, C, H, W) and labels, int64 (B,), or 0 or 1, float32 (B, K)


READ_AHEAD = 2**20  # bytes of a batch from which on a step does not wait for the disk; a smaller one is cut faster


def one_ahead(items: Iterator[Batch]) -> Iterator[Batch]:
    """The same items; a thread makes the next one while one is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def seeded_generator(*key: int) -> torch.Generator:
    """A CPU random generator for a key of non-negative numbers, such as (seed, epoch, batch)."""
    # numpy fills short keys up with zeros, so the length comes first.
    seed = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) >> 1)  # manual_seed takes 63 bits


def images_per_class(labels: Tensor, num_classes: int) -> Tensor:
    """How many images each class has, int64 (K,), by labels int64 (N,), or 0 or 1 (N, K)."""
    return labels.sum(0).long() if labels.ndim == 2 else labels.bincount(minlength=num_classes)


@dataclass(eq=False)
class BatchLoader:
    """Cuts batches from an array of images; the Trainer takes it wherever it takes a ``DataLoader``.

    With ``shuffle`` (training) the order changes every epoch and an incomplete last batch is left out; without it
    (validation, test) every image comes exactly once, in the order of ``indices``. Each of ``world_size`` processes
    gets its own part of the same order, whose global batches of ``batch_size * world_size`` images are the same however
    many processes share them. All get the same number of batches; in evaluation the last one may be shorter on some
    processes, even empty, so nothing is repeated or padded.
    """

    images: Tensor  # all images, uint8 (N, C, H, W); may be memory-mapped or on an accelerator
    labels: Tensor  # all labels, int64 (N,) or float32 (N, K)
    indices: Tensor  # which of them belong to this part of the data set, int64 (M,)
    batch_size: int  # images per batch and process
    _: KW_ONLY
    shuffle: bool = False  # whether this is the training order
    weights: Tensor | None = None  # how often each of the M is drawn, float64 (M,); None for each once, shuffled
    seed: int = 0  # decides the order, together with the epoch
    rank: int = 0  # number of this process
    world_size: int = 1
    pin_memory: bool = False  # put batches in page-locked memory, from which a GPU copies faster

    batch_sampler = None  # the Trainer asks for it wherever there is a sampler

    def __post_init__(self) -> None:
        if self.shuffle and len(self.indices) < self.world_size:
            raise OptionError(f"{len(self.indices)} training images cannot be shared among {self.world_size} processes")
        self.epoch = 0
        self.batches_done = 0  # of the current epoch
        self._first_batch = 0  # where the next iteration starts; not 0 only after load_state_dict
        self.sampler = self  # where the Trainer looks for ``set_epoch``

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; the Trainer calls this before every epoch."""
        if epoch != self.epoch:
            self.epoch, self._first_batch = epoch, 0

    def _used(self) -> int:
        """How many images of an epoch's order are used, counted over all processes."""
        total, global_batch = len(self.indices), self.batch_size * self.world_size
        if not self.shuffle:
            return total
        return total - total % (global_batch if total >= global_batch else self.world_size)

    def __len__(self) -> int:
        """Batches per epoch, the same on every process."""
        return math.ceil(math.ceil(self._used() / self.world_size) / self.batch_size)

    def order(self) -> Tensor:
        """Indices of this process's images in the current epoch's order, int64."""
        order, count, generator = self.indices, len(self.indices), seeded_generator(self.seed, self.epoch)
        if self.shuffle and self.weights is None:
            order = order[torch.randperm(count, generator=generator)]
        elif self.shuffle and self.weights is not None:
            order = order[self.weights.multinomial(count, replacement=True, generator=generator)]
        return order[: self._used()][self.rank :: self.world_size]

    def __iter__(self) -> Iterator[Batch]:
        """Cut the batches of the current epoch, from where a restored state left off."""
        # A generator starts at its first next(), after the Trainer has called set_epoch and load_state_dict.
        first, self._first_batch = self._first_batch, 0
        order = self.order().to(self.images.device)  # at once: at every step it would wait for the GPU
        starts = range(first * self.batch_size, len(self) * self.batch_size, self.batch_size)
        waits = self.images.device.type == "cpu" and self.batch_size * self.images[0].nbytes >= READ_AHEAD
        batches = (self._cut(order[start : start + self.batch_size], waits) for start in starts)  # rows (B,)
        for batch, images_and_labels in enumerate(one_ahead(batches) if waits else batches, first + 1):
            self.batches_done = batch
            yield images_and_labels

    def _cut(self, rows: Tensor, in_thread: bool = False) -> Batch:
        if in_thread:
            will_need(self.images, rows)
            # By numpy: torch would start a second team of threads for this one, which the first would wait for
            # (benchmarks/augment.py: 489 images a second, by numpy 1,196; n = 5, two cores of an Intel Xeon).
            images = torch.from_numpy(self.images.numpy().take(rows.numpy(), 0))  # (B, C, H, W)
        else:
            # Copies whole images; the general indexing of images[rows] takes about ten times as long.
            images = self.images.index_select(0, rows)
        labels = self.labels.index_select(0, rows)  # (B,)
        return (images.pin_memory(), labels.pin_memory()) if self.pin_memory else (images, labels)

    def state_dict(self) -> dict[str, Any]:
        """Where in the training this loader is; the Trainer stores it in checkpoints."""
        return {"epoch": self.epoch, "batches_done": self.batches_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a stored place: the next iteration starts with the first batch that was not yet cut."""
        self.epoch = state["epoch"]
        self.batches_done = self._first_batch = state["batches_done"]
