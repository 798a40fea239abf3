"""What runs beside the Trainer: best.ckpt and last.ckpt, the average of weights, metrics.csv, TensorBoard's figures."""

import csv
import itertools
import operator
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from data_modules.files import atomic_path
from lit_nn.checkpoint import copy_checkpoint
from lit_nn.classifier import LitClassifier
from lit_nn.engine import distributed

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)  # asked to end, Ctrl-C, SLURM's warning
ASK_EVERY = 8  # steps between two questions of several processes to one another whether one of them wants to save


class Stopped(Exception):
    """A signal asked the run to stop, and it did, with everything saved."""

    def __init__(self, signum: int, path: Path) -> None:
        super().__init__(f"Stopped. {distributed.to_continue(path.parent.parent)}")
        self.exit_status = 128 + signum


class Checkpoints(Checkpoint):
    """Saves best.ckpt (the best validation so far, by what the classifier monitors) and last.ckpt.

    Only between two epochs or between two optimizer steps, when nothing of the step or epoch before is still to come.
    Lightning's ModelCheckpoint saves while an epoch ends, before its schedule and its training metrics are done with
    it; a run continued from there is no longer the same run.

    Both after every epoch, which goes by its latest validation (with ``--trainer.val_check_interval`` that may be some
    steps old); last.ckpt also inside one: every so many steps or minutes, where ``max_steps`` or ``max_time`` ends the
    run, and when a signal asks the process to end. A second signal ends it at once. Several processes heed a signal,
    or the minutes, within eight steps.
    """

    def __init__(self, folder: Path, every_steps: int | None = None, every_minutes: float | None = None) -> None:
        self.folder, self.every_steps, self.every_minutes = folder, every_steps, every_minutes
        self.best_score: float | None = None
        self.best_epoch: int | None = None
        self._signum = 0  # of the signal that has come, if one has
        self._old_handlers: dict[int, Any] = {}
        self._saved_at = 0.0  # time.monotonic() of the latest saving
        self._started = 0.0  # time.monotonic() less the seconds trained before
        self._ends_inside = False  # whether the run ends inside an epoch

    @property
    def last(self) -> Path:
        """Path of last.ckpt."""
        return self.folder / "last.ckpt"

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before a stop included."""
        return time.monotonic() - self._started

    def state_dict(self) -> dict[str, Any]:
        """The best score so far, its epoch, and the seconds of training."""
        return {"best_score": self.best_score, "best_epoch": self.best_epoch, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the best score of the run that is continued, as long as its best.ckpt is there."""
        if (self.folder / "best.ckpt").exists():
            self.best_score, self.best_epoch = state_dict["best_score"], state_dict["best_epoch"]
        self._started = time.monotonic() - state_dict["seconds"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start the clock; all processes save into the folder of the first one, whose name may hold the time."""
        if stage == "fit":
            self._started = time.monotonic()
            self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch for signals from now on, and remove what a process that was killed while saving has left."""
        self._saved_at = time.monotonic()
        if threading.current_thread() is threading.main_thread():  # no other one may ask for signals
            for signum in SIGNALS:
                self._old_handlers[signum] = signal.signal(signum, self._on_signal)
        if trainer.is_global_zero:
            for leftover in self.folder.glob("*.part.ckpt"):
                leftover.unlink()

    def teardown(self, *_: Any, **__: Any) -> None:
        """Give the signals back."""
        while self._old_handlers:
            signum, handler = self._old_handlers.popitem()
            signal.signal(signum, handler)

    on_exception = teardown  # Lightning tears nothing down after an error

    def _on_signal(self, signum: int, frame: Any) -> None:
        self._signum = signum
        for second in SIGNALS:  # ends at once, even in the middle of a long computation that knows nothing of Python
            signal.signal(second, signal.SIG_DFL)
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            text = f"\n{signal.Signals(signum).name}: saving after this step; once more ends at once.\n"
            os.write(2, text.encode())  # print would fail if the signal came in the middle of another print

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save inside an epoch, if it is time to."""
        steps_due = bool(self.every_steps and trainer.global_step % self.every_steps == 0)
        minutes_due = bool(self.every_minutes and time.monotonic() - self._saved_at >= 60 * self.every_minutes)
        ends = trainer.global_step == trainer.max_steps or trainer.should_stop  # should_stop: max_time is over
        wanted = self._signum or int(steps_due or minutes_due)
        # Nearly always it is not time to: the questions below take longer, and those to other processes longer still.
        if trainer.world_size == 1:
            if not (wanted or ends):
                return
        elif not (steps_due or ends) and trainer.global_step % ASK_EVERY:
            return
        # Gradients are not in a checkpoint, and at the end of an epoch its own saving follows.
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        # A continued run would leave out a validation that follows this very step.
        validates = trainer.fit_loop.epoch_loop._should_check_val_fx(cast(Any, trainer.fit_loop._data_fetcher))
        self._ends_inside = ends
        if ends or (not validates and _largest(trainer, wanted)):
            self._save(trainer, self.last)
        if not ends and not validates:
            self._stop_if_asked_to(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what the epoch before has come to."""
        self._ends_inside = False  # what had asked it to end was overruled, by min_epochs for instance
        if trainer.global_step > 0:
            self._save_epoch(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what the training has come to."""
        self._save_epoch(trainer)

    def _save_epoch(self, trainer: L.Trainer) -> None:
        classifier = cast(LitClassifier, trainer.lightning_module)
        score = trainer.callback_metrics.get(classifier.hparams["monitor"])
        better = operator.gt if classifier.mode == "max" else operator.lt
        is_best = score is not None and (self.best_score is None or better(score.item(), self.best_score))
        if is_best and score is not None:
            self.best_score, self.best_epoch = score.item(), trainer.current_epoch - 1
            self._save(trainer, self.folder / "best.ckpt")
        if self._ends_inside:
            pass  # last.ckpt is there, from inside the epoch, which is not over
        elif not is_best:
            self._save(trainer, self.last)
        elif trainer.is_global_zero:
            copy_checkpoint(self.folder / "best.ckpt", self.last)  # to save it once more would take much longer
        self._stop_if_asked_to(trainer)

    def _save(self, trainer: L.Trainer, path: Path) -> None:
        trainer.save_checkpoint(path, weights_only=False)
        self._saved_at = time.monotonic()

    def _stop_if_asked_to(self, trainer: L.Trainer) -> None:
        if signum := _largest(trainer, self._signum):  # a signal may have reached only one process
            raise Stopped(signum, self.last)


def leave_signals_alone(trainer: L.Trainer) -> None:
    """Keep Lightning from handling signals: a SIGTERM would end a test in silence, with exit status 0.

    In a training `Checkpoints` handles them. Anywhere else nothing is to be saved, and they do what they always do.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def _largest(trainer: L.Trainer, number: int) -> int:
    """The largest number that any process has come with; the same answer on all of them."""
    if trainer.world_size == 1:
        return number
    numbers = torch.tensor(number, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
    return int(numbers)


class EMA(WeightAveraging):
    """Keeps an exponential moving average of the weights, which is validated, tested and saved as the model's weights.

    It begins with the weights after the first step. A checkpoint holds the raw weights too, so that a run can be
    continued. Lightning's EMAWeightAveraging waits for the GPU at every step, rounds where the weights are not float32,
    and leaves the average in the place of the raw weights at the end.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self._move = get_ema_multi_avg_fn(decay)
        self._raw: list[Tensor] = []  # weights and buffers, while the average is validated in their place

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the average, all tensors at once."""
        if trainer.global_step == self._latest_update_step:  # gradients are being accumulated
            return
        assert self._average_model is not None
        averages, weights = [], []
        for average, weight in zip(_tensors(self._average_model.module), _tensors(pl_module), strict=True):
            if self._latest_update_step == 0 or not average.is_floating_point():  # batches are counted, not averaged
                average.copy_(weight)
            else:
                averages.append(average)
                weights.append(weight.to(average.dtype))  # not the same where the weights are not float32
        if averages:
            self._move(averages, weights, None)
        self._average_model.n_averaged += 1
        self._latest_update_step = trainer.global_step

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average in the place of the weights."""
        if self._average_model is not None:
            self._raw = [tensor.detach().clone() for tensor in _tensors(pl_module)]
            _copy(_tensors(self._average_model.module), pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put them back."""
        if self._average_model is not None:
            _copy(self._raw, pl_module)
            self._raw = []

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the raw weights where they are: last.ckpt is yet to be saved, and best.ckpt has the average."""

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take up the raw weights, but only to train: a test is of the average."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Weights and buffers."""
    return itertools.chain(module.parameters(), module.buffers())


@torch.no_grad()
def _copy(tensors: Iterable[Tensor], module: nn.Module) -> None:
    """Give a module other weights and buffers."""
    for target, tensor in zip(_tensors(module), tensors, strict=True):
        target.copy_(tensor)


class MetricsCSV(Callback):
    """Writes metrics.csv: one row per epoch with every metric of training and validation.

    An epoch without validation has none in its row. A run that is continued keeps the rows of the epochs that were
    complete.

    Args:
        path: Where the table goes.
    """

    COLUMNS = ("epoch", "step", "lr", "train_loss", "train_acc", "val_loss", "val_acc")  # and what else is logged

    def __init__(self, path: Path) -> None:
        self.path = path
        self.validated: int | None = None  # the latest epoch that had a validation

    def state_dict(self) -> dict[str, Any]:
        """The latest epoch that had a validation."""
        return {"validated": self.validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.validated = state_dict["validated"]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the epoch."""
        if not trainer.sanity_checking:
            self.validated = trainer.current_epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the row of the epoch before: only now its training metrics are known and its schedule has moved."""
        self._add_row(trainer, trainer.current_epoch - 1)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the row of the last epoch."""
        self._add_row(trainer, trainer.current_epoch - 1)

    @rank_zero_only
    def _add_row(self, trainer: L.Trainer, epoch: int) -> None:
        metrics = trainer.callback_metrics
        if epoch < 0 or "train_loss" not in metrics:
            return
        rows: list[dict[str, str]] = []
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if int(row["epoch"]) < epoch]
        names = [name for name in metrics if name not in ("train_loss_step", "lr")]
        columns = dict.fromkeys([*self.COLUMNS, *sorted({*names, *(name for row in rows for name in row)})])
        known = [name for name in names if epoch == self.validated or not name.startswith("val_")]
        values = {name: metrics[name].item() for name in known}
        values["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        row = {name: f"{value:.7g}" for name, value in values.items()}  # a float32 has no more digits
        row |= {"epoch": str(epoch), "step": str(trainer.global_step)}
        with atomic_path(self.path) as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows([*rows, row])


class TensorBoardFigures(Callback):
    """Shows in TensorBoard what goes in and what it goes through: a sheet of training images, the network's graph."""

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the sheet and the graph once, before the first step."""
        logger = trainer.logger
        if not isinstance(logger, TensorBoardLogger):
            return
        assert isinstance(pl_module, LitClassifier)
        from data_modules.sheets import sample_rows, sample_sheet  # matplotlib: only when something is drawn

        images, labels, indices = pl_module.data.split("train")
        rows = indices[sample_rows(labels.cpu()[indices])]
        logger.experiment.add_figure("train/samples", sample_sheet(images[rows], labels[rows], pl_module.class_names))
        if isinstance(trainer.strategy, FSDPStrategy):
            return  # each process has only a part of the weights
        net, size = pl_module.net, pl_module.net_size or images.shape[-2:]
        example = torch.zeros(2, pl_module.image_shape[0], *size, device=pl_module.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TensorBoard's writer traces; values that shape the graph are constants
            try:
                logger.experiment.add_graph(net.eval(), example)  # eval: zeros must not move any running mean
            except Exception as error:  # tracing fails in many ways, and a figure must not end a training
                print(f"TensorBoard gets no graph of this network: {error}")
            finally:
                net.train()
