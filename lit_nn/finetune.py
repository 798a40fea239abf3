"""Fine-tuning: the layers onto the classes (the head) and all others (the body) learn each in its own way."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lit_nn.errors import UsageError
from lit_nn.model import ImageClassifier

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def head_names(net: nn.Module) -> list[str]:
    """Names of the layers onto the classes; all the others are the body."""
    layers = [name for name, layer in net.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    return getattr(net, "head_names", None) or layers[-1:]


class FrozenBody(L.Callback):
    """Leaves a model's body as it is in the first ``epochs``, -1 for all, its BatchNorm layers' statistics too."""

    def __init__(self, model: ImageClassifier, epochs: int) -> None:
        self.epochs, self.heads = epochs, tuple(f"net.{name}." for name in head_names(model.net))
        # Of each parameter; kept, because FSDP makes all of them flat.
        self.in_body = [not name.startswith(self.heads) for name, _ in model.named_parameters()]
        for param, in_body in zip(model.parameters(), self.in_body, strict=True):
            param.requires_grad_(param.requires_grad and not (in_body and epochs == -1))

    def is_frozen(self, epoch: int) -> bool:
        """Whether only the head learns in an epoch."""
        return self.epochs == -1 or epoch < self.epochs

    def starts_frozen(self, trainer: L.Trainer) -> bool:
        """Whether only the head learns in the next step; the schedule asks."""
        epochs: Any = trainer.fit_loop.epoch_progress.current
        batches = trainer.fit_loop.epoch_loop.batch_progress.current
        # Where a run goes on after an epoch, the batches are still those of that one.
        is_last = epochs.started > epochs.processed and batches.ready >= trainer.num_training_batches
        return self.is_frozen(trainer.current_epoch + is_last)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that goes on inside an epoch does not start that epoch."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Freeze or release the statistics."""
        for name, layer in pl_module.named_modules() if self.epochs else ():
            if isinstance(layer, BATCH_NORMS) and not f"{name}.".startswith(self.heads):
                layer.train(not self.is_frozen(trainer.current_epoch))


def features(model: ImageClassifier, images: Tensor) -> Tensor:
    """What the head, one linear layer or UsageError, is given for each view of uint8 images: float (B, V, D)."""
    seen: list[Tensor] = []
    (head, *others), x = head_names(model.net), model.normalised(images)
    with model.net.get_submodule(head).register_forward_pre_hook(lambda _, given: seen.append(given[0])):
        logits = [model.net(x.flip(view)) for view in model.views]
    found = torch.stack(seen, 1)
    expected = torch.stack(logits, 1).mean(1).float()  # (B, num_classes)
    if others or found.ndim != 3 or not torch.allclose(classify(model, found).float(), expected, 1e-2, 1e-2):
        raise UsageError(f"net {model.net_name} does more after its body than one linear layer; keep no features")
    return found


def classify(model: ImageClassifier, features: Tensor) -> Tensor:
    """Logits of features, (B, D) of one view or (B, V, D) of several."""
    logits = model.net.get_submodule(head_names(model.net)[0])(features)
    return logits.mean(1) if features.ndim == 3 else logits
