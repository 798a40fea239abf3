"""scripts/prepare_data.py counts, checks and draws; sheets of samples, and images kept on the device."""

import io
from pathlib import Path
from typing import Literal

import lightning as L
import numpy as np
import pytest
import torch
from conftest import script
from PIL import Image

from data_modules import FashionMNISTSample
from data_modules.sheets import measured, sample_sheet

main = script("prepare_data")


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8))


def test_counts_complaints_and_sheet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIT_NN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for part, count in [("train", 10), ("test", 3)]:
        for label, name in enumerate(["ant", "bee"]):
            folder = Path("mine", part, name)
            folder.mkdir(parents=True)
            for number in range(count + label):
                image(1000 * label + 100 * count + number).save(folder / f"{number}.png")
    Path("mine/train/bee/bad.png").write_text("no image", encoding="utf-8")
    image(1000).save("mine/train/ant/twin.png")
    image(1000).save("mine/test/bee/twin.png")

    words = ["--data", "image_folder", "--data_dir", "mine", "--seed", "0"]
    assert main([*words, "--data.on_error", "skip", "--sheet", "sheet.png"]) == 0
    printed = capsys.readouterr().out
    rows = [line.replace("│", " ").split() for line in printed.splitlines()]
    for row in (["ant", "10", "1", "3"], ["bee", "10", "1", "5"], ["all", "20", "2", "8"]):
        assert row in rows
    for said in ("3 x 12 x 12", "bad.png: not an image", "twin.png", "in two parts:     1 in train and test"):
        assert said in printed
    with Image.open("sheet.png") as sheet:
        assert sheet.width > 500


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["--data", "fashion_mnist_sampel"], 2, "Did you mean fashion_mnist_sample?"),
        (["--data", "image_folder", "--data.image_size", "0"], 2, "image_size is 0"),
        (["--batch_sice", "3"], 2, "unknown option 'batch_sice'. Did you mean batch_size?"),
        (["--batch_size", "many"], 2, "\"batch_size\": Expected a <class 'int'>. Got value: many"),
        (["--data_dir", "mine"], 2, "--data_dir mine: the data set fashion_mnist_sample reads no folder"),
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


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("sampling", ["shuffled", "balanced"])
def test_images_kept_on_the_device(accelerator: str, sampling: Literal["shuffled", "balanced"]) -> None:
    trainer = L.Trainer(accelerator=accelerator, devices=1, logger=False, enable_checkpointing=False)
    data, plain = (FashionMNISTSample(on_device=kept, sampling=sampling) for kept in (True, False))
    data.trainer = plain.trainer = trainer
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert images.device == labels.device == trainer.strategy.root_device
    assert data.split("train")[0] is data.split("val")[0]  # one copy for both parts
    assert data.class_counts.tolist() == [540] * 10
    assert next(iter(plain.train_dataloader()))[0].equal(images.cpu())
