"""A sample of Fashion-MNIST that comes with the package, so that everything runs at once and without a network."""

from pathlib import Path

import numpy as np
import torch

from data_modules.base import Arrays, Split
from data_modules.fashion_mnist import FashionMNIST


class FashionMNISTSample(FashionMNIST):
    """7,000 real images of Fashion-MNIST, embedded in the package; mean and std are those of the whole training set.

    600 of each class from the published training set and 100 of each class from the published test set, which
    tests/test_data.py compares. The images are under the MIT licence in ``fashion_mnist_sample.LICENSE.txt``.
    """

    reads_data_dir = False

    def prepare_data(self) -> None:
        """Nothing has to be fetched."""

    def load(self, split: Split) -> Arrays | None:
        """Read the embedded images; see `ImageDataModule.load`."""
        if split == "val":
            return None
        with np.load(Path(__file__).with_suffix(".npz")) as arrays:
            return torch.from_numpy(arrays[f"{split}_images"]), torch.from_numpy(arrays[f"{split}_labels"]).long()
