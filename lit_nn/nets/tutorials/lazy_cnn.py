"""A convolutional network written without a single input size, with torch's lazy layers."""

from torch import Tensor, nn


class LazyCNN(nn.Module):
    """Two convolutions with BatchNorm, average pooling and dropout, whose input sizes come from the data.

    The lazy layers (``LazyConv2d``, ``LazyBatchNorm2d``, ``LazyLinear``) get their shapes in the first forward, which
    ``build_net`` does with an image of the right size before anyone asks for the parameters. A network built directly
    needs such a forward before its optimizer is made. Structure after the PyTorch example "mnist" (Dropout) and LeNet-5
    (average pooling).

    Args:
        in_channels: Channels of the image; the first forward is what decides.
        num_classes: Number of logits.
        image_size: (H, W) in pixels, at least 4 each; what the first forward must have.
        dropout: Share of the features that training leaves out before each linear layer.
    """

    def __init__(
        self, in_channels: int = 1, num_classes: int = 10, image_size: tuple[int, int] = (28, 28), dropout: float = 0.25
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.features = nn.Sequential(  # (B, in_channels, H, W)
            nn.LazyConv2d(16, 3, padding=1, bias=False),  # BatchNorm has the bias
            nn.LazyBatchNorm2d(),
            nn.ReLU(),
            nn.AvgPool2d(2),  # (B, 16, H / 2, W / 2)
            nn.LazyConv2d(32, 3, padding=1, bias=False),
            nn.LazyBatchNorm2d(),
            nn.ReLU(),
            nn.AvgPool2d(2),  # (B, 32, H / 4, W / 4)
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),  # (B, 32 * H / 4 * W / 4)
            nn.Dropout(dropout),
            nn.LazyLinear(128),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.LazyLinear(num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Classify float images (B, in_channels, H, W): logits (B, num_classes)."""
        return self.classifier(self.features(x))
