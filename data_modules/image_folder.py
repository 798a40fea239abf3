"""Anyone's images: a folder with one folder of images per class."""
# ruff: noqa: PTH112, PTH118, PTH206 (strings, because Path objects take longer)

import functools
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

from data_modules.base import SPLITS, say
from data_modules.errors import DataError, some
from data_modules.images.dataset import ImageFiles, Listing
from data_modules.images.decode import HELPERS, SUFFIXES, image_paths, printable

PART_NAME = re.compile(r"((train|test)(ing)?|val(id(ation)?)?)([ _-]?(set|data|images|split))?", re.IGNORECASE)
LAYOUTS = (
    "name the folder with your images, for instance --data_dir my_pictures: it holds train/CLASS/IMAGE, "
    "with val/ and test/ beside train/ if you have them, or CLASS/IMAGE"
)
AS_CLASS = "if it is a class, put all classes into a folder train: train/CLASS/IMAGE"
ADVICE = f"if it is a part, rename it to train, val or test, with folders of classes in it; {AS_CLASS}"
# What is not used, and said with its number.
OUTSIDE, OTHER = "images in no folder of a class are not used", "other files not looked at"
HELPER = "files and folders of other programs left out"


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
        if not root.is_dir():
            raise DataError(f"{root} is not a folder; {LAYOUTS}")
        top = _folders(root)
        if misnamed := [name for name in top if PART_NAME.fullmatch(name) and name not in SPLITS]:
            raise DataError(f"{root} has {', '.join(misnamed)}: {ADVICE}")
        parts = [split for split in SPLITS if split in top]
        if parts and "train" not in parts:
            raise DataError(f"{root} has {' and '.join(parts)} but no train: {ADVICE}; {LAYOUTS}")
        place = root / "train" if parts else root
        classes = _folders(place)
        if len(classes) < 2:
            found = "no folders of classes" + (f"; {AS_CLASS.replace('it is', 'train is')}" if parts else "")
            for name, folder in classes.items():
                inner = f"; perhaps {printable(folder)} is meant" if len(_folders(folder)) > 1 else ""
                found = f"only one class, {name}{inner}; a classifier needs two or more"
            raise DataError(f"{place} has {found}; {LAYOUTS}")

        unused = {what: Counter[str]() for what in (OUTSIDE, OTHER, HELPER)}

        def fail(error: OSError) -> None:
            raise error

        def pass_over(path: str) -> None:
            name, ending = Path(path).name, Path(path).suffix.lower() or "without ending"
            what, kind = (HELPER, name) if name.lower() in HELPERS else (OTHER, ending)
            unused[what][kind] += 1

        rows, folders, depth = list[Any](), set[tuple[str, ...]](), 2 if parts else 1  # of a class's folder
        for path in image_paths(root, fail, pass_over, depth):
            path = path[len(os.path.join(root, "")) :]
            words = tuple(path.split(os.sep))
            if len(words) <= depth or (parts and words[0] not in parts):
                unused[OUTSIDE][words[0] if len(words) > 1 else "loose"] += 1
            else:
                rows.append((path, _plain(words[depth - 1]), words[0] if parts else "train"))
                folders.update(words[:end] for end in range(depth + 1, len(words)))
        named = sorted(words for words in folders if PART_NAME.fullmatch(words[-1]))
        for words in named:  # deeper in, a single one may be about trains or tests
            if len(words) == depth + 1 or sum(words[:-1] == other[:-1] for other in named) > 1:
                name, part, where = words[depth - 1], words[-1], printable(Path(root, *words[:-1]))
                raise DataError(
                    f"{where} has a folder {part}: parts come first, {part}/{name} and not {name}/{part}; "
                    "if it is no part of the data set, rename it"
                )
        filled = {split: {name for _, name, where in rows if where == split} for split in parts or ["train"]}
        for split, names in filled.items():
            if unknown := names - classes.keys():
                raise DataError(f"{root / split} has classes that train lacks: {some(sorted(unknown))}")
            if not names and split != "train":
                say(f"{root / split} has no images in folders of classes: the part is cut from train")
        if empty := [name for name in classes if name not in filled["train"]]:
            others = f" (other files: {_counts(unused[OTHER])})" if unused[OTHER] else ""
            raise DataError(
                f"{place} has classes without images: {some(empty)}{others}; "
                f"add some (names ending in {' '.join(sorted(SUFFIXES))}) or remove the folders"
            )
        for what, kinds in unused.items():
            if kinds:
                say(f"{root}: {kinds.total()} {what}: {_counts(kinds)}")
        label_of = {name: label for label, name in enumerate(classes)}
        rows.sort(key=lambda row: (SPLITS.index(row[2]), label_of[row[1]]))
        files, labels, splits = zip(*((path, label_of[name], split) for path, name, split in rows), strict=True)
        return Listing([*classes], [*files], [*labels], [*splits])


def _folders(place: Path) -> dict[str, Path]:
    """Folders in a folder, by their names, in the order of these; without hidden ones and those of other programs."""
    around, found = {place.resolve(), *place.resolve().parents}, dict[str, Path]()
    for path in place.iterdir():
        is_used = path.name.lower() not in HELPERS and not path.name.startswith(".") and os.path.isdir(path)
        if is_used and path.resolve() not in around:
            found[_plain(path.name)] = path
    return dict(sorted(found.items()))


@functools.cache
def _plain(name: str) -> str:
    """A name in one spelling (those of a Mac may come in another) that can be printed."""
    return unicodedata.normalize("NFC", printable(name))


def _counts(kinds: Counter[str]) -> str:
    counts = kinds.most_common()  # of more than the ten that are shown those that matter most
    return some(f"{kind} {count}" for kind, count in sorted(counts[:10]) + counts[10:])
