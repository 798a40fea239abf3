"""Every recipe in configs/ runs: the project's own, and any that somebody puts beside them."""

import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, script
from PIL import Image

from lit_nn.nets import build_net

RECIPES = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "configs").glob("*.yaml"))]
OWN = "data: {class_path: ImageFolder, init_args: {data_dir: mine, image_size: 24}}\ntrainer: {max_epochs: 3}\n"


@pytest.mark.parametrize("recipe", [*RECIPES, OWN])
def test_recipe_runs(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On images that are here: the embedded ones, or some in folders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_NN_CACHE", str(tmp_path / "cache"))
    for index in range(20):
        (tmp_path / "images" / f"class{index % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (index, 0, 0)).save(tmp_path / "images" / f"class{index % 2}" / f"{index}.png")
    if "weights: default" in recipe:  # which cannot be downloaded here
        net = build_net(re.search("net: (.*)", recipe)[1], 3, 1000, (224, 224))  # type: ignore[index]
        torch.save(net.state_dict(), "weights.pth")
        recipe = recipe.replace("weights: default", "weights: weights.pth")
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    data = ["--data_dir", "images"] if "ImageFolder" in recipe else ["--data", "fashion_mnist_sample"]
    words = ["--config", "recipe.yaml", *data, "--accelerator", "cpu", "--batch_size", "8", "--fast_dev_run"]
    assert script("train")(words) == 0
