"""A hyper-parameter search: Optuna chooses options of the command line, and each choice is trained as a run of its own.

A trial is the command ``python -m lit_nn fit`` in a process of its own, which knows nothing of the search. This process
starts it, reads from its metrics.csv how it does, and tells Optuna. So a trial that crashes takes nothing with it,
training on several devices works as without a search, and on each machine only one process writes to the storage.
(Optuna's own PyTorchLightningPruningCallback would end a run before the project's checkpoints are saved, and with DDP
it needs a database and a call after the training.)

Nothing is lost or repeated when everything is killed at any moment, because of three things. A trial is in the storage,
with the name of the folder it belongs to, before anything else is done for it. It is finished there only after its
process has ended. And whoever trains it holds a lock, which the system takes away from the dead: a trial that is not
finished and not locked is continued from its last checkpoint, under the same number and with the same values.
"""

import argparse
import contextlib
import csv
import functools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import optuna
import yaml
from filelock import FileLock
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from lit_nn.commands import CommandParser, command
from lit_nn.flags import UsageError, flags, nearest, to_dotted

if sys.platform != "win32":
    import fcntl

Space = dict[str, BaseDistribution]  # options as typed, without the dashes, and what may be chosen for them

SECONDS = 0.5  # between two looks at the trainings
SHOWN = 20  # trials in the table on the terminal
RANGE = ("low", "high", "log", "step")
OWN = ("run_dir", "ckpt_path", "trainer.fast_dev_run")  # options that the search itself decides
ONE_PROCESS = {"devices": 1, "num_nodes": 1, "strategy": "auto"}  # several would look for each other
MAY_DIFFER = (  # options that change nothing of what comes out, and may be others on another machine
    "data.init_args.data_dir",
    "save_every_steps",
    "save_every_minutes",
    "trainer.accelerator",
    *(f"trainer.{name}" for name in ONE_PROCESS),
)


class SweepError(Exception):
    """A search cannot go on, or has come to nothing; the message says why."""

    exit_status = 1


class Interrupted(Exception):
    """Ctrl-C or SIGTERM ended the search; the message says how to go on."""

    exit_status = 130


# --- the search space ------------------------------------------------------------------------------------------------


