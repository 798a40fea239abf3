"""Which labels are probably wrong, by what models say of images that they were not trained on.

An image's score is the probability of its given class: the self-confidence of confident learning (Northcutt, Jiang,
Chuang 2021, https://arxiv.org/abs/1911.00068). cleanlab 2.9 ranks by the same by default; of the other scores that it
has, and that were tried, none found more planted labels.
"""

import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data_modules import ImageDataModule
from data_modules.files import atomic_path, write_csv
from data_modules.images.dataset import ImageFiles
from data_modules.sheets import captioned

WRONG = 0.05  # score below which corrected.csv has the likely label: 75 to 78 % of such labels were planted ones
# Of near-copies:
BITS, MOST = 64, 3  # of a hash, and in how many two may differ: then they agree in at least one of its four quarters
STEP = 2  # levels by which a place must be darker than its neighbour: noise on an even ground does not count
NEIGHBOURS = 50  # in the order of the hashes, with which an image is compared; where all look alike there are more
LARGEST = 0.002  # distance of near-copies; 18 pairs of ELPV's 2,624 photographs, which look much alike, have it
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


def near_copies(images: Tensor, rows: Tensor) -> list[tuple[int, int, float]]:
    """Pairs of images that are nearly the same, by their places in ``rows``, and their distance, the nearest first.

    It is one less the correlation of both at 16 x 16 pixels. Pairs are found by difference hashes (whether each of
    8 x 8 places is brighter than the next), sorted by each quarter in turn: n log n steps. Images are uint8
    (N, C, H, W) on the CPU, rows int64 (M,).
    """
    found, hashes, thumbnails = dict[tuple[int, int], float](), [np.zeros(0, np.uint64)], [torch.zeros(0, 256)]
    for some in rows.split(256):
        gray = images[some].float().mean(1)  # (n, H, W)
        bits = -F.adaptive_avg_pool2d(gray, (8, 9)).diff(dim=2) > STEP  # (n, 8, 8)
        hashes.append(np.packbits(bits.flatten(1).numpy(), axis=1).view(np.uint64)[:, 0])
        small = F.adaptive_avg_pool2d(gray, 16).flatten(1)  # (n, 256)
        thumbnails.append(F.normalize(small - small.mean(1, keepdim=True)))
    hashed, vectors = np.concatenate(hashes), torch.cat(thumbnails).numpy()
    for shift in range(0, BITS, BITS // 4):
        turned = hashed << np.uint64(shift) | hashed >> np.uint64(-shift % BITS)
        order = np.argsort(turned, kind="stable")
        turned = turned[order]
        for step in range(1, min(NEIGHBOURS, len(rows))):
            alike = np.flatnonzero(np.bitwise_count(turned[step:] ^ turned[:-step]) <= MOST)
            ones, others = np.sort([order[alike], order[alike + step]], axis=0)
            distances = 1 - (vectors[ones] * vectors[others]).sum(1)
            for one, other, distance in zip(ones.tolist(), others.tolist(), distances.tolist(), strict=True):
                if distance <= LARGEST:
                    found[one, other] = max(distance, 0.0)
    return sorted(((*pair, distance) for pair, distance in found.items()), key=lambda pair: pair[::-1])
