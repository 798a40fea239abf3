"""Which part of a data set an image belongs to: decided by the image and the seed, and kept by a run for good."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

TRAIN, VAL, TEST, OPEN = range(4)  # parts, and what has to be cut yet
Numbers = NDArray[np.int64]


def among(digests: Numbers, known: Numbers) -> NDArray[np.bool_]:
    """Which images (N, 2) have the same file or the same pixels as one of the known ones (M, 2); bool (N,)."""
    return np.isin(digests[:, 0], known[:, 0]) | np.isin(digests[:, 1], known[:, 1])


def copies(pixels: Numbers) -> list[Numbers]:
    """The places of each set of two or more images with the same pixels (N,)."""
    order = np.argsort(pixels, kind="stable")
    sets = np.split(order, np.flatnonzero(np.diff(pixels[order])) + 1)
    return sorted((places for places in sets if len(places) > 1), key=lambda places: int(places[0]))


def remembered(digests: Numbers, lists: Sequence[Numbers], folders: Numbers) -> Numbers:
    """The part in which a run had each image (N, 2), by its lists of the parts' images; OPEN for new images (N,)."""
    known, had = np.full(len(folders), OPEN), [among(digests, images) for images in lists]
    for part in reversed(range(len(had))):  # what was trained on once is not tested ...
        known[had[part]] = part
    for part in range(len(had)):  # ... unless the user had it in a folder of each
        known[had[part] & (folders == part)] = part
    return known


def cut(labels: Numbers, digests: Numbers, placed: Numbers, fractions: Mapping[int, float], seed: int) -> Numbers:
    """Divide images among the parts, stratified by class; identical images stay together.

    Within a class, the order in which images go to a part depends on the seed and each image's own file, not on names
    or other images. A part gets its exact share of a class as far as what stays together allows, and of two or more
    different images at least one but never all.

    Args:
        labels: Class of each image (N,).
        digests: Fingerprints of each image's file and of its pixels (N, 2).
        placed: Part of each image that has one already, else OPEN (N,). Of identical ones the first part decides.
        fractions: Share of each class, by part: first TEST, then VAL, which takes from the rest.
        seed: Decides, with the files, which images go.
    """
    units, unit = np.unique(digests[:, 1], return_inverse=True)
    first_part, first_file = np.full(len(units), OPEN), np.full(len(units), np.iinfo(np.int64).max)
    np.minimum.at(first_part, unit, placed)
    np.minimum.at(first_file, unit, digests[:, 0])
    salt, part = str(seed).encode(), first_part.tolist()
    draws = [hashlib.blake2b(file.tobytes(), key=salt).digest() for file in first_file]
    contents: list[dict[int, int]] = [{} for _ in units]  # images of each class in a unit: of most units a single one
    for one, label in zip(unit.tolist(), labels.tolist(), strict=True):
        contents[one][label] = contents[one].get(label, 0) + 1
    order = sorted(range(len(units)), key=draws.__getitem__)
    small = sorted(order, key=lambda one: sum(contents[one].values()))

    rest = np.bincount(labels)
    for later, (name, fraction) in zip(reversed(range(len(fractions))), fractions.items(), strict=True):
        held = np.bincount(labels[np.equal(part, name)[unit]], minlength=len(rest))
        target = np.minimum(np.maximum(np.round(fraction * rest).astype(np.int64), 1), rest - 1).tolist()
        need = [share - count for share, count in zip(target, held.tolist(), strict=True)]  # of images
        free = [0] * len(rest)  # units that may be taken: the parts that come later want at least one, too
        for one in order:
            for label in contents[one] if part[one] in (TRAIN, OPEN) else ():
                free[label] += 1
        free = [units - max(1, min(later + 1, units - 1)) for units in free]
        # First what fits; then, for classes of which nothing did, the smallest that there is.
        for one, in_any_case in [*((one, False) for one in order), *((one, True) for one in small)]:
            if part[one] == OPEN and all(
                free[label] > 0 and (count <= need[label] or (in_any_case and need[label] == target[label] > 0))
                for label, count in contents[one].items()
            ):
                part[one] = name
                for label, count in contents[one].items():
                    need[label] -= count
                    free[label] -= 1
        rest -= np.bincount(labels[np.equal(part, name)[unit]], minlength=len(rest))
    return np.where(np.equal(part, OPEN), TRAIN, part)[unit]
