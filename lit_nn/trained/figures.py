"""The figures of a model's answers."""

from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torchmetrics.functional.classification import binary_precision_recall_curve

from data_modules.sheets import captioned, drawable, font_for
from lit_nn.trained.calibrate import BINS
from lit_nn.trained.evaluate import SHOWN, Answers

NAMED = 20  # curves that a legend has room for


def figures_of(answers: Answers, found: dict[str, Any], title: str) -> dict[str, Figure]:
    """All figures by name, of answers of which `measure` found so much.

    The names of classes are short, in fonts that have their letters; what no font here has stands there as a number.
    """
    *names, title = drawable([*(name[:22] for name in answers.class_names), title])
    answers = answers._replace(class_names=names)
    with matplotlib.rc_context({"font.family": font_for([*names, title]), "text.parse_math": False}):
        if answers.several:
            kinds = {"precision_recall": precision_recall(answers, found, title)}
        else:
            kinds = {"confusion": confusion_matrix(answers, title), "reliability": reliability(answers, title)}
        return {"mistakes": mistakes(answers, title), **kinds}


def confusion_matrix(answers: Answers, title: str) -> Figure:
    """Counts, coloured by their share of the true class."""
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


def mistakes(answers: Answers, title: str) -> Figure:
    """The thirty mistakes of which the model was most sure."""
    wrong, confidence, said, given = answers.mistakes, answers.probabilities.max(1), answers.said, answers.given
    rows = wrong[:SHOWN].tolist()
    images = [np.hstack(answers.shown(row)).transpose(2, 0, 1) for row in rows]
    texts = [
        f"is {answers.names(given[row])}\nsaid {answers.names(said[row])}, {confidence[row]:.1%}\n"
        f"{answers.file(row)[-30:]}"
        for row in rows
    ]
    title += f"\nthe most confident of {len(wrong):,} mistakes on {len(confidence):,} images"
    return captioned(images, texts, title)


def reliability(answers: Answers, title: str) -> Figure:
    """How often the model was right against how sure it was, and how many images that stands for."""
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


def precision_recall(answers: Answers, found: dict[str, Any], title: str) -> Figure:
    """Precision against recall of each class, with a mark at its threshold."""
    figure, names = Figure((8, 6), dpi=150, layout="constrained"), answers.class_names
    axes = figure.subplots()
    for label, (name, row) in enumerate(zip(names, found["per_class"].values(), strict=True)):
        shares, given = (torch.from_numpy(one[:, label]) for one in (answers.probabilities, answers.labels))
        if row["support"]:
            precision, recall, _ = binary_precision_recall_curve(shares, given.long(), validate_args=False)
            text = f"{name}: {row['average_precision']:.1%}" if label < NAMED else None
            (line,) = axes.plot(recall, precision, label=text, linewidth=1.2, drawstyle="steps-pre")
            axes.plot(row["recall"], row["precision"], "o", color=line.get_color(), markersize=5)
    more = f" (of {len(names)} the first {NAMED})" if len(names) > NAMED else ""
    figure.legend(loc="outside right upper", title=f"average precision{more}", fontsize=8)
    mean = f"mean average precision {found['mean_average_precision']:.2%}"
    axes.set(xlim=(0, 1.01), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.set_title(f"{title}\n{found['images']:,} images, {mean}; marks: thresholds")
    return figure