def read_space(path: Path) -> Space:
    """Read a search space: a YAML file with a list of choices or a range for each option.

    Args:
        path: The file.

    Raises:
        UsageError: If it is none, naming the line that is wrong.
    """
    if not path.is_file():
        raise UsageError(
            f"{path}: no such file. The search space comes first: python scripts/sweep.py SPACE.yaml --trials 12"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise UsageError(f"{path} holds no search space; a line of one is: lr: {{low: 1e-4, high: 1e-2, log: true}}")
    return {str(name): _distribution(f"{path}: {name}", spec) for name, spec in content.items()}


def _distribution(place: str, spec: Any) -> BaseDistribution:
    try:
        if isinstance(spec, list):
            scalar = (str, int, float, bool, type(None))
            return CategoricalDistribution([c if isinstance(c, scalar) else json.dumps(c) for c in spec])
        if isinstance(spec, dict) and {"low", "high"} <= spec.keys():
            if unknown := spec.keys() - set(RANGE):
                raise UsageError(f"{place}: unknown {unknown.pop()!r}. Allowed in a range: {', '.join(RANGE)}")
            log, numbers = spec.get("log", False), {k: v for k, v in spec.items() if k != "log"}
            if all(type(value) is int for value in numbers.values()):
                return IntDistribution(**numbers, log=log)
            return FloatDistribution(**{k: float(v) for k, v in numbers.items()}, log=log)  # YAML takes 1e-4 for a word
    except (TypeError, ValueError) as error:
        raise UsageError(f"{place}: {error}") from error
    raise UsageError(
        f"{place} is {spec!r}; it should be a list of choices, [adamw, nesterov], or a range, {{low: 1e-4, high: 1e-2, "
        "log: true}. An option that stays the same is given on the command line"
    )


def _suggest(trial: optuna.Trial, name: str, distribution: Any) -> Any:
    """The value of an option in a trial: the one it has, or a new one."""
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    suggest: Any = trial.suggest_int if isinstance(distribution, IntDistribution) else trial.suggest_float
    return suggest(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def _words(fixed: Sequence[str], values: dict[str, Any]) -> list[str]:
    """The command line of a training: the fixed options, and the chosen values."""
    chosen = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return ["fit", *fixed, *(f"--{name}={value}" for name, value in chosen.items())]


def _build(words: Sequence[str]) -> dict[str, Any]:
    """Build everything that a command line asks for, but train nothing; gives all its options, see config.yaml."""
    from lit_nn.cli import LitCLI  # only now: it imports lightning, which takes seconds

    options: dict[str, Any] = {}

    class Builder(LitCLI):
        def before_instantiate_classes(self) -> None:
            options.update(self.plain_config())
            for name, value in ONE_PROCESS.items():
                self.settings.trainer[name] = value

        def before_fit(self) -> None:
            pass

        def fit(self, **kwargs: Any) -> None:
            pass

        def after_fit(self) -> None:
            pass

    logging.disable(logging.INFO)  # what lightning says of every Trainer
    try:
        Builder(words)
    finally:
        logging.disable(logging.NOTSET)
    return options


def check(space: Space, fixed: Sequence[str]) -> dict[str, Any]:
    """Try every value of a search space, with the first ones of the other options, before anything is trained.

    A value that cannot be built is only announced: it may go well with other values.

    Args:
        space: What is searched for.
        fixed: The options that stay the same, as typed.

    Returns:
        All options of the first training that can be built.

    Raises:
        UsageError: If an option is unknown or given twice, a value is none of its type, or nothing can be built.
    """
    dotted = {flag.name: flag.option for flag in flags()}
    given = [word[2:].partition("=")[0] for word in to_dotted(fixed) if word.startswith("--")]
    for name in space:
        if dotted.get(name, name) in given:
            raise UsageError(
                f"--{name} is given, but the search is to choose it; leave it out in one of the two places"
            )
    searched = [dotted.get(name, name) for name in space]
    for name in [*given, *searched]:
        if name in OWN or (name == "config" and name in searched):
            raise UsageError(f"--{name} is not for a search, which gives every trial a run folder of its own")
        if searched.count(name) > 1:
            raise UsageError(f"the search space has {name} twice")

    values = {
        name: list(d.choices) if isinstance(d, CategoricalDistribution) else [d.low, d.high]  # type: ignore[attr-defined]
        for name, d in space.items()
    }
    first = {name: choices[0] for name, choices in values.items()}
    points = [first, *({**first, name: value} for name, choices in values.items() for value in choices[1:])]
    tried = [_try(_words(fixed, point)) for point in points]
    built = [options for options in tried if isinstance(options, dict)]
    problems = [error for error in tried if isinstance(error, UsageError)]
    if not built:
        raise problems[0]
    for problem in problems:
        print(f"Some trials will fail: {problem}")
    return built[0]


def _try(words: Sequence[str]) -> dict[str, Any] | UsageError:
    """See `_build`; an error that has to do with several options at once is returned, not raised."""
    try:
        return _build(words)
    except UsageError as error:
        if isinstance(error.__cause__, argparse.ArgumentError):
            raise
        return error


# --- the study -------------------------------------------------------------------------------------------------------


def open_storage(url: str) -> optuna.storages.BaseStorage:
    """Open what Optuna keeps its studies in.

    Args:
        url: A database (``sqlite:///study.db``, ``postgresql://...``, ``mysql://...``), ``redis://...``, or the path of
            a journal file, which suits network file systems.

    Raises:
        UsageError: If it cannot be opened.
    """
    from optuna.storages import journal
    from sqlalchemy.exc import DBAPIError, SQLAlchemyError

    patience = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}  # seconds to wait for its lock
    try:
        if url.startswith("redis"):
            return optuna.storages.JournalStorage(journal.JournalRedisBackend(url))
        if "://" not in url:
            return optuna.storages.JournalStorage(journal.JournalFileBackend(url))
        try:
            return optuna.storages.RDBStorage(url, engine_kwargs=patience)
        except DBAPIError:  # of two machines that create the tables at the same time, one finds that they are there
            time.sleep(2)
            return optuna.storages.RDBStorage(url, engine_kwargs=patience)
    except (SQLAlchemyError, ImportError, OSError, RuntimeError) as error:
        raise UsageError(f"--storage: {str(error.__cause__ or error).splitlines()[0]}") from error


def open_study(name: str, storage: optuna.storages.BaseStorage, space: Space, options: dict[str, Any]) -> optuna.Study:
    """Open a study, or begin it.

    Args:
        name: Of the study.
        storage: Where it is.
        space: What is searched for.
        options: All options of one of its trainings.

    Raises:
        UsageError: If it was begun with another search space or other fixed options.
    """
    from lit_nn.choices import flat

    epochs = options["trainer"]["max_epochs"] or 0
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        direction="maximize",
        load_if_exists=True,
        # A run is judged after a quarter of its epochs, when its learning rate has risen, and against five others.
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=max(1, epochs // 4)),
    )
    shared = {option: value for option, value in flat(options) if option not in MAY_DIFFER}
    searched = {option: repr(distribution) for option, distribution in space.items()}
    facts = json.loads(json.dumps({"search space": searched, "options": shared}))  # tuples become lists
    if "facts" not in study.user_attrs:
        study.set_user_attr("facts", facts)
    for kind, before in study.user_attrs["facts"].items():
        now = facts[kind]
        names = before.keys() | now.keys() if kind == "search space" else before.keys() & now.keys()
        for option in sorted(names):
            if before.get(option) != now.get(option):
                raise UsageError(
                    f"the study {name} was begun with another {kind}: {option} was {before.get(option)}, "
                    f"now it is {now.get(option)}. Begin another one with a new --study_dir; with --storage, give the "
                    "file of the search space another name too"
                )
    return study


def owner_of(folder: Path) -> str:
    """The name of a study's folder in the storage: a random one, so that the folder and its machine may be renamed.

    Args:
        folder: Where the trials' run folders are.
    """
    path = folder / "owner.txt"
    with FileLock(folder / "owner.lock"):
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            temporary.write_text(uuid.uuid4().hex, encoding="utf-8")
            temporary.replace(path)
        return path.read_text(encoding="utf-8")


@dataclass
class Training:
    """A trial that is being trained.

    Attributes:
        trial: Optuna's side of it.
        process: The training.
        folder: The run folder.
        output: What the process prints; open and locked as long as it, or this process, is alive.
        pruned: Whether it has been told to end.
        epochs: Rows of metrics.csv that have been looked at.
        written: When it was written, as it was looked at; it is read but once, because on Windows nobody may write
            what somebody reads.
    """

    trial: optuna.Trial
    process: "subprocess.Popen[bytes]"
    folder: Path
    output: IO[bytes]
    pruned: bool = False
    epochs: int = 0
    written: int = 0

    def failure(self) -> str:
        """Why the process has failed, in one line."""
        if self.process.returncode < 0:
            return f"killed by {signal.Signals(-self.process.returncode).name}"
        text = Path(self.output.name).read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (errors or lines or [f"exit status {self.process.returncode}"])[-1]


class Sweep:
    """The trials of a study that are trained on this machine.

    Args:
        study: Optuna's side of it.
        storage: Where the study is.
        folder: Where the trials' run folders go.
        space: What is searched for.
        fixed: The options that stay the same, as typed.
        trials: How many the study is to have, on all machines together.
        workers: How many are trained at the same time here.
        seed: Of what is chosen.
    """

    def __init__(
        self,
        study: optuna.Study,
        storage: optuna.storages.BaseStorage,
        folder: Path,
        space: Space,
        fixed: Sequence[str],
        trials: int,
        workers: int,
        seed: int,
    ) -> None:
        self.study, self.storage, self.folder, self.space, self.fixed = study, storage, folder, space, fixed
        self.budget, self.workers, self.seed = trials, workers, seed
        self.owner = owner_of(folder)
        self.running: list[Training] = []
        there = {path.name for path in folder.glob("trial-*")}  # first: another process may add some
        strange = there - {_folder_name(trial) for trial in study.get_trials() if self._is_here(trial)}
        if strange:
            raise UsageError(
                f"{folder} holds {min(strange)}, which is not of the study {study.study_name} in this storage. Give "
                "another --study_dir, or the search space and the --storage that it belongs to"
            )

    def trials(self) -> list[FrozenTrial]:
        """The trials that were asked for.

        Two machines that create the last one at the same time create one too many. It waits, and is the first one when
        more are asked for.
        """
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.number < self.budget]

    def done(self) -> int:
        """How many of them have ended."""
        return sum(trial.state.is_finished() for trial in self.trials())

    def unfinished(self, here: bool) -> list[FrozenTrial]:
        """The trials that have begun and not ended, those of this folder or those of others."""
        started = [trial for trial in self.trials() if not trial.state.is_finished()]
        return [trial for trial in started if self._is_here(trial) == here]

    def _is_here(self, trial: FrozenTrial) -> bool:
        return trial.user_attrs.get("owner") == self.owner

    def run(self) -> None:
        """Train until the study has all its trials.

        Raises:
            KeyboardInterrupt: If it was interrupted; the trainings have ended then, with everything saved.
        """
        left, waits = len(self.unfinished(here=True)), False
        print(f"{self.folder}: {self.done()} of {self.budget} trials are done, {left} begun", flush=True)
        try:
            while True:
                while len(self.running) < self.workers and self._start_next():
                    pass
                others = [] if self.running else self.unfinished(here=True)
                if not self.running and not others:
                    return
                if others and not waits:  # they may yet be left to this process
                    waits = True
                    print(f"Waiting for another process, which has trial {others[0].number} in its hands", flush=True)
                time.sleep(SECONDS)
                self.running = [training for training in self.running if not self._finished(training)]
        finally:
            self._stop()

    def _start_next(self) -> bool:
        """Start the next training, if there is one: first what was interrupted, then what is missing."""
        numbers = [training.trial.number for training in self.running]
        while True:
            for trial in self.unfinished(here=True):
                if trial.number not in numbers and (output := self._lock(trial)):
                    if not self.storage.get_trial(trial._trial_id).state.is_finished():  # before it was locked
                        self._start(trial, output)
                        return True
                    output.close()
            if len(self.trials()) >= self.budget:
                return False
            self.study.enqueue_trial({}, {"owner": self.owner})

    def _lock(self, trial: FrozenTrial) -> IO[bytes] | None:
        """The file for what a trial prints, locked; None if another process, or what it has left behind, has it.

        The lock belongs to the open file, which the training inherits, and the processes that it starts for further
        devices. Windows has no such lock: only one search may use a folder there.
        """
        path = self.folder / "logs" / f"{_folder_name(trial)}.txt"
        path.parent.mkdir(exist_ok=True)
        file = path.open("ab")
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                return None
        return file

    def _start(self, frozen: FrozenTrial, output: IO[bytes]) -> None:
        if frozen.state == TrialState.WAITING:
            self.storage.set_trial_state_values(frozen._trial_id, TrialState.RUNNING)
        # Every trial has its own seed: the generator of a search that was killed is lost, and would start again.
        seed = zlib.crc32(f"{self.seed} {frozen.number}".encode())
        self.study.sampler = optuna.samplers.TPESampler(seed=seed)
        trial = optuna.Trial(self.study, frozen._trial_id)
        values = {name: _suggest(trial, name, distribution) for name, distribution in self.space.items()}
        folder = self.folder / _folder_name(frozen)
        words = [*_words(self.fixed, values), "--trainer.enable_progress_bar=false"]
        if (folder / "checkpoints" / "last.ckpt").exists():
            words += ["--resume", str(folder)]
        else:
            shutil.rmtree(folder, ignore_errors=True)  # it was killed before anything was saved
            words += ["--run_dir", str(folder)]
        environment = dict(os.environ)
        if self.workers > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.workers)))
        with _ctrl_c_blocked():
            process = subprocess.Popen(
                [sys.executable, "-m", "lit_nn", *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            self.running.append(Training(trial, process, folder, output))

    def _finished(self, training: Training) -> bool:
        """Tell Optuna how a training does; whether it has ended and is recorded."""
        code = training.process.poll()  # asked first: then nothing is added to what is read now
        self._report(training)
        if code is None:
            return False
        if code < 0 and not training.pruned:
            time.sleep(SECONDS)  # whoever kills everything may be about to kill this process too
        trial, value = training.trial, None
        accuracies = self.storage.get_trial(trial._trial_id).intermediate_values.values()
        if training.pruned:
            state = TrialState.PRUNED
        elif code == 0 and accuracies:
            state, value = TrialState.COMPLETE, max(accuracies)
        else:
            state = TrialState.FAIL
            trial.set_user_attr("error", training.failure())
        done = self.study.tell(trial, value, state)
        training.output.close()
        chosen = ", ".join(f"{name} {_text(chosen)}" for name, chosen in done.params.items())
        print(f"[{self.done()}/{self.budget}] trial {done.number}: {_outcome(done)}; {chosen}", flush=True)
        return True

    def _report(self, training: Training) -> None:
        """Report the epochs that are new, and end the training if it does not go well."""
        path, trial = training.folder / "metrics.csv", training.trial
        written = path.stat().st_mtime_ns if path.exists() else 0
        if written == training.written or training.pruned:
            return
        training.written = written
        with path.open(newline="", encoding="utf-8") as file:
            rows = [(int(row["epoch"]), float(row["val_acc"])) for row in csv.DictReader(file) if row["val_acc"]]
        for epoch, accuracy in rows[training.epochs :]:
            training.epochs += 1
            if epoch not in self.storage.get_trial(trial._trial_id).intermediate_values:  # it is, if continued
                trial.report(accuracy, epoch)
            if trial.should_prune():
                training.pruned = True
                training.process.terminate()
                return

    def _stop(self) -> None:
        """Have all trainings save what they have and end; a second Ctrl-C ends them at once."""
        for training in self.running:
            training.process.terminate()
        try:
            for training in self.running:
                training.process.wait()
        except KeyboardInterrupt:
            for training in self.running:
                training.process.kill()


@contextlib.contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """What is started here never hears of Ctrl-C, which goes to all processes of a terminal: this one tells it."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _folder_name(trial: FrozenTrial) -> str:
    return f"trial-{trial.number:04}"


# --- what came out ---------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _outcome(trial: FrozenTrial) -> str:
    """How a trial has ended, in a few words."""
    if trial.state == TrialState.FAIL:
        return f"failed: {trial.user_attrs.get('error', 'no reason given')}"
    pruned = "pruned at " if trial.state == TrialState.PRUNED else ""
    return f"{pruned}{trial.value:.2%} after {len(trial.intermediate_values)} epochs"


def draw(study: optuna.Study, folder: Path) -> list[Path]:
    """Draw the history of a study, the importance of its options, and all trials side by side.

    Args:
        study: With a complete trial at least.
        folder: Where the pictures go.

    Returns:
        The pictures.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.importance import PedAnovaImportanceEvaluator
    from optuna.visualization import matplotlib as plots

    # PED-ANOVA needs no scikit-learn. It asks what sets the best trials apart, and needs five of them to say so.
    quantile = min(0.5, max(0.1, 5 / len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))))
    evaluator = PedAnovaImportanceEvaluator(target_quantile=quantile, evaluate_on_local=False)
    kinds: dict[str, Any] = {
        "history": plots.plot_optimization_history,
        "importance": functools.partial(plots.plot_param_importances, evaluator=evaluator),
        "parallel": plots.plot_parallel_coordinate,
    }
    pictures = []
    for name, plot in kinds.items():
        with pyplot.style.context("default"), warnings.catch_warnings():  # Optuna's functions choose one for everybody
            warnings.simplefilter("ignore")  # that they are experimental; a range with one value in it
            axes = plot(study, target_name="val_acc")
            figure = axes.figure
            if name == "history":
                axes.legend(loc="lower right")  # instead of beside the picture
            if name == "parallel":
                figure.set_size_inches(2.2 * len(axes.get_xticks()), 5)
                axes.collections[0].set_cmap("viridis")  # instead of white on white
                for other in figure.axes:
                    if other.get_label() == "<colorbar>":  # away from the labels of the last axis
                        other.set_position(other.get_position().translated(0.05, 0))
                    for label in other.get_yticklabels(which="both"):
                        label.set_bbox({"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1})
            pictures.append(folder / f"{name}.png")
            figure.savefig(pictures[-1], bbox_inches="tight", dpi=110)
            pyplot.close(figure)
    return pictures


def conclude(sweep: Sweep) -> None:
    """Print the table of all trials, and write it, the pictures and the best training's options into the folder.

    Args:
        sweep: What there is to train here is trained.

    Raises:
        SweepError: If no trial was completed.
    """
    folder, order = sweep.folder, [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    trials = [trial for trial in sweep.trials() if trial.state.is_finished()]
    trials.sort(key=lambda trial: (order.index(trial.state), -(trial.value or 0), trial.number))
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    rows: list[list[Any]] = [["trial", "val_acc", "epochs", "state", *sweep.space]]
    for trial in trials:
        chosen = [trial.params.get(name) for name in sweep.space]
        rows.append([trial.number, trial.value, len(trial.intermediate_values), trial.state.name.lower(), *chosen])
    with (folder / "trials.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    texts = [[_text(value) for value in row] for row in rows[: 1 + SHOWN]]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    print()
    for row in texts:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    if len(trials) > SHOWN:
        print(f"... and {len(trials) - SHOWN} more in {folder / 'trials.csv'}")
    for trial in failed[:SHOWN]:
        print(f"Trial {trial.number} {_outcome(trial)}")
    for trial in sweep.unfinished(here=False):
        print(f"Trial {trial.number} is another machine's; if it was interrupted there, type the same command there")
    if not trials or trials[0].state != TrialState.COMPLETE:
        reason = f"; the first of {len(failed)} failures: {failed[0].user_attrs.get('error')}" if failed else ""
        raise SweepError(f"no trial was completed{reason}. What they printed: {folder / 'logs'}")
    best = trials[0]
    config = yaml.safe_dump(_build(_words(sweep.fixed, best.params)), sort_keys=False)
    comment = f"# val_acc {best.value:.2%}: the best of {len(trials)} trials of the study {sweep.study.study_name}"
    (folder / "best.yaml").write_text(f"{comment}, number {best.number}\n{config}", encoding="utf-8")
    pictures = ", ".join(path.name for path in draw(sweep.study, folder))
    print(
        f"\nBest validation accuracy {best.value:.2%}: trial {best.number}. The test set was not used.\n"
        f"Study folder: {folder} (best.yaml, trials.csv, {pictures})\n"
        f"Next:\n  python scripts/train.py --config {folder / 'best.yaml'}"
    )


# --- the command -----------------------------------------------------------------------------------------------------


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


@command
def main(words: list[str]) -> None:
    """Search for the best options: ``python scripts/sweep.py``."""
    parser = CommandParser("sweep", "Search for the options with the best validation accuracy.")
    parser.usage = f"{parser.prog} SPACE.yaml [--trials N] [--workers N] [--study_dir DIR] [--storage URL] [OPTION ...]"
    parser.epilog = "Every other OPTION is one of scripts/train.py and holds for all trials: --net mlp --max_epochs 5"
    parser.add_argument("space", type=Path, metavar="SPACE.yaml", help="what to search for; see docs/sweep.md")
    parser.add_argument(
        "--trials",
        type=_positive,
        default=20,
        metavar="N",
        help="how many the study is to have in the end, failed ones and those of other machines included [20]",
    )
    parser.add_argument("--workers", type=_positive, default=1, metavar="N", help="how many at the same time here [1]")
    parser.add_argument("--study_dir", type=Path, metavar="DIR", help="where everything goes [runs/sweeps/SPACE]")
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="what Optuna keeps the study in: a database that several machines reach, redis://..., or a journal file "
        "[sqlite:///DIR/study.db]",
    )
    options, fixed = parser.parse_known_args(words)
    own = [word[2:] for word in parser._option_string_actions if word.startswith("--")]
    for name in (word[2:].partition("=")[0] for word in fixed if word.startswith("--")):
        hint = nearest(name, own)
        if hint and "." not in name and name not in [flag.name for flag in flags()]:
            raise UsageError(f"unknown option '{name}'.{hint} All options: {parser.prog} --help")

    space = read_space(options.space)
    folder, name = options.study_dir or Path("runs", "sweeps", options.space.stem), options.space.stem
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    stops = (signal.SIGINT, signal.SIGTERM)  # a shell has what it runs in the background ignore Ctrl-C
    handlers = {signum: signal.signal(signum, signal.default_int_handler) for signum in stops}
    sweep, again = None, "What was under way is saved. To go on, type the same command again"
    try:
        all_options = check(space, fixed)
        folder.mkdir(parents=True, exist_ok=True)
        storage = open_storage(options.storage or f"sqlite:///{folder.as_posix()}/study.db")
        study = open_study(name, storage, space, all_options)
        seed = int(all_options["seed_everything"])
        sweep = Sweep(study, storage, folder, space, fixed, options.trials, options.workers, seed)
        sweep.run()
        conclude(sweep)
    except KeyboardInterrupt:
        done = sweep.done() if sweep else 0
        raise Interrupted(f"\nStopped after {done} of {options.trials} trials. {again}") from None
    except optuna.exceptions.OptunaError as error:
        raise SweepError(f"the storage failed: {error.__cause__ or error}. {again}") from error
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
