"""Images a second, memory and disk of the ways from files to batches: memory map, streams, DataLoader, WebDataset.

    pip install webdataset && python benchmarks/stream.py [--rounds 3]

All read the same JPEG files, made for this, and give batches of 128 shuffled uint8 images with two workers (the memory
map needs none). They take turns. Memory is what the process and its workers hold beside what it had before, without
what the system keeps of files; disk is what is read, besides the JPEG files.
"""

import argparse
import contextlib
import io
import os
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine, medians, table, take_turns
from PIL import Image

from data_modules.image_folder import ImageFolder
from data_modules.image_stream import ImageStream
from data_modules.images.shard_writer import write_shards

BATCH, WORKERS = 128, 2
SIZES = {32: (12_000, 32, 0.25), 224: (1_500, 256, 4)}  # images, side of the files, MB of a shard of files


def held() -> int:
    """Bytes that this process and its children hold, what they share counted once."""
    total, me = 0, str(os.getpid())
    for status in Path("/proc").glob("[0-9]*/smaps_rollup"):
        with contextlib.suppress(OSError, IndexError):  # it has just ended
            parent = (status.parent / "stat").read_text().rpartition(")")[2].split()[1]
            if me in (parent, status.parent.name):
                fields = dict(line.split()[:2] for line in status.read_text().splitlines()[1:])
                total += 1024 * (int(fields["Pss_Anon:"]) + int(fields["Pss_Shmem:"]))
    return total


def peak(run: Callable[[], object]) -> int:
    """The most that is held while something runs, beside what was before."""
    before, most, over = held(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            most[0] = max(most[0], held())

    thread = threading.Thread(target=watch)
    thread.start()
    run()
    over.set()
    thread.join()
    return max(0, most[0] - before)


def make_images(folder: Path, count: int, side: int) -> None:
    """JPEG files of ten classes, smooth enough to be of the size of photographs."""
    generator = np.random.default_rng(0)
    for number in range(count):
        (folder / f"{number % 10}").mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
        image.save(folder / f"{number % 10}" / f"{number:06}.jpg", quality=90)


def make_tars(files: list[Path], folder: Path, megabytes: float) -> None:
    """What WebDataset reads."""
    folder.mkdir()
    per_tar = max(1, int(megabytes * 1e6 * len(files) / sum(file.stat().st_size for file in files)))
    order = np.random.default_rng(0).permutation(len(files))
    for start in range(0, len(files), per_tar):
        with tarfile.open(folder / f"{start // per_tar:05}.tar", "w") as tar:
            for file in (files[row] for row in order[start : start + per_tar]):
                for ending, content in (("jpg", file.read_bytes()), ("cls", file.parent.name.encode())):
                    entry = tarfile.TarInfo(f"{file.stem}.{ending}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


def loaders(images: Path, folder: Path, size: int, megabytes: float) -> dict[str, tuple[Iterable[Any], Path]]:
    """Each way, and where what it reads lies."""
    import webdataset
    from torchvision.datasets import ImageFolder as TorchvisionFolder
    from torchvision.transforms import v2

    options: dict[str, Any] = {"batch_size": BATCH, "image_size": size}
    os.environ["LIT_NN_CACHE"] = str(folder / "map")
    mapped = ImageFolder(str(images), **options)
    mapped.prepare_data()
    ways: dict[str, tuple[Iterable[Any], Path]] = {"memory map": (mapped.train_dataloader(), folder / "map")}
    os.environ["LIT_NN_CACHE"] = str(folder / "cache")
    for kind, ratio in (("decoded", 4), ("encoded", 1)):  # shards of about as many images
        out = folder / kind
        write_shards(ImageFolder(str(images), **options), str(out), kind, ratio * megabytes)
        stream = ImageStream(str(out), batch_size=BATCH, workers=WORKERS)
        name = {"decoded": "stream of decoded shards", "encoded": "stream of JPEG shards"}[kind]
        ways[name] = (stream.train_dataloader(), out / "train")
    resize = [v2.Resize(size), v2.CenterCrop(size)] if size == 224 else []
    transform = v2.Compose([*resize, v2.PILToTensor()])
    parallel: dict[str, Any] = {"num_workers": WORKERS, "persistent_workers": True}
    usual = torch.utils.data.DataLoader(
        TorchvisionFolder(str(images), transform), BATCH, shuffle=True, drop_last=True, **parallel
    )
    ways["torchvision ImageFolder, DataLoader"] = (usual, images)
    make_tars(sorted(images.rglob("*.jpg")), tars := folder / "tars", megabytes)
    urls = [str(path) for path in sorted(tars.iterdir())]
    pipeline: Any = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(16 * 64).decode("pil")
    pipeline = pipeline.to_tuple("jpg", "cls").map_tuple(transform, int).batched(BATCH, partial=False)
    ways["WebDataset"] = (torch.utils.data.DataLoader(pipeline, batch_size=None, **parallel), tars)
    return ways


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows: list[tuple[object, ...]] = []
    for size, (count, side, megabytes) in SIZES.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            make_images(folder / "images", count, side)
            ways = loaders(folder / "images", folder, size, megabytes)

            def rate(batches: Iterable[Any]) -> float:
                began = time.perf_counter()
                images = sum(len(batch[0]) for batch in batches)
                return (time.perf_counter() - began) / images

            jobs = {name: partial(rate, batches) for name, (batches, _) in ways.items()}
            memory = {name: peak(job) for name, job in jobs.items()}
            seconds = take_turns(jobs, options.rounds)  # of an image
            for name, median in medians(seconds).items():
                rates = sorted(1 / value for value in seconds[name])
                disk = sum(path.stat().st_size for path in ways[name][1].rglob("*") if path.is_file())
                per_image = disk / (count if name.startswith(("torch", "Web", "memory")) else 0.9 * 0.9 * count)
                spread = f"{1 / median:,.0f} ({rates[0]:,.0f} to {rates[-1]:,.0f})"
                rows.append((size, name, spread, f"{memory[name] / 1e6:,.0f} MB", f"{per_image / 1e3:.1f} KB"))
                print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    print(
        f"## From files to batches\n\n`python benchmarks/stream.py`, alternating, n = {options.rounds}; {machine()}.\n"
    )
    print(table(("pixels", "way", "images a second, median (least to most)", "memory", "disk an image"), rows))


if __name__ == "__main__":
    main()
