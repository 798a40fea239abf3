"""Loss and accuracy of one stage: exact over all its images, and cheap at every step."""

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy


class LossError(FloatingPointError):
    """A loss is infinite or no number."""

    exit_status = 1


class MeanLoss(Metric):
    """Mean over images of a loss that is known as a mean for each batch (with class weights, a weighted mean).

    The batches are added up one after the other, so the sum is the same to the last bit however many of them come in
    one update; a run that is stopped and continued in the middle of an epoch then reports the same loss.
    """

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, sizes: Tensor) -> None:
        """Add batches.

        Args:
            losses: Mean loss of each batch, (batches,).
            sizes: Images in each, int64 (batches,).
        """
        total = self.total  # to set an attribute of a Metric takes longer than to add
        for term in losses.float() * sizes:
            total = total + term
        self.total = total
        self.count = self.count + sizes.sum()

    def compute(self) -> Tensor:
        """The mean over all images, ()."""
        return self.total / self.count


class StageMetrics(nn.Module):
    """Mean loss and accuracy over all images of one stage (train, val or test).

    Updating torchmetrics objects at every step costs more than a small network's whole step. So the results of the
    latest batches are kept as they are and given to the torchmetrics objects together, every ``flush_every`` batches.
    Nothing is lost by it: each image counts once, whatever the sizes of the batches.

    Args:
        num_classes: Number of classes.
        flush_every: Batches between two updates of the torchmetrics objects.
    """

    def __init__(self, num_classes: int, flush_every: int = 64) -> None:
        super().__init__()
        self.loss = MeanLoss()
        self.acc = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.flush_every = flush_every
        self._recent: list[tuple[Tensor, Tensor, Tensor]] = []  # loss (), logits (B, K), labels (B,)

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count one batch.

        Args:
            loss: Mean loss of the batch, ().
            logits: (B, num_classes).
            labels: Classes, int64 (B,), or class probabilities, float (B, num_classes).
        """
        self._recent.append((loss.detach(), logits.detach(), labels))
        if len(self._recent) >= self.flush_every:
            self.flush()

    def flush(self) -> None:
        """Give everything counted so far to the torchmetrics objects.

        Raises:
            LossError: If a loss is not finite.
        """
        if not self._recent:
            return
        all_losses, logits, labels = zip(*self._recent, strict=True)
        losses = torch.stack(all_losses)  # (batches,)
        finite = losses.isfinite()
        if not finite.all():
            first = int((~finite).nonzero()[0])
            raise LossError(f"The loss is {losses[first]:.3g}, for {len(losses) - first} batches now")
        sizes = torch.tensor([len(batch) for batch in labels], device=losses.device)
        self.loss.update(losses, sizes)
        self.acc.update(torch.cat(logits), _as_classes(torch.cat(labels)))
        self._recent.clear()

    def recent(self) -> dict[str, float]:
        """Mean loss and accuracy over the latest batches of this process, for the progress bar; {} if none."""
        if not self._recent:
            return {}
        losses, logits, labels = zip(*self._recent, strict=True)
        right = torch.cat(logits).argmax(1) == _as_classes(torch.cat(labels))  # (B,)
        return {"loss": torch.stack(losses).mean().item(), "acc": right.float().mean().item()}


def _as_classes(labels: Tensor) -> Tensor:
    return labels.argmax(1) if labels.is_floating_point() else labels
