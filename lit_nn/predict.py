"""Picture files to class names; with an exported .onnx without importing torch or lightning."""

import csv
import glob
import importlib.util
import json
import os
import stat
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lit_nn.commands import CommandParser, run
from lit_nn.flags import UsageError
from lit_nn.models import BATCH, Model, batches, open_model

if TYPE_CHECKING:
    from data_modules import pictures
    from lit_nn.classifier import LitClassifier


def _load_pictures() -> ModuleType:
    """data_modules.pictures, without data_modules/__init__.py, whose data sets import torch and lightning: seconds."""
    name = "data_modules.pictures"
    if name not in sys.modules:
        package = importlib.util.find_spec("data_modules")
        assert package is not None
        assert package.origin is not None
        spec = importlib.util.spec_from_file_location(name, Path(package.origin).with_name("pictures.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


if not TYPE_CHECKING:
    pictures = _load_pictures()

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
    pixels = [_pixels(picture, shape) for picture in several]  # (C, H, W) each
    was_training = classifier.training
    classifier.eval()
    try:
        with torch.inference_mode():
            probabilities = [
                classifier(torch.from_numpy(np.stack(pixels[rows])).to(classifier.device))
                .softmax(1)
                .float()
                .cpu()
                .numpy()
                for rows in batches(len(pixels))
            ]
    finally:
        classifier.train(was_training)
    names = classifier.hparams["class_names"]
    return [prediction for part in probabilities for prediction in ranked(part, names, top_k)]


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
    # Through a file in memory, so that it goes exactly the way of a file on the disk.
    if picture.mode not in ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"):
        picture = picture.convert("RGB")  # PNG has no other colours
    file = BytesIO()
    picture.save(file, "PNG", compress_level=0, exif=picture.getexif())
    return pictures.prepare_picture(file, *_target(shape))  # type: ignore[arg-type]  # a Path, or what Pillow opens


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


@dataclass(frozen=True)
class Outcome:
    """What became of one file.

    Attributes:
        name: The file, as it can be printed.
        prediction: What it shows; None if it cannot be read.
        error: Why it cannot be read.
    """

    name: str
    prediction: Prediction | None = None
    error: str = ""


@dataclass(frozen=True)
class Source:
    """A file to be classified: its path, and the name that it is reported by."""

    path: Path
    name: str


def find_pictures(words: Sequence[str], folder: Path) -> Iterator[Source | Outcome]:
    """Find the files that a command line means.

    Args:
        words: Files; folders, which are searched with everything in them for names that end like a picture's; patterns
            like "shoes/*.jpg" or "shoes/**"; and "-" for standard input, which holds one picture or, as lines of text,
            any of the others.
        folder: Where a picture from standard input can be put.

    Yields:
        The files, folders in the order of their names; and what cannot be found, with the reason.
    """
    # os.path instead of Path, which raises at names that are too long and finds no absolute patterns.
    for word in words:
        if word == "-":
            yield from _standard_input(folder)
        elif os.path.isdir(word):  # noqa: PTH112
            yield from _in_folder(Path(word))
        elif os.path.lexists(word):
            yield Source(Path(word), pictures.printable(word))
        elif matches := [match for match in glob.glob(word, recursive=True) if os.path.isfile(match)]:  # noqa: PTH113, PTH207
            yield from (Source(Path(match), pictures.printable(match)) for match in sorted(matches))
        else:
            yield Outcome(pictures.printable(word), error="no such file or folder")


def _standard_input(folder: Path) -> Iterator[Source | Outcome]:
    data = sys.stdin.buffer.read()
    try:
        lines = data.decode().splitlines()
    except UnicodeDecodeError:
        lines = []
    if lines and "\0" not in lines[0]:
        yield from find_pictures([line for line in lines if line not in ("", "-")], folder)
    else:
        path = folder / "picture"
        path.write_bytes(data)
        yield Source(path, "-")


def _in_folder(folder: Path) -> Iterator[Source | Outcome]:
    found = False
    closed: list[OSError] = []
    for place, inner, names in os.walk(folder, onerror=closed.append):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(names):
            path = Path(place, name)
            if path.suffix.lower() not in pictures.SUFFIXES or name.startswith("."):
                continue
            found = True
            yield Source(path, pictures.printable(path))
    for error in closed:
        yield Outcome(pictures.printable(error.filename), error=error.strerror or str(error))
    if not found and not closed:
        yield Outcome(pictures.printable(folder), error=f"no file in it ends in {', '.join(sorted(pictures.SUFFIXES))}")


def predict_files(model: Model, files: Iterable[Source | Outcome], top_k: int) -> Iterator[list[Outcome]]:
    """Classify files; threads decode the next ones while the model runs.

    Args:
        model: An opened model.
        files: The files, and what was not found, which is passed on.
        top_k: How many classes to name for each.

    Yields:
        What became of them, a batch at a time, in their order.

    Raises:
        UsageError: If the model does not take pictures.
    """
    size, channels = _target(model.image_shape)

    def decode(part: list[Source | Outcome]) -> list[NDArray[np.uint8] | str]:
        return [_decoded(file, size, channels) for file in part]

    def finish(part: list[Source | Outcome], decoded: list[NDArray[np.uint8] | str]) -> list[Outcome]:
        pixels = [item for item in decoded if not isinstance(item, str)]
        found = iter(ranked(model.run(np.stack(pixels))[1], model.class_names, top_k) if pixels else [])
        return [
            Outcome(file.name, error=item) if isinstance(item, str) else Outcome(file.name, next(found))
            for file, item in zip(part, decoded, strict=True)
        ]

    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[list[Source | Outcome], Future[Any]]] = deque()
        for part in _parts(files, BATCH):
            waiting.append((part, pool.submit(decode, part)))
            if len(waiting) > 2 * threads:  # enough to keep everyone busy, and no more in memory
                part, future = waiting.popleft()
                yield finish(part, future.result())
        for part, future in waiting:
            yield finish(part, future.result())


def _decoded(file: Source | Outcome, size: int, channels: int) -> NDArray[np.uint8] | str:
    """Pixels (C, H, W) of a file, or why there are none."""
    if isinstance(file, Outcome):
        return file.error
    try:
        if not stat.S_ISREG(os.stat(file.path).st_mode):  # noqa: PTH116 (Path.stat takes longer)
            return "not a file"  # opening a pipe or a device could wait for ever
        return pictures.prepare_picture(file.path, size, channels)
    except pictures.PictureError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)


