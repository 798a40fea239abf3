"""Custom layers, after "Custom Layers" in Dive into Deep Learning (Zhang et al.)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CenteredLayer(nn.Module):
    """Subtracts the mean of all its input's elements; has no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """Centre a tensor of any shape; the result has the same shape."""
        return x - x.mean()


class MyLinear(nn.Module):
    """A fully connected layer with its own parameters, followed by ReLU.

    The parameters have the names and shapes of Dive into Deep Learning. There forward reads ``self.weight.data``, which
    cuts the tensors off from autograd, so that layer never learns: here the parameters themselves are used.

    Args:
        in_units: Size of the input's last dimension.
        units: Size of the output's last dimension.
    """

    def __init__(self, in_units: int, units: int) -> None:
        super().__init__()
        # Scaled as for any ReLU layer (He et al. 2015): the book's plain randn makes outputs grow with in_units.
        self.weight = nn.Parameter(torch.randn(in_units, units) * math.sqrt(2 / in_units))
        self.bias = nn.Parameter(torch.zeros(units))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_units) to (..., units), all values at least 0."""
        return F.relu(x @ self.weight + self.bias)
