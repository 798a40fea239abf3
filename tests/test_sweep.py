"""The hyper-parameter search: what it refuses, what it writes, and that nothing is lost however it is killed."""

import contextlib
import csv
import os
import random
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from conftest import ROOT, Command
from optuna.trial import FrozenTrial, TrialState
from PIL import Image
from snippets import run_snippets
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_nn.commands import train
from lit_nn.sweep import SweepError, main, open_storage, open_study

POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and locks of POSIX")
QUICK = ["--net", "mlp", "--accelerator", "cpu", "--trainer.limit_train_batches", "8", "--max_epochs", "3"]
Start = Callable[..., "subprocess.Popen[str]"]
SPACE = (
    "lr: {low: 1e-4, high: 1e-2, log: true}\noptimizer: [adamw, nesterov]\nbatch_size: {low: 16, high: 64, step: 16}\n"
)


@pytest.fixture
def space(tmp_path: Path) -> Path:
    """A search space; its study goes to runs/sweeps/space."""
    path = tmp_path / "space.yaml"
    path.write_text(SPACE)
    return path


def trials_of(folder: Path, name: str = "space", storage: str | None = None) -> list[FrozenTrial]:
    """The trials of a study, as they are in its storage."""
    opened = open_storage(storage or f"sqlite:///{folder}/study.db")
    return optuna.load_study(study_name=name, storage=opened).get_trials()


def facts(trial: FrozenTrial) -> tuple[Any, ...]:
    return trial.number, trial.state, trial.params, trial.intermediate_values, trial.values


