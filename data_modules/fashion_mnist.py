"""Fashion-MNIST: 70,000 gray images of clothes, 28x28, in ten classes (Xiao, Rasul, Vollgraf 2017).

Source: https://arxiv.org/abs/1708.07747; files and their format: https://github.com/zalandoresearch/fashion-mnist
"""

import gzip
import tempfile
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from data_modules.base import Arrays, ImageDataModule, Split
from data_modules.errors import DataError
from data_modules.files import download

PREFIXES = {"train": "train", "test": "t10k"}
FILES = {part: (f"{name}-images-idx3-ubyte", f"{name}-labels-idx1-ubyte") for part, name in PREFIXES.items()}
NAMES = [*FILES["train"], *FILES["test"]]
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


class FashionMNIST(ImageDataModule):
    """Fashion-MNIST in full: 60,000 images to train and validate on, 10,000 to test.

    The four published files are read, gzipped or not, from ``data_dir``, from ``data_dir/FashionMNIST/raw``, or from
    where Debian's package dataset-fashion-mnist installs them. If none of these folders has all, torchvision downloads
    them.
    """

    class_names: ClassVar = [
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ]
    image_shape = (1, 28, 28)
    mean: ClassVar = [0.2860]  # over all pixels of the published training set, as is std
    std: ClassVar = [0.3530]
    default_augment = "flip"  # clothes are as often seen from the left as from the right

    def prepare_data(self) -> None:
        """Download the files, unless this machine has them; raises DataError if they cannot be had."""
        if self.folder() is not None:
            return
        with download(Path(self.data_dir), "Fashion-MNIST", self._help()):
            if self.folder() is None:  # nobody else downloaded them while this process waited
                target = Path(self.data_dir, "FashionMNIST", "raw")
                target.mkdir(parents=True, exist_ok=True)
                # What torchvision leaves behind when it is interrupted looks complete, so it works somewhere else.
                with tempfile.TemporaryDirectory(dir=target) as work:
                    datasets.FashionMNIST(work, download=True)
                    for name in NAMES:
                        Path(work, "FashionMNIST", "raw", name).replace(target / name)

    def load(self, split: Split) -> Arrays | None:
        """Read the published training or test set; see `ImageDataModule.load`."""
        if split == "val":
            return None
        if (folder := self.folder()) is None:
            raise DataError(f"Fashion-MNIST is not here: scripts/prepare_data.py --data fashion_mnist\n{self._help()}")
        images, labels = (read_idx(file(folder, name)) for name in FILES[split])
        return images.unsqueeze(1), labels.long()

    def folder(self) -> Path | None:
        """The first folder that has all four files."""
        folders = (Path(self.data_dir), Path(self.data_dir, "FashionMNIST", "raw"), DEBIAN_FOLDER)
        return next((folder for folder in folders if all(file(folder, name).is_file() for name in NAMES)), None)

    def _help(self) -> str:
        return (
            f"Neither {self.data_dir} nor {DEBIAN_FOLDER} has {', '.join(NAMES)}, with or without .gz. You can\n"
            "  use the small sample that comes with this project: --data fashion_mnist_sample\n"
            "  on Debian or Ubuntu: apt install dataset-fashion-mnist\n"
            "  give a folder with these files of github.com/zalandoresearch/fashion-mnist: --data_dir FOLDER"
        )


def file(folder: Path, name: str) -> Path:
    """Where a published file lies or would lie in a folder, gzipped or not."""
    plain = folder / name
    return plain if plain.is_file() else folder / f"{name}.gz"


def read_idx(path: Path) -> Tensor:
    """Read an IDX file of unsigned bytes, gzipped or not; raises DataError."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as source:
            data = bytearray(source.read())
        if data[:3] != b"\0\0\x08":
            raise ValueError("it is not an IDX file of bytes")
        shape = np.frombuffer(data, ">u4", data[3], 4).tolist()
        return torch.frombuffer(data, dtype=torch.uint8, offset=4 + 4 * len(shape)).view(shape)
    except (OSError, EOFError, zlib.error, ValueError, IndexError, RuntimeError) as error:
        raise DataError(f"{path} is damaged ({error}); delete it, and it will be downloaded") from error
