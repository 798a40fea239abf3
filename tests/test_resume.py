"""Runs that are stopped anywhere and continued: equal to the last bit to those that are not."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from conftest import ROOT, Command, Patch, Process, Refused, Said, Start, ended, patched, script, wait_until
from resume_runs import SMALL, STOPPED, assert_resumes_exactly, differences, finished, load, rows, stopped_and_continued
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_modules import FashionMNISTSample
from data_modules.augment import AUGMENTATIONS
from lit_nn import LitClassifier
from lit_nn.__main__ import main as lightning_cli
from lit_nn.engine.callbacks import Checkpoints
from lit_nn.nets import NETS
from lit_nn.optim import SCHEDULES
from lit_nn.progress import Progress

train = script("train")

# --- every network, every schedule ------------------------------------------------------------------------------------

NETWORKS = [*NETS, "torchvision/squeezenet1_1"]
ALL_AUGMENTATIONS = ",".join(AUGMENTATIONS)
INEXACT = {("conv3d_cnn", "bf16-mixed")}  # two straight runs differ: docs/checkpoints.md says why
OPTIONS = list(itertools.product(["none", ALL_AUGMENTATIONS], ["32-true", "bf16-mixed"], ["null", "0.9"]))
CELLS = [  # for each network all the options, and with them all the schedules in turn
    (net, list(SCHEDULES)[(row + column) % len(SCHEDULES)], *options)
    for row, net in enumerate(NETWORKS)
    for column, options in enumerate(OPTIONS)
    if (net, options[1]) not in INEXACT
]


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(cell).replace(ALL_AUGMENTATIONS, "all"))
def test_every_network_and_schedule_is_exact(cell: tuple[str, str, str, str, str], tmp_path: Path) -> None:
    names = ("--net", "--schedule", "--augment", "--precision", "--ema")
    words = [word for pair in zip(names, cell, strict=True) for word in pair]
    if "plateau" in words:
        words += ["--model.schedule_args.patience", "0"]
    assert_resumes_exactly(words, tmp_path, [1, 4, 6])  # in the first epoch, after its last step, in the second epoch


# --- some of it in every run of the tests -----------------------------------------------------------------------------


@pytest.mark.parametrize("kill", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["signal", "kill"])
@pytest.mark.parametrize(
    "words",
    [
        "--net torchvision/squeezenet1_1 --augment flip,translate,cutout,mixup",  # dropout
        "--net resnet9 --model.net_args.width 4 --ema 0.9 --class_weights balanced",  # buffers that are averaged
        "--net cifar_cnn --augment flip_alternating,cutmix --precision bf16-mixed --optimizer nesterov --clip_grad 1",
        "--net mlp --schedule plateau --model.schedule_args.patience 0 --early_stopping 5",
        "--net lenet --trainer.accumulate_grad_batches 2 --ema 0.5 --data.sampling balanced",
        "--net mlp --trainer.val_check_interval 2 --max_epochs 3",
        "--net mlp --trainer.check_val_every_n_epoch 2 --max_epochs 3",
        "--net mlp --trainer.val_check_interval 4 --trainer.limit_train_batches 7",  # a validation, and then it stops
    ],
)
def test_stopped_and_continued_is_the_same_run(words: str, kill: bool, tmp_path: Path) -> None:
    line = words.split() + (["--save_every_steps", "1"] if kill else [])
    assert_resumes_exactly(line, tmp_path, [1, 3] if "accumulate" in words else [2, 4, 6], kill)


@pytest.mark.parametrize("more", [[], ["--trainer.val_check_interval", "2", "--early_stopping", "9"]])
def test_ended_inside_an_epoch_by_max_steps_and_made_longer(more: list[str], tmp_path: Path, capfd: Said) -> None:
    words = ["--net", "lenet", "--schedule", "constant", *more]
    straight, longer = finished(words, tmp_path / "straight"), tmp_path / "longer"
    finished([*words, "--trainer.max_steps", "2"], longer)
    assert train(["--resume", str(longer), "--trainer.max_steps", "6"]) == 0
    result = (longer / "result.json").read_bytes()
    assert train(["--resume", str(longer)]) == 0
    assert "Nothing left to do: the run ended after its 6 steps. " in capfd.readouterr().err
    assert (longer / "result.json").read_bytes() == result
    assert train(["--resume", str(longer), "--trainer.max_steps", "8"]) == 0
    assert differences(straight, longer) == []


def test_early_stopping_ends_a_continued_run_where_it_would_have(tmp_path: Path) -> None:
    words = ["--net", "mlp", "--lr", "0.5", "--early_stopping", "1", "--max_epochs", "8"]
    assert_resumes_exactly(words, tmp_path, [2])
    assert 1 < len(rows(tmp_path / "straight")) < 8
    assert train(["--resume", str(tmp_path / "straight")]) == 0  # it has ended: nothing left to do
    assert differences(tmp_path / "straight", tmp_path / "stopped") == []


def test_early_stopping_inside_an_epoch_goes_on_from_there(tmp_path: Path) -> None:
    words = ["--net", "lenet", "--trainer.limit_train_batches", "8", "--schedule", "constant", "--lr", "0"]
    words += ["--trainer.val_check_interval", "2", "--early_stopping"]
    straight, stopped = finished([*words, "9"], tmp_path / "straight"), finished([*words, "1"], tmp_path / "stopped")
    state = load(stopped / "checkpoints" / "last.ckpt")
    assert (state["epoch"], state["global_step"]) == (0, 4)
    (stopped / "result.json").rename(before := tmp_path / "result.json")  # as if it had been killed before its test
    assert train(["--resume", str(stopped)]) == 0  # nothing left to train
    assert json.loads(before.read_text())["epochs"] == json.loads((stopped / "result.json").read_text())["epochs"] == 1
    assert train(["--resume", str(stopped), "--early_stopping", "9"]) == 0
    assert [place for place in differences(straight, stopped) if "EarlyStopping" not in place] == []


def test_what_has_to_go_on_is_not_ended_by_a_patience_that_is_over(tmp_path: Path) -> None:
    words = ["--net", "mlp", "--lr", "0", "--early_stopping", "1", "--trainer.min_epochs", "4", "--max_epochs", "6"]
    assert_resumes_exactly(words, tmp_path, [13])
    assert len(rows(tmp_path / "straight")) == 4


def test_steps_of_several_batches_are_saved_once(tmp_path: Path, monkeypatch: Patch) -> None:
    saved = list[int]()
    save = Checkpoints._save

    def remember(self: Checkpoints, trainer: L.Trainer, path: Path) -> None:
        saved.append(trainer.global_step)
        save(self, trainer, path)

    monkeypatch.setattr(Checkpoints, "_save", remember)
    words = ["--net", "mlp", "--trainer.accumulate_grad_batches", "2", "--save_every_steps", "2", "--max_epochs", "1"]
    finished([*words, "--trainer.limit_train_batches", "12"], tmp_path / "run")
    assert saved == [2, 4, 6]


def test_the_rate_of_the_body_follows_its_option_under_plateau(tmp_path: Path) -> None:
    words = ["--net", "lenet", "--schedule", "plateau", "--model.schedule_args.patience", "0", "--max_epochs", "2"]
    run = finished([*words, "--lr", "0.00001", "--backbone_lr", "0.1"], tmp_path / "run")
    assert [row["lr"] for row in rows(run)] == ["1e-05", "1e-06"]  # those of the head; val_acc has not risen
    assert train(["--resume", str(run), "--backbone_lr", "0.5", "--trainer.max_steps", "10", "--max_epochs", "3"]) == 0
    groups = load(run / "checkpoints" / "last.ckpt")["optimizer_states"][0]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([5e-6, 5e-6, 1e-6, 1e-6])


def test_a_stop_between_two_batches_of_a_step_waits_for_the_step(tmp_path: Path, monkeypatch: Patch) -> None:
    words = ["--net", "lenet", "--schedule", "constant", "--trainer.accumulate_grad_batches", "2"]
    straight = finished(words, tmp_path / "straight")

    def on_train_batch_end(self: Progress, trainer: L.Trainer, *rest: Any) -> None:
        trainer.should_stop |= trainer.current_epoch == 1 and rest[-1] == 0  # as max_time does

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "on_train_batch_end", on_train_batch_end)
        stopped = finished(words, tmp_path / "stopped")
    state = load(stopped / "checkpoints" / "last.ckpt")
    assert (state["epoch"], state["global_step"]) == (1, 3)
    assert train(["--resume", str(stopped)]) == 0
    assert differences(straight, stopped) == []


def test_the_random_numbers_of_a_mac_are_kept(tmp_path: Path, monkeypatch: Patch) -> None:
    state, restored = torch.arange(9, dtype=torch.uint8), list[torch.Tensor]()
    monkeypatch.setattr(torch.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.mps, "set_rng_state", restored.append)
    run = stopped_and_continued(["--net", "mlp"], tmp_path / "run", [2])
    assert torch.equal(load(run / "checkpoints" / "last.ckpt")["processes"][0]["random"]["mps"], state)
    assert [tensor.tolist() for tensor in restored] == [state.tolist()]


# --- processes --------------------------------------------------------------------------------------------------------


def saved_steps(folder: Path) -> int:
    path = folder / "checkpoints" / "last.ckpt"
    return int(torch.load(path, weights_only=True)["global_step"]) if path.exists() else 0


def stop(process: Process, number: int, folder: Path, step: int) -> str:
    """Send a signal when so many steps have been saved; what the process printed before it ended."""
    wait_until(lambda: saved_steps(folder) >= step, process)
    process.send_signal(number)
    return ended(process, STOPPED if number == signal.SIGTERM else -number)


@pytest.mark.posix
def test_sigterm_and_sigkill_lose_nothing(tmp_path: Path, start: Start) -> None:
    words = ["--net", "lenet", "--save_every_steps", "3", "--trainer.limit_train_batches", "150"]
    straight, stopped = finished(words, tmp_path / "straight"), tmp_path / "stopped"
    output = stop(start("train", *SMALL, *words, "--run_dir", stopped), signal.SIGTERM, stopped, 30)
    assert re.search(r"SIGTERM: saving.*\n.*python scripts/train.py --resume .*stopped", output, re.DOTALL)
    moved = stopped.rename(tmp_path / "moved")
    stop(start("train", "--resume", moved), signal.SIGKILL, moved, saved_steps(moved) + 30)
    assert saved_steps(moved) < 300
    assert train(["--resume", str(moved)]) == 0
    assert differences(straight, moved) == []


@pytest.mark.slow
@pytest.mark.posix
@pytest.mark.timeout(600)
@pytest.mark.parametrize("net", ["resnet9 --model.net_args.width 4", "torchvision/squeezenet1_1"])  # buffers, dropout
def test_two_processes_stop_together_and_continue_exactly(net: str, tmp_path: Path, start: Start) -> None:
    words = [*SMALL, "--devices", "2", "--strategy", "ddp", "--net", *net.split(), "--augment", ALL_AUGMENTATIONS]
    words += ["--ema", "0.9", "--trainer.limit_train_batches", "60", "--save_every_steps", "5"]
    straight, stopped = (start("train", *words, "--run_dir", tmp_path / name) for name in ("straight", "stopped"))
    stop(stopped, signal.SIGTERM, tmp_path / "stopped", 5)  # of the first process only
    assert len(load(tmp_path / "stopped" / "checkpoints" / "last.ckpt")["processes"]) == 2
    ended(start("train", "--resume", tmp_path / "stopped"))
    ended(straight)
    assert differences(tmp_path / "straight", tmp_path / "stopped") == []


@pytest.mark.slow
@pytest.mark.posix
@pytest.mark.timeout(1200)
def test_twenty_sigkills_at_random_moments(tmp_path: Path) -> None:
    soak = ROOT / "tests" / "soak" / "kill_and_resume.py"
    done = subprocess.run([sys.executable, soak, "--kills", "20", "--folder", tmp_path / "soak"], check=False)
    assert done.returncode == 0


@pytest.mark.posix
def test_a_second_signal_ends_at_once(tmp_path: Path, command: Command) -> None:
    send = "signal.raise_signal(signal.SIGTERM), print('goes on', flush=True), signal.raise_signal(signal.SIGINT)"
    change = f"LitClassifier.on_train_batch_end = lambda *_: ({send}, print('goes on still'))"
    done = command(*patched(f"from lit_nn import LitClassifier; {change}"), *SMALL, "--run_dir", tmp_path / "run")
    assert done.returncode == -signal.SIGINT
    assert done.stdout.endswith("goes on\n")
    assert "SIGTERM: saving after this step; once more ends at once" in done.stderr


@pytest.mark.posix
@pytest.mark.parametrize("where", ["test", pytest.param("train", marks=pytest.mark.slow)])
def test_a_signal_before_or_after_the_training_is_no_success(where: str, tmp_path: Path, command: Command) -> None:
    change = f"ImageDataModule.{where}_dataloader = lambda self: signal.raise_signal(signal.SIGTERM)"
    words = [*patched(f"from data_modules import ImageDataModule; {change}"), *SMALL]
    done = command(*words, "--run_dir", stopped := tmp_path / "stopped")
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert not (stopped / "result.json").exists()
    assert train(["--resume", str(stopped)]) == 0
    assert differences(finished([], tmp_path / "straight"), stopped) == []


@pytest.mark.posix
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, capfd: Said) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = finished(["--net", "mlp"], tmp_path / "run") / "checkpoints"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # bytes of a file; a checkpoint has 8,000,000
    try:
        assert train(["--resume", str(folder.parent), "--max_epochs", "4"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capfd.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"error: .*\.ckpt could not be saved \(File too large\); the file before it is unchanged", said)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert train(["--resume", str(folder.parent), "--max_epochs", "4"]) == 0  # when there is space again


# --- what --resume takes, and what may change -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(["--net", "lenet", "--max_epochs", "3"], tmp_path_factory.mktemp("resume") / "runs" / "x" / "run")


@pytest.fixture
def copy(run: Path, tmp_path: Path, monkeypatch: Patch) -> Path:
    """A copy of a finished run of three epochs, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, tmp_path / "runs" / "x" / "run")
    return Path("runs/x/run")


