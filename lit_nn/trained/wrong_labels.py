"""Which labels are probably wrong, by what models say of images that they were not trained on.

An image's score is the probability of its given class: the self-confidence of confident learning (Northcutt, Jiang,
Chuang 2021, https://arxiv.org/abs/1911.00068). cleanlab 2.9 ranks by the same by default; of the other scores that it
has, and that were tried, none found more planted labels.
"""

import textwrap
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data_modules import ImageDataModule
from data_modules.files import atomic_path, write_csv
from data_modules.images.dataset import ImageFiles
from data_modules.images.near_copies import near_copies
from data_modules.sheets import captioned

WRONG = 0.05  # score below which corrected.csv has the likely label: 75 to 78 % of such labels were planted ones
Numbers = NDArray[np.int64]
Shares = NDArray[np.float64]


def write_findings(
    data: ImageDataModule, rows: Numbers, shares: Shares, folds: Numbers, folder: Path
) -> tuple[list[list[str]], int, int]:
    """Write labels.csv, worst.png, near_copies.csv and, where a table can name the images, corrected.csv.

    They are of the images ``rows`` (N,), judged in ``folds`` (N,) with the probabilities ``shares`` (N, num_classes).
    Returns the rows of labels.csv, how many of them, the first ones, count as wrong, and the number of near-copies.
    """
    images, all_labels, _ = data.split("train")
    labels, likely, names, columns = all_labels.numpy()[rows], shares.argmax(1), data.class_names, data.described()
    cells = [*zip(*columns.values(), strict=True)]  # of each image its file, and what else a table says
    files, scores = [str(cells[row][0]) for row in rows], shares[np.arange(len(rows)), labels]
    order = np.argsort(scores, kind="stable")
    table = [[files[n], names[labels[n]], names[likely[n]], f"{scores[n]:.4g}", str(folds[n])] for n in order]
    write_csv(folder / "labels.csv", [["file", "given", "likely", "score", "fold"], *table])
    with atomic_path(folder / "worst.png") as path:
        captions = [f"{textwrap.fill(file, 30)}\nis {one[:22]}\nlikely {two[:22]}" for file, one, two, *_ in table[:30]]
        worst = images[torch.from_numpy(rows[order[:30]])].numpy()
        captioned([*worst], captions, f"the least believed labels of {len(rows):,}").savefig(path)
    near = [
        [files[one], files[other], f"{distance:.6f}", "no" if labels[one] == labels[other] else "yes"]
        for one, other, distance in near_copies(images, torch.from_numpy(rows))
    ]
    write_csv(folder / "near_copies.csv", [["file", "other", "distance", "labels_differ"], *near])
    # Image files, which a table can name; one that is there may have been changed by hand.
    if isinstance(data, ImageFiles) and not (folder / "corrected.csv").exists():
        mended = np.where(scores < WRONG, likely, labels)
        lines = [[Path(files[n]).absolute(), names[mended[n]], *cells[row][1:]] for n, row in enumerate(rows)]
        write_csv(folder / "corrected.csv", [["file", "label", *[*columns][1:]], *lines])
    return table, int((scores < WRONG).sum()), len(near)
