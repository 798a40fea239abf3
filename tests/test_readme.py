"""The commands of the README and of the pages that show everyday commands are run as they stand, and its Python."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from snippets import snippets

from data_modules.fashion_mnist import DEBIAN_FOLDER, FashionMNIST

NAMES = ("index", "configuration", "export", "how_it_works", "tables")
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in NAMES)]
EVERYDAY = sorted(
    {
        line.partition(" #")[0].strip()
        for page in PAGES
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        for line in block.splitlines()
        if line.startswith("python scripts/")
    }
)
SLOW = ("--format all", "--int8", "scripts/sweep.py")


@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=[pytest.mark.slow] * any(option in line for option in SLOW)) for line in EVERYDAY]
)
def test_command(line: str, project: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if re.search("--data fashion_mnist |configs/fashion_mnist_", line) and not DEBIAN_FOLDER.exists():
        pytest.skip("the full Fashion-MNIST is not installed here")
    script, *words = shlex.split(line)[1:]
    if "gpu" in words:  # only whether it is understood
        words.append("--print_config")
    elif script == "scripts/sweep.py":
        words += ["--trials", "1", "--max_epochs", "1"]
    elif script == "scripts/train.py" and words != ["--help"]:
        words += ["--max_epochs", "2"] if "--resume" in words else ["--fast_dev_run", "--batch_size", "8"]
        words += ["--accelerator", "cpu"]
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as stop:  # the script itself, without a process of its own that imports torch again
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stop.value.code == 0


def test_python_that_loads_a_model(
    project: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loading = next(snippet.code for snippet in snippets(ROOT / "README.md") if "load_classifier" in snippet.code)
    monkeypatch.chdir(project)
    exec(loading, {})
    labels = re.findall("'(.+?)'", capsys.readouterr().out)
    assert len(labels) == 3
    assert {*labels} <= {*FashionMNIST.class_names}
