"""Images that are nearly the same: saved again, resized, a little brighter."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BITS, MOST = 64, 3  # of a hash, and in how many two may differ: then they agree in at least one of its four quarters
STEP = 2  # levels by which a place must be darker than its neighbour: noise on an even ground does not count
NEIGHBOURS = 50  # in the order of the hashes, with which an image is compared; where all look alike there are more
LARGEST = 0.002  # distance of near-copies; 18 pairs of ELPV's 2,624 photographs, which look much alike, have it


def near_copies(images: Tensor, rows: Tensor) -> list[tuple[int, int, float]]:
    """Pairs of images, by their places in ``rows``, and their distance, the nearest first.

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
