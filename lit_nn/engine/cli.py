"""The LightningCLI of the project: builds data module, classifier and Trainer from flags and YAML files."""

import argparse
import functools
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

from data_modules import DATA_SETS, data_class
from data_modules.base import ImageDataModule
from lit_nn.checkpoint import build_model, read_checkpoint
from lit_nn.classifier import LitClassifier
from lit_nn.engine import distributed
from lit_nn.engine.callbacks import EMA, Checkpoints, MetricsCSV, TensorBoardFigures, leave_signals_alone
from lit_nn.engine.configuration import explain, plain_settings, read_yaml
from lit_nn.engine.console import quieten, rank
from lit_nn.engine.flags import FLAGS, to_dotted, values_of
from lit_nn.engine.option_checks import check_data_dir, check_options, check_processes, refuse
from lit_nn.engine.previous_run import PreviousRun
from lit_nn.engine.progress_bar import ProgressBar
from lit_nn.engine.resume import RunState, SafeCheckpointIO
from lit_nn.errors import UsageError, brief, other_classes

FSDP_UNIT = 10_000_000  # parameters of a part of a network that FSDP gathers only while it is needed
DESCRIPTION = ("class_names", "image_shape", "mean", "std", "levels")  # what the data set tells the classifier
FOR_FIT = ("compile", "ema", "early_stopping", "init_from", "save_every_steps", "save_every_minutes")


