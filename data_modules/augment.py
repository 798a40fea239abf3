"""Augmentation of whole batches on the device, with its own random draw for every image.

The draws come from a CPU generator and only then move to the device, so a run repeats itself on every device. Nothing
here waits for a CUDA device, which has yet to compute the steps before. Images are uint8 (B, C, H, W), and targets the
probabilities of the classes, float (B, K).

What photographs need is drawn first, as a few numbers for each image (`Changes`), and then done at once: all that
moves pixels in one map, through which an image is sampled once; then what changes colours; then what is erased.
"""

import difflib
import math
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from data_modules.errors import OptionError

Range = tuple[float, float]  # least and most
Size = tuple[int, int]  # height and width


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
    batch, (height, width) = len(images), images.shape[2:]
    top, left = draws.randint(height, batch) - box_height // 2, draws.randint(width, batch) - box_width // 2
    return _covered(images, _to_device_of(images, torch.stack([left, top, box_width, box_height], 1)))


def _covered(images: Tensor, boxes: Tensor) -> Tensor:
    """Which pixels lie in each image's box (left, top, width, height; (B, 4)) on the device; bool (B, 1, H, W)."""
    rows, columns = (torch.arange(length, device=images.device) for length in images.shape[2:])
    left, top, width, height = boxes.T[..., None]  # (B, 1) each
    in_rows, in_columns = (rows >= top) & (rows < top + height), (columns >= left) & (columns < left + width)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


def _mean_colour(images: Tensor) -> Tensor:
    """The mean of each channel, uint8 (B, C, 1, 1)."""
    return images.float().mean((2, 3), keepdim=True).to(torch.uint8)


def cutout(images: Tensor, draws: Draws) -> Tensor:
    """Paint a rectangle of half the image's sides, centred anywhere, with the image's own mean colour.

    From T. DeVries and G. Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout" (2017).
    """
    size = torch.tensor(images.shape[2:]).expand(len(images), 2) // 2  # (B, 2)
    return torch.where(_random_boxes(images, size[:, 0], size[:, 1], draws), _mean_colour(images), images)


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


# --- photographs ------------------------------------------------------------------------------------------------------


class Changes(NamedTuple):
    """What becomes of the images of a batch, on the CPU. Of two sides or places the horizontal one comes first."""

    parts: Tensor  # left, top, width and height of what is shown, int64 (B, 4)
    maps: Tensor  # affine, from places in the result to places in the image, -1 to 1 each, float (B, 2, 3)
    upright: Tensor  # whether the map shows the part, at most mirrored, bool (B,)
    factors: Tensor  # of brightness, contrast and saturation, float (B, 3)
    operations: Tensor  # numbers in `_TRIVIAL`, int64 (B,)
    strengths: Tensor  # of these, from -1 to 1, float (B,)
    erased: Tensor  # left, top, width and height of what is painted over, int64 (B, 4)


def _random_parts(draws: Draws, batch: int, sides: Tensor, scale: Range, ratio: Range, shape: Tensor) -> Tensor:
    """Left, top, width and height of random parts, int64 (B, 4), of a share of the area and a ratio to the shape."""
    share, stretch, *place = draws.rand(4, batch)
    area = (scale[0] + (scale[1] - scale[0]) * share) * sides.prod()  # (B,)
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** stretch * shape[0] / shape[1]
    size = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], 1).round().clamp(torch.ones(2), sides)
    return torch.cat([torch.stack(place, 1) * (sides - size + 1), size], 1).long()


def _weights(maps: Tensor, axis: int, length: int, count: int) -> Tensor:
    """Share of each pixel of a line in each pixel of the result, float (B, count, length): PIL's bilinear filter."""
    slope, middle = maps[:, axis, axis, None, None], maps[:, axis, 2, None, None]  # (B, 1, 1)
    pixels = torch.arange(1 - length, length, 2, device=maps.device) / length  # (length,)
    places = slope * (torch.arange(1 - count, count, 2, device=maps.device) / count)[:, None] + middle  # (B, count, 1)
    distance = (pixels - places).abs() / (slope.abs() / count).clamp(min=1 / length) / 2
    weights = (1 - distance).clamp_(min=0) * ((pixels - middle).abs() < slope.abs())
    return weights / weights.sum(2, keepdim=True)


