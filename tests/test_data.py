"""The batch path, the splits, and Fashion-MNIST: its files, good and broken, and its download."""

import gzip
import hashlib
import importlib.util
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torchvision
from file_server import FileServer, file_server

import data_modules.fashion_mnist as fashion_mnist
from data_modules import DATA_MODULES, DataError, FashionMNIST, FashionMNISTSample, ImageDataModule
from data_modules.base import Arrays, Split
from data_modules.batches import BatchLoader, stratified_split

# --- batches ----------------------------------------------------------------------------------------------------------


def loader(count: int, batch_size: int = 4, indices: torch.Tensor | None = None, **kwargs: object) -> BatchLoader:
    """A loader of `count` images of 1x1; the label of each is its number."""
    labels = torch.arange(count)
    images = (labels % 256).to(torch.uint8).view(-1, 1, 1, 1)
    return BatchLoader(images, labels, labels if indices is None else indices, batch_size, **kwargs)  # type: ignore[arg-type]


def numbers(batches: BatchLoader) -> list[list[int]]:
    """The image numbers of each batch of an epoch."""
    return [labels.tolist() for _, labels in batches]


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


def test_order_is_a_function_of_seed_and_epoch() -> None:
    orders = {}
    for seed in range(3):
        for epoch in range(3):
            first, second = loader(40, shuffle=True, seed=seed), loader(40, shuffle=True, seed=seed)
            numbers(second)  # what was read before does not matter
            first.set_epoch(epoch)
            second.set_epoch(epoch)
            assert numbers(first) == numbers(second)
            orders[seed, epoch] = tuple(flat(numbers(first)))
    assert len(set(orders.values())) == len(orders)


def test_images_and_labels_belong_together() -> None:
    for images, labels in loader(40, shuffle=True):
        assert images.dtype == torch.uint8
        assert images.flatten().tolist() == labels.tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 11, 12, 13, 24, 25])
