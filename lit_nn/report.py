"""What a trained model is worth: numbers, tables and pictures of its answers on a test set."""

import csv
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from lit_nn.commands import CommandParser, command, print_table
from lit_nn.models import MODEL_HELP, Model, classifier_model, data_of, open_model

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from data_modules import ImageDataModule
    from lit_nn.classifier import LitClassifier

SCORES = ("precision", "recall", "f1")  # of each class
BINS = 15  # of confidence, in the calibration error and the reliability diagram
MISTAKES = 30  # on the sheet
COLUMNS = 6  # of that sheet
MOST_DOTS = 8000  # of a side of the confusion matrix, however many classes it has
MOST_NUMBERS = 30  # classes up to which the confusion matrix has its counts written in
LONGEST_NAME = 22  # letters of a class's name that a picture shows


@dataclass(frozen=True)
class Answers:
    """A model's answers on labelled images.

    Attributes:
        class_names: Name of each class.
        labels: The right classes, int64 (N,).
        logits: float32 (N, num_classes).
        probabilities: float32 (N, num_classes).
    """

    class_names: list[str]
    labels: NDArray[np.int64]
    logits: NDArray[np.float32]
    probabilities: NDArray[np.float32]

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The most probable class of each image, (N,)."""
        return self.logits.argmax(1)

    @property
    def confidence(self) -> NDArray[np.float32]:
        """The probability of that class, (N,)."""
        return self.probabilities.max(1)

    @property
    def confusion(self) -> NDArray[np.int64]:
        """How many images of the row's class were taken for the column's, (num_classes, num_classes)."""
        count = len(self.class_names)
        return np.bincount(self.labels * count + self.predicted, minlength=count * count).reshape(count, count)


def answer_test_images(model: Model, data: "ImageDataModule") -> tuple[Answers, NDArray[np.uint8]]:
    """Run a model on the test images of a data set.

    Args:
        model: An opened model; `lit_nn.models.classifier_model` makes one of a classifier.
        data: The data set, prepared.

    Returns:
        Its answers and the images, uint8 (N, C, H, W).

    Raises:
        DataError: If the data set cannot be read.
    """
    tensors, labels, rows = data.split("test")
    images = tensors[rows].cpu().numpy()
    return Answers(model.class_names, labels[rows].cpu().numpy(), *model.run_all(images)), images


# --- numbers --------------------------------------------------------------------------------------------------------


def metrics(answers: Answers) -> dict[str, Any]:
    """Everything that is counted, as plain values.

    Args:
        answers: On at least one image.

    Returns:
        "images" (how many), "accuracy", "accuracy_interval_95" (Wilson's), "top_3_accuracy", "loss" (mean
        cross-entropy in nats), "calibration_error" (see `calibration`), "macro" (unweighted means over the classes of
        "precision", "recall" and "f1") and "per_class" (the same and "support", the number of its images, by the name
        of the class). What would be 0 / 0 is 0, as in scikit-learn.
    """
    confusion = answers.confusion
    count = len(answers.labels)
    right = confusion.diagonal()  # (num_classes,)
    predicted, labelled = confusion.sum(0), confusion.sum(1)  # images of each class, (num_classes,)
    scores = {  # (num_classes,) each
        "precision": right / np.maximum(predicted, 1),
        "recall": right / np.maximum(labelled, 1),
        "f1": 2 * right / np.maximum(predicted + labelled, 1),
    }
    best_three = np.argsort(-answers.logits, axis=1, kind="stable")[:, :3]  # (N, 3)
    shifted = answers.logits.astype(np.float64) - answers.logits.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(count), answers.labels]  # (N,)
    return {
        "images": count,
        "accuracy": float(right.sum() / count),
        "accuracy_interval_95": list(wilson_interval(int(right.sum()), count)),
        "top_3_accuracy": float((best_three == answers.labels[:, None]).any(1).mean()),
        "loss": float(losses.mean()),
        "calibration_error": calibration(answers)[0],
        "macro": {score: float(values.mean()) for score, values in scores.items()},
        "per_class": {
            name: {
                **{score: float(values[label]) for score, values in scores.items()},
                "support": int(labelled[label]),
            }
            for label, name in enumerate(answers.class_names)
        },
    }


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share that was counted (Wilson, 1927); unlike the usual one it holds near 0 and 1 too.

    Args:
        right: How many had the property.
        count: Of how many.
    """
    z = 1.959964  # 97.5 % of a normal distribution lies below it
    share = right / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return float(max(0, centre - half)), float(min(1, centre + half))


