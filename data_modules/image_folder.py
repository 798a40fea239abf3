"""Anyone's pictures: a folder with one folder of pictures per class."""

import os
import stat
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor

from data_modules.base import DataError, ImageDataModule, Parts, Split
from data_modules.batches import stratified_split
from data_modules.picture_cache import ListedPicture, PictureCache, cached_pictures
from data_modules.pictures import SUFFIXES, picture_paths, printable, shared_pictures

SPLITS: tuple[Split, ...] = get_args(Split)
MISNOMERS = {*SPLITS, "training", "testing", "valid", "validation"}  # of SPLITS: passed over, or taken for classes
LAYOUTS = (
    "name the folder with your pictures, for instance --data_dir my_pictures: it holds train/CLASS/PICTURE, "
    "with val/ and test/ beside train/ if you have them, or CLASS/PICTURE"
)


class ImageFolder(ImageDataModule):
    """A folder of pictures, laid out as ``train/<class>/*`` with optional ``val/`` and ``test/``, or as ``<class>/*``.

    Parts that have no folder are cut from the training pictures, stratified, by the seed. The folders name the classes.
    Pictures may be JPEG, PNG, WebP, BMP, GIF or TIFF, also in folders within a class's folder; other files and hidden
    ones are not looked at. They are decoded once, at the first use, into a cache in ``$LIT_NN_CACHE`` or else
    ``~/.cache/lit-nn``; see `data_modules.pictures` for how.

    Everything that describes the data set (`class_names`, `image_shape`, `mean`, `std`) is read from the pictures, so
    already asking for it finds what is wrong with them.

    Args:
        data_dir: The folder.
        image_size: Width and height to which pictures are scaled and cut, in pixels; None for the median shorter side
            of about a thousand of the pictures, at most 224.
        channels: 1 for gray, 3 for colour; None for gray if these thousand are all gray, else colour.
        test_fraction: Share of each class that is held out for the test, if there is no ``test/``.
        on_error: What a picture that cannot be read does: "stop" (after listing all of them), or "skip".
        options: What every data set takes: ``batch_size``, ``val_fraction``, ``augment``, ``seed``, ...
    """

    default_augment = "flip,translate"

    def __init__(
        self,
        data_dir: str = "data",
        image_size: int | None = None,
        channels: int | None = None,
        test_fraction: float = 0.1,
        on_error: Literal["stop", "skip"] = "stop",
        **options: Any,
    ) -> None:
        super().__init__(data_dir, **options)
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size is {image_size}; it must be at least 1")
        if channels not in (None, 1, 3):
            raise ValueError(f"channels is {channels}; it must be 1 (gray) or 3 (colour)")
        if not 0 < test_fraction < 1:
            raise ValueError(f"test_fraction is {test_fraction}; it must lie between 0 and 1")
        if on_error not in ("stop", "skip"):
            raise ValueError(f"on_error is {on_error!r}; it must be 'stop' or 'skip'")
        self.image_size, self.channels = image_size, channels
        self.test_fraction, self.on_error = test_fraction, on_error

    # --- what base.ImageDataModule reads ----------------------------------------------------------------------------

    @property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """Names of the training folders, sorted."""
        return self._listed[0]

    @property
    def image_shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        """Channels, height and width of every image."""
        channels, height, width = self._pictures.images.shape[1:]
        return channels, height, width

    @property
    def mean(self) -> list[float]:  # type: ignore[override]
        """Mean of each channel over the training part, with pixels scaled to [0, 1]."""
        return self._moments[0].tolist()

    @property
    def std(self) -> list[float]:  # type: ignore[override]
        """Standard deviation of each channel over the training part; at least one level of 255, as it divides."""
        mean, mean_square = self._moments
        return np.sqrt(np.maximum(mean_square - mean**2, 1 / 255**2)).tolist()

    # --- the pictures -----------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Decode the pictures, unless an earlier run did, and look for what is wrong with them.

        Raises:
            DataError: If they cannot be used; the message says why.
        """
        self.split("train")

    @cached_property
    def _moments(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and mean square of the training part's channels, (C,) each."""
        training = self.split("train")[2].numpy()
        mean, mean_square = self._pictures.moments[training].mean(0, dtype=np.float64)
        return mean, mean_square

    @cached_property
    def _listed(self) -> tuple[list[str], list["_Picture"]]:
        """Names of the classes, and all pictures."""
        try:
            return _list_folder(Path(self.data_dir))
        except OSError as error:
            raise DataError(f"{printable(error.filename)} cannot be looked into: {error.strerror}") from error

    @cached_property
    def _pictures(self) -> PictureCache:
        """The pictures, decoded, in the order of the listing."""
        files = [picture.file for picture in self._listed[1]]
        root, keep_failures = Path(self.data_dir), self.on_error == "skip"
        pictures = cached_pictures(root, files, self.image_size, self.channels, keep_failures)
        if pictures.failures:
            report = f"{len(pictures.failures)} of {len(files)} pictures in {root} cannot be read:" + "".join(
                f"\n  {printable(files[row].path)}: {reason}" for row, reason in sorted(pictures.failures.items())
            )
            if self.on_error == "stop":
                raise DataError(f"{report}\nRepair or remove them, or leave them out with --data.on_error skip")
            rank_zero_warn(f"{report}\nThey are left out")
        return pictures

    def _parts(self, name: Split) -> Parts:
        root, (class_names, listing), pictures = Path(self.data_dir), self._listed, self._pictures
        labels = torch.tensor([picture.label for picture in listing])  # (N,)
        readable = [row for row in range(len(listing)) if row not in pictures.failures]
        rows: dict[Split, Tensor] = {
            split: torch.tensor([row for row in readable if listing[row].split == split], dtype=torch.int64)
            for split in SPLITS
        }
        missing = [name for label, name in enumerate(class_names) if not (labels[rows["train"]] == label).any()]
        if missing:
            raise DataError(f"{root}: no training picture of {', '.join(missing)}; add some or remove the folder")
        own = {picture.split for picture in listing}
        fractions: dict[Split, float] = {"test": self.test_fraction, "val": self.val_fraction}
        for split, fraction in fractions.items():
            if split not in own:
                if (root / split).is_dir():
                    rank_zero_warn(f"{root / split} has no pictures in folders of classes: the part is cut from train")
                kept, cut_off = stratified_split(labels[rows["train"]], fraction, self.seed)
                rows["train"], rows[split] = rows["train"][kept], rows["train"][cut_off]
            counts = labels[rows[split]].bincount(minlength=len(class_names))
            if not counts.any():
                reason = "none can be read" if split in own else "each class needs three or more"
                raise DataError(f"{root}: too few pictures for a {split} part; {reason}")
            if (counts == 0).any():
                lacking = [name for name, count in zip(class_names, counts, strict=True) if count == 0]
                rank_zero_warn(f"{root}: the {split} part has no picture of {', '.join(lacking)}")

        self._report_shared(rows)
        arrays = (pictures.images, labels)
        return {split: (arrays, members) for split, members in rows.items()}

    def _report_shared(self, rows: dict[Split, Tensor]) -> None:
        listing, digests = self._listed[1], self._pictures.digests

        def name(split: Split, place: int) -> str:
            return f"{split} {printable(listing[int(rows[split][place])].file.path)}"

        shared = shared_pictures({split: digests[members.numpy()] for split, members in rows.items()})
        pairs = [f"{name(one, place)} = {name(other, other_place)}" for one, place, other, other_place in shared]
        if pairs:
            rank_zero_warn(
                f"{self.data_dir}: {len(pairs)} pictures lie in two parts, which makes results look better than they "
                "are:" + "".join(f"\n  {pair}" for pair in pairs)
            )