def _shown(images: Tensor, changes: Changes, size: Size) -> Tensor:
    """Sample each image where its map says, with antialiasing, and mirrored beyond its edges; uint8 (B, C, *size)."""
    (height, width), result = images.shape[2:], images.new_empty(*images.shape[:2], *size)
    upright, oblique = changes.upright.nonzero()[:, 0], (~changes.upright).nonzero()[:, 0]
    if images.device.type == "cpu":  # where nothing is faster, or needs less memory, than one image after the other
        for row, (left, top, columns, lines) in zip(upright, changes.parts[upright].tolist(), strict=True):
            part = images[row, :, top : top + lines, left : left + columns][None]
            mirrored = [2 - axis for axis in (0, 1) if changes.maps[row, axis, axis] < 0]
            result[row] = F.interpolate(part, size, mode="bilinear", antialias=True)[0].flip(mirrored)
    elif len(upright):
        rows, maps = (_to_device_of(images, numbers) for numbers in (upright, changes.maps[upright]))
        lines, columns = _weights(maps, 1, height, size[0]), _weights(maps, 0, width, size[1])
        result[rows] = _to_pixels(lines[:, None] @ images[rows].float() @ columns[:, None].mT)
    if len(oblique):
        rows, maps = (_to_device_of(images, numbers) for numbers in (oblique, changes.maps[oblique]))
        finer = max(1, round(height / size[0]), round(width / size[1]))  # samples of a pixel of the result, a side
        grid = F.affine_grid(maps, [len(rows), 1, finer * size[0], finer * size[1]], align_corners=False)
        samples = F.grid_sample(images[rows].float(), grid, padding_mode="reflection", align_corners=False)
        result[rows] = _to_pixels(F.avg_pool2d(samples, finer) if finer > 1 else samples)
    return result


def _to_pixels(values: Tensor) -> Tensor:
    """Round to 0..255, in place."""
    return values.round_().clamp_(0, 255).to(torch.uint8)


def _recolour(images: Tensor, factors: Tensor) -> Tensor:
    """Multiply brightness, contrast and saturation by the factors of each image, (B, 3)."""
    channels, pixels = images.shape[1], images.float()
    luma = torch.tensor([0.299, 0.587, 0.114] if channels == 3 else [1 / channels] * channels)
    brightness, contrast, saturation = factors.T[..., None, None, None]  # (B, 1, 1, 1) each
    gray = (pixels * _to_device_of(images, luma)[:, None, None]).sum(1, keepdim=True).mul_(brightness)  # (B, 1, H, W)
    average = gray.mean((2, 3), keepdim=True)  # (B, 1, 1, 1)
    offset = gray.mul_(contrast * (1 - saturation)).add_(average * (1 - contrast))  # (B, 1, H, W)
    return _to_pixels(pixels.mul_(brightness * contrast * saturation).add_(offset))


def _sharpness(images: Tensor, strengths: Tensor) -> Tensor:
    """Take what a pixel differs by from those around it away, or double it."""
    pixels = images.float()
    around = F.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False)
    return _to_pixels(pixels + 0.99 * strengths * 9 / 13 * (pixels - around))  # PIL's filter


def _posterize(images: Tensor, strengths: Tensor) -> Tensor:
    """Keep the 2 to 8 highest bits."""
    return images & (256 - 2 ** (6 * strengths.abs()).round()).to(torch.uint8)


def _solarize(images: Tensor, strengths: Tensor) -> Tensor:
    """Invert what is brighter than a threshold."""
    return torch.where(images >= 255 * (1 - strengths.abs()), 255 - images, images)


