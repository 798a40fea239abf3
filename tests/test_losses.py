"""Losses against values computed by hand."""

from math import log
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_nn import LitClassifier
from lit_nn.losses import LOSSES, balanced_weights

# Softmax of (0, log 3) is (1/4, 3/4).
LOGITS = torch.tensor([[0.0, log(3)], [0.0, log(3)]])
WEIGHT = torch.tensor([1.0, 3.0])
NEVER, OFTEN = log(4), log(4 / 3)  # cross-entropy of class 0 and class 1


def both(classes: list[int]) -> list[Tensor]:
    """The same targets as indices and one-hot."""
    indices = torch.tensor(classes)
    return [indices, F.one_hot(indices, 2).float()]


@pytest.mark.parametrize("target", both([0, 1]))
@pytest.mark.parametrize(
    ("name", "options", "value"),
    [
        ("cross_entropy", {}, (NEVER + OFTEN) / 2),
        ("cross_entropy", {"label_smoothing": 0.2}, (NEVER + OFTEN) / 2),
        ("cross_entropy", {"weight": WEIGHT}, (1 * NEVER + 3 * OFTEN) / 4),
        # The weight of a class goes with its own share of the target.
        ("cross_entropy", {"weight": WEIGHT, "label_smoothing": 0.2}, (NEVER + 3 * OFTEN) / 4),
        # differences to the one-hot targets: (-1, log 3) and (0, log 3 - 1)
        ("mse", {}, (1 + log(3) ** 2 + 0 + (log(3) - 1) ** 2) / 4),
        ("l1", {}, (1 + log(3) + 0 + log(3) - 1) / 4),
        ("mse", {"weight": WEIGHT}, (1 * (1 + log(3) ** 2) / 2 + 3 * (0 + (log(3) - 1) ** 2) / 2) / 4),
        ("l1", {"weight": WEIGHT}, (1 * (1 + log(3)) / 2 + 3 * (0 + log(3) - 1) / 2) / 4),
        ("mse", {"label_smoothing": 0.2}, (0.9**2 + (log(3) - 0.1) ** 2 + 0.1**2 + (log(3) - 0.9) ** 2) / 4),
        ("l1", {"label_smoothing": 0.2}, (0.9 + log(3) - 0.1 + 0.1 + log(3) - 0.9) / 4),
    ],
)
def test_the_value_by_hand(target: Tensor, name: str, options: dict[str, object], value: float) -> None:
    assert LOSSES[name](LOGITS, target, **options).item() == pytest.approx(value)
    logits = LOGITS.to(torch.bfloat16).requires_grad_()
    LOSSES[name](logits, target, **options).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_cross_entropy_of_mixed_targets_and_balanced_weights() -> None:
    mixed = LOSSES["cross_entropy"](LOGITS[:1], torch.tensor([[0.25, 0.75]]))
    assert mixed.item() == pytest.approx(0.25 * NEVER + 0.75 * OFTEN)
    assert balanced_weights(torch.tensor([10, 30, 0, 40])).tolist() == pytest.approx([2, 80 / 120, 0, 0.5])


@pytest.mark.parametrize("weights", [[1, 3], (1.0, 3.0)], ids=["list", "tuple"])
def test_class_weights_of_any_kind_weigh(weights: Any) -> None:
    model = LitClassifier(["a", "b"], (1, 28, 28), [0.5], [0.5], class_weights=weights)
    assert model.class_weights is not None
    assert model.class_weights.tolist() == [1, 3]
    assert model.hparams["class_weights"] == [1.0, 3.0]  # a plain value, for the checkpoint
