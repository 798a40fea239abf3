"""The LightningCLI of the project: fit, validate, test and predict over LitClassifier and the data modules."""

import argparse
import csv
import functools
import inspect
import json
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy, ParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

from data_modules import DATA_MODULES, ImageDataModule
from lit_nn import distributed
from lit_nn.callbacks import (
    Compile,
    MetricsCSV,
    ProgressBar,
    RunFacts,
    TensorBoardPictures,
    git_commit,
    versions,
)
from lit_nn.checkpoint import SafeCheckpointIO, check_network, load_classifier, read_checkpoint
from lit_nn.classifier import LitClassifier
from lit_nn.flags import UsageError, flags, nearest, to_dotted
from lit_nn.loop import LeanEpochLoop
from lit_nn.resume import EMA, Checkpoints, ExactState, NothingToDo, TrainingError
from lit_nn.transfer import init_from
from lit_nn.tune import TUNED, tune

FSDP_UNIT = 10_000_000  # parameters of a part of a network that FSDP gathers only while it is needed
DESCRIPTION = ("class_names", "image_shape", "mean", "std")  # what the data set tells the classifier
TRUSTED = ("lightning", "torch", "torchmetrics", "lit_nn", "data_modules")  # packages that a YAML file may name


class LitCLI(LightningCLI):
    """Fits, validates, tests and predicts, with flat flags, dotted flags and YAML files.

    Args:
        argv: Words of the command line, the subcommand first.

    Raises:
        UsageError: If what was typed, or what stands in a YAML file, cannot be done.
    """

    config: Any
    trainer: L.Trainer
    datamodule: ImageDataModule
    model: LitClassifier

    def __init__(self, argv: Sequence[str]) -> None:
        quieten()
        try:
            self.launcher = distributed.launcher()
        except RuntimeError as error:
            raise UsageError(str(error)) from error
        distributed.join(self.launcher)
        distributed.wait_for_first()
        words = to_dotted(argv)
        self.run_dir: Path | None = None  # stays None where nothing is written
        self.continued: dict[str, Any] | None = None  # the checkpoint that a run goes on from
        self.continued_dir: Path | None = None  # the folder of that run
        with tempfile.TemporaryDirectory() as folder:
            if words[:1] == ["fit"] and (given := value_of("--ckpt_path", words)):
                checkpoint, self.continued_dir = checkpoint_to_continue(given, value_of("--run_dir", words))
                self.continued = read_checkpoint(checkpoint) if checkpoint else None
                words = continue_from(checkpoint, self.continued, self.continued_dir, words, Path(folder))
            for path in values_of("--config", words):
                check_config(Path(path))
            self._parse_and_run(words)

    def _parse_and_run(self, words: list[str]) -> None:
        try:
            super().__init__(
                LitClassifier,
                ImageDataModule,
                subclass_mode_data=True,
                save_config_callback=None,  # before_fit writes it into the run folder
                trainer_defaults={"max_epochs": 20, "num_sanity_val_steps": 0, "enable_model_summary": False},
                seed_everything_default=42,
                parser_kwargs={"allow_abbrev": False, "exit_on_error": False},
                args=words,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,  # would make checkpoints name a function to be imported
            )
        except argparse.ArgumentError as error:
            raise UsageError(explain(str(error), self._option_names())) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The default data set, the run folder, and what the classifier learns from the data set."""
        for flag in flags():
            if flag.name == flag.option and flag.value_type is not None:
                parser.add_argument(f"--{flag.name}", type=flag.value_type | None, default=None, help=flag.help)
        parser.set_defaults({"data": {"class_path": "data_modules.FashionMNISTSample"}})
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)
        for name in DESCRIPTION:
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the words given to the constructor."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Lightning would let the checkpoint's arguments win over the command line; here it is the other way round."""

    @property
    def settings(self) -> Any:
        """The parsed options of the subcommand."""
        return self.config[self.subcommand]

    def instantiate_classes(self) -> None:
        """Build data module, classifier and Trainer."""
        if self.subcommand == "fit":
            self.run_dir = run_folder(self.settings, self.continued_dir)
            self._check_tune()
        elif not self.settings.ckpt_path:
            raise UsageError(f"{self.subcommand} what? Give the checkpoint: --ckpt_path RUN_DIR/checkpoints/best.ckpt")
        try:
            super().instantiate_classes()
            self._check_processes()
        except (ValueError, TypeError, MisconfigurationException) as error:
            hint = "" if "backend" not in str(error) else "; --accelerator cpu and --accelerator auto work everywhere"
            raise UsageError(f"{str(error).rstrip('.!')}{hint}") from error
        if self.subcommand != "fit":
            self.model = load_classifier(self.settings.ckpt_path)
            if self.model.hparams["class_names"] != list(self.datamodule.class_names):
                raise UsageError(
                    f"the checkpoint knows the classes {self.model.hparams['class_names']}, "
                    f"the data set has {list(self.datamodule.class_names)}; choose the data set with --data"
                )
        distributed.join(getattr(self.trainer.strategy, "cluster_environment", None))
        if self.subcommand != "fit":
            distributed.go()

    def _check_tune(self) -> None:
        what = self.settings.tune
        if what is not None and what not in TUNED:
            raise UsageError(f"--tune is '{what}'.{nearest(what, TUNED)} Allowed: {', '.join(TUNED)}")
        if what is not None and (self.run_dir is None or self.continued is not None):
            raise UsageError("--tune is for the start of a run, not for --resume or --fast_dev_run")

    def _tune(self, what: str, folder: Path) -> None:
        plot = folder / "lr_find.png"
        value = tune(what, self.model, self.datamodule, self.trainer, plot)
        if what == "lr":
            self.model.hparams["lr"] = self.settings.model.lr = value
        else:
            self.datamodule.batch_size = self.settings.data.init_args.batch_size = int(value)
        self.run_facts.settings = self.plain_config()
        print(f"--tune {what}: {value:g}" + (f" ({plot})" if what == "lr" else ""))

    def _check_processes(self) -> None:
        """Raises ValueError if several processes cannot do what is asked for."""
        trainer, strategy, options = self.trainer, self.trainer.strategy, self.settings.trainer
        if isinstance(strategy, ParallelStrategy) and strategy.cluster_environment is not None:
            strategy.cluster_environment.validate_settings(trainer.num_devices, trainer.num_nodes)
        if options.sync_batchnorm and trainer.world_size > 1 and strategy.root_device.type == "cpu":
            raise ValueError("--sync_batchnorm needs GPUs: torch has no SyncBatchNorm for the CPU; leave it out")
        if isinstance(strategy, FSDPStrategy) and self.settings.get("ema") is not None:
            raise ValueError("--ema cannot average weights that --strategy fsdp has spread over the processes")
        if (
            isinstance(strategy, FSDPStrategy)
            and options.gradient_clip_val
            and trainer.gradient_clip_algorithm != "value"
        ):
            raise ValueError(
                "--clip_grad cannot have the norm of a gradient that --strategy fsdp has spread over the "
                "processes; add --trainer.gradient_clip_algorithm value to clip each of its numbers"
            )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The Trainer; when it fits, with what writes into the run folder."""
        given = self.config_init[self.subcommand]["trainer"]
        callbacks = list(given["callbacks"] or [])
        if given["enable_progress_bar"] is not False:
            callbacks.append(ProgressBar())
        if self.subcommand == "fit" and self.settings.ema is not None:
            callbacks.append(EMA(decay=self.settings.ema))
        if self.subcommand == "fit" and self.settings.compile:
            callbacks.append(Compile())
        if self.subcommand == "fit" and self.settings.early_stopping is not None:
            callbacks.append(EarlyStopping("val_loss", patience=self.settings.early_stopping))
        kwargs["plugins"] = [*(given["plugins"] or []), SafeCheckpointIO()]
        if self.launcher:
            kwargs["plugins"].append(self.launcher)
            defaults = {"devices": "auto", "num_nodes": 1}  # where nothing else is said, as many as were started
            kwargs |= {name: n for name, n in distributed.launched().items() if given[name] == defaults[name]}
        if given["strategy"] == "fsdp":
            policy = functools.partial(size_based_auto_wrap_policy, min_num_params=FSDP_UNIT)
            kwargs["strategy"] = FSDPStrategy(auto_wrap_policy=policy, sync_module_states=True)
        if self.run_dir is None:
            kwargs |= {"logger": False, "enable_checkpointing": False}
        else:
            kwargs["default_root_dir"] = str(self.run_dir)
            if given["logger"] in (None, True):
                again = self.continued["global_step"] if self.continued else None  # what came after is to be hidden
                kwargs["logger"] = TensorBoardLogger(
                    self.run_dir, name="", version="", default_hp_metric=False, purge_step=again
                )
                callbacks.append(TensorBoardPictures())
            self.checkpoints = Checkpoints(
                self.run_dir / "checkpoints", self.settings.save_every_steps, self.settings.save_every_minutes
            )
            self.run_facts = RunFacts(self.plain_config())
            callbacks += [
                self.checkpoints,
                ExactState(),
                MetricsCSV(self.run_dir / "metrics.csv"),
                self.run_facts,
            ]
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def plain_config(self) -> dict[str, Any]:
        """All options of this run as plain values, without the folder and the checkpoint it started from."""
        settings = self.settings.clone()
        for name in ("config", "run_dir", "ckpt_path"):
            settings.pop(name, None)
        return yaml.safe_load(self._parser(self.subcommand).dump(settings, skip_unset=False))

    def _option_names(self) -> list[str]:
        """All options, flat and dotted, without dashes."""
        dotted = [word.lstrip("-") for word in self._parser("fit")._option_string_actions]
        classes = {cls for data_module in DATA_MODULES.values() for cls in data_module.__mro__[:-1]}
        of_data = {f"data.{name}" for cls in classes for name in inspect.signature(cls).parameters}
        return [flag.name for flag in flags()] + dotted + sorted(of_data)

    def before_fit(self) -> None:
        """Say what will be trained and what is different in a continued run, write down the configuration."""
        if self.settings.tune is not None and self.run_dir is not None:
            self._tune(self.settings.tune, self.run_dir)
        self.trainer.fit_loop.epoch_loop = LeanEpochLoop(self.trainer)
        if self.continued is not None:
            self._check_continued(self.continued)
        elif self.settings.init_from:
            taken = init_from(self.model.net, self.settings.init_from)
            if self.trainer.is_global_zero:
                print(taken)
        if self.trainer.is_global_zero:
            parts = [f"{len(self.datamodule.split(part)[2]):,} {part}" for part in ("train", "val", "test")]
            print(
                f"{self.model.hparams['net']} ({count_parameters(self.model.net):,} parameters) on "
                f"{data_name(self.settings)} ({', '.join(parts)} images, {len(self.datamodule.class_names)} classes)"
            )
        if self.run_dir is not None and self.trainer.is_global_zero:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            if self.continued is not None and self.continued_dir is not None:
                copy_run(self.continued_dir, self.run_dir)
            config = yaml.safe_dump(self.plain_config(), sort_keys=False)
            (self.run_dir / "config.yaml").write_text(config, encoding="utf-8")
        distributed.go()

    def fit(self, **kwargs: Any) -> None:
        """Train; a loss that is no number any more ends it with what is needed to find out why."""
        try:
            self.trainer.fit(**kwargs)
        except FloatingPointError as error:
            lr = self.trainer.optimizers[0].param_groups[0]["lr"]
            last = self.checkpoints.last if self.run_dir is not None else None
            good = f"{last} is from before." if last and last.exists() else "Nothing had been saved."
            raise TrainingError(
                f"{error} (step {self.trainer.global_step}, learning rate {lr:.3g}). {good} "
                "Try a lower --lr, or --clip_grad 1"
            ) from error
        if self.run_dir is not None:
            self.run_dir = self.checkpoints.folder.parent  # the first process's

    def _check_continued(self, checkpoint: dict[str, Any]) -> None:
        before, now = checkpoint["hyper_parameters"], self.model.hparams
        misfit = check_network(dict(now), checkpoint["state_dict"])
        if misfit or before["class_names"] != now["class_names"]:
            raise UsageError(
                f"{self.settings.ckpt_path} is of {before.get('net')} for {len(before['class_names'])} classes, which "
                f"cannot become {now['net']} for {len(now['class_names'])} classes{f' ({misfit})' if misfit else ''}; "
                "start a new run, with --init_from to take over what fits"
            )
        if isinstance(self.trainer.strategy, FSDPStrategy):
            self._check_fsdp_continues(checkpoint)
        for name in ("optimizer", "schedule"):
            kinds = {before.get(name), now[name]}
            if len(kinds) > 1 and (name == "optimizer" or "plateau" in kinds):
                raise UsageError(
                    f"--{name} {now[name]} cannot use the state of {before.get(name)} that the checkpoint holds; "
                    f"leave out --{name}, or start a new run, with --init_from to take over the weights"
                )
        epochs, steps = checkpoint["epoch"], checkpoint["global_step"]
        if self.trainer.is_global_zero:
            print(f"Continuing {self.settings.ckpt_path} after {epochs} epochs, {steps} steps")
            options, options_now = dict(flat(checkpoint["settings"])), dict(flat(self.plain_config()))
            for name in options.keys() & options_now.keys():
                if options[name] != options_now[name]:
                    print(f"  {name}: from the checkpoint {options[name]} -> now {options_now[name]}")
        if nothing_left(self.trainer, checkpoint):
            if self._has_result(epochs):
                raise NothingToDo(
                    f"Nothing left to do: the run ended after its {epochs} epochs. "
                    f"To go on, ask for more: --max_epochs {2 * epochs}, or a larger --early_stopping if that ended it"
                )
            self.trainer.fit_loop.max_epochs = epochs  # only what comes after the training is missing

    def _check_fsdp_continues(self, checkpoint: dict[str, Any]) -> None:
        """FSDP numbers the parameters of an optimizer in the order of the layers, the others in that of its groups."""
        trained = [number for number, parameter in enumerate(self.model.parameters()) if parameter.requires_grad]
        expected = sorted(trained, key=lambda number: not self.model.decayed[number])
        groups = checkpoint["optimizer_states"][0]["param_groups"]
        if [number for group in groups for number in group["params"]] != expected:
            raise UsageError(
                "--strategy fsdp cannot use the optimizer's state in the checkpoint of another strategy; go on with "
                "that one, or start a new run, with --init_from to take over the weights"
            )

    def _has_result(self, epochs: int) -> bool:
        """Whether everything is there that a run of so many epochs writes when it ends."""
        return True

    def after_fit(self) -> None:
        """Say where everything is."""
        if self.run_dir is not None and self.trainer.is_global_zero:
            print(f"Run folder: {self.run_dir}")

    def predict(self, **kwargs: Any) -> None:
        """Predict the test images; predictions.csv in --run_dir (default: here) gets a row for each."""
        batches = cast(list[torch.Tensor], self.trainer.predict(**kwargs))
        probabilities = distributed.interleave(torch.cat(batches))  # (N, num_classes)
        if not self.trainer.is_global_zero:
            return
        best = probabilities.max(1)
        names = self.model.hparams["class_names"]
        path = Path(self.settings.run_dir or ".") / "predictions.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "label", "probability"])
            for row, (value, label) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
                writer.writerow([row, names[label], f"{value:.6f}"])
        print(f"{len(probabilities)} predictions: {path}")


class TrainCLI(LitCLI):
    """Fits, then tests the best checkpoint and writes result.json: what scripts/train.py runs."""

    def _has_result(self, epochs: int) -> bool:
        path = self.run_dir / "result.json" if self.run_dir is not None else None
        return path is None or (path.exists() and json.loads(path.read_text(encoding="utf-8"))["epochs"] == epochs)

    def after_fit(self) -> None:
        """Test, write the result, say what came out and what to type next."""
        trainer = self.trainer
        if self.run_dir is None:
            fresh = LitClassifier(**self.model.hparams)  # FSDP has taken the trained one apart
            trainer.test(fresh, datamodule=self.datamodule, verbose=False)
            if trainer.is_global_zero:
                print("fast_dev_run: one batch of training, validation and test went through.")
            return
        seconds, epochs = self.checkpoints.seconds, trainer.current_epoch
        best = self.run_dir / "checkpoints" / "best.ckpt"
        self.model = load_classifier(best)
        trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        if not trainer.is_global_zero:
            return
        scores = {name: value.item() for name, value in trainer.callback_metrics.items()}
        result = {
            "test_acc": round(scores["test_acc"], 7),  # a float32 has no more digits
            "test_loss": round(scores["test_loss"], 7),
            "val_acc": round(float(self.checkpoints.best_score or 0), 7),
            "epochs": epochs,
            "seconds": round(seconds, 2),
            "net": self.model.hparams["net"],
            "data": data_name(self.settings),
            "num_params": count_parameters(self.model.net),
            "seed": self.datamodule.seed,
            "versions": versions(),
            "git_commit": git_commit(),
        }
        (self.run_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        if isinstance(trainer.logger, TensorBoardLogger):
            from lit_nn.report import add_to_tensorboard  # matplotlib: only when something is drawn

            metrics = {f"final/{name}": result[name] for name in ("test_acc", "test_loss", "val_acc")}
            trainer.logger.log_hyperparams(self._hyperparameters(), metrics)
            add_to_tensorboard(trainer.logger.experiment, load_classifier(best), self.datamodule)
            trainer.logger.finalize("success")
        print(
            f"\nTest accuracy {result['test_acc']:.2%} (loss {result['test_loss']:.4f}), "
            f"validation {result['val_acc']:.2%}; {epochs} epochs in {seconds:.1f} s on {self.model.device.type}.\n"
            f"Run folder: {self.run_dir}\n"
            "Next:\n"
            f"  tensorboard --logdir {self.run_dir.parent}\n"
            f"  python scripts/evaluate.py {best}\n"
            f"  python scripts/export.py {best}\n"
            f"  python scripts/predict.py {best} PICTURE..."
        )

    def _hyperparameters(self) -> dict[str, Any]:
        """What TensorBoard's table of runs shows: the options that shape a result."""
        options = {name: value for name, value in self.model.hparams.items() if name not in DESCRIPTION}
        data = {
            "data": data_name(self.settings),
            "batch_size": self.datamodule.batch_size,
            "seed": self.datamodule.seed,
        }
        return {**options, **data, "max_epochs": self.trainer.max_epochs, "precision": str(self.trainer.precision)}


