"""A hyper-parameter search: Optuna chooses options of the command line, and each choice is trained as a run of its own.

A trial is the command ``python -m lit_nn fit`` in a process of its own, which knows nothing of the search. This process
starts it, reads from its metrics.csv how it does, and tells Optuna. So a trial that crashes takes nothing with it,
training on several devices works as without a search, and on each machine only one process writes to the storage.
(Optuna's own PyTorchLightningPruningCallback would end a run before the project's checkpoints are saved, and with DDP
it needs a database and a call after the training. Its heartbeat would fail a trial that was killed, and begin another
one from the start.)

Nothing is lost or repeated when everything is killed at any moment, because of three things. A trial is in the storage,
with the name of the folder it belongs to, before anything else is done for it. It is finished there only after its
process has ended. And whoever trains it holds a lock, which the system takes away from the dead: a trial that is not
finished and not locked is continued from its last checkpoint, under the same number and with the same values.
"""

import argparse
import csv
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import optuna
import yaml
from filelock import FileLock
from optuna.trial import FrozenTrial, TrialState

from lit_nn.choices import flat
from lit_nn.commands import CommandParser, brief, command, print_table
from lit_nn.flags import UsageError, flags, nearest
from lit_nn.search_space import Space, build, check, command_line, read_space

if sys.platform != "win32":
    import fcntl

SECONDS = 0.5  # between two looks at a training
MAY_DIFFER = (  # options that may be others on another machine
    "data.init_args.data_dir",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
)


class SweepError(Exception):
    """A search cannot go on, or has come to nothing, or was interrupted (130); the message says why."""

    def __init__(self, message: str, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status


def open_storage(url: str) -> optuna.storages.BaseStorage:
    """Open what Optuna keeps its studies in.

    Args:
        url: A database (``sqlite:///study.db``, ``postgresql://...``, ``mysql://...``), ``redis://...``, or the path of
            a journal file, which suits network file systems.

    Raises:
        UsageError: If it cannot be opened.
    """
    from optuna.storages import JournalStorage, RDBStorage, journal
    from sqlalchemy.exc import DBAPIError

    patience = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}  # seconds to wait for its lock
    try:
        if url.startswith("redis"):
            return JournalStorage(journal.JournalRedisBackend(url))
        if "://" not in url:
            return JournalStorage(journal.JournalFileBackend(url))
        try:
            return RDBStorage(url, engine_kwargs=patience)
        except DBAPIError:  # of two machines that create the tables at the same time, one finds that they are there
            time.sleep(2)
            return RDBStorage(url, engine_kwargs=patience)
    except Exception as error:  # every driver has its own
        raise UsageError(f"--storage: {brief(error.__cause__ or error)}") from error


