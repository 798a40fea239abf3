"""Where a run begins: in a new folder, or with what ``--resume`` names, if that can become what is asked for."""

import math
import os
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from data_modules.base import ImageDataModule
from lit_nn.checkpoint import build_model, check_tensors, read_checkpoint
from lit_nn.classifier import LitClassifier
from lit_nn.engine.configuration import flat, known_options, plain_settings, read_yaml, settings_of_data
from lit_nn.engine.console import rank
from lit_nn.engine.flags import values_of
from lit_nn.engine.option_checks import refuse
from lit_nn.errors import UsageError, other_classes

# Options of optimizers with which they remember more of every weight.
MORE_STATE = {"adam": ("amsgrad",), "adamw": ("amsgrad",), "rmsprop": ("centered", "momentum")}


class PreviousRun:
    """A run that was stopped, killed, or is to be made longer.

    ``given`` is a checkpoint, a run folder, or "last" or "best" of the last of ``run_dirs``, or else of the latest run.
    It is ``trusted`` if there is a ``--config``, from which the classes come that a checkpoint may not choose.
    """

    def __init__(self, given: str, run_dirs: list[str], trusted: bool) -> None:
        self.path, self.folder = _find(given, run_dirs)  # path: None if it has saved none; folder: None if in no run
        self.checkpoint: dict[str, Any] = {}
        if self.path is not None:
            self.checkpoint = read_checkpoint(self.path)
            self.settings = plain_settings(self.checkpoint, self.path, trusted)
            # What the run began with is not asked for again: the checkpoint has the weights, and what belongs to them.
            its = self.checkpoint["hyper_parameters"]
            own = {"weights": "none", **{name: its[name] for name in ("net_args", "backbone_lr") if name in its}}
            for settings in (self.settings, self.checkpoint["settings"]):
                settings["model"].update(own)
        else:
            assert self.folder is not None
            self.settings = known_options(read_yaml(self.folder / "config.yaml"))
            rank_zero_only(print)(f"{self.folder} has no checkpoint yet: it starts again.")

    def check(self, classifier: LitClassifier, trainer: L.Trainer) -> None:
        """Refuse to go on as something that the checkpoint cannot become."""
        before, now = self.checkpoint["hyper_parameters"], classifier.hparams
        others = other_classes(before["class_names"], now["class_names"])
        misfit = check_tensors(classifier, self.checkpoint["state_dict"])
        # Older versions went by the accuracy, but their schedule by the loss.
        plateau = "plateau" in (before.get("schedule"), now["schedule"])
        monitored = before.get("monitor", "val_loss in its schedule only" if plateau else "val_acc")
        args_before, args_now = before.get("optimizer_args") or {}, now["optimizer_args"] or {}
        remembers = MORE_STATE.get(now["optimizer"], ())
        more = [name for name in remembers if args_now.get(name) and not args_before.get(name)]
        # FSDP numbers the parameters of an optimizer in the order of the layers, the others in that of its groups.
        trained = [number for number, parameter in enumerate(classifier.parameters()) if parameter.requires_grad]
        apart = [in_body and now["backbone_lr"] != 1 for in_body in classifier.body.in_body]
        in_groups = sorted(trained, key=lambda number: (not apart[number], not classifier.decayed[number]))
        saved = [n for group in self.checkpoint["optimizer_states"][0]["param_groups"] for n in group["params"]]
        other_net = misfit or before.get("net") != now["net"]
        other_strategy = isinstance(trainer.strategy, FSDPStrategy) and saved != in_groups
        cases = {
            f"the data has {others}": others,
            f"net {before.get('net')} cannot become {now['net']} as it is asked for ({misfit})": other_net,
            f"--model.optimizer_args.{more} needs a state that the checkpoint does not hold; leave it out": more,
            "--strategy fsdp cannot use the optimizer's state of another strategy; keep that": other_strategy,
        }
        for name in ("optimizer", "schedule"):
            old, new = before.get(name), now[name]
            text = f"--{name} {new} cannot use the state of {old} that the checkpoint holds; leave out --{name}"
            cases[text] = old != new and (name == "optimizer" or plateau)
        text = f"--monitor {now['monitor']}: the run so far went by {monitored}; give the same"
        cases[text] = monitored != now["monitor"]
        for text, holds in cases.items():
            refuse(holds, f"{self.path}: {text}, or start a new run, with --weights CKPT to take over what fits")

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
        changed = [(name, old) for name, old in flat(self.checkpoint["settings"]) if options.get(name, old) != old]
        lines = [f"  {name}: from the checkpoint {old} -> now {options[name]}" for name, old in changed]
        return "\n".join([f"Continuing {self.path} after {epochs} epochs, {steps} steps", *lines])

    def copy_to(self, folder: Path) -> None:
        """Take along into another folder what the run goes on with: the rows and the best checkpoint so far."""
        for name in ("metrics.csv", "checkpoints/best.ckpt") if self.path and self.folder else ():
            source, target = Path(self.folder or "", name), folder / name
            if source.exists() and source.resolve() != target.resolve():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


