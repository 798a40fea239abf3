"""What data sets of image files share: a subclass lists the files; decoding, cache, checks and parts are here."""

from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_modules.base import SPLITS, ImageDataModule, Parts, Split, say
from data_modules.errors import DataError, require, some
from data_modules.files import atomic_path
from data_modules.images.cache import ImageCache, Settings, cache_folder, cached_images
from data_modules.images.decode import printable
from data_modules.images.fit import FITS
from data_modules.images.parts import OPEN, TEST, TRAIN, VAL, Numbers, among, copies, cut, remembered


class Listing(NamedTuple):
    """The images of a data set, in a fixed order."""

    class_names: list[str]
    files: list[str]  # paths, relative to the folder of the data set
    labels: list[int]
    splits: list[Split]  # where the user put each image; the parts that have none are cut from "train"


class ImageFiles(ImageDataModule):
    """A data set of image files, of which a subclass implements `list_images`.

    Identical images lie in one part. Which part it is depends on the image and the seed, and a run remembers it
    (`parts`): whatever comes, goes or is renamed later, what a run was trained on is never among what it is tested on.

    Args:
        data_dir: The folder.
        image_size: Side to which images are brought by ``fit``, in pixels, or [height, width]; None for the median
            shorter side of about a thousand of the images, at most 224.
        channels: 1 for gray, 3 for colour; None for gray if these thousand are all gray, else colour.
        test_fraction: Share of each class that is held out for the test, if the data set has no test part of its own.
        on_error: What an image that cannot be read does: "stop" (after listing all of them), or "skip".
        options: What every data set takes: ``batch_size``, ``val_fraction``, ``augment``, ``seed``, ...
    """

    default_augment = "flip,translate"

    def __init__(
        self,
        data_dir: str = "data",
        image_size: int | list[int] | None = None,
        channels: int | None = None,
        test_fraction: float = 0.1,
        on_error: Literal["stop", "skip"] = "stop",
        **options: Any,
    ) -> None:
        super().__init__(data_dir, **options)
        sides: list[Any] = [image_size] * 2 if isinstance(image_size, int | None) else image_size
        usable = len(sides) == 2 and all(side is None or side >= 1 for side in sides)
        require("image_size", image_size, usable, "a number of pixels, at least 1, or two: [height, width]")
        require("channels", channels, channels in (None, 1, 3), "1 (gray) or 3 (colour)")
        require("test_fraction", test_fraction, 0 < test_fraction < 1, "between 0 and 1")
        require("on_error", on_error, on_error in ("stop", "skip"), "stop or skip")
        (self.height, self.width), self.channels = sides, channels
        self.test_fraction, self.on_error = test_fraction, on_error
        self._fractions.append(test_fraction)

    def list_images(self) -> Listing:
        """Find the images; raises DataError, or OSError where a folder cannot be looked into."""
        raise NotImplementedError

    # --- what base.ImageDataModule reads ----------------------------------------------------------------------------

    @property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """Names of the classes, sorted."""
        return self._listing.class_names

    @property
    def image_shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        """Channels, height and width of every image."""
        channels, height, width = self._images.images.shape[1:]
        return channels, height, width

    @property
    def levels(self) -> int:  # type: ignore[override]
        """Which level is white in all gray images of more than 8 bits."""
        return self._images.levels or self._known_settings().levels or ImageDataModule.levels

    @property
    def mean(self) -> list[float]:  # type: ignore[override]
        """Mean of each channel over the training part, with pixels scaled to [0, 1]."""
        return self._moments[0].tolist()

    @property
    def std(self) -> list[float]:  # type: ignore[override]
        """Standard deviation of each channel over the training part; at least one level of 255, as it divides."""
        mean, mean_square = self._moments
        return np.sqrt(np.maximum(mean_square - mean**2, 1 / 255**2)).tolist()

    @cached_property
    def _moments(self) -> Any:
        """Mean and mean square of the training part's channels, (2, C)."""
        return self._images.moments[self.split("train")[2].numpy()].mean(0, dtype=np.float64)

    def prepare_data(self) -> None:
        """Decode the images, unless an earlier run did, and look for what is wrong with them; raises DataError."""
        self.split("train")

    # --- the images -------------------------------------------------------------------------------------------------

    @cached_property
    def _listing(self) -> Listing:
        try:
            return self.list_images()
        except OSError as error:
            raise DataError(f"{printable(error.filename)} cannot be looked into: {error.strerror}") from error

    @cached_property
    def _images(self) -> ImageCache:
        """The images, decoded, in the order of the listing."""
        files, root, skip = self._listing.files, Path(self.data_dir), self.on_error == "skip"
        known, fit = self._known_settings(), FITS.index(self.fit)
        asked = Settings(self.channels, self.height, self.width, None, fit)
        images = cached_images(root, files, asked, skip)
        channels, height, width = images.images.shape[1:]
        given = Settings(channels, height, width, images.levels, fit)
        open_yet = [name for name in ("channels", "height", "width", "levels") if getattr(asked, name) is None]
        needed = asked._replace(**{name: getattr(known, name) for name in open_yet})
        if any(None not in pair and len(set(pair)) > 1 for pair in zip(given, needed, strict=True)):
            images = cached_images(root, files, needed, skip)  # what suits the images has changed since the run began
        if images.failures:
            lines = [f"{printable(files[row])}: {reason}" for row, reason in sorted(images.failures.items())]
            report = self._list(f"{len(lines)} of {len(files)} images in {root} cannot be read:", lines, "unreadable")
            if not skip:
                raise DataError(f"{report}\nRepair or remove them, or leave them out with --data.on_error skip")
            say(f"{report}\nThey are left out")
        if images.levels not in (None, ImageDataModule.levels):
            say(f"{root}: gray images of more than 8 bits are scaled from 0..{images.levels} to 0..255")
        return images

    def _known_settings(self) -> Settings:
        """How the run whose parts are known decoded its images."""
        if self._known == {}:
            return Settings(levels=ImageDataModule.levels)  # as it was before runs remembered anything
        return Settings(*self._known["settings"].tolist()) if self._known else Settings()

    @property
    def _known(self) -> dict[str, Tensor] | None:
        """The known parts, unless they are those of another kind of data set."""
        return self.known_parts if not self.known_parts or "settings" in self.known_parts else None

    def _list(self, head: str, lines: list[str], name: str) -> str:
        """A message with the first ten lines of a list; all of a long one go to a file in the folder of the caches."""
        if len(lines) > 10:
            folder = Path(self.data_dir).resolve().name.encode("ascii", "ignore").decode()[:100]
            path = cache_folder() / f"{folder}-{name}.txt"
            more = f"... and {len(lines) - 10} more"
            with suppress(OSError), atomic_path(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
                more += f"; all are in {path}"
            lines = [*lines[:10], more]
        return "\n  ".join([head, *lines])

    # --- the parts --------------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, Tensor]:
        """What a run must remember: fingerprints of the images of each part, how they were cut and decoded."""
        return self._own_parts

    @cached_property
    def _own_parts(self) -> dict[str, Tensor]:
        known, marks = self._known or {}, torch.from_numpy(self._marks)
        now = {split: marks[self.split(split)[2]] for split in SPLITS}
        own = {"settings": [*self.image_shape, self.levels, FITS.index(self.fit)], "sizes": [*map(len, now.values())]}
        parts = super().parts() | {name: known.get(name, torch.tensor(numbers)) for name, numbers in own.items()}
        for split, rows in now.items():
            parts[split] = torch.cat([known.get(split, rows[:0]), rows]).unique(dim=0)
        return parts

    @cached_property
    def _marks(self) -> Numbers:
        """Fingerprints of each image's file and pixels, decoded as when the run began, and its label: (N, 3)."""
        images, began = self._images, self._known_settings()
        if self._known and (*began[:3], began.fit) != (*self.image_shape, FITS.index(self.fit)):
            images = cached_images(Path(self.data_dir), self._listing.files, began, True)
        return np.column_stack([images.digests, np.array(self._listing.labels, np.int64)])

    def _parts(self, name: Split) -> Parts:
        listing, lists, marks = self._listing, self._known, self._marks
        labels = marks[:, 2]  # (N,)
        folders = np.array([SPLITS.index(split) for split in listing.splits])  # (N,), as the user laid them out
        seed, (val, test) = self._cut()
        fractions = {part: share for part, share in ((TEST, test), (VAL, val)) if part not in folders}
        for name, share in (("val", val), ("test", test)) if lists is None else ():
            has_part = f"left out: {self.data_dir} has a {name} part"
            require(f"{name}_fraction", share, share == 0.1 or name not in listing.splits, has_part)
        if fractions and lists == {}:
            raise DataError(
                "this checkpoint comes from a version that did not keep which images it was trained on, so none can be "
                "chosen to test it; lay them out in train/, val/ and test/, or train again"
            )
        self._is_cut = bool(fractions)
        folders[list(self._images.failures)] = -1  # which are in no part
        pool = (folders == TRAIN) & self._is_cut  # what parts are cut from
        known = remembered(marks, [lists[split].numpy() for split in SPLITS] if lists else [], folders)
        part = np.where((known == OPEN) | (folders < 0), np.where(pool, OPEN, folders), known)
        part[pool] = cut(labels[pool], marks[pool], part[pool], fractions, seed)
        if lists:
            had = torch.cat([lists[split] for split in SPLITS]).unique(dim=0).numpy()
            here, same_class = part >= 0, among(*(rows[:, :2] ^ rows[:, 2:] for rows in (marks, had)))
            counts = {"new": here & (known == OPEN), "gone": ~among(had, marks[here])}
            counts["in another class"] = here & (known != OPEN) & ~same_class
            counts["kept in the part that they had"] = (part != folders) & ~pool
            changes = [f"{found.sum()} {what}" for what, found in counts.items() if found.any()]
            sizes = zip(SPLITS, lists["sizes"].tolist(), np.bincount(part + 1, minlength=4)[1:], strict=True)
            changes += [f"{split} {before} -> {now}" for split, before, now in sizes if before != now]
            self._changes = [f"images since this run began: {', '.join(changes)}"] if changes else []
        self._check_counts(labels, part)
        self._check_copies(labels, part)
        arrays = (self._images.images, torch.from_numpy(labels))
        return {split: (arrays, torch.from_numpy(np.flatnonzero(part == place))) for place, split in enumerate(SPLITS)}

    def _check_counts(self, labels: Numbers, part: Numbers) -> None:
        """Look for parts that lack images; of a run that goes on or is evaluated, only the test could."""
        for place, split in enumerate(SPLITS) if self._known is None else [(TEST, "test")]:
            counts = np.bincount(labels[part == place], minlength=len(self.class_names))
            lacking = some(name for name, count in zip(self.class_names, counts, strict=True) if count == 0)
            if split == "train" and lacking:
                raise DataError(f"{self.data_dir}: no training image of {lacking}; add some or remove the class")
            if not counts.any():
                laid_out = split in self._listing.splits
                reason = "none can be read" if laid_out else "each class needs three or more different ones"
                raise DataError(f"{self.data_dir}: too few images for a {split} part; {reason}")
            if lacking:
                say(f"{self.data_dir}: the {split} part has no image of {lacking}")

    def _check_copies(self, labels: Numbers, part: Numbers) -> None:
        """Name identical images of two classes, and those of two parts, which only the user himself can have made."""
        rows, files, (_, *size) = np.flatnonzero(part >= 0), self._listing.files, self.image_shape
        sets = [rows[places].tolist() for places in copies(self._marks[rows, 1])]
        for name, values, trouble in (
            ("two-classes", labels, f"in two classes, the same at {size[1]} x {size[0]} pixels: a label may be wrong"),
            ("two-parts", part, "in two parts, which makes results look better than they are"),
        ):
            mixed = [same for same in sets if len(set(values[same])) > 1]
            lines = [" = ".join(f"{SPLITS[part[row]]} {printable(files[row])}" for row in same) for same in mixed]
            if lines:
                say(self._list(f"{self.data_dir}: {len(lines)} images lie {trouble}", lines, name))