def test_evaluation_covers_every_image_once(count: int, world_size: int) -> None:
    ranks = [loader(count, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [numbers(rank) for rank in ranks]
    assert sorted(flat([flat(rank) for rank in batches])) == list(range(count))
    assert {len(rank) for rank in batches} == {len(ranks[0])}  # else a distributed run hangs
    assert all(len(batch) <= 4 for rank in batches for batch in rank)


def test_a_process_without_images_gets_empty_batches() -> None:
    images, labels = next(iter(loader(2, rank=2, world_size=3)))
    assert images.shape == (0, 1, 1, 1)
    assert labels.shape == (0,)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("count", [24, 31])
def test_global_batches_do_not_depend_on_the_number_of_processes(count: int, world_size: int) -> None:
    alone = numbers(loader(count, 4 * world_size, shuffle=True))
    ranks = [numbers(loader(count, 4, shuffle=True, rank=rank, world_size=world_size)) for rank in range(world_size)]
    together = [sorted(flat(list(parts))) for parts in zip(*ranks, strict=True)]
    assert together == [sorted(batch) for batch in alone]


@pytest.mark.parametrize(("count", "batches"), [(3, [3]), (4, [4]), (7, [4]), (8, [4, 4]), (11, [4, 4])])
def test_training_drops_an_incomplete_last_batch_unless_it_is_the_only_one(count: int, batches: list[int]) -> None:
    cut = numbers(loader(count, shuffle=True))
    assert [len(batch) for batch in cut] == batches
    assert len(set(flat(cut))) == sum(batches)


@pytest.mark.parametrize("world_size", [1, 3])
def test_balanced_sampling_draws_every_class_equally_often(world_size: int) -> None:
    labels = torch.tensor([0] * 2700 + [1] * 270 + [3] * 30)
    images, indices = torch.zeros(3000, 1, 1, 1, dtype=torch.uint8), torch.arange(3000)
    drawn = []
    for rank in range(world_size):
        ranks = {"rank": rank, "world_size": world_size}
        batches = BatchLoader(images, labels, indices, 10, shuffle=True, balanced=True, **ranks)  # type: ignore[arg-type]
        drawn.append(batches.order())
        assert drawn[-1].equal(batches.order())
    counts = labels[torch.cat(drawn)].bincount()
    assert counts.sum() == 3000
    assert counts[2] == 0
    assert all(900 < count < 1100 for count in counts[[0, 1, 3]])  # 1000 expected, standard deviation 26


def test_only_the_given_indices_are_used() -> None:
    assert flat(numbers(loader(40, indices=torch.tensor([3, 30, 7])))) == [3, 30, 7]


def test_fewer_training_images_than_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 training images cannot be shared among 3"):
        loader(2, shuffle=True, world_size=3)


@pytest.mark.parametrize("position", range(6))
@pytest.mark.parametrize("set_epoch_first", [True, False])
def test_a_loader_continues_exactly_where_its_state_was_taken(position: int, set_epoch_first: bool) -> None:
    original, restored = loader(21, shuffle=True, seed=5), loader(21, shuffle=True, seed=5)
    original.set_epoch(3)
    whole = numbers(original)
    iterator = iter(original)
    for _ in range(position):
        next(iterator)
    if position == 0:
        original.batches_done = 0  # as in a loader that was not iterated yet
    state = original.state_dict()

    if set_epoch_first:
        restored.set_epoch(3)
    restored.load_state_dict(state)
    restored.set_epoch(3)
    assert numbers(restored) == whole[position:]
    for batches in (original, restored):
        batches.set_epoch(4)
    assert numbers(restored) == numbers(original)
    assert len(numbers(restored)) == len(whole)


# --- splits -----------------------------------------------------------------------------------------------------------


def test_stratified_split_keeps_shares_and_is_disjoint() -> None:
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 3 + [3])[torch.randperm(154)]
    first, second = stratified_split(labels, 0.1, seed=0)
    assert sorted(first.tolist() + second.tolist()) == list(range(154))
    assert labels[second].bincount(minlength=4).tolist() == [10, 5, 1, 0]  # one of three, none of one


def test_stratified_split_repeats_and_differs_by_seed() -> None:
    labels = torch.arange(10).repeat(50)
    picked = [stratified_split(labels, 0.1, seed)[1].tolist() for seed in (0, 0, 1)]
    assert picked[0] == picked[1] != picked[2]


class Tiny(ImageDataModule):
    """Forty images of 4x4 in two classes, to try the base class on."""

    class_names: ClassVar = ["a", "b"]
    image_shape = (1, 4, 4)
    arrays: Arrays = (torch.zeros(40, 1, 4, 4, dtype=torch.uint8), torch.arange(40) % 2)
    has_val = False

    def load(self, split: Split) -> Arrays | None:
        return self.arrays if split != "val" or self.has_val else None


def test_validation_is_cut_from_training_and_test_is_not() -> None:
    data = Tiny(val_fraction=0.25)
    train, val, test = (data.split(name)[2] for name in ("train", "val", "test"))
    assert sorted(torch.cat([train, val]).tolist()) == list(range(40))
    assert len(val) == 10
    assert test.tolist() == list(range(40))
    assert data.split("val")[2].equal(Tiny(val_fraction=0.25).split("val")[2])


def test_a_validation_part_of_its_own_is_used_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tiny, "has_val", True)
    data = Tiny()
    assert len(data.split("train")[2]) == len(data.split("val")[2]) == 40


def test_a_validation_part_of_its_own_is_checked_too() -> None:
    class Uneven(Tiny):
        def load(self, split: Split) -> Arrays | None:
            images, labels = self.arrays
            return (images[:, :, 1:] if split == "val" else images), labels

    with pytest.raises(DataError, match="not uint8"):
        Uneven().split("val")


def test_loaders_outside_a_trainer() -> None:
    data = Tiny(batch_size=10, val_fraction=0.5)
    assert [len(labels) for _, labels in data.train_dataloader()] == [10, 10]
    assert [len(labels) for _, labels in data.val_dataloader()] == [20]
    assert [len(labels) for _, labels in data.test_dataloader()] == [40]
    assert torch.cat([labels for _, labels in data.predict_dataloader()]).equal(Tiny.arrays[1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((torch.zeros(2, 1, 4, 5, dtype=torch.uint8), torch.zeros(2).long()), "not uint8"),
        ((torch.zeros(2, 1, 4, 4), torch.zeros(2).long()), "float32"),
        ((torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.zeros(2).long()), "not uint8"),
        ((torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 2])), "labels"),
        ((torch.zeros(0, 1, 4, 4, dtype=torch.uint8), torch.zeros(0).long()), "labels"),
    ],
)
def test_arrays_that_do_not_fit_the_description_are_refused(
    arrays: Arrays, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tiny, "arrays", arrays)
    with pytest.raises(DataError, match=message):
        Tiny().split("train")


