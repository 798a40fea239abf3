"""What a run was trained on is never tested: random data sets with copies, additions, removals, renamed files."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import images_in, noise
from numpy.typing import NDArray
from PIL import Image

from data_modules import DataError, DataNote, OptionError
from data_modules.base import SPLITS, Split
from data_modules.image_folder import ImageFolder
from data_modules.images.dataset import ImageFiles
from data_modules.images.parts import OPEN, TEST, TRAIN, VAL, Numbers, cut, remembered

# --- the rule, on random fingerprints ---------------------------------------------------------------------------------


def random_set(
    random: np.random.Generator, count: int, classes: int, wrong: float, grouped: bool
) -> tuple[Numbers, Numbers]:
    """Labels (N,) and marks (N, 4) of images: many are copies, some of these under another label, most in a group."""
    originals = random.integers(0, max(1, int(count * random.choice([0.2, 0.6, 0.95]))), count)
    labels = np.where(random.random(count) < wrong, random.integers(classes, size=count), originals % classes)
    files = np.where(random.random(count) < 0.5, originals, 10_000 + np.arange(count))  # the same, or another format
    mixed = np.stack([files * 7919, originals * 104_729]) * 2_654_435_761 % (1 << 62) - (1 << 61)
    groups: Numbers = np.zeros(count, np.int64)
    if grouped:  # of one class or of several
        groups = random.integers(0, max(2, count // int(random.integers(2, 12))), count)
        labels = np.where(random.random(count) < random.choice([0.0, 0.3, 1.0]), labels, groups % classes)
        groups = np.where(random.random(count) < 0.1, 0, (groups + 1) * 7_368_787)
    return labels.astype(np.int64), np.column_stack([*mixed, labels, groups]).astype(np.int64)


def together(marks: Numbers) -> NDArray[np.bool_]:
    """Which images must be in one part, found the slow way (N, N)."""
    same = marks[:, None] == marks  # (N, N, 4)
    linked = same[..., 0] | same[..., 1] | (same[..., 3] & (marks[:, 3] != 0))
    while (more := linked @ linked).sum() > linked.sum():  # of True and False: any(all)
        linked = more
    return linked


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("seed", range(100))
def test_copies_and_groups_stay_together_and_classes_keep_their_shares(seed: int, grouped: bool) -> None:
    random = np.random.default_rng(seed)
    count, classes = int(random.integers(10 if grouped else 2, 120)), int(random.integers(2, 6))
    labels, marks = random_set(random, count, classes, 0.0, grouped)
    shares = (0.2, 0.15) if grouped else random.uniform(0.05, 0.4, 2).tolist()
    fractions, linked = dict(zip((TEST, VAL), shares, strict=True)), together(marks)
    part = cut(labels, marks, np.full(count, OPEN), fractions, seed)
    assert set(part) <= {TRAIN, VAL, TEST}
    assert (part[:, None] == part)[linked].all()
    order = random.permutation(count)  # names and places do not matter
    assert (cut(labels[order], marks[order], np.full(count, OPEN), fractions, seed) == part[order]).all()
    for label in np.unique(labels):
        mine, units = part[labels == label], np.unique(linked[labels == label], axis=0)
        rest, largest = len(mine), units.sum(1).max()
        assert grouped or (mine == TRAIN).any()
        for name, share in fractions.items():
            got = int((mine == name).sum())
            assert abs(got - share * rest) <= largest
            assert grouped or got or len(units) <= len(set(mine))  # at least one if there are enough different ones
            assert grouped or largest > 1 or got == min(max(round(share * rest), 1), rest - 1)
            rest -= got


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("seed", range(100))
def test_what_was_trained_on_is_never_tested(seed: int, grouped: bool) -> None:
    random = np.random.default_rng(seed)
    classes = int(random.integers(2, 6))
    labels, marks = random_set(random, int(random.integers(20, 200)), classes, 0.1, grouped)
    part = cut(labels, marks, np.full(len(labels), OPEN), {TEST: 0.2, VAL: 0.1}, seed)
    lists = [marks[part == place] for place in (TRAIN, VAL, TEST)]
    for later in range(4):  # the run goes on and is evaluated while its data set changes
        more, others = random_set(random, 60, classes, 0.1, grouped)
        others[:, :2] += later + grouped  # of the same groups
        kept = random.permutation(len(labels))[: int(random.uniform(0.5, 1.0) * len(labels))]
        labels, marks = np.append(labels[kept], more), np.concatenate([marks[kept], others])
        copied = random.integers(len(labels), size=20)
        labels, marks = np.append(labels, labels[copied]), np.concatenate([marks, marks[copied]])
        marks[random.random(len(labels)) < 0.1, 0] += 1  # saved in another format
        if later % 2:
            marks[:, 1] += 1  # decoded in another size
        known = remembered(marks, lists, np.full(len(labels), TRAIN))
        test, val = random.uniform(0.05, 0.4, 2).tolist()
        part = cut(labels, marks, known, {TEST: test, VAL: val}, seed + later)
        trained = np.concatenate(lists[:2])
        for column in (0, 1, 3):  # file, pixels, group
            assert not np.isin(marks[part == TEST, column], trained[trained[:, column] != 0, column]).any()
        assert (part[:, None] == part)[marks[:, None, 1] == marks[:, 1]].all()
        lists = [np.concatenate([had, marks[part == place]]) for place, had in enumerate(lists)]


# --- real folders -----------------------------------------------------------------------------------------------------


def contents(data: ImageFiles) -> dict[Split, set[bytes]]:
    """The pixels of each part."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataNote)
        return {split: {*map(bytes, data.split(split)[0][rows(data, split)].numpy())} for split in SPLITS}