def starting_point(stage: str, words: list[str]) -> tuple[PreviousRun | None, dict[str, Any], dict[str, Any]]:
    """The run that ``--resume`` continues, the checkpoint to continue, validate or test, and the settings in it."""
    if not (given := values_of("--ckpt_path", words)):
        return None, {}, {}
    if stage != "fit":
        checkpoint = read_checkpoint(given[-1])
        return None, checkpoint, settings_of_data(checkpoint, Path(given[-1]))
    refuse(values_of("--model.weights", words), "--weights is for the start of a run; leave it out with --resume")
    previous = PreviousRun(given[-1], values_of("--run_dir", words), trusted=bool(values_of("--config", words)))
    return previous, previous.checkpoint, previous.settings


def _find(given: str, run_dirs: list[str]) -> tuple[Path | None, Path | None]:
    """Checkpoint and folder; see `PreviousRun`."""
    if given not in ("last", "best"):
        folder = Path(given)
    elif run_dirs:
        folder = Path(run_dirs[-1])
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


def rebuild(checkpoint: dict[str, Any], data: ImageDataModule) -> LitClassifier:
    """The classifier of a checkpoint, to be validated or tested on a data set with the same classes."""
    arguments, tensors = checkpoint["hyper_parameters"], checkpoint["state_dict"]
    shape, trained_on = tuple(data.image_shape), tuple(arguments["image_shape"])
    others = other_classes(arguments["class_names"], data.class_names)
    if others or shape != trained_on:
        what = others or f"images {shape}, the checkpoint is for {trained_on}"
        raise UsageError(
            f"{type(data).__name__} has {what}; choose other data with --data, --data_dir, --data.image_size"
        )
    build_model(arguments, tensors)  # says what does not fit, before any memory is taken
    classifier = LitClassifier(**arguments)
    classifier.load_state_dict(tensors)
    return classifier


def new_run_dir(config: Any, data_name: str, previous: PreviousRun | None) -> Path | None:
    """The folder for what a training writes: the one asked for, or a new one; None if it only tries out."""
    if config.trainer.fast_dev_run:
        return None
    if config.run_dir is None:
        kind = f"{data_name}-{config.model.net.replace('/', '-')}"
        return Path("runs", kind, datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")[:-3])
    folder = Path(os.path.expanduser(config.run_dir))  # noqa: PTH111 (Path's own raises where there is no home)
    continued = previous.folder if previous else None
    other = (folder / "config.yaml").exists() and not (continued and folder.resolve() == continued.resolve())
    if other and rank() == 0:  # which has just written it for the rest
        raise UsageError(f"{folder} holds another run; give a new --run_dir, or continue that run with --resume")
    return folder