def test_a_finished_run_has_nothing_left_to_do(copy: Path, capfd: Said) -> None:
    shutil.copytree(copy, other := Path("runs/mine"))
    before = (copy / "checkpoints" / "last.ckpt").read_bytes()
    for given in ("last", str(copy), str(copy / "checkpoints" / "last.ckpt")):
        os.utime(other / "config.yaml", (1, 1))  # the latest run is the other one
        assert train(["--resume", given]) == 0
        output = "".join(capfd.readouterr())
        assert f"Continuing {copy / 'checkpoints' / 'last.ckpt'} after 3 epochs, 12 steps" in output
        assert "Nothing left to do" in output
        assert "--max_epochs 6" in output
    assert (copy / "checkpoints" / "last.ckpt").read_bytes() == before
    os.utime(copy / "config.yaml", (0, 0))
    assert train(["--resume", "last"]) == 0
    assert f"Continuing {other}" in capfd.readouterr().out


def test_a_run_that_ended_before_its_calibration_is_calibrated(copy: Path) -> None:
    best = copy / "checkpoints" / "best.ckpt"
    found = torch.load(best, weights_only=True)
    expected = dict(found["hyper_parameters"])
    assert expected["temperature"] != 1
    found["hyper_parameters"]["temperature"] = 1.0
    torch.save(found, best)
    for _ in range(2):
        assert lightning_cli(["fit", "--resume", str(copy)]) == 0
        assert torch.load(best, weights_only=True)["hyper_parameters"] == expected


