"""The LightningCLI of the project: fit, validate, test and predict over LitClassifier and the data modules."""

import argparse
import csv
import functools
import inspect
import json
import logging
import re
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
import yaml
from filelock import FileLock, Timeout
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy, ParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

from data_modules import DATA_MODULES, ImageDataModule
from data_modules.files import atomic_path
from lit_nn import distributed
from lit_nn.callbacks import (
    Compile,
    MetricsCSV,
    ProgressBar,
    RunFacts,
    TensorBoardPictures,
)
from lit_nn.checkpoint import SafeCheckpointIO, load_classifier, read_checkpoint
from lit_nn.choices import flat
from lit_nn.classifier import LitClassifier
from lit_nn.commands import brief
from lit_nn.config import explain, read_config, values_of
from lit_nn.flags import UsageError, flags, nearest, to_dotted
from lit_nn.loop import LeanEpochLoop
from lit_nn.models import data_arguments
from lit_nn.nets import count_parameters
from lit_nn.previous import NothingToDo, PreviousRun
from lit_nn.resume import EMA, Checkpoints, ExactState, TrainingError, leave_signals_alone
from lit_nn.transfer import init_from
from lit_nn.tune import TUNED, tune

FSDP_UNIT = 10_000_000  # parameters of a part of a network that FSDP gathers only while it is needed
DESCRIPTION = ("class_names", "image_shape", "mean", "std")  # what the data set tells the classifier


