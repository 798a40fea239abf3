"""Probabilities that mean what they say: one temperature, and the confidence from which a model is sure."""

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

BINS = 15  # of confidence, in the calibration error and the reliability diagram


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The T, 0.05 to 20, at which softmax(logits / T), (N, K), has the lowest log loss (Guo et al., 2017).

    If every answer is right it is 1, because then the loss falls for ever as T does.
    """
    logits, right = logits.double(), logits.gather(1, labels[:, None])[:, 0].double()  # (N, K), (N,)
    if (right == logits.amax(1)).all():
        return 1.0
    low, high = 0.05, 20.0
    for _ in range(40):  # the loss is convex in 1 / T: its slope changes its sign once
        middle = (low * high) ** 0.5
        expected = ((logits / middle).softmax(1) * logits).sum(1)  # (N,)
        low, high = (middle, high) if expected.mean() > right.mean() else (low, middle)
    return high


def threshold(probabilities: Tensor, labels: Tensor, accept: float) -> float:
    """The smallest confidence from which on the share ``accept`` of the answers (N, K) is right; 1 if there is none."""
    confidence, said = probabilities.max(1)  # (N,) each
    confidence, order = confidence.sort(descending=True)
    right = (said == labels)[order].double().cumsum(0) / torch.arange(1, len(order) + 1)  # share of the first, (N,)
    last = torch.cat([confidence[1:] != confidence[:-1], torch.ones(1, dtype=torch.bool)])  # equals go together
    return min(confidence[last & (right >= accept)].tolist(), default=1.0)


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Expected calibration error (Guo et al., 2017): mean distance of confidence and accuracy over `BINS`."""
    return multiclass_calibration_error(probabilities, labels, probabilities.shape[1], n_bins=BINS).item()


def wilson_interval(share: float, count: int) -> list[float]:
    """The 95 % interval of a share of ``count`` images (Wilson, 1927); unlike the usual one it holds near 0 and 1."""
    z = 1.959964  # 97.5 % of a normal distribution lies below it
    half = z * (share * (1 - share) / count + (z / count / 2) ** 2) ** 0.5
    return [min(max((share + z**2 / count / 2 + side) / (1 + z**2 / count), 0), 1) for side in (-half, half)]
