"""How fast the data path is: cutting, augmenting, all of it against a DataLoader, and decoding a folder of pictures.

    python benchmarks/data_path.py [--folder FOLDER_OF_PICTURES] [--rounds 30]

What is compared takes turns, and medians are printed, so that a busy machine disturbs all alike. With kornia
installed its flip and crop are measured too.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import machine, medians, table, take_turns
from torch import Tensor

from data_modules.augment import Augment, Draws
from data_modules.batches import BatchLoader

BATCH, IMAGES, CLASSES = 512, 50_000, 10
MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]  # CIFAR-10
PROGRAM = """
import sys, time
began = time.perf_counter()
from data_modules.image_folder import ImageFolder
imported = time.perf_counter()
data = ImageFolder(sys.argv[1])
data.setup("fit")
described = time.perf_counter()
next(iter(data.train_dataloader()))
print(len(data.split("train")[1]), imported - began, described - imported, time.perf_counter() - began)
"""


class Images(torch.utils.data.Dataset[Any]):
    """The usual way: one image at a time, through torchvision's transforms."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        from torchvision.transforms import v2

        self.images, self.labels = images, labels
        self.transform = v2.Compose(
            [
                v2.RandomHorizontalFlip(),
                v2.RandomCrop(32, padding=2, padding_mode="reflect"),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[row]), self.labels[row]


def kornia_augmentation() -> Callable[[Tensor], Tensor]:
    """Flip and crop with kornia, from and to uint8; it works on floats."""
    kornia = importlib.import_module("kornia.augmentation")
    flip = kornia.RandomHorizontalFlip(p=0.5)
    crop = kornia.RandomCrop((32, 32), padding=2, padding_mode="reflect", cropping_mode="slice")
    return lambda images: (crop(flip(images.float() / 255)) * 255).round().to(torch.uint8)


def starts(folder: Path, cache: str) -> list[float]:
    """Number of pictures; seconds of importing, of making the data set, and until the first batch: a new process's."""
    environment = {**os.environ, "LIT_NN_CACHE": cache, "PYTHONPATH": str(Path(__file__).parents[1])}
    line = [sys.executable, "-c", PROGRAM, str(folder)]
    output = subprocess.run(line, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [float(word) for word in output.split()]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="pictures to decode, laid out for --data image_folder")
    parser.add_argument("--rounds", type=int, default=30, help="how often each batch job is measured")
    options = parser.parse_args()
    pillow = f"pillow {importlib.metadata.version('pillow')}"
    rows: list[tuple[str, str, str]] = []

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator)
    loader = BatchLoader(images, labels, torch.arange(IMAGES), BATCH, shuffle=True)
    batches = iter(loader)
    augment, draws = Augment("flip,translate"), Draws(generator)
    batch = next(batches)

    jobs: dict[str, Callable[[], object]] = {
        f"cut a batch of {BATCH} x 3 x 32 x 32": lambda: next(batches),
        "augment it: flip, translate": lambda: augment(*batch, CLASSES, draws),
    }
    if importlib.util.find_spec("kornia"):
        kornia_augment = kornia_augmentation()
        jobs["the same with kornia " + importlib.metadata.version("kornia")] = lambda: kornia_augment(batch[0])
    for name, seconds in medians(take_turns(jobs, min(options.rounds, len(loader) - 2))).items():
        rows.append((name, f"{1000 * seconds:.2f} ms", str(options.rounds)))

    def epoch() -> None:
        for cut in loader:
            augment(*cut, CLASSES, draws)

    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)

    def normalised_epoch() -> None:
        for cut in loader:
            changed, _ = augment(*cut, CLASSES, draws)
            (changed.float() / 255).sub_(mean).div_(std)  # as the classifier's forward does

    part = 40 * BATCH  # of the slow way a part is enough
    usual = torch.utils.data.DataLoader(
        Images(images[:part], labels[:part]), BATCH, shuffle=True, num_workers=2, persistent_workers=True
    )
    rates = medians(take_turns({"ours": epoch, "normalised": normalised_epoch, "usual": lambda: list(usual)}, 5))
    usual_rate = part / rates.pop("usual")
    rows.append(("images a second: DataLoader, 2 workers, torchvision transforms", f"{usual_rate:,.0f}", "5"))
    for name, what in [("ours", "cut and augment"), ("normalised", "cut, augment, normalise")]:
        rate = len(loader) * BATCH / rates[name]
        rows.append((f"images a second: {what}", f"{rate:,.0f} = {rate / usual_rate:.1f} times", "5"))

    if options.folder:
        first, second = [], []
        for _ in range(3):
            with tempfile.TemporaryDirectory() as cache:
                count, _, making, _ = starts(options.folder, cache)
                first.append(count / making)
                second += [starts(options.folder, cache)[1:] for _ in range(2)]
        rows.append(("pictures decoded a second, everything included", f"{statistics.median(first):,.0f}", "3"))
        importing, making, total = (statistics.median(column) for column in zip(*second, strict=True))
        rows.append(("second start until the first batch", f"{total:.2f} s", "6"))
        rows.append(("of which imports / listing and opening", f"{importing:.2f} s / {making:.2f} s", "6"))
    print(f"## The way of a batch\n\n`python benchmarks/data_path.py`, alternating; {machine()}, {pillow}.\n")
    print(table(("what", "median", "n"), rows))


if __name__ == "__main__":
    main()