def _parts(files: Iterable[Source | Outcome], size: int) -> Iterator[list[Source | Outcome]]:
    part: list[Source | Outcome] = []
    for file in files:
        part.append(file)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


# --- the command --------------------------------------------------------------------------------------------------


def _one_line(text: str) -> str:
    """Text without control characters: a file's name may hold a line break, or something that a terminal obeys."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def _table_row(outcome: Outcome, width: int, label_width: int) -> str:
    assert outcome.prediction is not None
    pairs = zip(outcome.prediction.labels, outcome.prediction.probabilities, strict=True)
    return f"{_one_line(outcome.name):<{width}}  " + "  ".join(f"{name:<{label_width}} {p:6.1%}" for name, p in pairs)


def _as_json(outcome: Outcome) -> str:
    if outcome.prediction is None:
        return json.dumps({"path": outcome.name, "error": outcome.error}, ensure_ascii=False)
    pairs = zip(outcome.prediction.labels, outcome.prediction.probabilities, strict=True)
    predictions = [{"label": label, "probability": round(share, 6)} for label, share in pairs]
    return json.dumps({"path": outcome.name, "predictions": predictions}, ensure_ascii=False)


def _csv_row(outcome: Outcome, top_k: int) -> list[str]:
    cells: list[str] = []
    if outcome.prediction is not None:
        for label, share in zip(outcome.prediction.labels, outcome.prediction.probabilities, strict=True):
            cells += [label, f"{share:.6f}"]
    return [outcome.name, *cells, *[""] * (2 * top_k - len(cells)), outcome.error]


def predict_command(model_path: Path, words: Sequence[str], top_k: int, as_json: bool, csv_path: Path | None) -> None:
    """Classify files and print a table, or JSON, or write a CSV file.

    Args:
        model_path: See `open_model`.
        words: See `find_pictures`.
        top_k: How many classes to name for each picture.
        as_json: Whether to print JSON: a list with an object for each file.
        csv_path: Where a CSV file goes, with a row for each file; None for none.

    Raises:
        UsageError: If the model is of an unknown kind.
        ModelError: If it cannot be opened.
        OSError: If the CSV file cannot be written, or, at the end, if some files could not be read.
    """
    warnings.filterwarnings("ignore", module="PIL")  # what matters about a file comes as an error
    model = open_model(model_path)
    top_k = min(top_k, len(model.class_names))
    with ExitStack() as stack:
        files = list(find_pictures(words, Path(stack.enter_context(TemporaryDirectory()))))
        report: Callable[[list[Outcome]], None]
        if csv_path is not None:
            writer = csv.writer(stack.enter_context(csv_path.open("w", newline="", encoding="utf-8")))
            numbers = ["", *(f"_{number}" for number in range(2, top_k + 1))]
            names = [name + number for number in numbers for name in ("label", "probability")]
            writer.writerow(["path", *names, "error"])

            def report(outcomes: list[Outcome]) -> None:
                writer.writerows(_csv_row(outcome, top_k) for outcome in outcomes)
        elif as_json:
            separator = "[\n"

            def report(outcomes: list[Outcome]) -> None:
                nonlocal separator
                print(separator + ",\n".join(map(_as_json, outcomes)), end="")
                separator = ",\n"
        else:
            width = min(max((len(file.name) for file in files), default=0), 80)
            label_width = max(map(len, model.class_names))

            def report(outcomes: list[Outcome]) -> None:
                for outcome in outcomes:
                    if outcome.prediction is not None:
                        print(_table_row(outcome, width, label_width))

        printing = csv_path is None and sys.stdout.isatty()  # which shows the progress as well
        bar = _progress_bar(0 if printing else len(files), stack)
        failed = 0
        for outcomes in predict_files(model, files, top_k):
            bar(len(outcomes))
            report(outcomes)
            for outcome in outcomes:
                if outcome.prediction is None:
                    print(f"{_one_line(outcome.name)}: {outcome.error}", file=sys.stderr)
                    failed += 1
        if as_json:
            print("\n]" if files else "[]")
    if failed:
        raise OSError(f"{failed:,} of {len(files):,} files could not be read")
    if csv_path is not None:
        print(f"{len(files):,} predictions: {csv_path}")


def _progress_bar(count: int, stack: ExitStack) -> Callable[[int], object]:
    """What to tell how many files are done; draws only for many of them, and only for a person who would see it."""
    if count < MANY or not sys.stderr.isatty():
        return lambda done: None
    from tqdm import tqdm  # only here, because importing it takes as long as a few hundred pictures

    return stack.enter_context(tqdm(total=count, unit=" pictures")).update


def main(argv: Sequence[str] | None = None) -> int:
    """Classify picture files: ``python scripts/predict.py``.

    Args:
        argv: Words of the command line; those of this process if None.

    Returns:
        Exit status.
    """

    def command() -> None:
        parser = CommandParser("predict", "Name what picture files show.")
        parser.add_argument("model", type=Path, metavar="MODEL", help="a checkpoint (.ckpt) or an export (.onnx, .pt2)")
        parser.add_argument(
            "paths",
            nargs="+",
            metavar="PATH",
            help='pictures, folders, patterns ("shoes/**/*.jpg"); - for standard input: one picture, or lines of paths',
        )
        parser.add_argument("--top_k", type=int, default=1, metavar="N", help="classes to name for each picture [1]")
        output = parser.add_mutually_exclusive_group()
        output.add_argument("--json", action="store_true", help="print JSON instead of a table")
        output.add_argument("--csv", type=Path, metavar="FILE", help="write a CSV file instead of a table")
        options = parser.parse_args(argv)
        if options.top_k < 1:
            raise UsageError(f"--top_k is {options.top_k}; it must be at least 1")
        predict_command(options.model, options.paths, options.top_k, options.json, options.csv)

    return run(command)
