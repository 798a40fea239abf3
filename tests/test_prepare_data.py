"""scripts/prepare_data.py counts, checks and draws; sampling by class and images kept on the device."""

import io
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from conftest import Command
from PIL import Image
from torch import Tensor

from data_modules import DataError, FashionMNISTSample
from data_modules.batches import BatchLoader
from data_modules.report import measured
from data_modules.sheets import sample_sheet
from lit_nn.commands import train
from lit_nn.prepare import main


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8))


def test_counts_complaints_and_sheet(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_NN_CACHE", str(tmp_path / "cache"))
    for part, count in [("train", 10), ("test", 3)]:
        for label, name in enumerate(["ant", "bee"]):
            (tmp_path / "mine" / part / name).mkdir(parents=True)
            for number in range(count + label):
                picture(1000 * label + 100 * count + number).save(tmp_path / "mine" / part / name / f"{number}.png")
    (tmp_path / "mine" / "train" / "bee" / "bad.png").write_text("no picture")
    picture(1000).save(tmp_path / "mine" / "train" / "ant" / "twin.png")
    picture(1000).save(tmp_path / "mine" / "test" / "bee" / "twin.png")

    words = ["scripts/prepare_data.py", "--data", "image_folder", "--data_dir", tmp_path / "mine"]
    stopped = command(*words)
    assert stopped.returncode == 1
    assert "train/bee/bad.png: not a picture" in stopped.stderr
    assert "Traceback" not in stopped.stderr

    done = command(*words, "--seed", "0", "--data.on_error", "skip", "--sheet", tmp_path / "sheet.png")
    assert done.returncode == 0, done.stderr
    rows = [line.replace("│", " ").split() for line in done.stdout.splitlines()]
    assert ["ant", "10", "1", "3"] in rows
    assert ["bee", "10", "1", "5"] in rows
    assert ["all", "20", "2", "8"] in rows
    assert "3 x 12 x 12" in done.stdout
    assert "train/bee/bad.png: not a picture" in done.stdout
    assert "ant/twin.png = test test/bee/twin.png" in done.stdout
    assert "in two parts:     1 in" in done.stdout
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 500


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["--data", "fashion_mnist_sampel"], 2, "did you mean 'fashion_mnist_sample'?"),
        (["--data", "image_folder", "--data_dir", "nowhere"], 1, "nowhere is not a folder"),
        (["--data", "image_folder", "--data.image_size", "0"], 2, "image_size is 0"),
        (["--image_sice", "3"], 2, "image_sice"),
        (
            ["--batch_sice", "3"],
            2,
            "error: unknown option 'batch_sice'. Did you mean batch_size?",
        ),
        (["--batch_size", "many"], 2, "--batch_size is 'many', expected int"),
        (["--sheet", "no/such/folder.png"], 1, "no/such/folder.png"),
        (["--data", "image_folder", "--data_dir", "nowhere", "--sheet", "x.abc"], 2, "--sheet x.abc: the file's name"),
    ],
)
def test_one_message_for_a_mistake(
    words: list[str], status: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == status
    message = capsys.readouterr().err
    assert text in message
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1


def test_seed_is_that_of_a_training(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train(["--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["seed_everything"] == FashionMNISTSample().seed


def test_measured_mean_and_std() -> None:
    data = FashionMNISTSample()
    images, _, rows = data.split("train")
    pixels = images[rows].double() / 255
    mean, std = measured(data)
    assert mean == pytest.approx([pixels.mean().item()], abs=1e-6)
    assert std == pytest.approx([pixels.std(correction=0).item()], abs=1e-6)


def test_sheet_shows_each_class_in_its_row() -> None:
    levels = torch.tensor([10, 90, 200])
    labels = torch.arange(3).repeat(12)
    images = levels[labels].to(torch.uint8)[:, None, None, None].expand(-1, 1, 16, 16)
    figure = sample_sheet(images, labels, ["a", "$b^$", "c"])
    sheet = figure.axes[0].images[0].get_array()
    assert sheet is not None
    assert sheet.shape == (3 * 18 - 2, 10 * 18 - 2, 3)
    for row, level in enumerate(levels.tolist()):
        assert (sheet[row * 18 : row * 18 + 16, :16] == level).all()
        assert (sheet[row * 18 : row * 18 + 16, -16:] == level).all()
    figure.savefig(io.BytesIO())  # a name that looks like a formula is drawn as it is


def balanced(labels: Tensor, **options: Any) -> BatchLoader:
    images = torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8)
    return BatchLoader(images, labels, torch.arange(len(labels)), 100, shuffle=True, balanced=True, **options)


def test_balanced_draws_every_class_as_often() -> None:
    labels = torch.tensor([0] * 9000 + [2] * 900 + [3] * 100)  # no image of class 1
    loader = balanced(labels)
    order = loader.order()
    assert len(order) == 10_000
    counts = labels[order].bincount(minlength=4)
    assert counts[1] == 0
    assert (counts[[0, 2, 3]] - 3333).abs().max() < 250  # five standard deviations
    assert len(order[labels[order] == 3].unique()) == 100  # all members come, not the first ones only
    assert order.equal(balanced(labels).order())
    loader.set_epoch(1)
    assert not order.equal(loader.order())
    halves = [balanced(labels, rank=rank, world_size=2).order() for rank in range(2)]
    assert torch.stack(halves, 1).flatten().equal(order)


def test_class_counts_and_sampling_of_a_data_module() -> None:
    data = FashionMNISTSample(sampling="balanced")
    assert data.class_counts.tolist() == [540] * 10
    assert data.train_dataloader().balanced
    assert not data.val_dataloader().shuffle
    with pytest.raises(ValueError, match="balanced"):
        FashionMNISTSample(sampling="weighted")  # type: ignore[arg-type]


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_images_kept_on_the_device(accelerator: str) -> None:
    data = FashionMNISTSample(on_device=True, sampling="balanced")
    trainer = L.Trainer(accelerator=accelerator, devices=1, logger=False, enable_checkpointing=False)
    data.trainer = trainer
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert images.device == labels.device == trainer.strategy.root_device
    assert data.split("train")[0] is data.split("val")[0]  # one copy for both parts
    assert data.class_counts.sum() == 5400
    plain = FashionMNISTSample(sampling="balanced")
    plain.trainer = trainer
    assert next(iter(plain.train_dataloader()))[0].equal(images.cpu())


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    data = FashionMNISTSample(on_device=True)
    data.split("train")

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(DataError, match="do not fit"):
        data._move_to(torch.device("cpu"))
