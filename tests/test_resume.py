"""Runs that are stopped anywhere and continued: equal to the last bit to those that are not."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, Command
from resume_runs import SMALL, STOPPED, differences, finished, load, rows, stopped_and_continued
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_modules.augment import AUGMENTATIONS
from lit_nn import LitClassifier, load_classifier
from lit_nn.commands import lightning_cli, train
from lit_nn.nets import NETS
from lit_nn.optim import SCHEDULES
from lit_nn.previous import PreviousRun

POSIX = pytest.mark.skipif(os.name != "posix", reason="signals between processes")
DDP = ["--devices", "2", "--strategy", "ddp"]

# --- the table of docs/checkpoints.md --------------------------------------------------------------------------------

NETWORKS = [*NETS, "torchvision/squeezenet1_1"]
ALL_SCHEDULES = [*SCHEDULES, "plateau"]
AUGMENT = ["none", ",".join(AUGMENTATIONS)]
PRECISION = ["32-true", "bf16-mixed"]
EMA = ["null", "0.9"]
INEXACT: set[tuple[str, str]] = set()
INEXACT |= {("conv3d_cnn", "bf16-mixed")}  # two straight runs differ: docs/checkpoints.md says why  # tutorial
CELLS = [
    cell
    for cell in itertools.product(NETWORKS, ALL_SCHEDULES, AUGMENT, PRECISION, EMA)
    if (cell[0], cell[3]) not in INEXACT
]
STOPS = [1, 4, 6]  # in the first epoch, after its last step, in the second epoch


def words_of(net: str, schedule: str, augment: str, precision: str, ema: str) -> list[str]:
    words = ["--net", net, "--schedule", schedule, "--augment", augment, "--precision", precision, "--ema", ema]
    return [*words, "--model.schedule_args.patience", "0"] if schedule == "plateau" else words


def table() -> list[str]:
    """The table as Markdown, a cell for what the slow tests below try."""
    each = len(AUGMENT) * len(PRECISION) * len(EMA)
    tried = Counter((net, schedule) for net, schedule, *_ in CELLS)
    columns = ["network", *ALL_SCHEDULES, "2 processes"]
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    for net in NETWORKS:
        counts = [f"{tried[net, schedule]} of {each}" for schedule in ALL_SCHEDULES]
        lines.append(" | ".join([f"`{net}`", *counts, "exact"]))
    return [f"| {line} |" for line in lines]


def test_the_table_of_the_docs_is_what_the_tests_try() -> None:
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    assert "\n".join(table()) in page


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_every_cell_is_exact(cell: tuple[str, str, str, str, str], tmp_path: Path) -> None:
    words = words_of(*cell)
    straight = finished(words, tmp_path / "straight")
    assert differences(straight, stopped_and_continued(words, tmp_path / "stopped", STOPS)) == []


# --- some of it in every run of the tests ----------------------------------------------------------------------------


@pytest.mark.parametrize("kill", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["signal", "kill"])
@pytest.mark.parametrize(
    "words",
    [
        ["--net", "lenet"],
        ["--net", "lazy_cnn", "--augment", "flip,translate,cutout,mixup"],  # dropout, BatchNorm  # tutorial
        ["--net", "cifar_cnn", "--augment", "flip_alternating,cutmix", "--precision", "bf16-mixed"],  # tutorial
        ["--net", "conv3d_cnn", "--ema", "0.9", "--optimizer", "nesterov", "--clip_grad", "1"],  # tutorial
        [*("--net", "mlp", "--schedule", "plateau", "--model.schedule_args.patience", "0"), "--early_stopping", "5"],
        ["--net", "lenet", "--trainer.accumulate_grad_batches", "2", "--ema", "0.5", "--data.sampling", "balanced"],
        ["--net", "mlp", "--trainer.val_check_interval", "2", "--max_epochs", "3"],
        ["--net", "mlp", "--trainer.check_val_every_n_epoch", "2", "--max_epochs", "3", "--class_weights", "balanced"],
        ["--net", "lazy_cnn", "--ema", "0.9", "--class_weights", "balanced"],  # buffers that are averaged  # tutorial
        ["--net", "mlp", "--trainer.val_check_interval", "4", "--trainer.limit_train_batches", "7"],  # then it stops
    ],
    ids=lambda words: words[1] + "".join(words[2:])[:20],
)
def test_stopped_and_continued_is_the_same_run(words: list[str], kill: bool, tmp_path: Path) -> None:
    words = [*words, "--save_every_steps", "1"] if kill else words
    stops = [1, 3] if "--trainer.accumulate_grad_batches" in words else [2, 4, 6]
    straight = finished(words, tmp_path / "straight")
    assert differences(straight, stopped_and_continued(words, tmp_path / "stopped", stops, kill)) == []


def test_early_stopping_ends_a_continued_run_where_it_would_have(tmp_path: Path) -> None:
    words = ["--net", "mlp", "--lr", "0.5", "--early_stopping", "1", "--max_epochs", "8"]
    straight = finished(words, tmp_path / "straight")
    assert 1 < len(rows(straight)) < 8
    assert differences(straight, stopped_and_continued(words, tmp_path / "stopped", [2])) == []
    assert train(["--resume", str(straight)]) == 0  # it has ended: nothing left to do
    assert not differences(straight, tmp_path / "stopped")


@pytest.mark.parametrize("latest", ["runs/mine", "runs/mnist-mlp/yesterday"])
def test_last_is_the_latest_run_wherever_it_is(latest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/mine", "runs/mnist-mlp/yesterday", "runs/mnist-mlp/before"):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.yaml").write_text("seed_everything: 1\n")
        os.utime(Path(folder) / "config.yaml", (1, 2 if folder == latest else 1))
    assert PreviousRun("last", None, trusted=False).folder == Path(latest)


def start(words: Sequence[str | Path], cwd: Path) -> "subprocess.Popen[str]":
    line = [sys.executable, str(ROOT / "scripts" / "train.py"), *map(str, words)]
    return subprocess.Popen(line, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def saved_steps(folder: Path) -> int:
    path = folder / "checkpoints" / "last.ckpt"
    return int(torch.load(path, weights_only=True)["global_step"]) if path.exists() else 0


def wait_for_step(step: int, folder: Path, process: "subprocess.Popen[str]") -> None:
    while saved_steps(folder) < step and process.poll() is None:
        time.sleep(0.3)


@POSIX
def test_sigterm_and_sigkill_lose_nothing(tmp_path: Path) -> None:
    words = ["--net", "lenet", "--save_every_steps", "3", "--trainer.limit_train_batches", "150"]
    straight = finished(words, tmp_path / "straight")
    folder = tmp_path / "stopped"
    process = start([*SMALL, *words, "--run_dir", folder], tmp_path)
    wait_for_step(30, folder, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == STOPPED, output
    assert "SIGTERM" in output
    command = re.search(r"python scripts/train.py (--resume .*)", output)
    assert command
    moved = folder.rename(tmp_path / "moved")
    process = start(["--resume", moved], tmp_path)
    wait_for_step(saved_steps(moved) + 30, moved, process)
    process.kill()
    process.communicate(timeout=60)
    assert saved_steps(moved) < 300
    assert train(["--resume", str(moved)]) == 0
    assert differences(straight, moved) == []


@POSIX
@pytest.mark.parametrize(
    ("where", "name", "status"),
    [
        ("test", "SIGTERM", -signal.SIGTERM),
        ("train", "SIGINT", 130),
        pytest.param("train", "SIGTERM", -signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("test", "SIGINT", 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_before_or_after_the_training_is_no_success(
    where: str, name: str, status: int, tmp_path: Path, command: Command
) -> None:
    straight, stopped = finished([], tmp_path / "straight"), tmp_path / "stopped"
    program = (
        "import signal, sys; from data_modules import ImageDataModule; from lit_nn.commands import train;"
        f"ImageDataModule.{where}_dataloader = lambda self: signal.raise_signal(signal.{name});"
        "sys.exit(train(sys.argv[1:]))"
    )
    done = command("-c", program, *SMALL, "--run_dir", stopped)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert not (stopped / "result.json").exists()
    assert train(["--resume", str(stopped)]) == 0
    assert differences(straight, stopped) == []


@POSIX
def test_two_processes_stop_together_and_continue_exactly(tmp_path: Path) -> None:
    words = [*SMALL, *DDP, "--net", "resnet9", "--model.net_args.width", "4", "--augment", "mixup", "--ema", "0.9"]
    words += ["--trainer.limit_train_batches", "60", "--save_every_steps", "5"]
    both = [start([*words, "--run_dir", tmp_path / name], tmp_path) for name in ("straight", "stopped")]
    wait_for_step(5, tmp_path / "stopped", both[1])
    both[1].send_signal(signal.SIGTERM)  # to the first process only
    outputs = [process.communicate(timeout=280)[0] for process in both]
    assert both[0].returncode == 0, outputs[0]
    assert both[1].returncode == STOPPED, outputs[1]
    assert len(load(tmp_path / "stopped" / "checkpoints" / "last.ckpt")["processes"]) == 2
    shutil.copytree(tmp_path / "stopped", tmp_path / "alone")
    again = start(["--resume", tmp_path / "stopped"], tmp_path)
    output = again.communicate(timeout=280)[0]
    assert again.returncode == 0, output
    assert differences(tmp_path / "straight", tmp_path / "stopped") == []
    # One process goes on where two were: not to the bit, but with all there is to do.
    assert train(["--resume", str(tmp_path / "alone"), "--devices", "1", "--strategy", "auto"]) == 0
    assert [row["epoch"] for row in rows(tmp_path / "alone")] == ["0", "1"]


@pytest.mark.slow
@POSIX
@pytest.mark.parametrize("net", NETWORKS)
def test_two_processes_are_exact_with_every_network(net: str, tmp_path: Path) -> None:
    words = [*SMALL, *DDP, "--net", net, "--augment", AUGMENT[1], "--save_every_steps", "1", "--ema", "0.9"]
    words += ["--trainer.limit_train_batches", "60"]
    both = [start([*words, "--run_dir", tmp_path / name], tmp_path) for name in ("straight", "stopped")]
    wait_for_step(5, tmp_path / "stopped", both[1])
    both[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=280)[0] for process in both]
    assert both[1].returncode == STOPPED, outputs[1]
    again = start(["--resume", tmp_path / "stopped"], tmp_path)
    output = again.communicate(timeout=280)[0]
    assert (both[0].returncode, again.returncode) == (0, 0), outputs[0] + output
    assert differences(tmp_path / "straight", tmp_path / "stopped") == []


@pytest.mark.slow
@POSIX
@pytest.mark.timeout(1200)
def test_twenty_sigkills_at_random_moments(tmp_path: Path) -> None:
    script = ROOT / "tests" / "soak" / "kill_and_resume.py"
    done = subprocess.run([sys.executable, script, "--kills", "20", "--folder", tmp_path / "soak"], check=False)
    assert done.returncode == 0


# --- what --resume takes, and what may change ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(["--net", "lenet", "--max_epochs", "3"], tmp_path_factory.mktemp("resume") / "runs" / "x" / "run")


@pytest.fixture
def copy(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a finished run of three epochs, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, tmp_path / "runs" / "x" / "run")
    return Path("runs/x/run")


def test_a_finished_run_has_nothing_left_to_do(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (copy / "checkpoints" / "last.ckpt").read_bytes()
    for given in ("last", str(copy), str(copy / "checkpoints" / "last.ckpt")):
        assert train(["--resume", given]) == 0
        assert "Nothing left to do" in "".join(capfd.readouterr())
    assert (copy / "checkpoints" / "last.ckpt").read_bytes() == before


def test_a_finished_run_goes_on_with_more_epochs(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first, best = rows(copy), load(copy / "checkpoints" / "best.ckpt")["callbacks"]["Checkpoints"]["best_score"]
    assert train(["--resume", "last", "--max_epochs", "5", "--lr", "0.01"]) == 0
    output = capfd.readouterr().out
    assert "trainer.max_epochs: from the checkpoint 3 -> now 5" in output
    assert "model.lr: from the checkpoint 0.003 -> now 0.01" in output
    assert rows(copy)[:3] == first
    assert [row["step"] for row in rows(copy)] == ["4", "8", "12", "16", "20"]
    config = yaml.safe_load((copy / "config.yaml").read_text())
    assert (config["trainer"]["max_epochs"], config["model"]["lr"]) == (5, 0.01)
    state = load(copy / "checkpoints" / "last.ckpt")
    assert {group["initial_lr"] for group in state["optimizer_states"][0]["param_groups"]} == {0.01}
    assert state["callbacks"]["Checkpoints"]["best_score"] >= best


def test_command_line_wins_over_config_file_and_that_over_the_checkpoint(
    copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("more.yaml").write_text("trainer:\n  max_epochs: 4\nmodel:\n  lr: 0.001\n")
    assert train(["--config", "more.yaml", "--resume", "last", "--lr", "0.005"]) == 0
    output = capfd.readouterr().out
    assert "max_epochs: from the checkpoint 3 -> now 4" in output
    assert "lr: from the checkpoint 0.003 -> now 0.005" in output


def test_best_is_where_a_run_can_go_back_to(copy: Path) -> None:
    epoch = load(copy / "checkpoints" / "best.ckpt")["epoch"]
    assert train(["--resume", "best", "--max_epochs", "4", "--run_dir", "runs/x/run"]) == 0
    assert len(rows(copy)) == 4
    assert epoch <= 3


def test_a_run_that_lost_only_its_result_gets_it(copy: Path) -> None:
    result = json.loads((copy / "result.json").read_text())
    (copy / "result.json").unlink()
    assert train(["--resume", "last"]) == 0
    changing = {"seconds": 0, "git_commit": ""}
    assert json.loads((copy / "result.json").read_text()) | changing == result | changing


def test_a_run_with_only_the_best_checkpoint_goes_on_from_it(copy: Path) -> None:
    (copy / "checkpoints" / "last.ckpt").unlink()
    assert train(["--resume", str(copy), "--max_epochs", "4"]) == 0
    assert len(rows(copy)) == 4


def test_a_run_that_had_saved_nothing_starts_again(copy: Path) -> None:
    before = (copy / "metrics.csv").read_text()
    shutil.rmtree(copy / "checkpoints")
    assert train(["--resume", str(copy)]) == 0
    assert (copy / "metrics.csv").read_text() == before


def test_a_run_continued_in_another_folder_takes_its_past_along(copy: Path) -> None:
    old = (copy / "metrics.csv").read_bytes()
    assert train(["--resume", str(copy), "--max_epochs", "4", "--run_dir", "runs/x/other"]) == 0
    assert len(rows(Path("runs/x/other"))) == 4
    assert Path("runs/x/other/checkpoints/best.ckpt").exists()
    assert (copy / "metrics.csv").read_bytes() == old


def test_a_checkpoint_outside_a_run_folder_gets_a_new_one(copy: Path) -> None:
    Path("elsewhere").mkdir()
    shutil.copy(copy / "checkpoints" / "last.ckpt", "elsewhere/some.ckpt")
    assert train(["--resume", "elsewhere/some.ckpt", "--max_epochs", "4"]) == 0
    assert [path.name for path in Path("elsewhere").iterdir()] == ["some.ckpt"]
    assert len(list(Path("runs").glob("*/*/result.json"))) == 2


def test_batches_of_another_size_start_the_epoch_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--net", "lenet", "--save_every_steps", "1", "--max_epochs", "2"]
    stopped_and_continued(words, folder := tmp_path / "run", [2], kill=True, to_the_end=False)
    smaller = ["--batch_size", "4", "--trainer.accumulate_grad_batches", "2", "--trainer.limit_train_batches", "8"]
    assert train(["--resume", str(folder), *smaller]) == 0  # as many images for a step, in twice as many batches
    assert "starts again from its first image" in capfd.readouterr().out
    saved = int(rows(folder)[0]["step"]) - 4  # what was saved before the kill, then four in each epoch
    assert 1 <= saved <= 2
    assert [int(row["step"]) for row in rows(folder)] == [saved + 4, saved + 8]


def test_steps_of_another_size_start_the_epoch_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--net", "lenet", "--save_every_steps", "1", "--max_epochs", "3"]
    stopped_and_continued(words, folder := tmp_path / "run", [6], kill=True, to_the_end=False)
    assert train(["--resume", str(folder), "--batch_size", "4", "--trainer.limit_train_batches", "8"]) == 0
    assert "starts again from its first image" in capfd.readouterr().out
    assert [row["step"] for row in rows(folder)] == ["4", "14", "22"]
    state = load(folder / "checkpoints" / "last.ckpt")
    assert state["lr_schedulers"][0]["last_epoch"] == 28  # 6 steps count as 12 of half the size
    assert float(rows(folder)[-1]["lr"]) < 1e-6  # at its end all the same


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--resume", "last", "--net", "mlp"], ["last.ckpt", "lenet", "mlp"]),
        (["--resume", "last", "--data", "cifar10"], ["last.ckpt", "lenet"]),
        (["--resume", "last", "--optimizer", "sgd", "--max_epochs", "9"], ["--optimizer", "adamw", "sgd"]),
        (["--resume", "last", "--schedule", "plateau", "--max_epochs", "9"], ["--schedule", "one_cycle", "plateau"]),
        (
            ["--resume", "last", "--model.optimizer_args.amsgrad", "true", "--max_epochs", "9"],
            ["amsgrad", "--init_from"],
        ),
        (["--resume", "runs/x/run", "--run_dir", "other", "--max_epochs", "4"], ["other", "another run"]),
        (["--resume", "last", "--fast_dev_run"], ["leave out --resume"]),
        (["--resume", "nowhere"], ["nowhere", "no such file"]),
        (["--resume", "last", "--run_dir", "nowhere"], ["nowhere"]),
    ],
)
def test_what_cannot_be_continued_is_said_before_training(
    words: list[str], named: list[str], copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("other").mkdir()
    Path("other/config.yaml").write_text("seed_everything: 1\n")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert train(words) in (1, 2)
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    for word in named:
        assert word in message
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_no_run_to_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(["--resume", "last"]) == 2
    assert "no run in runs/" in capfd.readouterr().err


def test_lightning_cli_continues_too(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for option, epochs in (("--resume", "4"), ("--ckpt_path", "5")):
        monkeypatch.setattr(sys, "argv", ["lit-nn", "fit", option, str(copy), "--max_epochs", epochs])
        assert lightning_cli() == 0
        assert len(rows(copy)) == int(epochs)


def test_tensorboard_shows_a_continued_run_once(tmp_path: Path) -> None:
    words = ["--trainer.logger", "true", "--trainer.log_every_n_steps", "1", "--net", "mlp", "--save_every_steps", "2"]
    stopped_and_continued(words, tmp_path / "run", [4, 7], kill=True)
    files = sorted((tmp_path / "run").glob("events.*"), key=lambda file: list(map(int, re.findall(r"\d+", file.name))))
    for number, file in enumerate(files):  # TensorBoard reads them by name; of one second, number 10 is before 9
        file.rename(file.with_name(f"events.out.tfevents.{number:03}"))
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in events.Scalars("train_loss_step")] == list(range(8))


def test_a_continued_run_may_change_how_its_optimizer_computes(tmp_path: Path) -> None:
    run = finished(["--net", "lenet"], tmp_path / "run")
    assert train(["--resume", str(run), "--max_epochs", "3", "--model.optimizer_args.fused", "false"]) == 0
    checkpoint = load(run / "checkpoints" / "last.ckpt")
    optimizer = checkpoint["optimizer_states"][0]
    assert {group["fused"] for group in optimizer["param_groups"]} == {False}
    assert {int(weight["step"]) for weight in optimizer["state"].values()} == {checkpoint["global_step"]} == {12}


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
def test_the_average_is_that_of_all_steps(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self: LitClassifier, *_: Any) -> None:
        if not self.trainer.fit_loop.epoch_loop._should_accumulate():
            seen.append({name: value.clone() for name, value in self.state_dict().items()})

    monkeypatch.setattr(LitClassifier, "on_train_batch_end", on_train_batch_end)
    words = ["--net", "resnet9", "--model.net_args.width", "4", "--ema", "0.9", "--lr", "0.1", "--precision", precision]
    run = finished([*words, "--trainer.accumulate_grad_batches", "2"], tmp_path / "run")
    assert len(seen) == 4
    average = {name: value.float() if value.is_floating_point() else value for name, value in seen[0].items()}
    for weights in seen[1:]:
        for name, value in weights.items():
            average[name] = 0.9 * average[name] + 0.1 * value.float() if value.is_floating_point() else value
    checkpoint = load(run / "checkpoints" / "last.ckpt")
    torch.testing.assert_close(checkpoint["state_dict"], average)
    assert checkpoint["averaging_state"] == {"n_averaged": 4}
    torch.testing.assert_close(checkpoint["current_model_state"], seen[-1], rtol=0, atol=0)


def test_a_test_of_averaged_weights_is_of_the_average(tmp_path: Path) -> None:
    words = ["--net", "lenet", "--ema", "0.9", "--lr", "0.02", "--trainer.limit_test_batches", "1.0"]
    folder = finished(words, tmp_path / "run")
    from data_modules import FashionMNISTSample

    images, labels, _ = FashionMNISTSample().split("test")
    with torch.no_grad():
        logits = load_classifier(folder / "checkpoints" / "best.ckpt")(images)
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    assert accuracy == pytest.approx(json.loads((folder / "result.json").read_text())["test_acc"], abs=1e-6)


# --- trouble ---------------------------------------------------------------------------------------------------------


@POSIX
@pytest.mark.parametrize("second", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_second_signal_ends_at_once(second: str, tmp_path: Path) -> None:
    program = (
        "import signal, sys; from pathlib import Path; from types import SimpleNamespace;"
        "from lit_nn.resume import Checkpoints;"
        "Checkpoints(Path('x')).on_train_start(SimpleNamespace(is_global_zero=False), None);"
        "signal.raise_signal(signal.SIGTERM); print('goes on', flush=True);"
        f"signal.raise_signal(signal.{second}); print('goes on still')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == -signal.Signals[second]
    assert done.stdout == "goes on\n"
    assert "SIGTERM: saving after this step; once more ends at once" in done.stderr


@POSIX
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    limit = 1_000_000  # bytes; a checkpoint of lenet has 760,000, one of this mlp 8,000,000
    program = (
        "import resource, sys; from lit_nn.commands import train;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY)); sys.exit(train(sys.argv[1:]))"
    )
    folder = tmp_path / "run"

    def limited(*words: str | Path) -> "subprocess.CompletedProcess[str]":
        line = [sys.executable, "-c", program, *map(str, words)]
        return subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)

    done = limited(*SMALL, "--net", "mlp", "--run_dir", folder)
    assert done.returncode == 1
    assert "could not be saved (File too large)" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list((folder / "checkpoints").iterdir()) == []

    assert train([*SMALL, "--net", "mlp", "--run_dir", str(tmp_path / "good")]) == 0
    before = (tmp_path / "good" / "checkpoints" / "last.ckpt").read_bytes()
    done = limited("--resume", tmp_path / "good", "--max_epochs", "4")
    assert done.returncode == 1
    assert "the file before it is unchanged" in done.stderr.strip().splitlines()[-1]
    assert (tmp_path / "good" / "checkpoints" / "last.ckpt").read_bytes() == before
    load_classifier(tmp_path / "good" / "checkpoints" / "last.ckpt")
    assert train(["--resume", str(tmp_path / "good"), "--max_epochs", "4"]) == 0  # when there is space again


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "--net", "mlp", "--optimizer", "sgd", "--schedule", "constant", "--lr", "1e30"]
    assert train([*words, "--run_dir", str(tmp_path / "run")]) == 1
    message = capfd.readouterr().err.strip().splitlines()[-1]
    for word in ("loss is", "step", "learning rate 1e+30", "--lr"):
        assert word in message


def test_what_a_killed_save_left_is_removed(copy: Path) -> None:
    leftover = copy / "checkpoints" / ".last.ckpt.tmp"
    leftover.write_bytes(b"half")
    assert train(["--resume", "last", "--max_epochs", "4"]) == 0
    assert not leftover.exists()
