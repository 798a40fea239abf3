"""Augmentation of whole batches on the device, with its own random draw for every image.

The draws come from a CPU generator and only then move to the device, so a run repeats itself on every device. Nothing
here waits for a CUDA device, which has yet to compute the steps before. Images are uint8 (B, C, H, W), and targets the
probabilities of the classes, float (B, K).

What photographs need is drawn first, as a few numbers for each image (`Changes`), and then done at once: all that
moves pixels in one map, through which an image is sampled once; then what changes colours; then what is erased.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from data_modules.errors import OptionError, unknown
from data_modules.photographs import FILTERS, Changes, Size, change_images, covered, erase, to_device_of, to_pixels

Range = tuple[float, float]  # least and most


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


def _flipped(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the chosen images (bool (B,)) left to right."""
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def flip(images: Tensor, draws: Draws) -> Tensor:
    """Mirror every other image left to right, by chance."""
    return _flipped(images, to_device_of(images, draws.rand(len(images)) < 0.5))


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
    y = to_device_of(images, draws.randint(2 * up + 1, batch))
    x = to_device_of(images, draws.randint(2 * left + 1, batch))
    return windows[torch.arange(batch, device=images.device), :, y, x]


def _random_boxes(images: Tensor, sizes: Tensor, draws: Draws) -> Tensor:
    """Left, top, width and height of boxes, int64 (B, 4), of widths and heights (B, 2), centred anywhere."""
    batch, (height, width) = len(images), images.shape[2:]
    top, left = draws.randint(height, batch), draws.randint(width, batch)
    return to_device_of(images, torch.cat([torch.stack([left, top], 1) - sizes // 2, sizes], 1))


def cutout(images: Tensor, draws: Draws) -> Tensor:
    """Paint a rectangle of half the image's sides, centred anywhere, with the image's own mean colour.

    From T. DeVries and G. Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout" (2017).
    """
    height, width = images.shape[2:]
    return erase(images, _random_boxes(images, torch.tensor([width, height]).expand(len(images), 2) // 2, draws))


def brightness_contrast(images: Tensor, draws: Draws) -> Tensor:
    """Multiply each image's contrast by 0.8 to 1.2 and move its brightness by up to a fifth of the range."""
    drawn = to_device_of(images, draws.rand(2, len(images))[..., None, None, None])
    contrast, brightness = 0.4 * drawn - 0.2  # (B, 1, 1, 1) each
    pixels = images.float()
    # (pixels - mean) * (1 + contrast) + mean + 255 brightness, in fewer passes over the pixels
    offset = 255 * brightness - contrast * pixels.mean((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    return to_pixels(pixels.mul_(1 + contrast).add_(offset))


def mixup(images: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Fade each image and its target into its neighbour's, in a proportion drawn evenly from 0 to 1.

    From H. Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018), with alpha = 1 as there for CIFAR-10. The
    batch is in random order already, so the neighbour, on the same process, is as good a partner as any.
    """
    share = to_device_of(images, draws.rand(len(images)))  # (B,) of the neighbour
    images = to_pixels(torch.lerp(images.float(), images.roll(1, 0).float(), share[:, None, None, None]))
    return images, torch.lerp(targets, targets.roll(1, 0), share[:, None])


def cutmix(images: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Paste a rectangle of each image's neighbour into it, and give the neighbour's target the share of its area.

    From S. Yun et al., "CutMix" (2019), with alpha = 1 as there: before the rectangle is cut at the image's edges, its
    share of the area is drawn evenly from 0 to 1.
    """
    height, width = images.shape[2:]
    sizes = draws.rand(len(images)).sqrt()[:, None] * torch.tensor([width, height])  # (B, 2)
    box = covered(images, _random_boxes(images, sizes.round().long(), draws))  # (B, 1, H, W)
    share = box.float().mean((1, 2, 3))  # (B,)
    return torch.where(box, images.roll(1, 0), images), torch.lerp(targets, targets.roll(1, 0), share[:, None])


def _random_parts(draws: Draws, batch: int, sides: Tensor, scale: Range, ratio: Range, shape: Tensor) -> Tensor:
    """Left, top, width and height of random parts, int64 (B, 4), of a share of the area and a ratio to the shape."""
    share, stretch, *place = draws.rand(4, batch)
    area = (scale[0] + (scale[1] - scale[0]) * share) * sides.prod()  # (B,)
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** stretch * shape[0] / shape[1]
    size = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], 1).round().clamp(torch.ones(2), sides)
    return torch.cat([torch.stack(place, 1) * (sides - size + 1), size], 1).long()


# Of TrivialAugment, the filters first. Then: to shear and to shift along both sides, to rotate, to multiply brightness,
# contrast and saturation, and nothing.
_OPERATIONS = len(FILTERS) + 9

# In the order in which they are applied, whatever the order in which they were named: mixing comes last.
_MOVING = {function.__name__: function for function in (flip, translate)}
_PAINTING = {function.__name__: function for function in (brightness_contrast, cutout)}
_MIXING = {function.__name__: function for function in (cutmix, mixup)}
_MAPPED = ["crop", "vertical_flip", "quarter_turn", "rotate", "trivial"]  # with one of them, flip and translate too
AUGMENTATIONS = ["flip_alternating", *_MOVING, *_MAPPED, "color", "erase", *_PAINTING, *_MIXING]
"""Every name that `Augment` knows, in the order in which they are applied."""


class Augment:
    """A chain of augmentations for whole batches.

    Args:
        spec: Names of `AUGMENTATIONS` joined by commas, such as "flip,translate,cutout", or "none"; of another name
            there is an OptionError. `names` has them in the order in which they are applied. ``crop`` may have
            options, of which these are the defaults: "crop:scale=0.25..1:ratio=0.75..1.33", the share of the area that
            is left, and the ratio of width to height, compared with the result's.
    """

    def __init__(self, spec: str) -> None:
        wanted = dict(word.strip().partition(":")[::2] for word in spec.split(",")) if spec != "none" else {}
        self.names = [name for name in AUGMENTATIONS if name in wanted]
        self.ranges: dict[str, Range] = {"scale": (0.25, 1), "ratio": (0.75, 1.33)}  # of crop
        for name, options in wanted.items():
            if name not in AUGMENTATIONS:
                raise unknown("augmentation", name, AUGMENTATIONS, " joined by commas, or none")
            for option in filter(None, options.split(":")):
                found = re.fullmatch(r"(scale|ratio)=(\d*\.?\d+)\.\.(\d*\.?\d+)", option)
                low, high = (float(found[2]), float(found[3])) if found else (0, 0)
                if not (found and name == "crop" and 0 < low <= high <= (1 if found[1] == "scale" else math.inf)):
                    raise OptionError(
                        f"{name} cannot have the option '{option}'. Allowed: crop:scale=0.25..1:ratio=0.75..1.33 for "
                        "instance, the share of the area that is left (at most 1), and how wide it may become"
                    )
                self.ranges[found[1]] = low, high
        self._mapped = not set(_MAPPED).isdisjoint(self.names)

    def _draw(self, draws: Draws, batch: int, sides: Tensor, frame: Tensor) -> Changes:
        """Draw what becomes of each image, of width and height as in `sides`, to fill a `frame`, int64 (2,) each."""

        def drawn(name: str, count: int, neutral: float = 0.5) -> Tensor:
            """Numbers from 0 to 1, (count, B), or if the change is not wanted the one that changes nothing."""
            return draws.rand(count, batch) if name in self.names else torch.full((count, batch), neutral)

        parts = torch.cat([torch.zeros(batch, 2, dtype=torch.int64), sides.expand(batch, 2)], 1)
        if "crop" in self.names:
            parts = _random_parts(draws, batch, sides, self.ranges["scale"], self.ranges["ratio"], frame)
        mirrored = torch.cat([drawn("flip", 1), drawn("vertical_flip", 1)]).T < 0.5  # (B, 2)
        turns = (4 * drawn("quarter_turn", 1, 0)[0]).long()
        signs = (1 - 2 * mirrored.int()) * (1 - turns[:, None] // 2 * 2)
        which, strength = drawn("trivial", 2, 0.99)
        filters, strengths = (_OPERATIONS * which).long(), 2 * strength - 1
        trivial = (F.one_hot(filters, _OPERATIONS) * strengths[:, None])[:, len(FILTERS) :]  # (B, 9)
        shear = 0.99 * trivial[:, 0:2]
        shift = 2 / 7 * trivial[:, 2:4]  # 32 of 224 pixels, from -1 to 1
        shift += (2 * drawn("translate", 2).T - 1) / 8  # a sixteenth of the sides, from -1 to 1
        angle = math.radians(135) * trivial[:, 4] + math.radians(15) * (2 * drawn("rotate", 1)[0] - 1)
        angle += turns % 2 * (math.pi / 2 if frame[0] == frame[1] else 0)  # where they do not fit, half turns
        factors = (1 + 0.99 * trivial[:, 5:8]) * (0.6 + 0.8 * drawn("color", 3).T)
        erased = torch.zeros(batch, 4, dtype=torch.int64)
        if "erase" in self.names:
            erased = _random_parts(draws, batch, frame, (0.02, 0.33), (0.3, 3.3), frame)
            erased *= draws.rand(batch)[:, None] < 0.5
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(batch, 2, 2)
        slant = torch.eye(2) + torch.diag_embed(shear).flip(2)  # x by y, and y by x
        reach = parts[:, 2:] / sides  # (B, 2)
        linear = turn @ slant * signs[:, None] * frame / frame[:, None] * reach[:, :, None]  # (B, 2, 2)
        centre = (2 * parts[:, :2] + parts[:, 2:]) / sides - 1 + shift * reach  # (B, 2)
        upright = (angle == 0) & (shear == 0).all(1) & (shift == 0).all(1)
        maps = torch.cat([linear, centre[:, :, None]], 2)
        return Changes(parts, maps, upright, factors, filters, strengths, erased)

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        num_classes: int,
        draws: Draws,
        epoch: int = 0,
        *,
        size: Size | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Augment one batch, on any device; the given tensors stay as they are.

        Args:
            images: uint8 (B, C, H, W).
            labels: int64 (B,), or 0 or 1, float32 (B, K).
            num_classes: K.
            draws: Where random numbers come from.
            epoch: Which one it is, for ``flip_alternating``.
            size: Height and width that ``crop`` gives the images; None for those they have.

        Returns:
            uint8 images (B, C, H, W), and the labels, after mixup or cutmix probabilities of the classes, float32
            (B, K).
        """
        if "flip_alternating" in self.names:
            images = flip_alternating(images, epoch)
        for name, one_image in _MOVING.items():
            if name in self.names and not self._mapped:
                images = one_image(images, draws)
        if self._mapped or "color" in self.names or "erase" in self.names:
            height, width = images.shape[2:]
            size = size if size and "crop" in self.names else (height, width)
            changes = self._draw(draws, len(images), torch.tensor([width, height]), torch.tensor(size[::-1]))
            images = change_images(images, changes, size if self._mapped else None)
        for name, one_image in _PAINTING.items():
            if name in self.names:
                images = one_image(images, draws)
        mixing = [mix for name, mix in _MIXING.items() if name in self.names]
        targets = F.one_hot(labels, num_classes).float() if mixing and labels.ndim == 1 else labels  # (B, K) or (B,)
        for mix in mixing:
            images, targets = mix(images, targets, draws)
        return images, targets
