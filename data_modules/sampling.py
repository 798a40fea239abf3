"""Which images of a published data set are cut off for validation."""

import torch
from torch import Tensor

from data_modules.batches import seeded_generator


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Cut a part off a data set in which every class keeps its share.

    Args:
        labels: Class of each image, int64 (N,); or 0 or 1 (N, K), of which the rarest class of each image counts.
        fraction: Share of each class that is cut off; of two or more images at least one goes and one stays.
        seed: Decides which images go.

    Returns:
        Sorted int64 indices of what stays and of what is cut off.
    """
    generator, cut_off = seeded_generator(seed), []
    if labels.ndim == 2:
        labels = (labels / labels.sum(0).clamp(min=1)).argmax(1)  # the first one if an image has none
    for label in labels.unique():  # sorted, so that the split does not depend on the order of the classes
        members = (labels == label).nonzero().squeeze(1)
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        cut_off.append(members[torch.randperm(len(members), generator=generator)[:count]])
    second = torch.cat(cut_off).sort().values
    is_first = torch.ones(len(labels), dtype=torch.bool)
    is_first[second] = False
    return is_first.nonzero().squeeze(1), second
