"""The small convolutional network for colour images of the PyTorch tutorial "Training a Classifier"."""

from torch import Tensor, nn


class CifarCNN(nn.Module):
    """The LeNet-like network of the CIFAR-10 tutorial as one ``nn.Sequential``, for 32x32 images.

    The layers and sizes are those of the PyTorch tutorial "Training a Classifier"; the parameters lie under
    ``cifar.<index>``, as in the copies of it that write the network as one Sequential.
    """

    image_size = (32, 32)

    def __init__(self, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        self.cifar = nn.Sequential(  # (B, in_channels, 32, 32)
            nn.Conv2d(in_channels, 6, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),  # (B, 6, 14, 14)
            nn.Conv2d(6, 16, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),  # (B, 16, 5, 5)
            nn.Flatten(),
            nn.Linear(16 * 5 * 5, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Classify float images (B, in_channels, 32, 32): logits (B, num_classes)."""
        return self.cifar(x)
