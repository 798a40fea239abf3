"""Make data_modules/fashion_mnist_sample.npz from the published files of Fashion-MNIST: the same arrays every time.

Usage: python scripts/make_sample.py [DATA_DIR]
"""

import sys
from pathlib import Path

import numpy as np

import data_modules
from data_modules import FashionMNIST
from data_modules.batches import stratified_split

SHARE = 0.1  # 600 of each class's training images, 100 of its test images


def sample(data: FashionMNIST) -> dict[str, np.ndarray]:
    """Pick the embedded images: the same share of every class, in their published order.

    Args:
        data: The full data set, prepared.

    Returns:
        uint8 arrays: "train_images" (6000, 1, 28, 28), "train_labels" (6000,), and 1000 "test_" ones likewise.
    """
    arrays = {}
    for split in ("train", "test"):
        loaded = data.load(split)
        assert loaded is not None
        images, labels = loaded
        _, picked = stratified_split(labels, SHARE, seed=0)
        arrays[f"{split}_images"] = images[picked].numpy()
        arrays[f"{split}_labels"] = labels[picked].numpy().astype(np.uint8)
    return arrays


if __name__ == "__main__":
    full = FashionMNIST(data_dir=sys.argv[1] if len(sys.argv) > 1 else "data")
    full.prepare_data()
    target = Path(data_modules.__file__).with_name("fashion_mnist_sample.npz")
    np.savez_compressed(target, **sample(full))  # type: ignore[arg-type]  # names are free
    print(f"{target}: {target.stat().st_size:,} bytes")
