"""The run that ``--resume`` goes on with: where it is, what it was set to, whether it can become what is asked for."""

import math
import shutil
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from lit_nn.checkpoint import check_tensors, read_checkpoint
from lit_nn.classifier import LitClassifier
from lit_nn.engine.configuration import flat, known_options, plain_settings, read_yaml
from lit_nn.engine.option_checks import refuse
from lit_nn.errors import UsageError, other_classes

MORE_STATE = {"adam": ("amsgrad",), "adamw": ("amsgrad",), "rmsprop": ("centered", "momentum")}
"""Options of optimizers with which they remember more of every weight."""


class NothingToDo(Exception):
    """What was asked for is there already; the message says so."""

    exit_status = 0


class PreviousRun:
    """A run that was stopped, killed, or is to be made longer.

    Args:
        given: A checkpoint, a run folder, or "last" or "best" of ``run_dir``, or else of the latest run.
        run_dir: The option ``--run_dir``.
        trusted: Whether there is a ``--config``, from which the classes come that a checkpoint may not choose.
    """

    def __init__(self, given: str, run_dir: str | None, trusted: bool) -> None:
        self.path, self.folder = _find(given, run_dir)  # path: None if it has saved none yet; folder: None if in no run
        self.checkpoint: dict[str, Any] = {}
        if self.path is not None:
            self.checkpoint = read_checkpoint(self.path)
            self.settings = plain_settings(self.checkpoint, self.path, trusted)
        else:
            assert self.folder is not None
            self.settings = known_options(read_yaml(self.folder / "config.yaml"))
            rank_zero_only(print)(f"{self.folder} has no checkpoint yet: it starts again.")

    def check(self, classifier: LitClassifier, trainer: L.Trainer) -> None:
        """Refuse to go on as something that the checkpoint cannot become."""
        before, now = self.checkpoint["hyper_parameters"], classifier.hparams
        anew = "start a new run, with --init_from to take over what fits"
        others = other_classes(before["class_names"], now["class_names"])
        misfit = check_tensors(classifier, self.checkpoint["state_dict"])
        optimizer, schedules = now["optimizer"], {before.get("schedule"), now["schedule"]}
        # Older versions went by the accuracy, but their schedule by the loss.
        monitored = before.get("monitor", "val_loss in its schedule only" if "plateau" in schedules else "val_acc")
        args_before, args_now = before.get("optimizer_args") or {}, now["optimizer_args"] or {}
        more = [name for name in MORE_STATE.get(optimizer, ()) if args_now.get(name) and not args_before.get(name)]
        # FSDP numbers the parameters of an optimizer in the order of the layers, the others in that of its groups.
        trained = [number for number, parameter in enumerate(classifier.parameters()) if parameter.requires_grad]
        in_groups = sorted(trained, key=lambda number: not classifier.decayed[number])
        saved = [n for group in self.checkpoint["optimizer_states"][0]["param_groups"] for n in group["params"]]
        refuse(
            {
                f"{self.path}: the data has {others}; {anew}": others,
                f"{self.path} is of net {before.get('net')}, which cannot become {now['net']} as it is asked for "
                f"({misfit}); {anew}": misfit or before.get("net") != now["net"],
                f"--optimizer {optimizer} cannot use the state of {before.get('optimizer')} that the checkpoint holds; "
                f"leave out --optimizer, or {anew}": before.get("optimizer") != optimizer,
                f"--schedule {now['schedule']} cannot use the state of {before.get('schedule')} that the checkpoint "
                f"holds; leave out --schedule, or {anew}": len(schedules) > 1 and "plateau" in schedules,
                f"--monitor {now['monitor']}: the run so far went by {monitored}; give the same, or {anew}": monitored
                != now["monitor"],
                f"--model.optimizer_args.{more} needs a state that the checkpoint does not hold; leave it out, or "
                f"{anew}": more,
                "--strategy fsdp cannot use the optimizer's state in the checkpoint of another strategy; go on with "
                f"that one, or {anew}": isinstance(trainer.strategy, FSDPStrategy) and saved != in_groups,
            }
        )

    def is_complete(self, trainer: L.Trainer) -> str:
        """What has ended it and what is to be raised to go on; "" if it goes on."""
        states, epochs, steps = (self.checkpoint[name] for name in ("callbacks", "epoch", "global_step"))
        if 0 < (trainer.max_epochs or -1) <= epochs:
            return f"its {epochs} epochs. To go on, ask for more: --max_epochs {2 * epochs}"
        if 0 < trainer.max_steps <= steps:
            return f"its {steps} steps. To go on, ask for more: --trainer.max_steps {2 * steps}"
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            state = states.get(callback.state_key, {})
            if isinstance(callback, EarlyStopping) and state.get("wait_count", 0) >= max(callback.patience, 1):
                return f"early stopping, {epochs} epochs. To go on, give a larger --early_stopping"
            spent = state.get("time_elapsed", {}).get("train", 0.0)
            if isinstance(callback, Timer) and spent >= (callback.time_remaining() or math.inf):
                return f"{spent:.0f} s of training. To go on, give a larger --trainer.max_time"
        return ""

    def describe(self, options: dict[str, Any]) -> str:
        """Say where it goes on, and which options (by their dotted names) are not those of before."""
        epochs, steps = self.checkpoint["epoch"], self.checkpoint["global_step"]
        lines = [f"Continuing {self.path} after {epochs} epochs, {steps} steps"]
        for name, before in flat(self.checkpoint["settings"]):
            if name in options and options[name] != before:
                lines.append(f"  {name}: from the checkpoint {before} -> now {options[name]}")
        return "\n".join(lines)

    def copy_to(self, folder: Path) -> None:
        """Take along into another folder what the run goes on with: the rows and the best checkpoint so far."""
        if self.path is None or self.folder is None or self.folder.resolve() == folder.resolve():
            return
        for name in ("metrics.csv", "checkpoints/best.ckpt"):
            if (self.folder / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / name, folder / name)


def _find(given: str, run_dir: str | None) -> tuple[Path | None, Path | None]:
    """Checkpoint and folder; see `PreviousRun`."""
    if given not in ("last", "best"):
        folder = Path(given)
    elif run_dir is not None:
        folder = Path(run_dir)
    elif runs := [*Path("runs").glob("*/config.yaml"), *Path("runs").glob("*/*/config.yaml")]:
        folder = max(runs, key=lambda config: config.stat().st_mtime).parent
    else:
        raise UsageError(f"--resume {given}: there is no run in runs/; give a checkpoint or a run folder")
    if not folder.is_dir():
        return folder, folder.parent.parent if folder.parent.name == "checkpoints" else None
    last, best = folder / "checkpoints" / "last.ckpt", folder / "checkpoints" / "best.ckpt"
    if given == "best" or (best.exists() and not last.exists()):
        return best, folder
    started = (folder / "config.yaml").exists() and not last.exists()
    return None if started else last, folder
