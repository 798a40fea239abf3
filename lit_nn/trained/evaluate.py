"""What a trained model is worth: numbers, tables and figures of its answers on a test set."""

import csv
import functools
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torchmetrics.functional.classification import binary_auroc

from data_modules import DATA_SETS, ImageDataModule, data_class, option_names
from data_modules.errors import DataError
from data_modules.files import atomic_path
from data_modules.images.dataset import ImageFiles
from data_modules.images.decode import image_paths, printable
from data_modules.sheets import captioned, drawable, font_for
from lit_nn.errors import UsageError, brief, other_classes
from lit_nn.trained.calibrate import BINS, calibration_error, wilson_interval
from lit_nn.trained.multi_label import measure_labels, precision_recall_figure
from lit_nn.trained.predict import Model, Pixels, energy, predict_files
from lit_nn.trained.report import SHOWN, report_page


def data_of(
    model: Model, name: str | None = None, data_dir: str | None = None, table: str | None = None
) -> ImageDataModule:
    """The data set to try a model on, by default its own, none of whose training images is then in the test part.

    Raises:
        UsageError: If there is no such data set, the model does not name its own, or it has other classes or images.
        DataError: If it is not on this machine or cannot be used.
    """
    own = next((key for key, class_name in DATA_SETS.items() if class_name == model.data.get("class")), None)
    name = name or ("image_table" if table else own)
    if name is None:
        raise UsageError("the model does not name a data set of this project; choose one with --data and --data_dir")
    cls, (channels, *size) = data_class(name), model.image_shape
    if data_dir is not None and not cls.reads_data_dir:
        raise UsageError(f"--data_dir {data_dir}: {name} reads no folder; leave it out, or add --data image_folder")
    try:  # what a file says of itself can be anything
        options = dict(model.data.get("options", {})) if name == own else {}  # the seed of the training among them
        given = {"image_size": size, "channels": channels, "fit": model.fit, "data_dir": data_dir, "table": table}
        taken = option_names(name)
        if table and "table" not in taken:
            raise UsageError(f"--table {table}: {name} reads no table; leave it out, or add --data image_table")
        options |= {key: value for key, value in given.items() if key in taken and value is not None}
        if issubclass(cls, ImageFiles) and "data_dir" not in options and not table:
            raise DataError("the model does not say where its images lie: give --data_dir FOLDER")
        data = cls(**options)
        if name == own:
            data.known_parts = {part: torch.from_numpy(known.copy()) for part, known in model.parts.items()}
        same_kind = model.multi_label == data.multi_label
        shape, others = tuple(data.image_shape), other_classes(model.class_names, data.class_names, same_kind)
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{brief(error)}; choose a data set with --data and --data_dir") from error
    if others or shape != model.image_shape:
        what = others or f"images {shape}, the model takes {model.image_shape}"
        raise UsageError(f"{cls.__name__} has {what}; choose other data with --data and --data_dir")
    return data


class Rows:
    """Images of some rows of a data set, which are read when they are asked for, as uint8 arrays."""

    def __init__(self, images: torch.Tensor, rows: torch.Tensor) -> None:
        self.images, self.rows, self.shape = images, rows, (len(rows), *images.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: Any) -> NDArray[np.uint8]:
        return self.images[self.rows[which]].cpu().numpy()


class Answers(NamedTuple):
    """A model's answers on labelled images, of which there is at least one."""

    class_names: list[str]
    images: NDArray[np.uint8] | Rows  # (N, C, H, W)
    labels: NDArray[Any]  # the right classes, int64 (N,); or which ones there are, 0 or 1, float32 (N, num_classes)
    logits: NDArray[np.float32]  # (N, num_classes)
    probabilities: NDArray[np.float32]  # (N, num_classes)
    temperature: float = 1.0  # by which logits are divided before they become probabilities
    threshold: float | list[float] = 0.0  # probability below which it is not sure; of each class, if there are several
    others: NDArray[np.float64] | None = None  # `energy` of images that show something else, (M,)
    files: Sequence[str] = ()  # names of the images' files, if they have any
    overlays: dict[int, Pixels] = {}  # images under their heat maps, (H, W, 3), by their number

    @property
    def several(self) -> bool:
        """Whether an image may have several labels: then they are 0 or 1, (N, num_classes)."""
        return self.labels.ndim == 2

    @property
    def accuracy(self) -> float:
        """Share of right answers; of several labels each is one, said from a probability of one half on."""
        right = (self.logits > 0) == (self.labels > 0) if self.several else self.logits.argmax(1) == self.labels
        return float(right.mean())

    @property
    def mistakes(self) -> NDArray[np.int64]:
        """Numbers of the images with a wrong answer, those of which the model was most sure first."""
        if self.several:
            wrong = (self.probabilities >= self.threshold) != (self.labels > 0)  # (N, K)
            how_far = np.where(wrong, np.abs(self.probabilities - self.labels), -1).max(1)  # (N,)
        else:
            how_far = np.where(self.logits.argmax(1) != self.labels, self.probabilities.max(1), -1)
        order = np.argsort(-how_far, kind="stable")
        return order[how_far[order] >= 0]

    def said(self, row: int) -> str:
        """What the model says of an image."""
        chosen = (
            np.flatnonzero(self.probabilities[row] >= self.threshold) if self.several else [self.logits[row].argmax()]
        )
        return ", ".join(self.class_names[label] for label in chosen) or "none"

    def given(self, row: int) -> str:
        """The right answer."""
        chosen = np.flatnonzero(self.labels[row]) if self.several else [self.labels[row]]
        return ", ".join(self.class_names[label] for label in chosen) or "none"

    def shown(self, row: int) -> list[Pixels]:
        """An image, and beside it its heat map if it has one, (H, W, 3) each."""
        image = np.broadcast_to(self.images[row].transpose(1, 2, 0), (*self.images.shape[2:], 3))
        return [image, *([self.overlays[row]] if row in self.overlays else [])]

    def file(self, row: int) -> str:
        """Name of an image."""
        return self.files[row] if self.files else f"image {row}"

    @property
    def confusion(self) -> NDArray[np.int64]:
        """How many images of the row's class were taken for the column's, (num_classes, num_classes)."""
        count = len(self.class_names)
        return np.bincount(self.labels * count + self.logits.argmax(1), minlength=count**2).reshape(count, count)


