"""Which part of a data set an image belongs to: decided by the image and the seed, and kept by a run for good."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_modules.batches import seeded_generator

TRAIN, VAL, TEST, OPEN = range(4)  # parts, and what has to be cut yet
Numbers = NDArray[np.int64]


def among(marks: Numbers, known: Numbers) -> NDArray[np.bool_]:
    """Which images have the same file, the same pixels or the same group as one of the known ones; bool (N,).

    Both are rows (file, pixels) of fingerprints, or (file, pixels, label, group), with 0 for no group.
    """
    columns = [column for column in (0, 1, 3) if column < min(marks.shape[1], known.shape[1])]
    return np.any([np.isin(marks[:, n], known[known[:, n] != 0, n]) for n in columns], 0)


def copies(pixels: Numbers) -> list[Numbers]:
    """The places of each set of two or more images with the same pixels (N,)."""
    order = np.argsort(pixels, kind="stable")
    sets = np.split(order, np.flatnonzero(np.diff(pixels[order])) + 1)
    return sorted((places for places in sets if len(places) > 1), key=lambda places: int(places[0]))


def units(*keys: Numbers) -> Numbers:
    """Number of each image's unit (N,): images with the same key (N,) are in one, also where others link them."""
    unit, numbers = np.arange(len(keys[0])), [np.unique(key, return_inverse=True)[1] for key in keys]
    while True:
        before = unit
        for number in numbers:
            least = np.full(len(unit), len(unit))
            np.minimum.at(least, number, unit)
            unit = least[number]
        if np.array_equal(unit, before):
            return np.unique(unit, return_inverse=True)[1]


def remembered(marks: Numbers, lists: Sequence[Numbers], folders: Numbers) -> Numbers:
    """The part in which a run had each image, or its group, by its lists of the parts' images; else OPEN (N,)."""
    known = np.full(len(folders), OPEN)
    for part in reversed(range(len(lists))):  # what was trained on once is not tested ...
        known[among(marks, lists[part])] = part
    for part, images in enumerate(lists):  # ... unless the user had it in a folder of each
        known[among(marks[:, :2], images[:, :2]) & (folders == part)] = part
    return known


def cut(labels: Numbers, marks: Numbers, placed: Numbers, fractions: Mapping[int, float], seed: int) -> Numbers:
    """Divide images among the parts, stratified by class; identical images and those of a group stay together.

    Within a class, the order in which images go to a part depends on the seed and each image's own file, or its group,
    not on names or other images. A part gets its exact share of a class as far as what stays together allows, and of
    two or more different images, or groups, at least one but never all.

    Of images with several labels (N, K), each class keeps its share, the images of no class theirs, and all together.
    ``placed`` is the part of each image that has one already, else OPEN (N,); of what stays together the first decides.
    ``fractions`` are shares of a class by part, each of what the parts before have left: TEST, then VAL.
    """
    groups, rows = marks[:, 3], np.arange(len(labels))
    if labels.ndim == 2:  # a row for each image and class that it is of: "none of them" is one, and "any image" too
        rows, labels = np.nonzero(np.column_stack([labels, ~labels.any(1), np.ones(len(labels))]))
    unit = units(marks[:, 1], np.where(groups == 0, marks[:, 1], groups))
    count = int(unit.max(initial=-1)) + 1
    first_part, first_name = np.full(count, OPEN), np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(first_part, unit, placed)
    np.minimum.at(first_name, unit, np.where(groups == 0, marks[:, 0], groups))
    salt, part = str(seed).encode(), first_part.tolist()
    draws = [hashlib.blake2b(name.tobytes(), key=salt).digest() for name in first_name]
    contents: list[dict[int, int]] = [{} for _ in draws]  # images of each class in a unit: of most units a single one
    for one, label in zip(unit[rows].tolist(), labels.tolist(), strict=True):
        contents[one][label] = contents[one].get(label, 0) + 1
    rest = np.bincount(labels)
    # First the units of the rarest classes, which have the fewest others to make up for them (Sechidis et al., 2011).
    order = sorted(range(count), key=lambda one: (min(rest[label] for label in contents[one]), draws[one]))
    for later, (name, fraction) in zip(reversed(range(len(fractions))), fractions.items(), strict=True):
        held = np.bincount(labels[np.equal(part, name)[unit[rows]]], minlength=len(rest))
        target = np.minimum(np.maximum(np.round(fraction * rest).astype(np.int64), 1), rest - 1)
        free = [0] * len(rest)  # units that may be taken: the parts that come later want at least one, too
        for one in order:
            for label in contents[one] if part[one] in (TRAIN, OPEN) else ():
                free[label] += 1
        free = [there - max(1, min(later + 1, there - 1)) for there in free]
        still_open = [one for one in order if part[one] == OPEN]
        for one in _pick(still_open, contents, target.tolist(), (target - held).tolist(), free):
            part[one] = name
        rest -= np.bincount(labels[np.equal(part, name)[unit[rows]]], minlength=len(rest))
    return np.where(np.equal(part, OPEN), TRAIN, part)[unit]


def folds_of(labels: Numbers, marks: Numbers, folds: int, seed: int) -> Numbers:
    """Number of each image's fold, from 1 on (N,): parts of equal size, as `cut` makes them."""
    shares = {OPEN + number: 1 / (folds + 1 - number) for number in range(1, folds)}  # of what is left
    numbers = cut(labels, marks, np.full(len(marks), OPEN), shares, seed) - OPEN
    return np.where(numbers < 0, folds, numbers)


def _pick(
    order: list[int], contents: list[dict[int, int]], target: list[int], need: list[int], free: list[int]
) -> set[int]:
    """Units that give each class what it needs of its target, and take no more than are free; uses up both lists."""
    picked: set[int] = set()

    def move(one: int, sign: int) -> None:
        picked.symmetric_difference_update([one])
        for label, count in contents[one].items():
            need[label] -= sign * count
            free[label] -= sign

    def off(label: int, need: int) -> float:
        """How far a class is from its target; to have nothing of it is worst."""
        return abs(need) / max(target[label], 1) + 1000 * (need == target[label] > 0)

    for one in order:  # first what fits
        if all(free[label] > 0 and count <= need[label] for label, count in contents[one].items()):
            move(one, 1)
    small, moved = sorted(order, key=lambda one: sum(contents[one].values())), any(need)
    while moved:  # then whatever brings the classes nearer to their targets, the smallest first, in or out
        moved = False
        for one in small:
            sign = -1 if one in picked else 1
            gain = sum(off(k, need[k]) - off(k, need[k] - sign * count) for k, count in contents[one].items())
            if gain > 1e-9 and (sign < 0 or all(free[label] > 0 for label in contents[one])):
                move(one, sign)
                moved = True
    return picked


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Cut a published data set in two, sorted int64 rows each: what stays, and a share of each class, 1 of 2 at least.

    Labels are int64 (N,); or 0 or 1 (N, K), of which the rarest class of each image counts.
    """
    generator, is_cut_off = seeded_generator(seed), torch.zeros(len(labels), dtype=torch.bool)
    if labels.ndim == 2:
        labels = (labels / labels.sum(0).clamp(min=1)).argmax(1)  # the first one if an image has none
    for label in labels.unique():  # sorted, so that the split does not depend on the order of the classes
        members = (labels == label).nonzero()[:, 0]
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        is_cut_off[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~is_cut_off).nonzero()[:, 0], is_cut_off.nonzero()[:, 0]
