"""Several processes are one run: the same numbers, one voice, and an end when one of them dies."""

import contextlib
import csv
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from resume_runs import differences, load, rows

from data_modules.augment import AUGMENTATIONS
from lit_nn import LitClassifier, distributed, load_classifier
from lit_nn.commands import train
from lit_nn.nets import NETS

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
TRAIN = str(ROOT / "scripts" / "train.py")
CPU = ["--accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
LONG = [*CPU, "--net", "lenet", "--batch_size", "64", "--max_epochs", "200", "--save_every_steps", "5"]
SHORT = [
    *("--net", "lenet", "--batch_size", "8", "--max_epochs", "2", "--save_every_steps", "3"),
    *("--trainer.limit_train_batches", "40", "--trainer.limit_val_batches", "2", "--trainer.limit_test_batches", "2"),
]
DDP = ["--devices", "2", "--strategy", "ddp"]
LIMIT = 250  # seconds for what takes ten where nothing else runs


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def command_lines(launcher: str, words: Sequence[str | Path], script: str = TRAIN) -> list[list[str]]:
    """The commands that start two processes: one command for each "machine"."""
    line = [script, *map(str, words)]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        free_port(),
    ]
    if launcher == "lightning":
        return [[sys.executable, *line, *DDP]]
    if launcher == "torchrun":
        return [[*torchrun, "--nproc-per-node", "2", *line]]
    assert launcher == "two machines"
    nodes = [[*torchrun, "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1"] for node in (0, 1)]
    return [[*node, *line] for node in nodes]


class Job:
    """Processes that were started together, and ended together at the latest when the test ends."""

    def __init__(self, launcher: str, words: Sequence[str | Path], cwd: Path, script: str = TRAIN) -> None:
        self.mark = f"LIT_NN_TEST={os.getpid()}-{time.monotonic_ns()}"
        name, _, value = self.mark.partition("=")
        self.outputs = [cwd / f"{value}-{node}.log" for node in range(2)]
        self.processes = []
        for line, output in zip(command_lines(launcher, words, script), self.outputs, strict=False):
            with output.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        line,
                        cwd=cwd,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, name: value},
                        start_new_session=True,
                    )
                )

    def wait(self, seconds: float = LIMIT) -> list[int]:
        """Exit statuses of the commands."""
        end = time.monotonic() + seconds
        return [process.wait(max(end - time.monotonic(), 0)) for process in self.processes]

    @property
    def output(self) -> str:
        """What all of them have printed."""
        return "".join(path.read_text() for path in self.outputs if path.exists())

    def ranks(self) -> dict[int, int]:
        """Process number of each rank that is alive."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = os.fsdecode((folder / "cmdline").read_bytes()).split("\0")
                variables = os.fsdecode((folder / "environ").read_bytes()).split("\0")
                if self.mark in variables and "torch.distributed.run" not in words and "train.py" in " ".join(words):
                    environment = dict(variable.partition("=")[::2] for variable in variables)
                    found[int(environment.get("RANK", environment.get("LOCAL_RANK", 0)))] = int(folder.name)
        return found

    def end(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for pid in self.ranks().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()


@contextlib.contextmanager
def job(launcher: str, words: Sequence[str | Path], cwd: Path, script: str = TRAIN) -> Iterator[Job]:
    started = Job(launcher, words, cwd, script)
    try:
        yield started
    finally:
        started.end()


def finished(launcher: str, words: Sequence[str | Path], cwd: Path, script: str = TRAIN) -> str:
    """What a job has printed that has come to a good end."""
    with job(launcher, words, cwd, script) as started:
        assert set(started.wait()) == {0}, started.output
        return started.output


def wait_until(condition: Any, job: Job) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, job.output
        assert any(process.poll() is None for process in job.processes), job.output
        time.sleep(0.1)


def has_saved(folder: Path) -> Any:
    return (folder / "checkpoints" / "last.ckpt").exists


def weights(folder: Path, name: str = "last") -> torch.Tensor:
    """All weights of a checkpoint in one row; it loads in this one process."""
    path = folder / "checkpoints" / f"{name}.ckpt"
    load_classifier(path)
    state = torch.load(path, weights_only=True)["state_dict"]
    return torch.cat([tensor.double().flatten() for tensor in state.values()])


def agree(one: Path, other: Path) -> None:
    """Two runs that differ by rounding only: see docs/scale_out.md for what was measured."""
    for first, second in zip(rows(one), rows(other), strict=True):
        assert first.keys() == second.keys()
        for name in first:
            assert float(first[name]) == pytest.approx(float(second[name]), rel=1e-4), name
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    for name in ("test_acc", "test_loss", "val_acc"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-4), name
    difference = weights(one) - weights(other)
    assert float(difference.norm() / weights(one).norm()) < 1e-4


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """44 pictures to train on, 17 to validate and 33 to test: two processes of batches of 8 get 8, 8, 1 and 8, 8, 0."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for split, counts in {"train": (22, 22), "val": (8, 9), "test": (16, 17)}.items():
        for name, count in zip(("cat", "dog"), counts, strict=True):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (16, 16), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