def open_study(name: str, url: str, space: Space, options: dict[str, Any]) -> optuna.Study:
    """Open a study, or begin it.

    Args:
        name: Of the study.
        url: Where it is; see `open_storage`.
        space: What is searched for.
        options: All options of one of its trainings.

    Raises:
        UsageError: If it cannot be opened, or was begun with another search space or other fixed options.
    """
    # A run is judged after a quarter of its epochs, when its learning rate has risen, and against five others.
    pruner = optuna.pruners.MedianPruner(5, n_warmup_steps=max(1, (options["trainer"]["max_epochs"] or 0) // 4))
    storage = open_storage(url)
    try:  # not create_study alone: it makes a second one if a kill has left a database without its index of names
        study = optuna.load_study(study_name=name, storage=storage, pruner=pruner)
    except KeyError:
        study = optuna.create_study(
            study_name=name, storage=storage, pruner=pruner, direction="maximize", load_if_exists=True
        )
    now = {f"search space: {option}": repr(distribution) for option, distribution in space.items()}
    now |= {f"option: {option}": repr(value) for option, value in flat(options) if option not in MAY_DIFFER}
    if "facts" not in study.user_attrs:
        study.set_user_attr("facts", now)
    before = study.user_attrs["facts"]
    for fact in {**now, **before}:
        if before.get(fact) != now.get(fact):
            raise UsageError(
                f"the study {name} was begun with another {fact} was {before.get(fact)}, now it is {now.get(fact)}. "
                "Begin another one with a new --study_dir (with --storage, a new name for the search space's file)"
            )
    return study


def _owner(folder: Path) -> str:
    """The name of a study's folder in the storage: a random one, so that the folder and its machine may be renamed."""
    path, temporary = folder / "owner.txt", folder / "owner.tmp"
    with FileLock(folder / "owner.lock"):
        if not path.exists():
            temporary.write_text(uuid.uuid4().hex, encoding="utf-8")
            temporary.replace(path)
        return path.read_text(encoding="utf-8")


@dataclass
class Sweep:
    """The trials of a study that are trained on this machine.

    Attributes:
        study: Optuna's side of it.
        folder: Where the trials' run folders go.
        owner: Its name in the storage.
        space: What is searched for.
        fixed: The options that stay the same, as typed.
        budget: How many trials the study is to have, on all machines together.
        workers: How many are trained at the same time here.
        seed: Of what is chosen.
        taken: Numbers of the trials that this process trains or has trained.
        processes: The trainings that are under way.
        stopping: Set when they are to save what they have and end.
        choosing: Held by the worker that takes a trial or chooses its values.
    """

    study: optuna.Study
    folder: Path
    owner: str
    space: Space
    fixed: Sequence[str]
    budget: int
    workers: int
    seed: int
    taken: set[int] = field(default_factory=set)
    processes: set[subprocess.Popen[bytes]] = field(default_factory=set)
    stopping: threading.Event = field(default_factory=threading.Event)
    choosing: threading.Lock = field(default_factory=threading.Lock)

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
        begun = [trial for trial in self.trials() if not trial.state.is_finished()]
        return [trial for trial in begun if (trial.user_attrs.get("owner") == self.owner) == here]

    def run(self) -> None:
        """Train until the study has all its trials.

        Raises:
            UsageError: If there are trials of another study in the folder.
            KeyboardInterrupt: If it was interrupted. The trainings have ended then, with everything saved; those that
                had not when it was interrupted again, at once.
        """
        begun = len(self.unfinished(here=True))
        print(f"{self.folder}: {self.done()} of {self.budget} trials are done, {begun} begun", flush=True)
        try:
            with ThreadPoolExecutor(self.workers, initializer=_block_ctrl_c) as pool:
                left = {pool.submit(self._work) for _ in range(self.workers)}
                try:
                    while left:
                        done, left = wait(left, SECONDS)
                        for worker in done:
                            worker.result()
                finally:
                    self.stopping.set()
        finally:
            for process in self.processes.copy():  # a second Ctrl-C has come while the workers waited for these
                process.kill()

    def _work(self) -> None:
        """Train one trial after the other until there is none left."""
        while taken := self._take():
            frozen, log = taken
            with log:
                self._train(self._choose_values(frozen), log)

    def _take(self) -> tuple[FrozenTrial, IO[bytes]] | None:
        """Take the next trial, if there is any: first what was interrupted, then what is missing.

        Returns:
            The trial and the file for what its training prints, which is locked.
        """
        told = False
        while not self.stopping.is_set():
            with self.choosing:
                left = [trial for trial in self.unfinished(here=True) if trial.number not in self.taken]
                for trial in left:
                    if log := self._lock(trial):
                        self.taken.add(trial.number)
                        return trial, log
                if len(self.trials()) < self.budget:
                    new = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={"owner": self.owner})
                    self.study.add_trial(new)
                    continue
            if not left:
                break
            if not told:  # they may yet be left to this process
                print(f"Waiting for another process, which has trial {left[0].number} in its hands", flush=True)
            told = True
            self.stopping.wait(SECONDS)
        return None

    def _lock(self, trial: FrozenTrial) -> IO[bytes] | None:
        """The file for what a trial prints, locked; None if the trial is, or was, in the hands of another process.

        The lock belongs to the open file, which the training inherits, and the processes that it starts for further
        devices. Windows has no such lock: only one search may use a folder there.
        """
        path = self.folder / "logs" / f"{_name(trial)}.txt"
        path.parent.mkdir(exist_ok=True)
        log = path.open("ab")
        try:
            if sys.platform != "win32":
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.close()
            return None
        if self._stored(trial).state.is_finished():  # before it was locked
            log.close()
            return None
        return log

    def _stored(self, trial: optuna.Trial | FrozenTrial) -> FrozenTrial:
        """What the storage knows of a trial now."""
        return self.study.get_trials(deepcopy=False)[trial.number]

    def _choose_values(self, frozen: FrozenTrial) -> optuna.Trial:
        """Choose the values of a trial; those that it has stay."""
        if not frozen.params and (self.folder / _name(frozen)).exists():
            raise UsageError(
                f"{self.folder} holds {_name(frozen)}, which is not of the study {self.study.study_name} in this "
                "storage. Give another --study_dir, or the search space and the --storage that it belongs to"
            )
        # Every trial has its own seed: the generator of a search that was killed is lost, and would start again.
        seed = zlib.crc32(f"{self.seed} {frozen.number}".encode())
        with self.choosing:
            self.study.sampler = optuna.samplers.TPESampler(seed=seed)
            trial = optuna.Trial(self.study, frozen._trial_id)
            for name, distribution in self.space.items():
                trial._suggest(name, distribution)  # as Study.ask does for a new trial
        return trial

    def _train(self, trial: optuna.Trial, log: IO[bytes]) -> None:
        """Train a trial, and tell Optuna how it has ended; if all are to end, it has not."""
        begin = log.tell()
        process = self._start(trial, log)
        self.processes.add(process)
        try:
            state = self._watch(trial, process)
        finally:
            process.terminate()
            process.wait()
            self.processes.discard(process)
        if state is None:
            return
        value = max(self._stored(trial).intermediate_values.values()) if state == TrialState.COMPLETE else None
        if state == TrialState.FAIL:
            trial.set_user_attr("error", _failure(process.returncode, Path(log.name).read_bytes()[begin:]))
        done = self.study.tell(trial, value, state)
        chosen = ", ".join(f"{name} {_text(value)}" for name, value in done.params.items())
        print(f"[{self.done()}/{self.budget}] trial {done.number}: {_outcome(done)}; {chosen}", flush=True)

    def _start(self, trial: optuna.Trial, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start the training of a trial, or go on with it."""
        folder = self.folder / _name(trial)
        words = [*command_line(self.fixed, trial.params), "--trainer.enable_progress_bar=false"]
        if (folder / "checkpoints" / "last.ckpt").exists():
            words += ["--resume", str(folder)]
        else:
            shutil.rmtree(folder, ignore_errors=True)  # it was killed before anything was saved
            words += ["--run_dir", str(folder)]
        environment = dict(os.environ)
        if self.workers > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.workers)))
        return subprocess.Popen(
            [sys.executable, "-m", "lit_nn", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )

    def _watch(self, trial: optuna.Trial, process: subprocess.Popen[bytes]) -> TrialState | None:
        """Report the epochs of a training until it has ended, or does poorly.

        Returns:
            The state of the trial; None if all are to end.
        """
        table, written, code = self.folder / _name(trial) / "metrics.csv", 0, None
        epochs: list[tuple[int, float]] = []
        while code is None:
            if self.stopping.wait(SECONDS):
                return None
            code = process.poll()  # asked first: then nothing is added to what is read now
            before, written = written, table.stat().st_mtime_ns if table.exists() else 0
            if written != before:  # read but once: Windows lets nobody replace what somebody reads
                looked, epochs = len(epochs), _epochs(table)
                if any(_is_poor(trial, *epoch) for epoch in epochs[looked:]):
                    return TrialState.PRUNED
        if code and self.stopping.wait(SECONDS):
            return None  # whoever ended it has ended the search too
        return TrialState.COMPLETE if code == 0 and epochs else TrialState.FAIL


def _block_ctrl_c() -> None:
    """What this thread starts never hears of Ctrl-C, which goes to all processes of a terminal: the search tells it."""
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _name(trial: optuna.Trial | FrozenTrial) -> str:
    return f"trial-{trial.number:04}"


def _epochs(table: Path) -> list[tuple[int, float]]:
    """The epochs of a metrics.csv with their validation accuracies."""
    with table.open(newline="", encoding="utf-8") as file:
        return [(int(row["epoch"]), float(row["val_acc"])) for row in csv.DictReader(file) if row["val_acc"]]


def _is_poor(trial: optuna.Trial, epoch: int, accuracy: float) -> bool:
    """Report an epoch, and ask whether the trial is to be ended."""
    trial.report(accuracy, epoch)  # of a trial that is continued Optuna may know it
    return trial.should_prune()


def _failure(code: int, printed: bytes) -> str:
    """Why a training has failed, in one line."""
    if code == 0:
        return "no epoch was validated"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line.strip() for line in printed.decode("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit status {code}"])[-1].removeprefix("error: ")


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _error(trial: FrozenTrial) -> str:
    return str(trial.user_attrs.get("error", "no reason given"))


def _outcome(trial: FrozenTrial) -> str:
    """How a trial has ended, in a few words."""
    if trial.state == TrialState.FAIL:
        return f"failed: {_error(trial)}"
    pruned = "pruned at " if trial.state == TrialState.PRUNED else ""
    return f"{pruned}{trial.value:.2%} after {len(trial.intermediate_values)} epochs"


def _tabulate(trials: Sequence[FrozenTrial], space: Space, path: Path) -> None:
    """Print a table of trials, and write it into a file."""
    columns, rows = ["trial", "val_acc", "epochs", "state", *space], []
    for trial in trials:
        chosen = [trial.params.get(name) for name in space]
        rows.append([trial.number, trial.value, len(trial.intermediate_values), trial.state.name.lower(), *chosen])
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    print_table(columns, [[_text(value) for value in row] for row in rows], right=columns)


def _draw(study: optuna.Study, folder: Path) -> None:
    """Draw history.png, importance.png and parallel.png, with Optuna's own functions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.importance import PedAnovaImportanceEvaluator
    from optuna.visualization import matplotlib as plots

    # What sets the best trials apart is asked of five of them at least, as Optuna recommends.
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    evaluator = PedAnovaImportanceEvaluator(target_quantile=min(0.5, max(0.1, 5 / len(complete))))
    with pyplot.style.context("default"), warnings.catch_warnings():  # Optuna chooses a style for the whole process
        warnings.simplefilter("ignore")  # a range with one value in it
        plots.plot_optimization_history(study, target_name="val_acc")
        pyplot.savefig(folder / "history.png", bbox_inches="tight")
        plots.plot_param_importances(study, evaluator=evaluator, target_name="val_acc")
        pyplot.savefig(folder / "importance.png", bbox_inches="tight")
        plots.plot_parallel_coordinate(study, target_name="val_acc")
        pyplot.savefig(folder / "parallel.png", bbox_inches="tight")
        pyplot.close("all")


def _conclude(sweep: Sweep) -> None:
    """Print the table of all trials, and write it, the pictures and the best training's options into the folder."""
    folder, order = sweep.folder, [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    trials = [trial for trial in sweep.trials() if trial.state.is_finished()]
    trials.sort(key=lambda trial: (order.index(trial.state), -(trial.value or 0), trial.number))
    _tabulate(trials, sweep.space, folder / "trials.csv")
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    for trial in failed:
        print(f"Trial {trial.number} {_outcome(trial)}")
    for trial in sweep.unfinished(here=False):
        print(f"Trial {trial.number} is another machine's; if it was interrupted there, type the same command there")
    if not trials or trials[0].state != TrialState.COMPLETE:
        reason = f"; the first of {len(failed)} failures: {_error(failed[0])}" if failed else ""
        raise SweepError(f"no trial was completed{reason}. What they printed: {folder / 'logs'}")
    best = trials[0]
    config = yaml.safe_dump(build(command_line(sweep.fixed, best.params)), sort_keys=False)
    comment = f"# val_acc {best.value:.2%}: the best of {len(trials)} trials of the study {sweep.study.study_name}"
    (folder / "best.yaml").write_text(f"{comment}, number {best.number}\n{config}", encoding="utf-8")
    _draw(sweep.study, folder)
    print(
        f"Best validation accuracy {best.value:.2%}: trial {best.number}. The test set was not used.\n"
        f"Study folder: {folder} (best.yaml, trials.csv, history.png, importance.png, parallel.png)\n"
        f"Next:\n  python scripts/train.py --config {folder / 'best.yaml'}"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of the search, and those of all its trainings, as typed."""
    parser = CommandParser("sweep", "Search for the options with the best validation accuracy.")
    parser.usage = f"{parser.prog} SPACE.yaml [--trials N] [--workers N] [--study_dir DIR] [--storage URL] [OPTION ...]"
    parser.epilog = "Every other OPTION is one of scripts/train.py and holds for all trials: --net mlp --max_epochs 5"
    parser.add_argument("space", type=Path, metavar="SPACE.yaml", help="what to search for; see docs/sweep.md")
    count: dict[str, Any] = {"type": _positive, "metavar": "N"}
    parser.add_argument("--trials", default=20, help="in the end, on all machines, failed ones included [20]", **count)
    parser.add_argument("--workers", default=1, help="how many at the same time here [1]", **count)
    parser.add_argument("--study_dir", type=Path, metavar="DIR", help="where everything goes [runs/sweeps/SPACE]")
    parser.add_argument(
        "--storage", metavar="URL", help="database, redis://..., or journal file of Optuna's [sqlite:///DIR/study.db]"
    )
    options, fixed = parser.parse_known_args(words)
    names = [word[2:] for word in parser._option_string_actions] + [flag.name for flag in flags()]
    for name in (word[2:].partition("=")[0] for word in fixed if word.startswith("--")):
        if "." not in name and name not in (*names, *(flag.option for flag in flags())):
            raise UsageError(f"unknown option '{name}'.{nearest(name, names)} All options: {parser.prog} --help")
    return options, fixed


@command
def main(words: list[str]) -> None:
    """Search for the best options: ``python scripts/sweep.py``."""
    options, fixed = _parse(words)
    space, name = read_space(options.space), options.space.stem
    folder = options.study_dir or Path("runs", "sweeps", name)
    url = options.storage or f"sqlite:///{folder.as_posix()}/study.db"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for message in (".*is experimental", "The reported value is ignored"):
        warnings.filterwarnings("ignore", message)
    logging.disable(logging.INFO)  # what lightning says of every Trainer
    stops = (signal.SIGINT, signal.SIGTERM)  # a shell has what it runs in the background ignore Ctrl-C
    handlers = {signum: signal.signal(signum, signal.default_int_handler) for signum in stops}
    sweep, again = None, "What was under way is saved. To go on, type the same command again"
    try:
        all_options = check(space, fixed)
        folder.mkdir(parents=True, exist_ok=True)
        study, seed = open_study(name, url, space, all_options), int(all_options["seed_everything"])
        sweep = Sweep(study, folder, _owner(folder), space, fixed, options.trials, options.workers, seed)
        sweep.run()
        _conclude(sweep)
    except KeyboardInterrupt:
        done = sweep.done() if sweep else 0
        raise SweepError(f"\nStopped after {done} of {options.trials} trials. {again}", 130) from None
    except optuna.exceptions.OptunaError as error:
        raise SweepError(f"the storage failed: {brief(error.__cause__ or error)}. {again}") from error
    finally:
        logging.disable(logging.NOTSET)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
