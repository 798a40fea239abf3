"""Start a project of your own: a copy of this template under your package's name, with a git history of its own.

Usage: python scripts/new_project.py my_flowers --dest ../my_flowers

It needs Python and git, and no package. The copy is made of the latest commit, so nothing that git does not track
(data, runs, caches) comes along. What only follows the PyTorch tutorials can be left out: the files of ``TUTORIAL``,
all lines of the tests that end in "# tutorial", and the list items and table rows of the pages that speak of them.
"""

import ast
import importlib.util
import io
import keyword
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project need not be installed

from lit_nn.commands import CommandParser, run  # noqa: E402
from lit_nn.flags import UsageError  # noqa: E402

NETWORKS = ("cifar_cnn", "conv3d_cnn", "fixed_hidden", "lazy_cnn", "nested_mlp")
TUTORIAL = (
    *(f"lit_nn/nets/{name}.py" for name in (*NETWORKS, "nested")),
    *("lit_nn/layers.py", "docs/tour.md", "tests/test_layers.py", "tests/test_tour.py", "tests/test_tutorial_nets.py"),
)
TEMPLATE = ("scripts/new_project.py", "tests/test_new_project.py")  # what only a template needs
SECTIONS = ("Start your own project", "Results", "Speed", "How it compares", "When not to use it")  # of the README

README = """# {title}

Image classification with PyTorch Lightning. (What is on the pictures, and what for?) Started from the lit-nn template
at {commit}.

"""
CHANGELOG = """# Changelog

The format is that of [Keep a Changelog](https://keepachangelog.com/en/1.1.0/).

## [Unreleased]

### Added

- Everything that came with the lit-nn template at {commit}.
"""
NOTICE = """
---

The notice above is that of the lit-nn template, from which this project was started at {commit}. It covers what came
from there and has to stay with it; what is added may have a notice and a licence of its own.
"""


class ProjectError(Exception):
    """The copy cannot be made; the message says why."""

    exit_status = 1


def git(*words: str, cwd: Path = ROOT) -> bytes:
    """What a git command prints.

    Raises:
        ProjectError: If there is no git, or the command fails.
    """
    try:
        done = subprocess.run(["git", *words], cwd=cwd, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise ProjectError("git is not installed, and the copy is made of what git tracks") from error
    if done.returncode != 0:
        raise ProjectError(f"git {' '.join(words)}: {' '.join(done.stderr.decode(errors='replace').split())}")
    return done.stdout


def check_name(name: str) -> None:
    """Refuse what cannot be the name of the package.

    Raises:
        UsageError: If so, saying why.
    """
    if not re.fullmatch("[a-z]([a-z0-9_]*[a-z0-9])?", name):
        like = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_0123456789").lower() or "my_flowers"
        raise UsageError(f"NAME is {name!r}; a package's name has small letters, digits and _, for instance {like}")
    reason = None
    if keyword.iskeyword(name):
        reason = "a word of the Python language"
    elif name in sys.stdlib_module_names:
        reason = "a module of Python's standard library"
    elif name in names_in_use():
        reason = "a name that the project itself uses, of a package, a folder or a variable"
    elif importlib.util.find_spec(name):
        reason = "a package that is installed here"
    if reason:
        raise UsageError(f"NAME is {name!r}, {reason}; take another one, for instance my_{name}")


def names_in_use() -> set[str]:
    """Names that ``import NAME`` would collide with: folders, imported packages and variables of this project."""
    found = {"build", "data", "dist", "runs", *(path.name for path in ROOT.iterdir())}
    for path in (
        path for folder in ("lit_nn", "data_modules", "scripts", "tests") for path in (ROOT / folder).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Name):
                found.add(node.id)
            elif isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module.partition(".")[0], *(alias.name for alias in node.names)}
    return found


def check_dest(dest: Path) -> None:
    """Refuse a folder that is not free.

    Raises:
        UsageError: If so.
    """
    if dest == ROOT or ROOT in dest.parents:
        raise UsageError(f"--dest {dest} lies in the template itself; choose a folder outside {ROOT}")
    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        raise UsageError(f"--dest {dest} exists and is not an empty folder; choose another one")


def text_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """All files of the copy that are text, with what is in them."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if b"\0" not in content:  # arrays, checkpoints and pictures stay as they are
            yield path, content.decode("utf-8")


def write(path: Path, text: str) -> None:
    """Write a file with the line ends that it has in git."""
    path.write_bytes(text.encode("utf-8"))


def without(pattern: str, page: str) -> str:
    """A Markdown page without the items of lists, the rows of tables and the commands that speak of something."""
    unit = re.compile(r"^(?:\|.*|(?:- |\d+\. |python |tour$).*(?:\n {2,}\S.*)*)\n", re.MULTILINE)
    return unit.sub(lambda found: "" if re.search(pattern, found[0]) else found[0], page)


def leave_out_tutorial(folder: Path) -> None:
    """Remove what only follows the tutorials."""
    networks = "|".join(NETWORKS)
    for name in TUTORIAL:
        (folder / name).unlink()
    for path, text in list(text_files(folder)):
        if path.suffix == ".py":
            text = re.sub(rf"^.*(?:  # tutorial|^from lit_nn\.nets\.(?:{networks}) import .*)\n", "", text, flags=re.M)
        elif path.suffix == ".md":
            text = re.sub(r"\[[^]]*\]\((?:docs/)?tour\.md\), ", "", text)  # one of several links
            text = without(rf"\b(?:{networks})\b|\btour\.md\b|^tour$", text)
        elif path.suffix == ".yaml" and re.search(rf"\b(?:{networks})\b", text):
            path.unlink()
            continue
        write(path, text)


def rename(folder: Path, name: str) -> None:
    """Put the new name wherever the template's stands."""
    names = {"lit_nn": name, "LIT_NN": name.upper(), "lit-nn": name.replace("_", "-")}
    for path, text in text_files(folder):
        if path != folder / "LICENSE":
            text = re.sub("|".join(names), lambda found: names[found[0]], text)
            write(path, sorted_imports(text, name) if path.suffix == ".py" else text)
    (folder / "lit_nn").rename(folder / name)


