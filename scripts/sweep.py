"""Search for the options with the best result of the validation; --help lists the options, docs/sweep.md explains them.

Each choice of Optuna's, a trial, is ``python -m lit_nn fit`` in a process of its own. A search holds its trial's lock,
which the system takes away from the dead; the next search that finds a trial neither finished nor locked continues it.
"""

import contextlib
import csv
import hashlib
import json
import logging
import shlex
import sys
import time
import warnings
from pathlib import Path
from subprocess import STDOUT, Popen
from typing import Any

import optuna
import yaml
from filelock import FileLock, Timeout
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from data_modules.files import write_csv
from lit_nn.engine.console import CommandParser, command, print_table
from lit_nn.errors import UsageError, options_of

MODES = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}


def read_space(path: Path) -> dict[str, Any]:
    """Read a search space, a distribution for each option; UsageError says what is wrong in it."""
    place, space = str(path), dict[str, Any]()
    try:
        for option, given in yaml.safe_load(path.read_text(encoding="utf-8")).items():
            place = f"{path}: {option}"
            if not isinstance(given, dict):
                values = given if isinstance(given, list) else [given]
                space[option] = CategoricalDistribution([v if isinstance(v, str) else json.dumps(v) for v in values])
            else:
                whole = all(type(value) is int for name, value in given.items() if name != "log")
                kind: Any = IntDistribution if whole else FloatDistribution  # for which YAML takes 1e-4 for a word
                options_of(kind, given, set(), "key")
                space[option] = kind(**{n: v if whole or n == "log" else float(v) for n, v in given.items()})
    except (OSError, yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        hint = "The search space comes first, a YAML file with a list or range for each option; see docs/sweep.md"
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UsageError(f"{place}: {reason}. {hint}") from error
    return space


def check(space: dict[str, Any], fixed: list[str]) -> Any:
    """Build, but do not train, every choice and both ends of every range; gives the last one, or raises UsageError."""
    from lit_nn.engine.cli import LitCLI  # only now: it imports Lightning, which takes seconds

    ends = [[f"--{o}={v}" for v in getattr(d, "choices", None) or (d.low, d.high)] for o, d in space.items()]
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # or it says the same of every Trainer
    for number in range(max([1, *map(len, ends)])):
        built = LitCLI("fit", [*fixed, *(words[number % len(words)] for words in ends)])
    return built


def open_study(folder: Path, search: str, epochs: int, mode: str) -> optuna.Study:
    """Begin the study of a folder, or open it; UsageError if it is of another search."""
    folder.mkdir(parents=True, exist_ok=True)
    journal = str(folder / "study.journal")
    storage = optuna.storages.JournalStorage(JournalFileBackend(journal, JournalFileOpenLock(journal)))
    study = optuna.create_study(storage=storage, study_name="sweep", load_if_exists=True, direction=MODES[mode])
    # A run is judged after a quarter of its epochs, when its learning rate has risen, and against five others.
    study.pruner = optuna.pruners.MedianPruner(5, n_warmup_steps=max(1, epochs // 4))
    if (held := study.user_attrs.get("search", search)) != search:
        raise UsageError(f"{folder} holds another search: {held}, now {search}. Give another --study_dir")
    study.set_user_attr("search", search)
    return study


def train(study: optuna.Study, trial: Trial, run: Path, fixed: list[str], monitor: str) -> None:
    """Train a trial, or go on with it, and tell Optuna how it ends."""
    with FileLock(run / ".lock"):  # a training that has outlived its search goes on until it ends
        pass
    options = [*fixed, *(f"--{option}={value}" for option, value in trial.params.items()), "--run_dir", str(run)]
    if (run / "config.yaml").exists():  # it has begun, with these options and the seed that they came to
        options = ["--config", str(run / "config.yaml"), "--resume", str(run)]
    log, pruned = run.with_suffix(".txt"), False
    with log.open("ab") as output:
        process = Popen([sys.executable, "-m", "lit_nn", "fit", *options], stdout=output, stderr=STDOUT)
    try:
        while process.poll() is None and not pruned:
            time.sleep(0.5)
            report(trial, run, monitor)
            pruned = trial.should_prune()
        process.terminate()  # if it has not ended by itself
        process.wait()
    except KeyboardInterrupt:
        process.wait()  # Ctrl-C reaches it, too, and it saves
        print("\nWhat was under way is saved. To go on, type the same command again.", file=sys.stderr)
        raise
    scores = report(trial, run, monitor)
    if pruned:
        study.tell(trial, state=TrialState.PRUNED)
    elif process.returncode == 0 and scores:
        study.tell(trial, max(scores) if study.direction == MODES["max"] else min(scores))
    else:
        last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        trial.set_user_attr("error", f"exit status {process.returncode}, {last}")
        study.tell(trial, state=TrialState.FAIL)


def report(trial: Trial, run: Path, monitor: str) -> list[float]:
    """Tell Optuna, and return, the results of the validations of a run so far."""
    table = run / "metrics.csv"
    lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
    epochs = {int(row["epoch"]): float(row[monitor]) for row in csv.DictReader(lines) if row.get(monitor)}
    for epoch, score in epochs.items():
        trial.report(score, epoch)
    return [*epochs.values()]


def facts(trial: FrozenTrial, monitor: str) -> dict[str, str]:
    """What is printed and written of a trial."""
    known = {"trial": trial.number, "state": trial.state.name.lower(), monitor: trial.value}
    known |= {"epochs": len(trial.intermediate_values), **trial.params, "error": trial.user_attrs.get("error")}
    return {n: "" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for n, v in known.items()}


def conclude(folder: Path, trials: list[FrozenTrial], monitor: str, mode: str) -> None:
    """Print the table of all trials; write it and the options of the best one into the folder."""
    sign = -1 if mode == "max" else 1
    trials = sorted(trials, key=lambda t: (t.state != TrialState.COMPLETE, sign * (t.value or 0), t.number))
    if not trials or trials[0].state != TrialState.COMPLETE:
        sys.exit(f"error: no trial is complete; what they print is in {folder}/trial-*.txt")
    columns, *rows = [*facts(trials[0], monitor)], *([*facts(trial, monitor).values()] for trial in trials)
    write_csv(folder / "trials.csv", [columns, *rows])
    print_table(columns, rows, right=columns)
    best, file_of_best = trials[0], folder / "best.yaml"
    text = f"{monitor} {best.value:.4f}: trial {best.number}, the best of {len(trials)}"
    config = (folder / f"trial-{best.number:04}" / "config.yaml").read_text(encoding="utf-8")
    file_of_best.write_text(f"# {text}\n{config}", encoding="utf-8")
    print(f"{text}. The test set was not used. Next:")
    print(f"  python scripts/train.py --config {shlex.quote(str(file_of_best))}")


@command
def main(argv: list[str]) -> None:
    """Train the trials that no other search trains or has trained."""
    parser = CommandParser("sweep", "Search for the options with the best result of the validation.")
    parser.epilog = "Every other OPTION is one of scripts/train.py and holds for all trials: --net mlp --max_epochs 5"
    parser.add_argument("space", type=Path, metavar="SPACE.yaml", help="what to search for; see docs/sweep.md")
    parser.add_argument("--trials", type=int, default=20, metavar="N", help="in the end, failed ones included [20]")
    parser.add_argument("--study_dir", type=Path, metavar="DIR", help="where everything goes [runs/sweeps/SPACE]")
    options, fixed = parser.parse_known_args(argv)
    if options.trials < 1:
        raise UsageError(f"--trials is {options.trials}; it must be at least 1")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", "The reported value is ignored")  # of epochs that Optuna knows
    space, folder = read_space(options.space), options.study_dir or Path("runs", "sweeps", options.space.stem)
    built = check(space, fixed)
    settings, monitor, mode = built.config, built.model.hparams["monitor"], built.model.mode
    search = f"{space} {fixed}" + (f" by {monitor}" if monitor != "val_acc" else "")
    for file in built.given.get("config", []):
        search += f", {file} {hashlib.sha256(Path(file).read_bytes()).hexdigest()[:8]}"
    study = open_study(folder, search, settings.trainer.max_epochs or 0, mode)
    for number in range(options.trials):
        run = folder / f"trial-{number:04}"
        with contextlib.suppress(Timeout), FileLock(f"{run}.lock", timeout=0):  # or another search trains it
            while number > len(begun := study.get_trials(deepcopy=False)):
                time.sleep(0.5)  # another search is about to begin the trial before
            if number == len(begun) or not begun[number].state.is_finished():
                # Each trial has its own seed: the generator of a search that was killed is lost.
                study.sampler = optuna.samplers.TPESampler(seed=(settings.seed_everything + number) % 2**32)
                trial = study.ask() if number == len(begun) else Trial(study, begun[number]._trial_id)
                for name, distribution in space.items():
                    trial._suggest(name, distribution)  # or what was drawn before the search was killed
                train(study, trial, run, fixed, monitor)
            ended = [f"{name} {value}" for name, value in facts(study.trials[number], monitor).items() if value]
            print(f"[{number + 1}/{options.trials}] {', '.join(ended)}", flush=True)
    conclude(folder, [trial for trial in study.trials[: options.trials] if trial.state.is_finished()], monitor, mode)


if __name__ == "__main__":
    sys.exit(main())
