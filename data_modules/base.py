"""What every data set shares: splits, loaders and augmentation. A new data set is a subclass that loads arrays."""

from typing import Any, ClassVar, Literal

import lightning as L
import torch
from torch import Tensor

from data_modules.augment import Augment, Draws
from data_modules.batches import Batch, BatchLoader, seeded_generator, stratified_split

Arrays = tuple[Tensor, Tensor]  # uint8 images (N, C, H, W) and int64 labels (N,)
Split = Literal["train", "val", "test"]
Parts = dict[Split, tuple[Arrays, Tensor]]  # arrays, and the int64 indices (M,) that belong to the part


class DataError(Exception):
    """A data set cannot be had or used; the message says what was tried and what to do instead."""

    exit_status = 1  # of the command that it ends


class ImageDataModule(L.LightningDataModule):
    """A data set of labelled images, as two arrays.

    A subclass describes the data set by the class attributes below and implements `load`; `prepare_data` as well if
    something has to be downloaded or unpacked first. Everything else is inherited. The name given to ``--data`` is the
    name of the subclass's file.

    The test images are the published test set. Validation is cut from the training images, stratified by class.

    Args:
        data_dir: Folder in which the data set lies, or into which it is downloaded.
        batch_size: Training images per batch and process.
        val_fraction: Share of the training images that is held out for validation, if the data set has no
            validation part of its own.
        augment: What to do to training images: names joined by commas, "none", or "default" for what suits the
            data set.
        sampling: Order of the training images in an epoch: "shuffled", or "balanced", which draws as many with
            replacement so that every class comes equally often.
        on_device: Whether to keep the images on the accelerator, if they fit.
        seed: Decides the split, the order of the images and the augmentation. The CLI passes ``--seed``.
    """

    class_names: ClassVar[list[str]]
    """Name of each class, in the order of the labels."""
    image_shape: ClassVar[tuple[int, int, int]]
    """Channels, height and width of every image."""
    mean: ClassVar[list[float]]
    """Mean of each channel over the training images, with pixels scaled to [0, 1]."""
    std: ClassVar[list[float]]
    """Standard deviation of each channel, likewise."""
    default_augment: ClassVar[str] = "none"
    """What ``augment="default"`` means for this data set."""

    def __init__(
        self,
        data_dir: str = "data",
        batch_size: int = 128,
        val_fraction: float = 0.1,
        augment: str = "default",
        sampling: Literal["shuffled", "balanced"] = "shuffled",
        on_device: bool = False,
        seed: int = 42,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction is {val_fraction}; it must lie between 0 and 1")
        if sampling not in ("shuffled", "balanced"):
            raise ValueError(f"sampling is {sampling!r}; it must be 'shuffled' or 'balanced'")
        self.data_dir = data_dir
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.augment = Augment(self.default_augment if augment == "default" else augment)
        self.sampling, self.on_device = sampling, on_device
        self.seed = seed
        self._splits: Parts = {}
        self._train_loader: BatchLoader | None = None

    # --- what a data set fills in ---------------------------------------------------------------------------------

    def load(self, split: Split) -> Arrays | None:
        """Read one part of the data set; called on every process, after `prepare_data` ran on one of them.

        Args:
            split: Which part.

        Returns:
            uint8 images (N, C, H, W) and int64 labels (N,); None for "val" if it is to be cut from "train".

        Raises:
            DataError: If the files are missing or damaged.
        """
        raise NotImplementedError

    # --- what it gets ---------------------------------------------------------------------------------------------

    def split(self, name: Split) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels and the indices of those that belong to one part of the data set.

        Returns:
            uint8 images (N, C, H, W), int64 labels (N,), int64 indices (M,) into both.

        Raises:
            DataError: If the data cannot be read or does not fit its own description.
        """
        if name not in self._splits:
            self._splits |= self._parts(name)
        (images, labels), indices = self._splits[name]
        return images, labels, indices

    @property
    def class_counts(self) -> Tensor:
        """How many training images each class has, int64 (num_classes,)."""
        _, labels, indices = self.split("train")
        return labels.cpu()[indices].bincount(minlength=len(self.class_names))

    def _parts(self, name: Split) -> Parts:
        """Read a part of the data set, and the others that come with it."""
        names: list[Split] = ["test"] if name == "test" else ["train", "val"]
        parts: Parts = {}
        for split in names:
            if (arrays := self._checked(split)) is not None:
                parts[split] = arrays, torch.arange(len(arrays[1]))
            else:
                arrays, _ = parts["train"]
                train_indices, val_indices = stratified_split(arrays[1], self.val_fraction, self.seed)
                parts = {"train": (arrays, train_indices), "val": (arrays, val_indices)}
        return parts

    def _checked(self, split: Split) -> Arrays | None:
        arrays = self.load(split)
        if arrays is None:
            if split == "val":
                return None
            raise DataError(f"{type(self).__name__} has no {split} images")
        images, labels = arrays
        if images.dtype != torch.uint8 or images.shape != (len(labels), *self.image_shape):
            raise DataError(
                f"{type(self).__name__}: images are {images.dtype} {tuple(images.shape)}, "
                f"not uint8 {(len(labels), *self.image_shape)}"
            )
        if len(labels) == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < len(self.class_names):
            raise DataError(f"{type(self).__name__}: labels do not lie in 0..{len(self.class_names) - 1}")
        return arrays

    def setup(self, stage: str) -> None:
        """Read what a stage of the Trainer needs.

        Raises:
            DataError: If it cannot be read, or does not fit on the accelerator.
        """
        self.split("test" if stage in ("test", "predict") else "train")
        if self.on_device and self.trainer is not None:
            self._move_to(self.trainer.strategy.root_device)

    def _move_to(self, device: torch.device) -> None:
        moved: dict[int, Arrays] = {}  # parts that share their arrays go on sharing them
        for part, (arrays, indices) in list(self._splits.items()):
            if id(arrays) not in moved:
                try:
                    moved[id(arrays)] = (arrays[0].to(device), arrays[1].to(device))
                except torch.OutOfMemoryError as error:
                    raise DataError(
                        f"{arrays[0].nbytes / 1e9:.1f} GB of images do not fit on {device}; leave out --data.on_device"
                    ) from error
            self._splits[part] = (moved[id(arrays)], indices)

    def _loader(self, name: Split) -> BatchLoader:
        trainer = self.trainer
        images, labels, indices = self.split(name)
        training = name == "train"
        overfit = training and trainer is not None and trainer.overfit_batches > 0  # type: ignore[attr-defined]
        if overfit:  # the same few batches in every epoch, which are to be learnt by heart
            indices = indices[torch.randperm(len(indices), generator=seeded_generator(self.seed))]
        return BatchLoader(
            images,
            labels,
            indices,
            self.batch_size if training else 4 * self.batch_size,  # no gradients to keep: larger batches fit
            shuffle=training and not overfit,
            balanced=self.sampling == "balanced",
            seed=self.seed,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda" and not images.is_cuda,
        )

    def train_dataloader(self) -> BatchLoader:
        """Training batches, in a new order every epoch."""
        self._train_loader = self._loader("train")
        return self._train_loader

    def val_dataloader(self) -> BatchLoader:
        """Validation batches."""
        return self._loader("val")

    def test_dataloader(self) -> BatchLoader:
        """Test batches."""
        return self._loader("test")

    def predict_dataloader(self) -> BatchLoader:
        """The test images, in their published order."""
        return self._loader("test")

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch; Lightning's own first looks for tensors in whatever structure a batch may have."""
        images, labels = batch
        pinned = device.type == "cuda"  # only then is it safe to go on before they have moved
        return images.to(device, non_blocking=pinned), labels.to(device, non_blocking=pinned)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Any:
        """Augment training batches, on the device; the Trainer calls this for every batch."""
        if not self.augment.names or self.trainer is None or not self.trainer.training:
            return batch
        assert self._train_loader is not None
        epoch = self._train_loader.epoch
        generator = seeded_generator(self.seed, epoch, self._train_loader.batches_done, 0)
        draws = Draws(generator, self.trainer.global_rank, self.trainer.world_size)
        return self.augment(*batch, len(self.class_names), draws, epoch)
