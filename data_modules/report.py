"""What is in a data set: counts, mean and standard deviation, images that lie in two parts."""

from collections import Counter

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_modules.base import ImageDataModule, Split
from data_modules.pictures import picture_digest, shared_pictures

SPLITS: tuple[Split, ...] = ("train", "val", "test")
CHUNK = 4096  # images measured at a time


def print_report(data: ImageDataModule) -> None:
    """Print counts for each class and part, shape, mean and std, and how many images lie in two parts.

    Args:
        data: The data set, prepared.
    """
    parts = {split: data.split(split) for split in SPLITS}
    counts = {
        split: labels[indices].bincount(minlength=len(data.class_names)).tolist()
        for split, (_, labels, indices) in parts.items()
    }
    table = Table("class", title=type(data).__name__, show_footer=True)
    table.columns[0].footer = "all"
    for split in SPLITS:
        table.add_column(split, f"{sum(counts[split]):,}", justify="right")
    for label, name in enumerate(data.class_names):
        table.add_row(escape(name), *(f"{counts[split][label]:,}" for split in SPLITS))
    Console().print(table)

    mean, std = measured(data)
    print(f"shape:            {' x '.join(map(str, data.image_shape))} (channels x height x width)")
    print(f"mean:             {_numbers(data.mean)}, measured on the training images: {_numbers(mean)}")
    print(f"std:              {_numbers(data.std)}, measured on the training images: {_numbers(std)}")
    digests = {
        split: np.array([picture_digest(images[row].numpy()) for row in indices.tolist()], np.uint64)
        for split, (images, _, indices) in parts.items()
    }
    shared = Counter((one, other) for one, _, other, _ in shared_pictures(digests))
    between = "; ".join(f"{count} in {one} and {other}" for (one, other), count in sorted(shared.items()))
    print(f"in two parts:     {between or 'no image'}")


def measured(data: ImageDataModule) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over the training images, with pixels scaled to [0, 1].

    Args:
        data: The data set, prepared.
    """
    images, _, indices = data.split("train")
    total = torch.zeros(2, images.shape[1], dtype=torch.float64)  # of the pixels and of their squares
    for rows in indices.split(CHUNK):
        pixels = images[rows].float() / 255  # (n, C, H, W)
        total += torch.stack([pixels.mean((0, 2, 3)), pixels.square().mean((0, 2, 3))]).double() * len(rows)
    mean, mean_square = total / len(indices)
    return mean.tolist(), (mean_square - mean**2).clamp(min=0).sqrt().tolist()


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)
