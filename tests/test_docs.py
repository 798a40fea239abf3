"""The pages of the documentation and the recipes: links, snippets, and what they have one add; all of it runs."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from conftest import ROOT, Command, Patch, Said, script
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from snippets import broken_links, commands, run_snippets, snippets

from data_modules.fashion_mnist import DEBIAN_FOLDER, FashionMNIST
from lit_nn.nets import build_net

DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), DOCS / "api" / "index.md"])
ELSEWHERE = {"README", "add_a_network", "add_a_dataset", "checkpoints", "scale_out", "sweep", "tour"}
RECIPES = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "configs").glob("*.yaml"))]
OWN = "data: {class_path: ImageFolder, init_args: {data_dir: mine, image_size: 24}}\ntrainer: {max_epochs: 3}\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_training_is_typed_into_the_folder_of_another(page: Path) -> None:
    trainings = [line for line in commands(page) if "scripts/train.py" in line and "--resume" not in line]
    folders = [line.split("--run_dir ")[1].split()[0] for line in trainings if "--run_dir " in line]
    assert len({*folders}) == len(folders), folders


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.stem not in ELSEWHERE and snippets(page)], ids=lambda page: page.stem
)
def test_snippets_print_what_the_page_shows(page: Path, project: Path, run: Path) -> None:
    run_snippets(page, project)


@pytest.mark.parametrize("recipe", [*RECIPES, OWN])
def test_recipe_runs(recipe: str, project: Path, monkeypatch: Patch) -> None:
    """The project's own and what somebody puts beside them, on the embedded images or on some in folders."""
    monkeypatch.chdir(project)
    if "weights: default" in recipe:  # which cannot be downloaded here
        net = build_net(re.search("net: (.*)", recipe)[1], 3, 1000, (224, 224))  # type: ignore[index]
        torch.save(net.state_dict(), "weights.pth")
        recipe = recipe.replace("weights: default", "weights: weights.pth")
    Path("recipe.yaml").write_text(recipe, encoding="utf-8")
    small = ["--data_dir", "my_pictures", "--data.image_size", "64"]
    data = small if "ImageFolder" in recipe else ["--data", "fashion_mnist_sample"]
    words = ["--config", "recipe.yaml", *data, "--accelerator", "cpu", "--batch_size", "8", "--fast_dev_run"]
    assert script("train")(words) == 0


# --- the commands of the README and of the pages that show everyday commands ---

TRIED = ("index", "configuration", "export", "how_it_works", "photos", "recipes", "report", "tables", "wrong_labels")
SHOWN = [ROOT / "README.md", *(DOCS / f"{name}.md" for name in TRIED)]
EVERYDAY = sorted({line for page in SHOWN for line in commands(page) if line.startswith("python scripts/")})
SLOW = ("--format all", "--int8", "scripts/sweep.py")


@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=[pytest.mark.slow] * any(option in line for option in SLOW)) for line in EVERYDAY]
)
def test_command(line: str, project: Path, run: Path, monkeypatch: Patch) -> None:
    if re.search("--data fashion_mnist |configs/fashion_mnist_", line) and not DEBIAN_FOLDER.exists():
        pytest.skip("the full Fashion-MNIST is not installed here")
    script, *words = shlex.split(line)[1:]
    if "gpu" in words:  # only whether it is understood
        words.append("--print_config")
    elif script == "scripts/sweep.py":
        words += ["--trials", "1", "--max_epochs", "1"]
    elif script == "scripts/check_labels.py":
        words += ["--folds", "2", "--max_epochs", "1", "--trainer.logger", "false"]
    elif script == "scripts/train.py" and words != ["--help"]:
        words += ["--max_epochs", "2"] if "--resume" in words else ["--fast_dev_run", "--batch_size", "8"]
        words += ["--accelerator", "cpu"]
    if "configs/photos_" in line:  # whose weights cannot be downloaded here
        torch.save(build_net("timm/tf_efficientnet_lite0", 3, 9, (32, 32)).state_dict(), project / "weights.pth")
        words += ["--weights", "weights.pth", "--data.image_size", "64"]
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as stop:  # the script itself, without a process of its own that imports torch again
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stop.value.code == 0