class _Picture(NamedTuple):
    """A picture file and where it belongs."""

    split: Split
    label: int
    file: ListedPicture


def _list_folder(root: Path) -> tuple[list[str], list[_Picture]]:
    """Names of the classes, and all pictures in a fixed order.

    Raises:
        DataError: If the folder is not laid out as a data set.
        OSError: If a folder cannot be looked into.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; {LAYOUTS}")
    if misnamed := sorted({path.name for path in root.iterdir() if path.name.lower() in MISNOMERS} - {*SPLITS}):
        raise DataError(f"{root} has {', '.join(misnamed)}; rename it to train, val or test")
    folders: dict[Split, Path] = {split: root / split for split in SPLITS if (root / split).is_dir()}
    if folders and "train" not in folders:
        raise DataError(f"{root} has {' and '.join(folders)} but no train; {LAYOUTS}")
    folders = folders or {"train": root}
    classes = {split: _class_folders(folder) for split, folder in folders.items()}
    names = list(classes["train"])
    if len(names) < 2:
        found = f"only one class, {names[0]}" if names else "no folders of classes"
        raise DataError(f"{folders['train']} has {found}; a classifier needs two or more; {LAYOUTS}")
    for split, found_classes in classes.items():
        if unknown := [name for name in found_classes if name not in names]:
            raise DataError(f"{folders[split]} has classes that train lacks: {', '.join(unknown)}")

    listing = [
        _Picture(split, names.index(name), file)
        for split in classes
        for name, folder in classes[split].items()
        for file in _picture_files(folder, root)
    ]
    empty = set(range(len(names))) - {picture.label for picture in listing if picture.split == "train"}
    if empty:
        raise DataError(
            f"{folders['train']} has classes without pictures: {', '.join(names[label] for label in sorted(empty))}; "
            f"add some (names ending in {' '.join(sorted(SUFFIXES))}) or remove the folders"
        )
    return names, listing


def _class_folders(folder: Path) -> dict[str, Path]:
    """The folders of the classes, sorted by name."""
    around = {folder.resolve(), *folder.resolve().parents}
    classes = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not os.path.isdir(path):  # noqa: PTH112 (Path.is_dir raises at a circle of links)
            continue
        if path.resolve() in around:
            raise DataError(f"{printable(path)} is a link to a folder that it lies in; remove it")
        classes[printable(path.name)] = path
    return classes


def _picture_files(folder: Path, root: Path) -> Iterator[ListedPicture]:
    """All pictures in a class's folder and the folders in it."""

    def stop(error: OSError) -> None:
        raise error

    skip = len(os.path.join(root, ""))  # noqa: PTH118
    for path in picture_paths(folder, stop):
        try:
            status = os.stat(path)  # noqa: PTH116
        except OSError:  # a broken link, for instance; decoding will report it
            yield ListedPicture(path[skip:], -1, 0, 0)
            continue
        if stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            yield ListedPicture(path[skip:], status.st_size, status.st_mtime_ns, status.st_ctime_ns)
