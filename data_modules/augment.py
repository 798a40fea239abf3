"""Augmentation of whole batches on the device, with its own random draw for every image.

The draws come from a CPU generator and only then move to the device, so a run repeats itself on every device. Nothing
here waits for a CUDA device, which has yet to compute the steps before. Images are uint8 (B, C, H, W), and targets the
probabilities of the classes, float (B, K).
"""

import difflib

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from data_modules.errors import OptionError


class Draws:
    """Random numbers for the images of a batch, which an image gets whatever process it is on.

    Of a batch that several processes share, each draws for all images, from a CPU generator in the same state, and
    keeps what is for its own: the images rank, rank + world_size, ... of the whole batch.
    """

    def __init__(self, generator: Generator, rank: int = 0, world_size: int = 1) -> None:
        self.generator, self.rank, self.world_size = generator, rank, world_size

    def rand(self, *size: int) -> Tensor:
        """Floats drawn evenly from 0 to 1, of a size whose last dimension counts the images."""
        numbers = torch.rand(*size[:-1], size[-1] * self.world_size, generator=self.generator)
        return numbers[..., self.rank :: self.world_size]

    def randint(self, high: int, batch: int) -> Tensor:
        """A whole number drawn from 0 to high - 1 for each image, int64 (B,)."""
        numbers = torch.randint(high, (batch * self.world_size,), generator=self.generator)
        return numbers[self.rank :: self.world_size]


def _to_device_of(images: Tensor, numbers: Tensor) -> Tensor:
    """Drawn numbers on the device of the images."""
    # CUDA has taken them over when this returns, before they arrive; other devices might read them when they are gone.
    return numbers.to(images.device, non_blocking=images.is_cuda)