def test_the_best_inside_an_epoch_is_what_was_validated(tmp_path: Path) -> None:
    words = "--net mlp --max_epochs 1 --trainer.limit_train_batches 9 --trainer.val_check_interval 4"
    folder = finished([*words.split(), "--trainer.limit_val_batches", "1.0"], tmp_path / "run")
    best = load(folder / "checkpoints" / "best.ckpt")
    assert best["global_step"] in (4, 8)
    model, data = LitClassifier.load_from_checkpoint(folder / "checkpoints" / "best.ckpt").eval(), FashionMNISTSample()
    images, labels, rows = data.split("val")
    accuracy = (model(images[rows]).argmax(1) == labels[rows]).double().mean().item()
    assert best["metrics"]["val_acc"] == pytest.approx(accuracy)


def test_a_finished_run_goes_on_with_more_epochs(copy: Path, capfd: Said) -> None:
    first, best = rows(copy), load(copy / "checkpoints" / "best.ckpt")["callbacks"]["Checkpoints"]["best_score"]
    Path("more.yaml").write_text("trainer:\n  max_epochs: 5\nmodel:\n  lr: 0.001\n")
    words = ["--lr", "0.01", "--model.optimizer_args.fused", "false"]  # the command line wins over the file
    assert train(["--config", "more.yaml", "--resume", "last", *words]) == 0
    output = capfd.readouterr().out
    assert "trainer.max_epochs: from the checkpoint 3 -> now 5" in output
    assert "model.lr: from the checkpoint 0.003 -> now 0.01" in output
    assert rows(copy)[:3] == first
    assert [row["step"] for row in rows(copy)] == ["4", "8", "12", "16", "20"]
    config = yaml.safe_load((copy / "config.yaml").read_text())
    assert (config["trainer"]["max_epochs"], config["model"]["lr"]) == (5, 0.01)
    state = load(copy / "checkpoints" / "last.ckpt")
    optimizer = state["optimizer_states"][0]
    assert {(group["initial_lr"], group["fused"]) for group in optimizer["param_groups"]} == {(0.01, False)}
    assert {int(weight["step"]) for weight in optimizer["state"].values()} == {20}
    assert state["callbacks"]["Checkpoints"]["best_score"] >= best


