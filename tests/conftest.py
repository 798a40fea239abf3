"""What all tests share: no network, one thread per worker, and the commands as a user types them."""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts its threads: the workers share the cores
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what lightning calls

import pytest
import torch

ROOT = Path(__file__).parent.parent
GUARD = ROOT / "tests" / "guard"

runpy.run_path(str(GUARD / "sitecustomize.py"))  # this process
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(GUARD), os.environ.get("PYTHONPATH")]))  # its children

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Run a Python command line of the README in a process of its own, in an empty folder.

    ``command("scripts/train.py", "--net", "mlp")`` or ``command("-m", "lit_nn", "fit")``.
    """

    def run(*words: str | Path, timeout: float = 120, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        first = str(ROOT / words[0]) if str(words[0]).startswith("scripts/") else str(words[0])
        line = [sys.executable, first, *map(str, words[1:])]
        return subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need an accelerator skip themselves without one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU here"))
