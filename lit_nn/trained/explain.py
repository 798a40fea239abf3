"""Why a model said that: heat maps of the places that speak for the class it names."""

import threading
from contextlib import ExitStack
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_modules.images.fit import enlarge, fit_to
from lit_nn.errors import UsageError
from lit_nn.model import ImageClassifier
from lit_nn.trained.predict import Pixels

FINE = 7  # rows and columns of a map that is fine enough: what most networks end with at 224 pixels
MOST_EXTRA = 8  # tokens of no place, of the class for instance, that come before those of the patches
PASSED_OVER = (nn.Linear, nn.Dropout, nn.AdaptiveAvgPool2d)  # inner layers of a block; what blurs places
ALONE = threading.Lock()  # hooks see what all threads compute


def heat_maps(model: ImageClassifier, images: Tensor) -> Tensor:
    """Where images show what speaks for the class that the model names: Grad-CAM with the gradient of each place.

    It is the positive part of gradient times activation, summed over the channels of a layer (HiResCAM, Draelos and
    Carin, 2020; after global pooling the same as Grad-CAM, Selvaraju et al., 2017). Activations count from their mean
    over the image: what is everywhere decides nothing. The layer is the last one with 7 x 7 places that decide, or the
    finest; the tokens of a vision transformer's patches are places as well.

    Args:
        model: A classifier whose network has convolutions, or tokens of patches.
        images: Pixels 0..255, uint8 (B, C, H, W), of any size.

    Returns:
        Maps of the images as the model fits them, float (B, *image_shape[1:]), 1 where most speaks for the class and 0
        where nothing does.

    Raises:
        UsageError: If the network has no such layer, as an MLP.
    """
    outputs: list[Tensor] = []  # of the layers, in the order in which they end

    def keep(layer: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad and not isinstance(layer, PASSED_OVER):
            outputs.append(output)  # without a gradient it is that of a thread that only predicts

    was_training, layers = model.training, list(model.eval().net.modules())
    with ALONE, torch.enable_grad(), ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(keep))
        x = model.normalised(images)  # (B, C, h, w)
        views = torch.cat([x.flip(view) for view in model.views])  # (V B, C, h, w)
        logits = model.net(views.requires_grad_()).unflatten(0, (-1, len(x))).mean(0)  # (B, num_classes)
    model.train(was_training)
    score, maps, size = logits.amax(1).sum(), views.new_zeros(len(views), 1, 1), (x.shape[2], x.shape[3])
    corner = score  # what one corner of the layer is
    for output in reversed(outputs):
        found = places(output, size)
        if found is None or found[0, 0].numel() <= maps[0].numel():
            continue
        (gradient,) = torch.autograd.grad(score, output, retain_graph=True, allow_unused=True)
        slope = None if gradient is None else places(gradient, size)  # (V B, C, rows, columns)
        if slope is not None and slope.any():
            maps = (slope * (found - found.mean((2, 3), keepdim=True))).detach().sum(1).clamp(min=0)
            corner = found[:, :, 0, 0].sum()
            if min(maps.shape[1:]) >= FINE:
                break
    if all(places(output, size) is None for output in outputs):
        raise UsageError(f"net {model.net_name} has no layer with places, so there is no heat map of it")
    wide = [layer for layer in layers if isinstance(layer, nn.Conv2d) and layer.kernel_size > layer.stride]
    shown = list(size)  # rows and columns of pixels that the map stands for
    if wide and maps.any() and all(layer.padding == (0, 0) for layer in wide):  # each of them loses a border
        seen = torch.autograd.grad(corner, views)[0].abs().sum((0, 1)) > 0  # the corner's receptive field, (h, w)
        for dim, length in enumerate(maps.shape[1:]):
            field = int(seen.any(1 - dim).nonzero().max()) + 1
            shown[dim] = round((size[dim] - field) / max(length - 1, 1) * length)
    maps = F.interpolate(maps[:, None], shown, mode="bilinear")[:, 0]  # (V B, *shown)
    top, left = ((length - part) // 2 for length, part in zip(size, shown, strict=True))
    maps = F.pad(maps, (left, size[1] - shown[1] - left, top, size[0] - shown[0] - top))  # (V B, h, w)
    parts = zip(maps.chunk(len(model.views)), model.views, strict=True)
    maps = torch.stack([part.flip([dim - 1 for dim in view]) for part, view in parts]).sum(0)  # (B, h, w)
    height, width = model.image_shape[1:]
    inside = enlarge(maps.new_ones(1, 1, height, width), size)[0, 0] > 0  # not the frame around a small image
    maps = maps[:, inside.any(1)][:, :, inside.any(0)]
    maps = F.interpolate(maps[:, None], (height, width), mode="bilinear")[:, 0]  # (B, H, W)
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


def places(output: Tensor, size: tuple[int, int]) -> Tensor | None:
    """A layer's output as a map (N, C, rows, columns) of images of a size (H, W); None if it is none."""
    height, width = size
    if output.ndim == 3:  # tokens (N, T, C), row by row
        tokens = output.shape[1]
        grids = ((height // patch, width // patch) for patch in count(1))
        rows, columns = next(grid for grid in grids if grid[0] * grid[1] <= tokens)
        extra = tokens - rows * columns
        is_grid = rows * columns > 1 and extra <= MOST_EXTRA
        return output[:, extra:].mT.unflatten(2, (rows, columns)) if is_grid else None
    if output.ndim == 5:  # (N, C, D, rows, columns) of 3-D convolutions
        output = output.flatten(1, 2)
    for found in (output, output.movedim(-1, 1)) if output.ndim == 4 else ():  # some have the channels last
        rows, columns = found.shape[2:]
        if rows * columns > 1 and abs(rows * width - columns * height) < max(size):  # in the images' proportions
            return found
    return None


def overlay(model: ImageClassifier, image: Pixels) -> Pixels:
    """One image, uint8 (C, H, W), as the model fits it, in gray, and red where its heat map is: uint8 (h, w, 3)."""
    images = torch.from_numpy(image)[None].to(model.mean.device)
    heat = heat_maps(model, images)[0].cpu().numpy()  # (H, W)
    gray = fit_to(images, model.image_shape[1:], model.fit)[0].mean(0).cpu().numpy()[..., None]  # (H, W, 1)
    share = 0.8 * heat[..., None]  # (H, W, 1)
    return np.round((1 - share) * gray + share * [255, 30, 0]).astype(np.uint8)  # red