def test_a_run_whose_time_is_over_says_what_to_raise(tmp_path: Path, capfd: Said) -> None:
    words = ["--net", "mlp", "--max_epochs", "-1", "--schedule", "constant", "--trainer.max_time", "00:00:00:01"]
    run = finished(words, tmp_path / "run")
    trained = len(rows(run))
    assert train(["--resume", str(run)]) == 0
    assert re.search(r"Nothing left to do: .* To go on, give a larger --trainer\.max_time", capfd.readouterr().err)
    assert train(["--resume", str(run), "--trainer.max_time", "00:00:00:02"]) == 0
    assert len(rows(run)) > trained
    assert [int(row["epoch"]) for row in rows(run)] == list(range(len(rows(run))))


def test_a_run_goes_on_from_what_is_left_of_it(run: Path, copy: Path) -> None:
    (copy / "result.json").unlink()
    assert train(["--resume", "last"]) == 0
    assert differences(run, copy) == []
    assert train(["--resume", "best", "--max_epochs", "4", "--run_dir", str(copy)]) == 0
    assert len(rows(copy)) == 4
    (copy / "checkpoints" / "last.ckpt").unlink()
    (leftover := copy / "checkpoints" / "last.part.ckpt").write_bytes(b"half")  # of a killed save
    for option, epochs in (("--resume", "5"), ("--ckpt_path", "6")):
        assert lightning_cli(["fit", option, str(copy), "--max_epochs", epochs]) == 0
        assert len(rows(copy)) == int(epochs)
    assert not leftover.exists()
    shutil.rmtree(copy / "checkpoints")
    assert train(["--resume", str(copy), "--max_epochs", "3"]) == 0
    assert differences(run, copy) == []


