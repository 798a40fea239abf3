"""Optimizers and learning-rate schedules, by name and from plain values."""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from lit_nn.choices import look_up

OptimizerName = Literal["sgd", "momentum", "nesterov", "adam", "adamw", "rmsprop", "manual_sgd"]
ScheduleName = Literal["constant", "one_cycle", "cosine", "step", "plateau"]

FUSED_DEVICES = ("cpu", "cuda", "mps")


class ManualSGD(Optimizer):
    """The tutorials' own rule, weight = weight - lr * gradient (PyTorch tutorial "Neural Networks").

    Gives the same weights as ``torch.optim.SGD`` bit for bit.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        weight_decay: share of the weight that is added to its gradient.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Change every weight by its gradient; returns what ``closure`` returns, which is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                gradient = weight.grad
                if group["weight_decay"]:
                    gradient = gradient.add(weight, alpha=group["weight_decay"])
                weight.add_(gradient, alpha=-group["lr"])
        return loss


class ProgressLR(LambdaLR):
    """``LambdaLR`` with one factor for all groups, which is asked for once; torch's own takes longer than some layers.

    Args:
        optimizer: built with the peak learning rate.
        factor: maps the number of steps taken to a factor of it.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float]) -> None:
        super().__init__(optimizer, factor)

    def step(self, epoch: int | None = None) -> None:
        """Set the learning rate of the next step."""
        self.last_epoch += 1
        self._step_count += 1
        factor = self.lr_lambdas[0](self.last_epoch)
        self._last_lr = [base_lr * factor for base_lr in self.base_lrs]
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr


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
    decayed: Iterable[bool] | None = None,
    may_fuse: bool = True,
    **options: Any,
) -> Optimizer:
    """Build an optimizer by name.

    Weight decay is for weights only: biases and the parameters of normalisation layers, which have at most one
    dimension, are in a group of their own without it. The fused implementation is used where torch has one, for it is
    the faster one on CPU and GPU; the option ``fused=False`` turns it off.

    Args:
        name: a key of ``OPTIMIZERS``.
        params: parameters on the device they are trained on; frozen ones are left out.
        lr: learning rate; with a schedule, the peak.
        weight_decay: of the optimizer's own kind: added to the gradient, or decoupled from it (adamw).
        decayed: for each parameter, whether it is decayed; None for the rule above.
        may_fuse: whether the fused implementation will do; not where gradients are clipped that are scaled as well.
        **options: further arguments of the torch class, for instance ``momentum=0.8`` or ``betas=[0.9, 0.95]``.

    Raises:
        ValueError: no such optimizer or option, or a value that it does not take.
    """
    build = look_up(OPTIMIZERS, name, "optimizer")
    taken = inspect.signature(build).parameters
    allowed = [option for option in taken if option not in {"params", "lr", "weight_decay"}]
    for option in options:
        look_up(dict.fromkeys(allowed), option, f"option of {name}")
    if weight_decay < 0:
        raise ValueError(f"weight_decay is {weight_decay}; it must be 0 or more")
    params = list(params)
    decayed = [param.ndim > 1 for param in params] if decayed is None else decayed
    pairs = [pair for pair in zip(params, decayed, strict=True) if pair[0].requires_grad]
    trained = [param for param, _ in pairs]
    fusible = all(param.device.type in FUSED_DEVICES and param.is_floating_point() for param in trained)
    excluded = options.get("foreach") or options.get("differentiable")
    if may_fuse and fusible and "fused" in taken and not excluded:
        options = {"fused": True} | options
    groups = [
        {"params": [param for param, is_decayed in pairs if is_decayed], "weight_decay": weight_decay},
        {"params": [param for param, is_decayed in pairs if not is_decayed], "weight_decay": 0.0},
    ]
    try:
        return build([group for group in groups if group["params"]], lr=lr, **options)
    except (TypeError, RuntimeError, IndexError) as error:
        raise ValueError(f"optimizer {name} cannot be built with {options}: {error}") from error


