"""Name what image files show, with a checkpoint or an exported model; --help lists the options."""
# ruff: noqa: PTH112, PTH207 (Path raises at names that are too long, and finds no absolute patterns)

import glob
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from data_modules.errors import DataError
from data_modules.files import atomic_path, write_csv
from data_modules.images.decode import SUFFIXES, image_paths, printable
from lit_nn.engine.console import CommandParser, command
from lit_nn.errors import UsageError
from lit_nn.trained.predict import MODEL_HELP, open_model, predict_files


@command
def main(words: list[str]) -> None:
    parser = CommandParser("predict", "Name what image files show.")
    parser.add_argument("model", type=Path, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("paths", nargs="+", metavar="PATH", help='images, folders, patterns ("shoes/**/*.jpg")')
    parser.add_argument("--top_k", type=int, default=1, metavar="N", help="classes to name for each image [1]")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON instead of a table")
    output.add_argument("--csv", type=Path, metavar="FILE", help="write a CSV file instead of a table")
    parser.add_argument("--heatmaps", type=Path, metavar="DIR", help="write each image with what speaks for its class")
    options = parser.parse_args(words)
    if options.top_k < 1:
        raise UsageError(f"--top_k is {options.top_k}; it must be at least 1")
    if options.csv and (not options.csv.parent.is_dir() or (options.csv.exists() and not options.csv.is_file())):
        raise UsageError(f"--csv {options.csv}: it must be a file in a folder that is there")
    warnings.filterwarnings("ignore", module="PIL")  # what matters about a file comes as an error
    model, files = open_model(options.model), [file for word in options.paths for file in find_images(word)]
    if model.multi_label and options.top_k > 1:
        raise UsageError("--top_k is for one label per image; this model names all that reach their thresholds")
    label_width, width = max(map(len, model.class_names)), min(max(len(path) for path, _ in files), 80)
    if options.heatmaps:
        model.overlay(np.zeros(model.image_shape, np.uint8))  # can it at all?
        options.heatmaps.mkdir(parents=True, exist_ok=True)
    results = predict_files(model, files, options.top_k)
    if len(files) >= 200 and sys.stderr.isatty() and (options.csv or not sys.stdout.isatty()):  # no lines show how far
        from tqdm import tqdm  # for which the others need not wait

        results = tqdm(results, total=len(files), unit=" images")
    rows = list[dict[str, Any]]()
    for name, item, found in results:
        said = {"error": item} if not found else found.plain if options.json or options.csv else {}
        rows.append({"path": name, **said, **(found.cells if found and options.csv else {})})
        if not found:
            line = f"{name}: {item}"
        else:
            pairs = zip(found.labels, found.probabilities, strict=True)
            cells = [f"{label:{label_width}} {share:6.1%}" for label, share in pairs] or ["none"]
            line = "  ".join([f"{name:{width}}", *cells, *["(not sure)"] * (found.sure is False)])
        if options.heatmaps and not isinstance(item, str):  # the number keeps names apart, the rest is for the reader
            overlay, stem = Image.fromarray(model.overlay(item)), re.sub(r"[^\w.-]", "_", Path(name).name)[:50]
            with atomic_path(options.heatmaps / f"{len(rows):0{len(str(len(files)))}}-{stem}.png") as path:
                ImageOps.scale(overlay, max(1, 224 // min(overlay.size)), Image.Resampling.NEAREST).save(path)
        if not (found and (options.json or options.csv)):  # a name may hold a line break, or what a terminal obeys
            if not line.isprintable():
                line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
            print(line, file=sys.stdout if found else sys.stderr)
    if options.json:
        print("[", ",\n".join(map(json.dumps, rows)), "]", sep="\n")
    if options.csv:
        shares = np.zeros(len(model.class_names), np.float32)
        columns = ["path", *model.read(shares, options.top_k).cells, *["sure"] * (not model.multi_label)]
        columns += ["unlike", "error"]
        write_csv(options.csv, [columns, *([row.get(name, "") for name in columns] for row in rows)])
        print(f"{len(rows):,} rows: {options.csv}")
    if failed := sum("error" in row for row in rows):
        raise DataError(f"{failed:,} of {len(files):,} files could not be read")


def find_images(word: str) -> list[tuple[str, str]]:
    """The files that a word means, each with "" or the reason why it cannot be read."""
    closed: list[OSError] = []  # folders that cannot be looked into
    passed_over: list[str] = []
    if is_folder := os.path.isdir(word):
        found = list(image_paths(word, closed.append, passed_over.append))
        if passed_over:
            print(f"{printable(word)}: files of other kinds, not looked at: {len(passed_over):,}", file=sys.stderr)
    else:
        found = [word] if os.path.lexists(word) else sorted(filter(os.path.isfile, glob.glob(word, recursive=True)))
    files = [(path, "") for path in found] + [(error.filename, str(error.strerror)) for error in closed]
    nothing = f"no file in it ends in {', '.join(sorted(SUFFIXES))}" if is_folder else "no such file or folder"
    return files or [(word, nothing)]


if __name__ == "__main__":
    sys.exit(main())
