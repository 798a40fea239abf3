"""Several processes that are one run: who has started them, and how such a run is continued."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from lit_nn.errors import UsageError

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment


def launcher() -> "ClusterEnvironment | None":
    """What has started this process and the others of its run, if that is torchrun or SLURM."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    try:
        # Not requeued by Lightning, with a checkpoint of its own, but by scripts/slurm/train.sbatch.
        return SLURMEnvironment(auto_requeue=False) if SLURMEnvironment.detect() else None
    except RuntimeError as error:  # SLURM was not told how many tasks a node gets
        raise UsageError(str(error)) from error


def launched() -> dict[str, int]:
    """How many processes on each of how many machines torchrun or SLURM has started, as options of the Trainer."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        devices, all_of_them = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        return {"devices": devices, "num_nodes": all_of_them // devices}
    devices, nodes = (int(os.environ.get(f"SLURM_{name}", 1)) for name in ("NTASKS_PER_NODE", "NNODES"))
    return {"devices": devices, "num_nodes": nodes}


def to_continue(folder: Path) -> str:
    """The sentence that says how to continue a run."""
    launched_outside = "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_NTASKS" in os.environ
    how = ", with the same launcher: " if launched_outside else ": python "
    return f"To continue{how}scripts/train.py --resume {shlex.quote(str(folder))}"