def count_parameters(net: nn.Module) -> int:
    """How many numbers a network learns; a tensor used twice counts once."""
    return sum(parameter.numel() for parameter in net.parameters())


def data_name(settings: Any) -> str:
    """The name for ``--data`` of the data set in a configuration."""
    class_name = settings.data.class_path.rpartition(".")[2]
    names = [name for name, data_module in DATA_MODULES.items() if data_module.__name__ == class_name]
    return names[0] if names else class_name


def run_folder(settings: Any, continued: Path | None) -> Path | None:
    """The folder for what a run writes: the one asked for, or a new one.

    Args:
        settings: Options of the subcommand fit.
        continued: The folder of the run that is continued, if one is.

    Returns:
        A folder without a run in it, or the one that is continued; None if nothing is to be written.

    Raises:
        UsageError: If the folder asked for holds another run.
    """
    if settings.trainer.fast_dev_run:
        return None
    if settings.run_dir:
        folder = Path(settings.run_dir)
        others = (folder / "config.yaml").exists() and not (continued and folder.resolve() == continued.resolve())
        if others and rank_zero_only.rank == 0:  # type: ignore[attr-defined]  # which has just written it for the rest
            raise UsageError(f"{folder} holds another run; give a new --run_dir, or continue that run with --resume")
        return folder
    kind = f"{data_name(settings)}-{settings.model.net.replace('/', '-')}"
    return Path("runs", kind, datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")[:-3])


def values_of(option: str, words: Sequence[str]) -> list[str]:
    """Every value that a command line gives to an option."""
    values = [words[position + 1] for position, word in enumerate(words[:-1]) if word == option]
    return values + [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]


def value_of(option: str, words: Sequence[str]) -> str | None:
    """The value that a command line gives to an option, None if it does not."""
    return next(iter(values_of(option, words)), None)


def checkpoint_to_continue(given: str, run_dir: str | None) -> tuple[Path | None, Path | None]:
    """Find what ``--resume`` means.

    Args:
        given: A checkpoint, a run folder, or "last" or "best" of ``run_dir``, or else of the latest run.
        run_dir: The option ``--run_dir``.

    Returns:
        The checkpoint, None for a run that was ended before it had saved one; and the folder of the run, None for a
        checkpoint that does not lie in one.

    Raises:
        UsageError: If there is no such run.
    """
    if given in ("last", "best") and run_dir is None:
        runs = [path.parent for path in Path("runs").glob("*/*/config.yaml")]
        if not runs:
            raise UsageError(f"--resume {given}: there is no run in runs/; give a checkpoint or a run folder")
        folder = max(runs, key=lambda run: (run / "config.yaml").stat().st_mtime)
    else:
        folder = Path(run_dir) if run_dir and given in ("last", "best") else Path(given)
    if not folder.is_dir():
        return folder, folder.parent.parent if folder.parent.name == "checkpoints" else None
    last, best = folder / "checkpoints" / "last.ckpt", folder / "checkpoints" / "best.ckpt"
    if given == "best" or (best.exists() and not last.exists()):
        return best, folder
    started = (folder / "config.yaml").exists() and not last.exists()
    return None if started else last, folder


def continue_from(
    path: Path | None, checkpoint: dict[str, Any] | None, run_dir: Path | None, words: Sequence[str], folder: Path
) -> list[str]:
    """Make a command line that continues a run: its settings come first, so that whatever else is given wins over them.

    Args:
        path: Its checkpoint.
        checkpoint: What is in it.
        run_dir: Its folder.
        words: The command line.
        folder: Where a file with the settings may be put.

    Returns:
        The new command line.

    Raises:
        UsageError: If the checkpoint holds no settings, or names classes in them.
    """
    to_run = ["--run_dir", str(run_dir)] if run_dir else []
    if path is None or checkpoint is None:
        rank_zero_only(print)(f"{run_dir} has no checkpoint yet: it starts again.")
        return ["fit", "--config", f"{run_dir}/config.yaml", *to_run, *without("--ckpt_path", words[1:])]
    file = folder / "settings.yaml"
    try:
        file.write_text(yaml.safe_dump(settings_of(checkpoint, path, words)), encoding="utf-8")
    except yaml.YAMLError as error:
        raise UsageError(f"the settings in {path} are not those of a run: {' '.join(str(error).split())}") from error
    return ["fit", "--config", str(file), *to_run, *without("--ckpt_path", words[1:]), "--ckpt_path", str(path)]


def settings_of(checkpoint: dict[str, Any], path: Path, words: Sequence[str]) -> dict[str, Any]:
    """The settings in a checkpoint, which is data: it may choose none of the classes that a YAML file may.

    Args:
        checkpoint: What is in it.
        path: The file.
        words: The command line; if it has a ``--config`` of its own, the classes come from there.

    Raises:
        UsageError: If there are no settings, or they name a class and ``words`` has no ``--config``.
    """
    settings = checkpoint.get("settings")
    if not isinstance(settings, dict) or not all(
        isinstance(settings.get(g), dict) for g in ("data", "model", "trainer")
    ):
        raise UsageError(f"{path} holds no settings; it was not saved by a run of scripts/train.py or lit-nn")
    settings = {name: value for name, value in settings.items() if name not in ("config", "run_dir", "ckpt_path")}
    known = {f"{place}.{cls.__name__}" for cls in DATA_MODULES.values() for place in ("data_modules", cls.__module__)}
    for place, value in list(_class_names(settings)):
        if place == "data.class_path" and value in known:
            continue
        group, name = place.split(".")[:2]
        if not values_of("--config", words):
            raise UsageError(
                f"{path} names {value} for {group}.{name}; a checkpoint chooses no classes. "
                "If you trust it, say so by --config RUN_DIR/config.yaml"
            )
        settings[group] = {key: item for key, item in settings[group].items() if key != name}
    return settings


def without(option: str, words: Sequence[str]) -> list[str]:
    """A command line without an option and its value."""
    rest: list[str] = []
    coming = iter(words)
    for word in coming:
        if word == option:
            next(coming, None)
        elif not word.startswith(f"{option}="):
            rest.append(word)
    return rest


def nothing_left(trainer: L.Trainer, checkpoint: dict[str, Any]) -> bool:
    """Whether a run has all the epochs or steps it was to have, or early stopping has ended it."""
    waited = [
        checkpoint["callbacks"].get(callback.state_key, {}).get("wait_count", 0) >= max(callback.patience, 1)
        for callback in trainer.early_stopping_callbacks
        if isinstance(callback, EarlyStopping)
    ]
    all_epochs = 0 < (trainer.max_epochs or -1) <= checkpoint["epoch"]
    return any(waited) or all_epochs or 0 < trainer.max_steps <= checkpoint["global_step"]


def copy_run(source: Path, target: Path) -> None:
    """Copy what a run that is continued in another folder goes on with: the rows and the best checkpoint so far."""
    for name in ("metrics.csv", "checkpoints/best.ckpt"):
        if source.resolve() != target.resolve() and (source / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def flat(options: dict[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """The options of a configuration by their dotted names."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from flat(value, f"{place}{name}.")
        else:
            yield f"{place}{name}", value


def check_config(path: Path) -> None:
    """Refuse a YAML file that is none, or that would import code from outside the packages this project is made of.

    Args:
        path: The file.

    Raises:
        UsageError: If so, naming the value.
    """
    if not path.is_file():
        raise UsageError(f"--config {path}: no such file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no options; it should look like the config.yaml of a run folder")
    for place, value in _class_names(content):
        if "/" in value or ("." in value and value.partition(".")[0] not in TRUSTED):
            raise UsageError(f"{path}: {place} names {value}; a file may name classes of {', '.join(TRUSTED)} only")


def _class_names(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a configuration that the parser could take for a class to import, with its place."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        here = f"{place}.{key}".lstrip(".")
        if isinstance(item, dict | list):
            yield from _class_names(item, here)
        elif isinstance(item, str):
            in_trainer = here.startswith("trainer.") and re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", item)
            if key == "class_path" or here in ("data", "model", "trainer") or in_trainer:
                yield here, item


def explain(message: str, options: Sequence[str]) -> str:
    """What the parser said, in one line, with the names that are nearest to an unknown one.

    Args:
        message: The parser's message.
        options: All options there are, without dashes.
    """
    text = " ".join(message.split())
    unknown = (
        re.search(r"unrecognized arguments: --?([^\s=]+)", text)
        or re.search(r"does not accept option '([\w.]+)'", text)
        or re.search(r"(?P<data>Option) '([\w.]+)' is not accepted", text)
    )
    if unknown:
        name = unknown.groups()[-1]
        if "data" in unknown.groupdict():
            name = f"data.{name}"
        return f"unknown option '{name}'.{nearest(name, options)} All options: python scripts/train.py --help"
    if choice := re.search(r'key "([\w.]+)": Expected a typing.Literal\[(.*?)\]\. Got value: (.*)', text):
        option, allowed, given = choice.groups()
        names = re.findall(r"'([^']*)'", allowed)
        return f"--{option} is '{given}'.{nearest(given, names)} Allowed: {', '.join(names)}"
    if wrong := re.findall(r'key "([\w.]+)": Expected (?:a|an) (.*?)\. Got value: (.*?)(?= - |$)', text):
        option, expected, given = wrong[-1]
        return f"--{option} is '{given}', expected " + re.sub(r"<class '(.*?)'>", r"\1", expected)
    return text


def quieten() -> None:
    """Keep adverts and warnings that say nothing about the run off the terminal."""
    noise = (
        "💡 Tip",
        "TPU available",
        "Restoring states",
        "Restored all states",
        "Loaded model weights",
        "`weights_only`",
    )
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).addFilter(lambda record: not record.getMessage().startswith(noise))
        if rank_zero_only.rank > 0:  # type: ignore[attr-defined]
            logging.getLogger(name).setLevel(logging.WARNING)
    harmless = ("is smaller than the logging interval", "treespec, LeafSpec", "callbacks used to create the checkpoint")
    for message in harmless:
        warnings.filterwarnings("ignore", message=f".*{message}.*")