@pytest.fixture
def small(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Words for a training on them, with a cache that is yet to be built."""
    monkeypatch.setenv("LIT_NN_CACHE", str(tmp_path / "cache"))
    augment = ",".join(name for name in AUGMENTATIONS if "mix" not in name)
    words = [*CPU, "--data", "image_folder", "--data_dir", str(pictures), "--augment", augment, "--net", "mlp"]
    return [*words, "--max_epochs", "2", "--optimizer", "momentum", "--schedule", "constant", "--lr", "0.01"]


def test_two_processes_train_validate_and_test_like_one(small: list[str], tmp_path: Path) -> None:
    output = finished("lightning", [*small, "--batch_size", "2", "--run_dir", "two"], tmp_path)
    assert train([*small, "--batch_size", "4", "--run_dir", str(tmp_path / "one")]) == 0
    agree(tmp_path / "one", tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["cache", "one", "two"]
    assert output.count("decoding: 100%") == 1
    assert output.count("Run folder: two") == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", ["torchrun", "two machines"])
def test_torchrun_trains_like_one_process(launcher: str, small: list[str], tmp_path: Path) -> None:
    output = finished(launcher, [*small, "--batch_size", "2", "--run_dir", "two"], tmp_path)
    assert train([*small, "--batch_size", "4", "--run_dir", str(tmp_path / "one")]) == 0
    agree(tmp_path / "one", tmp_path / "two")
    assert "decoding: 100%" in output
    for once in ("training on", "pictures [", "Run folder: two", "Starting with 2 processes", "Seed set to"):
        assert output.count(once) <= 1, output


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_evaluate_and_predict_a_checkpoint_like_one(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train([*small, "--batch_size", "2", "--run_dir", str(tmp_path / "run")]) == 0
    data = [*small[2:10], "--accelerator", "cpu", "--batch_size", "2"]
    words = [*data, "--ckpt_path", str(tmp_path / "run" / "checkpoints" / "best.ckpt")]
    for name, devices in (("one", []), ("two", DDP)):
        where = ["--run_dir", str(tmp_path / name)]
        line = [sys.executable, "-m", "lit_nn", "predict", *words, *devices, *where]
        subprocess.run(line, check=True, timeout=LIMIT)
    tables = [list(csv.DictReader((tmp_path / name / "predictions.csv").open())) for name in ("one", "two")]
    assert len(tables[0]) == 33
    for first, second in zip(*tables, strict=True):
        assert (first["image"], first["label"]) == (second["image"], second["label"])
        assert float(first["probability"]) == pytest.approx(float(second["probability"]), abs=2e-6)
    metrics = []
    for devices in ([], DDP):
        line = [sys.executable, "-m", "lit_nn", "test", *words, *devices]
        done = subprocess.run(line, check=True, timeout=LIMIT, capture_output=True, text=True)
        found = re.findall(r"(test_\w+)\W+([\d.]+)", done.stdout)
        metrics.append({name: float(value) for name, value in found})
        assert len(found) == 2, done.stdout
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-6)


@pytest.mark.parametrize("net", NETS)
def test_a_process_without_an_image_goes_through_the_network_all_the_same(net: str) -> None:
    classifier = LitClassifier(["a", "b"], (1, 28, 28), [0.5], [0.5], net=net).eval()
    batch = torch.zeros(0, 1, 28, 28, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
    with torch.no_grad():
        classifier.test_step(batch, 0)
        assert classifier.predict_step(batch, 0).shape == (0, 2)
    assert classifier.test_metrics.recent() == {}


# --- one voice --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--strategy", "fsdp"], ["fsdp", "GPU"]),
        (["--strategy", "ddp", "--sync_batchnorm"], ["--sync_batchnorm", "GPU", "leave it out"]),
    ],
)
def test_what_needs_gpus_is_refused_without(
    words: list[str], named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(["--accelerator", "cpu", "--devices", "2", *words]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    for word in named:
        assert word in message


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", ["torchrun", "two machines"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nett", "lenet"], "unknown option 'nett'"),
        (["--devices", "3"], "You set `devices=3` .* does not match the world size"),
        (["--data", "image_folder", "--data_dir", "nowhere"], "nowhere is not a folder"),
        (["--run_dir", "taken"], "taken holds another run"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_mistake_is_said_once_and_ends_all(launcher: str, words: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.yaml").write_text("seed_everything: 1\n")
    with job(launcher, [*CPU, *words], tmp_path) as started:
        assert set(started.wait()) == {1}  # torchrun's own
        assert started.output.count("error: ") == 1, started.output
        assert re.search(f"^error: {message}", started.output, re.MULTILINE), started.output
        assert "lit_nn/" not in started.output.replace(str(tmp_path), "")  # no traceback of ours
        assert started.ranks() == {}


@pytest.mark.slow
@pytest.mark.timeout(900)
@LINUX
@pytest.mark.parametrize("launcher", ["lightning", "torchrun", "two machines"])
def test_a_signal_to_any_process_stops_all_and_is_said_once(launcher: str, tmp_path: Path) -> None:
    with job(launcher, [*LONG, "--run_dir", "run"], tmp_path) as started:
        wait_until(has_saved(tmp_path / "run"), started)
        os.kill(started.ranks()[1], signal.SIGUSR1)
        statuses = started.wait()
        assert statuses[0] == (128 + signal.SIGUSR1 if launcher == "lightning" else 1), started.output
        assert started.output.count("Stopped. To continue") == 1
        assert "has died" not in started.output


def test_a_port_that_is_taken_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        assert train([*CPU, *DDP, "--fast_dev_run"]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"error: rank 0 (process {os.getpid()}")
    assert f"cannot listen at 127.0.0.1:{port}" in message


# --- an end when one dies ---------------------------------------------------------------------------------------------


def test_who_hangs_up_has_died_but_not_a_stranger(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(distributed, "_exit", ended.append)
    numbers = {"global_rank": 0, "local_rank": 0, "node_rank": 0, "world_size": 3}
    place = {"main_address": "127.0.0.1", "main_port": int(free_port()), "creates_processes_externally": False}
    environment: Any = SimpleNamespace(**{name: lambda n=n: n for name, n in numbers.items()}, **place)
    first = distributed.Lifeline(environment)
    address = ("127.0.0.1", int(first._store.get("first").split()[0]))
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b"rank 2 (process 8 on node2)\n\0", b"rank 1 (process 7 on node2)\n"):
        assert ended == []
        with socket.create_connection(address) as connection:
            connection.sendall(words)
    while not ended:
        time.sleep(0.01)
    assert ended == [1]
    assert capsys.readouterr().err.strip().startswith("error: rank 1 (process 7 on node2) has died")


@pytest.mark.slow
@pytest.mark.timeout(900)
@LINUX
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("launcher", ["lightning", "torchrun", "two machines"])
def test_kill_9_of_one_ends_all_with_one_message(launcher: str, victim: int, tmp_path: Path) -> None:
    with job(launcher, [*LONG, "--run_dir", "run"], tmp_path) as started:
        wait_until(has_saved(tmp_path / "run"), started)
        pids = started.ranks()
        assert sorted(pids) == [0, 1]
        os.kill(pids[victim], signal.SIGKILL)
        statuses = started.wait(60)
        assert statuses[0] == (-signal.SIGKILL if launcher == "lightning" and victim == 0 else 1)
        wait_until(lambda: started.ranks() == {}, started) if any(started.ranks()) else None
        output = started.output
    named = f"rank {victim} (process {pids[victim]}"
    assert output.count("has died") == 1, output
    assert named in output
    assert "scripts/train.py --resume run" in output
    assert "lit_nn/" not in output  # no traceback of ours


@pytest.mark.slow
@pytest.mark.timeout(900)
@LINUX
def test_two_processes_killed_and_continued_are_the_same_run(tmp_path: Path) -> None:
    words = [*CPU, *SHORT, "--augment", "flip,mixup", "--ema", "0.9"]
    finished("lightning", [*words, "--run_dir", "straight"], tmp_path)
    with job("lightning", [*words, "--run_dir", "killed"], tmp_path) as started:
        wait_until(has_saved(tmp_path / "killed"), started)
        os.kill(started.ranks()[1], signal.SIGKILL)
        assert started.wait(60) == [1]
    line = re.search(r"To continue: python scripts/train.py (.*)", started.output)
    assert line
    assert rows_or_none(tmp_path / "killed") < 2
    finished("lightning", shlex.split(line[1]), tmp_path)
    assert differences(tmp_path / "straight", tmp_path / "killed") == []


def rows_or_none(folder: Path) -> int:
    return len(rows(folder)) if (folder / "metrics.csv").exists() else 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@LINUX
def test_one_process_goes_on_in_the_middle_of_an_epoch_of_two(tmp_path: Path) -> None:
    words = [*CPU, "--net", "lenet", "--max_epochs", "2", "--trainer.limit_train_batches", "60"]
    words += ["--optimizer", "momentum", "--lr", "0.01"]
    assert train([*words, "--batch_size", "32", "--run_dir", str(tmp_path / "one")]) == 0
    with job("lightning", [*words, "--batch_size", "16", "--run_dir", "two"], tmp_path) as started:
        wait_until(lambda: (tmp_path / "two" / "config.yaml").exists(), started)
        pid = started.processes[0].pid
        wait_until(lambda: handles(pid, signal.SIGTERM), started)
        os.kill(pid, signal.SIGTERM)
        assert started.wait() == [128 + signal.SIGTERM], started.output
    step = load(tmp_path / "two" / "checkpoints" / "last.ckpt")["global_step"]
    assert step % 60
    line = [sys.executable, TRAIN, "--resume", "two", "--devices", "1", "--strategy", "auto", "--batch_size", "32"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT, check=True)
    assert "It had 2 processes, now 1: not the same numbers to the last bit" in done.stdout
    assert "starts again" not in done.stdout
    agree(tmp_path / "one", tmp_path / "two")


def handles(pid: int, signum: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    status = (Path("/proc") / str(pid) / "status").read_text()
    caught = re.search(r"SigCgt:\s+(\w+)", status)
    return caught is not None and bool(int(caught[1], 16) >> (signum - 1) & 1)


@pytest.mark.slow
@pytest.mark.timeout(900)
@LINUX
def test_all_processes_read_one_memory_map(small: list[str], tmp_path: Path) -> None:
    words = [*small, "--batch_size", "2", "--max_epochs", "5000", "--save_every_steps", "5", "--run_dir", "run"]
    with job("torchrun", words, tmp_path) as started:
        wait_until(has_saved(tmp_path / "run"), started)
        maps = [(Path("/proc") / str(pid) / "maps").read_text() for pid in started.ranks().values()]
        files = [set(re.findall(r"\S+/cache/\S+\.npy", text)) for text in maps]
        assert len(files) == 2
        assert files[0] == files[1] != set()
        assert started.output.count("decoding: 100%") == 1


# --- SLURM ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which commands named like SLURM's put what they know; the real ones are not needed."""
    folder = tmp_path / "slurm"
    (folder / "bin").mkdir(parents=True)
    for name in ("sbatch", "srun", "scontrol"):
        path = folder / "bin" / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/fake_slurm.py" {name} "$@"\n')
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("FAKE_SLURM_SIGNAL_WHEN", str(tmp_path / "run" / "checkpoints" / "last.ckpt"))
    return folder


BATCH_SCRIPT = "scripts/slurm/train.sbatch"


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_the_batch_script_is_one() -> None:
    subprocess.run(["bash", "-n", BATCH_SCRIPT], cwd=ROOT, check=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@LINUX
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_slurm_job_saves_requeues_itself_and_goes_on(nodes: int, slurm: Path, tmp_path: Path) -> None:
    words = [*CPU, *SHORT, "--augment", "flip,mixup"]
    where = [f"--nodes={nodes}", f"--ntasks-per-node={2 // nodes}", "--gpus-per-node=0"]
    done = subprocess.run(
        ["sbatch", *where, BATCH_SCRIPT, *words], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert output.count("job 4217 starts") == 2
    assert output.count("SIGUSR1: saving after this step") == 1
    assert output.count(f"--resume {tmp_path / 'run'}") == 1
    assert output.count("Continuing") == 1
    assert output.count("Run folder") == 1
    assert not list((tmp_path / "run").glob("hpc*"))  # Lightning's own way
    finished("lightning", [*words, "--run_dir", "straight"], tmp_path)
    assert differences(tmp_path / "straight", tmp_path / "run") == []


# --- docs/scale_out.md ------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "scale_out.md").read_text(encoding="utf-8")
COMMANDS = [
    block.replace("\\\n", " ").splitlines()
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    if "fsdp" not in block  # which needs GPUs
]
LITTLE = [
    *("--max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"),
    *("--trainer.limit_test_batches", "1", "--batch_size", "8"),
]


def for_this_machine(line: str, port: str) -> list[str]:
    """A command of the page with two processes in all, on the CPU."""
    devices = "1" if "--nnodes" in line or "--nodes" in line else "2"
    line = (
        line.partition("  #")[0].replace("node1", "127.0.0.1").replace("29500", port).replace("--accelerator gpu", "")
    )
    line = re.sub(r"(--devices |--nproc-per-node |--ntasks-per-node=)\d+", rf"\g<1>{devices}", line)
    line = re.sub(r"--gpus-per-node=\d+", "--gpus-per-node=0", line)
    launchers = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    words = shlex.split(line)
    words = [TRAIN if word == "scripts/train.py" else word for word in words]
    return [*launchers.get(words[0], words[:1]), *words[1:], "--accelerator", "cpu", *LITTLE]


@pytest.mark.slow
@pytest.mark.timeout(900)
@LINUX
@pytest.mark.parametrize("lines", COMMANDS, ids=lambda lines: lines[0][:40])
def test_commands_of_the_page(lines: list[str], slurm: Path, tmp_path: Path) -> None:
    assert all("scripts/" in line for line in lines)
    together = "--nnodes" in lines[0]
    port, running = free_port(), []
    for line in lines:
        cwd = ROOT if "sbatch" in line else tmp_path
        running.append(subprocess.Popen(for_this_machine(line, port), cwd=cwd, stderr=subprocess.PIPE, text=True))
        if not together:
            running[-1].communicate(timeout=LIMIT)
    for process in running:
        if together:
            process.communicate(timeout=LIMIT)
        assert process.returncode == 0
    results = [*tmp_path.rglob("result.json")]
    assert len(results) == (1 if together else len(lines))


# --- FSDP -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_fsdp_trains_like_one_gpu_and_its_checkpoints_are_plain(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    devices = torch.cuda.device_count()
    words = [
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.logger",
        "false",
        "--accelerator",
        "gpu",
        "--net",
        "mlp",
    ]
    words += ["--schedule", "constant", "--lr", "0.001"]
    fsdp = ["--strategy", "fsdp", "--devices", str(devices), "--batch_size", "32"]
    one = ["--strategy", "auto", "--devices", "1", "--batch_size", str(32 * devices)]

    def run(*more: str) -> None:
        subprocess.run([sys.executable, TRAIN, *words, *more], cwd=tmp_path, check=True, timeout=LIMIT)

    run(*one, "--run_dir", "one", "--max_epochs", "2")
    run(*fsdp, "--run_dir", "fsdp", "--max_epochs", "1")
    shutil.copytree(tmp_path / "fsdp", tmp_path / "alone")
    run(*fsdp, "--resume", "fsdp", "--max_epochs", "2")
    run(*one, "--resume", "alone", "--max_epochs", "2")
    for name in ("fsdp", "alone"):
        difference = weights(tmp_path / name) - weights(tmp_path / "one")
        assert float(difference.norm() / weights(tmp_path / "one").norm()) < 1e-2
        assert float(rows(tmp_path / name)[-1]["val_loss"]) == pytest.approx(
            float(rows(tmp_path / "one")[-1]["val_loss"]), rel=1e-2
        )
    resumed = ["--resume", str(tmp_path / "one"), "--max_epochs", "3"]
    for refused in (["--ema", "0.9"], ["--clip_grad", "1"], resumed):
        assert train([*words, *fsdp, *refused]) == 2
        assert "--strategy fsdp" in capfd.readouterr().err
