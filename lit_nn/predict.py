"""Picture files to class names; with an exported .onnx without importing torch or lightning."""

import atexit
import csv
import functools
import glob
import importlib.util
import json
import os
import shutil
import stat
import sys
import tempfile
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lit_nn.commands import CommandParser, command
from lit_nn.flags import ROOT, UsageError
from lit_nn.models import MODEL_HELP, Model, batches, classifier_model, open_model


def _load_pictures() -> ModuleType:
    """data_modules.pictures, without data_modules/__init__.py, whose data sets import torch and lightning: seconds."""
    name = "data_modules.pictures"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "data_modules" / "pictures.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


if TYPE_CHECKING:
    from data_modules import pictures
    from lit_nn.classifier import LitClassifier
else:
    pictures = _load_pictures()

PATH_HELP = 'pictures, folders, patterns ("shoes/**/*.jpg"); - for standard input: one picture, or lines of paths'
MANY = 200  # pictures from which on there is a progress bar


@dataclass(frozen=True)
class Prediction:
    """What a picture shows, most probable class first.

    Attributes:
        labels: Names of classes.
        probabilities: Probability of each, between 0 and 1.
    """

    labels: list[str]
    probabilities: list[float]

    @property
    def label(self) -> str:
        """Name of the most probable class."""
        return self.labels[0]

    @property
    def probability(self) -> float:
        """Probability of the most probable class, between 0 and 1."""
        return self.probabilities[0]


def ranked(probabilities: NDArray[np.float32], class_names: Sequence[str], top_k: int) -> list[Prediction]:
    """The most probable classes of each picture.

    Args:
        probabilities: (N, num_classes).
        class_names: Name of each class.
        top_k: How many classes; all, if there are not so many.
    """
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]  # (N, top_k)
    values = np.take_along_axis(probabilities, order, axis=1)
    return [
        Prediction([class_names[label] for label in labels], shares)
        for labels, shares in zip(order.tolist(), values.tolist(), strict=True)
    ]


# --- in Python ----------------------------------------------------------------------------------------------------


def predict(classifier: "LitClassifier", images: Any, top_k: int = 1) -> list[Prediction]:
    """Classify pictures, in eval mode and without gradients, on the device where the classifier is.

    Args:
        classifier: Its mode is afterwards what it was.
        images: One picture or a list of them. A picture is the path of a file; a PIL picture; a uint8 array or tensor
            of pixels 0..255, (H, W) gray, (H, W, 3) RGB or (H, W, 4) with transparency: all these may have any size
            and are prepared exactly as in training (of large JPEGs, files may differ from decoded pictures by a level:
            they are decoded at a fraction of their size). Or pixels that are prepared already, a uint8 array or tensor
            of the data set's image shape, (C, H, W) or a batch (B, C, H, W).
        top_k: How many classes to name for each picture.

    Returns:
        A prediction for each picture, in their order; a list also for a single one.

    Raises:
        PictureError: If a file cannot be read as a picture.
        ValueError: If an array is neither a picture nor pixels of the right shape.
        UsageError: If the data set's images are not squares of 1 or 3 channels, so that no picture can be made one.
    """
    import torch

    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    shape = tuple(classifier.hparams["image_shape"])
    if isinstance(images, torch.Tensor):
        images = images.cpu().numpy()  # a whole batch at once
    several = list(images) if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4 else [images]
    if not several:
        return []
    pixels = np.stack([_pixels(picture, shape) for picture in several])  # (N, C, H, W)
    was_training = classifier.training
    try:
        _, probabilities = classifier_model(classifier, {}).run_all(pixels)
    finally:
        classifier.train(was_training)
    return ranked(probabilities, classifier.hparams["class_names"], top_k)


