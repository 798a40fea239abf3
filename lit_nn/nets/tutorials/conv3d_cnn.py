"""3-D convolutions on a single image: the third dimension is its scale space."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv3dCNN(nn.Module):
    """Stacks ever more blurred copies of the image and convolves over copy, row and column at once.

    A kernel that spans neighbouring copies can take their difference, that is, answer to edges and spots of one size:
    the scale space of Witkin (1983) with the differences of Lowe's SIFT (2004) learned instead of fixed. Blurring is
    a 3x3 average. Any image size from 4x4, by global pooling.

    Args:
        scales: Copies in the stack, the image itself among them; 4 to 64.
        width: Channels of the first convolution, doubled by each of the other two.

    Raises:
        ValueError: If there are too few or too many scales.
    """

    image_size = None

    def __init__(self, in_channels: int = 1, num_classes: int = 10, scales: int = 4, width: int = 8) -> None:
        super().__init__()
        if not 4 <= scales <= 64:  # two poolings need 4; more blurring than the other leaves only gray
            raise ValueError(f"conv3d_cnn: scales is {scales}; it must be 4 to 64")
        self.scales = scales
        self.features = nn.Sequential(  # (B, in_channels, D, H, W), where D = scales
            *_conv_bn_relu(in_channels, width),
            nn.AvgPool3d(2),  # (B, width, D / 2, H / 2, W / 2)
            *_conv_bn_relu(width, 2 * width),
            nn.AvgPool3d(2),  # (B, 2 * width, D / 4, H / 4, W / 4)
            *_conv_bn_relu(2 * width, 4 * width),  # (B, 4 * width, D / 4, H / 4, W / 4)
        )
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify float images (B, in_channels, H, W): logits (B, num_classes)."""
        stack = [x]
        while len(stack) < self.scales:
            stack.append(F.avg_pool2d(stack[-1], 3, stride=1, padding=1, count_include_pad=False))
        x = torch.stack(stack, dim=2)  # (B, in_channels, D, H, W)
        x = self.features(x).amax((2, 3, 4))  # (B, 4 * width), each feature where it is strongest
        return self.head(x)  # (B, num_classes)


def _conv_bn_relu(in_channels: int, out_channels: int) -> list[nn.Module]:
    """Convolve 3x3x3 without changing the size; the bias is BatchNorm's."""
    return [nn.Conv3d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm3d(out_channels), nn.ReLU()]
