"""An image classifier around a constant random weight, a shared layer and control flow that depends on the data."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FixedHidden(nn.Module):
    """``FixedHiddenMLP`` of "Layers and Modules" in Dive into Deep Learning, made to classify.

    Its three ideas do their work here too: a random weight that never learns (a buffer: saved and moved with the
    network), one linear layer used before and after it, and features that are halved until their absolute sum is at
    most 1. How often is decided for each image by itself, so its logits do not depend on the rest of the batch.

    Args:
        image_size: (H, W) in pixels, which fixes the size of the first layer.
        hidden: Features of the shared layer.
    """

    rand_weight: Tensor

    def __init__(
        self, in_channels: int = 1, num_classes: int = 10, image_size: tuple[int, int] = (28, 28), hidden: int = 256
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(in_channels * math.prod(image_size), hidden), nn.ReLU())
        self.register_buffer("rand_weight", torch.randn(hidden, hidden) / math.sqrt(hidden))
        self.linear = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify float images (B, in_channels, H, W): logits (B, num_classes)."""
        x = self.stem(x)  # (B, hidden)
        x = self.linear(x)  # (B, hidden)
        x = F.relu(x @ self.rand_weight + 1)  # (B, hidden)
        x = self.linear(x)  # (B, hidden), the same parameters once more
        x = halve(x)  # (B, hidden)
        x = x * x.shape[1]  # back to a mean absolute value between 1/2 and 1, which a linear layer learns from
        return self.head(x)  # (B, num_classes)


def halve(x: Tensor) -> Tensor:
    """Halve each row of (B, N) until its absolute sum is at most 1.

    An exported graph cannot hold a loop whose length depends on the data: there, the same number of halvings is
    counted at once, as the powers of two that the sum exceeds.
    """
    if torch.compiler.is_exporting():
        powers = 2.0 ** torch.arange(128.0, device=x.device)  # (128,), up to the largest float
        halvings = (x.abs().sum(1, keepdim=True) > powers).sum(1, keepdim=True, dtype=x.dtype)  # (B, 1)
        return x * 0.5**halvings
    while (large := (x.abs().sum(1, keepdim=True) > 1) & x.isfinite().all(1, keepdim=True)).any():
        x = torch.where(large, x / 2, x)
    return x
