"""What cannot be done, refused before anything is built or trained."""

import os
import random
import shlex
from typing import Any

import lightning as L
from lightning.pytorch.strategies import FSDPStrategy, ParallelStrategy

from data_modules import DATA_SETS, data_class
from lit_nn.engine.console import rank
from lit_nn.engine.flags import values_of
from lit_nn.errors import UsageError


def refuse(holds: Any, text: str) -> None:
    """Raise UsageError with the text, if the case holds."""
    if holds:
        raise UsageError(text)


def check_words(stage: str, words: list[str]) -> None:
    """Refuse options of a training where nothing is trained."""
    names = "accept", "compile", "ema", "early_stopping", "model.weights", "save_every_steps", "save_every_minutes"
    for name in names:
        useless = stage != "fit" and values_of(f"--{name}", words)
        refuse(useless, f"--{name.removeprefix('model.')} is for a training, and {stage} is none; leave it out")


def check_options(config: Any, tests: bool, resumes: bool) -> None:
    """Refuse options of a training that train or test nothing, or would be ignored."""
    trainer, ema, accept = config.trainer, config.ema, config.accept
    instead = "To train without a test: python -m lit_nn fit. To test what is trained: python scripts/evaluate.py CKPT"
    for name in ("max_epochs", "max_steps", "limit_train_batches", *["limit_test_batches"] * tests):
        refuse(trainer[name] == 0, f"{name} is 0; give 1 or more. {instead}")
    for name in ("early_stopping", "save_every_steps", "save_every_minutes"):
        refuse(config[name] is not None and config[name] <= 0, f"--{name} is {config[name]}; it must be more than 0")
    blind = trainer.limit_val_batches == 0 and (config.early_stopping or config.model.schedule == "plateau")
    refuse(blind, "limit_val_batches is 0, but --early_stopping and --schedule plateau go by the validation; drop one")
    refuse(ema is not None and not 0 < ema < 1, f"--ema is {ema}; it must lie between 0 and 1")
    refuse(accept is not None and not 0 < accept <= 1, f"--accept is {accept}; it must be more than 0, and at most 1")
    frozen = config.model.freeze_epochs == -1
    refuse(
        config.cache_features and not frozen, "--cache_features keeps what does not change: it needs --freeze_epochs -1"
    )
    refuse(resumes and trainer.fast_dev_run, "--fast_dev_run tries a new run; leave out --resume")


def check_data_dir(data_name: str, typed: list[str]) -> None:
    """Refuse a folder that was typed and that the data set would ignore."""
    if typed and data_name in DATA_SETS and not data_class(data_name).reads_data_dir:
        raise UsageError(
            f"--data_dir {typed[-1]}: the data set {data_name} reads no folder. For images of your own: "
            f"--data image_folder --data_dir {shlex.quote(typed[-1])}"
        )


def check_split(checkpoint: dict[str, Any], before: Any, now: Any) -> None:
    """Refuse to split the data in another way than a checkpoint of a version that did not remember its parts."""
    if before is not None and checkpoint and "parts" not in checkpoint:
        splits = [(c.seed_everything, c.data.init_args.get("val_fraction")) for c in (before, now)]
        text = "this checkpoint does not keep its parts: leave out --seed and --data.val_fraction"
        refuse(splits[0] != splits[1], text)


def chosen_seed(given: int | bool, launched: bool) -> int:
    """The seed that was given, or one drawn at random for True."""
    if given is True:
        refuse(launched, "--seed true: each process of torchrun or SLURM would draw its own; give a number")
        drawn = os.environ.get("PL_GLOBAL_SEED") if rank() else None  # the first process starts the others with its
        return int(drawn or random.SystemRandom().randrange(2**32))
    wrong = given is False or not 0 <= given < 2**32
    refuse(wrong, f"--seed is {given}; it must be from 0 to {2**32 - 1}, or true for any")
    return given


def check_processes(config: Any, trainer: L.Trainer) -> None:
    """Refuse what several processes cannot do."""
    strategy, name = trainer.strategy, str(config.trainer.strategy)
    if isinstance(strategy, ParallelStrategy) and strategy.cluster_environment is not None:
        strategy.cluster_environment.validate_settings(trainer.num_devices, trainer.num_nodes)
    by_fork = strategy.launcher is not None and strategy.launcher.is_interactive_compatible
    text = f"--strategy {name} is for notebooks; --strategy ddp does the same from a terminal, --devices 1 too"
    refuse(by_fork or name.endswith(("_spawn", "_forkserver")), text)
    several_cpus = trainer.world_size > 1 and strategy.root_device.type == "cpu"
    text = "--sync_batchnorm needs GPUs: torch has no SyncBatchNorm for the CPU; leave it out"
    refuse(several_cpus and config.trainer.sync_batchnorm, text)
    if isinstance(strategy, FSDPStrategy):
        spread = "that --strategy fsdp has spread over the processes"
        refuse(config.get("ema") is not None, f"--ema cannot average weights {spread}")
        refuse(config.get("accept"), f"--accept cannot try weights {spread}; leave it out")
        by_norm = config.trainer.gradient_clip_val and trainer.gradient_clip_algorithm != "value"
        instead = "add --trainer.gradient_clip_algorithm value to clip each of its numbers"
        refuse(by_norm, f"--clip_grad cannot have the norm of a gradient {spread}; {instead}")
