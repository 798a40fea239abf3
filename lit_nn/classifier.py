"""LitClassifier trains an ImageClassifier: loss, metrics, optimizer, schedule. The only training step there is."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from data_modules.base import ImageDataModule
from lit_nn.checkpoint import load_classifier, load_weights
from lit_nn.errors import UsageError, look_up
from lit_nn.finetune import FrozenBody, classify
from lit_nn.initialise import init_weights
from lit_nn.losses import LOSSES, balanced_weights
from lit_nn.metrics import StageMetrics
from lit_nn.model import ImageClassifier
from lit_nn.multi_label import MultiLabelMetrics, binary_cross_entropy, positive_weights
from lit_nn.nets import LIBRARIES
from lit_nn.nets.pretrained import WEIGHT_FILES
from lit_nn.optim import build_optimizer, build_schedule
from lit_nn.progress import Progress

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
            every class has the same total), or a number above 0 for each. With several labels, the weights of yes.
        optimizer: Which optimizer, one of `lit_nn.optim.OPTIMIZERS`.
        optimizer_args: Further arguments of the optimizer.
        lr: Learning rate; the highest one where the schedule changes it.
        weight_decay: Decay of weight matrices and kernels; biases and normalisation layers are not decayed.
        schedule: How the learning rate changes during the training, one of `lit_nn.optim.SCHEDULES`.
        schedule_args: Further arguments of the schedule.
        monitor: Which result of the validation is to be good: val_acc, val_loss, val_balanced_acc, val_f1; with several
            labels val_map, val_micro_f1 too, but no val_balanced_acc. best.ckpt, early stopping and the schedule
            "plateau" go by it. "default" is val_acc, with several labels val_map.

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
        monitor: str = "default",
        **kwargs: Any,
    ) -> None:
        given, is_file = weights != "none", weights.endswith(WEIGHT_FILES)
        if given and isinstance(net, str) and net.startswith(LIBRARIES):
            net_args = {**(net_args or {}), "weights": weights}
        elif given and not is_file:
            files = " ".join(WEIGHT_FILES)
            raise UsageError(f"weights is '{weights}', net {net} has no published ones; give none, or a file ({files})")
        super().__init__(class_names, image_shape, mean, std, net=net, net_args=net_args, **kwargs)
        count = len(class_names)
        if given and init != "default":
            raise UsageError(f"init {init} would overwrite the pretrained weights; leave out one of the two")
        init_weights(self.net, init)
        self.account = load_weights(self.net, weights) if is_file else ""  # of what was taken
        losses = {"cross_entropy": binary_cross_entropy} if self.multi_label else LOSSES
        self.loss = look_up(losses, loss, "loss of several labels" if self.multi_label else "loss")
        if not 0 <= label_smoothing <= 1:
            raise UsageError(f"label_smoothing is {label_smoothing}; it must be from 0 to 1")
        if backbone_lr is None:
            backbone_lr = 0.1 if given else 1.0
        if backbone_lr < 0 or freeze_epochs < -1:
            raise UsageError(f"backbone_lr {backbone_lr}, freeze_epochs {freeze_epochs}; at least 0 and -1 are allowed")
        if freeze_epochs > 0 and schedule == "plateau":
            raise UsageError("schedule plateau would keep a learning rate of 0; choose another one with freeze_epochs")
        if monitor == "default":
            monitor = "val_map" if self.multi_label else "val_acc"
        if isinstance(class_weights, str):  # ones for balanced ones, which on_fit_start knows
            known = {"none": None, "balanced": torch.ones(count), f"[...] with {count} numbers": None}
            each = look_up(known, class_weights, "class_weights")
        elif len(class_weights) != count or min(class_weights) <= 0:
            raise UsageError(f"class_weights has {len(class_weights)} numbers for {count} classes; all must be above 0")
        else:
            class_weights = [float(weight) for weight in class_weights]
            each = torch.tensor(class_weights)
        self.register_buffer("class_weights", each, persistent=False)
        metrics = MultiLabelMetrics if self.multi_label else StageMetrics
        self.train_metrics, self.eval_metrics = metrics(count), metrics(count)
        look_up({f"val_{name}": metric for name, metric in self.eval_metrics.by_name.items()}, monitor, "monitor")
        # From which the same model is built again: the arguments as they are by now.
        self.save_hyperparameters(ignore=["net", "weights"])
        self.save_hyperparameters(self.arguments)
        self.body, self.progress = FrozenBody(self, freeze_epochs), Progress(schedule)
        # Of each parameter, whether it is decayed, and has the body's learning rate; FSDP makes all of them flat later.
        two_rates = backbone_lr != 1 or freeze_epochs != 0
        params = zip(self.named_parameters(), self.body.in_body, strict=True)
        self.kinds = {name: (param.ndim > 1, two_rates and in_body) for (name, param), in_body in params}
        self._optimizer_and_schedule(may_fuse=False, is_frozen=bool)  # a wrong option is refused now, not later

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's is a descriptor, which no method can match
        cls, checkpoint_path: Any, map_location: Any = None, **kwargs: Any
    ) -> "LitClassifier":
        """Load a classifier as Lightning does it (in train mode), after the checks of `load_classifier`."""
        load_classifier(checkpoint_path, kwargs.get("net"))
        kwargs |= {"weights": "none", "weights_only": True}  # a file that names some weights was not made here
        return super().load_from_checkpoint(checkpoint_path, map_location, **kwargs)

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
            self.log("lr", self.trainer.optimizers[0].param_groups[-1]["lr"])
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count one batch, with the plain loss: label smoothing and class weights are for training."""
        images, labels = batch
        logits = self.logits(images)
        if len(labels):
            self.eval_metrics.update(self.loss(logits, labels), logits, labels)

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Probability of each class, (B, num_classes)."""
        return self.probabilities(self.logits(batch[0]))

    def logits(self, images: Tensor) -> Tensor:
        """Logits of images, or of their features (`data_modules.images.features`), float16 (B, D) or (B, V, D)."""
        if not len(images):  # a process's last batch; FSDP needs all to go forward, and not all layers take no image
            return self.logits(images.new_zeros(1, *images.shape[1:]))[:0]
        return self(images) if images.ndim == 4 else classify(self, images.to(self.mean.dtype))

    def on_validation_epoch_start(self) -> None:
        """Count from the beginning, also after one that did not end."""
        self.eval_metrics.restart()

    on_test_epoch_start = on_validation_epoch_start

    def on_train_epoch_end(self) -> None:
        """Log the epoch's exact training loss and scores."""
        self._log("train", self.train_metrics)

    def on_validation_epoch_end(self) -> None:
        """Log the exact loss and scores of all images."""
        self._log("test" if self.trainer.testing else "val", self.eval_metrics)

    on_test_epoch_end = on_validation_epoch_end

    def _log(self, stage: str, metrics: StageMetrics) -> None:
        metrics.flush()
        for name, metric in metrics.by_name.items():  # the objects: Lightning adds them up over processes, resets them
            self.log(f"{stage}_{name}", metric)

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether a low or a high value of what is monitored is good."""
        return "min" if self.eval_metrics.by_name[self.hparams["monitor"][4:]].higher_is_better is False else "max"

    @property
    def data(self) -> ImageDataModule:
        """The data module of the Trainer that this classifier is attached to."""
        return self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it without declaring it

    def on_fit_start(self) -> None:
        """Count from the beginning; take the class weights from the training data if they are to balance it."""
        self.train_metrics.restart()
        if self.hparams["class_weights"] != "balanced":
            return
        if not isinstance(self.data, ImageDataModule):
            raise UsageError("class_weights balanced needs an ImageDataModule; with a loader of your own give a list")
        counts, images = self.data.class_counts, len(self.data.split("train")[2])
        weights = positive_weights(counts, images) if self.multi_label else balanced_weights(counts)
        self.class_weights = weights.to(self.device)

    def configure_callbacks(self) -> list[L.Callback]:
        """What the Trainer runs beside its own; asked for again where the same Trainer tests."""
        attached = self.trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it without declaring it
        return [] if self.body in attached else [self.body, self.progress]

    def configure_optimizers(self) -> Any:
        """The optimizer over all parameters that are trained, and the schedule of its learning rate."""
        # With mixed precision Lightning clips no gradients of a fused optimizer, which would undo their scale too late.
        clips_scaled = self.trainer.gradient_clip_val and str(self.trainer.precision).endswith("mixed")
        found = self._optimizer_and_schedule(not clips_scaled, partial(self.body.starts_frozen, self.trainer))
        if self.hparams["schedule"] == "plateau":  # which asks after each validation
            found["lr_scheduler"]["frequency"] = self.trainer.check_val_every_n_epoch or 1
        return found

    def _optimizer_and_schedule(self, may_fuse: bool, is_frozen: Callable[[], bool]) -> dict[str, Any]:
        have, schedule, params = self.hparams, self.hparams["schedule"], dict(self.named_parameters())
        kinds = [*self.kinds.values()]  # in the order of the parameters, whose names FSDP changes
        if self.kinds.keys() <= params.keys():  # a subclass may have added some
            kinds = [self.kinds.get(name, (param.ndim > 1, False)) for name, param in params.items()]
        optimizer = build_optimizer(
            have["optimizer"],
            params.values(),
            have["lr"],
            have["weight_decay"],
            kinds,
            have["backbone_lr"],
            may_fuse,
            **(have["optimizer_args"] or {}),
        )
        # A function of the progress holds no number of steps, so a resumed run may be made longer.
        options = {**({"mode": self.mode} if schedule == "plateau" else {}), **(have["schedule_args"] or {})}
        how = build_schedule(schedule, optimizer, self.progress, is_frozen, **options)
        return {"optimizer": optimizer, "lr_scheduler": {**how, "monitor": have["monitor"]}}  # which plateau looks at
