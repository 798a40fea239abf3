"""The run that ``--resume`` goes on with: where it is, what it was set to, whether it can become what is asked for."""

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from lit_nn.checkpoint import check_network, read_checkpoint
from lit_nn.choices import flat
from lit_nn.classifier import LitClassifier
from lit_nn.config import class_names, read_config
from lit_nn.flags import UsageError, listed

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

    Attributes:
        folder: The run folder; None for a checkpoint that does not lie in one.
        path: The checkpoint; None if the run was ended before it had saved one, and starts again.
        checkpoint: What is in it, empty without one.
        settings: The options of the run, as in a YAML file.

    Raises:
        UsageError: If there is no such run, or its checkpoint holds no settings, or names classes in them.
        CheckpointError: If its checkpoint cannot be read.
    """

    def __init__(self, given: str, run_dir: str | None, trusted: bool) -> None:
        self.path, self.folder = _find(given, run_dir)
        self.checkpoint: dict[str, Any] = {}
        if self.path is not None:
            self.checkpoint = read_checkpoint(self.path)
            self.settings = _settings(self.checkpoint, self.path, trusted)
        else:
            assert self.folder is not None
            self.settings = read_config(self.folder / "config.yaml")
            rank_zero_only(print)(f"{self.folder} has no checkpoint yet: it starts again.")

    def check(self, classifier: LitClassifier, trainer: L.Trainer) -> None:
        """Compare it with what is to go on.

        Raises:
            UsageError: If it cannot become that.
        """
        before, now = self.checkpoint["hyper_parameters"], classifier.hparams
        misfit = check_network(dict(now), self.checkpoint["state_dict"])
        if misfit or before["class_names"] != now["class_names"]:
            raise UsageError(
                f"{self.path} is of {before.get('net')} for {len(before['class_names'])} classes, which "
                f"cannot become {now['net']} for {len(now['class_names'])} classes{f' ({misfit})' if misfit else ''}; "
                "start a new run, with --init_from to take over what fits"
            )
        for name in ("optimizer", "schedule"):
            kinds = {before.get(name), now[name]}
            if len(kinds) > 1 and (name == "optimizer" or "plateau" in kinds):
                raise UsageError(
                    f"--{name} {now[name]} cannot use the state of {before.get(name)} that the checkpoint holds; "
                    f"leave out --{name}, or start a new run, with --init_from to take over the weights"
                )
        args_before, args_now = before.get("optimizer_args") or {}, now["optimizer_args"] or {}
        for name in MORE_STATE.get(now["optimizer"], ()):
            if args_now.get(name) and not args_before.get(name):
                raise UsageError(
                    f"--model.optimizer_args.{name} {args_now[name]} needs a state that the checkpoint does not hold; "
                    "leave it out, or start a new run, with --init_from to take over the weights"
                )
        if isinstance(trainer.strategy, FSDPStrategy):
            # It numbers the parameters of an optimizer in the order of the layers, the others in that of its groups.
            trained = [number for number, parameter in enumerate(classifier.parameters()) if parameter.requires_grad]
            expected = sorted(trained, key=lambda number: not classifier.decayed[number])
            groups = self.checkpoint["optimizer_states"][0]["param_groups"]
            if [number for group in groups for number in group["params"]] != expected:
                raise UsageError(
                    "--strategy fsdp cannot use the optimizer's state in the checkpoint of another strategy; go on "
                    "with that one, or start a new run, with --init_from to take over the weights"
                )

    def is_complete(self, trainer: L.Trainer) -> bool:
        """Whether it has all the epochs or steps it is to have, or early stopping has ended it."""
        states, epochs, steps = (self.checkpoint[name] for name in ("callbacks", "epoch", "global_step"))
        waited = [
            states.get(callback.state_key, {}).get("wait_count", 0) >= max(callback.patience, 1)
            for callback in trainer.early_stopping_callbacks
            if isinstance(callback, EarlyStopping)
        ]
        return any(waited) or 0 < (trainer.max_epochs or -1) <= epochs or 0 < trainer.max_steps <= steps

    def describe(self, options: dict[str, Any]) -> str:
        """Say where it goes on, and with which options that are not those of before.

        Args:
            options: All options of now, by their dotted names.
        """
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


def _settings(checkpoint: dict[str, Any], path: Path, trusted: bool) -> dict[str, Any]:
    """The settings in a checkpoint, which is data: it may choose none of the classes that a YAML file may."""
    settings = checkpoint.get("settings")
    groups = ("data", "model", "trainer")
    if not isinstance(settings, dict) or not all(isinstance(settings.get(group), dict) for group in groups):
        raise UsageError(f"{path} holds no settings; it was not saved by a run of scripts/train.py or lit-nn")
    settings = {name: value for name, value in settings.items() if name not in ("config", "run_dir", "ckpt_path")}
    try:
        settings = yaml.safe_load(yaml.safe_dump(settings))
    except yaml.YAMLError as error:
        raise UsageError(f"the settings in {path} are not those of a run: {' '.join(str(error).split())}") from error
    known = listed("data_modules")
    data_sets = {f"data_modules{module}.{cls}" for name, cls in known.items() for module in ("", f".{name}")}
    for place, value in list(class_names(settings)):
        if place == "data.class_path" and value in data_sets:
            continue
        group, name = place.split(".")[:2]
        if not trusted:
            raise UsageError(
                f"{path} names {value} for {group}.{name}; a checkpoint chooses no classes. "
                "If you trust it, say so by --config RUN_DIR/config.yaml"
            )
        settings[group] = {key: item for key, item in settings[group].items() if key != name}
    return settings
