"""A copy under another name is a whole project: renamed everywhere, clean for the linter, its own tests green."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

NAME, LONG_NAME = "blooms", "my_flower_classifier"
GIT = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    **{f"GIT_{who}_{what}": "test@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}
OLD_NAME = re.compile(r"lit[-_ ]?nn", re.IGNORECASE)
# Where the template may be named: whose licence it is, and where the project comes from.
MEANT = {"LICENSE", "README.md", "CHANGELOG.md"}

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git repository")


def git(*words: str, cwd: Path) -> str:
    environment = {**os.environ, **GIT}
    return subprocess.run(["git", *words], cwd=cwd, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of this working tree, as a clone would have them, and some that git does not track."""
    folder = tmp_path_factory.mktemp("template") / "clone"
    for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git("init", "--quiet", cwd=folder)
    git("add", "--all", cwd=folder)
    git("commit", "--quiet", "--message", "Everything", cwd=folder)
    (folder / "runs").mkdir()
    (folder / "runs" / "result.json").write_text("{}")
    (folder / "notes.txt").write_text("not tracked")
    return folder


def new_project(template: Path, *words: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run the script as on a machine where nothing is installed: -S hides all packages."""
    line = [sys.executable, "-S", "scripts/new_project.py", *map(str, words)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | GIT
    return subprocess.run(line, cwd=template, env=environment, capture_output=True, text=True, timeout=120, check=False)


def lines_with(pattern: re.Pattern[str], project: Path) -> dict[str, list[str]]:
    """Lines of the project's text files in which a pattern occurs, by file."""
    found = {}
    for name in git("ls-files", cwd=project).splitlines():
        content = (project / name).read_bytes()
        lines = [] if b"\0" in content else [line for line in content.decode().splitlines() if pattern.search(line)]
        if lines or pattern.search(name):
            found[name] = lines
    return found


def python_in(project: Path, *words: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run Python in the project as if it was installed, with this environment's packages."""
    # What pip would leave: the versions in checkpoints are read from there.
    metadata = project.parent / f"{project.name}.installed" / f"{NAME}-0.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True, exist_ok=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0.1.0\n")
    path = os.pathsep.join([str(project), str(metadata.parent.parent)])
    environment = {**os.environ, **GIT, "PYTHONPATH": path}
    line = [sys.executable, *map(str, words)]
    return subprocess.run(line, cwd=project, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module", params=["keep", "remove"])
def project(request: pytest.FixtureRequest, template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "project"
    done = new_project(template, NAME, "--dest", folder, "--examples", request.param)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder


def test_a_copy_is_renamed_and_complete(project: Path, template: Path) -> None:
    found = lines_with(OLD_NAME, project)
    assert found.keys() == MEANT
    assert all("template" in line or line.startswith("Copyright") for lines in found.values() for line in lines)
    assert git("status", "--porcelain", cwd=project) == ""
    commit = git("rev-parse", "--short", "HEAD", cwd=template).strip()
    assert git("log", "--format=%s", cwd=project) == f"Start from the lit-nn template at {commit}\n"
    assert not {"runs", "notes.txt", "scripts/new_project.py"} & {
        path.relative_to(project).as_posix() for path in project.rglob("*")
    }
    for name in ("tests/stored/format1.ckpt", "data_modules/fashion_mnist_sample.npz"):
        assert (project / name).read_bytes() == (template / name).read_bytes()
    assert os.access(project / ".ci" / "run", os.X_OK) == os.access(template / ".ci" / "run", os.X_OK)
    assert (project / "LICENSE").read_text().startswith((template / "LICENSE").read_text())
    assert f'name = "{NAME}"' in (project / "pyproject.toml").read_text()


def test_a_copy_is_clean_and_starts(project: Path) -> None:
    for words in (
        ["-m", "compileall", "-q", NAME, "data_modules", "scripts", "tests"],
        ["-m", "ruff", "check", "--no-cache"],
        ["-m", "ruff", "format", "--check", "--no-cache"],  # NAME is as long as the template's
    ):
        done = python_in(project, *words)
        assert done.returncode == 0, done.stdout + done.stderr
    done = python_in(project, "scripts/train.py", "--help")
    assert done.returncode == 0, done.stderr
    assert f"python -m {NAME} fit --help" in done.stdout
    assert "lenet" in done.stdout


def test_without_the_examples_nothing_speaks_of_them(template: Path, tmp_path: Path) -> None:
    """Also with a long name, which makes lines too long."""
    done = new_project(template, LONG_NAME, "--dest", tmp_path / "p", "--examples", "remove")
    assert done.returncode == 0, done.stderr
    assert "make format" in done.stdout
    pattern = re.compile(r"\b(cifar_cnn|conv3d_cnn|fixed_hidden|lazy_cnn|nested_mlp|tour\.md|# tutorial)\b")
    found = {name for name in lines_with(pattern, tmp_path / "p") if not name.startswith("benchmarks/")}
    assert found == set()
    nets = {path.stem for path in (tmp_path / "p" / LONG_NAME / "nets").glob("*.py")}
    assert nets == {"__init__", "lenet", "mlp", "resnet9", "torchvision_net"}
    done = python_in(tmp_path / "p", "-m", "ruff", "check", "--no-cache")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["my-flowers"], ["'my-flowers'", "for instance my_flowers"]),
        (["2nd"], ["'2nd'", "for instance nd"]),
        (["Flowers"], ["'Flowers'", "for instance flowers"]),
        (["lambda"], ["'lambda'", "Python language", "my_lambda"]),
        (["json"], ["'json'", "standard library"]),
        (["torch"], ["'torch'", "itself uses"]),
        (["data_modules"], ["itself uses"]),
        (["tests"], ["itself uses"]),
        (["classifier"], ["itself uses"]),
        ([NAME, "--dest", "."], ["lies in the template"]),
        ([NAME, "--dest", "inside"], ["lies in the template"]),
        ([NAME, "--dest", "{full}"], ["not an empty folder"]),
        ([NAME, "--examples", "drop"], ["drop", "keep", "remove"]),
        ([], ["NAME", "--dest"]),
    ],
    ids=lambda value: "-".join(value),
)
def test_mistakes_end_in_one_message_and_leave_nothing(
    words: list[str], named: list[str], template: Path, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    words = [word.format(full=full) for word in words]
    if words and "--dest" not in words:
        words += ["--dest", str(tmp_path / "project")]
    done = new_project(template, *words)
    assert done.returncode == 2
    message = done.stderr.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    for word in named:
        assert word in message
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert not (template / "inside").exists()


def test_a_copy_needs_a_clone(template: Path, tmp_path: Path) -> None:
    shutil.copytree(template, tmp_path / "unpacked", ignore=shutil.ignore_patterns(".git"))
    done = new_project(tmp_path / "unpacked", NAME, "--dest", tmp_path / "project")
    assert done.returncode == 1
    assert "git clone" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "project").exists()


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("project", ["remove"], indirect=True)  # with the examples kept, the tests are those of here
def test_the_tests_of_a_copy_pass(project: Path) -> None:
    # In one process, and with more patience: other slow tests may run beside this one.
    done = python_in(project, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "1500")
    assert done.returncode == 0, done.stdout[-10_000:]
