"""What a frozen network sees in every image, computed once and kept beside the decoded images."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from data_modules.base import SPLITS, ImageDataModule
from data_modules.errors import DataError
from data_modules.files import atomic_path, open_tensor
from data_modules.images.cache import cache_folder


def keep_features(data: ImageDataModule, run: Callable[[Tensor], Tensor], network: bytes, batch_size: int) -> None:
    """Let a data set's loaders give the features of its images, float16 (B, V, D), in the place of these.

    Args:
        data: The data set.
        run: Gives the features of V views of images: uint8 (B, C, H, W) to float (B, V, D).
        network: What the features depend on besides the images; with another one they are computed again.
        batch_size: Images that are computed at once.

    Raises:
        DataError: If they cannot be written.
    """
    kept: dict[int, Tensor] = {}  # by the array of images, which parts may share
    for split in SPLITS:
        images = data.split(split)[0]
        if id(images) not in kept:
            kept[id(images)] = _features(images, run, network, batch_size)
        data.features[split] = kept[id(images)]


def _features(images: Tensor, run: Callable[[Tensor], Tensor], network: bytes, batch_size: int) -> Tensor:
    """Features of all images (N, C, H, W), memory-mapped; of several processes one computes and the others wait."""
    digest = hashlib.blake2b(network, digest_size=16)
    for block in images.split(1024):
        digest.update(block.contiguous().cpu().numpy())
    path = cache_folder() / f"features-{digest.hexdigest()}.npy"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                with atomic_path(path) as temporary:
                    _compute(images, run, batch_size, temporary)
    except OSError as error:
        raise DataError(
            f"the features cannot be written to {path.parent} ({error.strerror or error}); name another folder in the "
            "environment variable LIT_NN_CACHE"
        ) from error
    return open_tensor(path)


def _compute(images: Tensor, run: Callable[[Tensor], Tensor], batch_size: int, path: Path) -> None:
    shape = (len(images), *run(images[:1]).shape[1:])  # (N, V, D)
    # Not through a memory map, which a full disk would crash the process with.
    with path.open("wb") as file, tqdm(total=len(images), unit=" images", desc="features", disable=None) as bar:
        header = {"descr": np.dtype(np.float16).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for batch in images.split(batch_size):
            file.write(run(batch).to("cpu", torch.float16).numpy().tobytes())  # (B, V, D)
            bar.update(len(batch))
