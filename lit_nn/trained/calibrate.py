"""Probabilities that mean what they say: one temperature, and the confidence from which a model is sure."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Binomial
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

BINS = 15  # of confidence, in the calibration error and the reliability diagram


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The T, 0.05 to 20, at which softmax(logits / T), (N, K), has the lowest log loss (Guo et al., 2017).

    With several labels, 0 or 1 (N, K), it is that of the sigmoid. If every answer is right it is 1, because then the
    loss falls for ever as T does.
    """
    several, logits = labels.ndim == 2, logits.double()
    given = labels.double() if several else F.one_hot(labels, logits.shape[1])  # (N, K)
    right = (logits * given).sum(1)  # (N,)
    if ((logits > 0) == (given > 0)).all() if several else (right == logits.amax(1)).all():
        return 1.0
    low, high = 0.05, 20.0
    for _ in range(40):  # the loss is convex in 1 / T: its slope changes its sign once
        middle = (low * high) ** 0.5
        shares = (logits / middle).sigmoid() if several else (logits / middle).softmax(1)
        expected = (shares * logits).sum(1)  # (N,)
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


def best_thresholds(probabilities: Tensor, labels: Tensor) -> list[float]:
    """For each class the probability from which on its F1 is the best; 0.5 for a class without images.

    Both are (N, K), the labels 0 or 1. A threshold lies halfway to the next smaller probability, so that an answer on
    the edge does not change with the last bit of its logit.
    """
    found = []
    for shares, given in zip(probabilities.double().T, labels.double().T, strict=True):  # (N,) each
        shares, order = shares.sort(descending=True)
        said = torch.arange(1, len(shares) + 1)
        f1 = 2 * given[order].cumsum(0) / (said + given.sum())  # if the first so many are said, (N,)
        below = torch.cat([shares[1:], torch.zeros(1)])
        best = torch.where(below < shares, f1, -1).argmax()  # equals go together
        found.append(((shares[best] + below[best]) / 2).item() if given.any() else 0.5)
    return found


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Expected calibration error (Guo et al., 2017): mean distance of confidence and accuracy over `BINS`.

    With several labels, 0 or 1 (N, K), it is that of all answers, of which each has the probability of a yes.
    """
    if labels.ndim == 2:
        return binary_calibration_error(probabilities.flatten(), labels.long().flatten(), n_bins=BINS).item()
    return multiclass_calibration_error(probabilities, labels, probabilities.shape[1], n_bins=BINS).item()


def wilson_interval(share: float, count: int) -> list[float]:
    """The 95 % interval of a share of ``count`` images (Wilson, 1927); unlike the usual one it holds near 0 and 1."""
    z = 1.959964  # 97.5 % of a normal distribution lies below it
    half = z * (share * (1 - share) / count + (z / count / 2) ** 2) ** 0.5
    return [min(max((share + z**2 / count / 2 + side) / (1 + z**2 / count), 0), 1) for side in (-half, half)]
