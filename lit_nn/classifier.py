"""LitClassifier: pixels -> normalise -> network -> loss, metrics, optimizer. The only training step of the project."""

import math
from typing import Any, Literal, cast

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRSchedulerConfig
from torch import Tensor, nn

from data_modules.base import ImageDataModule
from lit_nn.checkpoint import read_checkpoint
from lit_nn.choices import look_up
from lit_nn.init import InitName, init_weights
from lit_nn.losses import LOSSES, LossName, balanced_weights
from lit_nn.metrics import StageMetrics
from lit_nn.nets import build_net
from lit_nn.optim import OptimizerName, ScheduleName, build_optimizer, build_schedule
from lit_nn.predict import Prediction, predict

Batch = tuple[Tensor, Tensor]  # uint8 images (B, C, H, W) and labels (B,), or class probabilities (B, num_classes)


def fit_to(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring images to a network's size: a small lack is padded with black, everything else is resized.

    Args:
        images: Float (B, C, H, W).
        size: Height and width that the network expects.

    Returns:
        Float (B, C, *size).
    """
    height, width = images.shape[-2:]
    missing_h, missing_w = size[0] - height, size[1] - width
    if 0 <= missing_h <= height // 4 and 0 <= missing_w <= width // 4:  # 28x28 to 32x32 for instance
        top, left = missing_h // 2, missing_w // 2
        return F.pad(images, (left, missing_w - left, top, missing_h - top))
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


class LitClassifier(L.LightningModule):
    """Classifies images with one of the project's networks.

    All arguments are plain values, and a checkpoint holds all of them; so it loads with nothing else at hand, and
    loading it runs no code that the file names. The CLI fills in the first four from the data set.

    Args:
        class_names: Name of each class, in the order of the labels.
        image_shape: Channels, height and width of the images.
        mean: Mean of each channel, with pixels scaled to [0, 1].
        std: Standard deviation of each channel, likewise.
        net: Name of the network, one of `lit_nn.nets.NETS` or "torchvision/NAME".
        net_args: Further arguments of the network's constructor.
        init: How the weights start, one of `lit_nn.init.INITS`; "default" leaves PyTorch's own initialisation.
        loss: Which loss, one of `lit_nn.losses.LOSSES`.
        label_smoothing: Share of the training target that is spread evenly over all classes.
        class_weights: Weight of each class in the training loss: "none", "balanced" (rare classes weigh more, so that
            every class has the same total), or one number for each class.
        optimizer: Which optimizer, one of `lit_nn.optim.OPTIMIZERS`.
        optimizer_args: Further arguments of the optimizer.
        lr: Learning rate; the highest one where the schedule changes it.
        weight_decay: Decay of weight matrices and kernels; biases and normalisation layers are not decayed.
        schedule: How the learning rate changes during the training.
        schedule_args: Further arguments of the schedule.
        channels_last: Keep kernels and activations in the order (B, H, W, C), which convolutions with many channels
            compute faster, most of all with bf16; networks that call ``view`` on an activation cannot work with it.
        flip_in_eval: Outside of training, give the mean logits of each picture and its mirror image: more accurate
            where left and right do not matter, at twice the cost. What is exported does it too.

    Raises:
        ValueError: If a name is unknown or an argument does not fit; the message names what is allowed.
    """

    net: nn.Module
    mean: Tensor
    std: Tensor
    class_weights: Tensor | None

    def __init__(
        self,
        class_names: list[str],
        image_shape: tuple[int, int, int],
        mean: list[float],
        std: list[float],
        net: str = "lenet",
        net_args: dict[str, Any] | None = None,
        init: InitName = "default",
        loss: LossName = "cross_entropy",
        label_smoothing: float = 0.0,
        class_weights: Literal["none", "balanced"] | list[float] = "none",
        optimizer: OptimizerName = "adamw",
        optimizer_args: dict[str, Any] | None = None,
        lr: float = 3e-3,
        weight_decay: float = 0.01,
        schedule: ScheduleName = "one_cycle",
        schedule_args: dict[str, Any] | None = None,
        channels_last: bool = False,
        flip_in_eval: bool = False,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.net = build_net(net, channels, len(class_names), (height, width), net_args)
        if init != "default" and (net_args or {}).get("weights"):
            raise ValueError(f"init {init} would overwrite the pretrained weights; leave out one of the two")
        init_weights(self.net, init)
        # A reloaded network gets its weights from the checkpoint: pretrained ones are not to be fetched again.
        net_args = getattr(self.net, "rebuild_args", net_args)
        if channels_last:
            try:
                self.net.to(memory_format=torch.channels_last)
            except RuntimeError as error:  # 3-D kernels for instance
                raise ValueError(f"net {net} cannot be channels_last: {error}") from error
        look_up(LOSSES, loss, "loss")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing is {label_smoothing}; it must be from 0 to 1")
        self.save_hyperparameters()

        self.net_size: tuple[int, int] | None = getattr(self.net, "image_size", None)  # None: it takes any size
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))  # (C, 1, 1)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        weights = None  # or (num_classes,)
        if isinstance(class_weights, list):
            weights = torch.tensor(class_weights, dtype=torch.float32)
        if class_weights == "balanced":
            weights = torch.ones(len(class_names))  # their place; on_fit_start knows them
        if weights is not None and len(weights) != len(class_names):
            raise ValueError(f"class_weights has {len(weights)} numbers for {len(class_names)} classes")
        self.register_buffer("class_weights", weights, persistent=False)
        self.train_metrics = StageMetrics(len(class_names))
        self.val_metrics = StageMetrics(len(class_names))
        self.test_metrics = StageMetrics(len(class_names))
        self.total_steps = math.inf  # optimizer steps of the whole training, known when it starts
        self.decayed = [param.ndim > 1 for param in self.parameters()]  # kept, for FSDP makes all of them flat
        self.configure_optimizers()  # a wrong option is refused now, not after the data has been read

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's is a descriptor, which no method can match
        cls, checkpoint_path: Any, map_location: Any = None, **kwargs: Any
    ) -> "LitClassifier":
        """Load a classifier as Lightning does it (in train mode), but only after the file was checked.

        Args:
            checkpoint_path: A local ``.ckpt`` file.
            map_location: Device to load onto; None for the one it was saved from.
            **kwargs: Arguments of the constructor that are to replace those in the checkpoint.

        Raises:
            CheckpointError: If the file is missing, damaged, or holds more than plain values.
        """
        read_checkpoint(checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, map_location, weights_only=True, **kwargs)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: Pixels 0..255, uint8 (B, C, H, W), of the size and channels of the data set.

        Returns:
            Logits, float (B, num_classes); softmax over dimension 1 gives probabilities.
        """
        mean, std = self.mean, self.std  # (C, 1, 1)
        # In place, in a copy: a new tensor for each step would cost more than the arithmetic.
        x = images.to(mean.dtype, copy=True).div_(255)  # (B, C, H, W) in [0, 1]
        if self.net_size is not None and x.shape[-2:] != self.net_size:
            x = fit_to(x, self.net_size)  # (B, C, *net_size)
        x.sub_(mean).div_(std)
        logits = self.net(x)  # (B, num_classes)
        if not self.training and self.hparams["flip_in_eval"]:
            logits = (logits + self.net(x.flip(3))) / 2
        return logits

    def predict(self, images: Any, top_k: int = 1) -> list[Prediction]:
        """Classify pictures, in eval mode and without gradients whatever mode the classifier is in.

        Args:
            images: One picture or a list of them, of any size: paths, PIL pictures, or uint8 arrays (H, W), (H, W, 3);
                they are prepared exactly as in training. Or uint8 pixels of the data set's shape, (C, H, W) or
                (B, C, H, W). See `lit_nn.predict.predict`.
            top_k: How many of the most probable classes to name.

        Returns:
            A prediction for each picture, in their order; a list also for a single one.
        """
        return predict(self, images, top_k)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one training batch, ()."""
        loss = self._step(batch, self.train_metrics)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it without declaring it
        if every and (self.global_step + 1) % every == 0:
            # at intervals only: self.log costs as much as a small network's step
            self.log("train_loss_step", loss)
            self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count one validation batch."""
        self._step(batch, self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count one test batch."""
        self._step(batch, self.test_metrics)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Probability of each class, (B, num_classes)."""
        images = batch[0]  # (B, C, H, W)
        count = len(images)  # 0 in a distributed run, maybe: see _step
        return self(images if count else images.new_zeros(1, *images.shape[1:]))[:count].softmax(1)

    def _step(self, batch: Batch, metrics: StageMetrics) -> Tensor:
        images, labels = batch  # uint8 (B, C, H, W), int64 (B,) or float (B, num_classes)
        if not len(labels):  # in a distributed evaluation, the last batch of a process; not all layers take it
            return self(images.new_zeros(1, *images.shape[1:])).sum()  # but FSDP needs every process to go forward
        logits = self(images)  # (B, num_classes)
        if self.training:
            smoothing, weights = self.hparams["label_smoothing"], self.class_weights
        else:  # smoothing and weights are means to train: validation and test report the plain loss
            smoothing, weights = 0.0, None
        loss = LOSSES[self.hparams["loss"]](logits, labels, smoothing, weights)  # ()
        metrics.update(loss, logits, labels)
        return loss

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
        self.log(f"{stage}_loss", metrics.loss)  # the objects: Lightning adds them up over processes and resets them
        self.log(f"{stage}_acc", metrics.acc)

    def on_fit_start(self) -> None:
        """Take the class weights from the training data if they are to balance it."""
        if self.hparams["class_weights"] == "balanced":
            self.class_weights = balanced_weights(self.data.class_counts).to(self.device)

    @property
    def data(self) -> ImageDataModule:
        """The data module of the Trainer that this classifier is attached to."""
        return self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it without declaring it

    def on_train_start(self) -> None:
        """Learn how long the training is; asking earlier would lose the place of a restored loader (PL#20550)."""
        self.total_steps = self.trainer.estimated_stepping_batches

    def _clips_scaled_gradients(self) -> bool:
        """Whether gradients are scaled (by 16-mixed) and clipped: a fused optimizer would undo the scale too late."""
        trainer: Any = self._trainer
        return (
            trainer is not None
            and bool(trainer.gradient_clip_val)
            and getattr(trainer.precision_plugin, "scaler", None) is not None
        )

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer over all parameters that are trained, and the schedule of its learning rate."""
        hparams = self.hparams
        options = hparams["optimizer_args"] or {}
        optimizer = build_optimizer(
            hparams["optimizer"],
            self.parameters(),
            hparams["lr"],
            hparams["weight_decay"],
            self.decayed,
            may_fuse=not self._clips_scaled_gradients(),
            **options,
        )
        # A function of the progress holds no number of steps, so a resumed run may be made longer.
        schedule = build_schedule(
            hparams["schedule"],
            optimizer,
            lambda step: step / self.total_steps,
            **(hparams["schedule_args"] or {}),
        )
        return {"optimizer": optimizer, "lr_scheduler": cast(LRSchedulerConfigType, schedule)}
