"""A run that cannot be lost: what a checkpoint holds beside Lightning's own, when it is saved, how it is continued.

Checkpoints are saved only between two epochs or between two optimizer steps, when nothing of the step or epoch before
is still to come. Lightning's ModelCheckpoint saves while an epoch ends, before its schedule and its training metrics
are done with it; a run continued from there is no longer the same run.
"""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EMAWeightAveraging
from torch import Tensor

from lit_nn.classifier import LitClassifier

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)  # asked to end, Ctrl-C, SLURM's warning


class Stopped(Exception):
    """A signal asked the run to stop, and it did, with everything saved.

    Args:
        signum: The signal.
        path: The checkpoint from which to continue.
    """

    def __init__(self, signum: int, path: Path) -> None:
        super().__init__(signum, path)
        self.signum, self.path = signum, path


class Checkpoints(Checkpoint):
    """Saves best.ckpt (highest validation accuracy so far) and last.ckpt.

    Both after every epoch; last.ckpt also every so many steps or minutes, and when a signal asks the process to end.
    A second signal ends it at once.

    Args:
        folder: Where the files go.
        every_steps: Optimizer steps between two savings of last.ckpt inside an epoch; None for none.
        every_minutes: Minutes between two savings, likewise.
    """

    def __init__(self, folder: Path, every_steps: int | None = None, every_minutes: float | None = None) -> None:
        self.folder, self.every_steps, self.every_minutes = folder, every_steps, every_minutes
        self.best_score: float | None = None
        self.best_epoch: int | None = None
        self._signum: int | None = None
        self._old_handlers: dict[int, Any] = {}
        self._saved_at = 0.0  # time.monotonic() of the latest saving
        self._started = 0.0  # time.monotonic() less the seconds trained before

    @property
    def last(self) -> Path:
        """Path of last.ckpt."""
        return self.folder / "last.ckpt"

    def state_dict(self) -> dict[str, Any]:
        """The best score so far, its epoch, and the seconds of training."""
        return {"best_score": self.best_score, "best_epoch": self.best_epoch, "seconds": self.seconds}

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before a stop included."""
        return time.monotonic() - self._started

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the best score of the run that is continued."""
        self.best_score, self.best_epoch = state_dict["best_score"], state_dict["best_epoch"]
        self._started = time.monotonic() - state_dict["seconds"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start the clock."""
        if stage == "fit":
            self._started = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch for signals from now on."""
        self._saved_at = time.monotonic()
        for signum in SIGNALS:
            self._old_handlers[signum] = signal.signal(signum, self._on_signal)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back."""
        while self._old_handlers:
            signum, handler = self._old_handlers.popitem()
            signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: Any) -> None:
        if self._signum is not None:  # the second one: at once
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self._signum = signum
        print(f"\n{signal.Signals(signum).name}: saving after this step; once more ends at once.", flush=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save inside an epoch, if it is time to."""
        epoch_loop = trainer.fit_loop.epoch_loop
        if epoch_loop._should_accumulate() or epoch_loop._num_ready_batches_reached():
            return  # gradients are not in a checkpoint; and at the end of an epoch its own saving follows
        due = self._signum is not None
        if self.every_steps:
            due |= trainer.global_step % self.every_steps == 0
        if self.every_minutes:
            due |= time.monotonic() - self._saved_at >= 60 * self.every_minutes
        if trainer.world_size > 1:
            due = trainer.strategy.reduce_boolean_decision(due, all=False)
        if due:
            self._save(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what the epoch before has come to."""
        if trainer.global_step > 0:
            self._save(trainer, between_epochs=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what the training has come to."""
        self._save(trainer, between_epochs=True)

    def _save(self, trainer: L.Trainer, between_epochs: bool = False) -> None:
        score = trainer.callback_metrics.get("val_acc")
        if between_epochs and score is not None and (self.best_score is None or score.item() > self.best_score):
            self.best_score, self.best_epoch = score.item(), trainer.current_epoch - 1
            trainer.save_checkpoint(self.folder / "best.ckpt")
        trainer.save_checkpoint(self.last)
        self._saved_at = time.monotonic()
        if self._signum is not None:
            raise Stopped(self._signum, self.last)


class EMA(EMAWeightAveraging):
    """Keeps an exponential moving average of the weights, which is validated, tested and saved as the model's weights.

    Lightning's own callback does it; a checkpoint holds the raw weights too, so that a run can be continued.
    """

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the raw weights where they are: last.ckpt is yet to be saved, and best.ckpt has the average."""


class ExactState(Callback):
    """Puts into a checkpoint, and takes from it, what else decides the future of a run.

    That is the state of every random generator and the metrics of the epoch so far, of each process.
    """

    def __init__(self) -> None:
        self._to_restore: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the states of all processes."""
        assert isinstance(pl_module, LitClassifier)
        pl_module.train_metrics.flush()
        states: list[Any] = [{"random": random_state(), "metrics": metric_state(pl_module)}]
        if trainer.world_size > 1:
            own, states = states[0], [None] * trainer.world_size
            torch.distributed.all_gather_object(states, own)
        checkpoint["processes"] = states

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep this process's states until the training starts."""
        states = checkpoint["processes"]
        if len(states) == trainer.world_size:
            self._to_restore = states[trainer.global_rank]
        else:
            print(f"Saved by {len(states)} processes, continued by {trainer.world_size}: not exact to the last bit.")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore them: nothing draws random numbers between here and the next step."""
        assert isinstance(pl_module, LitClassifier)
        if self._to_restore is not None:
            restore_random_state(self._to_restore["random"])
            restore_metric_state(pl_module, self._to_restore["metrics"])
            self._to_restore = None


def random_state() -> dict[str, Any]:
    """State of every random generator of this process, as tensors and plain values."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Bring every random generator of this process into a state that `random_state` gave."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))


def metric_state(classifier: LitClassifier) -> dict[str, dict[str, Tensor]]:
    """Training loss and accuracy of the epoch so far."""
    metrics = classifier.train_metrics
    return {
        name: {key: value.detach().clone() for key, value in metric.metric_state.items()}  # type: ignore[union-attr]
        for name, metric in (("loss", metrics.loss), ("acc", metrics.acc))
    }


def restore_metric_state(classifier: LitClassifier, state: dict[str, dict[str, Tensor]]) -> None:
    """Set them to what `metric_state` gave."""
    for name, values in state.items():
        metric = getattr(classifier.train_metrics, name)
        for key, value in values.items():
            setattr(metric, key, value.to(metric.device))
