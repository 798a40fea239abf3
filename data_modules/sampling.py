"""Which images are cut off for validation, and how often each of the others is drawn in an epoch."""

import torch
from torch import Tensor

from data_modules.batches import seeded_generator


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Cut a part off a data set in which every class keeps its share.

    Args:
        labels: Class of each image, int64 (N,).
        fraction: Share of each class that is cut off; of two or more images at least one goes and one stays.
        seed: Decides which images go.

    Returns:
        Sorted int64 indices of what stays and of what is cut off.
    """
    generator = seeded_generator(seed)
    cut_off = []
    for label in labels.unique():  # sorted, so that the split does not depend on the order of the classes
        members = (labels == label).nonzero().squeeze(1)
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        cut_off.append(members[torch.randperm(len(members), generator=generator)[:count]])
    second = torch.cat(cut_off).sort().values
    is_first = torch.ones(len(labels), dtype=torch.bool)
    is_first[second] = False
    return is_first.nonzero().squeeze(1), second


def balanced_draws(labels: Tensor, generator: torch.Generator) -> Tensor:
    """As many places of ``labels`` (N,) as it has, drawn with replacement: first a class, then one of its members."""
    by_class = labels.argsort(stable=True)
    counts = labels.bincount()
    starts, present = counts.cumsum(0) - counts, counts.nonzero().squeeze(1)
    classes = present[torch.randint(len(present), (len(labels),), generator=generator)]  # (N,)
    shares = torch.rand(len(labels), dtype=torch.float64, generator=generator)  # (N,) in [0, 1)
    return by_class[starts[classes] + (shares * counts[classes]).long()]


def weighted_draws(weights: Tensor, generator: torch.Generator) -> Tensor:
    """As many places of ``weights`` (N,) as it has, drawn with replacement, each as often as its weight says."""
    ends = weights.cumsum(0)  # each place has a stretch of this line
    points = torch.rand(len(weights), dtype=torch.float64, generator=generator) * ends[-1]  # (N,)
    last = weights.nonzero().max()  # rounding may reach the end of the line
    return torch.searchsorted(ends, points, right=True).clamp(max=last)
