"""The pages of the documentation: their links, their snippets, what they say about the code, and the site."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from snippets import broken_links, run_snippets

from lit_nn.commands import train
from lit_nn.losses import LOSSES

DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), DOCS / "api" / "index.md"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("name", ["configuration", "export", "how_it_works"])
def test_snippets_print_what_the_page_shows(name: str, project: Path, run: Path) -> None:
    run_snippets(DOCS / f"{name}.md", project)


def test_four_calls_lead_from_the_shell_to_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    frames: list[tuple[str, str]] = []
    cross_entropy = LOSSES["cross_entropy"]

    def loss(*arguments: Any) -> Any:
        frames.extend((frame.filename, frame.name) for frame in traceback.extract_stack())
        return cross_entropy(*arguments)

    monkeypatch.setitem(LOSSES, "cross_entropy", loss)
    assert train(["--fast_dev_run", "--accelerator", "cpu"]) == 0
    page = (DOCS / "how_it_works.md").read_text(encoding="utf-8")
    calls = re.findall(r"^\| `([\w.]+)` \| (?:\[.*\]\(\.\./(.*)\)|Lightning) ", page, re.MULTILINE)[:4]
    assert [name for name, _ in calls] == ["train", "TrainCLI", "Trainer.fit", "training_step"]
    coming = iter(frames)
    for name, file in calls:
        function, where = {"TrainCLI": "__init__", "Trainer.fit": "fit"}.get(name, name), file or "trainer/trainer.py"
        assert any(path.endswith(where) and found == function for path, found in coming), (name, frames)


def test_the_profiler_has_the_lines_of_the_page(tmp_path: Path) -> None:
    few = [word for part in ("train", "val", "test") for word in (f"--trainer.limit_{part}_batches", "2")]
    few += ["--max_epochs", "1", "--accelerator", "cpu", "--run_dir", str(tmp_path / "run")]
    profiler = ["--trainer.profiler", "SimpleProfiler"]
    profiler += ["--trainer.profiler.dirpath", str(tmp_path), "--trainer.profiler.filename", "profile"]
    assert train([*few, *profiler]) == 0
    report = (tmp_path / "fit-profile.txt").read_text(encoding="utf-8")
    profiled = [line.split("|")[1].strip() for line in report.splitlines() if line.startswith("|")]
    page = (DOCS / "how_it_works.md").read_text(encoding="utf-8").partition("profiler simple")[2]
    shown = re.findall(r"^\| `(\S+)` \|", page, re.MULTILINE)
    assert len(shown) >= 5
    for name in shown:
        pattern = re.escape(name).replace(r"\.\.\.", ".*")
        assert any(re.fullmatch(pattern, line) for line in profiled), (name, profiled)


# --- add_a_network.md, followed word for word in a copy of the project ------------------------------------------------

NETWORK = DOCS / "add_a_network.md"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with the network of the page."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("lit_nn", "data_modules", "scripts", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    module, import_line, snippet = re.findall(r"```python\n(.*?)```", NETWORK.read_text(encoding="utf-8"), re.DOTALL)
    (folder / "lit_nn" / "nets" / "separable.py").write_text(module, encoding="utf-8")
    listing = folder / "lit_nn" / "nets" / "__init__.py"
    text = listing.read_text(encoding="utf-8")
    assert "\nNETS:" in text
    listing.write_text(text.replace("\nNETS:", f"{import_line}\nNETS:"), encoding="utf-8")
    (folder / "snippet.py").write_text(snippet, encoding="utf-8")
    return folder


def follow(copy: Path, *words: str) -> str:
    """What a Python command line prints in the copy."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(copy), os.environ["PYTHONPATH"]])}
    done = subprocess.run(
        [sys.executable, *words], cwd=copy, env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_network_of_the_page_is_built(copy: Path) -> None:
    shown = re.findall(r"```text\n(.*?)```", NETWORK.read_text(encoding="utf-8"), re.DOTALL)
    assert [follow(copy, "snippet.py")] == shown


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_the_commands_of_the_page_work(copy: Path) -> None:
    commands = re.findall(r"```bash\n(.*?)```", NETWORK.read_text(encoding="utf-8"), re.DOTALL)[0].splitlines()
    assert len(commands) == 4
    for line in commands:
        output = follow(copy, *shlex.split(line)[1:])
    assert re.search(r"\d+ passed", output)


# --- the site ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="the extra docs is not installed")
    folders = [path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for name in {*folders} - {"build", "data", "dist", "runs"}:
        ignore = shutil.ignore_patterns("__pycache__", "*.rst", "node_modules")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore if name != "docs" else None)
    for stub in (tmp_path / "docs" / "api").glob("*.rst"):
        stub.unlink()
    for page in ROOT.glob("*.md"):
        shutil.copy(page, tmp_path)
    words = ["-W", "--keep-going", "-n", "docs", "site"]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *words], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    classifier = (site / "api" / "lit_nn.classifier.html").read_text(encoding="utf-8")
    assert "Classifies images with one of the project" in classifier
    assert 'href="api/lit_nn.classifier.html"' in (site / "how_it_works.html").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert (site / f"{page.stem}.html").exists()
