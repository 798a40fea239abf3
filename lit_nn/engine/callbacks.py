"""What runs beside the Trainer: best.ckpt and last.ckpt, the average of weights, metrics.csv, the progress bar."""

import csv
import hashlib
import itertools
import math
import operator
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, TQDMProgressBar, WeightAveraging
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from data_modules.files import atomic_path, write_csv
from data_modules.images.features import keep_features
from lit_nn.classifier import LitClassifier
from lit_nn.errors import Ended, UsageError
from lit_nn.finetune import features as features_of

# Asked to end, Ctrl-C, SLURM's warning.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
ASK_EVERY = 8  # steps between two questions of several processes to one another whether one of them wants to save


class Checkpoints(Checkpoint):
    """Saves best.ckpt and last.ckpt, when nothing of the step or epoch before is still to come: docs/checkpoints.md.

    Lightning's ModelCheckpoint saves while an epoch ends, before its schedule and its training metrics are done with
    it; a run continued from there is no longer the same run.
    """

    def __init__(self, folder: Path, every_steps: int | None = None, every_minutes: float | None = None) -> None:
        self.folder, self.every_steps, self.every_minutes = folder, every_steps, every_minutes
        self.best_score: float | None = None
        self._signum = 0  # of the signal that has come, if one has
        self._old_handlers: dict[int, Any] = {}
        self._saved_at = 0.0  # time.monotonic() of the latest saving
        self._started = 0.0  # time.monotonic() less the seconds trained before
        self._ends_inside = False  # whether the run ends inside an epoch
        self._stop_put_off = False  # whether it is to stop after this step, whose gradients are still being gathered
        self._steps_due = False  # whether every_steps has asked for a save

    @property
    def last(self) -> Path:
        return self.folder / "last.ckpt"

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before a stop included."""
        return time.monotonic() - self._started

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the best score of the run that is continued, as long as its best.ckpt is there."""
        if (self.folder / "best.ckpt").exists():
            self.best_score = state_dict["best_score"]
        self._started = time.monotonic() - state_dict["seconds"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save into the folder of the first process, whose name may hold the time."""
        if stage == "fit":
            self._started = time.monotonic()
            self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Watch for signals; refuses validations between two optimizer steps."""
        self._saved_at = time.monotonic()
        every, gathered = trainer.val_check_batch or math.inf, trainer.accumulate_grad_batches
        if every < trainer.num_training_batches and every % gathered:  # best.ckpt would lack some gradients
            text = f"a validation every {every} batches comes between two optimizer steps, of {gathered} batches each"
            raise UsageError(f"{text}; give another --trainer.val_check_interval")
        if threading.current_thread() is threading.main_thread():  # no other one may ask for signals
            self._old_handlers = {signum: signal.signal(signum, self._on_signal) for signum in SIGNALS}

    def teardown(self, *_: Any, **__: Any) -> None:
        """Give the signals back."""
        while self._old_handlers:
            signal.signal(*self._old_handlers.popitem())

    on_exception = teardown  # Lightning tears nothing down after an error

    def _on_signal(self, signum: int, frame: Any) -> None:
        self._signum = signum
        for second in SIGNALS:  # ends at once, even in the middle of a long computation that knows nothing of Python
            signal.signal(second, signal.SIG_DFL)
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            text = f"\n{signal.Signals(signum).name}: saving after this step; once more ends at once.\n"
            os.write(2, text.encode())  # print would fail if the signal came in the middle of another print

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save inside an epoch, if it is time to."""
        trainer.should_stop |= self._stop_put_off
        gathers = (batch_idx + 1) % trainer.accumulate_grad_batches > 0
        # One that a validation puts off stays due.
        self._steps_due |= bool(self.every_steps and not gathers and trainer.global_step % self.every_steps == 0)
        minutes_due = bool(self.every_minutes and time.monotonic() - self._saved_at >= 60 * self.every_minutes)
        ends = _ends(trainer)
        wanted = self._signum or int(self._steps_due or minutes_due)
        # Nearly always it is not time to: the questions below take longer, and those to other processes longer still.
        if not ends and not (
            wanted if trainer.world_size == 1 else self._steps_due or trainer.global_step % ASK_EVERY == 0
        ):
            return
        if trainer.is_last_batch:  # the epoch's own saving follows
            return
        self._stop_put_off = gathers and ends
        if gathers:  # gradients are not in a checkpoint
            trainer.should_stop &= not ends
            return
        # A continued run would leave out a validation that follows this very step; not that of a stop, which is no part
        # of a run without it.
        stops, trainer.should_stop = trainer.should_stop, False
        validates = trainer.fit_loop.epoch_loop._should_check_val_fx(cast(Any, trainer.fit_loop._data_fetcher))
        trainer.should_stop = stops
        self._ends_inside = ends and not validates
        if not validates and (ends or _largest(trainer, wanted)):
            self._save(trainer, self.last)
        if not ends and not validates:
            self._stop_if_asked_to(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Save what the epoch before has come to."""
        self._ends_inside = False  # what had asked it to end was overruled, by min_epochs for instance
        if trainer.global_step > 0:
            self.on_train_end(trainer)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save the best inside an epoch: at its end the weights are others than those that were validated."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.is_last_batch:
            self._save_best(trainer)
            if _ends(trainer) and not self._ends_inside:  # early stopping by this validation, or its step was the last
                self._ends_inside = True
                self._save(trainer, self.last)

    def _save_best(self, trainer: L.Trainer) -> bool:
        """Save best.ckpt if the last validation is better than all before; whether it is."""
        classifier = cast(LitClassifier, trainer.lightning_module)
        score = trainer.callback_metrics.get(classifier.hparams["monitor"])
        better = operator.gt if classifier.mode == "max" else operator.lt
        if is_best := score is not None and (self.best_score is None or better(score.item(), self.best_score)):
            self.best_score = score.item()
            self._save(trainer, self.folder / "best.ckpt")
        return is_best

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save what the training has come to."""
        is_best, self._steps_due = self._save_best(trainer), False
        if is_best and not self._ends_inside and trainer.is_global_zero:
            with atomic_path(self.last) as path:  # to save it once more would take much longer
                shutil.copyfile(self.folder / "best.ckpt", path)
        elif not is_best and not self._ends_inside:  # else last.ckpt is there, from inside the epoch, which is not over
            self._save(trainer, self.last)
        self._stop_if_asked_to(trainer)

    def _save(self, trainer: L.Trainer, path: Path) -> None:
        trainer.save_checkpoint(path, weights_only=False)
        self._saved_at = time.monotonic()
        self._steps_due &= path != self.last

    def _stop_if_asked_to(self, trainer: L.Trainer) -> None:
        if signum := _largest(trainer, self._signum):  # a signal may have reached only one process
            raise Ended(f"Stopped. {to_continue(self.folder.parent)}", 128 + signum)


def to_continue(folder: Path) -> str:
    """The sentence that says how to continue a run."""
    launched_outside = "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_NTASKS" in os.environ
    how = ", with the same launcher: " if launched_outside else ": python "
    return f"To continue{how}scripts/train.py --resume {shlex.quote(str(folder))}"


def _ends(trainer: L.Trainer) -> bool:
    """Whether the training ends after this step: by max_steps, or a callback has asked it to (max_time) and it may."""
    epochs, steps = trainer.min_epochs or 0, trainer.min_steps or 0
    may_stop = trainer.should_stop and trainer.current_epoch >= epochs and trainer.global_step >= steps
    return trainer.global_step == trainer.max_steps or may_stop


def _largest(trainer: L.Trainer, number: int) -> int:
    """The largest number that any process has come with; the same answer on all of them."""
    return int(trainer.strategy.reduce(torch.tensor(number, device=trainer.strategy.root_device), reduce_op="max"))


class EMA(WeightAveraging):
    """Keeps an exponential moving average of the weights from the first step on, which is validated, tested and saved.

    Lightning's EMAWeightAveraging waits for the GPU at every step, and leaves the average in the place of the weights.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self._decay = decay

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Move the average, all tensors at once."""
        if trainer.global_step == self._latest_update_step:  # gradients are being accumulated
            return
        assert self._average_model is not None
        tensors = (itertools.chain(m.parameters(), m.buffers()) for m in (self._average_model.module, pl_module))
        averages, weights = [], []
        for average, weight in zip(*tensors, strict=True):
            if average.is_floating_point():
                averages.append(average)
                weights.append(weight.to(average.dtype))  # not the same where the weights are not float32
            else:
                average.copy_(weight)  # batches are counted, not averaged
        get_ema_multi_avg_fn(self._decay if self._latest_update_step else 0.0)(averages, weights, None)
        self._average_model.n_averaged += 1
        self._latest_update_step = trainer.global_step

    def on_train_end(self, *_: Any) -> None:
        """Leave the raw weights where they are: last.ckpt is yet to be saved, and best.ckpt has the average."""


class KeepFeatures(Callback):
    """Computes what a frozen network sees in each image once, before the training, which then goes by that."""

    @torch.inference_mode()
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compute the features, or find those of an earlier run, on the device and in the precision of the training."""
        assert isinstance(pl_module, LitClassifier)
        model, device = pl_module.eval(), trainer.strategy.root_device
        network = hashlib.sha256(repr((model.arguments, trainer.precision)).encode())
        for name, tensor in model.state_dict().items():
            if not name.startswith(model.body.heads):
                network.update(tensor.cpu().flatten().view(torch.uint8).numpy())  # numpy has no bfloat16

        def features(images: Tensor) -> Tensor:
            with trainer.precision_plugin.forward_context():
                return features_of(model, images.to(device))

        keep_features(model.data, features, network.digest(), 8 if device.type == "cpu" else 256)  # see docs/photos.md
        model.train()


class MetricsCSV(Callback):
    """Writes metrics.csv: a row per epoch, when the next one begins: only then its metrics are known."""

    COLUMNS = ("epoch", "step", "lr", "train_loss", "train_acc", "val_loss", "val_acc")  # and what else is logged

    def __init__(self, path: Path) -> None:
        self.path = path
        self.validated: int | None = None  # the latest epoch that had a validation

    def state_dict(self) -> dict[str, Any]:
        return {"validated": self.validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validated = state_dict["validated"]

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.validated = trainer.current_epoch

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.on_train_epoch_start(trainer)

    @rank_zero_only
    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        metrics, epoch = trainer.callback_metrics, trainer.current_epoch - 1
        if epoch < 0 or "train_loss" not in metrics:
            return
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        rows = [row for row in csv.DictReader(lines) if int(row["epoch"]) < epoch]
        names = [name for name in metrics if name not in ("train_loss_step", "lr")]
        columns = dict.fromkeys([*self.COLUMNS, *sorted({*names, *(name for row in rows for name in row)})])
        values = {n: metrics[n].item() for n in names if epoch == self.validated or not n.startswith("val_")}
        values["lr"] = trainer.optimizers[0].param_groups[-1]["lr"]  # the head's
        row = {name: f"{value:.7g}" for name, value in values.items()}  # a float32 has no more digits
        row |= {"epoch": str(epoch), "step": str(trainer.global_step)}
        write_csv(self.path, [columns, *([line.get(name, "") for name in columns] for line in [*rows, row])])
        if isinstance(bar := trainer.progress_bar_callback, ProgressBar) and bar.is_disabled:
            shown = dict.fromkeys(["train_loss", "val_loss", "val_acc", trainer.lightning_module.hparams["monitor"]])
            text = ", ".join(f"{name} {values[name]:.4f}" for name in shown if name in values)
            print(f"epoch {epoch + 1} of {trainer.max_epochs}: {text}", flush=True)


class ProgressBar(TQDMProgressBar):
    """Progress with the metrics of the latest batches; without a terminal, `MetricsCSV` prints a line an epoch."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=20 if sys.stdout.isatty() else 0)
        self._recent: dict[str, float] = {}

    def on_exception(self, *_: Any) -> None:
        """Leave the bar's line, so that the message that follows has one of its own."""
        if self.is_enabled:
            print(flush=True)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Loss and accuracy of the latest training batches, the latest validation's, and what a user logs for it."""
        assert isinstance(pl_module, LitClassifier)
        self._recent = pl_module.train_metrics.recent() or self._recent  # just after they were flushed there are none
        shown, names = super().get_metrics(trainer, pl_module), ("val_loss", "val_acc", pl_module.hparams["monitor"])
        shown.pop("v_num", None)
        known = {**self._recent, **{name: trainer.callback_metrics.get(name) for name in names}}
        return {**shown, **{name: f"{value:.3f}" for name, value in known.items() if value is not None}}
