"""What runs beside the Trainer: progress bar, table of metrics, TensorBoard pictures, facts in checkpoints."""

import csv
import importlib.metadata
import subprocess
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from data_modules.files import atomic_path
from lit_nn import __version__
from lit_nn.checkpoint import CHECKPOINT_FORMAT
from lit_nn.classifier import LitClassifier


class ProgressBar(TQDMProgressBar):
    """Progress with the loss and accuracy of the latest batches, drawn a few times a second whatever the step time."""

    SECONDS = 0.2  # between two drawings

    def __init__(self) -> None:
        super().__init__()
        self._next_update = 0.0
        self._recent: dict[str, str] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw, if the time has come or the epoch is over."""
        now = time.monotonic()
        if now >= self._next_update or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._next_update = now + self.SECONDS
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Loss and accuracy of the latest training batches, and the latest validation's."""
        assert isinstance(pl_module, LitClassifier)
        if recent := pl_module.train_metrics.recent():  # just after the metrics were flushed there are none
            self._recent = {name: f"{value:.3f}" for name, value in recent.items()}
        validated: dict[str, int | str | float | dict[str, float]] = {
            name: f"{trainer.callback_metrics[name]:.3f}"
            for name in ("val_loss", "val_acc")
            if name in trainer.callback_metrics
        }
        return {**self._recent, **validated}


class MetricsCSV(Callback):
    """Writes metrics.csv: one row per epoch with the exact loss and accuracy of training and validation.

    An epoch without validation has none in its row. A run that is continued keeps the rows of the epochs that were
    complete.

    Args:
        path: Where the table goes.
    """

    COLUMNS = ("epoch", "step", "lr", "train_loss", "train_acc", "val_loss", "val_acc")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.validated: int | None = None  # the latest epoch that had a validation

    def state_dict(self) -> dict[str, Any]:
        """The latest epoch that had a validation."""
        return {"validated": self.validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.validated = state_dict["validated"]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the epoch."""
        if not trainer.sanity_checking:
            self.validated = trainer.current_epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the row of the epoch before: only now its training metrics are known and its schedule has moved."""
        self._add_row(trainer, trainer.current_epoch - 1)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the row of the last epoch."""
        self._add_row(trainer, trainer.current_epoch - 1)

    @rank_zero_only
    def _add_row(self, trainer: L.Trainer, epoch: int) -> None:
        if epoch < 0 or "train_loss" not in trainer.callback_metrics:
            return
        rows: list[dict[str, str]] = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["epoch"]) < epoch]
        metrics = trainer.callback_metrics
        known = [name for name in self.COLUMNS if epoch == self.validated or not name.startswith("val_")]
        values = {name: metrics[name].item() for name in known if name in metrics}
        values["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        row = {name: f"{value:.7g}" for name, value in values.items()}  # a float32 has no more digits
        row |= {"epoch": str(epoch), "step": str(trainer.global_step)}
        with atomic_path(self.path) as path, path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.COLUMNS)
            writer.writeheader()
            writer.writerows([*rows, row])


class TensorBoardPictures(Callback):
    """Shows in TensorBoard what goes in and what it goes through: a sheet of training images, the network's graph."""

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the sheet and the graph once, before the first step."""
        logger = trainer.logger
        if not isinstance(logger, TensorBoardLogger):
            return
        assert isinstance(pl_module, LitClassifier)
        from data_modules.sheets import sample_rows, sample_sheet  # matplotlib: only when something is drawn

        images, labels, indices = pl_module.data.split("train")
        rows = indices[sample_rows(labels.cpu()[indices])]
        names = pl_module.hparams["class_names"]
        logger.experiment.add_figure("train/samples", sample_sheet(images[rows], labels[rows], names))
        if isinstance(trainer.strategy, FSDPStrategy):
            return  # each process has but a part of the weights
        self._add_graph(logger, pl_module, images.shape[-2:])

    def _add_graph(self, logger: TensorBoardLogger, classifier: LitClassifier, image_size: torch.Size) -> None:
        net = classifier.net
        height, width = classifier.net_size or image_size
        example = torch.zeros(2, classifier.hparams["image_shape"][0], height, width, device=classifier.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TensorBoard's writer traces; values that shape the graph are constants
            try:
                logger.experiment.add_graph(net.eval(), example)  # eval: zeros must not move any running mean
            except Exception as error:  # tracing fails in many ways, and a picture must not end a training
                print(f"TensorBoard gets no graph of this network: {error}")
            finally:
                net.train()


class Compile(Callback):
    """Compiles the network in place, so the names of its weights stay: a checkpoint does not know of it."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ask for it; TensorBoard's graph, which cannot be drawn of a compiled network, has been drawn by now."""
        assert isinstance(pl_module, LitClassifier)
        pl_module.net.compile()


class RunFacts(Callback):
    """Puts into every checkpoint where it comes from: settings, metrics, versions, commit.

    Args:
        settings: The configuration of the run, plain values.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        # Asked once: the code that runs is that of now, and asking git takes longer than saving a small network.
        self.origin = {"versions": versions(), "git_commit": git_commit()}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the facts, plain values all of them."""
        checkpoint["format"] = CHECKPOINT_FORMAT
        checkpoint["settings"] = self.settings
        checkpoint["metrics"] = {name: value.item() for name, value in trainer.callback_metrics.items()}  # so far
        checkpoint.update(self.origin)


def versions() -> dict[str, str]:
    """Versions of this project and of the packages that decide its numbers."""
    packages = ("torch", "torchvision", "lightning", "torchmetrics", "numpy")
    return {"lit-nn": __version__} | {name: importlib.metadata.version(name) for name in packages}


def git_commit() -> str:
    """Commit of this project, with "+changes" if something is not committed; "" if it is in no repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes", "--match="]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
