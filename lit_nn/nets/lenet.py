"""The convolutional network of the PyTorch tutorial "Neural Networks"."""

import torch.nn.functional as F
from torch import Tensor, nn


class LeNet(nn.Module):
    """LeNet with ReLU and max-pooling, for 32x32 images.

    Sizes and parameter names are those of ``Net`` in the PyTorch tutorial "Neural Networks", so state_dicts can be
    exchanged with it. After LeCun et al., "Gradient-Based Learning Applied to Document Recognition" (1998).

    Args:
        kernel_size: Side of both convolutions in pixels, 2 to 13; 5 is the tutorial's.
    """

    image_size = (32, 32)

    def __init__(self, in_channels: int = 1, num_classes: int = 10, kernel_size: int = 5) -> None:
        super().__init__()
        side = ((self.image_size[0] - kernel_size + 1) // 2 - kernel_size + 1) // 2  # after both convolutions
        self.conv1 = nn.Conv2d(in_channels, 6, kernel_size)
        self.conv2 = nn.Conv2d(6, 16, kernel_size)
        self.fc1 = nn.Linear(16 * side * side, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify float images (B, in_channels, 32, 32): logits (B, num_classes)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # (B, 6, 14, 14)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (B, 16, 5, 5)
        x = x.flatten(1)  # (B, 400)
        x = F.relu(self.fc1(x))  # (B, 120)
        x = F.relu(self.fc2(x))  # (B, 84)
        return self.fc3(x)  # (B, num_classes)
