"""scripts/prepare_data.py counts, checks and draws; sheets of samples, and images kept on the device."""

import io
import re
from pathlib import Path
from typing import Literal

import lightning as L
import pytest
import torch
from conftest import Patch, Said, images_in, noise, script
from PIL import Image

from data_modules import FashionMNISTSample
from data_modules.sheets import sample_sheet

main = script("prepare_data")


def test_counts_complaints_and_sheet(tmp_path: Path, monkeypatch: Patch, capsys: Said) -> None:
    monkeypatch.chdir(tmp_path)
    images_in(Path("mine"), "train/ant", "train/bee", "test/ant", "test/bee", height=12, width=12)
    Path("mine/train/bee/bad.png").write_text("no image", encoding="utf-8")
    for twin in ("mine/train/ant/twin.png", "mine/test/bee/twin.png"):
        noise(77, 12, 12).save(twin)
    words = ["--data", "image_folder", "--data_dir", "mine", "--data.on_error", "skip", "--sheet", "sheet.png"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    rows = [line.replace("│", " ").split() for line in printed.splitlines()]
    for row in (["ant", "10", "1", "10"], ["bee", "9", "1", "11"], ["all", "19", "2", "21"]):
        assert row in rows
    for said in ("3 x 12 x 12", "bad.png: not an image", "twin.png", "in two parts:     1 in train and test"):
        assert said in printed
    for own, found in re.findall(r"(?:mean|std): +(.*), measured on the training images: (.*)", printed):
        assert [float(value) for value in own.split()] == pytest.approx([*map(float, found.split())], abs=2e-4)
    with Image.open("sheet.png") as sheet:
        assert sheet.width > 500


def test_sheet_shows_each_class_in_its_row() -> None:
    levels = torch.tensor([10, 90, 200])
    labels = torch.arange(3).repeat(12)
    images = levels[labels].to(torch.uint8)[:, None, None, None].expand(-1, 1, 16, 16)
    figure = sample_sheet(images, labels, torch.arange(36), ["a", "$b^$", "c"])
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
