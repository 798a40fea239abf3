"""What is in a data set, and what is wrong with it: ``python scripts/prepare_data.py``."""

import argparse
import difflib
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_modules import DATA_MODULES
from data_modules.base import ImageDataModule, Split
from data_modules.pictures import picture_digest, shared_pictures
from data_modules.sheets import sample_rows, sample_sheet

SPLITS: tuple[Split, ...] = ("train", "val", "test")
CHUNK = 4096  # images measured at a time


def prepare() -> None:
    """Fetch the data set named on the command line, verify it, print what it holds, and draw a sheet of samples.

    Raises:
        DataError: If the data set cannot be had or used.
        OSError: If the sheet cannot be written.
        SystemExit: With status 2, if what was typed cannot be done.
    """
    # Options may be written as for training: --data.image_size is --image_size.
    words = [word.replace("--data.", "--", 1) if word.startswith("--data.") else word for word in sys.argv[1:]]
    choice = argparse.ArgumentParser(add_help=False)
    choice.add_argument("--data", default="fashion_mnist_sample", help=f"data set: {', '.join(DATA_MODULES)}")
    name: str = choice.parse_known_args(words)[0].data
    if name not in DATA_MODULES:
        near = difflib.get_close_matches(name, DATA_MODULES, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        choice.error(f"unknown data set {name!r}.{hint} Allowed: {', '.join(DATA_MODULES)}")

    parser = ArgumentParser(description=f"Fetch and verify a data set, and show what it holds; options of {name}.")
    parser.add_argument("--data", default=name, help=f"data set: {', '.join(DATA_MODULES)}")
    parser.add_argument("--sheet", type=str, default=f"{name}.png", help="file for the sheet of samples")
    parser.add_class_arguments(DATA_MODULES[name])
    options = parser.parse_args(words).as_dict()
    del options["data"]
    sheet = Path(options.pop("sheet"))
    try:
        data = DATA_MODULES[name](**options)
    except ValueError as error:
        parser.error(str(error))

    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        data.prepare_data()
        parts = {split: data.split(split) for split in SPLITS}
    _print_report(data)
    for complaint in complaints:
        print(f"warning: {complaint.message}")

    images, labels, indices = parts["train"]
    rows = indices[sample_rows(labels[indices])]
    sample_sheet(images[rows], labels[rows], data.class_names).savefig(sheet)
    print(f"Samples of the training images: {sheet}")


def _print_report(data: ImageDataModule) -> None:
    """Print counts for each class and part, shape, mean and std, and how many images lie in two parts."""
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
