"""Fetching, verifying and showing a data set: ``python scripts/prepare_data.py``."""

import argparse
import warnings
from pathlib import Path

from jsonargparse import ArgumentParser

from data_modules import DATA_MODULES
from data_modules.report import SPLITS, print_report
from data_modules.sheets import sample_rows, sample_sheet
from lit_nn.choices import look_up
from lit_nn.commands import check_picture, command
from lit_nn.config import explain, values_of
from lit_nn.flags import UsageError


@command
def main(words: list[str]) -> None:
    """Fetch a data set, verify it, print what it holds, and draw a sheet of samples."""
    # Options may be written as for training: --data.image_size is --image_size.
    words = [word.replace("--data.", "--", 1) if word.startswith("--data.") else word for word in words]
    name = (values_of("--data", words) or ["fashion_mnist_sample"])[-1]
    parser = ArgumentParser(
        "python scripts/prepare_data.py",
        description=f"Fetch and verify a data set, and show what it holds; options of {name}.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--data", default=name, help=f"data set: {', '.join(DATA_MODULES)}")
    parser.add_argument("--sheet", type=str, default=f"{name}.png", help="file for the sheet of samples")
    try:
        data_class = look_up(DATA_MODULES, name, "data set")
        parser.add_class_arguments(data_class)
        options = parser.parse_args(words).as_dict()
        del options["data"]
        sheet = Path(options.pop("sheet"))
        check_picture("--sheet", sheet)
        data = data_class(**options)
    except (argparse.ArgumentError, ValueError) as error:
        names = [word.lstrip("-") for word in parser._option_string_actions]
        raise UsageError(explain(error, names, "prepare_data")) from error

    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        data.prepare_data()
        parts = {split: data.split(split) for split in SPLITS}
    print_report(data)
    for complaint in complaints:
        print(f"warning: {complaint.message}")

    images, labels, indices = parts["train"]
    rows = indices[sample_rows(labels[indices])]
    sample_sheet(images[rows], labels[rows], data.class_names).savefig(sheet)
    print(f"Samples of the training images: {sheet}")
