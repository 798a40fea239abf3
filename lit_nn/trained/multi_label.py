"""What a model is worth whose images may have several labels: the numbers, table and figure of `evaluate`'s report."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torchmetrics.functional.classification import binary_precision_recall_curve

from lit_nn.multi_label import average_precision
from lit_nn.trained.calibrate import calibration_error

if TYPE_CHECKING:
    from lit_nn.trained.evaluate import Answers

NAMED = 20  # curves that the legend of a figure has room for


def measure_labels(answers: "Answers") -> dict[str, Any]:
    """Everything that is counted, as plain values; a class is said from its threshold on, 0 / 0 is 0."""
    logits, labels, shares = (torch.from_numpy(one) for one in (answers.logits, answers.labels, answers.probabilities))
    said, given = answers.probabilities >= answers.threshold, answers.labels > 0  # (N, K) each
    thresholds = np.broadcast_to(answers.threshold, given.shape[1:])

    def scores(right: Any, said: Any, given: Any) -> dict[str, Any]:
        f1 = 2 * right / np.maximum(said + given, 1)
        return {"precision": right / np.maximum(said, 1), "recall": right / np.maximum(given, 1), "f1": f1}

    support = given.sum(0)  # images of each class, (K,)
    each = scores((said & given).sum(0), said.sum(0), support)  # (K,) each
    precision = average_precision(shares, labels).numpy()
    each["average_precision"] = np.nan_to_num(precision)
    mean = float(precision[support > 0].mean()) if support.any() else 0.0  # of the classes that have images
    micro = scores((said & given).sum(), said.sum(), given.sum())
    loss = F.binary_cross_entropy_with_logits
    return {
        "images": len(labels),
        "mean_average_precision": mean,
        "accuracy": float((said == given).mean()),  # share of right answers, yes and no
        "exact_match": float((said == given).all(1).mean()),  # share of images of which all answers are right
        "loss": loss(logits.double() / answers.temperature, labels.double()).item(),  # nats
        "calibration_error": calibration_error(shares, labels),
        "temperature": answers.temperature,
        "uncalibrated_loss": loss(logits.double(), labels.double()).item(),  # at a temperature of 1
        "uncalibrated_calibration_error": calibration_error(logits.sigmoid(), labels),
        "micro": {score: float(value) for score, value in micro.items()},  # of all answers together
        "macro": {score: float(values.mean()) for score, values in each.items()} | {"average_precision": mean},
        "per_class": {
            name: {score: values[label].item() for score, values in (each | more).items()}
            for more in [{"support": support, "threshold": thresholds}]
            for label, name in enumerate(answers.class_names)
        },
    }


def precision_recall_figure(answers: "Answers", title: str) -> Figure:
    """Draw precision against recall of each class, with a mark at its threshold."""
    figure = Figure((8, 6), dpi=150, layout="constrained")
    axes = figure.subplots()
    found = measure_labels(answers)
    for label, (name, row) in enumerate(found["per_class"].items()):
        shares, given = (torch.from_numpy(one[:, label]) for one in (answers.probabilities, answers.labels))
        if row["support"]:
            precision, recall, _ = binary_precision_recall_curve(shares, given.long(), validate_args=False)
            text = f"{name}: {row['average_precision']:.1%}" if label < NAMED else None
            (line,) = axes.plot(recall, precision, label=text, linewidth=1.2, drawstyle="steps-pre")
            axes.plot(row["recall"], row["precision"], "o", color=line.get_color(), markersize=5)
    more = f" (of {len(found['per_class'])} the first {NAMED})" if len(found["per_class"]) > NAMED else ""
    figure.legend(loc="outside right upper", title=f"average precision{more}", fontsize=8)
    mean = f"mean average precision {found['mean_average_precision']:.2%}"
    axes.set(xlim=(0, 1.01), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.set_title(f"{title}\n{found['images']:,} images, {mean}; marks: thresholds")
    return figure
