"""An image classifier made of the nested blocks of "Parameter Management" in Dive into Deep Learning."""

import math

from torch import Tensor, nn

from lit_nn.nets.tutorials.nested import block2


class NestedMLP(nn.Module):
    """Ten layers deep: one onto ``units``, the eight of ``block2``, one onto the classes.

    With torch's default initialisation the signal shrinks at every layer and plain nested blocks hardly learn, so the
    weights start as in He et al., "Delving Deep into Rectifiers" (2015), which keeps its size through any number of
    ReLU layers.

    Args:
        image_size: (H, W) in pixels, which fixes the size of the first layer.
        units: Features between the blocks.
        hidden: Units inside each block.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: tuple[int, int] = (28, 28),
        units: int = 128,
        hidden: int = 256,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(in_channels * math.prod(image_size), units), nn.ReLU())
        self.blocks = block2(units, hidden)
        self.head = nn.Linear(units, num_classes)
        for layer in (*self.stem, *self.blocks.modules()):
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Classify float images (B, in_channels, H, W): logits (B, num_classes)."""
        x = self.stem(x)  # (B, units)
        x = self.blocks(x)  # (B, units)
        return self.head(x)  # (B, num_classes)