# --- data sets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATA_MODULES)
def test_every_data_set_describes_itself(name: str) -> None:
    cls = DATA_MODULES[name]
    assert Path(str(importlib.util.find_spec(cls.__module__).origin)).name == f"{name}.py"  # type: ignore[union-attr]
    assert cls.__doc__
    if isinstance(cls.image_shape, tuple):  # a folder of pictures knows only once it has looked
        assert len(cls.mean) == len(cls.std) == cls.image_shape[0]
        assert all(0 < mean < 1 for mean in cls.mean)
        assert len(set(cls.class_names)) == len(cls.class_names) >= 2


def full_fashion_mnist() -> FashionMNIST:
    """The published files, where this machine has them."""
    data = FashionMNIST()
    if data._find() is None:
        pytest.skip("the published files are not on this machine")
    return data


def test_sample_is_balanced_and_small() -> None:
    data = FashionMNISTSample()
    assert (Path(fashion_mnist.__file__).parent / "fashion_mnist_sample.npz").stat().st_size <= 4_000_000
    for name, count in {"train": 540, "val": 60, "test": 100}.items():
        images, labels, indices = data.split(name)  # type: ignore[arg-type]
        assert images.shape[1:] == (1, 28, 28)
        assert labels[indices].bincount().tolist() == [count] * 10


def test_sample_can_be_made_again_from_the_published_files() -> None:
    script = Path(__file__).parents[1] / "scripts" / "make_sample.py"
    spec = importlib.util.spec_from_file_location("make_sample", script)
    assert spec is not None
    assert spec.loader is not None
    make_sample = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_sample)
    made = make_sample.sample(full_fashion_mnist())
    with np.load(Path(fashion_mnist.__file__).parent / "fashion_mnist_sample.npz") as embedded:
        assert sorted(made) == sorted(embedded.files)
        for name in made:
            np.testing.assert_array_equal(made[name], embedded[name])


def test_full_fashion_mnist_is_what_was_published() -> None:
    data = full_fashion_mnist()
    images, labels, _ = data.split("train")
    assert labels.bincount().tolist() == [6000] * 10
    assert data.split("test")[1].bincount().tolist() == [1000] * 10
    histogram = images.flatten().bincount(minlength=256).double()
    values = torch.arange(256) / 255.0
    mean = (histogram * values).sum() / histogram.sum()
    std = ((histogram * (values - mean) ** 2).sum() / histogram.sum()).sqrt()
    assert [round(float(mean), 4)] == data.mean
    assert [round(float(std), 4)] == data.std


# --- Fashion-MNIST's files --------------------------------------------------------------------------------------------

COUNTS = {"train": 30, "test": 20}
NAMES = [name for names in fashion_mnist.FILES.values() for name in names]


