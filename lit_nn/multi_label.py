"""Loss and metrics where an image may have several labels, or none: each class is a question of its own.

Logits (B, K) become the probability of each yes by the sigmoid; targets are 0 or 1, float (B, K), between them in mixed
images. Every class counts the same in a mean over them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MultilabelAccuracy
from torchmetrics.functional.classification import binary_average_precision
from torchmetrics.utilities import dim_zero_cat

from lit_nn.metrics import StageMetrics


def binary_cross_entropy(
    logits: Tensor, target: Tensor, label_smoothing: float = 0.0, weight: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of all answers, (), with weights (K,) of each class's yes; in float32, whatever the logits."""
    smoothed = target * (1 - label_smoothing) + label_smoothing / 2  # (B, K)
    return F.binary_cross_entropy_with_logits(logits.float(), smoothed.float(), pos_weight=weight)


def positive_weights(counts: Tensor, images: int) -> Tensor:
    """Weights (K,) with which yes and no of a class count the same in sum: how many no there are for each yes."""
    return (images - counts) / counts.clamp(min=1)


def average_precision(shares: Tensor, labels: Tensor) -> Tensor:
    """Average precision of each class, (K,), as scikit-learn has it, NaN for a class without images; both (N, K)."""
    found = [
        binary_average_precision(share, label, validate_args=False) if label.any() else torch.tensor(torch.nan)
        for share, label in zip(shares.T, labels.T.long(), strict=True)
    ]
    return torch.stack([one.to(shares.device) for one in found])


class MeanAveragePrecision(Metric):
    """Mean average precision of the classes that have images, exact: it keeps all answers until it is asked."""

    higher_is_better = True
    answers: list[Tensor] | Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("answers", [], dist_reduce_fx="cat")

    def update(self, shares: Tensor, labels: Tensor) -> None:
        """Add probabilities and labels of images, (N, K) each."""
        # Flat, and of one type, because a process without images offers the others an empty list of numbers.
        self.answers.append(torch.stack([shares, labels.to(shares.dtype)], 2).flatten())  # type: ignore[union-attr]

    def compute(self) -> Tensor:
        """The mean over the classes, ()."""
        shares, labels = dim_zero_cat(self.answers).view(-1, self.num_classes, 2).unbind(2)  # (N, K) each
        return average_precision(shares, labels).nanmean()


class MultiLabelMetrics(StageMetrics):
    """`StageMetrics` of images with several labels; a class is said to be there from a probability of one half on.

    ``acc`` is the share of right answers, yes and no; ``f1`` the mean F1 of the classes.
    """

    scores = ("f1", "micro_f1")

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.acc = MultilabelAccuracy(num_classes, average="micro", validate_args=False)
        self.map = MeanAveragePrecision(num_classes)

    def answers(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Which classes are said and given, 0 or 1, (N, K) each."""
        return (logits > 0).long(), (labels > 0.5).long()

    def count(self, logits: Tensor, labels: Tensor) -> None:  # noqa: D102
        said, given = self.answers(logits, labels)
        self.add(torch.stack([said & given, said, given]).sum(1), logits.float().sigmoid(), given)
