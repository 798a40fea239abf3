"""Make data_modules/fashion_mnist_sample.npz from the published files of Fashion-MNIST: the same arrays every time."""

import sys
from pathlib import Path

import numpy as np

import data_modules
from data_modules.batches import stratified_split
from data_modules.fashion_mnist import FashionMNIST
from lit_nn.engine.console import CommandParser, command


def sample(data: FashionMNIST) -> dict[str, np.ndarray]:
    """The same share of every class, in published order: uint8 images (N, 1, 28, 28) and labels (N,) of both parts."""
    arrays = {}
    for split in ("train", "test"):
        images, labels, _ = data.split(split)  # all of them, whatever is cut off for validation
        _, picked = stratified_split(labels, 0.1, seed=0)  # 600 of each class for training, 100 for the test
        arrays[f"{split}_images"] = images[picked].numpy()
        arrays[f"{split}_labels"] = labels[picked].numpy().astype(np.uint8)
    return arrays


@command
def main(words: list[str]) -> None:
    """Write the file of this checkout anew."""
    parser = CommandParser("make_sample", "Make the embedded sample from the published files of Fashion-MNIST.")
    parser.add_argument("data_dir", nargs="?", default="data", help="folder of the four files [data]")
    full = FashionMNIST(parser.parse_args(words).data_dir)
    full.prepare_data()
    target = Path(data_modules.__file__).with_name("fashion_mnist_sample.npz")
    np.savez_compressed(target, **sample(full))  # type: ignore[arg-type]  # names are free
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