def answer_test_images(model: Model, data: ImageDataModule, explain: bool = False) -> Answers:
    """Run a model on the test images of a data set that is prepared; ``explain`` adds heat maps of mistakes."""
    tensors, labels, rows = data.split("test")
    images: Any = Rows(tensors, rows)
    right, calibration = labels[rows].cpu().numpy(), (model.temperature, model.threshold)
    files = [printable(data.files[row]) for row in rows.tolist()] if data.files else []
    answers = Answers(model.class_names, images, right, *model.run(images), *calibration, files=files, overlays={})
    if explain:
        with suppress(UsageError):  # it has none
            answers.overlays.update((row, model.overlay(images[row])) for row in answers.mistakes[:SHOWN].tolist())
    return answers


def score_images(model: Model, folder: str) -> NDArray[np.float64]:
    """`energy` of all images in a folder, (M,), which need no labels; raises DataError if one cannot be read."""
    failed = list[OSError]()
    files = [(path, "") for path in image_paths(folder, failed.append)]
    scores = []
    for name, item, prediction in predict_files(model, files, 1):
        if isinstance(item, str):
            raise DataError(f"{name}: {item}")
        scores.append(prediction.unlike)
    if failed or not scores:
        raise DataError(str(failed[0]) if failed else f"{folder}: there is no image in it")
    return np.array(scores)


def _unlike(answers: Answers) -> dict[str, Any]:
    """How well `energy` tells the test images from those that show something else."""
    assert answers.others is not None
    scores = np.concatenate([energy(answers.logits, answers.temperature, answers.several), answers.others])  # (N + M,)
    # Of scores beyond 1 it would take sigmoids.
    order = torch.from_numpy(np.unique(scores, return_inverse=True)[1] / len(scores))
    auroc = binary_auroc(order, (torch.arange(len(scores)) >= len(answers.labels)).long()).item()
    cut = np.quantile(scores[: len(answers.labels)], 0.95)
    above = float((answers.others > cut).mean())
    return {"unlike": {"images": len(answers.others), "auroc": auroc, "cut": float(cut), "above_cut": above}}


def measure(answers: Answers) -> dict[str, Any]:
    """Everything that is counted, as plain values, one more is one more line here; 0 / 0 is 0, as in scikit-learn."""
    unlike = {} if answers.others is None else _unlike(answers)
    if answers.several:
        return measure_labels(answers) | unlike
    labels, logits = torch.from_numpy(answers.labels), torch.from_numpy(answers.logits).double()  # (N,), (N, K)
    classes, count, right = len(answers.class_names), len(labels), answers.confusion.diagonal()  # right is (K,)
    predicted, support = answers.confusion.sum(0), answers.confusion.sum(1)  # images of each class, (K,)
    scores = {  # (K,) each
        "precision": right / np.maximum(predicted, 1),
        "recall": right / np.maximum(support, 1),
        "f1": 2 * right / np.maximum(predicted + support, 1),
    }
    accuracy = int(right.sum()) / count
    shares = torch.from_numpy(answers.probabilities)  # (N, K)
    sure = answers.probabilities.max(1) >= answers.threshold  # (N,)
    return {
        "images": count,
        "accuracy": accuracy,
        "accuracy_interval_95": wilson_interval(accuracy, count),
        "balanced_accuracy": float(scores["recall"][support > 0].mean()),
        "top_3_accuracy": (logits.topk(min(3, classes)).indices == labels[:, None]).any(1).double().mean().item(),
        "loss": F.cross_entropy(logits / answers.temperature, labels).item(),  # nats
        "calibration_error": calibration_error(shares, labels),
        "temperature": answers.temperature,
        "uncalibrated_loss": F.cross_entropy(logits, labels).item(),  # at a temperature of 1
        "uncalibrated_calibration_error": calibration_error(logits.softmax(1), labels),
        "threshold": answers.threshold,
        "sure": sure.mean().item(),  # share of the images
        "accuracy_where_sure": float((logits.argmax(1) == labels).numpy()[sure].mean()) if sure.any() else 0.0,
        **unlike,
        "macro": {score: float(values.mean()) for score, values in scores.items()},  # means over the classes
        "per_class": {
            name: {score: values[label].item() for score, values in (scores | {"support": support}).items()}
            for label, name in enumerate(answers.class_names)
        },
    }


