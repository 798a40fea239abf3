"""LitClassifier trains an ImageClassifier: loss, metrics, optimizer, schedule. The only training step there is."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRSchedulerConfig
from torch import Tensor, nn

from data_modules.base import ImageDataModule
from lit_nn.checkpoint import load_classifier, load_weights
from lit_nn.errors import UsageError, look_up
from lit_nn.finetune import FrozenBody, classify
from lit_nn.initialise import init_weights
from lit_nn.losses import LOSSES, balanced_weights
from lit_nn.metrics import StageMetrics
from lit_nn.model import ImageClassifier
from lit_nn.nets import LIBRARIES
from lit_nn.nets.pretrained import WEIGHT_FILES
from lit_nn.optim import build_optimizer, build_schedule

Batch = tuple[Tensor, Tensor]  # uint8 images (B, C, H, W) and labels (B,), or class probabilities (B, num_classes)


class LitClassifier(ImageClassifier, L.LightningModule):
    """Trains an image classifier; a checkpoint holds all arguments, plain values.

    Args:
        class_names: This argument, the five after it and those that are not here are `ImageClassifier`'s; the CLI fills
            in what follows from the data set.
        weights: What to start from: "none", "default" or a published tag (of "torchvision/NAME" and "timm/NAME"), or a
            file.
        backbone_lr: Factor of the learning rate for all layers but the last; None is 0.1 with weights and 1 without.
        freeze_epochs: In how many epochs only the last layer learns at first; -1 for all.
        init: How the weights start, one of `lit_nn.initialise.INITS`; "default" leaves PyTorch's own initialisation.
        loss: Which loss, one of `lit_nn.losses.LOSSES`.
        label_smoothing: Share of the training target that is spread evenly over all classes.
        class_weights: Weight of each class in the training loss: "none", "balanced" (rare classes weigh more, so that
            every class has the same total), or one number for each class.
        optimizer: Which optimizer, one of `lit_nn.optim.OPTIMIZERS`.
        optimizer_args: Further arguments of the optimizer.
        lr: Learning rate; the highest one where the schedule changes it.
        weight_decay: Decay of weight matrices and kernels; biases and normalisation layers are not decayed.
        schedule: How the learning rate changes during the training, one of `lit_nn.optim.SCHEDULES`.
        schedule_args: Further arguments of the schedule.
        monitor: Which result of the validation is to be good: val_acc, val_loss, val_balanced_acc, val_f1. best.ckpt,
            early stopping and the schedule "plateau" go by it.

    Raises:
        UsageError: If a name is unknown or an argument does not fit; the message names what is allowed.
    """

    class_weights: Tensor | None
    hparams = L.LightningModule.hparams

    def __init__(
        self,
        class_names: list[str],
        image_shape: tuple[int, int, int],
        mean: list[float],
        std: list[float],
        *,
        net: str | nn.Module = "lenet",
        net_args: dict[str, Any] | None = None,
        weights: str = "none",
        backbone_lr: float | None = None,
        freeze_epochs: int = 0,
        init: str = "default",
        loss: str = "cross_entropy",
        label_smoothing: float = 0.0,
        class_weights: str | list[float] = "none",
        optimizer: str = "adamw",
        optimizer_args: dict[str, Any] | None = None,
        lr: float = 3e-3,
        weight_decay: float = 0.01,
        schedule: str = "one_cycle",
        schedule_args: dict[str, Any] | None = None,
        monitor: str = "val_acc",
        **kwargs: Any,
    ) -> None:
        given = weights != "none"
        if given and isinstance(net, str) and net.startswith(LIBRARIES):
            net_args = {**(net_args or {}), "weights": weights}
        elif given and not weights.endswith(WEIGHT_FILES):
            files = " ".join(WEIGHT_FILES)
            raise UsageError(f"weights is '{weights}', net {net} has no published ones; give none, or a file ({files})")
        super().__init__(class_names, image_shape, mean, std, net=net, net_args=net_args, **kwargs)
        if given and init != "default":
            raise UsageError(f"init {init} would overwrite the pretrained weights; leave out one of the two")
        init_weights(self.net, init)
        self.account = load_weights(self.net, weights) if weights.endswith(WEIGHT_FILES) else ""  # of what was taken
        self.loss = look_up(LOSSES, loss, "loss")
        if not 0 <= label_smoothing <= 1:
            raise UsageError(f"label_smoothing is {label_smoothing}; it must be from 0 to 1")
        if not isinstance(class_weights, str):
            class_weights = [float(weight) for weight in class_weights]
        backbone_lr = (0.1 if given else 1.0) if backbone_lr is None else backbone_lr
        if backbone_lr < 0 or freeze_epochs < -1:
            raise UsageError(f"backbone_lr {backbone_lr}, freeze_epochs {freeze_epochs}; at least 0 and -1 are allowed")
        if freeze_epochs > 0 and schedule == "plateau":
            raise UsageError("schedule plateau would keep a learning rate of 0; choose another one with freeze_epochs")
        self.save_hyperparameters(ignore=["net", "weights"])
        # From which the same model is built again.
        self.save_hyperparameters({**self.arguments, "class_weights": class_weights, "backbone_lr": backbone_lr})
        self.register_buffer("class_weights", self._weights(class_weights), persistent=False)
        self.train_metrics = StageMetrics(len(class_names))
        self.val_metrics = StageMetrics(len(class_names))
        self.test_metrics = StageMetrics(len(class_names))
        look_up({f"val_{name}": metric for name, metric in self.val_metrics.by_name.items()}, monitor, "monitor")
        self.total_steps = math.inf  # optimizer steps of the whole training, known when it starts
        self.timer: Timer | None = None  # where time alone ends the training
        self.decayed = [param.ndim > 1 for param in self.parameters()]  # kept, because FSDP makes all of them flat
        self.body = FrozenBody(self, freeze_epochs)
        self._optimizer_and_schedule(may_fuse=False, is_frozen=bool)  # a wrong option is refused now, not later

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's is a descriptor, which no method can match
        cls, checkpoint_path: Any, map_location: Any = None, **kwargs: Any
    ) -> "LitClassifier":
        """Load a classifier as Lightning does it (in train mode), after the checks of `load_classifier`."""
        load_classifier(checkpoint_path, kwargs.get("net"))
        return super().load_from_checkpoint(checkpoint_path, map_location, weights_only=True, **kwargs)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one training batch, ()."""
        images, labels = batch  # uint8 (B, C, H, W), int64 (B,) or float (B, num_classes)
        logits = self.logits(images)  # (B, num_classes)
        loss = self.loss(logits, labels, self.hparams["label_smoothing"], self.class_weights)  # ()
        self.train_metrics.update(loss, logits, labels)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it without declaring it
        if every and (self.global_step + 1) % every == 0:
            # at intervals only: self.log costs as much as a small network's step
            self.log("train_loss_step", loss)
            self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count one batch."""
        self._count(batch, self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count one batch."""
        self._count(batch, self.test_metrics)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Probability of each class, (B, num_classes)."""
        images = batch[0]  # (B, C, H, W)
        count = len(images)  # 0 in a distributed run, maybe: see _count
        return self.probabilities(self(images if count else images.new_zeros(1, *images.shape[1:]))[:count])

    def _count(self, batch: Batch, metrics: StageMetrics) -> None:
        """Add a batch to the metrics, with the plain loss: label smoothing and class weights are for training."""
        images, labels = batch
        if len(labels):
            logits = self.logits(images)
            metrics.update(self.loss(logits, labels), logits, labels)
        else:  # the last batch of a process; FSDP needs every process to go forward, and not all layers take no image
            self.logits(images.new_zeros(1, *images.shape[1:]))

    def logits(self, images: Tensor) -> Tensor:
        """Logits of images, or of their features (`data_modules.images.features`), float16 (B, D) or (B, V, D)."""
        return self(images) if images.dtype == torch.uint8 else classify(self, images.to(self.mean.dtype))

    def on_train_epoch_end(self) -> None:
        """Log the epoch's exact training loss and accuracy."""
        self._log("train", self.train_metrics)

    def on_validation_epoch_end(self) -> None:
        """Log the exact validation loss and accuracy."""
        self._log("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the exact test loss and accuracy."""
        self._log("test", self.test_metrics)

    def _log(self, stage: str, metrics: StageMetrics) -> None:
        metrics.flush()
        for name, metric in metrics.by_name.items():  # the objects: Lightning adds them up over processes, resets them
            self.log(f"{stage}_{name}", metric)

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether a low or a high value of what is monitored is good."""
        return "min" if self.val_metrics.by_name[self.hparams["monitor"][4:]].higher_is_better is False else "max"

    def on_fit_start(self) -> None:
        """Take the class weights from the training data if they are to balance it; see whether the end is known."""
        if self.hparams["class_weights"] == "balanced":
            if self.data is None:
                raise UsageError(
                    "class_weights balanced needs an ImageDataModule; with a loader of your own give a list"
                )
            self.class_weights = balanced_weights(self.data.class_counts).to(self.device)
        trainer = self.trainer
        endless = trainer.max_epochs == -1 and trainer.max_steps == -1
        if endless and self.hparams["schedule"] not in ("constant", "plateau"):
            self.timer = next((c for c in trainer.callbacks if isinstance(c, Timer)), None)  # type: ignore[attr-defined]
            if self.timer is None or self.timer.time_remaining() is None:
                raise UsageError(
                    f"--max_epochs -1 has no end, which --schedule {self.hparams['schedule']} goes by; give "
                    "--max_epochs N or --trainer.max_time 00:08:00:00 (days first), or --schedule constant or plateau"
                )

    @property
    def data(self) -> ImageDataModule:
        """The data module of the Trainer that this classifier is attached to."""
        return self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it without declaring it

    def on_train_start(self) -> None:
        """Learn how long the training is; asking earlier would lose the place of a restored loader (PL#20550)."""
        self.total_steps = self.trainer.estimated_stepping_batches

    def progress(self, steps: int) -> float:
        """Which part of the training is done after so many steps, 0 to 1."""
        if self.timer is None:
            return steps / self.total_steps
        elapsed, remaining = self.timer.time_elapsed(), self.timer.time_remaining() or 0.0
        return elapsed / max(elapsed + remaining, 1e-9)

    def configure_callbacks(self) -> list[L.Callback]:
        """What the Trainer runs beside its own; asked for again where the same Trainer tests."""
        return [] if self.body in self.trainer.callbacks else [self.body]  # type: ignore[attr-defined]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer over all parameters that are trained, and the schedule of its learning rate."""
        # With mixed precision Lightning clips no gradients of a fused optimizer, which would undo their scale too late.
        mixed = str(self.trainer.precision).endswith("mixed")
        return self._optimizer_and_schedule(
            not (self.trainer.gradient_clip_val and mixed), partial(self.body.starts_frozen, self.trainer)
        )

    def _optimizer_and_schedule(self, may_fuse: bool, is_frozen: Callable[[], bool]) -> OptimizerLRSchedulerConfig:
        hparams = self.hparams
        optimizer = build_optimizer(
            hparams["optimizer"],
            self.parameters(),
            hparams["lr"],
            hparams["weight_decay"],
            self.decayed,
            self.body.in_body if hparams["backbone_lr"] != 1 or hparams["freeze_epochs"] else None,
            hparams["backbone_lr"],
            may_fuse=may_fuse,
            **(hparams["optimizer_args"] or {}),
        )
        # A function of the progress holds no number of steps, so a resumed run may be made longer.
        options = hparams["schedule_args"] or {}
        if hparams["schedule"] == "plateau":
            options = {"mode": self.mode, **options}
        schedule = build_schedule(hparams["schedule"], optimizer, self.progress, is_frozen, **options)
        schedule["monitor"] = hparams["monitor"]  # which only "plateau" looks at
        return {"optimizer": optimizer, "lr_scheduler": LRSchedulerConfigType(**schedule)}  # type: ignore[typeddict-item]

    def _weights(self, class_weights: str | list[float]) -> Tensor | None:
        """Class weights (num_classes,), or None; ones for balanced ones, which on_fit_start knows."""
        count = len(self.class_names)
        if isinstance(class_weights, str):
            known = {"none": None, "balanced": torch.ones(count), f"[...] with {count} numbers": None}
            return look_up(known, class_weights, "class_weights")
        if len(class_weights) != count:
            raise UsageError(f"class_weights has {len(class_weights)} numbers for {count} classes")
        return torch.tensor(class_weights, dtype=torch.float32)
