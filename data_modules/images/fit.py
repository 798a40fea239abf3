"""How images of any size become those of a data set: one function for the cache, `forward` and every export."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FITS = ("crop", "pad", "squash")


def fit_to(images: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Bring images, 0..255 (B, C, H, W), to a height and width by bicubic interpolation: float 0..255 (B, C, *size).

    "crop" cuts the largest part of that shape out of the middle, "pad" shows the whole image between black bars,
    "squash" changes the shape of the image. Sides are compared in whole numbers, without "if" and never as 1, so that
    an exported graph takes every size.
    """
    height, width = images.shape[-2:]  # symbols in a graph
    to_height, to_width = size
    inner: Any = size
    if mode == "crop":
        part: Any
        for dim, length, part in (
            (2, height, width * to_height // to_width),
            (3, width, height * to_width // to_height),
        ):
            part = torch.sym_max(torch.sym_min(length, part), 2)
            places = (length - part) // 2 + torch.arange(part, device=images.device)
            # A slice would hold a graph to shapes like that of its example.
            images = images.index_select(dim, places.clamp(0, length - 1))
    if mode == "pad":
        inner = tuple(
            torch.sym_max(torch.sym_min(most, (most_other * side + other // 2) // other), min(2, most))
            for most, side, most_other, other in (
                (to_height, height, to_width, width),
                (to_width, width, to_height, height),
            )
        )
    images = F.interpolate(images.float(), inner, mode="bicubic", antialias=True).clamp(0, 255)
    if mode == "pad":
        below, right = to_height - inner[0], to_width - inner[1]
        images = F.pad(images, (right // 2, right - right // 2, below // 2, below - below // 2))
    return images


def enlarge(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring a data set's images (B, C, H, W) to a network's size: a small lack becomes a black frame."""
    height, width = images.shape[-2:]
    missing_h, missing_w = size[0] - height, size[1] - width
    if 0 <= missing_h <= height // 4 and 0 <= missing_w <= width // 4:  # 28x28 to 32x32 for instance
        top, left = missing_h // 2, missing_w // 2
        return F.pad(images, (left, missing_w - left, top, missing_h - top))
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)
