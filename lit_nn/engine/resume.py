"""What a checkpoint holds beside Lightning's own, and how it is taken up again: a run goes on to the last bit."""

import random
import subprocess
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from lit_nn.checkpoint import CHECKPOINT_FORMAT, read_checkpoint, save_checkpoint, versions
from lit_nn.classifier import LitClassifier

DEVICES: dict[str, Any] = {"cuda": torch.cuda, "mps": torch.mps}  # with random generators of their own


class SafeCheckpointIO(TorchCheckpointIO):
    """Has the Trainer write checkpoints completely or not at all, and read plain values only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        save_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(path)  # onto the CPU, whatever the arguments say


class RunState(Callback):
    """Puts into a checkpoint what else decides the future of a run, and takes it from there; and its origin."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        # Asked once: the code that runs is that of now, and asking git takes longer than saving a small network.
        self.origin = {"versions": versions(), "git_commit": git_commit()}
        self._restored: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add all of it."""
        assert isinstance(pl_module, LitClassifier)
        checkpoint |= {"format": CHECKPOINT_FORMAT, "settings": self.settings, **self.origin}
        latest = trainer.callback_metrics.items()  # what is logged at intervals would tell where a run was stopped
        checkpoint["metrics"] = {name: value.item() for name, value in latest if name.startswith("val_")}
        checkpoint["parts"] = pl_module.data.parts()
        pl_module.train_metrics.flush()
        states: list[Any] = [{"random": random_state(), "metrics": metric_state(pl_module)}]
        if trainer.world_size > 1:
            own, states = states[0], [None] * trainer.world_size
            torch.distributed.all_gather_object(states, own)
        checkpoint["processes"] = states
        batch, loader = images_per_batch(trainer, pl_module), trainer.train_dataloader
        checkpoint["order_depends_on"] = getattr(loader, "order_depends_on", [])
        checkpoint |= {"images_per_batch": batch, "images_per_step": batch * trainer.accumulate_grad_batches}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the states until the training starts."""
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
        batch, before = images_per_batch(trainer, pl_module), checkpoint["processes"]
        ratio = checkpoint["images_per_step"] / (batch * trainer.accumulate_grad_batches)
        loader = trainer.train_dataloader
        assert loader is not None
        same_order = checkpoint.get("order_depends_on", []) == getattr(loader, "order_depends_on", [])
        same_batches = ratio == 1 and checkpoint.get("images_per_batch", batch) == batch and same_order
        same_processes = len(before) == trainer.world_size
        if not same_processes and trainer.is_global_zero:
            print(f"It had {len(before)} processes, now {trainer.world_size}: not the same numbers to the last bit.")
        if loop.restarted_mid_epoch and same_batches:
            if same_processes or trainer.is_global_zero:  # metrics are sums: it does not matter who has them
                mine = [before[trainer.global_rank]] if same_processes else before
                restore_metric_state(pl_module, [process["metrics"] for process in mine])
        else:
            if loop.restarted_mid_epoch and trainer.is_global_zero:
                print("The batches are not those of before: the epoch starts again from its first image.")
            loop.epoch_loop.restarting = False  # or it would take the epoch that begins for one that was finished
            loader.load_state_dict({"epoch": trainer.current_epoch, "batches_done": 0})
        if same_processes:
            restore_random_state(before[trainer.global_rank]["random"])
        latest = checkpoint["metrics"].items()  # an epoch without validation goes by the one before
        trainer.callback_metrics.update({k: torch.tensor(value) for k, value in latest if k.startswith("val_")})
        _use_settings_of_now(trainer, pl_module, checkpoint["hyper_parameters"], ratio)


def images_per_batch(trainer: L.Trainer, classifier: LitClassifier) -> int:
    """Images of one batch, over all processes."""
    return min(classifier.data.batch_size * trainer.world_size, len(classifier.data.split("train")[2]))


def _use_settings_of_now(trainer: L.Trainer, classifier: LitClassifier, before: dict[str, Any], ratio: float) -> None:
    """Let the options of now win over those of the checkpoint; ``ratio`` is images per step then / now."""
    classifier.progress.on_train_start(trainer, classifier)  # the learning rate depends on the number of steps
    fresh: Any = classifier.configure_optimizers()
    schedule, fresh_schedule = trainer.lr_scheduler_configs[0].scheduler, fresh["lr_scheduler"]["scheduler"]
    optimizer = trainer.optimizers[0]
    new_lr, new_factor = (classifier.hparams[name] != before.get(name, 1.0) for name in ("lr", "backbone_lr"))
    for group, new in zip(optimizer.param_groups, fresh["optimizer"].param_groups, strict=True):
        kept = {"params"} if new_lr or (new_factor and "in_body" in group) else {"params", "lr"}
        group.update({name: value for name, value in new.items() if name not in kept})
        on_device = group.get("fused") or group.get("capturable")  # where it wants to find the number of its steps
        for weight in group["params"]:
            if "step" in (state := optimizer.state[weight]):
                state["step"] = state["step"].to(weight.device if on_device else "cpu")
    if isinstance(schedule, LambdaLR):
        schedule.base_lrs = fresh_schedule.base_lrs
        schedule.last_epoch = round(schedule.last_epoch * ratio)
        rates = zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
        for group, lr, factor in rates:
            group["lr"] = lr * factor(schedule.last_epoch)
    elif isinstance(schedule, ReduceLROnPlateau):
        for name in ("factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lrs", "eps"):
            setattr(schedule, name, getattr(fresh_schedule, name))


def git_commit() -> str:
    """Commit of this project, with "+changes" if something is not committed; "" if no repository has its files."""
    here, describe = Path(__file__), ["describe", "--always", "--abbrev=40", "--dirty=+changes", "--match="]
    git = partial(subprocess.run, capture_output=True, encoding="utf-8", check=True, cwd=here.parent)
    try:  # first whether the repository knows this file: the project may be installed below somebody's own
        git(["git", "ls-files", "--error-unmatch", here.name])
        return git(["git", *describe]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def random_state() -> dict[str, Any]:
    """State of every random generator of this process, as tensors and plain values."""
    kind, keys, *others = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        **{name: device.get_rng_state() if device.is_available() else None for name, device in DEVICES.items()},
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *others],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Bring every random generator of this process into a state that `random_state` gave."""
    torch.set_rng_state(state["torch"])
    for name, device in DEVICES.items():
        if state.get(name) is not None and device.is_available():
            device.set_rng_state(state[name])
    version, words, gauss = state["python"]  # tuples once; lists in older files
    random.setstate((version, tuple(words), gauss))
    kind, keys, *others = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *others))


def metric_state(classifier: LitClassifier) -> dict[str, dict[str, Tensor]]:
    """Training metrics of the epoch so far."""
    by_name = classifier.train_metrics.by_name
    return {name: deepcopy(cast(dict[str, Any], metric.metric_state)) for name, metric in by_name.items()}


def restore_metric_state(classifier: LitClassifier, states: list[dict[str, dict[str, Tensor]]]) -> None:
    """Set them to what `metric_state` gave, in several processes to the sum of it."""
    for name in states[0]:
        metric = classifier.train_metrics.by_name[name]
        for key in states[0][name]:
            first, *others = (state[name][key] for state in states)
            setattr(metric, key, move_data_to_device(sum(others, first), metric.device))
