"""A sample of Fashion-MNIST that comes with the package, so that everything runs at once and without a network."""

from importlib.resources import as_file, files

import numpy as np
import torch

from data_modules.base import Arrays, ImageDataModule, Split
from data_modules.fashion_mnist import FashionMNIST


class FashionMNISTSample(ImageDataModule):
    """7,000 real images of Fashion-MNIST, embedded in the package.

    600 of each class from the published training set and 100 of each class from the published test set, which
    tests/test_data.py compares. The images are under the MIT licence in ``fashion_mnist_sample.LICENSE.txt``.
    """

    class_names = FashionMNIST.class_names
    image_shape = FashionMNIST.image_shape
    mean = FashionMNIST.mean  # of the whole training set; the sample's own is 0.001 larger
    std = FashionMNIST.std
    default_augment = FashionMNIST.default_augment
    reads_data_dir = False

    def load(self, split: Split) -> Arrays | None:
        """Read the embedded images; see `ImageDataModule.load`."""
        if split == "val":
            return None
        with as_file(files("data_modules") / "fashion_mnist_sample.npz") as path, np.load(path) as arrays:
            return torch.from_numpy(arrays[f"{split}_images"]), torch.from_numpy(arrays[f"{split}_labels"]).long()
