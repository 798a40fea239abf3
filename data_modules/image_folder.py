"""Anyone's images: a folder with one folder of images per class."""
# ruff: noqa: PTH112, PTH113, PTH118, PTH120 (strings, because Path objects take longer)

import os
import re
import unicodedata
from collections import Counter
from pathlib import Path

from data_modules.base import SPLITS, Split, say
from data_modules.errors import DataError, some
from data_modules.images.dataset import ImageFiles, Listing
from data_modules.images.decode import HELPERS, SUFFIXES, image_paths, is_image, printable

PART_NAME = re.compile(r"((train|test)(ing)?|val(id(ation)?)?)([ _-]?(set|data|images|split))?", re.IGNORECASE)
LAYOUTS = (
    "name the folder with your images, for instance --data_dir my_pictures: it holds train/CLASS/IMAGE, "
    "with val/ and test/ beside train/ if you have them, or CLASS/IMAGE"
)
AS_CLASS = "if it is a class, put all classes into a folder train: train/CLASS/IMAGE"
ADVICE = f"if it is a part, rename it to train, val or test, with folders of classes in it; {AS_CLASS}"
# What is not used, and said with its number.
LOOSE, BESIDE = "images in no folder of a class are not used", "images in folders beside train are not used"
OTHER, HELPER = "other files not looked at", "files and folders of other programs left out"


class ImageFolder(ImageFiles):
    """A folder of images, laid out as ``train/<class>/*`` with optional ``val/`` and ``test/``, or as ``<class>/*``.

    Parts that have no folder are cut from the training images, stratified, by the seed. The folders name the classes.
    Images may be JPEG, PNG, WebP, BMP, GIF, TIFF, PPM, AVIF or JPEG 2000, also in folders within a class's folder;
    what else lies there is counted. They are decoded once, at the first use, into a cache in ``$LIT_NN_CACHE`` or else
    ``~/.cache/lit-nn``; see `data_modules.images.decode` for how.

    Everything that describes the data set (`class_names`, `image_shape`, `mean`, `std`) is read from the images, so
    already asking for it finds what is wrong with them. The options are those of `ImageFiles`.
    """

    def list_images(self) -> Listing:
        """Names of the classes, and all images in the order of their names."""
        root = Path(self.data_dir)
        self._unused: dict[str, Counter[str]] = {what: Counter() for what in (LOOSE, BESIDE, OTHER, HELPER)}
        if not root.is_dir():
            raise DataError(f"{root} is not a folder; {LAYOUTS}")
        top = self._folders(root)
        if misnamed := [name for name in top if PART_NAME.fullmatch(name) and name not in SPLITS]:
            raise DataError(f"{root} has {', '.join(misnamed)}: {ADVICE}")
        parts: list[Split] = [split for split in SPLITS if split in top]
        if parts and "train" not in parts:
            raise DataError(f"{root} has {' and '.join(parts)} but no train: {ADVICE}; {LAYOUTS}")
        places: dict[Split, Path] = {split: root / split for split in parts} or {"train": root}
        classes = {split: self._folders(place) if parts else top for split, place in places.items()}
        names = list(classes["train"])
        if len(names) < 2:
            found = "no folders of classes" + (f"; {AS_CLASS.replace('it is', 'train is')}" if parts else "")
            for name, (folder, *_) in classes["train"].items():
                inner = f"; perhaps {printable(folder)} is meant" if len(self._folders(folder)) > 1 else ""
                found = f"only one class, {name}{inner}; a classifier needs two or more"
            raise DataError(f"{places['train']} has {found}; {LAYOUTS}")

        rows: list[tuple[str, int, Split]] = []
        for split, found_classes in classes.items():
            if unknown := [name for name in found_classes if name not in names]:
                raise DataError(f"{places[split]} has classes that train lacks: {some(unknown)}")
            for name, folders in found_classes.items():
                rows += [(file, names.index(name), split) for folder in folders for file in self._files(folder, name)]
        trained = {label for _, label, split in rows if split == "train"}
        if empty := [name for label, name in enumerate(names) if label not in trained]:
            others = f" (other files: {self._counts(OTHER)})" if self._unused[OTHER] else ""
            raise DataError(
                f"{places['train']} has classes without images: {some(empty)}{others}; "
                f"add some (names ending in {' '.join(sorted(SUFFIXES))}) or remove the folders"
            )
        listing = Listing(names, *map(list, zip(*rows, strict=True)))
        for split in [split for split in parts if split not in listing.splits]:
            say(f"{places[split]} has no images in folders of classes: the part is cut from train")
        self._report({root, *places.values()}, {name: top[name] for name in top if parts and name not in parts})
        return listing

    def _folders(self, place: Path) -> dict[str, list[Path]]:
        """Folders in a folder, by names in one spelling (those of a Mac may come in another), in their order."""
        around = {place.resolve(), *place.resolve().parents}
        found: dict[str, list[Path]] = {}
        for path in sorted(place.iterdir(), key=lambda path: path.name):  # Windows' paths would compare without case
            if path.name.lower() in HELPERS:
                self._pass_over(str(path))
            elif not path.name.startswith(".") and os.path.isdir(path):
                if path.resolve() in around:
                    raise DataError(f"{printable(path)} is a link to a folder that it lies in; remove it")
                found.setdefault(unicodedata.normalize("NFC", printable(path.name)), []).append(path)
        return dict(sorted(found.items()))

    def _files(self, folder: Path, name: str) -> list[str]:
        """All images in a class's folder and the folders in it."""
        failed: list[OSError] = []
        files = list(image_paths(folder, failed.append, self._pass_over))
        for error in failed:
            raise error
        places = {Path(place) for place in {os.path.dirname(file) for file in files}}
        inside = places.union(*(place.parents for place in places))
        parts = sorted(place for place in inside if folder in place.parents and PART_NAME.fullmatch(place.name))
        for part in parts:  # deeper in, a single one may be about trains or tests
            if part.parent == folder or sum(part.parent == other.parent for other in parts) > 1:
                raise DataError(
                    f"{printable(part.parent)} has a folder {part.name}: parts come first, {part.name}/{name} and not "
                    f"{name}/{part.name}; if it is no part of the data set, rename it"
                )
        root = Path(self.data_dir)
        skip = 0 if root == Path() else len(os.path.join(root, ""))
        return [path[skip:] for path in files]

    def _pass_over(self, path: str) -> None:
        name, ending = Path(path).name, Path(path).suffix.lower() or "without ending"
        what, kind = (
            (HELPER, name) if name.lower() in HELPERS else (LOOSE, ending) if is_image(path) else (OTHER, ending)
        )
        self._unused[what][kind] += 1

    def _report(self, places: set[Path], beside: dict[str, list[Path]]) -> None:
        """Say what is not used."""
        for entry in [entry for place in places for entry in os.scandir(place) if os.path.isfile(entry.path)]:
            if not entry.name.startswith(".") and entry.name.lower() not in HELPERS:  # which were counted
                self._pass_over(entry.path)
        for name, folders in beside.items():
            self._unused[BESIDE][name] += sum(len(list(image_paths(folder, str))) for folder in folders)
        for what, kinds in self._unused.items():
            if kinds:
                say(f"{self.data_dir}: {kinds.total()} {what}: {self._counts(what)}")

    def _counts(self, what: str) -> str:
        kinds = self._unused[what].most_common()  # of more than the ten that are shown those that matter most
        return some(f"{kind} {count}" for kind, count in sorted(kinds[:10]) + kinds[10:])
