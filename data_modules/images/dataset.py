"""What data sets of image files share: a subclass lists the files; decoding, cache, checks and parts are here."""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data_modules.base import SPLITS, ImageDataModule, Parts, Split, say
from data_modules.batches import images_per_class
from data_modules.errors import DataError, OptionError, require, some
from data_modules.files import atomic_path
from data_modules.images.cache import SAMPLED, ImageCache, Settings, cache_folder, cached_images
from data_modules.images.decode import FORMATS, digest, printable
from data_modules.images.fit import FITS
from data_modules.images.parts import OPEN, TEST, TRAIN, VAL, Numbers, among, copies, cut, folds_of, remembered


class Listing(NamedTuple):
    """The images of a data set, in a fixed order."""

    class_names: list[str]
    files: list[str]  # paths, relative to the folder of the data set
    labels: list[int] | list[list[int]]  # class of each image; or for each class 0 or 1, if it may have several
    splits: list[Split]  # where the user put each image; the parts that have none are cut from "train"
    groups: list[str] = []  # name of each image's group, "" if it has none; empty without groups
    weights: list[float] = []  # how often each image is drawn with ``sampling="weighted"``; empty without weights


class ImageFiles(ImageDataModule):
    """A data set of image files, of which a subclass implements `list_images`.

    Identical images lie in one part, and so do the images of a group. Which part it is depends on the image, or the
    group, and the seed, and a run remembers it (`parts`): whatever comes, goes or is renamed later, what a run was
    trained on, or anything of the same group, is never among what it is tested on.

    Args:
        data_dir: The folder.
        image_size: Side to which images are brought by ``fit``, in pixels, or [height, width]; None for the median
            shorter side of about a thousand of the images, at most 224.
        channels: 1 for gray, 3 for colour; None for gray if these thousand are all gray, else colour.
        test_fraction: Share of each class that is held out for the test, if the data set has no test part of its own.
        on_error: What an image that cannot be read does: "stop" (after listing all of them), or "skip".
        group_by: Regular expression that finds an image's group (a patient, a camera) in its path, in which "/" parts
            the folders: what its brackets match, or else all of it. ``([^/_]+)_[^/]*$`` is the part of the name before
            the first "_".
        options: What every data set takes: ``batch_size``, ``val_fraction``, ``augment``, ``seed``, ...
    """

    default_augment = "flip,translate"
    only_tests = False  # whether nothing is trained; images of which a run had none are then in the test part
    _left_out = ""  # what was not tested although the run did not have it
    keeps_images = True  # whether the decoded images are kept; without, `files` has the only ones

    def __init__(
        self,
        data_dir: str = "data",
        image_size: int | list[int] | None = None,
        channels: int | None = None,
        test_fraction: float = 0.1,
        on_error: Literal["stop", "skip"] = "stop",
        group_by: str | None = None,
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
        self._listed_by = type(self).__name__  # each has a cache of its own, so that none replaces another's
        self.test_fraction, self.on_error = test_fraction, on_error
        self._fractions.append(test_fraction)
        require("test_fraction", test_fraction, test_fraction == 0.1 or not self._fold, "left out with folds")
        try:
            self.group_by = group_by if group_by is None else re.compile(group_by)
        except re.error as error:
            raise OptionError(f"group_by {group_by} is not a regular expression: {error}") from error

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
    def files(self) -> list[str]:  # type: ignore[override]
        """Paths of the images, relative to the folder."""
        return self._listing.files

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
            listing = self.list_images()
        except OSError as error:
            raise DataError(f"{printable(error.filename)} cannot be looked into: {error.strerror}") from error
        if self.group_by is None:
            return listing
        require("group_by", self.group_by.pattern, not listing.groups, "left out: the table has groups")
        paths = [unicodedata.normalize("NFC", file.replace(os.sep, "/")) for file in listing.files]
        found = [self.group_by.search(path) for path in paths]
        names = ["/".join(filter(None, match.groups())) or match[0] if match else "" for match in found]
        if lone := [path for path, name in zip(paths, names, strict=True) if not name]:
            which = f"{len(lone)} of {len(names)} images, for instance {printable(lone[0])}"
            require("group_by", self.group_by.pattern, any(names), f"another one: it finds no group in {which}")
            say(f"{self.data_dir}: group_by finds no group in {which}; each is on its own")
        return listing._replace(groups=names)

    @cached_property
    def _labels(self) -> Any:
        """Class of each image, int64 (N,); or of which classes it is, 0 or 1, float32 (N, K)."""
        return np.array(self._listing.labels, np.float32 if self.multi_label else np.int64)

    @property
    def weights(self) -> Tensor | None:  # type: ignore[override]
        """How often each image is to be drawn, float64 (N,); None if nobody has said it."""
        return torch.tensor(self._listing.weights, dtype=torch.float64) if self._listing.weights else None

    def described(self) -> dict[str, list[Any]]:
        """File of each image, and where they have them its part, group and weight."""
        _, files, _, splits, groups, weights = self._listing
        said: dict[str, list[Any]] = {"file": [printable(Path(self.data_dir, file)) for file in files]}
        said |= {"split": [*splits] if len({*splits}) > 1 else [], "group": groups, "weight": weights}
        return {name: cells for name, cells in said.items() if cells}

    def facts(self) -> dict[str, str]:
        """Size of the files' images, of about a thousand, and of the groups."""
        self.split("train")
        files, sizes = self._listing.files, []
        for file in files[:: max(1, len(files) // SAMPLED)]:
            with suppress(Exception), Image.open(Path(self.data_dir, file), formats=FORMATS) as image:
                sizes.append(image.size)
        sizes.sort(key=lambda size: size[0] * size[1])
        least, median, most = (f"{w} x {h}" for w, h in (sizes[0], sizes[len(sizes) // 2], sizes[-1]))
        facts = {"sizes of files": f"{least} to {most}, median {median} (width x height)"}
        if groups := self._group_counts():
            totals = [counts.total() for counts in groups.values()]
            inside = ", ".join(f"{sum(split in counts for counts in groups.values())} in {split}" for split in SPLITS)
            alone = (self._part >= 0).sum() - sum(totals)
            facts["groups"] = f"{len(groups)} of {min(totals)} to {max(totals)} images, {inside}"
            facts["groups"] += f"; {alone} images in no group" if alone else ""
        return facts

    @cached_property
    def _images(self) -> ImageCache:
        """The images, decoded, in the order of the listing."""
        files, root, skip = self._listing.files, Path(self.data_dir), self.on_error == "skip"
        asked = Settings(self.channels, self.height, self.width, None, FITS.index(self.fit))
        images = self._decoded(asked)
        channels, height, width = images.images.shape[1:]
        given = Settings(channels, height, width, images.levels, asked.fit)
        known = self._known_settings()._asdict()
        needed = asked._replace(**{name: known[name] for name, own in asked._asdict().items() if own is None})
        if any(None not in pair and len({*pair}) > 1 for pair in zip(given, needed, strict=True)):
            images = self._decoded(needed)  # what suits the images has changed since the run began
        if images.failures:
            lines = [f"{printable(files[row])}: {reason}" for row, reason in sorted(images.failures.items())]
            report = self._list(f"{len(lines)} of {len(files)} images in {root} cannot be read:", lines, "unreadable")
            if not skip:
                raise DataError(f"{report}\nRepair or remove them, or leave them out with --data.on_error skip")
            say(f"{report}\nThey are left out")
        if images.moments[:, 0].max() < 1 / 16:
            reason = "colour files of 16 bits lose the lower 8; save those that use few of them with 8"
            say(f"{root}: all images are nearly black ({reason})")
        if images.levels not in (None, ImageDataModule.levels):
            say(f"{root}: gray images of more than 8 bits are scaled from 0..{images.levels} to 0..255")
        return images

    def _decoded(self, settings: Settings) -> ImageCache:
        skip, root = self.on_error == "skip", Path(self.data_dir)
        return cached_images(root, self._listing.files, settings, skip, self._listed_by, self.keeps_images)

    def _known_settings(self) -> Settings:
        """How the run whose parts are known decoded its images."""
        levels = None if self._known is None else ImageDataModule.levels  # that of runs which kept nothing
        return Settings(*self._known["settings"].tolist()) if self._known else Settings(levels=levels)

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

    def _say_list(self, trouble: str, lines: list[str], name: str) -> None:
        if lines:
            say(self._list(f"{self.data_dir}: {len(lines)} {trouble}", lines, name))

    # --- the parts --------------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, Tensor]:
        """What a run must remember: fingerprints of the images of each part, how they were cut and decoded."""
        self.split("train")
        return self._own_parts | super().parts()

    @cached_property
    def _marks(self) -> Numbers:
        """Fingerprints of each image's file and pixels, decoded as when the run began, labels and group: (N, 4)."""
        images, began = self._images, self._known_settings()
        if self._known and (*began[:3], began.fit) != (*self.image_shape, FITS.index(self.fit)):
            images = self._decoded(began)
        labels, groups = self._labels, self._listing.groups or [""] * len(self._labels)
        if self.multi_label:
            labels = np.array([digest(row.tobytes()) for row in labels])
        fingerprints = {name: digest(os.fsencode(name)) if name else 0 for name in set(groups)}
        return np.column_stack([images.digests, labels, [fingerprints[name] for name in groups]])

    def _parts(self, name: Split) -> Parts:
        listing, lists, marks, labels = self._listing, self._known, self._marks, self._labels
        folders = np.array([SPLITS.index(split) for split in listing.splits])  # (N,), as the user laid them out
        if self.known_parts and not lists:
            if TEST not in folders:
                text = (
                    f"the model was not trained on {self.data_dir} as image files, so no test part can be cut from it"
                )
                raise DataError(f"{text}: choose its own --data, or lay out a test part")
            self.known_parts = None
        seed, (val, test, *fold) = self._cut()
        if fold and folders.any():
            say(f"{self.data_dir}: folds are cut from all images, whatever part they lie in")
            folders[:] = TRAIN
        fractions = {part: share for part, share in ((TEST, test), (VAL, val)) if part not in folders}
        for name, share in (("val", val), ("test", test)) if lists is None and not fold else ():
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
        had = torch.cat([lists[split] for split in SPLITS]).unique(dim=0).numpy() if lists else marks[:0]
        if self.only_tests and TEST in fractions and not among(marks[pool, :2], had[:, :2]).any():
            known[pool & (known == OPEN)] = TEST
        part = np.where((known == OPEN) | (folders < 0), np.where(pool, OPEN, folders), known)
        if fold:
            del fractions[TEST]
            is_tested = folds_of(labels[pool], marks[pool], int(fold[0]), seed) == fold[1]
            part[pool] = np.where((part[pool] == OPEN) & is_tested, TEST, part[pool])
        part[pool] = cut(labels[pool], marks[pool], part[pool], fractions, seed)
        if lists:
            here, same_class = part >= 0, among(*(rows[:, :2] ^ rows[:, 2:3] for rows in (marks, had)))
            new = here & ~among(marks[:, :2], had[:, :2])
            counts = {"new": new, "gone": ~among(had[:, :2], marks[here, :2])}
            counts["in another class"] = here & ~new & ~same_class
            counts["kept in the part that they had"] = (part != folders) & ~pool
            changes = [f"{found.sum()} {what}" for what, found in counts.items() if found.any()]
            if self.only_tests and (left_out := (new & (known != TEST) & (known != OPEN)).sum()):
                self._left_out = f"the groups of {left_out} images have the names of groups trained on, or validated"
                say(f"{self.data_dir}: {self._left_out}: they are left out; rename groups that are others")
            sizes = zip(SPLITS, lists["sizes"].tolist(), np.bincount(part + 1, minlength=4)[1:], strict=True)
            changes += [f"{split} {before} -> {now}" for split, before, now in sizes if before != now]
            self._changes = [f"images since this run began: {', '.join(changes)}"] if changes else []
        self._part = part
        self._check_counts()
        self._check_copies()
        rows = {split: torch.from_numpy(np.flatnonzero(part == place)) for place, split in enumerate(SPLITS)}
        settings = torch.tensor([*self.image_shape, self.levels, FITS.index(self.fit)])
        self._own_parts = {"settings": settings, "sizes": torch.tensor([*map(len, rows.values())])} | (lists or {})
        for split, places in rows.items():
            seen = torch.from_numpy(marks)[places]
            had = self._own_parts.get(split, seen[:0])  # older versions knew no groups
            self._own_parts[split] = torch.cat([F.pad(had, (0, seen.shape[1] - had.shape[1])), seen]).unique(dim=0)
        arrays = (self._images.images, torch.from_numpy(labels))
        return {split: (arrays, places) for split, places in rows.items()}

    def _check_counts(self) -> None:
        """Look for parts that lack images; of a run that goes on or is evaluated, only the test could."""
        for place, split in enumerate(SPLITS) if self._known is None and not self.only_tests else [(TEST, "test")]:
            counts = images_per_class(torch.from_numpy(self._labels[self._part == place]), len(self.class_names))
            lacking = some(name for name, count in zip(self.class_names, counts, strict=True) if count == 0)
            if split == "train" and lacking:
                raise DataError(f"{self.data_dir}: no training image of {lacking}; add some or remove the class")
            if not counts.any():
                grouped = ", in as many groups, which the same image joins" if self._listing.groups else ""
                enough = f"each class needs three or more different ones{grouped}"
                none_is_left = split in self._listing.splits or len(self._images.failures) == len(self._labels)
                reason = self._left_out or ("none can be read" if none_is_left else enough)
                raise DataError(f"{self.data_dir}: too few images for a {split} part; {reason}")
            if lacking:
                say(f"{self.data_dir}: the {split} part has no image of {lacking}")

    def _check_copies(self) -> None:
        """Name identical images with other labels, and what is in two parts, which only the user can have made."""
        part, files, rows = self._part, self._listing.files, np.flatnonzero(self._part >= 0)
        sets = [rows[places].tolist() for places in copies(self._marks[rows, 1])]
        (_, height, width), in_two = self.image_shape, "lie in two parts, which makes results look better than they are"
        classes = "lie in two places with other labels" if self.multi_label else "lie in two classes"
        wrong = f"{classes}, the same at {width} x {height} pixels: a label may be wrong"
        for name, values, trouble in (("two-classes", self._marks[:, 2], wrong), ("two-parts", part, in_two)):
            mixed = [same for same in sets if len({*values[same]}) > 1]
            lines = [" = ".join(f"{SPLITS[part[row]]} {printable(files[row])}" for row in same) for same in mixed]
            self._say_list(f"images {trouble}", lines, name)
        mixed_groups = [(name, counts) for name, counts in self._group_counts().items() if len(counts) > 1]
        lines = [
            f"{printable(name)}: {', '.join(f'{n} {s}' for s, n in counts.items())}" for name, counts in mixed_groups
        ]
        self._say_list(f"groups {in_two}", lines, "groups")

    def _group_counts(self) -> dict[str, Counter[Split]]:
        """How many images each group has in each part that has any of it."""
        counts = defaultdict[str, Counter[Split]](Counter)
        for name, place in zip(self._listing.groups, self._part.tolist(), strict=False):  # there may be no groups
            if name and place >= 0:
                counts[name][SPLITS[place]] += 1
        return counts
