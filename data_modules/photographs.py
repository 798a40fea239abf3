"""What augmentation does to photographs, image by image, once it has been drawn: move pixels, change colours, erase.

It is the same on every device, but for a rounding. Images are uint8 (B, C, H, W), and nothing waits for CUDA.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

Size = tuple[int, int]  # height and width


class Changes(NamedTuple):
    """What becomes of the images of a batch, on the CPU. Of two sides or places the horizontal one comes first."""

    parts: Tensor  # left, top, width and height of what is shown, int64 (B, 4)
    maps: Tensor  # affine, from places in the result to places in the image, -1 to 1 each, float (B, 2, 3)
    upright: Tensor  # whether the map shows the part as it is, at most mirrored, bool (B,)
    factors: Tensor  # of brightness, contrast and saturation, float (B, 3)
    filters: Tensor  # numbers in FILTERS, or others, int64 (B,)
    strengths: Tensor  # of the filters, from -1 to 1, float (B,)
    erased: Tensor  # left, top, width and height of what is painted over, int64 (B, 4)


def to_device_of(images: Tensor, numbers: Tensor) -> Tensor:
    """Drawn numbers on the device of the images."""
    # CUDA has taken them over when this returns, before they arrive; other devices might read them when they are gone.
    return numbers.to(images.device, non_blocking=images.is_cuda)


def to_pixels(values: Tensor) -> Tensor:
    """Round to 0..255; in place before that."""
    return values.round_().clamp_(0, 255).to(torch.uint8)


def covered(images: Tensor, boxes: Tensor) -> Tensor:
    """Which pixels lie in each image's box (left, top, width, height; (B, 4) on the device), bool (B, 1, H, W)."""
    rows, columns = (torch.arange(length, device=images.device) for length in images.shape[2:])
    left, top, width, height = boxes.T[..., None]  # (B, 1) each
    in_rows, in_columns = (rows >= top) & (rows < top + height), (columns >= left) & (columns < left + width)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


def cut(images: Tensor, maps: Tensor, parts: Tensor, size: Size) -> Tensor:
    """Resize a part of one image, and mirror it, (1, C, *size): the fastest way on the CPU."""
    [[across, *_], [_, down, _]], (left, top, width, height) = maps[0].tolist(), parts[0].tolist()
    part = images[:, :, top : top + height, left : left + width]
    result = F.interpolate(part, size, mode="bilinear", antialias=True)
    return result.flip([axis for axis, scale in ((3, across), (2, down)) if scale < 0])


def straight(images: Tensor, maps: Tensor, _: Tensor, size: Size) -> Tensor:
    """Do the same to all images at once, as two products of matrices: other devices cannot wait for each image."""

    def weights(axis: int, length: int, count: int) -> Tensor:
        """Share of each pixel of a line in each one of the result, float (B, count, length): PIL's bilinear filter."""
        slope, middle = maps[:, axis, axis, None, None], maps[:, axis, 2, None, None]  # (B, 1, 1)
        pixels = torch.arange(1 - length, length, 2, device=maps.device) / length  # (length,), from -1 to 1
        places = slope * torch.arange(1 - count, count, 2, device=maps.device)[:, None] / count + middle
        distance = (pixels - places).abs() / (2 * slope.abs() / count).clamp(min=2 / length)
        shares = (1 - distance).clamp_(min=0) * ((pixels - middle).abs() < slope.abs())
        return shares / shares.sum(2, keepdim=True)

    (height, width), (lines, columns) = images.shape[2:], size
    return to_pixels(weights(1, height, lines)[:, None] @ images.float() @ weights(0, width, columns)[:, None].mT)


def oblique(images: Tensor, maps: Tensor, size: Size) -> Tensor:
    """Sample each image where its map says, mirrored beyond its edges, (B, C, *size)."""
    # Where images are larger than the result, the mean of several samples: what is too fine must not turn into noise.
    finer = max(1, round(images.shape[2] / size[0]), round(images.shape[3] / size[1]))
    y, x = (torch.arange(1 - n, n, 2, device=maps.device) / n for n in (finer * size[0], finer * size[1]))  # -1 to 1
    across, down, middle = maps.mT[..., None, None].unbind(1)  # (B, 2, 1, 1) each
    grid = across * x + (down * y[:, None] + middle)  # (B, 2, H, W); F.affine_grid makes all of this a seventh slower
    samples = F.grid_sample(images.float(), grid.permute(0, 2, 3, 1), padding_mode="reflection", align_corners=False)
    return to_pixels(F.avg_pool2d(samples, finer) if finer > 1 else samples)