def sorted_imports(text: str, name: str) -> str:
    """Bring the imports of the project's own packages into the order that the new name has in the alphabet."""
    statement = rf"[ ]*(?:from|import) (?:{name}|data_modules)\b(?:[^\n(]*|[^\n(]*\([^)]*\)[^\n]*)\n"

    def in_order(block: re.Match[str]) -> str:
        lines = re.findall(statement, block[0])
        return "".join(sorted(lines, key=lambda line: (line.split()[0] == "from", line.split()[1])))

    return re.sub(rf"^(?:{statement})+", in_order, text, flags=re.M)


def make_its_own(folder: Path, name: str, commit: str) -> None:
    """Replace what speaks of the template, as the README's beginning; say in LICENSE what it covers."""
    title = name.replace("_", "-")
    _, *sections = re.split(r"^(?=## )", (folder / "README.md").read_text(encoding="utf-8"), flags=re.M)
    kept = [text for text in sections if text.partition("\n")[0].removeprefix("## ") not in SECTIONS]
    write(folder / "README.md", README.format(title=title, commit=commit) + "".join(kept))
    write(folder / "CHANGELOG.md", CHANGELOG.format(commit=commit))
    licence = (folder / "LICENSE").read_text(encoding="utf-8")
    write(folder / "LICENSE", licence + NOTICE.format(commit=commit))
    project = (folder / "pyproject.toml").read_text(encoding="utf-8")
    project = re.sub(
        "^description = .*", 'description = "Image classification with PyTorch Lightning"', project, flags=re.M
    )
    long = {path for path, text in text_files(folder) if path.suffix == ".py" and re.search(".{121}", text)}
    lines = [
        f'"{path.relative_to(folder).as_posix()}" = ["E501"] # the name is longer than the template\'s\n'
        for path in sorted(long)
    ]
    place = "[tool.ruff.lint.per-file-ignores]\n"
    write(folder / "pyproject.toml", project.replace(place, place + "".join(lines)))


def new_project(name: str, dest: Path, examples: bool) -> None:
    """Make the copy; ``dest`` appears only when it is complete.

    Args:
        name: Of the package; for the distribution and the command it has - instead of _.
        dest: Folder of the new project.
        examples: Whether the tutorials' networks and pages come along.

    Raises:
        UsageError: If the name or the folder cannot be used.
        ProjectError: If this is no clone of the template, or git does not know who commits.
    """
    check_name(name)
    check_dest(dest)
    try:
        commit = git("rev-parse", "--short", "HEAD").decode().strip()
    except ProjectError as error:
        raise ProjectError(f"the copy is made of a git clone of the template, and this is none ({error})") from error
    if git("status", "--porcelain", "--untracked-files=no"):
        print(f"Not in the copy: what has been changed here since commit {commit}.")
    dest.parent.mkdir(parents=True, exist_ok=True)
    git("var", "GIT_AUTHOR_IDENT", cwd=dest.parent)
    with TemporaryDirectory(prefix=".new-", dir=dest.parent) as temporary:
        folder = Path(temporary) / dest.name
        with tarfile.open(fileobj=io.BytesIO(git("-c", "core.autocrlf=false", "archive", "HEAD"))) as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.10.11 has none yet
            archive.extractall(folder)
        for name_of_file in TEMPLATE:
            (folder / name_of_file).unlink()
        if not examples:
            leave_out_tutorial(folder)
        for path, text in text_files(folder):
            write(path, without("new_project", text) if path.suffix == ".md" else text.replace("  # tutorial\n", "\n"))
        rename(folder, name)
        make_its_own(folder, name, commit)
        git("init", "--quiet", "--initial-branch", "main", cwd=folder)
        git("add", "--all", "--force", cwd=folder)
        git("commit", "--quiet", "--message", f"Start from the lit-nn template at {commit}", cwd=folder)
        if dest.exists():
            dest.rmdir()
        folder.rename(dest)


def main() -> None:
    """Read the command line and make the project."""
    parser = CommandParser("new_project", "Start a project of your own: a copy of this template under your own name.")
    parser.add_argument("name", metavar="NAME", help="of your package, for instance my_flowers")
    parser.add_argument("--dest", type=Path, required=True, metavar="DIR", help="a folder that is new or empty")
    parser.add_argument(
        "--examples", choices=["keep", "remove"], default="keep", help="what only follows the tutorials [keep]"
    )
    options = parser.parse_args()
    dest = options.dest.resolve()
    new_project(options.name, dest, options.examples == "keep")
    longer = len(options.name) > len("lit_nn")
    print(
        f"{dest}: package {options.name}, one commit.\nNext:\n  cd {options.dest}\n  make train\n  make test"
        + ("\n  make format    # breaks the lines that the longer name has made too long" if longer else "")
    )


if __name__ == "__main__":
    sys.exit(run(main))
