"""How much of a training is done, which the learning rate goes by."""

import math

import lightning as L
from lightning.pytorch.callbacks import Timer

from lit_nn.errors import UsageError


class Progress(L.Callback):
    """Knows for a schedule which part of a training is done: of its steps, or of its time where that alone ends it."""

    def __init__(self, schedule: str) -> None:
        self.schedule, self.total_steps = schedule, math.inf
        self.timer: Timer | None = None  # where time alone ends the training

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See whether the end is known."""
        self.timer = None
        endless = trainer.max_epochs == -1 and trainer.max_steps == -1
        if endless and self.schedule not in ("constant", "plateau"):
            self.timer = next((c for c in trainer.callbacks if isinstance(c, Timer)), None)  # type: ignore[attr-defined]
            if self.timer is None or self.timer.time_remaining() is None:
                raise UsageError(
                    f"--max_epochs -1 has no end, which --schedule {self.schedule} goes by; give --max_epochs N or "
                    "--trainer.max_time 00:08:00:00 (days first), or --schedule constant or plateau"
                )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learn how long the training is; asking earlier would lose the place of a restored loader (PL#20550)."""
        self.total_steps = trainer.estimated_stepping_batches

    def __call__(self, steps: int) -> float:
        """Which part is done after so many steps, 0 to 1."""
        if self.timer is None:
            return steps / self.total_steps
        elapsed, remaining = self.timer.time_elapsed(), self.timer.time_remaining() or 0.0
        return elapsed / max(elapsed + remaining, 1e-9)