def _pixels(picture: Any, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """One picture of any kind to uint8 pixels of a shape (C, H, W)."""
    if isinstance(picture, str | os.PathLike):
        return pictures.prepare_picture(Path(picture), *_target(shape))
    if not isinstance(picture, Image.Image):
        array = np.asarray(picture.cpu() if hasattr(picture, "cpu") else picture)
        if array.dtype != np.uint8:
            raise ValueError(f"pixels are {array.dtype}; they must be uint8, 0..255")
        if array.shape == shape:
            return array
        if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
            raise ValueError(f"pixels have the shape {array.shape}, not {shape}, (H, W), (H, W, 3) or (H, W, 4)")
        picture = Image.fromarray(array)
    return pictures.prepare_image(ImageOps.exif_transpose(picture), *_target(shape))  # a copy, turned upright


def _target(shape: tuple[int, int, int]) -> tuple[int, int]:
    """Size and channels to which pictures are prepared for a model."""
    channels, height, width = shape
    if height != width or channels not in (1, 3):
        raise UsageError(
            f"the model takes images of {channels} channels and {height} x {width} pixels; "
            "pictures can be prepared for squares of 1 or 3 channels only"
        )
    return height, channels


# --- files --------------------------------------------------------------------------------------------------------


Decoded = NDArray[np.uint8] | str  # pixels (C, H, W) of a file, or why it cannot be read
Result = tuple[str, Prediction | str]
"""A file's name and what it shows, or why it cannot be read."""


def find_pictures(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Find the files that a command line means.

    Args:
        words: Files; folders, which are searched with everything in them for names that end like a picture's; and
            patterns like "shoes/*.jpg" or "shoes/**"; and "-" for standard input, which holds one picture or, as lines
            of text, further words.

    Yields:
        Paths, in folders in the order of their names, each with "" or the reason why it is none; "-" is the picture
        from standard input.
    """
    # os.path instead of Path, which raises at names that are too long and finds no absolute patterns.
    for word in words:
        if word == "-":
            lines = _lines(_standard_input().read_bytes())
            yield from find_pictures([line for line in lines if line not in ("", "-")]) if lines else [("-", "")]
        elif os.path.isdir(word):  # noqa: PTH112
            closed: list[OSError] = []
            paths = list(pictures.picture_paths(word, closed.append))
            yield from ((path, "") for path in paths)
            yield from ((error.filename, error.strerror or str(error)) for error in closed)
            if not paths and not closed:
                yield word, f"no file in it ends in {', '.join(sorted(pictures.SUFFIXES))}"
        elif os.path.lexists(word):
            yield word, ""
        elif matches := [match for match in glob.glob(word, recursive=True) if os.path.isfile(match)]:  # noqa: PTH113, PTH207
            yield from ((match, "") for match in sorted(matches))
        else:
            yield word, "no such file or folder"


@functools.cache
def _standard_input() -> Path:
    """A file with what comes from standard input."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    path = Path(folder, "picture")
    path.write_bytes(sys.stdin.buffer.read())
    return path


def _lines(data: bytes) -> list[str]:
    """The lines of a text; none if it is a picture."""
    try:
        return data.decode().splitlines() if b"\0" not in data else []
    except UnicodeDecodeError:
        return []


def predict_files(model: Model, files: Sequence[tuple[str, str]], top_k: int) -> Iterator[Result]:
    """Classify files; threads decode the next ones while the model runs.

    Args:
        model: An opened model.
        files: What `find_pictures` found.
        top_k: How many classes to name for each.

    Yields:
        See `Result`; in the order of the files.

    Raises:
        UsageError: If the model does not take pictures.
    """
    size, channels = _target(model.image_shape)

    def decode(part: Sequence[tuple[str, str]]) -> list[Decoded]:
        return [error or _decoded(path, size, channels) for path, error in part]

    def classified(part: Sequence[tuple[str, str]], decoded: list[Decoded]) -> Iterator[Result]:
        pixels = [item for item in decoded if not isinstance(item, str)]  # (C, H, W) each
        found = iter(ranked(model.run(np.stack(pixels))[1], model.class_names, top_k) if pixels else [])
        for (path, _), item in zip(part, decoded, strict=True):
            yield pictures.printable(path), item if isinstance(item, str) else next(found)

    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[Sequence[tuple[str, str]], Future[list[Decoded]]]] = deque()
        for rows in batches(len(files)):
            waiting.append((files[rows], pool.submit(decode, files[rows])))
            if len(waiting) > 2 * threads:  # enough to keep everyone busy, and no more in memory
                part, decoding = waiting.popleft()
                yield from classified(part, decoding.result())
        for part, decoding in waiting:
            yield from classified(part, decoding.result())


def _decoded(path: str, size: int, channels: int) -> Decoded:
    try:
        path = str(_standard_input()) if path == "-" else path
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 (Path.stat takes longer)
            return "not a file"  # opening a pipe or a device could wait for ever
        return pictures.prepare_picture(Path(path), size, channels)
    except pictures.PictureError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)


