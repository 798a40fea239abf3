"""Probabilities that mean what they say: one temperature, and the confidence from which a model is sure."""

import torch
from torch import Tensor
from torch.distributions import Binomial
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
    """The smallest confidence from which on the share ``accept`` of the answers (N, K) is right; 1 if there is none.

    Right on new images too, with 95 % confidence (Clopper and Pearson, 1934): a model that is right less often would
    make so few mistakes in at most 5 % of such samples. The best of more than a hundred tries would be luck more often.
    """
    confidence, said = probabilities.max(1)  # (N,) each
    percents = torch.arange(100, dtype=confidence.dtype) / 100
    for level in confidence.quantile(percents, interpolation="higher").tolist():  # ascending
        sure = confidence >= level  # (N,)
        mistakes = torch.arange(int((said != labels)[sure].sum()) + 1)  # so few: none, or one, or ...
        if Binomial(sure.sum().double(), torch.tensor(1 - accept).double()).log_prob(mistakes).exp().sum() <= 0.05:
            return level
    return 1.0


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Expected calibration error (Guo et al., 2017): mean distance of confidence and accuracy over `BINS`."""
    return multiclass_calibration_error(probabilities, labels, probabilities.shape[1], n_bins=BINS).item()


def wilson_interval(share: float, count: int) -> list[float]:
    """The 95 % interval of a share of ``count`` images (Wilson, 1927); unlike the usual one it holds near 0 and 1."""
    z = 1.959964  # 97.5 % of a normal distribution lies below it
    half = z * (share * (1 - share) / count + (z / count / 2) ** 2) ** 0.5
    return [min(max((share + z**2 / count / 2 + side) / (1 + z**2 / count), 0), 1) for side in (-half, half)]
