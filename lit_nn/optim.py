"""Optimizers and learning-rate schedules, by name and from plain values."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from lit_nn.errors import UsageError, look_up, options_of

FUSED_DEVICES = ("cpu", "cuda", "mps")


class ManualSGD(Optimizer):
    """The tutorials' own rule, weight = weight - lr * gradient (PyTorch tutorial "Neural Networks").

    Gives the same weights as ``torch.optim.SGD`` bit for bit.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Change every weight by its gradient; returns what ``closure`` returns, which is called first."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    gradient = weight.grad.add(weight, alpha=group["weight_decay"])
                    weight.add_(gradient, alpha=-group["lr"])
        return loss


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": SGD,
    "momentum": partial(SGD, momentum=0.9),
    "nesterov": partial(SGD, momentum=0.9, nesterov=True),
    "adam": Adam,
    "adamw": AdamW,
    "rmsprop": RMSprop,
    "manual_sgd": ManualSGD,
}


def build_optimizer(
    name: str,
    params: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float = 0.0,
    kinds: Iterable[tuple[bool, bool]] | None = None,
    body_lr: float = 1.0,
    may_fuse: bool = True,
    **options: Any,
) -> Optimizer:
    """Build an optimizer by name; the fused implementation, which is faster, where torch has one.

    Weight decay is for weights only: biases and the parameters of normalisation layers, which have at most one
    dimension, are in a group of their own without it.

    Args:
        name: A key of ``OPTIMIZERS``.
        params: Parameters on the device they are trained on; frozen ones are left out.
        lr: Learning rate; with a schedule, the peak.
        weight_decay: Of the optimizer's own kind: added to the gradient, or decoupled from it (adamw).
        kinds: Of each parameter, whether it is decayed, and whether it belongs to the body of the network, whose
            learning rate is another; None for the rule above.
        body_lr: Factor of the body's learning rate.
        may_fuse: Whether the fused implementation will do; not where gradients are clipped that are scaled as well.
        **options: Further arguments of the torch class, for instance ``momentum=0.8`` or ``betas=[0.9, 0.95]``.

    Raises:
        UsageError: If there is no such optimizer or option, or it does not take a value.
    """
    build = look_up(OPTIMIZERS, name, "optimizer")
    taken = options_of(build, options, {"params", "lr", "weight_decay"}, f"option of {name}")
    if weight_decay < 0:
        raise UsageError(f"weight_decay is {weight_decay}; it must be 0 or more")
    params = list(params)
    kinds = [(param.ndim > 1, False) for param in params] if kinds is None else kinds
    known = [one for one in zip(params, kinds, strict=True) if one[0].requires_grad]
    fusible = all(param.device.type in FUSED_DEVICES and param.is_floating_point() for param, _ in known)
    excluded = options.get("foreach") or options.get("differentiable")
    if may_fuse and fusible and "fused" in taken and not excluded:
        options = {"fused": True} | options
    groups: list[dict[str, Any]] = []
    for decayed, in_body in ((True, True), (False, True), (True, False), (False, False)):
        group = [param for param, kind in known if kind == (decayed, in_body)]
        rate = {"lr": lr * body_lr, "in_body": True} if in_body else {}
        groups.append({"params": group, "weight_decay": weight_decay * decayed, **rate})
    try:
        return build([group for group in groups if group["params"]], lr=lr, **options)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UsageError(f"optimizer {name} cannot be built with {dict(lr=lr, **options)}: {error}") from error


# A schedule maps the progress of the training, from 0 at its first step to 1 at its end, to a factor of the peak
# learning rate. It knows no number of steps, so none is saved, and a run can be made longer.


def one_cycle(
    progress: float, pct_start: float = 0.3, div_factor: float = 25.0, final_div_factor: float = 1e4
) -> float:
    """Up to the peak (at ``pct_start``) and down again along half cosines (Smith and Topin 2017), as ``OneCycleLR``."""
    first, last = 1 / div_factor, 1 / (div_factor * final_div_factor)
    if progress < pct_start:
        return _half_cosine(first, 1.0, progress / pct_start)
    return _half_cosine(1.0, last, (progress - pct_start) / (1 - pct_start))


def cosine(progress: float, warmup: float = 0.05, first: float = 0.01, last: float = 0.0) -> float:
    """Linearly up, then down along half a cosine (Loshchilov and Hutter 2016; warm-up of Goyal et al. 2017)."""
    if progress < warmup:
        return first + (1 - first) * progress / warmup
    return _half_cosine(1.0, last, (progress - warmup) / (1 - warmup))


def step(progress: float, milestones: Sequence[float] = (0.5, 0.75), gamma: float = 0.1) -> float:
    """Multiply the learning rate by ``gamma`` at each milestone, as torch's ``MultiStepLR``."""
    return gamma ** sum(progress >= milestone for milestone in milestones)


def _half_cosine(start: float, end: float, part: float) -> float:
    """Go from start to end, part 0 to 1, along half a cosine."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * part))


SCHEDULES: dict[str, Callable[..., Any]] = {
    "constant": lambda progress: 1.0,
    "one_cycle": one_cycle,
    "cosine": cosine,
    "step": step,
    "plateau": ReduceLROnPlateau,  # looks at the validation after every epoch, the others after every step
}


def build_schedule(
    name: str,
    optimizer: Optimizer,
    progress: Callable[[int], float],
    is_frozen: Callable[[], bool] = lambda: False,
    **options: Any,
) -> dict[str, Any]:
    """Build a schedule by name, as the ``lr_scheduler`` dictionary that Lightning takes.

    Args:
        name: A key of ``SCHEDULES``.
        optimizer: Built with the peak learning rate.
        progress: Maps the number of steps taken to the progress of the training, 0 to 1.
        is_frozen: Tells whether the next step is to leave the body of the network as it is.
        **options: Further arguments of the schedule's function, or of ``ReduceLROnPlateau``.

    Raises:
        UsageError: If there is no such schedule or option, or it does not take a value.
    """
    schedule = look_up(SCHEDULES, name, "schedule")
    options_of(schedule, options, {"progress", "optimizer"}, f"option of {name}")
    try:
        if name == "plateau":
            return {"scheduler": schedule(optimizer, **options), "interval": "epoch"}
        for option in {"pct_start", "warmup", "milestones"} & options.keys():
            parts = options[option] if isinstance(options[option], Sequence) else [options[option]]
            if not all(0 <= part <= 1 for part in parts):
                raise ValueError(f"{option} counts in shares of the training, 0 to 1, not in epochs")
        for place in (0.0, 1.0):  # now, not at the end of the training
            schedule(place, **options)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise UsageError(f"schedule {name} cannot be built with {options}: {error}") from error

    def factor(steps: int) -> float:
        return schedule(min(max(progress(steps), 0.0), 1.0), **options)

    def of_body(steps: int) -> float:
        return 0.0 if is_frozen() else factor(steps)

    factors: list[Callable[[int], float]] = [
        of_body if group.get("in_body") else factor for group in optimizer.param_groups
    ]
    return {"scheduler": LambdaLR(optimizer, factors), "interval": "step"}
