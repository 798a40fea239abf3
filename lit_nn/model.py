"""ImageClassifier: pixels -> fit -> normalise -> net -> logits; what is saved, loaded, exported and served."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from data_modules.images.fit import FITS, enlarge, fit_to
from lit_nn.errors import UsageError, look_up
from lit_nn.nets import build_net

# Dimensions along which each view of an image is mirrored outside of training.
VIEWS: dict[str, list[list[int]]] = {"false": [[]], "true": [[], [3]], "both": [[], [3], [2], [2, 3]]}


class ImageClassifier(nn.Module):
    """Classifies images: uint8 pixels in, logits out.

    All arguments are plain values, and a checkpoint holds all of them; so it loads with nothing else at hand, and
    loading it runs no code that the file names.

    Args:
        class_names: Name of each class, in the order of the labels.
        image_shape: Channels, height and width of the images.
        mean: Mean of each channel, with pixels scaled to [0, 1].
        std: Standard deviation of each channel, likewise.
        levels: Largest gray level of 16-bit files, which becomes 255 when a file is read.
        fit: How images of other sizes are brought to ``image_shape``, one of `data_modules.images.fit.FITS`.
        net: Name of the network, one of `lit_nn.nets.NETS`, "torchvision/NAME" or "timm/NAME"; or a module of one's
            own, of which the name is kept: then a checkpoint is loaded by ``load_classifier(path, net=MyNet())``.
        net_args: Further arguments of the network's constructor.
        channels_last: Keep kernels and activations in the order (B, H, W, C), which convolutions with many channels
            compute faster, most of all with bf16; networks that call ``view`` on an activation cannot work with it.
        flip_in_eval: Outside of training, give the mean logits of each image and its mirror image ("both": also of the
            two upside down): more accurate where left and right do not matter, at twice (four times) the cost. What is
            exported does it too.
        temperature: What logits are divided by to become probabilities that mean what they say; found on the validation
            images after a training.
        threshold: Probability below which an answer counts as not sure; with several labels one for each class, from
            which on it is said, by default 0.5.
        multi_label: Whether an image may have several labels, or none: then each class has a probability of its own.

    Attributes:
        arguments: The arguments above, from which the same model is built again.
        net_size: (H, W) that the network takes; None for any.

    Raises:
        UsageError: If a name is unknown or an argument does not fit; the message names what is allowed.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        class_names: list[str],
        image_shape: tuple[int, int, int],
        mean: list[float],
        std: list[float],
        levels: int = 65535,
        fit: str = "crop",
        net: str | nn.Module = "lenet",
        net_args: dict[str, Any] | None = None,
        channels_last: bool = False,
        flip_in_eval: bool | str = False,
        temperature: float = 1.0,
        threshold: float | list[float] = 0.0,
        multi_label: bool = False,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        channels, height, width = image_shape
        self.class_names, self.image_shape, self.fit = list(class_names), (channels, height, width), fit
        if not isinstance(net, str | nn.Module):
            raise UsageError(f"net is {net!r}; give the name of a network, or a module of your own: net=MyNet()")
        look_up(dict.fromkeys(FITS), fit, "fit")
        self.views = look_up(VIEWS, str(flip_in_eval).lower(), "flip_in_eval")
        if multi_label and not isinstance(threshold, list):
            threshold = [threshold or 0.5] * len(class_names)
        limits = threshold if isinstance(threshold, list) else [threshold]
        fits = len(limits) == (len(class_names) if multi_label else 1)
        if not (fits and 0 < temperature < math.inf and all(0 <= limit <= 1 for limit in limits)):
            raise UsageError(f"temperature is {temperature}, threshold {threshold}; above 0, and 0 to 1 are allowed")
        self.temperature, self.threshold, self.multi_label = temperature, threshold, multi_label
        if isinstance(net, nn.Module):
            self.net, self.net_name = net, type(net).__qualname__
        else:
            self.net, self.net_name = build_net(net, channels, len(class_names), (height, width), net_args), net
        mean, std = (list(getattr(self.net, name, None) or own) for name, own in (("mean", mean), ("std", std)))
        # A reloaded network gets its weights from the checkpoint: pretrained ones are not to be fetched again.
        net_args = getattr(self.net, "rebuild_args", net_args)
        arguments |= {"class_names": self.class_names, "image_shape": self.image_shape, "net": self.net_name}
        self.arguments = arguments | {"net_args": net_args, "mean": mean, "std": std, "threshold": threshold}
        self.channels_last = channels_last
        self.arrange_memory()
        self.net_size: tuple[int, int] | None = getattr(self.net, "image_size", None)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))  # (C, 1, 1)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def arrange_memory(self) -> None:
        """Put the kernels into the order of memory that was asked for."""
        if self.channels_last:
            try:
                self.net.to(memory_format=torch.channels_last)
            except RuntimeError as error:  # 3-D kernels for instance
                raise UsageError(f"net {self.net_name} cannot be channels_last: {error}") from error

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: Pixels 0..255, uint8 (B, C, H, W), of any size; in training also of the network's own size.

        Returns:
            Logits, float (B, num_classes), of which `probabilities` are made.

        Raises:
            TypeError: If the pixels are not uint8: floats are often scaled already, and would be scaled again.
        """
        x = self.normalised(images)  # (B, C, *net_size)
        if self.training or len(self.views) == 1:
            return self.net(x)  # (B, num_classes)
        return sum(self.net(x.flip(view)) for view in self.views) / len(self.views)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities of the classes from logits, (B, num_classes) each."""
        logits = logits / self.temperature
        return logits.sigmoid() if self.multi_label else logits.softmax(1)

    def normalised(self, images: Tensor) -> Tensor:
        """What the network is given for images: of its size, normalised, float (B, C, H, W)."""
        if images.dtype != torch.uint8:
            raise TypeError(
                f"pixels are {images.dtype}; give them as uint8, 0..255 (scaling and normalisation are part of the "
                "model): torch.uint8 of an image, or (floats * 255).round().to(torch.uint8)"
            )
        mean, std, size = self.mean, self.std, self.net_size  # (C, 1, 1) twice
        height, width = images.shape[-2:]
        ready = [self.image_shape[1:], *([size] if self.training else [])]
        if isinstance(height, int) and (height, width) in ready:  # else a symbol, of a graph for any size
            # In place, in a copy: a new tensor for each step would cost more than the arithmetic.
            x = images.to(mean.dtype, copy=True).div_(255)  # (B, C, H, W) in [0, 1]
        else:
            x = fit_to(images, self.image_shape[1:], self.fit).to(mean.dtype).div_(255)
        if size is not None and x.shape[-2:] != size:
            x = enlarge(x, size)
        if len(mean) > x.shape[1]:  # gray images for weights that were trained with colours
            x = x.expand(-1, len(mean), -1, -1).clone()
        return x.sub_(mean).div_(std)
