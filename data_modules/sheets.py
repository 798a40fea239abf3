"""Sheets of sample pictures, for the eye: is it the data that was meant?"""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

COLUMNS = 10  # pictures of each class
MOST_CLASSES = 50  # that a sheet shows; more would not fit on a screen
CELL = 0.6  # inches that a picture takes
LETTER = 0.08  # inches that a letter of a name takes
RESOLUTION = 150  # dots per inch


def sample_rows(labels: Tensor) -> Tensor:
    """Places of the first ten pictures of each of the first 50 classes, by class; int64 (M,). Labels are int64 (N,)."""
    return torch.cat([(labels == label).nonzero().squeeze(1)[:COLUMNS] for label in labels.unique()[:MOST_CLASSES]])


def sample_sheet(images: Tensor, labels: Tensor, class_names: Sequence[str]) -> Figure:
    """Draw a row of pictures for each class, the name of the class before it.

    Args:
        images: uint8 (N, C, H, W), gray or colour, on any device; the first ten of each class are drawn.
        labels: int64 (N,).
        class_names: Name of each class. Of more than 50 classes the first 50 are drawn.

    Returns:
        A figure that belongs to no window; write it with ``figure.savefig(path)``.
    """
    rows = min(len(class_names), MOST_CLASSES)
    chosen = sample_rows(labels)
    images, labels = images[chosen].cpu(), labels[chosen].cpu()
    _, _, height, width = images.shape
    gap = max(2, width // 16)
    sheet = torch.full((rows * (height + gap) - gap, COLUMNS * (width + gap) - gap, 3), 255, dtype=torch.uint8)
    for row in range(rows):
        for column, image in enumerate(images[labels == row]):  # (C, H, W)
            top, left = row * (height + gap), column * (width + gap)
            sheet[top : top + height, left : left + width] = image.permute(1, 2, 0)  # gray spreads to three channels

    label_width = 0.2 + LETTER * max(len(name) for name in class_names[:rows])  # inches
    figure_width, figure_height = label_width + COLUMNS * CELL, rows * CELL * height / width
    figure = Figure((figure_width, figure_height), RESOLUTION)
    axes = figure.add_axes((label_width / figure_width, 0, COLUMNS * CELL / figure_width, 1))
    axes.imshow(sheet.numpy(), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([row * (height + gap) + height / 2 for row in range(rows)], class_names[:rows], parse_math=False)
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    return figure