def constant(progress: float) -> float:
    """Keep the learning rate: always 1.

    This function, ``one_cycle``, ``cosine`` and ``step`` map the progress of training, from 0 at its first step to 1 at
    its end, to a factor of the peak learning rate. They know no numbers of steps, so no such number is saved.
    """
    return 1.0


def one_cycle(
    progress: float, pct_start: float = 0.3, div_factor: float = 25.0, final_div_factor: float = 1e4
) -> float:
    """Up to the peak and down again along half cosines (Smith and Topin 2017), as torch's ``OneCycleLR``.

    Args:
        progress: of the training, 0 to 1.
        pct_start: progress at the peak.
        div_factor: peak / first learning rate.
        final_div_factor: first / last learning rate.
    """
    first, last = 1 / div_factor, 1 / (div_factor * final_div_factor)
    if progress < pct_start:
        return _half_cosine(first, 1.0, progress / pct_start)
    return _half_cosine(1.0, last, (progress - pct_start) / (1 - pct_start))


def cosine(progress: float, warmup: float = 0.05, first: float = 0.01, last: float = 0.0) -> float:
    """Linearly up, then down along half a cosine (Loshchilov and Hutter 2016; warm-up of Goyal et al. 2017).

    Args:
        progress: of the training, 0 to 1.
        warmup: progress at the peak.
        first: factor at the beginning of the warm-up.
        last: factor at the end of the training.
    """
    if progress < warmup:
        return first + (1 - first) * progress / warmup
    return _half_cosine(1.0, last, (progress - warmup) / (1 - warmup))


def step(progress: float, milestones: Sequence[float] = (0.5, 0.75), gamma: float = 0.1) -> float:
    """Multiply the learning rate by ``gamma`` at each milestone, as torch's ``MultiStepLR``.

    Args:
        progress: of the training, 0 to 1.
        milestones: progress at each change.
        gamma: factor of each change.
    """
    return gamma ** sum(progress >= milestone for milestone in milestones)


SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "one_cycle": one_cycle,
    "cosine": cosine,
    "step": step,
}


def build_schedule(name: str, optimizer: Optimizer, progress: Callable[[int], float], **options: Any) -> dict[str, Any]:
    """Build a schedule by name, as the ``lr_scheduler`` dictionary that Lightning takes.

    Args:
        name: a key of ``SCHEDULES``, which change the learning rate after every step; or "plateau", torch's
            ``ReduceLROnPlateau``, which looks at ``val_loss`` after every epoch.
        optimizer: built with the peak learning rate.
        progress: maps the number of steps taken to the progress of the training, 0 to 1.
        **options: further arguments of the schedule's function, or of ``ReduceLROnPlateau``.

    Raises:
        ValueError: no such schedule or option.
    """
    schedules: dict[str, Callable[..., Any]] = {**SCHEDULES, "plateau": ReduceLROnPlateau}
    build = look_up(schedules, name, "schedule")
    allowed = [option for option in inspect.signature(build).parameters if option not in {"progress", "optimizer"}]
    for option in options:
        look_up(dict.fromkeys(allowed), option, f"option of {name}")
    if name == "plateau":
        return {"scheduler": ReduceLROnPlateau(optimizer, **options), "monitor": "val_loss", "interval": "epoch"}

    try:
        for place in (0.0, 1.0):
            SCHEDULES[name](place, **options)
    except (ArithmeticError, TypeError) as error:  # now, not at the end of the training
        raise ValueError(f"schedule {name} cannot be built with {options}: {error}") from error

    def factor(steps: int) -> float:
        return SCHEDULES[name](min(max(progress(steps), 0.0), 1.0), **options)

    return {"scheduler": ProgressLR(optimizer, factor), "interval": "step"}


def _half_cosine(start: float, end: float, part: float) -> float:
    """Go from start to end, part 0 to 1, along half a cosine."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * part))