# --- the command --------------------------------------------------------------------------------------------------


def _one_line(text: str) -> str:
    """Text without control characters: a file's name may hold a line break, or something that a terminal obeys."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def _print_table(results: Iterable[Result], width: int, label_width: int) -> None:
    """Print a line for each file as soon as it is known."""
    for name, found in results:
        if isinstance(found, Prediction):
            pairs = zip(found.labels, found.probabilities, strict=True)
            cells = [f"{label:<{label_width}} {share:6.1%}" for label, share in pairs]
            print(f"{_one_line(name):<{width}}", *cells, sep="  ")


def _print_json(results: Iterable[Result]) -> None:
    """Print a list with an object for each file, a line each."""
    lines = []
    for name, found in results:
        entry: dict[str, Any] = {"path": name}
        if isinstance(found, Prediction):
            pairs = zip(found.labels, found.probabilities, strict=True)
            entry["predictions"] = [{"label": label, "probability": round(share, 6)} for label, share in pairs]
        else:
            entry["error"] = found
        lines.append(json.dumps(entry, ensure_ascii=False))
    print("[", ",\n".join(lines), "]", sep="\n")


def _write_csv(results: Iterable[Result], path: Path, top_k: int) -> None:
    """Write a row for each file: path, label, probability, label_2, probability_2 and so on, error."""
    # Under another name until it is complete, unless it is a device or a pipe; atomic_path would import torch.
    part = path.with_name(f".{path.name}.part") if path.is_file() or not path.exists() else path
    try:
        with part.open("w", newline="", encoding="utf-8") as target:
            writer = csv.writer(target)
            numbers = ["", *(f"_{number}" for number in range(2, top_k + 1))]
            names = [name + number for number in numbers for name in ("label", "probability")]
            writer.writerow(["path", *names, "error"])
            for name, found in results:
                if isinstance(found, Prediction):
                    pairs = zip(found.labels, found.probabilities, strict=True)
                    cells = (cell for label, share in pairs for cell in (label, f"{share:.6f}"))
                    writer.writerow([name, *cells, ""])
                else:
                    writer.writerow([name, *[""] * len(names), found])
        if part != path:
            part.replace(path)
    finally:
        if part != path:
            part.unlink(missing_ok=True)


@command
def main(words: list[str]) -> None:
    """Classify picture files: ``python scripts/predict.py``."""
    parser = CommandParser("predict", "Name what picture files show.")
    parser.add_argument("model", type=Path, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("paths", nargs="+", metavar="PATH", help=PATH_HELP)
    parser.add_argument("--top_k", type=int, default=1, metavar="N", help="classes to name for each picture [1]")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON instead of a table")
    output.add_argument("--csv", type=Path, metavar="FILE", help="write a CSV file instead of a table")
    options = parser.parse_args(words)
    if options.top_k < 1:
        raise UsageError(f"--top_k is {options.top_k}; it must be at least 1")

    warnings.filterwarnings("ignore", module="PIL")  # what matters about a file comes as an error
    model = open_model(options.model)
    top_k = min(options.top_k, len(model.class_names))
    files = list(find_pictures(options.paths))
    failed: list[str] = []

    def told(results: Iterable[Result]) -> Iterator[Result]:
        for name, found in results:
            if isinstance(found, str):
                failed.append(name)
                print(f"{_one_line(name)}: {found}", file=sys.stderr)
            yield name, found

    results = told(predict_files(model, files, top_k))
    printing = options.csv is None and sys.stdout.isatty()  # which shows the progress as well
    if len(files) >= MANY and sys.stderr.isatty() and not printing:
        from tqdm import tqdm  # only here, because importing it takes as long as a few hundred pictures

        results = tqdm(results, total=len(files), unit=" pictures")
    if options.csv:
        _write_csv(results, options.csv, top_k)
    elif options.json:
        _print_json(results)
    else:
        width = min(max((len(path) for path, _ in files), default=0), 80)
        _print_table(results, width, max(map(len, model.class_names)))
    if failed:
        raise OSError(f"{len(failed):,} of {len(files):,} files could not be read")
    if options.csv:
        print(f"{len(files):,} predictions: {options.csv}")
