"""Several processes are one run: the same numbers, one voice, and an end when one of them dies."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Patch, Said, images_in, noise, rows_of, script
from resume_runs import assert_same_numbers, differences

from lit_nn import load_classifier

pytestmark = pytest.mark.posix
train = script("train")
TRAIN = str(ROOT / "scripts" / "train.py")
CPU = ["--accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
LONG = [*CPU, "--batch_size", "64", "--max_epochs", "200", "--save_every_steps", "5", "--run_dir", "run"]
FEW = ["--trainer.limit_train_batches", "40", "--trainer.limit_val_batches", "2", "--trainer.limit_test_batches", "2"]
SHORT = [*CPU, *FEW, "--batch_size", "8", "--max_epochs", "2", "--save_every_steps", "3", "--augment", "flip,mixup"]
DDP = ["--devices", "2", "--strategy", "ddp"]
LIMIT = 250  # seconds for what takes ten where nothing else runs


def slow(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.slow(pytest.mark.timeout(900)(test))


class Job:
    """Two processes that are one run, by "lightning", "torchrun", or the torchruns of "two machines"."""

    def __init__(self, launcher: str, words: Sequence[str], cwd: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--master-addr", "127.0.0.1", "--master-port", port]
        nodes = [["--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1"] for node in (0, 1)]
        lines = {
            "lightning": [[sys.executable, TRAIN, *words, *DDP]],
            "torchrun": [[*torchrun, "--nproc-per-node", "2", TRAIN, *words]],
            "two machines": [[*torchrun, *node, TRAIN, *words] for node in nodes],
        }[launcher]
        self.log = cwd / f"{time.monotonic_ns()}.log"
        environment = {**os.environ, "LIT_NN_TEST": str(self.log)}
        with self.log.open("ab") as log:
            streams: Any = {"stdout": log, "stderr": log}
            self.processes = [subprocess.Popen(line, cwd=cwd, env=environment, **streams) for line in lines]

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [*(process.pid for process in self.processes), *self.ranks().values()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def wait(self, seconds: float = LIMIT) -> list[int]:
        """Exit statuses of the commands."""
        end = time.monotonic() + seconds
        return [process.wait(max(end - time.monotonic(), 0)) for process in self.processes]

    def ranks(self) -> dict[int, int]:
        """Process number of each rank that is alive."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):  # Linux only
            with contextlib.suppress(OSError):
                texts = [os.fsdecode((folder / name).read_bytes()).split("\0") for name in ("environ", "cmdline")]
                environment = dict(variable.partition("=")[::2] for variable in texts[0])
                if environment.get("LIT_NN_TEST") == str(self.log) and "torch.distributed.run" not in texts[1]:
                    found[int(environment.get("RANK", environment.get("LOCAL_RANK", 0)))] = int(folder.name)
        return found

    def send(self, signum: int, rank: int, run_dir: Path) -> None:
        """Send a signal to one process once the run has saved something."""
        end = time.monotonic() + LIMIT
        while not (run_dir / "checkpoints" / "last.ckpt").exists():
            assert time.monotonic() < end, self.output
            assert any(process.poll() is None for process in self.processes), self.output
            time.sleep(0.1)
        os.kill(self.ranks()[rank], signum)


def finished(launcher: str, words: Sequence[str], cwd: Path) -> str:
    """What a job has printed that has come to a good end."""
    with Job(launcher, words, cwd) as started:
        assert set(started.wait()) == {0}, started.output
        return started.output