def _drawing(draw: Callable[[Answers, str], Figure]) -> Callable[[Answers, str], Figure]:
    """Draw with short names, and in fonts that have their letters; what no font here has stands there as a number."""

    @functools.wraps(draw)
    def figure(answers: Answers, title: str) -> Figure:
        *names, title = drawable([*(name[:22] for name in answers.class_names), title])
        with matplotlib.rc_context({"font.family": font_for([*names, title]), "text.parse_math": False}):
            return draw(answers._replace(class_names=names), title)

    return figure


@_drawing
def confusion_figure(answers: Answers, title: str) -> Figure:
    """Draw the confusion matrix: counts, coloured by their share of the true class."""
    confusion, names = answers.confusion, answers.class_names
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = 4 + 0.5 * min(len(names), 30)  # inches
    figure = Figure((side + 1, side), dpi=150, layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(shares, cmap="Blues", vmin=0, vmax=1), ax=axes, label="share of the true class")
    step, letters = 1 + len(names) // 200, max(4, min(10, 800 / len(names)))  # of 1,000 classes every sixth is named
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=90, fontsize=letters)
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=letters)
    axes.set(xlabel="predicted class", ylabel="true class", title=f"{title}\n{confusion.sum():,} images")
    for row, column in np.argwhere(confusion) if len(names) <= 30 else ():
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{confusion[row, column]}", ha="center", va="center", fontsize=8, color=colour)
    return figure


@_drawing
def mistakes_figure(answers: Answers, title: str) -> Figure:
    """Draw the thirty mistakes of which the model was most sure."""
    wrong, confidence = answers.mistakes, answers.probabilities.max(1)  # (N,)
    images = [np.hstack(answers.shown(row)).transpose(2, 0, 1) for row in wrong[:SHOWN].tolist()]
    texts = [
        f"is {answers.given(row)}\nsaid {answers.said(row)}, {confidence[row]:.1%}\n{answers.file(row)[-30:]}"
        for row in wrong[:SHOWN].tolist()
    ]
    title += f"\nthe most confident of {len(wrong):,} mistakes on {len(confidence):,} images"
    return captioned(images, texts, title)


@_drawing
def reliability_figure(answers: Answers, title: str) -> Figure:
    """Draw how often the model was right against how sure it was, and how many images that stands for."""
    confidence, right = answers.probabilities.max(1), answers.logits.argmax(1) == answers.labels  # (N,)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)  # (N,)
    filled, counts = np.unique(bins, return_counts=True)  # bins that have images, and how many
    means, accuracies = (np.bincount(bins, values)[filled] / counts for values in (confidence, right))
    figure = Figure((6, 6.6), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], "--", label="perfect calibration")
    upper.plot(means, accuracies, "o-", label="this model")
    upper.legend()
    upper.set(ylabel="accuracy", title=f"{title}\n{len(bins):,} images")
    lower.hist(confidence, BINS, range=(0, 1))
    lower.set(xlabel="confidence: probability of the predicted class", ylabel="images")
    return figure


curves_figure = _drawing(precision_recall_figure)


def write_report(answers: Answers, title: str, folder: Path) -> dict[str, Any]:
    """Write a page, metrics.json, tables and figures in place of an earlier report's, together; returns `measure`'s."""
    found, names = measure(answers), answers.class_names
    rows = [*found["per_class"].values()]
    tables = {"per_class": (["class", *rows[0]], [row.values() for row in rows])}
    figures = {"mistakes": mistakes_figure}
    if answers.several:
        figures["precision_recall"] = curves_figure
    else:
        tables["confusion"] = (["true class \\ predicted class", *names], answers.confusion.tolist())
        figures |= {"confusion": confusion_figure, "reliability": reliability_figure}
    drawn: dict[str, bytes] = {}
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as complete:
        json_file = complete.enter_context(atomic_path(folder / "metrics.json"))
        json_file.write_text(
            json.dumps({"title": title, **found}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        for name, (header, rows) in tables.items():
            path = complete.enter_context(atomic_path(folder / f"{name}.csv"))
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([header, *([name, *row] for name, row in zip(names, rows, strict=True))])
        for name, draw in figures.items():
            path = complete.enter_context(atomic_path(folder / f"{name}.png"))
            draw(answers, title).savefig(path)
            drawn[name] = path.read_bytes()
        page = complete.enter_context(atomic_path(folder / "report.html"))
        page.write_text(report_page(answers, found, title, drawn), encoding="utf-8")
    return found
