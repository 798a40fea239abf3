"""The multilayer perceptron of the PyTorch tutorial "Build the Neural Network"."""

import math

from torch import Tensor, nn


class MLP(nn.Module):
    """Two hidden layers over the flattened image.

    Sizes and parameter names are those of ``NeuralNetwork`` in the PyTorch tutorials "Build the Neural Network" and
    "Quickstart", so state_dicts can be exchanged with it. Copies of that tutorial with a ReLU after the last layer
    are a known slip: logits must be able to be negative, so there is none here.

    Args:
        image_size: (H, W) in pixels, which fixes the size of the first layer.
        hidden: Units of each hidden layer.
    """

    def __init__(
        self, in_channels: int = 1, num_classes: int = 10, image_size: tuple[int, int] = (28, 28), hidden: int = 512
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.flatten = nn.Flatten()
        self.linear_relu_stack = nn.Sequential(
            nn.Linear(in_channels * math.prod(image_size), hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Classify float images (B, in_channels, H, W): logits (B, num_classes)."""
        x = self.flatten(x)  # (B, in_channels * H * W)
        return self.linear_relu_stack(x)  # (B, num_classes)
