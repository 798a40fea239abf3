"""The batch path, the splits, the data sets that are here, and files."""

import ctypes
import io
import itertools
import mmap
import os
import sys
import time
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import ROOT, Patch

from data_modules import DATA_SETS, DataError, OptionError, data_class
from data_modules.augment import Draws
from data_modules.base import SPLITS, Arrays, ImageDataModule, Split
from data_modules.batches import BatchLoader, seeded_generator
from data_modules.fashion_mnist import FashionMNIST
from data_modules.fashion_mnist_sample import FashionMNISTSample
from data_modules.files import atomic_path, open_tensor, will_need
from data_modules.images.parts import stratified_split
from data_modules.sheets import drawable, font_for, sample_sheet

SAMPLE = ROOT / "data_modules" / "fashion_mnist_sample.npz"

# --- batches ----------------------------------------------------------------------------------------------------------


def loader(count: int, batch_size: int = 4, indices: torch.Tensor | None = None, **kwargs: Any) -> BatchLoader:
    """A loader of `count` images of 1x1; the label of each is its number."""
    labels = torch.arange(count)
    images = (labels % 256).to(torch.uint8).view(-1, 1, 1, 1)
    return BatchLoader(images, labels, labels if indices is None else indices, batch_size, **kwargs)


def numbers(batches: BatchLoader) -> list[list[int]]:
    """The image numbers of each batch of an epoch."""
    found = list(batches)
    assert all(images.dtype == torch.uint8 and images.flatten().equal(labels % 256) for images, labels in found)
    return [labels.tolist() for _, labels in found]


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 11, 12, 13, 24, 25])
def test_evaluation_covers_every_image_once(count: int, world_size: int) -> None:
    ranks = [loader(count, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [numbers(rank) for rank in ranks]
    assert sorted(flat([flat(rank) for rank in batches])) == list(range(count))
    assert {len(rank) for rank in batches} == {len(ranks[0])}  # else a distributed run hangs
    assert all(len(batch) <= 4 for rank in batches for batch in rank)
    assert {images.shape[1:] for rank in ranks for images, _ in rank} == {(1, 1, 1)}  # of none as well
    assert flat(numbers(loader(count, indices=torch.arange(count).flip(0)))) == list(range(count))[::-1]


@pytest.mark.parametrize(("count", "batches"), [(3, [3]), (4, [4]), (7, [4]), (8, [4, 4]), (11, [4, 4])])
def test_training_drops_an_incomplete_last_batch_unless_it_is_the_only_one(count: int, batches: list[int]) -> None:
    cut = numbers(loader(count, shuffle=True))
    assert [len(batch) for batch in cut] == batches
    assert len(set(flat(cut))) == sum(batches)


def test_large_images_come_in_the_same_order_and_state() -> None:
    """A thread cuts them ahead; what counts as done is what was taken."""
    small = loader(22, seed=3, shuffle=True)
    large = BatchLoader(small.images.expand(-1, 1, 512, 512), small.labels, small.indices, 4, seed=3, shuffle=True)
    assert [labels.tolist() for _, labels in large] == numbers(small)
    cut = iter(large)
    taken = [next(cut)[1].tolist() for _ in range(2)]
    large.load_state_dict(state := large.state_dict())
    assert state["batches_done"] == 2
    assert taken + [labels.tolist() for _, labels in large] == numbers(small)


def test_fewer_training_images_than_processes_are_refused() -> None:
    with pytest.raises(OptionError, match="2 training images cannot be shared among 3"):
        loader(2, shuffle=True, world_size=3)


# --- splits -----------------------------------------------------------------------------------------------------------


def test_stratified_split_keeps_shares_is_disjoint_and_repeats_by_its_seed() -> None:
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 3 + [3])[torch.randperm(154)]
    (first, second), again, other = (stratified_split(labels, 0.1, seed) for seed in (0, 0, 1))
    assert second.equal(again[1])
    assert not second.equal(other[1])
    assert sorted(first.tolist() + second.tolist()) == list(range(154))
    assert labels[second].bincount(minlength=4).tolist() == [10, 5, 1, 0]  # one of three, none of one


class Tiny(ImageDataModule):
    """Forty images of 4x4 in two classes, to try the base class on."""

    class_names: ClassVar = ["a", "b"]
    image_shape = (1, 4, 4)
    arrays: Arrays = (torch.zeros(40, 1, 4, 4, dtype=torch.uint8), torch.arange(40) % 2)

    def load(self, split: Split) -> Arrays | None:
        return self.arrays if split != "val" else None


def test_validation_is_cut_from_training_and_a_run_keeps_it() -> None:
    run = Tiny(val_fraction=0.25, seed=3, batch_size=10)
    train, val, test = (run.split(name)[2] for name in SPLITS)
    assert sorted(torch.cat([train, val]).tolist()) == test.tolist() == list(range(40))
    assert len(val) == 10
    again, older, new = (Tiny(val_fraction=0.5, seed=4) for _ in range(3))
    again.known_parts = run.parts()
    older.known_parts = {}  # of a checkpoint that did not keep them
    assert again.split("val")[2].equal(val)
    assert older.split("val")[2].equal(new.split("val")[2])
    assert again.part_changes() == "parts stay as they were cut, with seed 3 and shares of 0.25"
    assert older.part_changes() == new.part_changes() == run.part_changes() == ""
    loaders = (run.train_dataloader(), run.val_dataloader(), run.test_dataloader())  # outside a trainer
    assert [[len(labels) for _, labels in batches] for batches in loaders] == [[10, 10, 10], [10], [40]]
    assert torch.cat([labels for _, labels in run.predict_dataloader()]).equal(Tiny.arrays[1])


def test_a_validation_part_of_its_own_is_used_whole_and_checked() -> None:
    class Whole(Tiny):
        uneven = 0

        def load(self, split: Split) -> Arrays | None:
            images, labels = self.arrays
            return (images[:, :, self.uneven :] if split == "val" else images), labels

    assert len(Whole().split("train")[2]) == len(Whole().split("val")[2]) == 40
    Whole.uneven = 1
    with pytest.raises(DataError, match="not uint8"):
        Whole().split("val")


@pytest.mark.parametrize(
    ("shape", "dtype", "labels", "message"),
    [
        ((2, 1, 4, 5), torch.uint8, [0, 0], "not uint8"),
        ((2, 1, 4, 4), torch.float32, [0, 0], "float32"),
        ((3, 1, 4, 4), torch.uint8, [0, 0], "not uint8"),
        ((2, 1, 4, 4), torch.uint8, [0, 2], "labels"),
        ((0, 1, 4, 4), torch.uint8, [], "labels"),
    ],
)
def test_arrays_that_do_not_fit_the_description_are_refused(
    shape: list[int], dtype: torch.dtype, labels: list[int], message: str, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(Tiny, "arrays", (torch.zeros(shape, dtype=dtype), torch.tensor(labels, dtype=torch.int64)))
    with pytest.raises(DataError, match=message):
        Tiny().split("train")


@pytest.mark.parametrize("world_size", [1, 3])
def test_balanced_sampling_draws_every_class_equally_often(world_size: int, monkeypatch: Patch) -> None:
    labels = torch.tensor([0] * 3000 + [1] * 300 + [3] * 33)
    monkeypatch.setattr(Tiny, "class_names", ["a", "b", "c", "d"])
    monkeypatch.setattr(Tiny, "arrays", (torch.zeros(3333, 1, 4, 4, dtype=torch.uint8), labels))
    ranks = [Tiny(sampling="balanced", batch_size=10).train_dataloader() for _ in range(world_size)]
    for rank, loader in enumerate(ranks):
        loader.rank, loader.world_size = rank, world_size
        assert loader.order().equal(loader.order())
    counts = labels[torch.cat([loader.order() for loader in ranks])].bincount()
    assert counts.tolist()[2] == 0
    assert all(900 < count < 1100 for count in counts[[0, 1, 3]])  # 1000 expected, standard deviation 26


# --- data sets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATA_SETS)
def test_every_data_set_describes_itself(name: str) -> None:
    cls = data_class(name)
    assert cls.__module__ == f"data_modules.{name}"
    assert cls.__doc__
    if isinstance(cls.image_shape, tuple):  # a folder of images knows only once it has looked
        assert len(cls.mean) == len(cls.std) == cls.image_shape[0]
        assert all(0 < mean < 1 for mean in cls.mean)
        assert len(set(cls.class_names)) == len(cls.class_names) >= 2


def test_sample_is_balanced_and_small() -> None:
    data = FashionMNISTSample()
    assert not data.reads_data_dir
    assert SAMPLE.stat().st_size <= 4_000_000
    for split, count in zip(SPLITS, (540, 60, 100), strict=True):
        images, labels, indices = data.split(split)
        assert images.shape[1:] == (1, 28, 28)
        assert labels[indices].bincount().tolist() == [count] * 10


def test_parts_and_order_are_those_of_format_1() -> None:
    """Results of checkpoints of format 1 repeat: computed with the code of that time."""
    data = FashionMNISTSample(augment="flip_alternating,flip,translate,cutout,cutmix")
    assert data.split("val")[2][:5].tolist() == [4, 16, 20, 40, 47]
    loader = data.train_dataloader()
    loader.set_epoch(3)
    images, labels = next(iter(loader))
    assert labels[:12].tolist() == [9, 3, 0, 9, 8, 9, 0, 7, 8, 6, 5, 8]
    draws = Draws(seeded_generator(data.seed, 3, 1, 0))
    assert int(data.augment(images, labels, 10, draws, 3)[0].sum()) == 7111739


def test_full_fashion_mnist_is_what_was_published_and_gives_the_sample() -> None:
    data = FashionMNIST()
    if data.folder() is None:
        pytest.skip("the published files are not on this machine")
    images, labels, _ = data.split("train")
    assert labels.bincount().tolist() == [6000] * 10
    assert data.split("test")[1].bincount().tolist() == [1000] * 10
    pixels = images.double() / 255
    assert [round(float(pixels.mean()), 4)] == data.mean
    assert [round(float(pixels.std(correction=0)), 4)] == data.std
    for split in ("train", "test"):
        images, labels, _ = data.split(split)  # all of them, whatever is cut off for validation
        _, picked = stratified_split(labels, 0.1, seed=0)  # 600 of each class for training, 100 for the test
        with np.load(SAMPLE) as embedded:
            np.testing.assert_array_equal(embedded[f"{split}_images"], images[picked])
            np.testing.assert_array_equal(embedded[f"{split}_labels"], labels[picked])


def test_names_are_drawn_in_a_font_that_has_them() -> None:
    assert font_for(["cat", "café"]) == ["DejaVu Sans"]
    assert drawable(["cat", "café", "\U0003fffd"]) == ["cat", "café", "\\U0003fffd"]  # there are only boxes for it
    labels = torch.zeros(3, dtype=torch.int64)
    figure = sample_sheet(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), labels, torch.arange(3), ["猫 \ue123"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that a glyph is missing
        figure.savefig(io.BytesIO())


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_complete_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")
    with suppress(KeyError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]
    with pytest.raises(FileNotFoundError) as caught, atomic_path(tmp_path / "none" / "p.csv") as temporary:
        temporary.write_text("new")
    assert caught.value.filename == str(tmp_path / "none" / "p.csv")


@pytest.mark.parametrize("times", [2, 1000])
def test_a_file_in_use_is_replaced_a_moment_later(times: int, tmp_path: Path, monkeypatch: Patch) -> None:
    def busy(source: Path, target: Path) -> Path:
        if next(tries) >= times:
            return replace(source, target)
        error = PermissionError(13, "Access is denied", str(source))
        error.winerror = 5  # type: ignore[attr-defined]
        raise error

    replace, tries, now = Path.replace, itertools.count(), itertools.count()
    monkeypatch.setattr("data_modules.files.time", SimpleNamespace(monotonic=lambda: next(now), sleep=lambda _: None))
    monkeypatch.setattr(Path, "replace", busy)
    with pytest.raises(PermissionError) if times > 2 else nullcontext(), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == (["a.txt"] if times == 2 else [])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a file cannot be taken out of memory")
def test_what_a_batch_needs_of_a_mapped_file_is_read_before_it_is_touched(tmp_path: Path) -> None:
    np.save(path := tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (64, 1 << 20), np.uint8))
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    images = open_tensor(path)  # the system may read further than the header, but hardly 32 MB

    def held() -> list[bool]:
        """Whether each image from the 32nd on is in memory, by its middle page."""
        found = []
        for row in range(32, 64):
            middle, page = images[row, 1 << 19].data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE, ctypes.c_ubyte()
            assert ctypes.CDLL(None).mincore(ctypes.c_void_p(middle), ctypes.c_size_t(1), ctypes.byref(page)) == 0
            found.append(bool(page.value & 1))
        return found

    if any(held()):
        pytest.skip("this folder is in memory")
    will_need(images, torch.tensor([40, 50]))
    for _ in range(100):
        time.sleep(0.02)
        if sum(held()) == 2:
            break
    assert [row for row, is_held in enumerate(held(), 32) if is_held] == [40, 50]
