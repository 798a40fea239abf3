"""What every data set shares: splits, loaders and augmentation. A new data set is a subclass that loads arrays."""

import os
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from data_modules.augment import Augment, Draws
from data_modules.batches import Batch, BatchLoader, images_per_class, seeded_generator
from data_modules.errors import DataError, DataNote, require
from data_modules.images.decode import digest
from data_modules.images.fit import FITS
from data_modules.images.parts import OPEN, TEST, VAL, cut, folds_of, stratified_split

Arrays = tuple[Tensor, Tensor]  # uint8 images (N, C, H, W) and int64 labels (N,)
Split = Literal["train", "val", "test"]
Parts = dict[Split, tuple[Arrays, Tensor]]  # arrays, and the int64 indices (M,) that belong to the part
SPLITS: tuple[Split, ...] = get_args(Split)


def say(message: str) -> None:
    """Tell the user something about the data, on one process only."""
    rank_zero_warn(message, category=DataNote)


class ImageDataModule(L.LightningDataModule):
    """A data set of labelled images, as two arrays.

    A subclass describes the data set by the class attributes below and implements `load`; `prepare_data` as well if
    something has to be downloaded or unpacked first. The test images are the published test set. Validation is cut from
    the training images, stratified by class.

    Args:
        data_dir: Folder in which the data set lies, or into which it is downloaded.
        batch_size: Training images per batch and process.
        val_fraction: Share of the training images that is held out for validation, if there is no such part.
        fit: How images of another size become this one: "crop" cuts out the middle, "pad" shows the whole image between
            black bars, "squash" changes its shape.
        augment: What to do to training images: names joined by commas, "none", or "default" for what suits the data.
        sampling: Which training images an epoch has: "shuffled", each once; or as many drawn with replacement, so that
            every class comes equally often, "balanced", or every image as often as its weight says, "weighted".
        on_device: Whether to keep the images on the accelerator.
        folds: Cut all images, or the training images of a published data set, into so many parts of equal size, one
            of which becomes the test part.
        fold: Which one, from 1 to ``folds``.
        seed: Decides the split, the order of the images and the augmentation. The CLI passes ``--seed``.
    """

    class_names: ClassVar[list[str]]  # name of each class, in the order of the labels
    image_shape: ClassVar[tuple[int, int, int]]  # channels, height and width of every image
    mean: ClassVar[list[float]]  # of each channel over the training images, with pixels scaled to [0, 1]
    std: ClassVar[list[float]]  # standard deviation of each channel, likewise
    default_augment: ClassVar[str] = "none"  # what augment="default" means for this data set
    samplings: ClassVar[tuple[str, ...]] = ("shuffled", "balanced")  # values of ``sampling`` that it can have
    loader_class: ClassVar[type[BatchLoader]] = BatchLoader
    reads_data_dir: ClassVar[bool] = True  # whether it looks into data_dir at all
    multi_label: bool = False  # whether an image may have several labels, or none
    weights: Tensor | None = None  # how often each image of the training arrays is drawn when weighted, float64 (N,)
    files: Sequence[str] = ()  # names of the images' files, in the order of the arrays, if they have any
    levels: int = 65535  # which level is white in gray files of more than 8 bits, see images.decode.prepare_file

    def __init__(
        self,
        data_dir: str = "data",
        batch_size: int = 128,
        val_fraction: float = 0.1,
        fit: Literal["crop", "pad", "squash"] = "crop",
        augment: str = "default",
        sampling: Literal["shuffled", "balanced", "weighted"] = "shuffled",
        on_device: bool = False,
        folds: int | None = None,
        fold: int = 1,
        seed: int = 42,
    ) -> None:
        super().__init__()
        require("batch_size", batch_size, batch_size >= 1, "at least 1")
        require("val_fraction", val_fraction, 0 < val_fraction < 1, "between 0 and 1")
        require("fit", fit, fit in FITS, ", ".join(FITS))
        require("sampling", sampling, sampling in self.samplings, " or ".join(self.samplings))
        require("folds", folds, folds is None or folds >= 2, "at least 2")
        require("fold", fold, 1 <= fold <= (folds or 1), f"from 1 to {folds}" if folds else "left out without folds")
        self.data_dir = os.path.expanduser(data_dir)  # noqa: PTH111 (Path.expanduser raises where there is no home)
        self.batch_size, self.val_fraction, self.fit, self.seed = batch_size, val_fraction, fit, seed
        self.augment = Augment(self.default_augment if augment == "default" else augment)
        self.sampling, self.on_device = sampling, on_device
        # The parts() of the run that goes on or is evaluated, {} if it did not keep them: stronger than any option, and
        # to be set before anything is read.
        self.known_parts: dict[str, Tensor] | None = None
        self._fractions, self._is_cut = [val_fraction], False  # which parts are cut from training, and whether any is
        self._fold = [folds, fold] if folds else []
        self._changes: list[str] = []
        self._splits: Parts = {}
        self.features: dict[Split, Tensor] = {}  # of each part, which loaders give instead of images: float16 (N, V, D)

    def load(self, split: Split) -> Arrays | None:
        """Read one part of the data set; called on every process, after `prepare_data` ran on one of them.

        Returns:
            uint8 images (N, C, H, W) and int64 labels (N,), or if `multi_label` 0 or 1 for each class, float32 (N, K);
            None for "val" if it is to be cut from "train".
        """
        raise NotImplementedError

    def split(self, name: Split) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 images (N, C, H, W), int64 labels (N,), and the int64 indices (M,) of one part; raises DataError."""
        if name not in self._splits:
            self._splits |= self._parts(name)
        (images, labels), indices = self._splits[name]
        return images, labels, indices

    @property
    def class_counts(self) -> Tensor:
        """How many training images each class has, int64 (num_classes,)."""
        _, labels, indices = self.split("train")
        return images_per_class(labels.cpu()[indices], len(self.class_names))

    def parts(self) -> dict[str, Tensor]:
        """What a run must remember, int64 tensors: here the seed and the shares by which parts were cut."""
        seed, shares = self._cut()
        bits = torch.tensor(shares, dtype=torch.float64).view(torch.int64)
        return {"cut": torch.cat([torch.tensor([seed]), bits])}

    def _cut(self) -> tuple[int, list[float]]:
        """The seed and the shares by which parts are cut, then the folds and which of them; a known run's own."""
        known = (self.known_parts or {}).get("cut")
        if known is None:
            return self.seed, [*self._fractions, *self._fold]
        return int(known[0]), known[1:].view(torch.float64).tolist()

    def part_changes(self) -> str:
        """One line on what is otherwise than when the run of `known_parts` began; "" if nothing."""
        self.split("train")
        changes, (seed, shares), count = list(self._changes), self._cut(), len(self._fractions)
        if self._is_cut and (seed, shares) != (self.seed, [*self._fractions, *self._fold]):
            how = f"shares of {', '.join(map(str, shares[:count]))}"
            how += f", fold {shares[-1]:.0f} of {shares[-2]:.0f}" if len(shares) == count + 2 else ""
            changes += [f"parts stay as they were cut, with seed {seed} and {how}"]
        return "; ".join(changes)

    def described(self) -> dict[str, list[Any]]:
        """What a table says of the images of `split` besides their labels, by the names of `ImageTable`: numbers."""
        return {"file": [*range(len(self.split("train")[1]))]}

    def facts(self) -> dict[str, str]:
        """What prepare_data.py shows beside the counts, by its name."""
        return {}

    def _parts(self, name: Split) -> Parts:
        """Read a part of the data set, and the others that come with it."""
        seed, (val, *fold) = self._cut()
        has_folds = len(fold) == 2  # or it is the cut of another kind of data set
        if name == "test" and not has_folds:
            return {"test": self._whole(self.load("test"))}
        train, rows = self._whole(self.load("train"))
        if not has_folds and (own := self.load("val")) is not None:
            return {"train": (train, rows), "val": self._whole(own)}
        self._is_cut = True
        if not has_folds:
            parts = stratified_split(train[1], val, seed)
            return {"train": (train, parts[0]), "val": (train, parts[1])}
        pixels = np.array([digest(image.numpy().tobytes()) for image in train[0]])
        labels, marks = train[1].numpy(), np.column_stack([pixels, pixels, 0 * pixels, 0 * pixels])
        tested = np.where(folds_of(labels, marks, int(fold[0]), seed) == fold[1], TEST, OPEN)
        part = cut(labels, marks, tested, {VAL: val}, seed)
        return {split: (train, torch.from_numpy(np.flatnonzero(part == n))) for n, split in enumerate(SPLITS)}

    def _whole(self, arrays: Any) -> tuple[Arrays, Tensor]:
        """All of what was loaded; raises DataError if it is not as it was described."""
        (images, labels), name, classes = arrays, type(self).__name__, len(self.class_names)
        shape = (len(labels), *self.image_shape)
        if images.dtype != torch.uint8 or images.shape != shape:
            raise DataError(f"{name}: images are {images.dtype} {tuple(images.shape)}, not uint8 {shape}")
        wanted, most = ((len(labels), classes), 1) if self.multi_label else ((len(labels),), classes - 1)
        if len(labels) == 0 or labels.shape != wanted or not 0 <= labels.min() <= labels.max() <= most:
            raise DataError(f"{name}: labels do not lie in 0..{most}, in the shape {wanted}")
        return arrays, torch.arange(len(labels))

    def setup(self, stage: str) -> None:
        """Read what a stage of the Trainer needs; raises DataError."""
        self.split("test" if stage in ("test", "predict") else "train")
        if not self.on_device or self.trainer is None:
            return
        device, moved = self.trainer.strategy.root_device, dict[int, Arrays]()
        for part, (arrays, indices) in self._splits.items():
            try:
                if id(arrays) not in moved:  # parts that share their arrays go on sharing them
                    moved[id(arrays)] = (arrays[0].to(device), arrays[1].to(device))
            except torch.OutOfMemoryError as error:
                needed = f"{arrays[0].nbytes / 1e9:.1f} GB of images"
                raise DataError(f"{needed} do not fit on {device}; leave out --data.on_device") from error
            self._splits[part] = (moved[id(arrays)], indices)

    def _loader(self, name: Split) -> BatchLoader:
        trainer, training, (images, labels, indices) = self.trainer, name == "train", self.split(name)
        if name in self.features:  # which lie in a file
            images, labels = self.features[name], labels.cpu()
        options: dict[str, Any] = {"shuffle": training}
        if training and trainer is not None and trainer.overfit_batches > 0:  # type: ignore[attr-defined]
            # The same few batches in every epoch, which are to be learnt by heart.
            indices = indices[torch.randperm(len(indices), generator=seeded_generator(self.seed))]
            options["shuffle"] = False
        if training and self.sampling == "balanced":
            mine = labels.cpu()[indices]
            options["weights"] = mine.bincount().double().reciprocal()[mine]
        elif training and self.weights is not None and self.sampling == "weighted":
            options["weights"] = weights = self.weights[indices]
            require("sampling", "weighted", bool(weights.any()), "another one: all training images have the weight 0")
        if trainer:
            options |= {"rank": trainer.global_rank, "world_size": trainer.world_size}
            options["pin_memory"] = trainer.strategy.root_device.type == "cuda" and not images.is_cuda
        batch_size = self.batch_size if training else 4 * self.batch_size  # no gradients to keep: larger batches fit
        kind = BatchLoader if name in self.features else self.loader_class
        return kind(images, labels, indices, batch_size, seed=self.seed, **options)

    def train_dataloader(self) -> BatchLoader:
        """Training batches, in a new order every epoch."""
        return self._loader("train")

    def val_dataloader(self) -> BatchLoader:
        """Validation batches."""
        return self._loader("val")

    def test_dataloader(self) -> BatchLoader:
        """Test batches, in their published order; the same for predicting."""
        return self._loader("test")

    predict_dataloader = test_dataloader

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch; Lightning's own first looks for tensors in whatever structure a batch may have."""
        images, labels = batch
        pinned = device.type == "cuda"  # only then is it safe to go on before they have moved
        return images.to(device, non_blocking=pinned), labels.to(device, non_blocking=pinned)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Any:
        """Augment training batches, on the device; the Trainer calls this for every batch."""
        if not (self.augment.names or self.features) or self.trainer is None or not self.trainer.training:
            return batch
        loader: Any = self.trainer.train_dataloader
        generator = seeded_generator(self.seed, loader.epoch, loader.batches_done, 0)
        draws = Draws(generator, self.trainer.global_rank, self.trainer.world_size)
        if self.features:  # of several views of each image: one of them
            features, labels = batch  # (B, V, D)
            view = draws.randint(features.shape[1], len(features)).to(features.device)
            return features[torch.arange(len(features), device=features.device), view], labels
        size = getattr(self.trainer.lightning_module, "net_size", None)
        return self.augment(*batch, len(self.class_names), draws, loader.epoch, size=size)