def test_python_that_loads_a_model(project: Path, run: Path, monkeypatch: Patch, capsys: Said) -> None:
    loading = next(snippet.code for snippet in snippets(ROOT / "README.md") if "load_classifier" in snippet.code)
    monkeypatch.chdir(project)
    exec(loading, {})
    labels = re.findall("'(.+?)'", capsys.readouterr().out)
    assert len(labels) == 3
    assert {*labels} <= {*FashionMNIST.class_names}


@pytest.mark.slow
@pytest.mark.posix
def test_notebook_runs_twice_and_after_an_interrupt(tmp_path: Path) -> None:
    notebook = nbformat.read(DOCS / "notebook.ipynb", 4)
    shutil.copytree(DOCS / "images", tmp_path / "images")
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}})
    figures = [figures_of(cell) for cell in notebook.cells]
    assert sum(figures) == 3
    pressed = "import os, signal, threading; threading.Timer(3, os.kill, (os.getpid(), signal.SIGINT)).start()"
    stop = nbformat.v4.new_code_cell(f'{pressed}\ntrain("lenet", epochs=10_000)')
    with client.setup_kernel():
        for _ in range(2):
            for number, cell in enumerate(notebook.cells):
                client.execute_cell(cell, number)
            assert [figures_of(cell) for cell in notebook.cells] == figures
            with pytest.raises(CellExecutionError, match="SystemExit"):
                client.execute_cell(stop, 0)


def figures_of(cell: Any) -> int:
    """How many figures a cell of a notebook shows."""
    return sum("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


# --- a network is one file and one line, a data set too ---------------------------------------------------------------

Typed = Callable[[str], str]


@pytest.fixture
def typed(tmp_path: Path, command: Command, monkeypatch: Patch) -> Typed:
    """Type a command in a copy of the project in tmp_path, which lies in somebody else's repository; its output."""
    for words in ("init -q", "-c user.name=a -c user.email=a@b.c commit -q --allow-empty -m theirs"):
        subprocess.run(["git", *words.split()], cwd=tmp_path, check=True)
    for name in ("lit_nn", "data_modules", "scripts", "tests", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))

    def output_of(line: str) -> str:
        first, *others = shlex.split(line)[1:]
        done = command(tmp_path / first if first.endswith(".py") else first, *others, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert first != "scripts/train.py" or not re.search("Tip:|litlogger|Warning", done.stdout + done.stderr)
        return done.stdout

    return output_of


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", pytest.param(DOCS / "add_a_network.md", marks=[pytest.mark.slow, pytest.mark.timeout(1000)])],
    ids=lambda page: page.stem,
)
def test_a_network_is_one_file_and_one_line(page: Path, typed: Typed, tmp_path: Path) -> None:
    module = next(snippet.code for snippet in snippets(page) if "(nn.Module)" in snippet.code)
    line = next(s.code for s in snippets(page) if re.fullmatch(r"from lit_nn\.nets\.\w+ import .*\n", s.code))
    name, nets = line.split()[1].rpartition(".")[2], tmp_path / "lit_nn" / "nets"
    (nets / f"{name}.py").write_text(module, encoding="utf-8")
    replace(nets / "__init__.py", "\nNETS:", f"{line}\nNETS:")
    few = "--max_epochs 1 --trainer.limit_train_batches 2 --accelerator cpu --run_dir run --trainer.logger false"
    typed(f"python scripts/train.py --net {name} {few}")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["net"], result["git_commit"]) == (name, "")  # not the commit of the others' repository
    if page.stem == "add_a_network":
        for line in commands(page)[:4]:
            typed(line)
        last = snippets(page)[-1]
        assert typed(shlex.join(["python", "-c", last.code])) == last.shown


def test_a_data_set_is_one_file_and_one_line(typed: Typed, tmp_path: Path) -> None:
    page = DOCS / "add_a_dataset.md"
    module, line = (snippet.code for snippet in snippets(page))
    assert len(module.splitlines()) <= 55
    (tmp_path / "data_modules" / "stripes.py").write_text(module, encoding="utf-8")
    replace(tmp_path / "data_modules" / "__init__.py", "\n}\n", f"\n{line}}}\n")
    prepared, _ = map(typed, commands(page))
    for given, measured in re.findall(r"(?:mean|std): +(\S+), measured on the training images: (\S+)", prepared):
        assert float(given) == pytest.approx(float(measured), abs=0.002)  # the numbers on the page are right
    result = json.loads((tmp_path / "runs" / "stripes" / "result.json").read_text())
    assert result["data"] == "stripes"
    assert result["test_acc"] > 0.9
