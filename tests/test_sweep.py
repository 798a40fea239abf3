"""The hyper-parameter search: what it refuses, what it writes, and that nothing is lost however it is killed."""

import os
import random
import re
import shlex
import signal
import time
from pathlib import Path

import optuna
import pytest
import yaml
from conftest import ROOT, Command, Patch, Refused, Said, Start, ended, rows_of, script, wait_until
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from snippets import commands, run_snippets

from lit_nn.checkpoint import read_checkpoint

QUICK = ["--net", "mlp", "--accelerator", "cpu", "--trainer.logger", "false"]
QUICK += ["--trainer.limit_train_batches", "8", "--max_epochs"]
SPACE = "lr: {low: 1e-4, high: 1e-2, log: true}\noptimizer: [adamw, nesterov]\nbatch_size: {low: 16, high: 64}\n"
PAGE = ROOT / "docs" / "sweep.md"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: Patch) -> Path:
    """The study folder of the search space space.yaml in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("space.yaml").write_text(SPACE, encoding="utf-8")
    return tmp_path / "runs" / "sweeps" / "space"


def study_of(folder: Path) -> optuna.Study:
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    return optuna.load_study(study_name="sweep", storage=storage)


def trials_of(folder: Path) -> list[FrozenTrial]:
    """The trials of a study, as they are in its storage."""
    return study_of(folder).get_trials()


def finished(folder: Path) -> list[FrozenTrial]:
    return [t for t in trials_of(folder) if t.state.is_finished()] if (folder / "study.journal").exists() else []


def accuracies(run: Path) -> dict[int, float]:
    return {int(row["epoch"]): float(row["val_acc"]) for row in rows_of(run / "metrics.csv")}


WRONG = {  # the text of a search space, or options
    "lr: [1, 2\n": ["space.yaml: while parsing", "list or range"],
    "": ["space.yaml: ", "list or range"],
    "lr: {low: 1e-4, high: 1e-2, lg: 2}\n": ["space.yaml: lr: ", "'lg'", "Did you mean log"],
    "lr: {low: 1e-2, high: 1e-4}\n": ["space.yaml: lr: ", "low"],
    "optimiser: [adamw]\n": ["optimiser", "Did you mean optimizer"],
    "optimizer: [adamw, adm]\n": ["adm", "Did you mean adam"],
    "max_epochs: {low: 0.5, high: 2}\n": ["max_epochs", "0.5"],
    "--max_epoch 3": ["max_epoch", "max_epochs"],
    "--trials many": ["--trials", "many"],
    "--trials 0": ["--trials is 0", "at least 1"],
}


@pytest.mark.parametrize("given", WRONG)
def test_what_is_wrong_is_refused_before_any_trial(given: str, folder: Path, refused: Refused) -> None:
    words = given.split() if given.startswith("--") else []
    Path("space.yaml").write_text(SPACE if words else given, encoding="utf-8")
    said = refused(script("sweep"), ["space.yaml", "--accelerator", "cpu", *words])
    assert [part for part in WRONG[given] if part not in said] == []
    assert not folder.exists()


def test_a_small_search(folder: Path, capsys: Said, refused: Refused) -> None:
    Path("more.yaml").write_text("ema: 0.9\n", encoding="utf-8")
    words = ["space.yaml", *QUICK, "1", "--trials", "2", "--config", "more.yaml"]
    assert script("sweep")(words) == 0
    assert "val_acc 0." in capsys.readouterr().out
    trials = trials_of(folder)
    rows = {int(row["trial"]): row for row in rows_of(folder / "trials.csv")}
    configs = []
    for trial in trials:
        run = folder / f"trial-{trial.number:04}"
        assert trial.state == TrialState.COMPLETE
        assert trial.intermediate_values == accuracies(run) == {0: trial.value}
        assert float(rows[trial.number]["val_acc"]) == pytest.approx(trial.value, abs=1e-4)
        configs.append(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
        assert {name: configs[-1]["model"][name] for name in ("lr", "optimizer")}.items() <= trial.params.items()
        assert configs[-1]["data"]["init_args"]["batch_size"] == trial.params["batch_size"]
        assert not (run / "result.json").exists()  # the test set was left alone
    best = yaml.safe_load((folder / "best.yaml").read_text(encoding="utf-8"))
    assert best == configs[max(trials, key=lambda trial: (trial.value or 0, -trial.number)).number]

    assert script("sweep")(words) == 0  # once more: nothing is left to do
    assert [trial.datetime_complete for trial in trials_of(folder)] == [trial.datetime_complete for trial in trials]
    assert "mlp: No such file" in refused(script("sweep"), words[1:])
    assert "holds another search" in refused(script("sweep"), [*words, "--seed", "3"])
    Path("more.yaml").write_text("ema: 0.8\n", encoding="utf-8")
    assert "holds another search" in refused(script("sweep"), words)


@pytest.mark.slow
def test_it_goes_by_what_is_monitored(folder: Path, capsys: Said) -> None:
    words = ["space.yaml", *QUICK, "3", "--monitor", "val_loss", "--trials"]
    assert script("sweep")([*words, "1"]) == 0
    known = trials_of(folder)[0].distributions
    drawn = study_of(folder).ask({"lr": known["lr"]}).params  # as by a search that is killed while it asks
    assert script("sweep")([*words, "2"]) == 0
    assert trials_of(folder)[1].params.items() > drawn.items()
    assert trials_of(folder)[1].params.keys() == known.keys()
    study, runs = study_of(folder), [folder / f"trial-{number:04}" for number in range(2)]
    least = [min(float(row["val_loss"]) for row in rows_of(run / "metrics.csv")) for run in runs]
    assert [trial.value for trial in study.trials] == least
    assert study.best_value == min(least)
    assert f"val_loss {min(least):.4f}: trial {least.index(min(least))}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.posix
@pytest.mark.timeout(1200)
def test_two_searches_killed_at_random_moments_lose_nothing(folder: Path, tmp_path: Path, start: Start) -> None:
    words, rng = [*QUICK, "4", "--trials", "10", "--study_dir"], random.Random(0)
    ended(start("sweep", "space.yaml", *words, "quiet"))
    for count, kill in ((0, os.killpg), (2, os.kill), (4, os.killpg)):  # all of it, or a search without its training
        searches = [start("sweep", "space.yaml", *words, "killed") for _ in range(2)]
        wait_until(lambda count=count: len(finished(tmp_path / "killed")) >= count, searches[0])  # type: ignore[misc]
        time.sleep(rng.uniform(5, 13))  # somewhere in the next ones
        for process in searches:
            kill(process.pid, signal.SIGKILL)
            process.wait()
    ended(start("sweep", "space.yaml", *words, "killed"))
    quiet, killed = (trials_of(tmp_path / name) for name in ("quiet", "killed"))
    assert [trial.params for trial in killed] == [trial.params for trial in quiet]
    for trial, twin in zip(killed, quiet, strict=True):
        assert trial.state == TrialState.PRUNED or [*trial.intermediate_values] == [0, 1, 2, 3]
        shared = trial.intermediate_values.items() & twin.intermediate_values.items()
        assert len(shared) == min(len(trial.intermediate_values), len(twin.intermediate_values))
    best = max((trial for trial in killed if trial.state == TrialState.COMPLETE), key=lambda trial: trial.value or 0)
    assert script("train")(["--config", "killed/best.yaml", "--run_dir", "again"]) == 0
    assert accuracies(Path("again")) == best.intermediate_values


@pytest.mark.slow
def test_a_trial_behind_the_median_is_pruned(folder: Path) -> None:
    Path("space.yaml").write_text("lr: 0.001\n", encoding="utf-8")
    words = ["space.yaml", *QUICK, "100", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"]
    assert script("sweep")([*words, "--trials", "1"]) == 0
    first, study = trials_of(folder)[0], study_of(folder)
    perfect = dict.fromkeys(range(100), 1.0)
    for _ in range(4):
        rival = optuna.create_trial(value=0, params=first.params, distributions=first.distributions)
        rival.intermediate_values = perfect
        study.add_trial(rival)
    assert script("sweep")([*words, "--trials", "6"]) == 0
    assert len(first.intermediate_values) == 100
    last = trials_of(folder)[5]
    assert last.state == TrialState.PRUNED
    assert 25 < len(last.intermediate_values) < 100  # a quarter is not judged


@pytest.mark.slow
@pytest.mark.posix
@pytest.mark.timeout(600)
def test_ctrl_c_saves_and_says_how_to_go_on(folder: Path, start: Start) -> None:
    Path("space.yaml").write_text("lr: 0.001\n", encoding="utf-8")
    words = shlex.split("space.yaml --max_epochs 1 --batch_size 2 --accelerator cpu --trials 1 --save_every_steps 50")
    last, log = folder / "trial-0000" / "checkpoints" / "last.ckpt", folder / "trial-0000.txt"
    process = start("sweep", *words)
    wait_until(last.exists, process)  # it is in the epoch, which has 2,700 steps
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert "type the same command again" in ended(process, 130)
    assert "SIGINT: saving after this step" in log.read_text(encoding="utf-8")
    steps = read_checkpoint(last)["global_step"]
    assert 50 <= steps < 2700
    ended(start("sweep", *words))
    assert f"after 0 epochs, {steps} steps" in log.read_text(encoding="utf-8")


@pytest.mark.slow
def test_failures_are_recorded_and_survived(folder: Path, capsys: Said) -> None:
    Path("space.yaml").write_text("lr: [1e30, 0.001]\n", encoding="utf-8")
    words = ["space.yaml", *QUICK, "1", "--optimizer", "sgd"]
    assert script("sweep")([*words, "--trials", "5"]) == 0
    trials = trials_of(folder)
    assert {trial.params["lr"] for trial in trials} == {"1e30", "0.001"}  # of both, with this seed
    for trial in trials:
        assert trial.state == (TrialState.FAIL if trial.params["lr"] == "1e30" else TrialState.COMPLETE)
    error = next(trial.user_attrs["error"] for trial in trials if trial.state == TrialState.FAIL)
    assert re.match("exit status 1, error: The loss is (nan|inf)", error)
    assert error in capsys.readouterr().out
    assert error in (folder / "trials.csv").read_text(encoding="utf-8")

    Path("space.yaml").write_text("lr: 1e30\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="no trial is complete"):
        script("sweep")([*words, "--trials", "1", "--study_dir", "none"])


def test_the_page_shows_the_example() -> None:
    example = (ROOT / "configs" / "sweeps" / "lenet.yaml").read_text(encoding="utf-8")
    assert f"```yaml\n{example.partition(chr(10))[2]}```" in PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_does_what_it_says(tmp_path: Path, command: Command) -> None:
    """Its commands, with fewer and shorter trials, and its Python; the first one ends like the shown output."""
    shorter = {"--trials 12": "--trials 2", "--max_epochs 5": "--max_epochs 1", "configs/": f"{ROOT}/configs/"}
    outputs = []
    for line in commands(PAGE):
        for long, short in shorter.items():
            line = line.replace(long, short)
        done = command(*shlex.split(line)[1:], "--accelerator", "cpu", timeout=300)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    shown = PAGE.read_text(encoding="utf-8").partition("```text\n")[2].partition("```")[0]
    last_lines = [[re.sub(r"\d+", "0", line) for line in text.splitlines()[-2:]] for text in (shown, outputs[0])]
    assert last_lines[0] == last_lines[1]
    run_snippets(PAGE, tmp_path)
