"""Losses against values computed by hand."""

from math import log
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_nn import LitClassifier
from lit_nn.losses import LOSSES, LossName, balanced_weights

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
    ("options", "value"),
    [
        ({}, (NEVER + OFTEN) / 2),
        ({"label_smoothing": 0.2}, (0.9 * NEVER + 0.1 * OFTEN + 0.9 * OFTEN + 0.1 * NEVER) / 2),
        ({"weight": WEIGHT}, (1 * NEVER + 3 * OFTEN) / 4),
        (
            {"weight": WEIGHT, "label_smoothing": 0.2},
            (0.9 * 1 * NEVER + 0.1 * 3 * OFTEN + 0.9 * 3 * OFTEN + 0.1 * 1 * NEVER) / 4,
        ),
    ],
)
def test_cross_entropy(target: Tensor, options: dict[str, object], value: float) -> None:
    assert LOSSES["cross_entropy"](LOGITS, target, **options).item() == pytest.approx(value)


def test_cross_entropy_of_mixed_targets() -> None:
    value = LOSSES["cross_entropy"](LOGITS[:1], torch.tensor([[0.25, 0.75]]))
    assert value.item() == pytest.approx(0.25 * NEVER + 0.75 * OFTEN)


@pytest.mark.parametrize("target", both([0, 1]))
@pytest.mark.parametrize(
    ("name", "options", "value"),
    [  # differences to the one-hot targets: (2, -1) and (1, 3)
        ("mse", {}, (4 + 1 + 1 + 9) / 4),
        ("l1", {}, (2 + 1 + 1 + 3) / 4),
        ("mse", {"weight": WEIGHT}, (1 * (4 + 1) / 2 + 3 * (1 + 9) / 2) / 4),
        ("l1", {"weight": WEIGHT}, (1 * (2 + 1) / 2 + 3 * (1 + 3) / 2) / 4),
        ("mse", {"label_smoothing": 0.2}, (2.1**2 + 1.1**2 + 0.9**2 + 3.1**2) / 4),
        ("l1", {"label_smoothing": 0.2}, (2.1 + 1.1 + 0.9 + 3.1) / 4),
    ],
)
def test_distances(target: Tensor, name: str, options: dict[str, object], value: float) -> None:
    logits = torch.tensor([[3.0, -1.0], [1.0, 4.0]])
    assert LOSSES[name](logits, target, **options).item() == pytest.approx(value)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_and_gradients(name: str) -> None:
    logits = LOGITS.to(torch.bfloat16).requires_grad_()
    for target in both([0, 1]):
        LOSSES[name](logits, target, label_smoothing=0.1, weight=WEIGHT).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_balanced_weights() -> None:
    assert balanced_weights(torch.tensor([10, 30, 0, 40])).tolist() == pytest.approx([2, 80 / 120, 0, 0.5])


def test_names() -> None:
    assert tuple(LOSSES) == get_args(LossName)


def test_whole_numbers_as_class_weights_weigh_mixed_targets() -> None:
    classifier = LitClassifier(["a", "b"], (1, 28, 28), [0.5], [0.5], class_weights=[1, 3])
    loss = LOSSES["mse"](torch.zeros(1, 2), torch.tensor([[0.5, 0.5]]), 0.0, classifier.class_weights)
    assert loss.item() == pytest.approx(0.25)
