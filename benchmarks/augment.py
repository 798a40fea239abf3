"""How fast photographs are augmented: the augmentation alone, and from a folder of JPEG files to batches.

    python benchmarks/augment.py [--rounds 5] [--images 1280] [--size 375 500]

What is compared takes turns; medians are printed. The images are made for it, with the spectrum of photographs. With
kornia installed it is measured too.
"""

import argparse
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import machine, medians, table, take_turns
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder as TorchvisionFolder
from torchvision.io import encode_jpeg, write_file
from torchvision.transforms import v2

from data_modules.augment import Augment, Draws
from data_modules.image_folder import ImageFolder

SPEC, BATCH, STORED, SIZE = "crop,flip,trivial,erase", 128, 256, 224
USUAL = [
    v2.RandomResizedCrop(SIZE, scale=(0.25, 1)),
    v2.RandomHorizontalFlip(),
    v2.TrivialAugmentWide(),
    v2.RandomErasing(),
]


def photographs(count: int, height: int, width: int) -> Tensor:
    """Noise whose amplitude falls with the frequency, as in photographs; uint8 (B, 3, H, W)."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)).clamp(min=1 / width)
    waves = torch.fft.rfft2(torch.randn(count, 3, height, width, generator=generator)) / frequency
    images = torch.fft.irfft2(waves, s=(height, width))
    return (128 + 50 * images / images.std((2, 3), keepdim=True)).clamp(0, 255).to(torch.uint8)


def kornia_augmentation() -> Callable[[Tensor], Tensor]:
    """The same with kornia, from and to uint8; it works on floats."""
    kornia = importlib.import_module("kornia.augmentation")
    changes = torch.nn.Sequential(
        kornia.RandomResizedCrop((SIZE, SIZE), scale=(0.25, 1)),
        kornia.RandomHorizontalFlip(),
        importlib.import_module("kornia.augmentation.auto").TrivialAugment(),
        kornia.RandomErasing(),
    )
    return lambda images: (changes(images.float() / 255) * 255).round().to(torch.uint8)


def alone(rounds: int) -> list[tuple[str, str]]:
    """Rows of the augmentation of one batch."""
    images, labels = photographs(BATCH, STORED, STORED), torch.zeros(BATCH, dtype=torch.int64)
    augment, draws, usual = Augment(SPEC), Draws(torch.Generator().manual_seed(0)), v2.Compose(USUAL)
    jobs: dict[str, Callable[[], object]] = {
        "ours": lambda: augment(images, labels, 2, draws, size=(SIZE, SIZE)),
        "torchvision.transforms.v2, one by one": lambda: torch.stack([usual(image) for image in images]),
    }
    if torch.cuda.is_available():
        on_gpu = images.cuda(), labels.cuda()
        jobs["ours, on the GPU"] = lambda: (augment(*on_gpu, 2, draws, size=(SIZE, SIZE)), torch.cuda.synchronize())
    if importlib.util.find_spec("kornia"):
        kornia = kornia_augmentation()
        jobs["kornia"] = lambda: kornia(images)
    what = f"a batch of {BATCH} x 3 x {STORED} x {STORED} to {SIZE} x {SIZE}"
    return [
        (f"{what}: {name}", f"{1000 * seconds:.1f} ms") for name, seconds in medians(take_turns(jobs, rounds)).items()
    ]


def make_files(root: Path, count: int, size: tuple[int, int]) -> None:
    """Two classes of JPEG files."""
    some = photographs(64, *size)
    for number in range(count):
        folder = root / f"class_{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        write_file(str(folder / f"{number}.jpg"), encode_jpeg(some[number % 64].roll(number, 2), quality=90))


def from_files(rounds: int, count: int, size: tuple[int, int]) -> list[tuple[str, str]]:
    """Rows of epochs over a folder of files."""
    with tempfile.TemporaryDirectory() as place:
        os.environ["LIT_NN_CACHE"], root = str(Path(place, "cache")), Path(place, "photographs")
        make_files(root, count, size)
        began = time.perf_counter()
        data = ImageFolder(str(root), image_size=STORED, batch_size=BATCH, augment=SPEC)
        loader, draws = data.train_dataloader(), Draws(torch.Generator().manual_seed(0))
        once = time.perf_counter() - began
        folder = TorchvisionFolder(root, v2.Compose([v2.PILToTensor(), *USUAL]))
        usual = DataLoader(folder, BATCH, shuffle=True, num_workers=2, persistent_workers=True, drop_last=True)

        def ours() -> None:
            for images, labels in loader:
                data.augment(images, labels, 2, draws, size=(SIZE, SIZE))

        seconds = take_turns({"ours": ours, "theirs": lambda: [None for _ in usual]}, rounds)
        rates = {
            name: len(batches) * BATCH / medians(seconds)[name]
            for name, batches in (("ours", loader), ("theirs", usual))
        }
    return [
        ("images a second: torchvision's ImageFolder and v2, DataLoader with 2 workers", f"{rates['theirs']:,.0f}"),
        ("images a second: ours", f"{rates['ours']:,.0f} = {rates['ours'] / rates['theirs']:.1f} times"),
        (f"decoding the {count} files, once before the first epoch", f"{once:.1f} s"),
    ]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each job is measured")
    parser.add_argument("--images", type=int, default=1280, help="files to make")
    parser.add_argument("--size", type=int, nargs=2, default=(375, 500), help="height and width of the files")
    options = parser.parse_args()
    rows = alone(options.rounds) + from_files(options.rounds, options.images, tuple(options.size))
    how = f"`python benchmarks/augment.py`, n = {options.rounds}, alternating; {machine()}."
    what = "`{}`; JPEG files of {} x {}.".format(SPEC, *options.size)
    print(f"## Augmentation of photographs\n\n{how}\n{what}\n\n{table(('what', 'median'), rows)}")


if __name__ == "__main__":
    main()
