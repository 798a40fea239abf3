"""Loss, accuracy and scores of the classes in one stage: exact over all its images, and cheap at every step."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchmetrics import Metric

FLUSH_EVERY = 64  # batches between two updates of the torchmetrics objects


# Of each class so many answers (K,) were right, so many said it, and so many images were given it.
SCORES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "acc": lambda right, said, given: right.sum() / given.sum(),
    "balanced_acc": lambda right, said, given: (right / given)[given > 0].mean(),  # mean recall, where there are images
    "f1": lambda right, said, given: (2 * right / (said + given).clamp(min=1)).mean(),  # of all classes, 0 / 0 is 0
    "micro_f1": lambda right, said, given: 2 * right.sum() / (said + given).sum().clamp(min=1),  # of all answers
}


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
        self.total = sum(losses.float() * sizes, self.total)
        self.count = self.count + sizes.sum()

    def compute(self) -> Tensor:
        """The mean over all images, ()."""
        return self.total / self.count


class ClassScore(Metric):
    """One of `SCORES`, of ``num_classes`` classes (K)."""

    higher_is_better = True
    counts: Tensor

    def __init__(self, num_classes: int, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_state("counts", torch.zeros(3, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, counts: Tensor) -> None:
        """Add how many of each class were right, said and given, (3, K)."""
        self.counts = self.counts + counts

    def compute(self) -> Tensor:
        """The score over all images, ()."""
        return SCORES[self.name](*self.counts)


class StageMetrics(nn.Module):
    """Exact metrics over all images of one stage (train, val or test).

    Updating torchmetrics objects at every step costs more than a small network's whole step. So the results of the
    latest batches are kept as they are and given to the torchmetrics objects together. Nothing is lost by it: each
    image counts once, whatever the sizes of the batches.

    One more torchmetrics object as an attribute is one more metric: it is logged as train_NAME, val_NAME, test_NAME,
    and ``--monitor val_NAME`` goes by it.
    """

    scores: tuple[str, ...] = ("acc", "balanced_acc", "f1")

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.loss = MeanLoss()
        for name in self.scores:
            self.add_module(name, ClassScore(num_classes, name))
        self._recent: list[tuple[Tensor, Tensor, Tensor]] = []  # loss (), logits (B, K), labels (B,)

    @property
    def by_name(self) -> dict[str, Metric]:
        """All metrics."""
        return {name: metric for name, metric in self.named_children() if isinstance(metric, Metric)}

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: mean loss (), logits (B, num_classes), classes int64 (B,) or float (B, num_classes)."""
        self._recent.append((loss.detach(), logits.detach(), labels))
        if len(self._recent) >= FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Give everything counted so far to the torchmetrics objects; FloatingPointError if a loss is not finite."""
        if not self._recent:
            return
        all_losses, all_logits, all_labels = zip(*self._recent, strict=True)
        self._recent.clear()
        losses = torch.stack(all_losses)  # (batches,)
        finite = losses.isfinite()
        if not finite.all():
            first = int((~finite).nonzero()[0])
            raise FloatingPointError(f"The loss is {losses[first]:.3g}, for {len(losses) - first} batches now")
        self.loss.update(losses, torch.tensor([len(batch) for batch in all_labels], device=losses.device))
        self.count(torch.cat(all_logits), torch.cat(all_labels))

    def restart(self) -> None:
        """Forget what was counted, by a training or validation that did not reach its end, for instance."""
        self._recent.clear()
        for metric in self.by_name.values():
            metric.reset()

    def answers(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Classes that are said and given, (N,) each."""
        return logits.argmax(1), labels.argmax(1) if labels.is_floating_point() else labels

    def count(self, logits: Tensor, labels: Tensor) -> None:
        """Give logits (N, K) and labels of images to all metrics but the loss."""
        said, given = self.answers(logits, labels)  # once: of many classes, argmax takes longer than all the rest
        per_class = [found.bincount(minlength=logits.shape[1]) for found in (given[said == given], said, given)]
        self.add(torch.stack(per_class), logits, given)

    def add(self, counts: Tensor, scores: Tensor, given: Tensor) -> None:
        """Give the counts of the classes (3, K) to what they are enough for, logits or probabilities to the others."""
        for name, metric in self.by_name.items():
            if isinstance(metric, ClassScore):
                metric.update(counts)
            elif name != "loss":
                metric.update(scores, given)

    def recent(self) -> dict[str, float]:
        """Mean loss and accuracy over the latest batches of this process, for the progress bar; {} if none."""
        if not self._recent:
            return {}
        losses, logits, labels = zip(*self._recent, strict=True)
        said, given = self.answers(torch.cat(logits), torch.cat(labels))
        return {"loss": torch.stack(losses).mean().item(), "acc": (said == given).float().mean().item()}
