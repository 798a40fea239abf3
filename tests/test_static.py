"""What another system than Linux stumbles over, found by reading the source."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

import pytest

ROOT = Path(__file__).parent.parent
POSIX_ONLY = {  # missing on Windows, something else there, or not allowed to everybody
    *("os.fork", "os.geteuid", "os.getuid", "os.kill", "os.killpg", "os.mkfifo", "os.setsid", "os.symlink"),
    *("signal.SIGALRM", "signal.SIGHUP", "signal.SIGKILL", "signal.SIGSTOP", "signal.SIGUSR1", "signal.SIGUSR2"),
}
POSIX_METHODS = {"send_signal", "symlink_to"}
POSIX_MODULES = {"fcntl", "pty", "pwd", "resource", "termios"}


def sources(*folders: str) -> dict[str, ast.Module]:
    paths = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def posix_uses(tree: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) if name in POSIX_METHODS or ast.unparse(node) in POSIX_ONLY:
                yield node
            case ast.Import(names=[ast.alias(name=name)]) if name in POSIX_MODULES:
                yield node
            case ast.Call(args=[ast.List(elts=[ast.Constant(value="bash" | "sh"), *_]), *_]):
                yield node


def names(function: ast.FunctionDef) -> set[str]:
    used = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    return used | {argument.arg for argument in function.args.args}


def test_only_tests_with_the_mark_posix_use_what_only_posix_has() -> None:
    """Directly, or through a helper or a fixture; and no file needs it to be imported."""
    helpers: set[str] = set()  # the functions of other files that use it
    wrong = []
    for file, tree in sorted(sources("tests").items(), key=lambda item: "/test_" in item[0]):  # helpers first
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        lines = [*tree.body, *(line for node in classes for line in node.body)]
        functions = [line for line in lines if isinstance(line, ast.FunctionDef)]
        inside = {id(node) for function in functions for line in function.body for node in ast.walk(line)}
        wrong += [f"{file}:{use.lineno}: {ast.unparse(use)}" for use in posix_uses(tree) if id(use) not in inside]
        users = helpers - {function.name for function in functions}
        users |= {function.name for function in functions if any(posix_uses(function))}
        while more := {function.name for function in functions if names(function) & users} - users:
            users |= more
        if "/test_" not in file:
            helpers |= users
        elif "pytestmark = pytest.mark.posix" not in map(ast.unparse, tree.body):
            tests = [node for node in functions if node.name.startswith("test_") and node.name in users]
            unmarked = (test for test in tests if "mark.posix" not in " ".join(map(ast.unparse, test.decorator_list)))
            wrong += [f"{file}:{test.lineno}: {test.name} needs the mark" for test in unmarked]
    assert wrong == []


def test_the_product_says_in_which_encoding_it_reads_and_writes_text() -> None:
    missing = []
    for file, tree in sources("lit_nn", "data_modules", "scripts").items():
        imports = (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))
        imported = {name.asname or name.name for node in imports for name in node.names}  # os, Image, gzip: no text
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            match node.func:
                case ast.Name(id="open"):
                    mode = node.args[1:2]
                case ast.Attribute(attr="open", value=owner) if ast.unparse(owner) not in imported:
                    mode = node.args[:1]
                case ast.Attribute(attr="read_text" | "write_text"):
                    mode = []
                case _ if given.get("text") == "True":  # subprocess
                    mode = []
                case _:
                    continue
            if "encoding" not in given and "b" not in "".join([*map(ast.unparse, mode), given.get("mode", "")]):
                missing.append(f"{file}:{node.lineno}: {ast.unparse(node)}")
    assert missing == []


def test_every_checkout_has_the_line_ends_of_unix() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    listed = subprocess.run(["git", "ls-files", "--eol"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    assert [line for line in listed.stdout.splitlines() if " w/crlf " in line or " w/mixed " in line] == []


def test_no_order_of_files_depends_on_the_system() -> None:
    listed = ["Bee", "Zebra", "ant", "cat"]
    assert [path.name for path in sorted(map(PureWindowsPath, listed))] != listed  # what a key prevents
    unkeyed = [
        f"{file}:{node.lineno}: {ast.unparse(node)}"
        for file, tree in sources("lit_nn", "data_modules", "scripts").items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("sorted", "min", "max") and not node.keywords
        if any(name in ast.unparse(node.args[0]) for name in (".iterdir(", "folder.glob(", ".rglob("))  # Paths
    ]
    assert unkeyed == []
