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
from lit_nn.engine.option_checks import refuse
from lit_nn.errors import UsageError, other_classes

# Of what older versions did not save.
DEFAULTS = {"monitor": "val_acc", "fit": "crop", "backbone_lr": 1.0, "freeze_epochs": 0}
BUFFERS = ("amsgrad", "centered", "momentum")  # arguments of optimizers that need a number more for each weight


class StartingPoint:
    """Where a stage begins: with nothing, or with the checkpoint that ``--ckpt_path`` continues, validates or tests.

    The settings in a checkpoint may choose no classes, unless there is a ``--config``, from which these then come.
    """

    def __init__(self, stage: str, given: dict[str, Any]) -> None:
        self.continues, name = stage == "fit" and "ckpt_path" in given, given.get("ckpt_path")
        self.path: Path | None = name and Path(name)  # of the checkpoint; None if the run has saved none
        self.folder: Path | None = None  # of the run that is continued; None if the checkpoint is in no run
        self.checkpoint, self.settings = dict[str, Any](), dict[str, Any]()
        self.began = dict[str, Any]()  # options of the model with which the run that is continued began
        if self.continues:
            self.path, self.folder = _find(given["ckpt_path"], given.get("run_dir"))
        if self.path is None:
            if self.folder is not None:
                self.settings = known_options(read_yaml(self.folder / "config.yaml"))
                _check_weights(given, self.settings["model"])
                rank_zero_only(print)(f"{self.folder} has no checkpoint yet: it starts again.")
            return
        self.checkpoint = read_checkpoint(self.path)
        if not self.continues:
            self.settings = settings_of_data(self.checkpoint, self.path)
            return
        self.settings = plain_settings(self.checkpoint, self.path, trusted="config" in given)
        model, plain = self.checkpoint["settings"]["model"], self.settings["model"]
        self.began = {n: model.get(n) for n in ("weights", "net_args", "backbone_lr") if n in plain}  # no classes
        _check_weights(given, model)
        model |= plain

    def check(self, classifier: LitClassifier, trainer: L.Trainer) -> None:
        """Refuse to go on as something that the checkpoint cannot become."""
        before, now = {**DEFAULTS, **self.checkpoint["hyper_parameters"]}, classifier.hparams
        plateau = "plateau" in (before.get("schedule"), now["schedule"])
        names = ["net", "net_args", "fit", "flip_in_eval", "optimizer", "monitor"]
        other = [name for name in names + ["schedule"] * plateau if (before.get(name) or None) != (now[name] or None)]
        # Of the body's parameters, whether they have a rate of their own, and whether they are trained at all.
        groups = [(h["backbone_lr"] != 1 or h["freeze_epochs"] != 0, h["freeze_epochs"] == -1) for h in (before, now)]
        other += ["freeze_epochs" if groups[0][1] != groups[1][1] else "backbone_lr"] * (groups[0] != groups[1])
        kept = [{name for name in BUFFERS if (h.get("optimizer_args") or {}).get(name)} for h in (before, now)]
        other += ["optimizer_args"] * (kept[0] != kept[1])
        cases = [f"--{name} {now[name]} cannot go on from {before.get(name)}; leave it out" for name in other]
        same_kind = before.get("multi_label", False) == now["multi_label"]
        if others := other_classes(before["class_names"], now["class_names"], same_kind):
            cases.insert(0, f"the data has {others}")  # from which the default of --monitor follows
        if misfit := check_tensors(classifier, self.checkpoint["state_dict"]):
            cases.append(f"net {before.get('net')} cannot become {now['net']} as it is asked for ({misfit})")
        # FSDP numbers the parameters of an optimizer in the order of the layers, the others in that of its groups.
        spread = str(self.checkpoint["settings"]["trainer"].get("strategy"))
        if isinstance(trainer.strategy, FSDPStrategy) and "fsdp" not in spread.lower():
            cases.append("--strategy fsdp cannot use the optimizer's state of another strategy; keep that")
        if cases:
            raise UsageError(f"{self.path}: {cases[0]}, or start a new run, with --weights CKPT to take over what fits")

    def is_complete(self, trainer: L.Trainer) -> str:
        """What has ended it and what is to be raised to go on; "" if it goes on."""
        states, epochs, steps = (self.checkpoint[name] for name in ("callbacks", "epoch", "global_step"))
        if 0 < (trainer.max_epochs or -1) <= epochs:
            return f"its {epochs} epochs. To go on, ask for more: --max_epochs {2 * epochs}"
        if 0 < trainer.max_steps <= steps:
            return f"its {steps} steps. To go on, ask for more: --trainer.max_steps {2 * steps}"
        may_end = epochs >= (trainer.min_epochs or 0) and steps >= (trainer.min_steps or 0)
        for callback in trainer.callbacks if may_end else ():  # type: ignore[attr-defined]
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


def _find(given: str, run_dir: str | None) -> tuple[Path | None, Path | None]:
    """Checkpoint and folder of a checkpoint, of a run folder, or of "last" or "best" in ``run_dir`` or the last run."""
    if given not in ("last", "best"):
        folder = Path(given)
    elif run_dir:
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


def rebuild(checkpoint: dict[str, Any], data: ImageDataModule) -> LitClassifier:
    """The classifier of a checkpoint, to be validated or tested on a data set with the same classes."""
    arguments, tensors = checkpoint["hyper_parameters"], checkpoint["state_dict"]
    shape, trained_on = tuple(data.image_shape), tuple(arguments["image_shape"])
    same_kind = arguments.get("multi_label", False) == data.multi_label
    others = other_classes(arguments["class_names"], data.class_names, same_kind)
    what = others or f"images {shape}, the checkpoint is for {trained_on}"
    text = f"{type(data).__name__} has {what}; choose other data with --data, --data_dir, --data.image_size"
    refuse(others or shape != trained_on, text)
    build_model(arguments, tensors)  # says what does not fit, before any memory is taken
    classifier = LitClassifier(**{**arguments, "weights": "none"})  # a file that names some was not made here
    classifier.load_state_dict(tensors)
    return classifier


def _check_weights(given: dict[str, Any], model: dict[str, Any]) -> None:
    """Refuse other weights than those that the run began with; the same ones come with the same command."""
    before = model.get("weights", "none")
    text = f"--weights is for the start of a run, and this one began with {before}; leave it out with --resume"
    refuse(given.get("model.weights", before) != before, text)


def new_run_dir(config: Any, data_name: str, continued: Path | None) -> Path | None:
    """The folder for what a training writes: the one asked for, or a new one; None if it only tries out."""
    if config.trainer.fast_dev_run:
        return None
    if config.run_dir is None:
        kind = f"{data_name}-{config.model.net.replace('/', '-')}"
        return Path("runs", kind, datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")[:-3])
    folder = Path(os.path.expanduser(config.run_dir))  # noqa: PTH111 (Path's own raises where there is no home)
    other = (folder / "config.yaml").exists() and not (continued and folder.resolve() == continued.resolve())
    if other and rank() == 0:  # which has just written it for the rest
        raise UsageError(f"{folder} holds another run; give a new --run_dir, or continue that run with --resume")
    return folder