def _autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch what a channel has of the range to all of it."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)  # (B, C, 1, 1)
    return torch.where(high > low, _to_pixels((images - low) * (255 / (high - low))), images)


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    """Give all levels of a channel the same share of the pixels, as far as a table can (PIL's)."""
    levels = images.flatten(0, 1).flatten(1).long()  # (B C, H W)
    places = levels + torch.arange(0, 256 * len(levels), 256, device=images.device)[:, None]
    counts = places.new_zeros(256 * len(levels)).scatter_add_(0, places.flatten(), torch.ones_like(places).flatten())
    counts = counts.view(-1, 256)
    step = (levels.shape[1] - counts.gather(1, levels.amax(1, keepdim=True))) // 255  # (B C, 1)
    table = ((counts.cumsum(1) - counts + step // 2) // step.clamp(min=1)).clamp_(max=255)  # (B C, 256)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device)).to(torch.uint8)
    return table.gather(1, levels).view_as(images)


_FILTERS = [_sharpness, _posterize, _solarize, _autocontrast, _equalize]
# The other operations of TrivialAugment follow: to shear and to shift, along both sides; to rotate; to multiply
# brightness, contrast and saturation; and nothing.
_OPERATIONS = len(_FILTERS) + 9


# In the order in which they are applied, whatever the order in which they were named: mixing comes last.
_MOVING = {function.__name__: function for function in (flip, translate)}
_PAINTING = {function.__name__: function for function in (brightness_contrast, cutout)}
_MIXING = {function.__name__: function for function in (cutmix, mixup)}
_MAPPED = ["crop", "vertical_flip", "quarter_turn", "rotate", "trivial"]  # with one of them, the moving ones are too
AUGMENTATIONS = ["flip_alternating", *_MOVING, *_MAPPED, "color", "erase", *_PAINTING, *_MIXING]
"""Every name that `Augment` knows, in the order in which they are applied."""


class Augment:
    """A chain of augmentations for whole batches.

    Args:
        spec: Names of `AUGMENTATIONS` joined by commas, such as "flip,translate,cutout", or "none"; of another name
            there is an OptionError. `names` has them in the order in which they are applied. ``crop`` may have
            options, "crop:scale=0.25..1:ratio=0.75..1.33" for instance, and these are its defaults: the share of the
            area that is left, and the ratio of width to height, compared with that of the result.
    """

    def __init__(self, spec: str) -> None:
        wanted = dict(word.strip().partition(":")[::2] for word in spec.split(",")) if spec != "none" else {}
        for name in wanted:
            if name not in AUGMENTATIONS:
                near = difflib.get_close_matches(name, AUGMENTATIONS, 1)
                hint = f" Did you mean {near[0]}?" if near else ""
                allowed = f"{', '.join(AUGMENTATIONS)} joined by commas, or none"
                raise OptionError(f"unknown augmentation '{name}'.{hint} Allowed: {allowed}")
        self.names = [name for name in AUGMENTATIONS if name in wanted]
        self.ranges: dict[str, Range] = {"scale": (0.25, 1), "ratio": (0.75, 1.33)}  # of crop
        for name, option in ((name, part) for name, parts in wanted.items() for part in parts.split(":") if part):
            found = re.fullmatch(r"(scale|ratio)=(\d*\.?\d+)\.\.(\d*\.?\d+)", option)
            low, high = (float(found[2]), float(found[3])) if found else (0, 0)
            if not (found and name == "crop" and 0 < low <= high <= (1 if found[1] == "scale" else math.inf)):
                raise OptionError(
                    f"augmentation {name} cannot have '{option}'. Allowed: crop:scale=0.25..1:ratio=0.75..1.33, with "
                    "the share of the area that is left (at most 1) and how much wider or narrower it may become"
                )
            self.ranges[found[1]] = low, high
        self._mapped = not set(_MAPPED).isdisjoint(self.names)

    def _draw(self, draws: Draws, batch: int, sides: Tensor, frame: Tensor) -> Changes:
        """Draw what becomes of each image, of width and height as in `sides`, to fill a `frame`, int64 (2,) each."""
        names, zeros = self.names, torch.zeros(batch, 2)
        parts, signs = torch.cat([zeros.long(), sides.expand(batch, 2)], 1), torch.ones(batch, 2)
        angle, shear, shift = torch.zeros(batch), zeros.clone(), zeros.clone()
        factors, operations, strengths = torch.ones(batch, 3), torch.full((batch,), -1), torch.zeros(batch)
        erased = torch.zeros(batch, 4, dtype=torch.int64)
        if "crop" in names:
            parts = _random_parts(draws, batch, sides, self.ranges["scale"], self.ranges["ratio"], frame)
        for axis, name in enumerate(["flip", "vertical_flip"]):
            if name in names:
                signs[:, axis] -= 2 * (draws.rand(batch) < 0.5)
        if "quarter_turn" in names:
            turns = draws.randint(4, batch)
            signs *= 1 - turns[:, None] // 2 * 2
            angle += turns % 2 * (math.pi / 2 if sides[0] == sides[1] and frame[0] == frame[1] else 0)
        if "rotate" in names:
            angle += math.radians(15) * (2 * draws.rand(batch) - 1)
        if "translate" in names:
            shift += (2 * draws.rand(2, batch).T - 1) / 8  # a sixteenth of the sides, from -1 to 1
        if "trivial" in names:
            operations, strengths = draws.randint(_OPERATIONS, batch), 2 * draws.rand(batch) - 1
            drawn = (F.one_hot(operations, _OPERATIONS) * strengths[:, None])[:, len(_FILTERS) :]  # (B, 9)
            shear += 0.99 * drawn[:, 0:2]
            shift += 2 / 7 * drawn[:, 2:4]  # 32 of 224 pixels, from -1 to 1
            angle += math.radians(135) * drawn[:, 4]
            factors += 0.99 * drawn[:, 5:8]
        if "color" in names:
            factors *= 0.6 + 0.8 * draws.rand(3, batch).T
        if "erase" in names:
            erased = _random_parts(draws, batch, frame, (0.02, 0.33), (0.3, 3.3), frame)
            erased *= draws.rand(batch)[:, None] < 0.5
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(batch, 2, 2)
        slant = torch.eye(2) + torch.diag_embed(shear).flip(2)  # x by y, and y by x
        reach = parts[:, 2:] / sides  # (B, 2)
        linear = turn @ slant * signs[:, None] * frame / frame[:, None] * reach[:, :, None]  # (B, 2, 2)
        centre = (2 * parts[:, :2] + parts[:, 2:]) / sides - 1 + shift * reach  # (B, 2)
        upright = (angle == 0) & (shear == 0).all(1) & (shift == 0).all(1)
        maps = torch.cat([linear, centre[:, :, None]], 2)
        return Changes(parts, maps, upright, factors, operations, strengths, erased)

    def _change(self, images: Tensor, changes: Changes, size: Size) -> Tensor:
        """Do what was drawn."""
        images = _shown(images, changes, size) if self._mapped else images.clone()
        rows = (changes.factors != 1).any(1).nonzero()[:, 0]
        if len(rows):
            rows, factors = (_to_device_of(images, numbers) for numbers in (rows, changes.factors[rows]))
            images[rows] = _recolour(images[rows], factors)
        for number, change in enumerate(_FILTERS):
            rows = (changes.operations == number).nonzero()[:, 0]
            if len(rows):
                strengths = changes.strengths[rows, None, None, None]
                rows, strengths = (_to_device_of(images, numbers) for numbers in (rows, strengths))
                images[rows] = change(images[rows], strengths)
        rows = changes.erased[:, 2].nonzero()[:, 0]
        if len(rows):
            rows, boxes = (_to_device_of(images, numbers) for numbers in (rows, changes.erased[rows]))
            chosen = images[rows]
            images[rows] = torch.where(_covered(images, boxes), _mean_colour(chosen), chosen)
        return images

    def _photographs(self, images: Tensor, draws: Draws, size: Size) -> Tensor:
        """Do to the images what photographs need, a few at a time where they fit into the CPU's cache."""
        sides, frame = torch.tensor(images.shape[:1:-1]), torch.tensor(size[::-1])  # width and height
        changes = self._draw(draws, len(images), sides, frame)
        few = 4 * torch.get_num_threads() if images.device.type == "cpu" else len(images)
        chunks = zip(images.split(few), *(numbers.split(few) for numbers in changes), strict=True)
        return torch.cat([self._change(chunk, Changes(*numbers), size) for chunk, *numbers in chunks])

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
            labels: int64 (B,).
            num_classes: K.
            draws: Where random numbers come from.
            epoch: Which one it is; for flip_alternating.
            size: Height and width that images get by ``crop``; None for those they have.

        Returns:
            uint8 images (B, C, H, W), and the labels, int64 (B,), or after mixup or cutmix the probabilities of the
            classes, float32 (B, K).
        """
        if "flip_alternating" in self.names:
            images = flip_alternating(images, epoch)
        for name, one_image in _MOVING.items():
            if name in self.names and not self._mapped:
                images = one_image(images, draws)
        if self._mapped or "color" in self.names or "erase" in self.names:
            height, width = images.shape[2:]
            images = self._photographs(images, draws, size if size and "crop" in self.names else (height, width))
        for name, one_image in _PAINTING.items():
            if name in self.names:
                images = one_image(images, draws)
        mixing = [mix for name, mix in _MIXING.items() if name in self.names]
        targets = F.one_hot(labels, num_classes).float() if mixing else labels  # (B, K) or (B,)
        for mix in mixing:
            images, targets = mix(images, targets, draws)
        return images, targets
