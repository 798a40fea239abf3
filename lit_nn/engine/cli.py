"""The LightningCLI of the project: builds data module, classifier and Trainer from flags and YAML files."""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from data_modules import DATA_SETS, data_class
from data_modules.base import ImageDataModule
from lit_nn.classifier import LitClassifier
from lit_nn.engine import option_checks
from lit_nn.engine.callbacks import Checkpoints
from lit_nn.engine.configuration import explain, plain_options, read_yaml
from lit_nn.engine.console import quieten
from lit_nn.engine.flags import FLAGS, to_dotted
from lit_nn.engine.previous_run import StartingPoint, new_run_dir, rebuild
from lit_nn.engine.resume import RunState
from lit_nn.engine.trainer import Trainer, build_trainer, fast_precision
from lit_nn.errors import UsageError

# What the data set tells the classifier.
DESCRIPTION = ("class_names", "image_shape", "mean", "std", "levels", "fit", "multi_label")


class Parser(LightningArgumentParser):
    """Lightning's, but the value of an option is never a file: with one called lenet, --net lenet would be that."""

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        """Add the arguments of a class."""
        return super().add_class_arguments(*args, **{**kwargs, "sub_configs": False})


class LitCLI(LightningCLI):
    """Data module, classifier and Trainer of a stage: fit, validate, test, predict. UsageError if that cannot be done.

    Lightning's class calls the methods below in their order. ``tests``: whether the best checkpoint is tested then.
    """

    config: Any
    trainer: L.Trainer
    datamodule: ImageDataModule
    model: LitClassifier
    state: RunState  # only there where something is written

    def __init__(self, stage: str, argv: Sequence[str], tests: bool = False) -> None:
        quieten()
        self.stage, self.tests = stage, tests
        self.given, words = to_dotted(argv)
        for file in self.given.get("config", ()):
            read_yaml(Path(file))  # says what the parser would not
        option_checks.check_stage(stage, self.given)
        self.start = StartingPoint(stage, self.given)
        if self.start.began:  # its checkpoint has the weights
            words = [word for word in words if not word.startswith("--model.weights=")]
        self.run_dir: Path | None = None  # stays None where nothing is written
        self.checkpoints: Checkpoints | None = None
        self.began = time.monotonic()
        self._failed: Exception | None = None  # what a constructor has raised
        try:
            super().__init__(
                LitClassifier,
                ImageDataModule,
                trainer_class=Trainer,
                subclass_mode_data=True,
                parser_class=Parser,
                save_config_callback=None,  # `running` writes it into the run folder
                trainer_defaults={"max_epochs": 20, "num_sanity_val_steps": 0, "enable_model_summary": False},
                seed_everything_default=42,
                parser_kwargs={"prog": f"python -m lit_nn {stage}", "allow_abbrev": False, "exit_on_error": False},
                args=words,
                run=False,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,  # would make checkpoints name a function to be imported
            )
        except argparse.ArgumentError as error:
            raise self._failed or UsageError(explain(error, self.parser)) from None
        except ValueError as error:
            raise self._failed or error from None

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
            parser.link_arguments("data", f"model.{name}", partial(self._described, name), apply_on="instantiate")

    def _build(self, cls: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Build an object, and keep the error of its constructor, which the parser would hide in one of its own."""
        try:
            return cls(*args, **kwargs)
        except Exception as error:
            self._failed = error
            raise

    def _described(self, name: str, data: ImageDataModule) -> Any:
        if self.start.checkpoint and data.known_parts is None:  # before the first look at the images cuts other parts
            data.known_parts = self.start.checkpoint.get("parts", {})
        return self._build(getattr, data, name)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the words given to the constructor, over the settings of the checkpoint."""
        before = parser.parse_object(self.start.settings) if self.start.settings else None
        self.config = config = parser.parse_args(args, namespace=before)
        # As they were typed: the parser takes a folder 1e3 for a number, and [a] for a list.
        for option in {"data.data_dir", "run_dir"} & self.given.keys():
            config[option.replace("data.", "data.init_args.")] = self.given[option]
        if config.trainer.precision == "auto":
            config.trainer.precision = fast_precision(config.trainer.accelerator)  # which a resumed run keeps
        config.ckpt_path = self.start.path and str(self.start.path)
        config.run_dir = config.run_dir or (self.start.folder and str(self.start.folder))
        option_checks.check_seed(self.start.checkpoint, before, config)

    @property
    def options(self) -> dict[str, Any]:
        """All options as plain values; of a run that goes on, those from which it can be begun again."""
        options = plain_options(self.parser, self.config)
        own = self.start.settings.get("model", {})
        began = {n: value for n, value in self.start.began.items() if options["model"].get(n) == own.get(n)}
        return options | {"model": options["model"] | began}

    @property
    def data_name(self) -> str:
        """The name for ``--data`` of the data set, or its class if it is one of the user's own."""
        class_name = self.config.data.class_path.rpartition(".")[2]
        return next((name for name, cls in DATA_SETS.items() if cls == class_name), class_name)

    def instantiate_classes(self) -> None:
        """Build data module, classifier and Trainer."""
        if self.stage == "fit":
            option_checks.check_options(self.config, self.tests, self.start.continues)
            self.run_dir = new_run_dir(self.config, self.data_name, self.start.folder)
        elif not self.config.ckpt_path:
            raise UsageError(f"{self.stage} what? Give the checkpoint: --ckpt_path RUN_DIR/checkpoints/best.ckpt")
        option_checks.check_data_dir(self.data_name, self.config.data.init_args.get("data_dir", "data"))
        super().instantiate_classes()
        if self.stage != "fit":
            self.model = rebuild(self.start.checkpoint, self.datamodule)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The Trainer; when it fits, with what writes into the run folder."""
        return build_trainer(self, {**self.config_init.trainer, **kwargs})
