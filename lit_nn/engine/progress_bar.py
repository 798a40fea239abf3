"""The progress bar of a training, and what stands in for it where there is no terminal."""

import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from lit_nn.classifier import LitClassifier


class ProgressBar(TQDMProgressBar):
    """Progress with the metrics of the latest batches; where there is no terminal, a line an epoch."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=20 if sys.stdout.isatty() else 0)
        self._recent: dict[str, str] = {}

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Without a terminal, say how the epoch before has ended."""
        self._print_epoch(trainer)
        super().on_train_epoch_start(trainer, *args)

    def on_train_end(self, *args: Any) -> None:
        """Likewise for the last one."""
        self._print_epoch(args[0])
        super().on_train_end(*args)

    def on_exception(self, *args: Any) -> None:
        """Leave the bar's line, so that the message that follows has one of its own."""
        if self.is_enabled:
            print(flush=True)

    def _print_epoch(self, trainer: L.Trainer) -> None:
        if self.is_disabled and trainer.is_global_zero and "train_loss" in trainer.callback_metrics:
            names = _shown(trainer, "train_loss")
            known = [
                f"{name} {trainer.callback_metrics[name]:.4f}" for name in names if name in trainer.callback_metrics
            ]
            print(f"epoch {trainer.current_epoch} of {trainer.max_epochs}: {', '.join(known)}", flush=True)

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Loss and accuracy of the latest training batches, the latest validation's, and what a user logs for it."""
        assert isinstance(pl_module, LitClassifier)
        if recent := pl_module.train_metrics.recent():  # just after the metrics were flushed there are none
            self._recent = {name: f"{value:.3f}" for name, value in recent.items()}
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        metrics = trainer.callback_metrics
        shown.update(self._recent)
        shown.update({name: f"{metrics[name]:.3f}" for name in _shown(trainer) if name in metrics})
        return shown


def _shown(trainer: L.Trainer, *names: str) -> list[str]:
    """The names and those of the validation, with what best.ckpt goes by."""
    return [*dict.fromkeys([*names, "val_loss", "val_acc", trainer.lightning_module.hparams["monitor"]])]