class LitCLI(LightningCLI):
    """Fits, validates, tests and predicts, with flat flags, dotted flags and YAML files.

    Lightning's class parses, builds and runs, in the order of the methods below.

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
        self.launcher = distributed.launcher()
        distributed.join(self.launcher)
        distributed.wait_for_first()
        words = to_dotted(argv)
        if words and words[0].startswith("-") and words[0] not in ("-h", "--help"):
            option = words[0].partition("=")[0]
            raise UsageError(f"{option} stands before the subcommand; it comes first: fit, validate, test or predict")
        files, resumed = values_of("--config", words), values_of("--ckpt_path", words)
        for file in files:
            if read_config(Path(file)).get("ckpt_path") and words[:1] == ["fit"]:
                raise UsageError(f"{file} names a ckpt_path; to continue a run, type --resume with it")
        self.previous: PreviousRun | None = None  # the run that is continued
        self.trained: dict[str, Any] = {}  # what a checkpoint that is tested says of its data
        if words[:1] != ["fit"] and resumed:
            self.trained = data_arguments(read_checkpoint(resumed[-1]))
        if words[:1] == ["fit"] and resumed:
            run_dirs = values_of("--run_dir", words)
            self.previous = PreviousRun(resumed[-1], run_dirs[-1] if run_dirs else None, trusted=bool(files))
        self.run_dir: Path | None = None  # stays None where nothing is written
        self._lock: FileLock | None = None  # on the run folder
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
            raise UsageError(explain(error, self._option_names())) from error
        finally:
            if self._lock is not None:
                self._lock.release()

    # --- parse --------------------------------------------------------------------------------------------------------

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
        """Parse the words given to the constructor, over the settings of the run that is continued."""
        if self.trained:
            before = parser.parse_object({"subcommand": args[0], args[0]: self.trained})
            self.config = parser.parse_args(args, namespace=before)
        elif self.previous is None:
            self.config = parser.parse_args(args)
        else:
            before = parser.parse_object({"subcommand": "fit", "fit": self.previous.settings})
            self.config = parser.parse_args(args, namespace=before)
            self.config.fit.ckpt_path = str(self.previous.path) if self.previous.path else None
            if self.config.fit.run_dir is None and self.previous.folder:
                self.config.fit.run_dir = str(self.previous.folder)
        seed = int(self.config[self.config.subcommand].seed_everything)
        if not 0 <= seed < 2**32:
            raise UsageError(f"--seed is {seed}; it must be from 0 to {2**32 - 1}")

    def _parse_ckpt_path(self) -> None:
        """Lightning would let the checkpoint's arguments win over the command line; here it is the other way round."""

    def _option_names(self) -> list[str]:
        """All options, flat and dotted, without dashes."""
        dotted = [word.lstrip("-") for word in self._parser("fit")._option_string_actions]
        classes = {cls for data_module in DATA_MODULES.values() for cls in data_module.__mro__[:-1]}
        of_data = {f"data.{name}" for cls in classes for name in inspect.signature(cls).parameters}
        return [flag.name for flag in flags()] + dotted + sorted(of_data)

    @property
    def settings(self) -> Any:
        """The parsed options of the subcommand."""
        return self.config[self.subcommand]

    def plain_config(self) -> dict[str, Any]:
        """All options of this run as plain values, without the folder and the checkpoint it started from."""
        settings = self.settings.clone()
        for name in ("config", "run_dir", "ckpt_path"):
            settings.pop(name, None)
        return yaml.safe_load(self._parser(self.subcommand).dump(settings, skip_unset=False))

    # --- build --------------------------------------------------------------------------------------------------------

    def instantiate_classes(self) -> None:
        """Build data module, classifier and Trainer."""
        if self.subcommand == "fit":
            self.run_dir = self._run_folder()
            self._check_length()
            self._check_tune()
        elif not self.settings.ckpt_path:
            raise UsageError(f"{self.subcommand} what? Give the checkpoint: --ckpt_path RUN_DIR/checkpoints/best.ckpt")
        try:
            super().instantiate_classes()
            self._check_processes()
            leave_signals_alone(self.trainer)
            if self.trainer.strategy.root_device.type == "cuda" and torch.get_float32_matmul_precision() == "highest":
                torch.set_float32_matmul_precision("high")  # TF32, which torch's convolutions take anyway
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            text = explain(error, self._option_names()).rstrip(".!")
            hint = "" if "backend" not in text else "; --accelerator cpu and --accelerator auto work everywhere"
            raise UsageError(f"{text}{hint}") from error
        if self.subcommand != "fit":
            self.model = load_classifier(self.settings.ckpt_path)
            if self.model.hparams["class_names"] != list(self.datamodule.class_names):
                raise UsageError(
                    f"the checkpoint knows the classes {self.model.hparams['class_names']}, "
                    f"the data set has {list(self.datamodule.class_names)}; choose the data set with --data"
                )
            taken, given = tuple(self.model.hparams["image_shape"]), tuple(self.datamodule.image_shape)
            if taken != given:
                raise UsageError(f"the checkpoint takes images of the shape {taken}, the data set has {given}")
        distributed.join(getattr(self.trainer.strategy, "cluster_environment", None))
        if self.subcommand != "fit":
            distributed.go()

    def _run_folder(self) -> Path | None:
        """The folder for what the run writes: the one asked for, or a new one."""
        settings = self.settings
        if settings.trainer.fast_dev_run:
            if self.previous is not None:
                raise UsageError("--fast_dev_run tries a new run; leave out --resume")
            return None
        if settings.run_dir is None:
            kind = f"{data_name(settings)}-{settings.model.net.replace('/', '-')}"
            return Path("runs", kind, datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")[:-3])
        folder, continued = Path(settings.run_dir), self.previous.folder if self.previous else None
        others = (folder / "config.yaml").exists() and not (continued and folder.resolve() == continued.resolve())
        if others and rank_zero_only.rank == 0:  # type: ignore[attr-defined]  # which has just written it for the rest
            raise UsageError(f"{folder} holds another run; give a new --run_dir, or continue that run with --resume")
        return folder

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The Trainer; when it fits, with what writes into the run folder."""
        given, settings = self.config_init[self.subcommand]["trainer"], self.settings
        kwargs["plugins"] = [*(given["plugins"] or []), SafeCheckpointIO()]
        if self.launcher:
            kwargs["plugins"].append(self.launcher)
            defaults = {"devices": "auto", "num_nodes": 1}  # where nothing else is said, as many as were started
            kwargs |= {name: n for name, n in distributed.launched().items() if given[name] == defaults[name]}
        if given["strategy"] == "fsdp":
            policy = functools.partial(size_based_auto_wrap_policy, min_num_params=FSDP_UNIT)
            kwargs["strategy"] = FSDPStrategy(auto_wrap_policy=policy, sync_module_states=True)
        callbacks = list(given["callbacks"] or [])
        if given["enable_progress_bar"] is not False:
            callbacks.append(ProgressBar())
        if self.subcommand == "fit":
            if settings.ema is not None:
                callbacks.append(EMA(decay=settings.ema))
            if settings.compile:
                callbacks.append(Compile())
            if settings.early_stopping is not None:
                callbacks.append(EarlyStopping("val_loss", patience=settings.early_stopping))
        if self.run_dir is None:
            kwargs |= {"logger": False, "enable_checkpointing": False}
            return super().instantiate_trainer(callbacks=callbacks, **kwargs)
        kwargs["default_root_dir"] = str(self.run_dir)
        if given["logger"] in (None, True):
            again = self.previous.checkpoint.get("global_step") if self.previous else None  # hide what came after
            kwargs["logger"] = TensorBoardLogger(
                self.run_dir, name="", version="", default_hp_metric=False, purge_step=again
            )
            callbacks.append(TensorBoardPictures())
        folder = self.run_dir / "checkpoints"
        self.checkpoints = Checkpoints(folder, settings.save_every_steps, settings.save_every_minutes)
        self.run_facts = RunFacts(self.plain_config())
        callbacks += [self.checkpoints, ExactState(), MetricsCSV(self.run_dir / "metrics.csv"), self.run_facts]
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def _check_processes(self) -> None:
        """Raises ValueError if several processes cannot do what is asked for."""
        trainer, strategy, options = self.trainer, self.trainer.strategy, self.settings.trainer
        if isinstance(strategy, ParallelStrategy) and strategy.cluster_environment is not None:
            strategy.cluster_environment.validate_settings(trainer.num_devices, trainer.num_nodes)
        if isinstance(strategy.launcher, _MultiProcessingLauncher):
            raise ValueError(f"--strategy {options.strategy} is for notebooks; --strategy ddp does the same")
        if options.sync_batchnorm and trainer.world_size > 1 and strategy.root_device.type == "cpu":
            raise ValueError("--sync_batchnorm needs GPUs: torch has no SyncBatchNorm for the CPU; leave it out")
        if not isinstance(strategy, FSDPStrategy):
            return
        if strategy._state_dict_type != "full":
            raise ValueError("a checkpoint is one file here: leave out state_dict_type, or make it full")
        if self.settings.get("ema") is not None:
            raise ValueError("--ema cannot average weights that --strategy fsdp has spread over the processes")
        if options.gradient_clip_val and trainer.gradient_clip_algorithm != "value":
            raise ValueError(
                "--clip_grad cannot have the norm of a gradient that --strategy fsdp has spread over the "
                "processes; add --trainer.gradient_clip_algorithm value to clip each of its numbers"
            )

    # --- train --------------------------------------------------------------------------------------------------------

    def before_fit(self) -> None:
        """Say what will be trained and what is different in a continued run, write down the configuration."""
        self.trainer.fit_loop.epoch_loop = LeanEpochLoop(self.trainer)
        if self.previous is not None and self.previous.path is not None:
            self._continue(self.previous)
        elif self.settings.init_from:
            rank_zero_only(print)(init_from(self.model.net, self.settings.init_from))
        if self.run_dir is not None and self.trainer.is_global_zero:
            self._hold(self.run_dir)
        if self.settings.tune is not None and self.run_dir is not None:
            self._tune(self.settings.tune, self.run_dir)
        if self.trainer.is_global_zero:
            self.datamodule.prepare_data()  # the other processes wait for this one
            parts = [f"{len(self.datamodule.split(part)[2]):,} {part}" for part in ("train", "val", "test")]
            print(
                f"{self.model.hparams['net']} ({count_parameters(self.model.net):,} parameters) on "
                f"{data_name(self.settings)} ({', '.join(parts)} images, {len(self.datamodule.class_names)} classes)"
            )
        if self.run_dir is not None and self.trainer.is_global_zero:
            if self.previous is not None:
                self.previous.copy_to(self.run_dir)
            with atomic_path(self.run_dir / "config.yaml") as path:
                path.write_text(yaml.safe_dump(self.plain_config(), sort_keys=False), encoding="utf-8")
        distributed.go()

    def _hold(self, folder: Path) -> None:
        """Keep other processes from training in the same folder, as long as this one lives."""
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise UsageError(
                f"{folder} is being trained by another process; wait for it, or give another --run_dir"
            ) from error
        except NotImplementedError:  # a file system without locks
            self._lock = None

    def _check_length(self) -> None:
        for name in ("max_epochs", "max_steps", "limit_train_batches"):
            if self.settings.trainer[name] == 0:
                raise UsageError(
                    f"{name} is 0, which trains nothing; give 1 or more. "
                    "To test what is trained already: python scripts/evaluate.py CKPT"
                )
        goes_by_validation = self.settings.early_stopping is not None or self.settings.model.schedule == "plateau"
        if goes_by_validation and self.settings.trainer.limit_val_batches == 0:
            raise UsageError(
                "limit_val_batches is 0, but --early_stopping and --schedule plateau go by the validation; "
                "drop one of them"
            )

    def _check_tune(self) -> None:
        what = self.settings.tune
        if what is not None and what not in TUNED:
            raise UsageError(f"--tune is '{what}'.{nearest(what, TUNED)} Allowed: {', '.join(TUNED)}")
        if what is not None and (self.run_dir is None or self.previous is not None):
            raise UsageError("--tune is for the start of a run, not for --resume or --fast_dev_run")

    def _tune(self, what: str, folder: Path) -> None:
        plot = folder / "lr_find.png"
        value = tune(what, self.model, self.datamodule, self.trainer, plot)
        if what == "lr":
            self.model.hparams["lr"] = self.settings.model.lr = value
        else:
            self.datamodule.batch_size = self.settings.data.init_args.batch_size = int(value)
        self.settings.tune = None  # the run is that of the value found
        self.run_facts.settings = self.plain_config()
        print(f"--tune {what}: {value:g}" + (f" ({plot})" if what == "lr" else ""))

    def _continue(self, previous: PreviousRun) -> None:
        previous.check(self.model, self.trainer)
        rank_zero_only(print)(previous.describe(dict(flat(self.plain_config()))))
        if previous.is_complete(self.trainer):
            epochs = previous.checkpoint["epoch"]
            if self._has_result(epochs):
                raise NothingToDo(
                    f"Nothing left to do: the run ended after its {epochs} epochs. "
                    f"To go on, ask for more: --max_epochs {2 * epochs}, or a larger --early_stopping if that ended it"
                )
            self.trainer.fit_loop.max_epochs = epochs  # only what comes after the training is missing

    def _has_result(self, epochs: int) -> bool:
        """Whether everything is there that a run of so many epochs writes when it ends."""
        return True

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

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it, and say shortly what goes wrong only when steps are taken."""
        try:
            super()._run_subcommand(subcommand)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"the memory of {self.trainer.strategy.root_device} is full with batches of "
                f"{self.datamodule.batch_size} images; give a smaller --batch_size, which "
                "--trainer.accumulate_grad_batches makes up for, or find one with --tune batch_size"
            ) from error
        except MisconfigurationException as error:  # some options are only found not to fit together now
            raise UsageError(brief(error)) from error
        except (RuntimeError, ValueError) as error:
            hints = {
                "Expected more than 1 value per channel": "give a larger --batch_size",
                "C++ compiler": "--compile needs one, g++ for instance",
                "C compiler": "--compile needs one, gcc for instance",
                "does not have a deterministic implementation": "--trainer.deterministic warn goes on without",
                "does not allow for gradient clipping": "leave out --model.optimizer_args.fused, or --clip_grad",
            }
            for text, hint in hints.items():
                if text in str(error):
                    raise UsageError(f"{re.split(', but| because', brief(error))[0]}; {hint}") from error
            raise

    def after_fit(self) -> None:
        """Say where everything is."""
        if self.run_dir is not None and self.trainer.is_global_zero:
            print(f"Run folder: {self.run_dir}")

    # --- predict ------------------------------------------------------------------------------------------------------

    def predict(self, **kwargs: Any) -> None:
        """Predict the test images; predictions.csv in --run_dir (default: here) gets a row for each."""
        own = torch.cat(cast(list[torch.Tensor], self.trainer.predict(**kwargs)))  # (M, num_classes)
        parts = [own] * self.trainer.world_size  # each of every world_size-th image, from the rank on
        if len(parts) > 1:
            torch.distributed.all_gather_object(parts, own.cpu())
        if not self.trainer.is_global_zero:
            return
        probabilities = torch.empty(sum(map(len, parts)), own.shape[1])  # (N, num_classes)
        for rank, part in enumerate(parts):
            probabilities[rank :: len(parts)] = part
        best = probabilities.max(1)
        names = self.model.hparams["class_names"]
        path = Path(self.settings.run_dir or ".") / "predictions.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "label", "probability"])
            for row, (value, label) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
                writer.writerow([row, names[label], f"{value:.6f}"])
        print(f"{len(probabilities)} predictions: {path}")


