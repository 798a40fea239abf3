"""More images than a disk holds: shards of them in a folder or in S3-compatible storage, read while one trains."""

import json
import os
import zlib
from typing import Any, ClassVar

import torch
from torch import Tensor

from data_modules.base import Arrays, ImageDataModule, Split
from data_modules.batches import BatchLoader
from data_modules.errors import DataError, require
from data_modules.files import open_tensor
from data_modules.images.cache import cache_folder, kept
from data_modules.images.shards import Shards, StreamLoader
from data_modules.images.store import Store

FORMAT = 1  # of what `images.shard_writer` writes


class ImageStream(ImageDataModule):
    """Shards that ``prepare_data.py --shards`` has written, with the parts, classes and numbers in their index.

    Args:
        data_dir: Where they lie: a folder, or ``s3://bucket/path`` (keys and endpoint from the usual variables).
        window: Shards whose images are shuffled together; the shards themselves are all shuffled.
        workers: Threads that read and decode, for each process, at least one; None for its share of the cores.
        cache_gb: Of what is downloaded so much stays in ``$LIT_NN_CACHE``, for all processes of a machine.
        options: Those of every data set; parts, ``fit`` and size were decided when the shards were written.
    """

    class_names = image_shape = mean = std = None  # type: ignore[assignment]  # they come from the shards
    default_augment = "flip,translate"
    samplings: ClassVar = ("shuffled",)
    loader_class = StreamLoader

    def __init__(
        self,
        data_dir: str = "data",
        window: int = 16,
        workers: int | None = None,
        cache_gb: float = 50.0,
        **options: Any,
    ) -> None:
        super().__init__(data_dir, **options)
        require("window", window, window >= 1, "at least 1")
        require("workers", workers, workers is None or workers >= 0, "at least 0")
        require("on_device", self.on_device, not self.on_device, "left out: a stream is not kept")
        left_out, folds = "left out: the shards have their parts", options.get("folds")
        require("val_fraction", self.val_fraction, self.val_fraction == 0.1, left_out)
        require("folds", folds, folds is None, left_out)
        self.window, self.workers, self.cache_bytes = window, workers, cache_gb * 1e9
        self._store = Store(self.data_dir)
        try:
            content = self._store.read("images.json")
            self._index: dict[str, Any] = json.loads(content)
            is_newer = self._index["format"] > FORMAT
        except (OSError, ValueError, LookupError, TypeError) as error:
            lacks = f"{self.data_dir} holds no complete shards ({error}); write them with"
            raise DataError(f"{lacks} python scripts/prepare_data.py --data image_folder --shards OUT") from error
        if is_newer:
            raise DataError(f"{self.data_dir} was written by a newer version of this project")
        sizes = [size for part in self._index["parts"].values() for size, _ in part["shards"]]
        least = min(sum(sizes), 2 * window * max(sizes)) / 1e9  # this window and the next one, of each process
        enough = cache_gb >= least or not self._store.is_remote
        require("cache_gb", cache_gb, enough, f"at least {least:.3g} for a window of {window} shards")
        require("fit", self.fit, self.fit in ("crop", self._index["fit"]), f"{self._index['fit']}, as in the shards")
        for name in ("class_names", "image_shape", "mean", "std", "levels", "fit"):
            value = self._index[name]
            setattr(self, name, tuple(value) if name == "image_shape" else value)
        self._sum = zlib.crc32(content)
        self._cache = cache_folder() / f"stream-{self._sum:08x}"

    def parts(self) -> dict[str, Tensor]:
        """What a run must remember: which shards it has seen, so that it is never tested on others' parts."""
        return super().parts() | {"shards": torch.tensor([self._sum])}

    def load(self, split: Split) -> Arrays:
        """Labels of a part, and its images, which are read when they are asked for."""
        known = (self.known_parts or {}).get("shards")
        if self.known_parts and (known is None or known.item() != self._sum):
            raise DataError(f"{self.data_dir} holds other shards than those of this run, and maybe other parts")
        images: Any = Shards(self._store, split, self._index, self._cache, self.cache_bytes)
        name = f"{split}/labels.npy"
        if not self._store.is_remote:
            return images, open_tensor(self._store.path(name))
        return images, kept(self._cache / name, lambda path: path.write_bytes(self._store.read(name)), open_tensor)

    def _loader(self, name: Split) -> BatchLoader:
        """A loader, with its share of the cores."""
        loader, here = super()._loader(name), self.trainer.num_devices if self.trainer else 1
        if isinstance(loader, StreamLoader):
            loader.window = self.window
            workers = (os.cpu_count() or 1) // here if self.workers is None else self.workers
            loader.images.use(max(1, workers), self.window)
        return loader
