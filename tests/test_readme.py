"""The README's commands are run as they stand, and its links lead somewhere."""

import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from snippets import broken_links

from data_modules.fashion_mnist import DEBIAN_FOLDER
from lit_nn.commands import train
from lit_nn.export import main as export

README = ROOT / "README.md"
BASH = [
    line.partition(" #")[0].strip()
    for block in README.read_text(encoding="utf-8").split("```bash\n")[1:]
    for line in block.partition("```")[0].splitlines()
]
EVERYDAY = sorted({line for line in BASH if line.startswith("python scripts/")})


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README's commands speak of: pictures in folders and a run."""
    folder = tmp_path_factory.mktemp("readme")
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "my_pictures" / name).mkdir(parents=True)
        for number in range(20):
            pixels = generator.integers(0, 256, (40, 50, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "my_pictures" / name / f"{number}.jpg")
    return folder


@pytest.fixture(scope="module")
def run(project: Path) -> Path:
    """The finished run that some of the commands start from."""
    folder = project / "runs" / "lenet" / "SOME_RUN"
    assert train(["--max_epochs", "1", "--accelerator", "cpu", "--run_dir", str(folder)]) == 0
    assert export(["--format", "onnx", str(folder / "checkpoints" / "best.ckpt")]) == 0
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(project / "picture.jpg")
    return folder


def test_there_are_commands() -> None:
    assert len(EVERYDAY) >= 8


@pytest.mark.parametrize("line", EVERYDAY)
def test_command(line: str, project: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "--data fashion_mnist " in line and not DEBIAN_FOLDER.exists():
        pytest.skip("the full Fashion-MNIST is not installed here")
    script, *words = [word.replace("gpu", "cpu") for word in shlex.split(line)[1:]]
    if script == "scripts/train.py" and words != ["--help"]:
        words += ["--max_epochs", "2"] if "--resume" in words else ["--fast_dev_run"]
        words += ["--accelerator", "cpu"]
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as stop:  # the script itself, without a process of its own that imports torch again
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stop.value.code == 0


def test_links() -> None:
    assert broken_links(README) == []
