"""Fetch and verify a data set, print what it holds, and draw a sheet of samples, or write it as shards; see --help."""

import argparse
import itertools
import shlex
import sys
import warnings
from pathlib import Path
from typing import Literal

import jsonargparse
import torch

from data_modules import DATA_SETS, DataNote, data_class
from data_modules.base import SPLITS, ImageDataModule, Split
from data_modules.batches import images_per_class
from data_modules.images.dataset import ImageFiles
from data_modules.images.decode import digest
from data_modules.images.shard_writer import write_shards
from data_modules.sheets import measured, sample_sheet
from lit_nn.engine.console import check_figure, command, print_table, unknown_option
from lit_nn.engine.option_checks import check_data_dir
from lit_nn.errors import UsageError


@command
def main(words: list[str]) -> None:
    """Prepare and show a data set; its options are those of its class, as in training."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--data", default="fashion_mnist_sample")
    known, rest = first.parse_known_args([word.replace("--data.", "--", 1) for word in words])
    what = f"Fetch and verify --data {' or '.join(DATA_SETS)}, and show what it holds; here the options of {known.data}"
    parser = jsonargparse.ArgumentParser(description=what, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--sheet", type=str, default=f"{known.data}.png", help="file for the sheet of samples")
    parser.add_argument(
        "--shards", type=str | None, help="write these for --data image_stream: a folder, s3://bucket/path"
    )
    parser.add_argument("--shards_as", type=Literal["encoded", "decoded"], default="encoded", help="files, or pixels")
    parser.add_argument("--shard_mb", type=float, default=64.0, help="megabytes of a shard, about")
    parser.add_class_arguments(kind := data_class(known.data))
    names = [*parser.get_defaults().keys(), "help"]
    given = [word[2:].partition("=")[0] for word in rest if word.startswith("--")]
    try:
        options = parser.parse_args(rest).as_dict()
    except argparse.ArgumentError as error:
        unknown = [unknown_option(name, names) for name in given if name not in names]
        raise UsageError(unknown[0] if unknown else " ".join(str(error).split())) from error
    check_data_dir(known.data, options.get("data_dir", "data"))
    sheet, (out, *how) = Path(options.pop("sheet")), map(options.pop, ("shards", "shards_as", "shard_mb"))
    check_figure("--sheet", sheet)
    data = kind(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("always", DataNote)
        warnings.showwarning = lambda message, *_: print(f"note: {message}")
        if out:
            if not isinstance(data, ImageFiles):
                raise UsageError(f"--shards is for image_folder and image_table; {known.data} needs none")
            index = write_shards(data, out, *how)
            parts = ", ".join(f"{part['images']:,} {split}" for split, part in index["parts"].items())
            print(f"{parts} images, at most {index['images_per_shard']:,} in a shard. Next:")
            print(f"  python scripts/train.py --data image_stream --data_dir {shlex.quote(str(out))}")
            return
        data.prepare_data()
        train, _ = data.split("train"), data.split("test")
    print_report(data)
    sample_sheet(*train, data.class_names).savefig(sheet)
    print(f"Samples of the training images: {sheet}")


def print_report(data: ImageDataModule) -> None:
    """Print counts for each class and part of a prepared data set, shape, mean, std, copies, and its own facts."""
    parts = {split: data.split(split) for split in SPLITS}
    counts = list[list[int]]()
    same: dict[int, list[tuple[Split, str]]] = {}  # part and labels of all images with the same pixels
    for split, (images, labels, indices) in parts.items():
        counts.append(images_per_class(labels[indices], len(data.class_names)).tolist())
        for row in indices.tolist():
            same.setdefault(digest(images[row].numpy().tobytes()), []).append((split, str(labels[row].tolist())))
    rows = [[name, *(f"{count:,}" for count in row)] for name, *row in zip(data.class_names, *counts, strict=True)]
    rows.append(["all", *(f"{len(indices):,}" for _, _, indices in parts.values())])
    print_table(["class", *SPLITS], rows, right=SPLITS, title=type(data).__name__)
    print(f"shape:            {' x '.join(map(str, data.image_shape))} (channels x height x width)")
    for what, own, found in zip(("mean:", "std: "), (data.mean, data.std), measured(data), strict=True):
        texts = [" ".join(f"{value:.4f}" for value in values) for values in (own, found)]
        print(f"{what}             {texts[0]}, measured on the training images: {texts[1]}")
    homes = [{split for split, _ in places} for places in same.values()]
    pairs = [(a, b, sum({a, b} <= home for home in homes)) for a, b in itertools.combinations(SPLITS, 2)]
    between = "; ".join(f"{count} in {one} and {other}" for one, other, count in pairs if count)
    print(f"in two parts:     {between or 'no image'}")
    print(f"duplicates:       {sum(map(len, same.values())) - len(same) or 'no'} images are copies of another")
    contradictions = sum(len({label for _, label in places}) > 1 for places in same.values())
    where = "have other labels in another place" if data.multi_label else "lie in two classes"
    print(f"contradictions:   {contradictions or 'no'} images {where}")
    if data.multi_label:
        per_image = torch.cat([labels[indices] for _, labels, indices in parts.values()]).sum(1).long().bincount()
        numbers = ", ".join(f"{count:,} with {number}" for number, count in enumerate(per_image.tolist()) if count)
        print(f"labels per image: {numbers}")
    for name, text in data.facts().items():
        print(f"{name + ':':17} {text}")


if __name__ == "__main__":
    sys.exit(main())