def calibration(answers: Answers) -> tuple[float, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Compare how sure the model was with how often it was right, in bins of equal width of its confidence.

    Args:
        answers: The model's answers.

    Returns:
        The expected calibration error of Guo et al., "On Calibration of Modern Neural Networks" (2017): the mean
        difference over all images. And for each bin the share of all images in it, their mean confidence and their
        accuracy, (BINS,) each; the last two are 0 where a bin is empty.
    """
    bins = np.minimum((answers.confidence * BINS).astype(int), BINS - 1)  # (N,)
    counts = np.bincount(bins, minlength=BINS)
    means = np.bincount(bins, answers.confidence, BINS) / np.maximum(counts, 1)
    accuracies = np.bincount(bins, answers.predicted == answers.labels, BINS) / np.maximum(counts, 1)
    shares = counts / len(bins)
    return float((shares * np.abs(means - accuracies)).sum()), shares, means, accuracies


# --- pictures -------------------------------------------------------------------------------------------------------


def confusion_figure(answers: Answers, title: str) -> Figure:
    """Draw the confusion matrix: counts, coloured by their share of the true class."""
    confusion, names = answers.confusion, [_short(name) for name in answers.class_names]
    count = len(names)
    cell = 0.62 if count <= MOST_NUMBERS else max(0.14, 18 / count)
    letters = 0.09 * max(map(len, names))
    size_inches = max(7, cell * count + letters + 1.8), cell * count + letters + 1.2
    figure = Figure(size_inches, min(150, MOST_DOTS / max(size_inches)), layout="constrained")
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = 10 if count <= MOST_NUMBERS else max(4, 72 * cell * 0.8)
    axes.set_xticks(range(count), names, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(range(count), names, fontsize=size, parse_math=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(f"{title}\nconfusion matrix of {confusion.sum():,} images", fontsize=11, parse_math=False)
    if count <= MOST_NUMBERS:
        for (row, column), number in np.ndenumerate(confusion):
            if number:
                colour = "white" if shares[row, column] > 0.55 else "black"
                axes.text(column, row, f"{number}", ha="center", va="center", fontsize=9, color=colour)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, format=PercentFormatter(1))
    bar.set_label("share of the true class")
    return figure


def mistakes_figure(answers: Answers, images: NDArray[np.uint8], title: str) -> Figure:
    """Draw the mistakes of which the model was most sure; images are uint8 (N, C, H, W), gray or colour."""
    names = [_short(name) for name in answers.class_names]
    wrong = np.flatnonzero(answers.predicted != answers.labels)
    worst = wrong[np.argsort(-answers.confidence[wrong], kind="stable")][:MISTAKES]
    rows = max(1, -(-len(worst) // COLUMNS))
    figure = Figure((COLUMNS * 1.9, rows * 2.4 + 0.7), 120, layout=ConstrainedLayoutEngine(hspace=0.06))
    figure.suptitle(
        f"{title}\nthe {len(worst)} most confident of {len(wrong):,} mistakes on {len(images):,} images",
        fontsize=11,
        parse_math=False,
    )
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, row in zip(grid.flat, worst, strict=False):
        axes.imshow(images[row].transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        true, said = names[answers.labels[row]], names[answers.predicted[row]]
        text = f"is {true}\nsaid {said}\n{answers.confidence[row]:.1%}   (image {row})"
        axes.set_title(text, fontsize=8, parse_math=False)
    return figure


def reliability_figure(answers: Answers, title: str) -> Figure:
    """Draw how often the model was right against how sure it was, and how many images that stands for."""
    error, shares, means, accuracies = calibration(answers)
    filled = shares > 0
    figure = Figure((6, 6.6), 120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    centres, width = (np.arange(BINS) + 0.5) / BINS, 1 / BINS
    upper.bar(
        centres[filled], accuracies[filled], width, color="tab:blue", edgecolor="white", label="accuracy in the bin"
    )
    upper.plot(means[filled], accuracies[filled], "o", color="black", markersize=4, label="at its mean confidence")
    upper.plot([0, 1], [0, 1], "--", color="tab:gray", label="perfect calibration")
    upper.set_ylabel("accuracy")
    upper.set_ylim(0, 1.02)
    upper.legend(loc="upper left", fontsize=9)
    upper.set_title(
        f"{title}\nreliability on {len(answers.labels):,} images, calibration error {error:.2%}",
        fontsize=11,
        parse_math=False,
    )
    lower.bar(centres, shares, width, color="tab:gray", edgecolor="white")
    lower.set_xlabel("confidence: probability of the predicted class")
    lower.set_ylabel("share of images")
    lower.set_xlim(0, 1)
    for axes in (upper, lower):
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.xaxis.set_major_formatter(PercentFormatter(1))
    return figure


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


# --- the command ----------------------------------------------------------------------------------------------------


def write_report(answers: Answers, images: NDArray[np.uint8], title: str, folder: Path) -> dict[str, Any]:
    """Write metrics.json, per_class.csv, confusion.csv, confusion.png, mistakes.png and reliability.png.

    Args:
        answers: The model's answers.
        images: The images, uint8 (N, C, H, W).
        title: What was evaluated on what, one line.
        folder: Where they go; it is made if need be.

    Returns:
        See `metrics`; metrics.json has "title" as well.

    Raises:
        OSError: If something cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = metrics(answers)
    text = json.dumps({"title": title, **found}, indent=2, ensure_ascii=False)
    rows = [[name, *(row[number] for number in (*SCORES, "support"))] for name, row in found["per_class"].items()]
    matrix = [[name, *counts] for name, counts in zip(answers.class_names, answers.confusion.tolist(), strict=True)]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:  # a report of before is replaced by a complete one
        part = Path(temporary)
        (part / "metrics.json").write_text(text + "\n", encoding="utf-8")
        _write_csv(part / "per_class.csv", [["class", *SCORES, "support"], *rows])
        _write_csv(part / "confusion.csv", [["true class \\ predicted class", *answers.class_names], *matrix])
        confusion_figure(answers, title).savefig(part / "confusion.png")
        mistakes_figure(answers, images, title).savefig(part / "mistakes.png")
        reliability_figure(answers, title).savefig(part / "reliability.png")
        for file in sorted(part.iterdir()):
            file.replace(folder / file.name)
    return found


def _write_csv(path: Path, rows: list[list[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def add_to_tensorboard(writer: "SummaryWriter", classifier: "LitClassifier", data: "ImageDataModule") -> None:
    """Show the confusion matrix and the mistakes on the test images in TensorBoard.

    Args:
        writer: Where they go.
        classifier: On the device that is to do it.
        data: The data set, prepared.
    """
    answers, images = answer_test_images(classifier_model(classifier, {}), data)
    title = f"{classifier.hparams['net']} on the test images of {type(data).__name__}"
    writer.add_figure("test/confusion", confusion_figure(answers, title))
    writer.add_figure("test/mistakes", mistakes_figure(answers, images, title))


def _print(found: dict[str, Any]) -> None:
    """Print what `metrics` found: a row for each class, their means, and a line for all images."""
    rows = {**found["per_class"], "macro mean": {**found["macro"], "support": found["images"]}}
    texts = [[name, *(f"{row[score]:.2%}" for score in SCORES), f"{row['support']:,}"] for name, row in rows.items()]
    print_table(["class", *SCORES, "support"], texts, right=[*SCORES, "support"])
    low, high = found["accuracy_interval_95"]
    print(
        f"accuracy {found['accuracy']:.2%} (95 % interval {low:.2%} to {high:.2%}), "
        f"top 3 {found['top_3_accuracy']:.2%}, "
        f"loss {found['loss']:.4f}, calibration error {found['calibration_error']:.2%}"
    )


@command
def main(words: list[str]) -> None:
    """Evaluate a model: ``python scripts/evaluate.py``."""
    parser = CommandParser("evaluate", "Report what a checkpoint or an exported model is worth on a test set.")
    parser.add_argument("model", type=Path, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--data", metavar="NAME", help="data set with the same classes [the one it was trained on]")
    parser.add_argument("--data_dir", metavar="DIR", help="folder of the data set [the one it was trained on]")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the report [MODEL-report]")
    options = parser.parse_args(words)
    model = open_model(options.model)
    data = data_of(model, options.data, options.data_dir)
    data.prepare_data()
    answers, images = answer_test_images(model, data)
    title = f"{options.model.name} on the test images of {type(data).__name__}"
    folder = options.output or options.model.with_name(f"{options.model.name}-report")
    found = write_report(answers, images, title, folder)
    print(title)
    _print(found)
    print(f"Report: {folder}")
