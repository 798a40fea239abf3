"""scripts/check_labels.py finds planted wrong labels and near-copies, and goes on where it was killed."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Patch, Refused, Said, Start, ended, rows_of, script, wait_until
from PIL import Image, ImageEnhance

from data_modules import FashionMNISTSample, ImageTable
from data_modules.base import SPLITS, Arrays, Split

main = script("check_labels")
QUICK = ["--accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
MINE = [
    "--data",
    "image_folder",
    "--data_dir",
    "pics",
    "--net",
    "mlp",
    "--batch_size",
    "8",
    "--max_epochs",
    "4",
    *QUICK,
]
FOUND = ["labels.csv", "worst.png", "near_copies.csv", "corrected.csv"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: Patch) -> Path:
    """A folder with bright and dark pictures, 20 each, two of which lie with the others, and one saved again."""
    monkeypatch.setenv("LIT_NN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    draw, names = np.random.default_rng(0), ("bright", "dark")
    for number in range(40):
        label = number % 2
        path = Path(
            "pics", "train" if number < 36 else "test", names[label ^ (number < 2)], f"{names[label]}{number}.png"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        places = draw.integers(0, 100, (8, 8), np.uint8) + np.uint8(150 * (1 - label))
        Image.fromarray(places.repeat(8, 0).repeat(8, 1)).save(path)
    with Image.open("pics/train/dark/dark3.png") as image:
        ImageEnhance.Brightness(image).enhance(1.1).save("pics/train/bright/again.jpg", quality=80)
    return tmp_path


def test_tables_sheet_and_copies(capsys: Said) -> None:
    assert main([*MINE, "--folds", "3", "--run_dir", "out"]) == 0
    assert "Cross-validated accuracy 9" in (said := capsys.readouterr().out)
    ranked, near, corrected = (
        rows_of(Path("out", name)) for name in ("labels.csv", "near_copies.csv", "corrected.csv")
    )
    assert {row["file"].rpartition("/")[2] for row in ranked[:3]} == {"bright0.png", "dark1.png", "again.jpg"}
    assert all(row["given"] != row["likely"] for row in ranked[:3])
    assert sorted(Path(row["file"]) for row in ranked) == sorted(p for p in Path("pics").rglob("*.*g"))
    assert {row["fold"] for row in ranked} == {"1", "2", "3"}
    assert [(row["file"], row["other"], row["labels_differ"]) for row in near] == [
        ("pics/train/bright/again.jpg", "pics/train/dark/dark3.png", "yes")
    ]
    wrong = sum(float(row["score"]) < 0.05 for row in ranked)
    assert f"{wrong} of 41 labels are probably wrong" in said
    given = {Path(row["file"]).absolute(): row for row in ranked}
    for row in corrected:
        one = given[Path(row["file"])]
        assert row["label"] == one["likely" if float(one["score"]) < 0.05 else "given"]
    data = ImageTable("out/corrected.csv")
    assert [len(data.split("test")[2]), sum(len(data.split(split)[2]) for split in SPLITS)] == [4, 41]
    assert (
        script("train")(["--data", "image_table", "--data.table", "out/corrected.csv", "--fast_dev_run", *QUICK]) == 0
    )

    times = [Path("out", name).stat().st_mtime_ns for name in ("fold-1/answers.npz", "fold-3/answers.npz")]
    Path("out/fold-2/answers.npz").unlink()  # as if it had been killed after the test of its second fold
    before = Path("out/labels.csv").read_text()
    assert main([*MINE, "--folds", "3", "--run_dir", "out"]) == 0
    assert [Path("out", name).stat().st_mtime_ns for name in ("fold-1/answers.npz", "fold-3/answers.npz")] == times
    assert Path("out/labels.csv").read_text() == before
    assert main([*MINE, "--folds", "3", "--run_dir", "out", "--lr", "0.1"]) == 2
    assert "out holds a check with other options or of other images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--folds 1", "folds is 1; it must be at least 2"),
        ("--folds 21", "fewer images than the 21 folds: dark 20"),
        ("--folds many", "invalid int value: 'many'"),
        ("--fold 2", "fold"),
        ("--max_epoch 2", "Did you mean max_epochs?"),
        ("--data.fold 2", "--data.fold is chosen here"),
        ("--resume out", "--ckpt_path is chosen here"),
        ("--fast_dev_run", "--fast_dev_run trains nothing that could judge"),
        ("--devices 2 --strategy ddp", "give --devices 1"),
        ("--data_dir nowhere", "nowhere is not a folder"),
    ],
)
def test_one_message_for_a_mistake(words: str, message: str, here: Path, refused: Refused) -> None:
    before = sorted(here.iterdir())
    assert message in refused(main, [*MINE, "--run_dir", "out", *words.split()], 1, 2)
    assert [path for path in sorted(here.iterdir()) if path.name != "cache"] == before


def test_planted_labels_are_found(monkeypatch: Patch, here: Path) -> None:
    """5 % wrong ones among the embedded training images: at least 70 % of them are in the first 10 % of the list."""
    draw, real = np.random.default_rng(1), FashionMNISTSample.load
    wrong = draw.choice(6000, 300, replace=False)
    other = torch.from_numpy(draw.integers(1, 10, len(wrong)))

    def load(self: FashionMNISTSample, split: Split) -> Arrays | None:
        if (arrays := real(self, split)) is not None and split == "train":
            arrays[1][wrong] = (arrays[1][wrong] + other) % 10
        return arrays

    monkeypatch.setattr(FashionMNISTSample, "load", load)
    assert main(["--folds", "3", "--net", "mlp", "--max_epochs", "3", "--run_dir", "out", *QUICK]) == 0
    ranked = rows_of(Path("out/labels.csv"))
    assert sorted(int(row["file"]) for row in ranked) == list(range(6000))
    assert len({int(row["file"]) for row in ranked[:600]} & {*wrong.tolist()}) >= 0.7 * 300
    assert not Path("out/corrected.csv").exists()


@pytest.mark.slow
@pytest.mark.posix
def test_what_was_killed_goes_on(start: Start) -> None:
    words = [*MINE, "--folds", "2", "--save_every_steps", "1", "--max_epochs", "40", "--run_dir"]
    ended(start("check_labels", *words, "straight"))
    for place in ("fold-1/checkpoints/last.ckpt", "fold-2/checkpoints/last.ckpt", "fold-2/result.json"):
        process = start("check_labels", *words, "killed")
        wait_until(Path("killed", place).exists, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    ended(start("check_labels", *words, "killed"))
    for name in FOUND:
        assert Path("killed", name).read_bytes() == Path("straight", name).read_bytes()
