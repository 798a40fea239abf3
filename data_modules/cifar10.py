"""CIFAR-10: 60,000 colour images of animals and vehicles, 32x32, in ten classes (Krizhevsky 2009).

Source: https://www.cs.toronto.edu/~kriz/cifar.html
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torchvision import datasets

from data_modules.base import Arrays, ImageDataModule, Split
from data_modules.errors import DataError
from data_modules.files import download

ARCHIVE = "cifar-10-python.tar.gz"


class CIFAR10(ImageDataModule):
    """CIFAR-10: 50,000 images to train and validate on, 10,000 to test.

    ``data_dir`` may hold the published python archive, or the folder ``cifar-10-batches-py`` unpacked from it; else
    torchvision downloads it.

    Args:
        mirror: Address of another server's ``cifar-10-python.tar.gz``; the authors' own server is a slow one.
        options: Those of every data set.
    """

    class_names: ClassVar = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    image_shape = (3, 32, 32)
    mean: ClassVar = [0.4914, 0.4822, 0.4465]  # over all pixels of the published training set, as is std
    std: ClassVar = [0.2470, 0.2435, 0.2616]
    default_augment = "flip,translate"

    def __init__(self, mirror: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.mirror = mirror

    def prepare_data(self) -> None:
        """Download the images, unless this machine has them; raises DataError if they cannot be had."""
        what_to_do = (
            f"{self.data_dir} has neither {ARCHIVE} nor its unpacked folder cifar-10-batches-py. What you can do:\n"
            f"  put {ARCHIVE} into that folder, or give another one: --data_dir FOLDER\n"
            f"  name a server that has it: --data.mirror https://example.org/{ARCHIVE}"
        )
        try:
            self._read(train=False)
        except RuntimeError:
            with download(Path(self.data_dir), "CIFAR-10", what_to_do):
                self._read(train=False, download=True)

    def load(self, split: Split) -> Arrays | None:
        """Read the training or test set; see `ImageDataModule.load`."""
        if split == "val":
            return None
        try:
            return self._read(train=split == "train")
        except RuntimeError as error:
            command = f"python scripts/prepare_data.py --data cifar10 --data_dir {self.data_dir}"
            raise DataError(f"CIFAR-10 is not in {self.data_dir}; fetch it with {command}") from error

    def _read(self, **options: bool) -> Arrays:
        class Source(datasets.CIFAR10):
            url = self.mirror or datasets.CIFAR10.url

        # torchvision compares the MD5 of the archive and of each batch before it unpickles anything.
        source = Source(self.data_dir, **options)
        return torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(source.targets)
