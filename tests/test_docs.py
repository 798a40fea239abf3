"""The pages of the documentation: their links, their snippets, and the network that they have one add."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, Command
from snippets import broken_links, run_snippets, snippets

DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), DOCS / "api" / "index.md"])
ELSEWHERE = {"README", "add_a_network", "add_a_dataset", "checkpoints", "scale_out", "sweep", "tour"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.stem not in ELSEWHERE and snippets(page)], ids=lambda page: page.stem
)
def test_snippets_print_what_the_page_shows(page: Path, project: Path, run: Path) -> None:
    run_snippets(page, project)


# --- a network is one file and one line -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", pytest.param(DOCS / "add_a_network.md", marks=[pytest.mark.slow, pytest.mark.timeout(1000)])],
    ids=lambda page: page.stem,
)
def test_a_network_is_one_file_and_one_line(
    page: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the page adds it to a copy, which lies in somebody else's repository: a run then has no commit."""
    for words in ("init -q", "-c user.name=a -c user.email=a@b.c commit -q --allow-empty -m theirs"):
        subprocess.run(["git", *words.split()], cwd=tmp_path, check=True)
    for name in ("lit_nn", "data_modules", "scripts", "tests", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    found = snippets(page)
    line = next(snippet.code for snippet in found if re.fullmatch(r"from lit_nn\.nets\.\w+ import .*\n", snippet.code))
    name, nets = line.split()[1].rpartition(".")[2], tmp_path / "lit_nn" / "nets"
    (nets / f"{name}.py").write_text(next(snippet.code for snippet in found if "(nn.Module)" in snippet.code))
    listing = (nets / "__init__.py").read_text(encoding="utf-8")
    (nets / "__init__.py").write_text(listing.replace("\nNETS:", f"{line}\nNETS:"), encoding="utf-8")

    few = ["--max_epochs", "1", "--trainer.limit_train_batches", "2", "--accelerator", "cpu", "--run_dir", "run"]
    done = command(tmp_path / "scripts" / "train.py", "--net", name, *few)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["net"], result["git_commit"]) == (name, "")
    if page.stem == "README":
        return
    assert command("-c", found[-1].code).stdout == found[-1].shown
    for line in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[0].splitlines():
        first, *others = shlex.split(line, comments=True)[1:]
        done = command(tmp_path / first if first.endswith(".py") else first, *others, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