def test_what_is_continued_elsewhere_leaves_the_first_run_alone(copy: Path) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*.*") if path.is_file()}
    assert train(["--resume", str(copy), "--max_epochs", "4", "--run_dir", "runs/x/other"]) == 0
    assert len(rows(Path("runs/x/other"))) == 4
    assert Path("runs/x/other/checkpoints/best.ckpt").exists()
    Path("elsewhere").mkdir()
    shutil.copy(copy / "checkpoints" / "last.ckpt", "elsewhere/some.ckpt")
    assert train(["--resume", "elsewhere/some.ckpt", "--max_epochs", "4"]) == 0
    assert [path.name for path in Path("elsewhere").iterdir()] == ["some.ckpt"]
    assert len(list(Path("runs").glob("*/*/result.json"))) == 3
    assert {path: path.read_bytes() for path in copy.rglob("*.*") if path.is_file()} == before


@pytest.mark.parametrize("accumulate", [1, 2])  # steps of half the size; as many images for a step, in two batches
def test_batches_of_another_size_start_the_epoch_again(accumulate: int, tmp_path: Path, capfd: Said) -> None:
    words = ["--net", "lenet", "--save_every_steps", "1", "--max_epochs", "3"]
    stopped_and_continued(words, folder := tmp_path / "run", [6], kill=True, to_the_end=False)
    assert (saved := saved_steps(folder)) == 6
    smaller = ["--batch_size", "4", "--trainer.limit_train_batches", "8"]
    assert train(["--resume", str(folder), *smaller, "--trainer.accumulate_grad_batches", str(accumulate)]) == 0
    assert "starts again from its first image" in capfd.readouterr().out
    steps = 8 // accumulate
    assert [int(row["step"]) for row in rows(folder)] == [4, saved + steps, saved + 2 * steps]
    state = load(folder / "checkpoints" / "last.ckpt")
    assert state["lr_schedulers"][0]["last_epoch"] == 2 // accumulate * saved + 2 * steps  # in steps of the new size
    assert float(rows(folder)[-1]["lr"]) < 1e-6 or accumulate == 2  # at its end all the same


