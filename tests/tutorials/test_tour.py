"""The guided tour runs and shows what it prints."""

from pathlib import Path

from conftest import ROOT
from snippets import run_snippets


def test_tour_prints_what_it_shows(tmp_path: Path) -> None:
    run_snippets(ROOT / "docs" / "tour.md", tmp_path)
