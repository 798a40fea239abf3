"""The Trainer of a run, with the callbacks, plugins, strategy and logger that belong to it."""

import functools
import os
import shutil
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

from lit_nn.engine.callbacks import EMA, Checkpoints, KeepFeatures, MetricsCSV, ProgressBar
from lit_nn.engine.option_checks import check_processes, refuse
from lit_nn.engine.resume import RunState, SafeCheckpointIO
from lit_nn.errors import UsageError, brief
from lit_nn.trained.predict import keep_memory

if TYPE_CHECKING:
    from lit_nn.engine.cli import LitCLI

FSDP_UNIT = 10_000_000  # parameters of a part of a network that FSDP gathers only while it is needed


class Trainer(L.Trainer):
    """Lightning's, for the parser: ``--precision`` may be auto as well, which LitCLI replaces by `fast_precision`."""

    def __init__(self, *args: Any, precision: int | str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, precision=precision, **kwargs)  # type: ignore[arg-type]  # refuses what it has not


def fast_precision(accelerator: str) -> str:
    """bf16-mixed where the device has instructions for it (of CPUs x86), else 16-mixed on a GPU and 32-true elsewhere.

    A CPU without them takes many times as long in bfloat16 as in float32: torch falls back to plain loops, in silence.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    known = torch.cpu.get_capabilities()
    return "bf16-mixed" if on_cpu and (known.get("avx512_bf16") or known.get("amx_bf16")) else "32-true"


def build_trainer(cli: "LitCLI", given: dict[str, Any]) -> L.Trainer:
    """The Trainer with the options given; when it fits, with what writes into the run folder."""
    config, callbacks, plugins = cli.config, _as_list(given["callbacks"]), _as_list(given["plugins"])
    plugins.append(SafeCheckpointIO())
    defaults = {"devices": "auto", "num_nodes": 1}  # where nothing else is said, as many as were started
    given |= {name: count for name, count in launched().items() if given[name] == defaults[name]}
    if given["strategy"] == "fsdp":
        policy = functools.partial(size_based_auto_wrap_policy, min_num_params=FSDP_UNIT)
        given["strategy"] = FSDPStrategy(auto_wrap_policy=policy, sync_module_states=True)
    if given["enable_progress_bar"] is not False and not any(isinstance(bar, AnyProgressBar) for bar in callbacks):
        callbacks.append(ProgressBar())
    if cli.stage != "fit":
        given["logger"] = False
    else:
        text = "--accept is for one label for each image; of several, each class gets the threshold with its best F1"
        refuse(config.accept and cli.model.multi_label, text)
        if config.ema is not None:
            callbacks.append(EMA(decay=config.ema))
        if config.cache_features:
            changed = ",".join(cli.datamodule.augment.names)
            text = f"--cache_features keeps images as they are, and --augment {changed} changes it; give --augment none"
            refuse(changed, f"{text} (mirrored views are kept by --flip_in_eval)")
            callbacks.append(KeepFeatures())
        if config.early_stopping is not None:
            monitor, mode = cli.model.hparams["monitor"], cli.model.mode
            callbacks.append(EarlyStopping(monitor, patience=config.early_stopping, mode=mode))
    if cli.run_dir is not None:
        given["default_root_dir"] = given["default_root_dir"] or str(cli.run_dir)
        if given["logger"] in (None, True):
            options: dict[str, Any] = {"name": "", "version": "", "default_hp_metric": False}
            options["purge_step"] = cli.start.checkpoint.get("global_step")  # hide what came after
            given["logger"] = TensorBoardLogger(cli.run_dir, **options)
        if given["enable_checkpointing"] is not False:
            folder = cli.run_dir / "checkpoints"
            cli.checkpoints = Checkpoints(folder, config.save_every_steps, config.save_every_minutes)
            callbacks.append(cli.checkpoints)
        cli.state = RunState(cli.options)
        callbacks += [cli.state, MetricsCSV(cli.run_dir / "metrics.csv")]
    try:
        trainer = Trainer(**{**given, "callbacks": callbacks, "plugins": plugins})
        check_processes(config, trainer)
    except UsageError:
        raise
    except (ValueError, TypeError, ImportError, RuntimeError, MisconfigurationException) as error:
        hint = "; --accelerator cpu and --accelerator auto work everywhere" if "backend" in brief(error) else ""
        raise UsageError(f"{brief(error).rstrip('.!')}{hint}") from error
    # Lightning's own handling of signals would end a test in silence, with exit status 0, and requeue SLURM's jobs. In
    # a training `Checkpoints` does it; anywhere else nothing is to be saved, and they do what they always do.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    keep_memory()
    if trainer.strategy.root_device.type == "cuda" and torch.get_float32_matmul_precision() == "highest":
        torch.set_float32_matmul_precision("high")  # TF32, which torch's convolutions take anyway
    is_slow = torch.cpu.get_capabilities().get("architecture") == "x86_64" and fast_precision("cpu") == "32-true"
    if trainer.strategy.root_device.type == "cpu" and is_slow and str(trainer.precision).startswith("bf16"):
        rank_zero_only(print)("This CPU has no bfloat16: --precision 32-true (or auto) is many times as fast here.")
    if given["accelerator"] == "auto" and shutil.which("nvidia-smi") and not torch.cuda.is_available():
        rank_zero_warn("an NVIDIA GPU is here that PyTorch cannot use: is its driver too old? See the README")
    return trainer


def launched() -> dict[str, int]:
    """How many processes on each of how many machines torchrun or SLURM has started, as options of the Trainer."""
    if TorchElasticEnvironment.detect():
        devices, all_of_them = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        return {"devices": devices, "num_nodes": all_of_them // devices}
    devices, nodes = (int(os.environ.get(f"SLURM_{name}", 1)) for name in ("NTASKS_PER_NODE", "NNODES"))
    return {"devices": devices, "num_nodes": nodes} if SLURMEnvironment.detect() else {}


def _as_list(given: Any) -> list[Any]:
    """The option of the Trainer that may be one object or a list of them."""
    return [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
