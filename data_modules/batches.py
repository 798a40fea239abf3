"""The batch path: whole batches of uint8 images cut by index from one array, in an order that can be repeated.

There is no per-image Python. The order of an epoch is a function of (seed, epoch) alone, so a run that stopped
anywhere can be continued exactly, and every process of a distributed run can work out its own part of it.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]  # uint8 images (B, C, H, W) and int64 labels (B,)


def seeded_generator(*key: int) -> torch.Generator:
    """A CPU random generator that depends on all the numbers of ``key``, and differs when any of them does.

    Args:
        key: Non-negative whole numbers, for instance (seed, epoch, batch).
    """
    # With its length in front, for numpy fills short keys up with zeros.
    seed = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) >> 1)  # manual_seed takes 63 bits


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Cut a part off a data set in which every class keeps its share.

    Args:
        labels: Class of each image, int64 (N,).
        fraction: Share of each class that goes to the second part; a class of two or more images with a positive
            fraction gives at least one image and keeps at least one.
        seed: Decides which images go.

    Returns:
        Sorted indices of the first (large) and of the second (cut off) part, both int64.
    """
    generator = seeded_generator(seed)
    cut_off = []
    for label in labels.unique():  # sorted, so that the split does not depend on the order of the classes
        members = (labels == label).nonzero().squeeze(1)
        count = round(fraction * len(members))
        if fraction > 0:
            count = min(max(count, 1), len(members) - 1)
        cut_off.append(members[torch.randperm(len(members), generator=generator)[:count]])
    second = torch.cat(cut_off).sort().values
    is_first = torch.ones(len(labels), dtype=torch.bool)
    is_first[second] = False
    return is_first.nonzero().squeeze(1), second


def _balanced_draws(labels: Tensor, generator: torch.Generator) -> Tensor:
    """As many places of ``labels`` (N,) as it has, drawn with replacement: first a class, then one of its members."""
    by_class = labels.argsort(stable=True)
    counts = labels.bincount()
    starts, present = counts.cumsum(0) - counts, counts.nonzero().squeeze(1)
    classes = present[torch.randint(len(present), (len(labels),), generator=generator)]  # (N,)
    shares = torch.rand(len(labels), dtype=torch.float64, generator=generator)  # (N,) in [0, 1)
    return by_class[starts[classes] + (shares * counts[classes]).long()]


class BatchLoader:
    """Cuts batches from an array of images; the Trainer takes it wherever it takes a ``DataLoader``.

    With ``shuffle`` (training) the order changes every epoch and an incomplete last batch is left out; without it
    (validation, test) every image comes exactly once, in the order of ``indices``. Each of ``world_size`` processes
    gets its own part of the same order: global batch k of size ``batch_size * world_size`` holds the same images
    however many processes share it. All processes get the same number of batches; in evaluation the last one may be
    shorter on some of them, even empty, so nothing is repeated or padded.

    Args:
        images: All images, uint8 (N, C, H, W); may be memory-mapped or on an accelerator.
        labels: All labels, int64 (N,).
        indices: Which of them belong to this part of the data set, int64 (M,).
        batch_size: Images per batch and process.
        shuffle: Whether this is the training order.
        balanced: With ``shuffle``: draw the images with replacement, each class as often as any other.
        seed: Decides the order, together with the epoch.
        rank: Number of this process.
        world_size: Number of processes.
        pin_memory: Put batches in page-locked memory, from which a GPU copies faster.

    Raises:
        ValueError: If there are fewer training images than processes.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        indices: Tensor,
        batch_size: int,
        *,
        shuffle: bool = False,
        balanced: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        if shuffle and len(indices) < world_size:
            raise ValueError(f"{len(indices)} training images cannot be shared among {world_size} processes")
        self.images, self.labels, self.indices = images, labels, indices
        self.batch_size, self.shuffle, self.balanced, self.seed = batch_size, shuffle, balanced, seed
        self.rank, self.world_size, self.pin_memory = rank, world_size, pin_memory
        self.epoch = 0
        self.batches_done = 0  # of the current epoch
        self._first_batch = 0  # where the next iteration starts; not 0 only after load_state_dict

    batch_sampler = None  # the Trainer asks for it wherever there is a sampler

    @property
    def sampler(self) -> "BatchLoader":
        """Where the Trainer looks for ``set_epoch``."""
        return self

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
        order, generator = self.indices, seeded_generator(self.seed, self.epoch)
        if self.shuffle and self.balanced:
            order = order[_balanced_draws(self.labels[order.to(self.labels.device)].cpu(), generator)]
        elif self.shuffle:
            order = order[torch.randperm(len(order), generator=generator)]
        return order[: self._used()][self.rank :: self.world_size]

    def __iter__(self) -> Iterator[Batch]:
        """Cut the batches of the current epoch, from where a restored state left off."""
        # A generator starts at its first next(), after the Trainer has called set_epoch and load_state_dict.
        first, self._first_batch = self._first_batch, 0
        order = self.order().to(self.images.device)  # at once: at every step it would wait for the GPU
        for batch in range(first, len(self)):
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]  # (B,)
            # index_select copies whole images; the general indexing of images[rows] takes about ten times as long.
            images, labels = self.images.index_select(0, rows), self.labels.index_select(0, rows)  # (B, C, H, W), (B,)
            self.batches_done = batch + 1
            yield (images.pin_memory(), labels.pin_memory()) if self.pin_memory else (images, labels)

    def state_dict(self) -> dict[str, Any]:
        """Where in the training this loader is; the Trainer stores it in checkpoints."""
        return {"epoch": self.epoch, "batches_done": self.batches_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a stored place: the next iteration starts with the first batch that was not yet cut."""
        self.epoch, self.batches_done = state["epoch"], state["batches_done"]
        self._first_batch = self.batches_done
