"""Losses, by name: logits (B, K) and targets to the mean over the batch, ().

Targets are class indices, int64 (B,), or a probability for each class, float (B, K) (one-hot, or mixed images).
``label_smoothing`` is the share of the target, 0 to 1, that is spread over all classes (Szegedy et al. 2015). With
weights of the classes (K,), each image counts as much as its classes weigh: ``sum(w_i * loss_i) / sum(w_i)``.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[..., Tensor]


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy of the softmax of the logits; what ``torch.nn.CrossEntropyLoss`` gives for class indices."""
    weight = None if weight is None else weight.to(logits.dtype)
    if weight is None or not target.is_floating_point():
        return F.cross_entropy(logits, target, weight, label_smoothing=label_smoothing)
    # For probabilities torch divides by the number of images whatever they weigh.
    total = F.cross_entropy(logits, target, weight, label_smoothing=label_smoothing, reduction="sum")
    return total / (target.to(weight.dtype) @ weight).sum()


def _distance(
    loss: Loss, logits: Tensor, target: Tensor, label_smoothing: float = 0.0, weight: Tensor | None = None
) -> Tensor:
    """A distance of logits and one-hot targets, the mean over classes and batch."""
    classes = logits.shape[1]
    if not target.is_floating_point():
        target = F.one_hot(target, classes)  # (B, K)
    smoothed = (target * (1 - label_smoothing) + label_smoothing / classes).to(logits.dtype)  # (B, K)
    if weight is None:
        return loss(logits, smoothed)
    weights = target.to(weight.dtype) @ weight  # (B,)
    return (loss(logits, smoothed, reduction="none").mean(1) * weights).sum() / weights.sum()


LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "mse": partial(_distance, F.mse_loss),  # squared
    "l1": partial(_distance, F.l1_loss),  # absolute
}


def balanced_weights(counts: Tensor) -> Tensor:
    """Weights (K,) with which all classes count the same in sum: N / (K * count); 0 for a class without images."""
    weights = counts.sum() / (len(counts) * counts.clamp(min=1))  # (K,)
    return torch.where(counts > 0, weights, 0.0)