def _flipped(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the chosen images (bool (B,)) left to right."""
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def flip(images: Tensor, draws: Draws) -> Tensor:
    """Mirror every other image left to right, by chance."""
    return _flipped(images, _to_device_of(images, draws.rand(len(images)) < 0.5))


def flip_alternating(images: Tensor, epoch: int) -> Tensor:
    """Mirror half of the images in even epochs and the other half in odd ones, so that each is seen both ways.

    From K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (2024), section 3.6. There the half is drawn once
    for each image; here it is the parity of the sum of its bytes, and no number has to follow the image around.
    """
    byte_sums = images.sum((1, 2, 3), dtype=torch.int32)  # (B,); in uint8, Apple's GPUs would stop at 255
    return _flipped(images, byte_sums % 2 == epoch % 2)


def translate(images: Tensor, draws: Draws) -> Tensor:
    """Shift each image by up to a sixteenth of its sides, and mirror what is missing: no test image has black bars."""
    batch, _, height, width = images.shape
    up, left = round(height / 16), round(width / 16)
    padded = F.pad(images, (left, left, up, up), mode="reflect")
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2 up + 1, 2 left + 1, H, W), a view
    y = _to_device_of(images, draws.randint(2 * up + 1, batch))
    x = _to_device_of(images, draws.randint(2 * left + 1, batch))
    return windows[torch.arange(batch, device=images.device), :, y, x]


def _random_boxes(images: Tensor, box_height: Tensor, box_width: Tensor, draws: Draws) -> Tensor:
    """Which pixels lie in each image's box, bool (B, 1, H, W); of sizes (B,), centred anywhere in the image."""
    device, batch, (height, width) = images.device, len(images), images.shape[2:]

    def inside(sizes: Tensor, length: int) -> Tensor:
        """Which rows or columns, of as many as the length says, the boxes cover; bool (B, length)."""
        first = draws.randint(length, batch) - sizes // 2
        edges = _to_device_of(images, torch.stack([first, first + sizes])[..., None])  # (2, B, 1)
        place = torch.arange(length, device=device)
        return (place >= edges[0]) & (place < edges[1])

    in_rows, in_columns = inside(box_height, height), inside(box_width, width)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


def cutout(images: Tensor, draws: Draws) -> Tensor:
    """Paint a rectangle of half the image's sides, centred anywhere, with the image's own mean colour.

    From T. DeVries and G. Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout" (2017).
    """
    size = torch.tensor(images.shape[2:]).expand(len(images), 2) // 2  # (B, 2)
    colour = images.float().mean((2, 3), keepdim=True).to(torch.uint8)  # (B, C, 1, 1)
    return torch.where(_random_boxes(images, size[:, 0], size[:, 1], draws), colour, images)


def brightness_contrast(images: Tensor, draws: Draws) -> Tensor:
    """Multiply each image's contrast by 0.8 to 1.2 and move its brightness by up to a fifth of the range."""
    drawn = _to_device_of(images, draws.rand(2, len(images))[..., None, None, None])
    contrast, brightness = 0.4 * drawn - 0.2  # (B, 1, 1, 1) each
    pixels = images.float()
    # (pixels - mean) * (1 + contrast) + mean + 255 brightness, in fewer passes over the pixels
    offset = 255 * brightness - contrast * pixels.mean((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    return pixels.mul_(1 + contrast).add_(offset).round_().clamp_(0, 255).to(torch.uint8)


def mixup(images: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Fade each image and its target into its neighbour's, in a proportion drawn evenly from 0 to 1.

    From H. Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018), with alpha = 1 as there for CIFAR-10. The
    batch is in random order already, so the neighbour, on the same process, is as good a partner as any.
    """
    share = _to_device_of(images, draws.rand(len(images)))  # (B,) of the neighbour
    images = torch.lerp(images.float(), images.roll(1, 0).float(), share[:, None, None, None]).round().to(torch.uint8)
    return images, torch.lerp(targets, targets.roll(1, 0), share[:, None])


def cutmix(images: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Paste a rectangle of each image's neighbour into it, and give the neighbour's target the share of its area.

    From S. Yun et al., "CutMix" (2019), with alpha = 1 as there: before the rectangle is cut at the image's edges, its
    share of the area is drawn evenly from 0 to 1.
    """
    side = draws.rand(len(images)).sqrt()  # (B,) as a share of the image's sides
    height, width = images.shape[2:]
    box = _random_boxes(images, (side * height).round().long(), (side * width).round().long(), draws)
    share = box.float().mean((1, 2, 3))  # (B,)
    return torch.where(box, images.roll(1, 0), images), torch.lerp(targets, targets.roll(1, 0), share[:, None])


# In the order in which they are applied, whatever the order in which they were named: mixing comes last.
_ONE_IMAGE = {function.__name__: function for function in (flip, translate, brightness_contrast, cutout)}
_MIXING = {function.__name__: function for function in (cutmix, mixup)}
AUGMENTATIONS = ["flip_alternating", *_ONE_IMAGE, *_MIXING]
"""Every name that `Augment` knows, in the order in which they are applied."""


class Augment:
    """A chain of augmentations for whole batches.

    Args:
        spec: Names of `AUGMENTATIONS` joined by commas, such as "flip,translate,cutout", or "none"; of another name
            there is an OptionError. `names` has them in the order in which they are applied.
    """

    def __init__(self, spec: str) -> None:
        wanted = [] if spec == "none" else [name.strip() for name in spec.split(",")]
        for name in wanted:
            if name not in AUGMENTATIONS:
                near = difflib.get_close_matches(name, AUGMENTATIONS, 1)
                hint = f" Did you mean {near[0]}?" if near else ""
                allowed = f"{', '.join(AUGMENTATIONS)} joined by commas, or none"
                raise OptionError(f"unknown augmentation '{name}'.{hint} Allowed: {allowed}")
        self.names = [name for name in AUGMENTATIONS if name in wanted]

    def __call__(
        self, images: Tensor, labels: Tensor, num_classes: int, draws: Draws, epoch: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Augment one batch, on any device; the given tensors stay as they are.

        Returns:
            uint8 images (B, C, H, W), and the labels, int64 (B,), or after mixup or cutmix the probabilities of the
            classes, float32 (B, K).
        """
        if "flip_alternating" in self.names:
            images = flip_alternating(images, epoch)
        for name, one_image in _ONE_IMAGE.items():
            if name in self.names:
                images = one_image(images, draws)
        mixing = [mix for name, mix in _MIXING.items() if name in self.names]
        targets = F.one_hot(labels, num_classes).float() if mixing else labels  # (B, K) or (B,)
        for mix in mixing:
            images, targets = mix(images, targets, draws)
        return images, targets
