"""Probabilities that mean what they say: one temperature, and the confidence from which a model is sure."""

import math

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

BINS = 15  # of confidence, in the calibration error and the reliability diagram
COLDEST, HOTTEST = 0.05, 20.0


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The T at which softmax(logits / T) has the lowest log loss (Guo et al., 2017), within 0.05 and 20.

    Args:
        logits: Of images that were not trained on, (N, num_classes).
        labels: The right classes, int64 (N,).

    Returns:
        The temperature; 1 if every answer is right, because then the loss falls for ever as T does.
    """
    logits = logits.double()
    right = logits.gather(1, labels[:, None])[:, 0]  # (N,)
    if (right == logits.amax(1)).all():
        return 1.0
    low, high = math.log(COLDEST), math.log(HOTTEST)
    for _ in range(40):  # the loss is convex in 1 / T: its slope changes its sign once
        middle = (low + high) / 2
        expected = ((logits / math.exp(middle)).softmax(1) * logits).sum(1)  # (N,)
        low, high = (middle, high) if expected.mean() > right.mean() else (low, middle)
    return math.exp(high)


def threshold(probabilities: Tensor, labels: Tensor, accept: float) -> float:
    """The smallest confidence from which on at least the share ``accept`` of the answers is right; 1 if there is none.

    Args:
        probabilities: Of images that were not trained on, (N, num_classes).
        labels: The right classes, int64 (N,).
        accept: Share of right answers among those that are accepted, 0 to 1.
    """
    confidence, said = probabilities.max(1)  # (N,) each
    confidence, order = confidence.sort(descending=True)
    right = (said == labels)[order].double().cumsum(0) / torch.arange(1, len(order) + 1)  # share of the first, (N,)
    last = torch.cat([confidence[1:] != confidence[:-1], torch.ones(1, dtype=torch.bool)])  # equals go together
    return min(confidence[last & (right >= accept)].tolist(), default=1.0)


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Expected calibration error (Guo et al., 2017): mean distance of confidence and accuracy over `BINS`."""
    return multiclass_calibration_error(probabilities, labels, probabilities.shape[1], n_bins=BINS).item()
