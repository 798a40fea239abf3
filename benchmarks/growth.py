"""What an epoch costs as the work grows: more and larger images, more classes, larger batches.

    python benchmarks/growth.py [--rounds 3]

Each case is a process of its own that trains LeNet, which brings all images to 32 px, on generated ones in a file
that is mapped into memory. Seconds are those of the whole `fit` of one epoch; memory is the most that the process held
at once, without the pages of the file.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from measure import machine, table

from data_modules.base import Arrays, ImageDataModule, Split
from lit_nn.engine.cli import LitCLI
from lit_nn.engine.run import running

CASES = [  # images, side in pixels, classes, batch
    *((images, 32, 10, 64) for images in (1_000, 10_000, 100_000)),
    *((images, 224, 10, 64) for images in (1_000, 10_000, 100_000)),
    *((20_000, 32, classes, 64) for classes in (10, 1_000, 10_000)),
    *((20_000, 32, 10, batch) for batch in (1, 16, 256, 4_096)),
]


class Generated(ImageDataModule):
    """Zeros, in a file without any blocks on the disk.

    Args:
        images: How many.
        side: In pixels.
        classes: How many; the labels go through them.
    """

    mean, std = (0.5,) * 3, (0.25,) * 3

    def __init__(self, images: int = 1000, side: int = 32, classes: int = 10, batch_size: int = 64) -> None:
        super().__init__(batch_size=batch_size, augment="none")
        self.images, self.image_shape = images, (3, side, side)
        self.class_names = [f"class {number}" for number in range(classes)]

    def load(self, split: Split) -> Arrays | None:
        """The same images for training and validation; a batch is enough for the latter."""
        images = self.images if split == "train" else 64
        pixels = np.memmap(f"{split}.bin", np.uint8, "w+", shape=(images, *self.image_shape))
        return torch.from_numpy(pixels), torch.arange(images) % len(self.class_names)


def held() -> int:
    """Bytes that belong to this process alone, mapped files left out."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def one(images: str, side: str, classes: str, batch: str) -> None:
    """Train for an epoch, and print seconds and bytes: what runs in each process."""
    words = ["--data", "growth.Generated", "--data.images", images, "--data.side", side, "--data.classes", classes]
    words += ["--batch_size", batch, "--max_epochs", "1", "--trainer.enable_progress_bar", "false"]
    cli, most, ended = LitCLI("fit", [*words, "--accelerator", "cpu", "--run_dir", "run"]), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            most[0] = max(most[0], held())

    threading.Thread(target=watch).start()
    with running(cli):
        began = time.perf_counter()
        cli.trainer.fit(cli.model, cli.datamodule)
        seconds = time.perf_counter() - began
    ended.set()
    print(json.dumps([seconds, most[0]]))


def main() -> None:
    """Run all cases in turn, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most", type=int, default=100_000, help="leave out cases of more images")
    options = parser.parse_args()
    cases = [case for case in CASES if case[0] <= options.most]
    found: dict[tuple[int, ...], list[list[float]]] = {case: [] for case in cases}
    for _ in range(options.rounds):
        for case in cases:
            with tempfile.TemporaryDirectory() as folder:
                line = [sys.executable, Path(__file__).resolve(), "one", *map(str, case)]
                output = subprocess.run(line, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[case].append(json.loads(output.splitlines()[-1]))
    rows = []
    for (images, side, classes, batch), results in found.items():
        seconds, memory = (statistics.median(column) for column in zip(*results, strict=True))
        per_thousand = f"{1000 * seconds / images:.2f} s"
        rows.append(
            [f"{images:,}", side, f"{classes:,}", f"{batch:,}", f"{seconds:.1f} s", per_thousand, f"{memory / 1e6:.0f}"]
        )
    print("## As the work grows\n")
    print(f"`python benchmarks/growth.py --rounds {options.rounds}`, in turn; {machine()}.\n")
    print(table(["images", "px", "classes", "batch", "epoch, median", "for 1,000 images", "MB at most"], rows))


if __name__ == "__main__":
    one(*sys.argv[2:]) if sys.argv[1:2] == ["one"] else main()