def rows(data: ImageFiles, split: Split) -> list[int]:
    return data.split(split)[2].tolist()


def continued(root: Path, parts: Any, **options: Any) -> ImageFolder:
    """The data set of a run that began with these parts."""
    data = ImageFolder(str(root), **options)
    data.known_parts = parts
    return data


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return images_in(tmp_path / "data", "ant", "bee", "cow", count=30, height=6, width=6)


def test_more_images_change_neither_parts_nor_size(root: Path) -> None:
    run = ImageFolder(str(root))
    before = contents(run)
    assert all(tensor.dtype == torch.int64 for tensor in run.parts().values())
    assert run.part_changes() == ""
    for number in range(200):
        noise(5000 + number, 12, 12).save(root / "ant" / f"new{number}.png")
    assert ImageFolder(str(root)).image_shape == (3, 12, 12)
    later = continued(root, run.parts())
    assert later.image_shape == (3, 6, 6)
    assert before["test"] <= contents(later)["test"]
    assert before["train"] <= contents(later)["train"]
    said = "images since this run began: 200 new, train 72 -> 234, val 9 -> 27, test 9 -> 29"  # 23 of 230, 3, and 3
    assert later.part_changes() == said


def test_whatever_changes_is_said_in_one_line(root: Path) -> None:
    run, began = ImageFolder(str(root)), "images since this run began: "
    files = {split: [root / run._listing.files[row] for row in run.split(split)[2]] for split in ("train", "test")}

    def said() -> str:
        return continued(root, run.parts()).part_changes()

    files["test"][0].rename(root / "cow" / "renamed.png")  # an ant
    assert said() == f"{began}1 in another class"
    shutil.copy(files["test"][-1], root / "cow" / "copy.png")
    assert said() == f"{began}1 in another class, test 9 -> 10"
    files["train"][0].unlink()
    Image.open(files["train"][1]).save(root / "ant" / "other.bmp")
    assert said() == f"{began}1 gone, 1 in another class, test 9 -> 10"
    files["train"][1].rename(root / "bee" / "moved.png")  # its copy stays an ant
    with pytest.warns(DataNote, match="in two classes"):
        assert said() == f"{began}1 gone, 2 in another class, test 9 -> 10"


def test_another_size_and_another_format_at_once(root: Path) -> None:
    parts, before = None, contents(ImageFolder(str(root)))
    for suffix, size in ((".bmp", 4), (".tiff", 5)):
        run = continued(root, parts or ImageFolder(str(root)).parts(), image_size=size)
        assert run.part_changes() == ""
        parts = run.parts()
        for path in [*root.rglob("*.*")]:
            Image.open(path).save(path.with_suffix(suffix))
            path.unlink()
    later = continued(root, parts)
    assert contents(later) == before
    assert later.part_changes() == ""


def test_a_part_that_the_user_lays_out_later(root: Path) -> None:
    run = ImageFolder(str(root))
    before = contents(run)
    for name in ("ant", "bee", "cow"):
        shutil.move(root / name, root / "train" / name)
        for number in range(5):
            (root / "test" / name).mkdir(parents=True, exist_ok=True)
            shutil.move(root / "train" / name / f"{number:02}.png", root / "test" / name)
    later = continued(root, run.parts())
    now = contents(later)
    assert not now["test"] & (before["train"] | before["val"])
    assert before["test"] <= now["test"]
    assert "kept in the part that they had" in later.part_changes()


def test_own_folders_are_left_as_they_are(root: Path) -> None:
    for part in SPLITS:
        shutil.copytree(root, root.parent / "laid_out" / part)
    parts = None
    for _ in range(2):
        data = continued(root.parent / "laid_out", parts)
        with pytest.warns(DataNote, match="90 images lie in two parts"):
            assert [len(data.split(split)[2]) for split in SPLITS] == [90, 90, 90]
        assert data.part_changes() == ""
        parts = data.parts()


