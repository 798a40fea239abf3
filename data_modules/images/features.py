"""What a frozen network sees in every image, computed once and kept beside the decoded images."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_modules.base import SPLITS, ImageDataModule
from data_modules.files import open_tensor
from data_modules.images.cache import cache_folder, kept


def keep_features(data: ImageDataModule, run: Callable[[Tensor], Tensor], network: bytes, batch_size: int) -> None:
    """Let a data set's loaders give what ``run`` makes of its images, float16 (B, V, D); once for each ``network``."""
    kept: dict[int, Tensor] = {}  # by the array of images, which parts may share
    for split in SPLITS:
        images = data.split(split)[0]
        if id(images) not in kept:
            kept[id(images)] = _features(images, run, network, batch_size)
        data.features[split] = kept[id(images)]


def _features(images: Tensor, run: Callable[[Tensor], Tensor], network: bytes, batch_size: int) -> Tensor:
    """Features of all images (N, C, H, W), memory-mapped."""
    digest = hashlib.blake2b(network, digest_size=16)
    for start in range(0, len(images), 1024):
        digest.update(images[start : start + 1024].contiguous().cpu().numpy().data)

    def compute(path: Path) -> None:
        shape = (len(images), *run(images[:1]).shape[1:])  # (N, V, D)
        # Not through a memory map, which a full disk would crash the process with.
        with path.open("wb") as file, tqdm(total=len(images), unit=" images", desc="features", disable=None) as bar:
            header = {"descr": np.dtype(np.float16).str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, len(images), batch_size):
                found = run(images[start : start + batch_size]).to("cpu", torch.float16)  # (B, V, D)
                file.write(found.numpy().tobytes())
                bar.update(len(found))

    return kept(cache_folder() / f"features-{digest.hexdigest()}.npy", compute, open_tensor)