def agree(one: Path, other: Path) -> None:
    """Two runs that differ by rounding only: see docs/scale_out.md for what was measured."""
    assert_same_numbers(one, other, rel=1e-4)
    states = [load_classifier(folder / "checkpoints" / "last.ckpt").state_dict() for folder in (one, other)]
    weights = [torch.cat([tensor.double().flatten() for tensor in state.values()]) for state in states]
    assert float((weights[0] - weights[1]).norm() / weights[0].norm()) < 1e-4


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Words for a training on 44 images, 17 to validate and 33 to test: of batches of 8, two processes get 8, 8, 1."""
    images_in(tmp_path / "images", "train/cat", "train/dog", count=22, height=16, width=16, channels=1)
    for number in range(8 + 9 + 16 + 17):
        part, name = ("val", "test")[number >= 17], ("cat", "dog")[number % 2]
        (folder := tmp_path / "images" / part / name).mkdir(parents=True, exist_ok=True)
        noise(5000 + number, 16, 16, 1).save(folder / f"{number}.png")
    data = ["--data", "image_folder", "--data_dir", str(tmp_path / "images")]
    words = [*CPU, *data, "--augment", "flip,translate,brightness_contrast,cutout", "--net", "mlp", "--max_epochs", "2"]
    return [*words, "--optimizer", "momentum", "--schedule", "constant", "--lr", "0.01"]


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("torchrun", "two machines")]


@pytest.mark.parametrize("launcher", ["lightning", *OTHERS])
def test_two_processes_train_validate_and_test_like_one(launcher: str, small: list[str], tmp_path: Path) -> None:
    output = finished(launcher, [*small, "--batch_size", "2", "--run_dir", "two"], tmp_path)
    assert train([*small, "--batch_size", "4", "--run_dir", str(tmp_path / "one")]) == 0
    agree(tmp_path / "one", tmp_path / "two")
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"cache", "images", "one", "two"}
    for once in ("Run folder: two", "Starting with 2 processes", "mlp ("):
        assert output.count(once) == 1, output


@slow
def test_two_processes_evaluate_and_predict_a_checkpoint_like_one(small: list[str], tmp_path: Path) -> None:
    assert train([*small, "--batch_size", "2", "--run_dir", str(tmp_path / "run")]) == 0
    words = ["--accelerator", "cpu", "--batch_size", "2", "--ckpt_path", str(tmp_path / "run/checkpoints/best.ckpt")]
    found: list[dict[str, float]] = []
    for name, devices in (("one", []), ("two", DDP)):
        found.append({})
        for stage in (["predict", "--run_dir", str(tmp_path / name)], ["test"]):
            line = [sys.executable, "-m", "lit_nn", *stage, *words, *devices]
            done = subprocess.run(line, check=True, timeout=LIMIT, capture_output=True, encoding="utf-8")
            found[-1] |= {key: float(value) for key, value in re.findall(r"(test_\w+)\W+([\d.]+)", done.stdout)}
        rows = rows_of(tmp_path / name / "predictions.csv")
        found[-1] |= {row["image"] + row["label"]: float(row["probability"]) for row in rows}
    assert found[0] == pytest.approx(found[1], abs=2e-6)
    assert len(found[0]) == 33 + 4  # loss, accuracy, balanced accuracy, F1


@slow
def test_two_processes_become_one_and_two_again_inside_an_epoch(tmp_path: Path) -> None:
    words = [*CPU, "--max_epochs", "2", "--trainer.limit_train_batches", "60", "--optimizer", "momentum"]
    words += ["--schedule", "constant", "--lr", "0.01", "--augment", "translate", "--ema", "0.9"]
    assert train([*words, "--batch_size", "32", "--run_dir", str(tmp_path / "one")]) == 0
    finished("lightning", [*words, "--batch_size", "16", "--run_dir", "two", "--trainer.max_steps", "25"], tmp_path)
    alone = ["--devices", "1", "--strategy", "auto", "--batch_size", "32", "--trainer.max_steps", "80"]
    assert train(["--resume", str(tmp_path / "two"), *alone]) == 0
    again = ["--resume", "two", *DDP, "--batch_size", "16", "--trainer.max_steps", "-1"]
    output = finished("torchrun", again, tmp_path)
    assert "It had 1 processes, now 2: not the same numbers to the last bit" in output
    assert "starts again" not in output
    agree(tmp_path / "one", tmp_path / "two")


# --- one voice, and an end --------------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize(
    ("launcher", "words", "message"),
    [
        ("torchrun", ["--devices", "3"], "You set `devices=3` .* does not match the world size"),
        ("torchrun", ["--seed", "true"], "--seed is True"),
        ("torchrun", ["--data", "image_folder", "--data_dir", "nowhere"], "nowhere is not a folder"),
        ("two machines", ["--run_dir", "taken"], "taken holds another run"),
    ],
)
def test_a_mistake_is_said_once_and_ends_all(launcher: str, words: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.yaml").write_text("seed_everything: 1\n")
    with Job(launcher, [*CPU, *words], tmp_path) as started:
        assert set(started.wait()) == {1}  # torchrun's own
        said = re.findall("^error: .*", started.output, re.MULTILINE)
        assert [bool(re.search(message, line)) for line in said] == [True], started.output
        assert "lit_nn/" not in started.output  # no traceback of ours


@slow
@pytest.mark.parametrize("launcher", ["lightning", "two machines"])
def test_a_signal_to_any_process_stops_all_and_is_said_once(launcher: str, tmp_path: Path) -> None:
    with Job(launcher, LONG, tmp_path) as started:
        started.send(signal.SIGUSR1, 1, tmp_path / "run")
        assert started.wait(60)[0] == (128 + signal.SIGUSR1 if launcher == "lightning" else 1), started.output
        assert started.output.count("Stopped. To continue") == 1
        assert "has died" not in started.output


@slow
@pytest.mark.parametrize(("launcher", "victim"), [("lightning", 0), ("torchrun", 1), ("two machines", 0)])
def test_kill_9_of_one_ends_all_and_is_said(launcher: str, victim: int, tmp_path: Path) -> None:
    with Job(launcher, LONG, tmp_path) as started:
        started.send(signal.SIGKILL, victim, tmp_path / "run")
        end = time.monotonic() + 60
        assert 0 not in started.wait(60)
        while started.ranks():  # of Lightning's, the other one outlives the command by a moment
            assert time.monotonic() < end, started.output
            time.sleep(0.1)
        assert started.output.count("another process of this run has died") == 1, started.output
        assert "scripts/train.py --resume run" in started.output
        assert "lit_nn/" not in started.output  # no traceback of ours


# --- SLURM, FSDP ------------------------------------------------------------------------------------------------------


@slow
def test_a_slurm_job_saves_requeues_itself_and_goes_on(tmp_path: Path, monkeypatch: Patch) -> None:
    """With commands that are named like SLURM's, in the place of the real ones."""
    for name in ("sbatch", "srun", "scontrol"):
        (tmp_path / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/fake_slurm.py" {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    run = str(tmp_path / "run")
    for variable, value in (("FAKE_SLURM", str(tmp_path)), ("PYTHON", sys.executable), ("RUN_DIR", run)):
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    line = ["sbatch", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "scripts/slurm/train.sbatch", *SHORT]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=LIMIT, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    for text, times in (("job 4217 starts", 2), ("SIGUSR1: saving", 1), (f"--resume {run}", 1), ("Continuing", 1)):
        assert output.count(text) == times, output
    finished("lightning", [*SHORT, "--run_dir", "straight"], tmp_path)
    assert differences(tmp_path / "straight", tmp_path / "run") == []


@pytest.mark.gpu
def test_fsdp_trains_like_one_gpu_and_its_checkpoints_are_plain(tmp_path: Path, capfd: Said) -> None:
    words = [*CPU[2:], "--accelerator", "gpu", "--net", "mlp", "--schedule", "constant", "--lr", "0.001"]
    devices = torch.cuda.device_count()
    fsdp = ["--strategy", "fsdp", "--devices", str(devices), "--batch_size", "32"]
    one = ["--strategy", "auto", "--devices", "1", "--batch_size", str(32 * devices)]
    runs = [(one, "--run_dir", "one", 3), (fsdp, "--run_dir", "fsdp", 1), (fsdp, "--resume", "fsdp", 2)]
    for how, option, folder, epochs in [*runs, (one, "--resume", "fsdp", 3)]:
        line = [sys.executable, TRAIN, *words, *how, option, folder, "--max_epochs", str(epochs)]
        subprocess.run(line, cwd=tmp_path, check=True, timeout=LIMIT)
    tables = [rows_of(tmp_path / folder / "metrics.csv") for folder in ("one", "fsdp")]
    losses = [[float(row["val_loss"]) for row in table] for table in tables]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    for refused in (["--ema", "0.9"], ["--clip_grad", "1"], ["--resume", str(tmp_path / "one"), "--max_epochs", "4"]):
        assert train([*words, *fsdp, *refused]) == 2
        assert "--strategy fsdp" in capfd.readouterr().err
