"""Optimizers and schedules against torch's own."""

import json
import math
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, MultiStepLR, OneCycleLR

from lit_nn import LitClassifier
from lit_nn.nets import build_net
from lit_nn.optim import (
    OPTIMIZERS,
    SCHEDULES,
    ManualSGD,
    OptimizerName,
    ProgressLR,
    ScheduleName,
    build_optimizer,
    build_schedule,
    cosine,
    one_cycle,
    step,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return build_net("lenet", 1, 10, (32, 32))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> torch.Tensor:
    """Train on random pictures; all weights, one after the other."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 1, 32, 32, generator=generator)
        y = torch.randint(10, (16,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(net.parameters()).detach()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_manual_sgd_is_sgd_bit_for_bit(weight_decay: float) -> None:
    manual, torchs = network(), network()
    ours = train(manual, ManualSGD(manual.parameters(), 0.1, weight_decay), 20)
    theirs = train(torchs, torch.optim.SGD(torchs.parameters(), 0.1, weight_decay=weight_decay), 20)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, nn.utils.parameters_to_vector(network().parameters()))


def test_manual_sgd_calls_the_closure() -> None:
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = ManualSGD([weight], 0.25)

    def closure() -> float:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4
    assert weight.item() == 2 - 0.25 * 4


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_equals_unfused(name: str) -> None:
    net = network()
    optimizer = build_optimizer(name, net.parameters(), 1e-2, 0.1)
    assert bool(optimizer.defaults.get("fused")) == (name not in ("rmsprop", "manual_sgd"))
    options: dict[str, Any] = {"fused": False} if "fused" in optimizer.defaults else {}
    other = network()
    unfused = build_optimizer(name, other.parameters(), 1e-2, 0.1, **options)
    torch.testing.assert_close(train(net, optimizer), train(other, unfused), rtol=1e-4, atol=1e-6)


def test_scaled_gradients_that_are_clipped_are_not_for_a_fused_optimizer() -> None:
    classifier = LitClassifier(["a", "b"], (1, 28, 28), [0.5], [0.5])
    for clip, scaler, fused in [(0.0, object(), True), (1.0, None, True), (1.0, object(), None)]:
        trainer: Any = SimpleNamespace(gradient_clip_val=clip, precision_plugin=SimpleNamespace(scaler=scaler))
        classifier._trainer = trainer  # a GPU's: 16-mixed is bf16-mixed on a CPU
        assert classifier.configure_optimizers()["optimizer"].param_groups[0]["fused"] is fused


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_on_a_gpu(name: str) -> None:
    net = network().cuda()
    optimizer = build_optimizer(name, net.parameters(), 1e-2)
    F.cross_entropy(net(torch.randn(4, 1, 32, 32, device="cuda")), torch.arange(4, device="cuda")).backward()
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def test_options_reach_the_optimizer() -> None:
    net = network()
    assert build_optimizer("momentum", net.parameters(), 0.1).param_groups[0]["momentum"] == 0.9
    nesterov = build_optimizer("nesterov", net.parameters(), 0.1, momentum=0.8).param_groups[0]
    assert (nesterov["momentum"], nesterov["nesterov"], nesterov["lr"]) == (0.8, True, 0.1)
    assert build_optimizer("adam", net.parameters(), 0.1, foreach=True).param_groups[0]["fused"] is None
    train(net, build_optimizer("adamw", net.parameters(), 0.1, betas=[0.8, 0.9]))  # a list, as YAML has it


def test_biases_and_norm_layers_do_not_decay() -> None:
    net = build_net("resnet9", 1, 10, (28, 28), {"width": 4})
    net.requires_grad_(False)
    net.get_submodule("head").requires_grad_(True)
    norm = net.get_submodule("features.0.1").requires_grad_(True)
    groups = build_optimizer("adamw", net.parameters(), 0.1, 0.2).param_groups
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0]
    assert [id(parameter) for parameter in groups[0]["params"]] == [id(net.get_parameter("head.weight"))]
    without = {id(parameter) for parameter in [*norm.parameters(), net.get_parameter("head.bias")]}
    assert {id(parameter) for parameter in groups[1]["params"]} == without


# Schedules.


def torch_rates(scheduler: LRScheduler, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(float(scheduler.get_last_lr()[0]))
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def sgd(lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr)


def test_the_schedule_of_several_groups_is_torchs() -> None:
    def groups() -> torch.optim.Optimizer:
        weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
        parts: list[dict[str, Any]] = [{"params": [weights[0]]}, {"params": [weights[1]], "lr": 0.1}]
        return torch.optim.SGD(parts, 1.0)

    mine, torchs = (schedule(groups(), lambda number: 1 / (1 + number)) for schedule in (ProgressLR, LambdaLR))
    for _ in range(5):
        for schedule in (mine, torchs):
            schedule.optimizer.step()
            schedule.step()
        assert mine.get_last_lr() == torchs.get_last_lr()
        assert [group["lr"] for group in mine.optimizer.param_groups] == torchs.get_last_lr()
    torchs.load_state_dict(mine.state_dict())
    torchs.step()
    mine.step()
    assert mine.get_last_lr() == torchs.get_last_lr() == pytest.approx([1 / 7, 0.1 / 7])


def test_one_cycle_is_torchs() -> None:
    total = 50
    rates = torch_rates(OneCycleLR(sgd(), 1.0, total, cycle_momentum=False), total)
    peak = (0.3 * total - 1) / (total - 1)  # torch counts the peak's place from 1 and the steps from 0
    ours = [one_cycle(number / (total - 1), pct_start=peak) for number in range(total)]
    assert ours == pytest.approx(rates, rel=1e-9)


def test_one_cycle_by_name_is_torchs_but_for_one_step() -> None:
    total = 1000
    rates = torch_rates(OneCycleLR(sgd(), 0.5, total, cycle_momentum=False), total)
    schedule = build_schedule("one_cycle", sgd(0.5), lambda number: number / total)
    assert schedule["interval"] == "step"
    assert torch_rates(schedule["scheduler"], total) == pytest.approx(rates, abs=0.5 * math.pi / 2 / 0.3 / total)


def test_cosine_is_torchs() -> None:
    rates = torch_rates(CosineAnnealingLR(sgd(), 40), 41)
    assert [cosine(number / 40, warmup=0) for number in range(41)] == pytest.approx(rates, abs=1e-9)


def test_cosine_warms_up() -> None:
    assert [cosine(p, warmup=0.2, first=0.1, last=0.5) for p in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx(
        [0.1, 0.55, 1, 0.75, 0.5]
    )


def test_step_is_torchs() -> None:
    rates = torch_rates(MultiStepLR(sgd(), [20, 30]), 40)
    assert [step(number / 40) for number in range(40)] == pytest.approx(rates)
    assert step(0.5, milestones=[0.4], gamma=0.5) == 0.5


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_longer_training_can_resume(name: str) -> None:
    first = build_schedule(name, sgd(), lambda number: number / 10)["scheduler"]
    torch_rates(first, 5)
    state = first.state_dict()
    json.dumps(state)  # plain values
    second = build_schedule(name, sgd(), lambda number: number / 20)["scheduler"]
    second.load_state_dict(state)
    second.optimizer.step()
    second.step()
    assert second.get_last_lr() == [SCHEDULES[name](6 / 20)]


def test_plateau() -> None:
    optimizer = sgd()
    schedule = build_schedule("plateau", optimizer, lambda number: 0.0, patience=0, factor=0.5)
    assert schedule["monitor"] == "val_loss"
    assert schedule["interval"] == "epoch"
    for loss in (1.0, 1.0, 1.0):
        schedule["scheduler"].step(loss)
    assert optimizer.param_groups[0]["lr"] == 0.25


# Names.


def test_names() -> None:
    assert tuple(OPTIMIZERS) == get_args(OptimizerName)
    assert (*SCHEDULES, "plateau") == get_args(ScheduleName)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adm", {}, "unknown optimizer 'adm': did you mean 'adam'? Allowed: sgd, momentum, "),
        ("sgd", {"momentun": 0.9}, "unknown option of sgd 'momentun': did you mean 'momentum'? Allowed: momentum, "),
        ("manual_sgd", {"momentum": 0.9}, "unknown option of manual_sgd 'momentum'. Allowed: none"),
        ("adam", {"betas": 5}, "optimizer adam cannot be built with {"),
    ],
)
def test_optimizer_mistakes(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="op") as error:
        build_optimizer(name, network().parameters(), 0.1, **options)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("onecycle", {}, "unknown schedule 'onecycle': did you mean 'one_cycle'? Allowed: constant, "),
        ("cosine", {"warm_up": 0.1}, "unknown option of cosine 'warm_up': did you mean 'warmup'? Allowed: warmup, "),
    ],
)
def test_schedule_mistakes(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="unknown") as error:
        build_schedule(name, sgd(), lambda number: 0.0, **options)
    assert str(error.value).startswith(message)
