"""Loss, accuracy and scores of the classes in one stage: exact over all its images, and cheap at every step."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

FLUSH_EVERY = 64  # batches between two updates of the torchmetrics objects


class LossError(FloatingPointError):
    """A loss is infinite or no number."""

    exit_status = 1


class MeanLoss(Metric):
    """Mean over images of a loss that is known as a mean for each batch (with class weights, a weighted mean).

    The batches are added up one after the other, so the sum is the same to the last bit however many of them come in
    one update; a run that is stopped and continued in the middle of an epoch then reports the same loss.
    """

    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, sizes: Tensor) -> None:
        """Add the mean loss of batches, (batches,), and the number of images in each, int64 (batches,)."""
        total = self.total  # to set an attribute of a Metric takes longer than to add
        for term in losses.float() * sizes:
            total = total + term
        self.total = total
        self.count = self.count + sizes.sum()

    def compute(self) -> Tensor:
        """The mean over all images, ()."""
        return self.total / self.count


def balanced_accuracy(right: Tensor, said: Tensor, given: Tensor) -> Tensor:
    """Mean recall of the classes that have images, (); of each class so many (K,) were right, said and given."""
    return (right / given)[given > 0].mean()


def macro_f1(right: Tensor, said: Tensor, given: Tensor) -> Tensor:
    """Mean F1 of all classes, (); 0 for one that was neither said nor given, as in the report."""
    return (2 * right / (said + given).clamp(min=1)).mean()


class ClassScore(Metric):
    """A score that follows from how many images of each class there were, and how many answers.

    Args:
        num_classes: K.
        score: Makes it of three counts (K,), as `macro_f1`.
    """

    higher_is_better = True
    counts: Tensor

    def __init__(self, num_classes: int, score: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.score = score
        self.add_state("counts", torch.zeros(3, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, counts: Tensor) -> None:
        """Add how many images of each class were named right, how many were given its name, how many it has, (3, K)."""
        self.counts = self.counts + counts

    def compute(self) -> Tensor:
        """The score over all images, ()."""
        return self.score(*self.counts)


class StageMetrics(nn.Module):
    """Exact metrics over all images of one stage (train, val or test).

    Updating torchmetrics objects at every step costs more than a small network's whole step. So the results of the
    latest batches are kept as they are and given to the torchmetrics objects together. Nothing is lost by it: each
    image counts once, whatever the sizes of the batches.

    One more torchmetrics object as an attribute is one more metric: it is logged as train_NAME, val_NAME, test_NAME,
    and ``--monitor val_NAME`` goes by it.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.loss = MeanLoss()
        self.acc: Metric = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.balanced_acc = ClassScore(num_classes, balanced_accuracy)
        self.f1 = ClassScore(num_classes, macro_f1)
        self._recent: list[tuple[Tensor, Tensor, Tensor]] = []  # loss (), logits (B, K), labels (B,)

    @property
    def by_name(self) -> dict[str, Metric]:
        """All metrics."""
        return {name: metric for name, metric in self.named_children() if isinstance(metric, Metric)}

    @property
    def scores(self) -> list[Metric]:
        """All but the loss."""
        return [metric for metric in self.by_name.values() if metric is not self.loss]

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: mean loss (), logits (B, num_classes), classes int64 (B,) or float (B, num_classes)."""
        self._recent.append((loss.detach(), logits.detach(), labels))
        if len(self._recent) >= FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Give everything counted so far to the torchmetrics objects; raises `LossError` if a loss is not finite."""
        if not self._recent:
            return
        all_losses, all_logits, all_labels = zip(*self._recent, strict=True)
        losses = torch.stack(all_losses)  # (batches,)
        finite = losses.isfinite()
        if not finite.all():
            first = int((~finite).nonzero()[0])
            raise LossError(f"The loss is {losses[first]:.3g}, for {len(losses) - first} batches now")
        self.loss.update(losses, torch.tensor([len(batch) for batch in all_labels], device=losses.device))
        self.count(torch.cat(all_logits), torch.cat(all_labels))
        self._recent.clear()

    def count(self, logits: Tensor, labels: Tensor) -> None:
        """Give logits (N, K) and labels of images to all metrics but the loss."""
        labels = _as_classes(labels)  # (N,)
        answers = logits.argmax(1)  # (N,), once: of many classes it takes longer than all the rest
        per_class = (labels[answers == labels], answers, labels)
        counts = torch.stack([classes.bincount(minlength=logits.shape[1]) for classes in per_class])  # (3, K)
        for metric in self.scores:
            if isinstance(metric, ClassScore):
                metric.update(counts)
            else:
                metric.update(answers if metric is self.acc else logits, labels)

    def right(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Which answers are right, bool (N,)."""
        return logits.argmax(1) == _as_classes(labels)

    def recent(self) -> dict[str, float]:
        """Mean loss and accuracy over the latest batches of this process, for the progress bar; {} if none."""
        if not self._recent:
            return {}
        losses, logits, labels = zip(*self._recent, strict=True)
        right = self.right(torch.cat(logits), torch.cat(labels)).float().mean()
        return {"loss": torch.stack(losses).mean().item(), "acc": right.item()}


def _as_classes(labels: Tensor) -> Tensor:
    return labels.argmax(1) if labels.is_floating_point() else labels
