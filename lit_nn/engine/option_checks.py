"""What cannot be done, refused before anything is built or trained."""

import shlex
from typing import Any

import lightning as L
from lightning.pytorch.strategies import FSDPStrategy, ParallelStrategy

from data_modules import DATA_SETS, data_class
from lit_nn.errors import UsageError


def refuse(holds: Any, text: str) -> None:
    """Raise UsageError with the text, if the case holds."""
    if holds:
        raise UsageError(text)


def check_stage(stage: str, given: dict[str, Any]) -> None:
    """Refuse options of a training where nothing is trained."""
    names = "accept", "cache_features", "compile", "ema", "early_stopping", "save_every_steps", "save_every_minutes"
    for name in given if stage != "fit" else ():
        in_vain = name in names or name.startswith("model.")  # the checkpoint says what the model is
        refuse(in_vain, f"--{name.removeprefix('model.')} is for a training, and {stage} is none; leave it out")


def check_options(config: Any, tests: bool, resumes: bool) -> None:
    """Refuse options of a training that train or test nothing, or would be ignored."""
    trainer, ema, accept = config.trainer, config.ema, config.accept
    instead = "To train without a test: python -m lit_nn fit. To test what is trained: python scripts/evaluate.py CKPT"
    for name in ("max_epochs", "max_steps", "limit_train_batches", *["limit_test_batches"] * tests):
        refuse(trainer[name] == 0, f"{name} is 0; give 1 or more. {instead}")
    for name in ("early_stopping", "save_every_steps", "save_every_minutes"):
        refuse(config[name] is not None and config[name] <= 0, f"--{name} is {config[name]}; it must be more than 0")
    blind = trainer.limit_val_batches == 0 and (config.early_stopping or accept or config.model.schedule == "plateau")
    going = "--early_stopping, --accept and --schedule plateau go by the validation"
    refuse(blind, f"limit_val_batches is 0, but {going}; drop one")
    refuse(ema is not None and not 0 < ema < 1, f"--ema is {ema}; it must lie between 0 and 1")
    for name in ("accept", "ema", "save_every_steps", "save_every_minutes"):
        text = f"--{name} is about checkpoints; leave it out, or --trainer.enable_checkpointing false"
        refuse(config[name] is not None and trainer.enable_checkpointing is False, text)
    refuse(accept is not None and not 0 < accept <= 1, f"--accept is {accept}; it must be more than 0, and at most 1")
    frozen = config.model.freeze_epochs == -1
    refuse(config.cache_features and not frozen, "--cache_features keeps what does not change: add --freeze_epochs -1")
    refuse(resumes and trainer.fast_dev_run, "--fast_dev_run tries a new run; leave out --resume")


def check_data_dir(data_name: str, folder: str) -> None:
    """Refuse a folder that was chosen and that the data set would ignore."""
    instead = f"For images of your own: --data image_folder --data_dir {shlex.quote(folder)}"
    useless = folder != "data" and data_name in DATA_SETS and not data_class(data_name).reads_data_dir
    refuse(useless, f"--data_dir {folder}: the data set {data_name} reads no folder. {instead}")


def check_seed(checkpoint: dict[str, Any], before: Any, now: Any) -> None:
    """Refuse what is no seed, and another split than that of a checkpoint of a version that did not remember it."""
    is_seed = not isinstance(now.seed_everything, bool) and 0 <= now.seed_everything < 2**32
    refuse(not is_seed, f"--seed is {now.seed_everything}; it must be a number from 0 to {2**32 - 1}")
    if before is not None and checkpoint and "parts" not in checkpoint:
        splits = [(c.seed_everything, c.data.init_args.get("val_fraction")) for c in (before, now)]
        text = "this checkpoint does not keep its parts: leave out --seed and --data.val_fraction"
        refuse(splits[0] != splits[1], text)


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
    text = "--ema and --accept cannot use weights that --strategy fsdp has spread over the processes; leave them out"
    refuse(isinstance(strategy, FSDPStrategy) and (config.get("ema") or config.get("accept")), text)
