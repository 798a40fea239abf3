"""A data set for the eye: mean and standard deviation, and a sheet of samples."""

from collections.abc import Sequence
from unicodedata import east_asian_width

import matplotlib
import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torchvision.utils import make_grid

from data_modules.base import ImageDataModule
from data_modules.images.decode import visible

CHUNK = 4096  # images measured at a time
COLUMNS = 10  # images of each class on a sheet
MOST_CLASSES = 50  # that a sheet shows; more would not fit on a screen
CELL = 0.6  # inches that an image takes
LETTER = 0.08  # inches that a letter of a name takes
RESOLUTION = 150  # dots per inch


def measured(data: ImageDataModule) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over the training images, with pixels scaled to [0, 1]."""
    images, _, indices = data.split("train")
    total = torch.zeros(2, images.shape[1], dtype=torch.float64)  # of the pixels and of their squares
    for rows in indices.split(CHUNK):
        pixels = images[rows].float() / 255  # (n, C, H, W)
        total += torch.stack([pixels.mean((0, 2, 3)), pixels.square().mean((0, 2, 3))]).double() * len(rows)
    mean, mean_square = total / len(indices)
    return mean.tolist(), (mean_square - mean**2).clamp(min=0).sqrt().tolist()


def font_for(names: Sequence[str]) -> list[str]:
    """Families of fonts, for matplotlib's "font.family": its own, and others that have the letters it lacks."""
    own, missing = font_manager.FontProperties(), set("".join(names)) - {"\n"}
    missing -= _letters(font_manager.findfont(own))
    families = [own.get_name()]
    boxes = "Last Resort"  # for every letter
    fonts = [font for font in font_manager.fontManager.ttflist if boxes not in font.name]
    for font in sorted(fonts, key=lambda font: (font.style != "normal", font.name, font.fname)):
        if missing and (found := missing & _letters(font.fname)):
            missing -= found
            families.append(font.name)
    return families


def drawable(names: Sequence[str]) -> list[str]:
    r"""The names, with ``\u732b`` and the like for letters that no font on this machine has."""
    known = {"\n"}.union(*(_letters(font_manager.findfont(family)) for family in font_for(names)))
    return ["".join(c if c in known else c.encode("unicode_escape").decode() for c in name) for name in names]


def _letters(path: str) -> set[str]:
    return {chr(code) for code in font_manager.get_font(path).get_charmap()}


def captioned(images: Sequence[NDArray[np.uint8]], texts: Sequence[str], title: str) -> Figure:
    """Draw up to thirty images (C, H, W), each below its text."""
    *texts, title = drawable([*texts, title])
    with matplotlib.rc_context({"font.family": font_for([*texts, title]), "text.parse_math": False}):
        wide = any(image.shape[2] > 1.5 * image.shape[1] for image in images)
        figure = Figure((18 if wide else 11.4, 12), dpi=120, layout="constrained")
        figure.suptitle(title)
        for place, (image, text) in enumerate(zip(images, texts, strict=True)):
            axes = figure.add_subplot(5, 6, place + 1)
            axes.imshow(image.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255)
            axes.set_axis_off()
            axes.set_title(text, fontsize=8)
    return figure


def sample_sheet(images: Tensor, labels: Tensor, indices: Tensor, class_names: Sequence[str]) -> Figure:
    """Draw the name and the first ten images of each class, of many classes the first 50, one class in a row.

    Images, labels and which of them to look at are as `ImageDataModule.split` gives them.
    """
    names, labels = drawable(class_names[:MOST_CLASSES]), labels.cpu()[indices]
    members = [labels == label if labels.ndim == 1 else labels[:, label] > 0 for label in range(len(names))]
    height, width = images.shape[2:]
    gap, white = max(2, width // 16), torch.full((COLUMNS, *images.shape[1:]), 255, dtype=torch.uint8)
    rows = [torch.cat([images[indices[of_class][:COLUMNS]].cpu(), white])[:COLUMNS] for of_class in members]
    shown = visible(torch.cat(rows).transpose(0, 1)).transpose(0, 1)  # (M, C, H, W)
    sheet = make_grid(shown, COLUMNS, gap, pad_value=255)[:, gap:-gap, gap:-gap]  # (3, H', W')
    widths = [sum(2 if east_asian_width(letter) in "WF" else 1 for letter in name) for name in names]
    label_width = 0.2 + LETTER * max(widths)  # inches
    figure_width, figure_height = label_width + COLUMNS * CELL, len(names) * CELL * height / width
    figure = Figure((figure_width, figure_height), RESOLUTION)
    axes = figure.add_axes((label_width / figure_width, 0, COLUMNS * CELL / figure_width, 1))
    axes.imshow(sheet.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_xticks([])
    places = [row * (height + gap) + height / 2 for row in range(len(names))]
    axes.set_yticks(places, names, parse_math=False, fontfamily=font_for(names))
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    return figure
