"""What cannot be done, refused before anything is built or trained."""

import shlex
from typing import Any

import lightning as L
from lightning.pytorch.strategies import FSDPStrategy, ParallelStrategy

from data_modules import DATA_SETS, data_class
from lit_nn.errors import UsageError


def refuse(cases: dict[str, Any]) -> None:
    """Raise the first text of which the case holds."""
    for text, holds in cases.items():
        if holds:
            raise UsageError(text)


def check_options(config: Any, tests: bool, resumes: bool) -> None:
    """Refuse options of a training that train or test nothing, or would be ignored."""
    trainer = config.trainer
    lengths = ["max_epochs", "max_steps", "limit_train_batches", *(["limit_test_batches"] if tests else [])]
    goes_by_val = config.early_stopping is not None or config.model.schedule == "plateau"
    positive = ("early_stopping", "save_every_steps", "save_every_minutes")
    for name in lengths:
        refuse(
            {
                f"{name} is 0; give 1 or more. To train without a test: python -m lit_nn fit, instead of train.py. "
                "To test what is trained already: python scripts/evaluate.py CKPT": trainer[name] == 0
            }
        )
    for name in positive:
        refuse({f"--{name} is {config[name]}; it must be more than 0": config[name] is not None and config[name] <= 0})
    refuse(
        {
            "limit_val_batches is 0, but --early_stopping and --schedule plateau go by the validation; drop one of "
            "them": goes_by_val and trainer.limit_val_batches == 0,
            "--cache_features keeps what a network sees that does not change: it needs --freeze_epochs -1": (
                config.cache_features and config.model.freeze_epochs != -1
            ),
            f"--ema is {config.ema}; it must lie between 0 and 1": config.ema is not None and not 0 < config.ema < 1,
            "--fast_dev_run tries a new run; leave out --resume": resumes and trainer.fast_dev_run,
        }
    )


def check_data_dir(data_name: str, typed: list[str]) -> None:
    """Refuse a folder that was typed and that the data set would ignore."""
    if typed and data_name in DATA_SETS and not data_class(data_name).reads_data_dir:
        raise UsageError(
            f"--data_dir {typed[-1]}: the data set {data_name} reads no folder. For images of your own: "
            f"--data image_folder --data_dir {shlex.quote(typed[-1])}"
        )


def check_processes(config: Any, trainer: L.Trainer) -> None:
    """Refuse what several processes cannot do."""
    strategy, options = trainer.strategy, config.trainer
    if isinstance(strategy, ParallelStrategy) and strategy.cluster_environment is not None:
        strategy.cluster_environment.validate_settings(trainer.num_devices, trainer.num_nodes)
    fsdp, on_cpu = isinstance(strategy, FSDPStrategy), strategy.root_device.type == "cpu"
    by_fork = strategy.launcher is not None and strategy.launcher.is_interactive_compatible
    by_norm = options.gradient_clip_val and trainer.gradient_clip_algorithm != "value"
    refuse(
        {
            f"--strategy {options.strategy} is for notebooks; --strategy ddp does the same from a terminal, and "
            "--devices 1 works in both": by_fork or str(options.strategy).endswith(("_spawn", "_forkserver")),
            "--sync_batchnorm needs GPUs: torch has no SyncBatchNorm for the CPU; leave it out": options.sync_batchnorm
            and trainer.world_size > 1
            and on_cpu,
            "--ema cannot average weights that --strategy fsdp has spread over the processes": fsdp
            and config.get("ema") is not None,
            "--clip_grad cannot have the norm of a gradient that --strategy fsdp has spread over the processes; add "
            "--trainer.gradient_clip_algorithm value to clip each of its numbers": fsdp and by_norm,
        }
    )