def best_of(trials: Sequence[FrozenTrial]) -> FrozenTrial:
    return max(trials, key=lambda trial: (trial.value or 0, -trial.number))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the command in a process group of its own, which the test does not leave behind."""
    started: list[subprocess.Popen[str]] = []

    def run(*words: object) -> subprocess.Popen[str]:
        line = [sys.executable, str(ROOT / "scripts" / "sweep.py"), *map(str, words)]
        process = subprocess.Popen(
            line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        started.append(process)
        return process

    yield run
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout
        process.stdout.close()


def wait_until(condition: Callable[[], object], process: "subprocess.Popen[str]", seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.2)


def trainings(search: int) -> list[int]:
    """The trainings that a search has under way; its other children, such as git, live for a moment only."""
    line = ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(search)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    return [int(child.split()[0]) for child in done.stdout.splitlines() if " -m lit_nn fit " in child]


def ps(process: int, column: str) -> str:
    """What ps says of a process; "" if it is no more."""
    line = ["ps", "-ww", "-o", f"{column}=", "-p", str(process)]
    return subprocess.run(line, capture_output=True, text=True, check=False).stdout


def killed_in_the_second_epoch(folder: Path, process: "subprocess.Popen[str]") -> int | None:
    """Kill a training that is under way, and cannot be pruned yet; gives the number of its trial, if there is one."""
    for pid in trainings(process.pid):
        metrics = folder / "".join(re.findall(r"trial-\d+", ps(pid, "args"))) / "metrics.csv"
        if not metrics.exists():
            continue
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGSTOP)
            while ps(pid, "stat")[:1] not in ("T", "Z", ""):  # stopped, or it had ended before
                time.sleep(0.01)
            if ps(pid, "stat").startswith("T") and len(metrics.read_text().splitlines()) == 2:  # the header, one epoch
                os.kill(pid, signal.SIGKILL)
                return int(metrics.parent.name.removeprefix("trial-"))
            os.kill(pid, signal.SIGCONT)
    return None


def wait_for_trials(count: int, folder: Path, process: "subprocess.Popen[str]") -> None:
    """Wait until so many trials are finished."""
    wait_until((folder / "logs").exists, process)
    wait_until(lambda: len(finished(trials_of(folder))) >= count, process)


def finished(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    return [trial for trial in trials if trial.state.is_finished()]


# --- what is refused, before any trial starts ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lr: [1, 2\n", ["not a YAML file"]),
        ("", ["no search space", "lr:"]),
        ("[lr]\n", ["no search space"]),
        ("lr: 0.1\n", ["lr is 0.1", "command line"]),
        ("lr: []\n", ["lr: ", "one or more"]),
        ("lr: {low: 1e-4}\n", ["lr is", "high"]),
        ("lr: {low: 1e-4, high: 1e-2, lg: true}\n", ["'lg'", "log"]),
        ("lr: {low: 1e-2, high: 1e-4}\n", ["lr: ", "low"]),
        ("lr: {low: 0.0, high: 1, log: true}\n", ["lr: ", "low"]),
        ("lr: {low: small, high: 1}\n", ["lr: ", "small"]),
        ("lr: {low: 1e-4, high: 1e-2}\nmodel.lr: [1, 2]\n", ["model.lr", "twice"]),
        ("run_dir: [a, b]\n", ["run_dir", "run folder of its own"]),
        ("optimiser: [adamw]\n", ["optimiser", "Did you mean optimizer"]),
        ("model.optimiser: [adamw]\n", ["model.optimiser", "model.optimizer"]),
        ("optimizer: [adamw, adm]\n", ["adm", "Did you mean adam"]),
        ("batch_size: {low: 0.5, high: 2}\n", ["batch_size", "0.5", "int"]),
        ("net: [lenett, lenettt]\n", ["lenett", "lenet"]),
    ],
)
def test_wrong_spaces_are_refused(
    text: str, parts: list[str], space: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(space.parent)
    space.write_text(text)
    assert main(["space.yaml", "--accelerator", "cpu"]) == 2
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1
    for part in parts:
        assert part in message
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["missing.yaml"], ["missing.yaml", "no such file"]),
        (["--net", "mlp", "space.yaml"], ["mlp", "comes first"]),
        (["space.yaml", "--trial", "3"], ["'trial'", "trials"]),
        (["space.yaml", "--trials", "0"], ["--trials", "'0'"]),
        (["space.yaml", "--max_epoch", "3"], ["max_epoch", "max_epochs"]),
        (["space.yaml", "--model.lr", "3"], ["--lr is given", "leave it out"]),
        (["space.yaml", "--resume", "last"], ["ckpt_path", "run folder of its own"]),
        (["space.yaml", "--tune", "batch_size"], ["tune", "after a kill"]),
        (["space.yaml", "--net", "mlpp"], ["mlpp", "mlp"]),
        (["space.yaml", "--storage", "sqlite:///no/such/folder/x.db", "--net", "mlp"], ["--storage", "unable to open"]),
        (["space.yaml", "--storage", "nothing://x", "--net", "mlp"], ["--storage", "nothing"]),
    ],
)
def test_wrong_words_are_refused(
    words: list[str], parts: list[str], space: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(space.parent)
    space.write_text("lr: [0.001]\n")
    assert main([*words, "--accelerator", "cpu"]) == 2
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1
    for part in parts:
        assert part in message
    assert not list(Path().glob("runs/sweeps/space/trial-*"))


def test_the_example_is_a_search_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lit_nn.search_space import check, read_space

    monkeypatch.chdir(tmp_path)
    for path in (ROOT / "configs" / "sweeps").glob("*.yaml"):
        assert (
            check(read_space(path), ["--accelerator", "cpu"])["data"]["class_path"] == "data_modules.FashionMNISTSample"
        )


# --- a whole search --------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_a_small_search(space: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(space.parent)
    words = ["space.yaml", *QUICK[:-1], "1", "--trials", "2", "--workers", "2"]
    assert main(words) == 0
    assert "Best validation accuracy" in capsys.readouterr().out
    folder = Path("runs/sweeps/space")
    trials = trials_of(folder)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 2
    with (folder / "trials.csv").open(newline="") as file:
        rows = {int(row["trial"]): row for row in csv.DictReader(file)}
    configs = []
    for trial in trials:
        run = folder / f"trial-{trial.number:04}"
        with (run / "metrics.csv").open(newline="") as file:
            accuracies = [float(row["val_acc"]) for row in csv.DictReader(file)]
        assert trial.value == max(accuracies)
        assert list(trial.intermediate_values.values()) == accuracies
        assert float(rows[trial.number]["val_acc"]) == trial.value
        configs.append(yaml.safe_load((run / "config.yaml").read_text()))
        assert configs[-1]["model"]["lr"] == trial.params["lr"]
        assert configs[-1]["model"]["optimizer"] == trial.params["optimizer"]
        assert configs[-1]["data"]["init_args"]["batch_size"] == trial.params["batch_size"]
        assert not (run / "result.json").exists()  # the test set was left alone
        for events in run.glob("events.out.tfevents*"):
            tags = EventAccumulator(str(events)).Reload().Tags()
            assert not [tag for tag in [*tags["scalars"], *tags["images"]] if "test" in tag]
    for name in ("history", "importance", "parallel"):
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.width > 400
    best = yaml.safe_load((folder / "best.yaml").read_text())
    best["trainer"]["enable_progress_bar"] = False  # the only difference
    assert best == configs[best_of(trials).number]
    assert main(words) == 0
    assert "2 of 2 trials are done" in capsys.readouterr().out
    assert [facts(trial) for trial in trials_of(folder)] == [facts(trial) for trial in trials]


def test_another_search_is_kept_apart(
    space: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(space.parent)
    words = ["space.yaml", *QUICK]
    with monkeypatch.context() as nothing_is_trained:
        nothing_is_trained.setattr("lit_nn.sweep.Sweep.run", lambda self: None)
        assert main(words) == 1
        assert "no trial was completed" in capsys.readouterr().err
        assert main([*words[:-1], "4"]) == 2
        assert "trainer.max_epochs was 3, now it is 4" in capsys.readouterr().err
        assert main([*words, "--trainer.devices", "1", "--data_dir", "elsewhere"]) == 1  # another machine
        space.write_text(SPACE.replace("1e-4", "1e-5"))
        assert main(words) == 2
        assert "another search space: lr was" in capsys.readouterr().err
        space.write_text(SPACE)
    strange = Path("runs/sweeps/space/trial-0000")
    strange.mkdir()
    for _ in range(2):  # also when it is asked again
        assert main(words) == 2
        assert "holds trial-0000, which is not of the study" in capsys.readouterr().err
    assert not list(strange.iterdir())


# --- killed, interrupted, failing ------------------------------------------------------------------------------------


def test_a_kill_while_the_database_was_made(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    open_storage(url)
    with contextlib.closing(sqlite3.connect(tmp_path / "study.db")) as database:
        database.execute("DROP INDEX ix_studies_study_name")  # which is made after the table
    for _ in range(3):
        open_study("name", url, {}, {"trainer": {"max_epochs": 1}})
    assert len(optuna.get_all_study_names(open_storage(url))) == 1


@pytest.mark.slow
@POSIX
@pytest.mark.timeout(2400)
def test_three_sigkills_at_random_moments_lose_and_repeat_nothing(space: Path, tmp_path: Path, start: Start) -> None:
    folder, rng = tmp_path / "runs" / "sweeps" / "space", random.Random(time.time_ns())
    words = [space, *QUICK, "--trials", "12", "--workers", "2"]
    for count in (1, 4, 7):
        process = start(*words)
        wait_for_trials(count, folder, process)
        time.sleep(rng.uniform(0, 4))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    before = {trial.number: facts(trial) for trial in finished(trials_of(folder))}
    assert 7 <= len(before) < 12
    process = start(*words)
    output = process.communicate(timeout=1200)[0]
    assert process.returncode == 0, output
    trials = trials_of(folder)
    assert [trial.number for trial in trials] == list(range(12))
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert {number: facts(trials[number]) for number in before} == before
    assert len({tuple(trial.params.items()) for trial in trials}) == 12
    for trial in trials:
        checkpoint = torch.load(folder / f"trial-{trial.number:04}" / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["epoch"] == 3 or trial.state == TrialState.PRUNED
        assert trial.state == TrialState.PRUNED or list(trial.intermediate_values) == [0, 1, 2]
    # One of those that were killed, trained again from the start, comes to the same.
    best, again = best_of([trial for trial in trials if trial.state == TrialState.COMPLETE]), tmp_path / "again"
    assert train(["--config", str(folder / "best.yaml"), "--run_dir", str(again)]) == 0
    with (again / "metrics.csv").open(newline="") as file:
        assert [float(row["val_acc"]) for row in csv.DictReader(file)] == list(best.intermediate_values.values())


@pytest.mark.slow
@POSIX
@pytest.mark.timeout(2400)
def test_one_worker_repeats_itself_even_when_killed(space: Path, tmp_path: Path, start: Start) -> None:
    words = [space, *QUICK[:-1], "4", "--trials", "9", "--seed", "3"]  # the sixth and later ones may be pruned
    quiet = start(*words, "--study_dir", "quiet")
    output = quiet.communicate(timeout=1200)[0]
    assert quiet.returncode == 0, output
    for count in (2, 6):
        process = start(*words, "--study_dir", "killed")
        wait_for_trials(count, tmp_path / "killed", process)
        time.sleep(8)  # somewhere in the next one
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    process = start(*words, "--study_dir", "killed")
    output = process.communicate(timeout=1200)[0]
    assert process.returncode == 0, output
    straight, killed = trials_of(tmp_path / "quiet"), trials_of(tmp_path / "killed")
    assert [facts(trial) for trial in killed] == [facts(trial) for trial in straight]
    pruned = [trial for trial in straight if trial.state == TrialState.PRUNED]
    assert pruned
    assert all(trial.number >= 5 and len(trial.intermediate_values) >= 2 for trial in pruned)
    assert [trial for trial in pruned if len(trial.intermediate_values) < 4]  # that is what it is for


@pytest.mark.slow
@POSIX
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("group", [False, True], ids=["process", "terminal"])
def test_ctrl_c_saves_and_says_how_to_go_on(group: bool, space: Path, tmp_path: Path, start: Start) -> None:
    folder = tmp_path / "runs" / "sweeps" / "space"
    space.write_text("lr: [0.001]\n")
    last = folder / "trial-0000" / "checkpoints" / "last.ckpt"
    words = [space, "--max_epochs", "1", "--batch_size", "2", "--accelerator", "cpu", "--trials", "1"]
    process = start(*words, "--save_every_steps", "50")
    wait_until(last.exists, process)  # it is in the epoch, which has 2,700 steps
    if group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 130, output
    assert "Stopped after 0 of 1 trials" in output
    assert "type the same command again" in output
    assert "Traceback" not in output
    assert "SIGTERM: saving after this step" in (folder / "logs" / "trial-0000.txt").read_text()
    steps = torch.load(last, weights_only=True)["global_step"]
    assert 50 <= steps < 2700
    process = start(*words, "--save_every_steps", "50")
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    assert "0 of 1 trials are done, 1 begun" in output
    assert f"after 0 epochs, {steps} steps" in (folder / "logs" / "trial-0000.txt").read_text()


@pytest.mark.slow
@POSIX
@pytest.mark.timeout(600)
def test_a_second_ctrl_c_does_not_wait(space: Path, tmp_path: Path, start: Start) -> None:
    process = start(space, *QUICK, "--trials", "1")
    wait_until(lambda: trainings(process.pid), process)
    (training,) = trainings(process.pid)
    os.kill(training, signal.SIGSTOP)  # it saves nothing
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(5)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert "type the same command again" in output
    assert "Traceback" not in output
    assert not ps(training, "pid")


@pytest.mark.slow
@POSIX
@pytest.mark.timeout(1200)
def test_a_training_that_outlives_the_search_is_waited_for(space: Path, tmp_path: Path, start: Start) -> None:
    folder = tmp_path / "runs" / "sweeps" / "space"
    words = [space, *QUICK, "--trials", "1"]
    process = start(*words)
    wait_until(lambda: trainings(process.pid), process)
    (training,) = trainings(process.pid)  # it has but begun
    os.kill(training, signal.SIGSTOP)
    process.kill()  # this process only
    process.wait()
    process = start(*words)
    assert process.stdout
    output = process.stdout.readline() + process.stdout.readline()
    os.kill(training, signal.SIGCONT)
    output += process.communicate(timeout=900)[0]
    assert process.returncode == 0, output
    assert "Waiting for another process, which has trial 0" in output
    (trial,) = trials_of(folder)
    assert list(trial.intermediate_values) == [0, 1, 2]
    log = (folder / "logs" / "trial-0000.txt").read_text()
    assert log.count("parameters) on") == 1  # trained once
    assert "Nothing left to do" in log


@pytest.mark.slow
@POSIX
@pytest.mark.timeout(1200)
def test_failures_are_recorded_and_survived(space: Path, tmp_path: Path, start: Start) -> None:
    folder = tmp_path / "runs" / "sweeps" / "space"
    space.write_text("lr: [0.001, 1e30]\nmodel.optimizer_args.momentum: [0.5, 0.9]\noptimizer: [momentum, adamw]\n")
    longer = ["--net", "mlp", "--accelerator", "cpu", "--batch_size", "16", "--max_epochs", "3"]
    process = start(space, *longer, "--trials", "10", "--workers", "2")
    while (killed := killed_in_the_second_epoch(folder, process)) is None:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    output = process.communicate(timeout=900)[0]
    assert process.returncode == 0, output
    assert "Some trials will fail: unknown option of adamw 'momentum'" in output
    trials = trials_of(folder)
    assert len(trials) == 10  # failed ones count
    errors = {trial.number: trial.user_attrs["error"] for trial in trials if trial.state == TrialState.FAIL}
    assert [number for number, error in errors.items() if error == "killed by SIGKILL"] == [killed]
    for trial in trials:
        if trial.number == killed:
            continue
        if trial.params["optimizer"] == "adamw":
            assert "unknown option of adamw 'momentum'" in errors[trial.number]
        elif float(trial.params["lr"]) > 1:  # YAML takes 1e30 for a word
            assert re.search("The loss is (nan|inf)", errors[trial.number]), errors[trial.number]
        else:
            assert trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    for number, error in errors.items():
        assert f"Trial {number} failed: {error}" in output


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_when_everything_fails_it_says_so(
    space: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(space.parent)
    space.write_text("lr: [1e30]\n")
    assert main(["space.yaml", *QUICK, "--optimizer", "sgd", "--trials", "2"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: no trial was completed; the first of 2 failures: The loss is ")
    assert len(message.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_a_trial_printed_before_is_not_why_it_failed(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(space.parent)
    monkeypatch.setenv("LIT_NN_DEBUG", "1")  # the training ends in a traceback, not in "error: "
    space.write_text("lr: [1e30]\n")
    log = Path("runs/sweeps/space/logs/trial-0000.txt")
    log.parent.mkdir(parents=True)
    log.write_text("error: of the time before\n")
    with pytest.raises(SweepError, match=r"1 failures: lit_nn\.resume\.TrainingError: The loss is "):
        main(["space.yaml", *QUICK, "--optimizer", "sgd", "--trials", "1"])


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("url", ["sqlite:///shared.db", "shared.journal"])
def test_machines_share_a_study(url: str, space: Path, tmp_path: Path, start: Start) -> None:
    words = [space, *QUICK[:-1], "1", "--trials", "5", "--storage", url]
    machines = [start(*words, "--study_dir", name) for name in ("a", "b")]
    outputs = [machine.communicate(timeout=1800)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    storage = url.replace("///", f"///{tmp_path}/") if "://" in url else str(tmp_path / url)
    trials = finished(trials_of(tmp_path, storage=storage))
    assert [trial.number for trial in trials] == list(range(5))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    folders = [{path.name for path in (tmp_path / name).glob("trial-*")} for name in ("a", "b")]
    assert all(folders)
    assert not folders[0] & folders[1]
    assert len(folders[0] | folders[1]) == 5


@pytest.mark.slow
@POSIX
@pytest.mark.timeout(2400)
def test_two_searches_share_a_folder(space: Path, tmp_path: Path, start: Start) -> None:
    words = [space, *QUICK[:-1], "1", "--trials", "5"]
    searches = [start(*words) for _ in range(2)]
    outputs = [search.communicate(timeout=1800)[0] for search in searches]
    assert [search.returncode for search in searches] == [0, 0], outputs
    trials = finished(trials_of(tmp_path / "runs" / "sweeps" / "space"))
    assert [trial.number for trial in trials] == list(range(5))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert sorted(re.findall(r"trial (\d): \d", "".join(outputs))) == list("01234")  # each by one of them


# --- docs/sweep.md ---------------------------------------------------------------------------------------------------

PAGE = ROOT / "docs" / "sweep.md"


def test_the_page_shows_the_example() -> None:
    example = (ROOT / "configs" / "sweeps" / "lenet.yaml").read_text(encoding="utf-8")
    assert example.startswith("#")
    assert f"```yaml\n{example.partition(chr(10))[2]}```" in PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_page_does_what_it_says(tmp_path: Path, command: Command) -> None:
    """Its commands, with fewer and shorter trials and a database of this machine, and then its Python.

    The first one ends like the shown output, numbers aside.
    """
    shorter = {"--trials 12": "--trials 2", "--max_epochs 5": "--max_epochs 1", "configs/": f"{ROOT}/configs/"}
    shorter["postgresql+psycopg://user:password@host/sweeps"] = "sqlite:///shared.db"
    page = PAGE.read_text(encoding="utf-8")
    outputs = []
    for line in "".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL)).replace("\\\n", "").splitlines():
        for long, short in shorter.items():
            line = line.replace(long, short)
        if words := shlex.split(line, comments=True):
            done = command(*words[1:], "--accelerator", "cpu", timeout=600)
            assert done.returncode == 0, done.stderr
            outputs.append(done.stdout)
    shown, printed = (
        [re.sub(r"\d+", "0", line) for line in text.splitlines()[-4:]]
        for text in (page.partition("```text\n")[2].partition("```")[0], outputs[0])
    )
    assert shown == printed
    run_snippets(PAGE, tmp_path)
