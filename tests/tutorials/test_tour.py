"""The guided tour runs and shows what it prints."""

from pathlib import Path

import pytest
from conftest import ROOT, Patch
from snippets import run_snippets


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tour_prints_what_it_shows(slow: bool, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("LIT_NN_CACHE", str(tmp_path / "cache"))
    run_snippets(ROOT / "docs" / "tour.md", tmp_path, slow)
