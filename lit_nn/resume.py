"""A run that cannot be lost: what a checkpoint holds beside Lightning's own, when it is saved, how it is continued.

Checkpoints are saved only between two epochs or between two optimizer steps, when nothing of the step or epoch before
is still to come. Lightning's ModelCheckpoint saves while an epoch ends, before its schedule and its training metrics
are done with it; a run continued from there is no longer the same run.
"""

import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lit_nn import distributed
from lit_nn.checkpoint import UNFINISHED, copy_checkpoint
from lit_nn.classifier import LitClassifier

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)  # asked to end, Ctrl-C, SLURM's warning


ASK_EVERY = 8  # steps between two questions of several processes to one another whether one of them wants to save


class Stopped(Exception):
    """A signal asked the run to stop, and it did, with everything saved.

    Args:
        signum: The signal.
        path: The checkpoint from which to continue.
    """

    def __init__(self, signum: int, path: Path) -> None:
        super().__init__(f"Stopped. {distributed.to_continue(path.parent.parent)}")
        self.exit_status = 128 + signum


class TrainingError(Exception):
    """A training cannot go on; the message says where and why."""

    exit_status = 1


class Checkpoints(Checkpoint):
    """Saves best.ckpt (highest validation accuracy so far) and last.ckpt.

    Both after every epoch, which goes by its latest validation (with ``--trainer.val_check_interval`` that may be some
    steps old); last.ckpt also every so many steps or minutes, and when a signal asks the process to end.
    A second signal ends it at once. Several processes heed a signal, or the minutes, within eight steps.

    Args:
        folder: Where the files go.
        every_steps: Optimizer steps between two savings of last.ckpt inside an epoch; None for none.
        every_minutes: Minutes between two savings, likewise.
    """

    def __init__(self, folder: Path, every_steps: int | None = None, every_minutes: float | None = None) -> None:
        self.folder, self.every_steps, self.every_minutes = folder, every_steps, every_minutes
        self.best_score: float | None = None
        self.best_epoch: int | None = None
        self._signum = 0  # of the signal that has come, if one has
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
        """Go on with the best score of the run that is continued, as long as its best.ckpt is there."""
        if (self.folder / "best.ckpt").exists():
            self.best_score, self.best_epoch = state_dict["best_score"], state_dict["best_epoch"]
        self._started = time.monotonic() - state_dict["seconds"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start the clock; all processes save into the folder of the first one, whose name may hold the time."""
        if stage == "fit":
            self._started = time.monotonic()
            self.folder = trainer.strategy.broadcast(self.folder)
            distributed.to_continue(self.folder.parent)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch for signals from now on, and remove what a process that was killed while saving has left."""
        self._saved_at = time.monotonic()
        if threading.current_thread() is threading.main_thread():  # no other one may ask for signals
            for signum in SIGNALS:
                self._old_handlers[signum] = signal.signal(signum, self._on_signal)
        if trainer.is_global_zero:
            for leftover in self.folder.glob(f".*{UNFINISHED}"):
                leftover.unlink()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back."""
        while self._old_handlers:
            signum, handler = self._old_handlers.popitem()
            signal.signal(signum, handler)

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
        wanted = self._signum or int(steps_due or minutes_due)
        # Nearly always it is not time to: the questions below take longer, and those to other processes longer still.
        if trainer.world_size == 1:
            if not wanted:
                return
        elif not steps_due and trainer.global_step % ASK_EVERY:
            return
        epoch_loop = trainer.fit_loop.epoch_loop
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        # Gradients are not in a checkpoint; a continued run would leave out a validation that follows this very step;
        # and at the end of an epoch its own saving follows.
        if (
            epoch_loop._should_accumulate()
            or epoch_loop._should_check_val_fx(fetcher)
            or epoch_loop._num_ready_batches_reached()
        ):
            return
        if _largest(trainer, wanted):
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
            best = self.folder / "best.ckpt"
            trainer.save_checkpoint(best, weights_only=False)
            if trainer.is_global_zero:
                copy_checkpoint(best, self.last)  # to save it once more would take much longer
        else:
            trainer.save_checkpoint(self.last, weights_only=False)
        self._saved_at = time.monotonic()
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
    continued.

    Args:
        decay: Share of the average that stays at every step.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self._move = get_ema_multi_avg_fn(decay)
        self._raw: list[Tensor] = []  # weights and buffers, while the average is validated in their place

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the average; all tensors at once, while Lightning's way waits for the GPU at each of them."""
        if trainer.global_step == self._latest_update_step:  # gradients are being accumulated
            return
        first = self._latest_update_step == 0
        assert self._average_model is not None
        averages, weights = [], []
        for average, weight in zip(_tensors(self._average_model.module), _tensors(pl_module), strict=True):
            if first or not average.is_floating_point():  # a number of batches is counted, not averaged
                average.copy_(weight)
            else:
                averages.append(average)
                weights.append(weight.to(average.dtype))  # not the same where the weights are not float32
        if averages:
            self._move(averages, weights, None)
        self._average_model.n_averaged += 1
        self._latest_update_step = trainer.global_step

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average in the place of the weights; to exchange them, as Lightning does, may round both."""
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


class ExactState(Callback):
    """Puts into a checkpoint, and takes from it, what else decides the future of a run.

    That is the state of every random generator, and the metrics so far, of each process.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the states of all processes."""
        assert isinstance(pl_module, LitClassifier)
        pl_module.train_metrics.flush()
        states: list[Any] = [{"random": random_state(), "metrics": metric_state(pl_module)}]
        if trainer.world_size > 1:
            own, states = states[0], [None] * trainer.world_size
            torch.distributed.all_gather_object(states, own)
        checkpoint["processes"] = states
        checkpoint["images_per_step"] = images_per_step(trainer, pl_module)
        checkpoint["images_per_batch"] = images_per_batch(trainer, pl_module)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the states until the training starts."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._restored = dict(checkpoint)
        for callback in trainer.early_stopping_callbacks:  # its patience is an option, not a state
            if state := checkpoint["callbacks"].get(callback.state_key):
                state["patience"] = callback.patience

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore them: nothing draws random numbers between here and the next step."""
        assert isinstance(pl_module, LitClassifier)
        if self._restored is None:
            return
        checkpoint, self._restored = self._restored, None
        loop = trainer.fit_loop
        loop._restarting = False  # or a plateau schedule would miss the end of this epoch
        if loop.restarted_on_epoch_start:
            loop.epoch_progress.current.ready += 1  # Lightning has counted it back, and will not count it again
        ratio = checkpoint["images_per_step"] / images_per_step(trainer, pl_module)
        before = checkpoint["processes"]
        same_processes = len(before) == trainer.world_size
        if not same_processes and trainer.is_global_zero:
            print(f"It had {len(before)} processes, now {trainer.world_size}: not the same numbers to the last bit.")
        batch = images_per_batch(trainer, pl_module)
        same_batches = ratio == 1 and checkpoint.get("images_per_batch", batch) == batch
        if loop.restarted_mid_epoch and same_batches:
            if same_processes:
                restore_metric_state(pl_module, before[trainer.global_rank]["metrics"])
            elif trainer.is_global_zero:  # metrics are sums: it does not matter who has them
                restore_metric_state(pl_module, _sum([process["metrics"] for process in before]))
        else:
            if loop.restarted_mid_epoch and trainer.is_global_zero:
                print("The batches are not those of before: the epoch starts again from its first image.")
            loop.epoch_loop.restarting = False  # or it would take the epoch that begins for one that was finished
            loader = trainer.train_dataloader
            assert loader is not None
            loader.load_state_dict({"epoch": trainer.current_epoch, "batches_done": 0})
        if same_processes:
            restore_random_state(before[trainer.global_rank]["random"])
        latest = checkpoint["metrics"].items()  # an epoch without validation goes by the one before
        trainer.callback_metrics.update({k: torch.tensor(value) for k, value in latest if k.startswith("val_")})
        _use_settings_of_now(trainer, pl_module, checkpoint["hyper_parameters"]["lr"], ratio)


def images_per_batch(trainer: L.Trainer, classifier: LitClassifier) -> int:
    """Images of one batch, over all processes."""
    return min(classifier.data.batch_size * trainer.world_size, len(classifier.data.split("train")[2]))


def images_per_step(trainer: L.Trainer, classifier: LitClassifier) -> int:
    """Images behind one optimizer step, over all processes."""
    return images_per_batch(trainer, classifier) * trainer.accumulate_grad_batches


def _use_settings_of_now(trainer: L.Trainer, classifier: LitClassifier, lr_before: float, ratio: float) -> None:
    """Let the options of now win over those that optimizer and schedule have brought from the checkpoint.

    Where no option has changed, neither does anything here.

    Args:
        trainer: About to go on.
        classifier: What it trains.
        lr_before: The option lr of the checkpoint.
        ratio: Images per step then / now; the steps taken are counted in steps of now.
    """
    classifier.on_train_start()  # tells it the number of steps, on which the learning rate depends
    fresh = classifier.configure_optimizers()
    schedule, new_schedule = trainer.lr_scheduler_configs[0].scheduler, cast(Any, fresh["lr_scheduler"])["scheduler"]
    optimizer, fresh_optimizer = trainer.optimizers[0], fresh["optimizer"]
    groups = optimizer.param_groups
    for group, new in zip(groups, fresh_optimizer.param_groups, strict=True):
        changing = {"params", "lr"} if classifier.hparams["lr"] == lr_before else {"params"}
        group.update({name: value for name, value in new.items() if name not in changing})
        on_device = group.get("fused") or group.get("capturable")  # where it wants to find the number of its steps
        for weight in group["params"]:
            if "step" in (state := optimizer.state[weight]):
                state["step"] = state["step"].to(weight.device if on_device else "cpu")
    if isinstance(schedule, LambdaLR):
        schedule.base_lrs = new_schedule.base_lrs
        schedule.last_epoch = round(schedule.last_epoch * ratio)
        for group, base_lr, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = base_lr * factor(schedule.last_epoch)
    elif isinstance(schedule, ReduceLROnPlateau):
        for name in ("factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lrs", "eps"):
            setattr(schedule, name, getattr(new_schedule, name))


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


def _sum(states: list[dict[str, dict[str, Tensor]]]) -> dict[str, dict[str, Tensor]]:
    """Metrics of all processes together."""
    first = states[0]
    return {
        name: {key: torch.stack([state[name][key] for state in states]).sum(0) for key in first[name]} for name in first
    }


def restore_metric_state(classifier: LitClassifier, state: dict[str, dict[str, Tensor]]) -> None:
    """Set them to what `metric_state` gave."""
    for name, values in state.items():
        metric = getattr(classifier.train_metrics, name)
        for key, value in values.items():
            setattr(metric, key, value.to(metric.device))
