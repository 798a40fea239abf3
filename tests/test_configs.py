"""Every recipe in configs/ runs, and its first lines say what was measured, of the network that it describes."""

import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from data_modules import DATA_MODULES
from lit_nn.commands import train
from lit_nn.nets import build_net

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(["--config", str(recipe), "--data", "fashion_mnist_sample", "--fast_dev_run"]) == 0


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_first_lines_say_what_was_measured(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    comment = text.partition("\ndata:")[0]
    assert all(line.startswith("#") for line in comment.splitlines())
    for fact in (r"Test accuracy \d\d\.\d\d? %", r"n = \d", r"validation \d\d\.\d\d? %", "torch 2", "cores", "python "):
        assert re.search(fact, comment), fact

    options = yaml.safe_load(text)
    classes = {cls.__name__: cls for cls in DATA_MODULES.values()}
    data = classes[options["data"]["class_path"].rpartition(".")[2]]
    channels, height, width = data.image_shape
    model = options["model"]
    net = build_net(model["net"], channels, len(data.class_names), (height, width), model.get("net_args"))
    assert f"{sum(parameter.numel() for parameter in net.parameters()):,} parameters" in comment


def test_the_table_of_the_readme_says_the_same() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[[^]]*\]\(configs/([^)]*)\)[^|]*\|(.*)\|$", page, re.MULTILINE)
    assert rows or "## Results" not in page  # a project made from this one has none yet
    facts = (
        r"([\d,]+) parameters",
        r"validation ([\d.]+) %",
        r"Test accuracy ([\d.]+) %",
        r"(\d+) epochs in ([\d,]+) s",
    )
    for name, row in rows:
        comment = (ROOT / "configs" / name).read_text(encoding="utf-8").partition("\ndata:")[0].replace("\n#", "")
        for cell, fact in zip(row.split("|"), facts, strict=True):
            measured = re.search(fact, comment)
            assert measured is not None, (name, fact)
            numbers = re.findall(r"[\d,.]*\d", cell)  # a footnote's mark is no digit
            assert tuple(numbers[: len(measured.groups())]) == measured.groups(), (name, cell)
