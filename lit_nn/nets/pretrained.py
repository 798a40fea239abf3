"""Every classification network of torchvision, as ``torchvision/<name>``.

Reached by that prefix and not listed among ``NETS``. torchvision is imported inside the functions, because that takes a
second which nobody else's start should wait for.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_nn.errors import UsageError, look_up

# (H, W) at least, in pixels. Most networks shrink the image 32 times and pool globally what is left.
LEAST_SIDE = 32
LEAST_SIDES = {"alexnet": 63, "inception_v3": 75, "vit": 224}


class TorchvisionNet(nn.Module):
    """A classification model of torchvision with its last layer replaced for ``num_classes``.

    The image size it wants (``image_size``) is: with published weights, the size they were trained at (224 for most,
    299 for inception_v3, 384 for some vit). Without, the data's own, enlarged to the least that the network can work
    on: 32 for most, 63 for alexnet, 75 for inception_v3; at least 224 and square for vit, always 224 for maxvit.
    So training from nothing on small images is as fast as it can be, and fine-tuning sees what the weights know.

    One-channel images are repeated to three channels, with or without published weights: the first convolution stays
    as it was published, and one rule covers every architecture.

    A checkpoint must not start a download when it is loaded, nor forget the size that the weights asked for:
    ``rebuild_args`` are the arguments that build this same network again with no weights, for a checkpoint to save
    in place of those that were given.

    Args:
        name: As in ``torchvision.models.list_models(module=torchvision.models)``.
        in_channels: Channels of the image, 1 or 3.
        num_classes: Number of logits.
        image_size: (H, W) of the data's images in pixels.
        weights: Published weights, downloaded by torchvision: "DEFAULT" (the best) or a name like "IMAGENET1K_V1".
        freeze_backbone: Train the new last layer only (transfer learning); all else keeps its values, the running
            statistics of BatchNorm included.

    Attributes:
        image_size: (H, W) in pixels that forward expects.
        rebuild_args: arguments that make the same network without weights, as plain values.

    Raises:
        UsageError: If there is no such model or weights, or images have neither 1 nor 3 channels.
        OSError: If the weights could not be downloaded or read; the message says what to do.
    """

    def __init__(
        self,
        name: str,
        in_channels: int = 3,
        num_classes: int = 1000,
        image_size: tuple[int, int] = (224, 224),
        weights: str | None = None,
        freeze_backbone: bool = False,
    ) -> None:
        from torchvision import models

        super().__init__()
        look_up(dict.fromkeys(torchvision_names()), name, "torchvision network")
        if in_channels not in (1, 3):
            raise UsageError(f"net torchvision/{name} takes images of 1 or 3 channels, not {in_channels}")
        published = None
        if weights is not None:
            published = look_up(models.get_model_weights(name).__members__, weights, f"weights of torchvision/{name}")
            (side,) = published.transforms().crop_size
            image_size = (side, side)
        self.image_size = _fit(name, image_size)
        self.freeze_backbone = freeze_backbone
        self.rebuild_args: dict[str, Any] = {
            "image_size": list(self.image_size),
            "weights": None,
            "freeze_backbone": freeze_backbone,
        }
        self.net = _load(name, published, self.image_size)
        if freeze_backbone:
            self.net.requires_grad_(False)
        _replace_head(self.net, num_classes)
        if name.startswith("squeezenet"):
            # In place of a ReLU after the last layer, with which logits were never negative.
            self.net.set_submodule("classifier.2", nn.Identity())

    def train(self, mode: bool = True) -> "TorchvisionNet":
        """Set training or evaluation mode; a frozen backbone's BatchNorm stays in evaluation mode."""
        super().train(mode)
        if self.freeze_backbone:
            for layer in self.net.modules():
                if isinstance(layer, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                    layer.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Classify float images (B, in_channels, H, W): logits (B, num_classes)."""
        return self.net(x.expand(-1, 3, -1, -1))


def torchvision_names() -> list[str]:
    """Names of torchvision's classification models."""
    from torchvision import models

    return models.list_models(module=models)


def _fit(name: str, image_size: tuple[int, int]) -> tuple[int, int]:
    """Find the (H, W) in pixels that a network can work on, nearest to that of the images."""
    if name.startswith("maxvit"):
        return (224, 224)  # its windows fit no other
    least = next((side for prefix, side in LEAST_SIDES.items() if name.startswith(prefix)), LEAST_SIDE)
    height, width = (max(least, side) for side in image_size)
    if name.startswith("vit"):  # a square of whole patches, whose side ends the name
        side = min(height, width) // int(name[-2:]) * int(name[-2:])
        return (side, side)
    return (height, width)


def _load(name: str, published: Any, image_size: tuple[int, int]) -> nn.Module:
    """Build a model of torchvision with its 1000 ImageNet classes, with published weights or none."""
    from torchvision import models

    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # transform_input, which published weights turn on, is on without them as well: a checkpoint is rebuilt without.
        options = {"transform_input": True}
        if published is None:
            options |= {"aux_logits": False, "init_weights": True}
    if name.startswith("vit"):
        options = {"image_size": image_size[0]}
    try:
        net = models.get_model(name, weights=published, **options)
    except (OSError, RuntimeError) as error:  # RuntimeError: the file is not what its checksum says
        if published is None:
            raise
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise OSError(
            f"the weights of torchvision/{name} cannot be had from {published.url} ({error}). Put that file into"
            f" {folder} as {published.url.rpartition('/')[2]}, or train without weights."
        ) from error
    if name == "inception_v3":
        # No auxiliary output, so that forward returns a tensor in training too. torchvision refuses to leave it out
        # where weights are loaded; that of googlenet it takes away again by itself.
        net.aux_logits, net.AuxLogits = False, None
    return net


def _replace_head(net: nn.Module, num_classes: int) -> None:
    """Replace the last linear or convolutional layer, which in every model is the one onto the classes."""
    name, last = [(n, layer) for n, layer in net.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))][-1]
    bias = last.bias is not None
    head: nn.Module
    if isinstance(last, nn.Conv2d):
        head = nn.Conv2d(last.in_channels, num_classes, last.kernel_size, bias=bias)  # type: ignore[arg-type]
    else:
        head = nn.Linear(last.in_features, num_classes, bias=bias)
    net.set_submodule(name, head)