def idx_files() -> dict[str, bytes]:
    """Four small files in the published format."""
    random = np.random.default_rng(0)
    files = {}
    for split, (images, labels) in fashion_mnist.FILES.items():
        count = COUNTS[split]
        pixels = random.integers(256, size=(count, 28, 28), dtype=np.uint8)
        files[images] = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28) + pixels.tobytes()
        files[labels] = struct.pack(">4BI", 0, 0, 8, 1, count) + bytes(i % 10 for i in range(count))
    return files


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Fashion-MNIST is small and not installed; an empty folder for it."""
    monkeypatch.setattr(FashionMNIST, "counts", COUNTS)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    return tmp_path / "data"


def put(folder: Path, files: dict[str, bytes], gzipped: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / (f"{name}.gz" if gzipped else name)).write_bytes(gzip.compress(content) if gzipped else content)


def assert_is_read(folder: Path) -> None:
    files = idx_files()
    data = FashionMNIST(str(folder))
    data.prepare_data()
    for split in ("train", "test"):
        images, labels, _ = data.split(split)
        names = fashion_mnist.FILES[split]
        assert images.shape == (COUNTS[split], 1, 28, 28)
        assert images.numpy().tobytes() == files[names[0]][16:]
        assert bytes(labels.tolist()) == files[names[1]][8:]


@pytest.mark.parametrize("layout", ["data", "data/FashionMNIST/raw", "debian"])
@pytest.mark.parametrize("gzipped", [True, False])
def test_published_files_are_found(small: Path, layout: str, gzipped: bool) -> None:
    put(small.parent / layout, idx_files(), gzipped)
    assert_is_read(small)


def swap(first: str, second: str) -> dict[str, bytes]:
    files = idx_files()
    return {first: files[second], second: files[first]}


IMAGES, LABELS = fashion_mnist.FILES["train"]
BROKEN = {
    "cut off": ({IMAGES: idx_files()[IMAGES][:-1]}, f"{IMAGES}.*is cut off"),
    "too long": ({LABELS: idx_files()[LABELS] + b"0"}, f"{LABELS}.*longer"),
    "empty": ({LABELS: b""}, f"{LABELS}.*no IDX data"),
    "wrong magic": ({IMAGES: b"\0\0\x09" + idx_files()[IMAGES][3:]}, f"{IMAGES}.*no IDX data, not 30 images of 28x28"),
    "wrong size": (
        {IMAGES: struct.pack(">4B3I", 0, 0, 8, 3, 30, 28, 27) + idx_files()[IMAGES][16:]},
        "30 images of 28x27, not 30 images of 28x28",
    ),
    "wrong count": (
        {LABELS: struct.pack(">4BI", 0, 0, 8, 1, 29) + idx_files()[LABELS][8:]},
        f"{LABELS}.*29 labels, not 30 labels",
    ),
    "images and labels swapped": (swap(IMAGES, LABELS), f"{IMAGES}.*holds 30 labels, not 30 images"),
    "train and test swapped": (swap(*NAMES[::2]), f"{IMAGES}.*holds 20 images of 28x28, not 30 images"),
}


@pytest.mark.parametrize("gzipped", [True, False])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_by_name(small: Path, case: str, gzipped: bool) -> None:
    files, message = BROKEN[case]
    put(small, idx_files() | files, gzipped)
    data = FashionMNIST(str(small))
    data.prepare_data()
    with pytest.raises(DataError, match=message):
        data.setup("fit")


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-20],  # cut off
        lambda content: content[:-5],  # the checksum cut off
        lambda content: content[:-8] + bytes([content[-8] ^ 1]) + content[-7:],  # a wrong checksum
        lambda content: content[:2000] + bytes([content[2000] ^ 255]) + content[2001:],
        lambda content: b"<html>" + content,
        lambda content: b"",
    ],
)
def test_damaged_gzip_files_are_refused_by_name(small: Path, damage: object) -> None:
    put(small, idx_files(), gzipped=True)
    path = small / f"{IMAGES}.gz"
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match=f"{IMAGES}.gz (is damaged|holds no IDX data|is cut off)"):
        FashionMNIST(str(small)).setup("fit")


# --- Fashion-MNIST's download -----------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A server of the small files, from which torchvision downloads."""
    with file_server() as running:
        running.files = {f"/{name}.gz": gzip.compress(content, mtime=0) for name, content in idx_files().items()}
        resources = [(path[1:], hashlib.md5(content).hexdigest()) for path, content in running.files.items()]
        monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [running.url])
        monkeypatch.setattr(torchvision.datasets.FashionMNIST, "resources", resources)
        yield running


def test_download(small: Path, server: FileServer) -> None:
    assert_is_read(small)
    asked = len(server.requests)
    assert asked >= 4
    assert_is_read(small)
    assert len(server.requests) == asked, "it was downloaded twice"
    assert sorted(path.name for path in small.iterdir()) == ["FashionMNIST", "fashion_mnist.lock"]


def break_off(server: FileServer) -> None:
    server.breaks_after = 1000


def change_a_file(server: FileServer) -> None:
    server.files[f"/{LABELS}.gz"] = gzip.compress(b"something else")


def lose_a_file(server: FileServer) -> None:
    del server.files[f"/{LABELS}.gz"]


@pytest.mark.parametrize("trouble", [break_off, change_a_file, lose_a_file])
def test_a_failed_download_leaves_nothing_and_can_be_repeated(small: Path, server: FileServer, trouble: object) -> None:
    good = dict(server.files)
    trouble(server)  # type: ignore[operator]
    with pytest.raises(DataError) as caught:
        FashionMNIST(str(small)).prepare_data()
    message = str(caught.value)
    for part in (server.url, str(small), str(small.parent / "debian"), "dataset-fashion-mnist", "fashion_mnist_sample"):
        assert part in message
    assert not [path for path in small.rglob("*") if path.is_file() and path.suffix != ".lock"]

    server.files, server.breaks_after = good, None
    assert_is_read(small)


def test_leftovers_of_a_killed_download_are_not_used(small: Path, server: FileServer) -> None:
    put(small / "fashion_mnist.part" / "FashionMNIST" / "raw", dict.fromkeys(NAMES, b"half a file"), gzipped=False)
    assert_is_read(small)


def test_one_message_when_nothing_was_downloaded(small: Path) -> None:
    put(small, {LABELS: b""}, gzipped=False)
    with pytest.raises(DataError, match="--data fashion_mnist") as caught:
        FashionMNIST(str(small)).setup("fit")
    assert f"{small}: lacks {IMAGES}, t10k" in str(caught.value)
