"""What a trained model is worth: numbers, tables and figures of its answers on a test set."""

import csv
import functools
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from numpy.typing import NDArray

from data_modules import DATA_SETS, ImageDataModule, data_class, option_names
from data_modules.errors import DataError
from data_modules.files import atomic_path
from data_modules.images.dataset import ImageFiles
from data_modules.sheets import drawable, font_for
from lit_nn.errors import UsageError, brief, other_classes
from lit_nn.trained.calibrate import BINS, calibration_error
from lit_nn.trained.predict import Model


def data_of(model: Model, name: str | None = None, data_dir: str | None = None) -> ImageDataModule:
    """The data set to try a model on, by default its own, none of whose training images is then in the test part.

    Raises:
        UsageError: If there is no such data set, the model does not name its own, or it has other classes or images.
        DataError: If it is not on this machine or cannot be used.
    """
    own = next((key for key, class_name in DATA_SETS.items() if class_name == model.data.get("class")), None)
    name = name or own
    if name is None:
        raise UsageError("the model does not name a data set of this project; choose one with --data and --data_dir")
    cls, (channels, *size) = data_class(name), model.image_shape
    if data_dir is not None and not cls.reads_data_dir:
        raise UsageError(f"--data_dir {data_dir}: {name} reads no folder; leave it out, or add --data image_folder")
    try:  # what a file says of itself can be anything
        options = dict(model.data.get("options", {})) if name == own else {}  # the seed of the training among them
        given = {"image_size": size, "channels": channels, "fit": model.fit, "data_dir": data_dir}
        taken = option_names(name)
        options |= {key: value for key, value in given.items() if key in taken and value is not None}
        if issubclass(cls, ImageFiles) and "data_dir" not in options:
            raise DataError("the model does not say where its images lie: give --data_dir FOLDER")
        data = cls(**options)
        if name == own:
            data.known_parts = {part: torch.from_numpy(known.copy()) for part, known in model.parts.items()}
        shape, others = tuple(data.image_shape), other_classes(model.class_names, data.class_names)
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
    labels: NDArray[np.int64]  # the right classes, (N,)
    logits: NDArray[np.float32]  # (N, num_classes)
    probabilities: NDArray[np.float32]  # (N, num_classes)
    temperature: float = 1.0  # by which logits are divided before they become probabilities
    threshold: float = 0.0  # probability below which the model is not sure

    @property
    def confusion(self) -> NDArray[np.int64]:
        """How many images of the row's class were taken for the column's, (num_classes, num_classes)."""
        count = len(self.class_names)
        return np.bincount(self.labels * count + self.logits.argmax(1), minlength=count**2).reshape(count, count)


def answer_test_images(model: Model, data: ImageDataModule) -> Answers:
    """Run a model on the test images of a data set that is prepared."""
    tensors, labels, rows = data.split("test")
    images: Any = Rows(tensors, rows)
    right, calibration = labels[rows].cpu().numpy(), (model.temperature, model.threshold)
    return Answers(model.class_names, images, right, *model.run(images), *calibration)


def measure(answers: Answers) -> dict[str, Any]:
    """Everything that is counted, as plain values, one more is one more line here; 0 / 0 is 0, as in scikit-learn."""
    labels, logits = torch.from_numpy(answers.labels), torch.from_numpy(answers.logits).double()  # (N,), (N, K)
    classes, count, right = len(answers.class_names), len(labels), answers.confusion.diagonal()  # right is (K,)
    predicted, support = answers.confusion.sum(0), answers.confusion.sum(1)  # images of each class, (K,)
    scores = {  # (K,) each
        "precision": right / np.maximum(predicted, 1),
        "recall": right / np.maximum(support, 1),
        "f1": 2 * right / np.maximum(predicted + support, 1),
    }
    accuracy, z = int(right.sum()) / count, 1.959964  # 97.5 % of a normal distribution lies below z
    # Wilson's interval (1927), which unlike the usual one holds near 0 and 1
    half = z * np.sqrt(accuracy * (1 - accuracy) / count + (z / count / 2) ** 2)
    interval = [(accuracy + z**2 / count / 2 + side) / (1 + z**2 / count) for side in (-half, half)]
    shares = torch.from_numpy(answers.probabilities)  # (N, K)
    sure = answers.probabilities.max(1) >= answers.threshold  # (N,)
    return {
        "images": count,
        "accuracy": accuracy,
        "accuracy_interval_95": np.clip(interval, 0, 1).tolist(),
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
    names, said, confidence = answers.class_names, answers.logits.argmax(1), answers.probabilities.max(1)  # (N,)
    wrong = np.flatnonzero(said != answers.labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:30]
    figure = Figure((11.4, 12), dpi=120, layout="constrained")
    figure.suptitle(f"{title}\nthe most confident of {len(wrong):,} mistakes on {len(said):,} images")
    for place, row in enumerate(worst):
        axes = figure.add_subplot(5, 6, place + 1)
        axes.imshow(answers.images[row].transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255)
        axes.set_axis_off()
        text = f"is {names[answers.labels[row]]}\nsaid {names[said[row]]}\n{confidence[row]:.1%}   (image {row})"
        axes.set_title(text, fontsize=8)
    return figure


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


def write_report(answers: Answers, title: str, folder: Path) -> dict[str, Any]:
    """Write metrics.json, tables and figures, replacing those of an earlier report together; returns `measure`'s."""
    found, names = measure(answers), answers.class_names
    tables = {
        "per_class": (["class", *found["macro"], "support"], [row.values() for row in found["per_class"].values()]),
        "confusion": (["true class \\ predicted class", *names], answers.confusion.tolist()),
    }
    figures = {"confusion": confusion_figure, "mistakes": mistakes_figure, "reliability": reliability_figure}
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
            draw(answers, title).savefig(complete.enter_context(atomic_path(folder / f"{name}.png")))
    return found