def colour_maps(factors: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """What brightness, contrast and saturation (B, 3) make of a colour, and of the mean one, (B, C, C) each."""
    luma = torch.tensor([0.299, 0.587, 0.114] if channels == 3 else [1 / channels] * channels)
    gray = luma.expand(channels, channels)  # every row makes the same of a colour
    brightness, contrast, saturation = factors.T[..., None, None]  # (B, 1, 1) each
    own = torch.lerp(gray, torch.eye(channels), saturation)
    return own * brightness * contrast, gray * brightness * (1 - contrast)


def recolour(images: Tensor, own: Tensor, of_mean: Tensor) -> Tensor:
    """Change the colours of each image by its two matrices of `colour_maps`, (B, C, C) each."""
    pixels = images.flatten(2).float()  # (B, C, HW)
    return to_pixels(torch.baddbmm(of_mean @ pixels.mean(2, keepdim=True), own, pixels)).view_as(images)


def sharpness(images: Tensor, strengths: Tensor) -> Tensor:
    """Take the difference of a pixel from those around it away, or double it."""
    # With sums of slices, because the convolution of torchvision's adjust_sharpness takes several times as long.
    pixels, inner = images.float(), (..., slice(1, -1), slice(1, -1))
    lines = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    around = lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:]  # sums of 3 x 3 pixels
    soft = pixels.clone()
    soft[inner] = around.add_(pixels[inner], alpha=4).div_(13).round_()  # as in Pillow, where an edge stays itself
    return to_pixels(torch.lerp(pixels, soft, -0.99 * strengths[:, None, None, None]))


def posterize(images: Tensor, strengths: Tensor) -> Tensor:
    """Keep the 2 to 8 highest bits."""
    return images & (256 - 2 ** (6 * strengths.abs()).round()).to(torch.uint8)[:, None, None, None]


def solarize(images: Tensor, strengths: Tensor) -> Tensor:
    """Invert what is brighter than a threshold."""
    threshold = (255 * (1 - strengths.abs())).ceil().to(torch.uint8)[:, None, None, None]
    return images ^ (images >= threshold).to(torch.uint8) * 255  # several times as fast as torch.where


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch what a channel has of the range to all of it."""
    return tv.autocontrast(images.flatten(0, 1)[:, None]).view_as(images)  # torchvision takes one channel or three


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Give all levels of a channel the same share of the pixels, as far as a table can."""
    return tv.equalize(images)


FILTERS = [sharpness, posterize, solarize, autocontrast, equalize]


def paint(images: Tensor, boxes: Tensor) -> Tensor:
    """Paint a box (B, 4) of each image with the image's mean colour: the fastest way on the CPU."""
    result, colours = images.clone(), images.float().mean((2, 3), keepdim=True).to(torch.uint8)  # (B, C, 1, 1)
    for image, colour, (left, top, width, height) in zip(result, colours, boxes.tolist(), strict=True):
        image[:, max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)] = colour
    return result


def paint_all(images: Tensor, boxes: Tensor) -> Tensor:
    """Do the same where each box would have to be waited for, modulo 256: torch.where takes several times as long."""
    colours = images.float().mean((2, 3), keepdim=True).to(torch.uint8)  # (B, C, 1, 1)
    return (colours - images).mul_(covered(images, boxes)).add_(images)


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Paint a box (left, top, width, height; (B, 4)) of each image with the image's mean colour."""
    return (paint if images.device.type == "cpu" else paint_all)(images, boxes)


def _change(result: Tensor, images: Tensor, rows: Tensor, change: Callable[..., Tensor], *numbers: Tensor) -> None:
    """Change some images of a batch: on the CPU one by one, as its cache holds one, elsewhere all at once."""
    if images.device.type == "cpu":
        for row in rows.tolist():
            one = slice(row, row + 1)
            result[one] = change(images[one], *(values[one] for values in numbers))
    elif len(rows):
        places, *values = (to_device_of(images, drawn) for drawn in (rows, *(each[rows] for each in numbers)))
        result[places] = change(images[places], *values)


def change_images(images: Tensor, changes: Changes, size: Size | None) -> Tensor:
    """Do to images (B, C, H, W) what was drawn, in a copy of this size; it is None if nothing moves."""

    def rows(chosen: Tensor) -> Tensor:
        return chosen.nonzero()[:, 0]  # on the CPU, so that their number is known

    result = images.new_empty(*images.shape[:2], *size) if size else images.clone()
    if size:
        upright = cut if images.device.type == "cpu" else straight
        _change(result, images, rows(changes.upright), partial(upright, size=size), changes.maps, changes.parts)
        _change(result, images, rows(~changes.upright), partial(oblique, size=size), changes.maps)
    colours = colour_maps(changes.factors, images.shape[1])
    _change(result, result, rows((changes.factors != 1).any(1)), recolour, *colours)
    for number, function in enumerate(FILTERS):
        _change(result, result, rows(changes.filters == number), function, changes.strengths)
    _change(result, result, rows(changes.erased[:, 2] > 0), erase, changes.erased)
    return result