REFUSED = {
    "--resume last --net mlp": ["last.ckpt", "lenet", "mlp"],
    "--resume last --data cifar10": ["last.ckpt", "classes"],
    "--resume last --optimizer sgd --max_epochs 9": ["--optimizer", "adamw", "sgd"],
    "--resume last --monitor val_f1 --max_epochs 9": ["--monitor val_f1 cannot go on from val_acc"],
    "--resume last --flip_in_eval --max_epochs 9": ["--flip_in_eval", "True"],
    "--resume last --fit pad --max_epochs 9": ["--fit", "crop", "pad"],
    "--resume last --freeze_epochs -1 --max_epochs 9": ["--freeze_epochs", "-1"],
    "--resume last --backbone_lr 0.1 --max_epochs 9": ["--backbone_lr", "0.1"],
    "--resume last --model.optimizer_args.amsgrad true --max_epochs 9": ["--optimizer_args", "amsgrad"],
    "--resume last --schedule plateau --max_epochs 9": ["--schedule", "one_cycle", "plateau"],
    "--resume runs/x/run --run_dir other --max_epochs 4": ["other", "another run"],
    "--resume last --run_dir nowhere": ["nowhere"],
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_continued_is_said_before_training(words: str, copy: Path, refused: Refused) -> None:
    Path("other").mkdir()
    Path("other/config.yaml").write_text("seed_everything: 1\n")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    said = refused(train, words.split(), 1, 2)
    assert [word for word in REFUSED[words] if word not in said] == []
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_tensorboard_shows_a_continued_run_once(tmp_path: Path) -> None:
    words = ["--trainer.logger", "true", "--trainer.log_every_n_steps", "1", "--net", "mlp", "--save_every_steps", "2"]
    stopped_and_continued(words, tmp_path / "run", [5], kill=True)
    files = sorted((tmp_path / "run").glob("events.*"), key=lambda file: list(map(int, re.findall(r"\d+", file.name))))
    for number, file in enumerate(files):  # TensorBoard reads them by name; of one second, number 10 is before 9
        file.rename(file.with_name(f"events.out.tfevents.{number:03}"))
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in events.Scalars("train_loss_step")] == list(range(8))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_average_is_that_of_all_steps(precision: str, tmp_path: Path, monkeypatch: Patch) -> None:
    seen: dict[int, dict[str, torch.Tensor]] = {}  # the weights after each step

    def on_train_batch_end(self: LitClassifier, *_: Any) -> None:
        if self.global_step:  # two batches make a step
            seen.setdefault(self.global_step, {name: value.clone() for name, value in self.state_dict().items()})

    monkeypatch.setattr(LitClassifier, "on_train_batch_end", on_train_batch_end)
    words = ["--net", "resnet9", "--model.net_args.width", "4", "--ema", "0.9", "--lr", "0.1", "--precision", precision]
    run = finished([*words, "--trainer.accumulate_grad_batches", "2"], tmp_path / "run")
    first, *later = seen.values()
    assert len(later) == 3
    average = {name: value.float() if value.is_floating_point() else value for name, value in first.items()}
    for weights in later:
        for name, value in weights.items():
            average[name] = 0.9 * average[name] + 0.1 * value.float() if value.is_floating_point() else value
    checkpoint = load(run / "checkpoints" / "last.ckpt")
    tolerance = 1e-2 if precision == "bf16-true" else 1e-5  # at each validation the average is rounded as the weights
    torch.testing.assert_close(checkpoint["state_dict"], average, rtol=tolerance, atol=tolerance)
    assert checkpoint["averaging_state"] == {"n_averaged": 4}
    torch.testing.assert_close(checkpoint["current_model_state"], later[-1], rtol=0, atol=0)