class TrainCLI(LitCLI):
    """Fits, then tests the best checkpoint and writes result.json: what scripts/train.py runs."""

    def _check_length(self) -> None:
        super()._check_length()
        if self.settings.trainer.limit_test_batches == 0:
            raise UsageError(
                "limit_test_batches is 0; to train without a test: python -m lit_nn fit, instead of train.py"
            )

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
        if not best.exists():
            rank_zero_only(print)(
                f"No validation has chosen a best.ckpt to test; {self.checkpoints.last} has the weights."
            )
            return
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
            **self.run_facts.origin,
        }
        with atomic_path(self.run_dir / "result.json") as path:
            path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        if isinstance(trainer.logger, TensorBoardLogger):
            from lit_nn.report import add_to_tensorboard  # matplotlib: only when something is drawn

            metrics = {f"final/{name}": result[name] for name in ("test_acc", "test_loss", "val_acc")}
            trainer.logger.log_hyperparams(self._hyperparameters(), metrics)
            classifier = load_classifier(best).to(trainer.strategy.root_device)
            add_to_tensorboard(trainer.logger.experiment, classifier, self.datamodule)
            trainer.logger.finalize("success")
        print(
            f"\nTest accuracy {result['test_acc']:.2%} (loss {result['test_loss']:.4f}), "
            f"validation {result['val_acc']:.2%}; {epochs} epochs in {seconds:.1f} s "
            f"on {trainer.strategy.root_device.type}.\n"
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


def data_name(settings: Any) -> str:
    """The name for ``--data`` of the data set in a configuration."""
    class_name = settings.data.class_path.rpartition(".")[2]
    names = [name for name, data_module in DATA_MODULES.items() if data_module.__name__ == class_name]
    return names[0] if names else class_name


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
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without a place in the code