def test_a_checkpoint_that_does_not_know_its_parts(root: Path) -> None:
    with pytest.raises(DataError, match="did not keep which images it was trained on"):
        continued(root, {}).split("test")


# --- groups and folds -------------------------------------------------------------------------------------------------


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    """Two classes, 12 patients with 5 images each, every fourth of them with images of both classes."""
    images_in(tmp_path / "data", "ill", "well", count=0)
    for number in range(60):
        patient = number // 5
        name = ("ill", "well")[(number if patient % 4 == 0 else patient) % 2]
        noise(number).save(tmp_path / "data" / name / f"p{patient}_{number:02}.png")
    return tmp_path / "data"


GROUP = r"([^/_]+)_[^/]*$"


def patients_in(data: ImageFiles) -> dict[Split, set[str]]:
    return {split: {Path(data.files[row]).name.partition("_")[0] for row in rows(data, split)} for split in SPLITS}


@pytest.mark.parametrize("seed", range(8))
def test_group_by_keeps_groups_together_and_a_run_remembers_them(patients: Path, seed: int) -> None:
    run = ImageFolder(str(patients), group_by=GROUP, seed=seed, test_fraction=0.2)
    before = patients_in(run)
    assert sum(map(len, before.values())) == 12
    assert run.facts()["groups"].startswith("12 of 5 to 5 images, ")
    assert patients_in(ImageFolder(str(patients), group_by=r"p\d+", seed=seed, test_fraction=0.2)) == before
    for number in range(12):  # all of what there was of them is replaced
        for path in patients.rglob(f"p{number}_*"):
            path.unlink()
            noise(1000 + int(path.stem[-2:])).save(path.with_name(f"p{number}_new{path.name}"))
            noise(5000 + int(path.stem[-2:])).save(path.with_name(f"p{number}_more{path.name}"))
    noise(9999).save(patients / "ill" / "p77_1.png")
    now = patients_in(continued(patients, run.parts(), group_by=GROUP, seed=seed + 1, test_fraction=0.3))
    assert all(before[split] <= now[split] | {"p77"} for split in SPLITS)
    assert sum(map(len, now.values())) == 13
    without_groups = {name: table[:, :3] if table.ndim == 2 else table for name, table in run.parts().items()}
    older = continued(patients, without_groups, group_by=GROUP, seed=seed, test_fraction=0.3)
    assert older.parts()["train"].shape[1] == 4


def test_copies_link_groups(patients: Path) -> None:
    for number in range(0, 55, 5):  # each patient has a copy of an image of the next
        source = next(patients.rglob(f"*_{number + 5:02}.png"))
        shutil.copy(source, source.with_name(f"p{number // 5}_copy.png"))
    with pytest.raises(DataError, match=r"too few images for a val part; .*, in as many groups"):
        ImageFolder(str(patients), group_by=GROUP).prepare_data()


@pytest.mark.parametrize("group_by", [None, GROUP])
def test_folds_are_disjoint_and_cover_everything(patients: Path, group_by: str | None) -> None:
    folds = [ImageFolder(str(patients), folds=4, fold=k, group_by=group_by) for k in (1, 2, 3, 4)]
    assert sorted(row for fold in folds for row in rows(fold, "test")) == list(range(60))
    for fold in folds:
        assert abs(len(rows(fold, "test")) - 15) <= (5 if group_by else 1)
        assert sorted(row for split in SPLITS for row in rows(fold, split)) == list(range(60))
        assert group_by is None or sum(map(len, patients_in(fold).values())) == 12
    later = continued(patients, folds[0].parts(), folds=4, fold=3, group_by=group_by)
    assert contents(later) == contents(folds[0])
    assert "shares of 0.1, 0.1, fold 1 of 4" in later.part_changes()


def test_options_that_do_not_suit_the_folder(patients: Path) -> None:
    with pytest.raises(OptionError, match="no group in 60 of 60 images, for instance ill/p0_"):
        ImageFolder(str(patients), group_by="nothing").prepare_data()
    with pytest.warns(DataNote, match=r"no group in 5 of 60 images, for instance well/p3_15\.png; each is on its own"):
        ImageFolder(str(patients), group_by="p[0-24-9]|p1[01]").prepare_data()
    for part in ("train", "test"):
        shutil.copytree(patients, own := patients.parent / "own" / part)
    with pytest.warns(DataNote, match=r"12 groups lie in two parts(?s:.*)\n  p0: 5 train, 5 test"):
        ImageFolder(str(own.parent), group_by=GROUP).prepare_data()
    with pytest.raises(OptionError, match=r"test_fraction is 0\.2; it must be left out: .* has a test part"):
        ImageFolder(str(own.parent), test_fraction=0.2).prepare_data()
    with pytest.warns(DataNote, match="folds are cut from all images, whatever part they lie in"):
        assert len(ImageFolder(str(own.parent), folds=3).split("test")[2]) == 40
