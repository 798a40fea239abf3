"""What another system than Linux stumbles over, found by reading the source."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

POSIX = (  # missing on Windows, something else there, or not allowed to everybody
    r"\bos\.(fork|geteuid|getuid|kill|killpg|mkfifo|setsid|symlink)\b|\bsignal\.SIG(ALRM|HUP|KILL|STOP|USR\d)\b"
    r"|\.(send_signal|symlink_to)\(|: Start\b|\bimport (fcntl|pty|pwd|resource|termios)\b|\[\"(ba)?sh\""
)


def lines_of(*folders: str) -> Iterator[tuple[str, str]]:
    """Place and text of every line of code in some folders."""
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            yield f"{path.relative_to(ROOT)}:{number}", line


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda path: path.stem)
def test_only_tests_with_the_mark_posix_use_what_only_posix_has(path: Path) -> None:
    """In themselves, or through a helper or a fixture beside them; and no file needs it to be imported."""
    blocks = path.read_text(encoding="utf-8").split("\n\n\n")  # one is a function, or lines between two
    if any("pytestmark = pytest.mark.posix" in block for block in blocks):
        return
    pattern, before = POSIX, ""
    while pattern != before:
        users, before = [block for block in blocks if re.search(pattern, block)], pattern
        helpers = re.findall(r"^def (?!test_)(\w+)", "\n".join(users), re.MULTILINE)
        pattern = "|".join([POSIX, *(rf"\b{name}[(:]" for name in helpers)])
    assert [block for block in users if "def test_" in block and "mark.posix" not in block] == []
    assert not re.search(rf"^\S.*({POSIX})", blocks[0], re.MULTILINE)


def test_the_product_says_in_which_encoding_it_reads_and_writes_text() -> None:
    product = ("lit_nn", "data_modules", "scripts")
    words = ["ruff", "check", "--isolated", "--preview", "--select", "PLW1514", *product]
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [
        place for place, line in lines_of(*product) if "text=True" in line
    ] == []  # subprocess, of which ruff knows nothing


def test_every_checkout_has_the_line_ends_of_unix() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    listed = subprocess.run(["git", "ls-files", "--eol"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    assert [line for line in listed.stdout.splitlines() if " w/crlf " in line or " w/mixed " in line] == []


def test_no_order_of_files_depends_on_the_system() -> None:
    """Windows sorts paths without looking at capitals, unless a key is given."""
    unkeyed = r"\b(sorted|min|max)\((?!.*key=).*(\.iterdir|folder\.glob|\.rglob)\("  # glob.glob gives names
    assert [place for place, line in lines_of("lit_nn", "data_modules", "scripts") if re.search(unkeyed, line)] == []