class LitCLI(LightningCLI):
    """Data module, classifier and Trainer, built from flat flags, dotted flags and YAML files.

    Lightning's class parses and builds, in the order of the methods below. Then, inside of `run.running`, a method
    of the Trainer is called.

    Args:
        stage: What it is for: fit, validate, test or predict.
        argv: Words of the command line, without the stage.
        tests: Whether the best checkpoint is tested after the training.

    Raises:
        UsageError: If what was typed, or what stands in a YAML file, cannot be done.
    """

    config: Any
    trainer: L.Trainer
    datamodule: ImageDataModule
    model: LitClassifier

    def __init__(self, stage: str, argv: Sequence[str], tests: bool = False) -> None:
        quieten()
        self.stage, self.tests = stage, tests
        self.launcher = distributed.launcher()
        self.words = words = to_dotted(argv)
        files, resumed, run_dirs = (values_of(option, words) for option in ("--config", "--ckpt_path", "--run_dir"))
        for file in files:
            read_yaml(Path(file))  # says what the parser would not
        if stage != "fit" and (useless := [name for name in FOR_FIT if values_of(f"--{name}", words)]):
            raise UsageError(f"--{useless[0]} is for a training, and {stage} is none; leave it out")
        self.previous: PreviousRun | None = None  # the run that is continued
        self.checkpoint: dict[str, Any] = {}  # that is continued, validated or tested
        if stage == "fit" and resumed:
            self.previous = PreviousRun(resumed[-1], run_dirs[-1] if run_dirs else None, trusted=bool(files))
            self.checkpoint = self.previous.checkpoint
        elif resumed:
            self.checkpoint = read_checkpoint(resumed[-1])
        self.run_dir: Path | None = None  # stays None where nothing is written
        self.checkpoints: Checkpoints | None = None
        self._failed: Exception | None = None  # what a constructor has raised
        try:
            super().__init__(
                LitClassifier,
                ImageDataModule,
                subclass_mode_data=True,
                save_config_callback=None,  # `running` writes it into the run folder
                trainer_defaults={"max_epochs": 20, "num_sanity_val_steps": 0, "enable_model_summary": False},
                seed_everything_default=42,
                parser_kwargs={"prog": f"python -m lit_nn {stage}", "allow_abbrev": False, "exit_on_error": False},
                args=words,
                run=False,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,  # would make checkpoints name a function to be imported
            )
        except (argparse.ArgumentError, ValueError) as error:
            if self._failed is not None:
                raise self._failed from None
            if not isinstance(error, argparse.ArgumentError):
                raise
            raise UsageError(explain(error, self.parser)) from error

    # --- parse --------------------------------------------------------------------------------------------------------

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The default data set, the options of this project, and what the classifier learns from the data set."""
        for flag in FLAGS:
            if flag.value_type is not None:
                parser.add_argument(f"--{flag.option}", type=flag.value_type | None, default=None, help=flag.help)
        parser.add_instantiator(self._build, object)
        for name in DATA_SETS:
            data_class(name)  # imported, so that a YAML file may name it without the package
        parser.set_defaults({"data": {"class_path": "data_modules.FashionMNISTSample"}})
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)
        for name in DESCRIPTION:
            parser.link_arguments("data", f"model.{name}", self._described(name), apply_on="instantiate")

    def _build(self, cls: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Build an object, and keep the error of its constructor, which the parser would hide in one of its own."""
        try:
            return cls(*args, **kwargs)
        except Exception as error:
            self._failed = error
            raise

    def _described(self, name: str) -> Callable[[ImageDataModule], Any]:
        def describe(data: ImageDataModule) -> Any:
            if self.checkpoint and data.known_parts is None:  # before the first look at the images cuts other parts
                data.known_parts = self.checkpoint.get("parts", {})
            return self._build(getattr, data, name)

        return describe

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the words given to the constructor, over the settings of the checkpoint."""
        before = None
        if self.previous is not None:
            before = parser.parse_object(self.previous.settings)
        elif self.checkpoint.get("settings"):  # the data set that it was trained on, in its split and at its size
            settings = plain_settings(self.checkpoint, Path(values_of("--ckpt_path", self.words)[-1]), trusted=True)
            if "class_path" in settings["data"]:
                before = parser.parse_object({name: settings[name] for name in ("data", "seed_everything")})
        # Folders in quotes, as the parser would take 1e3 for a number and [a] for a list.
        quoted = re.compile(r"(--(?:run_dir|data\.(?:init_args\.)?data_dir)=)(.*)", re.DOTALL)
        args = [quoted.sub(lambda found: found[1] + json.dumps(found[2], ensure_ascii=False), word) for word in args]
        self.config = parser.parse_args(args, namespace=before)
        if folders := values_of("--run_dir", self.words):
            self.config.run_dir = folders[-1]
        if folders := self.data_dirs:
            self.config.data.init_args.data_dir = folders[-1]
        if self.previous is not None:
            self.config.ckpt_path = str(self.previous.path) if self.previous.path else None
            if self.config.run_dir is None and self.previous.folder:
                self.config.run_dir = str(self.previous.folder)
        if (
            self.checkpoint and before is not None and "parts" not in self.checkpoint
        ):  # of a version that remembered none
            asked, trained = (options.data.init_args.get("val_fraction") for options in (self.config, before))
            moved = self.config.seed_everything != before.seed_everything or asked != trained
            refuse({"this checkpoint does not keep its parts: leave out --seed and --data.val_fraction": moved})
        seed = self.config.seed_everything
        if seed is True:
            refuse({"--seed true: each process of torchrun or SLURM would draw its own; give a number": self.launcher})
            drawn = os.environ.get("PL_GLOBAL_SEED") if rank() else None  # the first process starts the others with its
            seed = int(drawn or random.SystemRandom().randrange(2**32))
        if isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise UsageError(f"--seed is {seed}; it must be from 0 to {2**32 - 1}, or true for any")
        self.config.seed_everything = self.config.data.init_args.seed = seed

    @property
    def data_dirs(self) -> list[str]:
        """Every ``--data_dir`` that was typed."""
        return [*values_of("--data.data_dir", self.words), *values_of("--data.init_args.data_dir", self.words)]

    @property
    def data_name(self) -> str:
        """The name for ``--data`` of the data set, or its class if it is one of the user's own."""
        class_name = self.config.data.class_path.rpartition(".")[2]
        return next((name for name, cls in DATA_SETS.items() if cls == class_name), class_name)

    def plain_config(self) -> dict[str, Any]:
        """All options of this run as plain values, without the folder and the checkpoint it started from."""
        settings = self.config.clone()
        for name in ("config", "run_dir", "ckpt_path"):
            settings.pop(name, None)
        plain = yaml.safe_load(self.parser.dump(settings, skip_unset=False))
        # The dump takes a folder 1e3 for a number.
        texts = {name: text for name, text in vars(settings.data.init_args).items() if isinstance(text, str)}
        plain["data"]["init_args"] |= texts
        return plain

    # --- build --------------------------------------------------------------------------------------------------------

    def instantiate_classes(self) -> None:
        """Build data module, classifier and Trainer."""
        if self.stage == "fit":
            check_options(self.config, self.tests, self.previous is not None)
            typed = values_of("--init_from", self.words)
            refuse({"--init_from is for the start of a run; leave it out with --resume": self.previous and typed})
            self.run_dir = self._run_folder()
        elif not self.config.ckpt_path:
            raise UsageError(f"{self.stage} what? Give the checkpoint: --ckpt_path RUN_DIR/checkpoints/best.ckpt")
        folder = self.config.data.init_args.get("data_dir", "data")  # "data" if nobody has chosen one
        check_data_dir(self.data_name, self.data_dirs or [folder] * (folder != "data" and self.previous is None))
        super().instantiate_classes()
        leave_signals_alone(self.trainer)
        if self.trainer.strategy.root_device.type == "cuda" and torch.get_float32_matmul_precision() == "highest":
            torch.set_float32_matmul_precision("high")  # TF32, which torch's convolutions take anyway
        if self.config.trainer.accelerator == "auto" and shutil.which("nvidia-smi") and not torch.cuda.is_available():
            rank_zero_warn(
                "an NVIDIA GPU is here, but PyTorch cannot use it: its driver may be too old, see the README"
            )
        if self.stage == "fit":
            return
        arguments, data = self.checkpoint["hyper_parameters"], self.datamodule
        others, shape = other_classes(arguments["class_names"], data.class_names), tuple(data.image_shape)
        if others or shape != tuple(arguments["image_shape"]):
            what = others or f"images {shape}, the checkpoint is for {tuple(arguments['image_shape'])}"
            raise UsageError(
                f"{type(data).__name__} has {what}; choose other data with --data, --data_dir, --data.image_size"
            )
        build_model(arguments, self.checkpoint["state_dict"])  # says what does not fit, before any memory is taken
        self.model = LitClassifier(**arguments)
        self.model.load_state_dict(self.checkpoint["state_dict"])

    def _run_folder(self) -> Path | None:
        """The folder for what the run writes: the one asked for, or a new one."""
        config = self.config
        if config.trainer.fast_dev_run:
            return None
        if config.run_dir is None:
            kind = f"{self.data_name}-{config.model.net.replace('/', '-')}"
            return Path("runs", kind, datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")[:-3])
        folder = Path(os.path.expanduser(config.run_dir))  # noqa: PTH111 (Path's own raises where there is no home)
        continued = self.previous.folder if self.previous else None
        other = (folder / "config.yaml").exists() and not (continued and folder.resolve() == continued.resolve())
        if other and rank() == 0:  # which has just written it for the rest
            raise UsageError(f"{folder} holds another run; give a new --run_dir, or continue that run with --resume")
        return folder

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The Trainer; when it fits, with what writes into the run folder."""
        given, config = dict(self.config_init.trainer), self.config
        callbacks, plugins = (_as_list(given[name]) for name in ("callbacks", "plugins"))
        plugins.append(SafeCheckpointIO())
        if self.launcher:
            plugins.append(self.launcher)
            defaults = {"devices": "auto", "num_nodes": 1}  # where nothing else is said, as many as were started
            given |= {name: n for name, n in distributed.launched().items() if given[name] == defaults[name]}
        if given["strategy"] == "fsdp":
            policy = functools.partial(size_based_auto_wrap_policy, min_num_params=FSDP_UNIT)
            given["strategy"] = FSDPStrategy(auto_wrap_policy=policy, sync_module_states=True)
        has_bar = any(isinstance(callback, AnyProgressBar) for callback in callbacks)
        if given["enable_progress_bar"] is not False and not has_bar:
            callbacks.append(ProgressBar())
        if self.stage == "fit" and config.ema is not None:
            callbacks.append(EMA(decay=config.ema))
        if self.stage == "fit" and config.early_stopping is not None:
            monitor = self.model.hparams["monitor"]
            callbacks.append(EarlyStopping(monitor, patience=config.early_stopping, mode=self.model.mode))
        if self.run_dir is not None:
            given["default_root_dir"] = given["default_root_dir"] or str(self.run_dir)
            if given["logger"] in (None, True):
                again = self.checkpoint.get("global_step")  # hide what came after
                given["logger"] = TensorBoardLogger(
                    self.run_dir, name="", version="", default_hp_metric=False, purge_step=again
                )
                callbacks.append(TensorBoardFigures())
            self.state = RunState(self.plain_config())
            if given["enable_checkpointing"] is not False:
                folder = self.run_dir / "checkpoints"
                self.checkpoints = Checkpoints(folder, config.save_every_steps, config.save_every_minutes)
                callbacks.append(self.checkpoints)
            callbacks += [self.state, MetricsCSV(self.run_dir / "metrics.csv")]
        elif self.stage != "fit":
            given["logger"] = False
        try:
            trainer = L.Trainer(**{**given, **kwargs, "callbacks": callbacks, "plugins": plugins})
            check_processes(self.config, trainer)
        except UsageError:
            raise
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            text = brief(error).rstrip(".!")
            hint = "; --accelerator cpu and --accelerator auto work everywhere" if "backend" in text else ""
            raise UsageError(f"{text}{hint}") from error
        return trainer


def _as_list(given: Any) -> list[Any]:
    """The option of the Trainer that may be one object or a list of them."""
    return [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
