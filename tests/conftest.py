"""What all tests share: no network, one thread per worker, and the commands as a user types them."""

import contextlib
import csv
import functools
import importlib.util
import os
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts its threads: the workers share the cores
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what lightning calls
os.environ.setdefault("DISABLE_MPS", "1")  # a Mac gets the tests that all others get
os.environ.setdefault("PYTHONUTF8", "1")  # for the children: Windows would print in another encoding

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "scripts" / "train.py"
GUARD = ROOT / "tests" / "guard"

runpy.run_path(str(GUARD / "sitecustomize.py"))  # this process
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(GUARD), os.environ.get("PYTHONPATH")]))  # its children

Command = Callable[..., subprocess.CompletedProcess[str]]
Process = subprocess.Popen[str]
Start = Callable[..., Process]
Refused = Callable[..., str]
Patch = pytest.MonkeyPatch
Said = pytest.CaptureFixture[str]


@functools.cache
def script(name: str) -> Callable[..., int]:
    """The ``main`` of scripts/NAME.py: takes the words of a command line, gives the exit status."""
    spec = importlib.util.spec_from_file_location(f"scripts.{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


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
        return subprocess.run(line, cwd=cwd, capture_output=True, encoding="utf-8", timeout=timeout, check=False)

    return run


def patched(change: str) -> list[str]:
    """The first words of a Python command line that trains, with something changed before."""
    return ["-c", f"import runpy, signal; {change}; runpy.run_path({str(TRAIN)!r}, run_name='__main__')"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start scripts/NAME.py in an empty folder; whatever it starts itself ends with the test.

    ``ended(start("train", "--net", "mlp"))``
    """
    started: list[Process] = []

    def run(name: str, *words: str | Path) -> Process:
        line = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, words)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(line, cwd=tmp_path, start_new_session=True, **pipes))
        return started[-1]

    yield run
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def ended(process: Process, status: int = 0) -> str:
    """What a command has printed until it ended."""
    output = process.communicate(timeout=900)[0]
    assert process.returncode == status, output
    assert "Traceback" not in output
    return output


def wait_until(condition: Callable[[], object], process: Process) -> None:
    """Wait while a command does its work, which must not end before."""
    end = time.monotonic() + 280
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture
def refused(capsys: Said) -> Refused:
    """Run the ``main`` of a command that must end in one message, on the last line; gives the message."""

    def run(main: Callable[..., int], words: Sequence[str], *status: int) -> str:
        assert main([*words]) in (status or (2,)), words
        lines = capsys.readouterr().err.strip().splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
        return lines[-1]

    return run


def noise(seed: int = 0, height: int = 8, width: int = 8, channels: int = 3) -> Image.Image:
    """An image of its own for each seed."""
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(levels.squeeze(2) if channels == 1 else levels)


def images_in(folder: Path, *classes: str, count: int = 10, **size: int) -> Path:
    """Different images of `noise` in a folder for each class, which may be several deep."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            noise(1000 * label + number, **size).save(folder / name / f"{number:02}.png")
    return folder


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is so large."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rest = (ROOT / "docs" / "images" / "boot.png").read_bytes()[33:]
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + rest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: Patch) -> Path:
    """Where a test keeps its decoded images, once there are some."""
    monkeypatch.setenv("LIT_NN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rows_of(table: Path) -> list[dict[str, str]]:
    """The rows of a table.csv."""
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands of the pages speak of: pictures, a table, a YAML file; see also `run`."""
    folder = tmp_path_factory.mktemp("project")
    for seed in range(40):
        path = folder / "my_pictures" / ("cat", "dog")[seed % 2] / f"p{seed // 8}_{seed // 2}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(seed, 40, 50).save(path)
    pictures = sorted((folder / "my_pictures").rglob("*.jpg"))
    rows = [f"{path.parent.name}/{path.name},{path.parent.name},{path.name[:2]}\n" for path in pictures]
    (folder / "labels.csv").write_text("file,label,patient\n" + "".join(rows), encoding="utf-8")
    several = [row.replace(",dog", ",dog|big").replace(",p0", ",") for row in rows]  # and a column that is not used
    (folder / "several.csv").write_text("file,label,patient\n" + "".join(several), encoding="utf-8")
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copytree(ROOT / "docs" / "images", folder / "docs" / "images")
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    (folder / "mine.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def run(project: Path) -> Path:
    """The finished and exported run that some of the commands start from; others start from its copy, runs/photos."""
    folder = project / "runs" / "mine"
    quick = ["--max_epochs", "1", "--accelerator", "cpu", "--trainer.logger", "false"]
    assert script("train")([*quick, "--run_dir", str(folder)]) == 0
    assert script("export")(["--format", "onnx", str(folder / "checkpoints" / "best.ckpt")]) == 0
    shutil.copytree(folder, folder.with_name("photos"))
    return folder


@pytest.fixture(autouse=True)
def as_before(request: pytest.FixtureRequest, monkeypatch: Patch) -> Iterator[None]:
    """Whatever a test on a GPU asks of torch ends with it."""
    if not request.node.get_closest_marker("gpu"):
        yield
        return
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # Lightning sets it for good
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests skip themselves where they cannot run."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU here"))
        if item.get_closest_marker("posix") and sys.platform == "win32":
            item.add_marker(pytest.mark.skip(reason="Windows knows no such thing"))
