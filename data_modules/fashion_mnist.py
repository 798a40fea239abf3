"""Fashion-MNIST: 70,000 gray pictures of clothes, 28x28, in ten classes.

Source: Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms",
2017, https://arxiv.org/abs/1708.07747; files and their format: https://github.com/zalandoresearch/fashion-mnist
"""

import gzip
import http.client
import math
import shutil
import struct
import zlib
from pathlib import Path
from typing import ClassVar

import torch
from filelock import FileLock
from torch import Tensor

from data_modules.base import Arrays, DataError, ImageDataModule, Split

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
NAMES = [*FILES["train"], *FILES["test"]]
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


class FashionMNIST(ImageDataModule):
    """Fashion-MNIST in full: 60,000 images to train and validate on, 10,000 to test.

    The four published files are read, gzipped or not, from ``data_dir``, from ``data_dir/FashionMNIST/raw`` (where
    torchvision puts them), or from where Debian's package dataset-fashion-mnist installs them. If none of these
    folders has all four, torchvision downloads them.
    """

    class_names: ClassVar = [
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ]
    image_shape = (1, 28, 28)
    mean: ClassVar = [0.2860]  # over all pixels of the published training set, as is std
    std: ClassVar = [0.3530]
    default_augment = "flip"  # clothes are as often seen from the left as from the right
    counts: ClassVar[dict[str, int]] = {"train": 60_000, "test": 10_000}
    """Images in the published files."""

    def prepare_data(self) -> None:
        """Download the files, unless this machine has them.

        Raises:
            DataError: If they cannot be had; the message says what was tried and what else can be done.
        """
        if self._find() is not None:
            return
        root = Path(self.data_dir)
        try:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / "fashion_mnist.lock"):
                if self._find() is None:  # nobody else downloaded them while this process waited
                    self._download(root)
        except (OSError, RuntimeError, ValueError, EOFError, zlib.error, http.client.HTTPException) as error:
            from torchvision import datasets

            source, reason = datasets.FashionMNIST.mirrors[0], " ".join(str(error).split())
            raise self._not_found(f"torchvision could not download it from {source}: {reason}") from error

    def load(self, split: Split) -> Arrays | None:
        """Read the published training or test set; see `ImageDataModule.load`."""
        if split == "val":
            return None
        folder = self._find()
        if folder is None:
            raise self._not_found("it was not downloaded: python scripts/prepare_data.py --data fashion_mnist")
        return self._read(folder, split)

    def _folders(self) -> list[Path]:
        return [Path(self.data_dir), Path(self.data_dir, "FashionMNIST", "raw"), DEBIAN_FOLDER]

    def _find(self) -> Path | None:
        """The first folder that has all four files."""
        return next((folder for folder in self._folders() if not _missing(folder)), None)

    def _read(self, folder: Path, split: Split) -> Arrays:
        images, labels = (_file(folder, name) for name in FILES[split])
        assert images is not None
        assert labels is not None
        count = self.counts[split]
        return read_idx(images, (count, 28, 28)).unsqueeze(1), read_idx(labels, (count,)).long()

    def _download(self, root: Path) -> None:
        from torchvision import datasets  # only here: importing it takes longer than reading the images

        # What torchvision leaves behind when it is interrupted looks complete. So it works in a folder of its own,
        # and only files that have been read and found good are moved to where they are looked for.
        work, target = root / "fashion_mnist.part", root / "FashionMNIST" / "raw"
        shutil.rmtree(work, ignore_errors=True)
        try:
            datasets.FashionMNIST(work, download=True)
            source = work / "FashionMNIST" / "raw"
            self._read(source, "train")
            self._read(source, "test")
            target.mkdir(parents=True, exist_ok=True)
            for name in NAMES:
                (source / name).replace(target / name)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _not_found(self, reason: str) -> DataError:
        tried = "".join(
            f"\n  {folder}: " + (f"lacks {', '.join(lacking)}" if len(lacking) < len(NAMES) else "none of them")
            for folder in self._folders()
            for lacking in [_missing(folder)]
        )
        return DataError(
            f"Fashion-MNIST is not on this machine, and {reason}\n"
            f"Looked for {', '.join(NAMES)}, each with or without .gz, in{tried}\n"
            "What you can do:\n"
            "  use the small sample that comes with this project: --data fashion_mnist_sample\n"
            "  on Debian or Ubuntu: apt install dataset-fashion-mnist\n"
            "  or take the four files from https://github.com/zalandoresearch/fashion-mnist and give their folder: "
            "--data_dir FOLDER"
        )


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _missing(folder: Path) -> list[str]:
    """Which of the four files a folder lacks."""
    return [name for name in NAMES if _file(folder, name) is None]


def read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Read an IDX file of unsigned bytes.

    Args:
        path: The file; gzipped if its name ends in .gz.
        shape: What it must hold: (N,) for labels, (N, H, W) for images.

    Returns:
        uint8 tensor of that shape.

    Raises:
        DataError: If the file is damaged, incomplete, or another one than it should be.
    """
    # 0, the code of unsigned bytes, the number of dimensions, the dimensions
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
    size = len(header) + math.prod(shape)
    remedy = "Put the published file in its place, or delete it and it will be downloaded."
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = bytearray(file.read(size + 1))  # reading past the end also makes gzip compare its checksum
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}). {remedy}") from error
    if data[: len(header)] != header:
        raise DataError(f"{path} holds {_contents(data)}, not {_contents(header)}. {remedy}")
    if len(data) != size:
        state = "cut off" if len(data) < size else "longer than it should be"
        raise DataError(f"{path} is {state}: {size:,} bytes are right. {remedy}")
    return torch.frombuffer(data, dtype=torch.uint8, offset=len(header)).view(shape)


def _contents(data: bytes | bytearray) -> str:
    """What the header of an IDX file announces."""
    if len(data) >= 8 and data[:4] == b"\0\0\x08\1":
        return "{} labels".format(*struct.unpack_from(">I", data, 4))
    if len(data) >= 16 and data[:4] == b"\0\0\x08\3":
        return "{} images of {}x{}".format(*struct.unpack_from(">3I", data, 4))
    return "no IDX data"
