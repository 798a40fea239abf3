"""What another system than Linux stumbles over, found by reading the source."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

PRODUCT = ("lit_nn", "data_modules", "scripts")


def places_of(pattern: str) -> list[str]:
    """Where a line of the product matches."""
    paths = sorted(path for folder in PRODUCT for path in (ROOT / folder).rglob("*.py"))
    lines = {path: enumerate(path.read_text(encoding="utf-8").splitlines(), 1) for path in paths}
    return [f"{path}:{number}" for path, found in lines.items() for number, line in found if re.search(pattern, line)]


def test_the_product_says_in_which_encoding_it_reads_and_writes_text() -> None:
    words = ["ruff", "check", "--isolated", "--preview", "--select", "PLW1514", *PRODUCT]
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert places_of("text=True") == []  # subprocess, of which ruff knows nothing


def test_every_checkout_has_the_line_ends_of_unix() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    listed = subprocess.run(["git", "ls-files", "--eol"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    assert [line for line in listed.stdout.splitlines() if " w/crlf " in line or " w/mixed " in line] == []


def test_no_order_of_files_depends_on_the_system() -> None:
    """Windows sorts paths without looking at capitals, unless a key is given."""
    unkeyed = r"\b(sorted|min|max)\((?!.*key=).*(\.iterdir|folder\.glob|\.rglob)\("  # glob.glob gives names
    assert places_of(unkeyed) == []
