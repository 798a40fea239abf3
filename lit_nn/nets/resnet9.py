"""The small residual network of David Page's "How to Train Your ResNet" (myrtle.ai, 2019; the DAWNBench entry).

Residual blocks are those of He et al., "Deep Residual Learning for Image Recognition" (2015); SiLU is from Elfwing et
al., "Sigmoid-Weighted Linear Units for Neural Network Function Approximation in Reinforcement Learning" (2018).
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from lit_nn.errors import look_up

Activation = Callable[[], nn.Module]
ACTIVATIONS: dict[str, Activation] = {"relu": partial(nn.ReLU, inplace=True), "silu": nn.SiLU}


class ResNet9(nn.Module):
    """Eight 3x3 convolutions in three stages, two of them with a residual block, and a linear layer.

    Made for images of about 28x28 to 64x64 pixels; global pooling takes any size from 8x8. The parameters grow with
    the square of ``width``: 0.4 M at 16, 0.9 M at 24, 1.6 M at 32 (the default, which two CPU cores can train),
    6.6 M at 64 (the original, for a GPU).

    Args:
        width: Channels of the first convolution, doubled by each stage.
        activation: "relu", as in the original, or "silu", which is smooth and takes a little longer.

    Raises:
        UsageError: If there is no such activation.
    """

    image_size = None

    def __init__(self, in_channels: int = 3, num_classes: int = 10, width: int = 32, activation: str = "relu") -> None:
        super().__init__()
        act = look_up(ACTIVATIONS, activation, "activation of net resnet9")
        self.features = nn.Sequential(  # (B, in_channels, H, W)
            _conv_bn_act(in_channels, width, act),
            _conv_bn_act(width, 2 * width, act),
            nn.MaxPool2d(2),  # (B, 2 * width, H / 2, W / 2)
            _Residual(2 * width, act),
            _conv_bn_act(2 * width, 4 * width, act),
            nn.MaxPool2d(2),  # (B, 4 * width, H / 4, W / 4)
            _conv_bn_act(4 * width, 8 * width, act),
            nn.MaxPool2d(2),  # (B, 8 * width, H / 8, W / 8)
            _Residual(8 * width, act),
        )
        self.head = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify float images (B, in_channels, H, W): logits (B, num_classes)."""
        x = self.features(x)  # (B, 8 * width, H / 8, W / 8)
        # Not nn.AdaptiveMaxPool2d(1), whose gradient has no deterministic kernel on a GPU.
        x = F.max_pool2d(x, x.shape[2:]).flatten(1)  # (B, 8 * width)
        return self.head(x)  # (B, num_classes)


class _Residual(nn.Module):
    """Adds two convolutions' output to their input; shape (B, channels, H, W) throughout."""

    def __init__(self, channels: int, act: Activation) -> None:
        super().__init__()
        self.block = nn.Sequential(_conv_bn_act(channels, channels, act), _conv_bn_act(channels, channels, act))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def _conv_bn_act(in_channels: int, out_channels: int, act: Activation) -> nn.Sequential:
    """Convolve 3x3 without changing the size; the bias is BatchNorm's."""
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), act())
