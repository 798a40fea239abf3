"""Optimizers and schedules against torch's own."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import script
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, MultiStepLR, OneCycleLR

from lit_nn.errors import UsageError
from lit_nn.nets import build_net
from lit_nn.optim import (
    OPTIMIZERS,
    SCHEDULES,
    ManualSGD,
    ProgressLR,
    build_optimizer,
    build_schedule,
    cosine,
    one_cycle,
    step,
)

train = script("train")
BY_PROGRESS = [name for name in SCHEDULES if name != "plateau"]
FEW = [
    *("--accelerator", "cpu", "--net", "mlp", "--trainer.limit_train_batches", "4", "--trainer.limit_val_batches", "1"),
    *("--trainer.limit_test_batches", "1", "--trainer.logger", "false"),
]


def network() -> nn.Module:
    torch.manual_seed(0)
    return build_net("lenet", 1, 10, (32, 32))


def trained(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> torch.Tensor:
    """Train on random images; all weights, one after the other."""
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
    ours = trained(manual, ManualSGD(manual.parameters(), 0.1, weight_decay), 20)
    theirs = trained(torchs, torch.optim.SGD(torchs.parameters(), 0.1, weight_decay=weight_decay), 20)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, nn.utils.parameters_to_vector(network().parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_equals_unfused(name: str) -> None:
    net, other = network(), network()
    optimizer = build_optimizer(name, net.parameters(), 1e-2, 0.1)
    options: dict[str, Any] = {"fused": False} if optimizer.defaults.get("fused") else {}
    unfused = build_optimizer(name, other.parameters(), 1e-2, 0.1, **options)
    torch.testing.assert_close(trained(net, optimizer), trained(other, unfused), rtol=1e-4, atol=1e-6)


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
    assert build_optimizer("adamw", net.parameters(), 0.1).param_groups[0]["fused"] is True
    assert build_optimizer("adam", net.parameters(), 0.1, foreach=True).param_groups[0]["fused"] is None
    assert build_optimizer("adam", net.parameters(), 0.1, may_fuse=False).param_groups[0]["fused"] is None
    assert build_optimizer("momentum", net.parameters(), 0.1).param_groups[0]["momentum"] == 0.9
    nesterov = build_optimizer("nesterov", net.parameters(), 0.1, momentum=0.8).param_groups[0]
    assert (nesterov["momentum"], nesterov["nesterov"], nesterov["lr"]) == (0.8, True, 0.1)
    trained(net, build_optimizer("adamw", net.parameters(), 0.1, betas=[0.8, 0.9]))  # a list, as YAML has it


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


# --- schedules --------------------------------------------------------------------------------------------------------


def rates(scheduler: LRScheduler, steps: int) -> list[float]:
    """The learning rate of each step."""
    found = []
    for _ in range(steps):
        found.append(float(scheduler.get_last_lr()[0]))
        scheduler.optimizer.step()
        scheduler.step()
    return found


def sgd(lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr)


def test_the_schedule_of_several_groups_is_torchs() -> None:
    def groups() -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)])

    mine, torchs = (schedule(groups(), lambda number: 1 / (1 + number)) for schedule in (ProgressLR, LambdaLR))
    for _ in range(5):
        assert rates(mine, 1) == rates(torchs, 1)
        assert [group["lr"] for group in mine.optimizer.param_groups] == mine.get_last_lr() == torchs.get_last_lr()


def test_one_cycle_is_torchs() -> None:
    theirs = rates(OneCycleLR(sgd(), 1.0, 50, cycle_momentum=False), 50)
    peak = (0.3 * 50 - 1) / 49  # torch counts the peak's place from 1 and the steps from 0
    assert [one_cycle(number / 49, pct_start=peak) for number in range(50)] == pytest.approx(theirs, rel=1e-9)


def test_cosine_is_torchs_and_warms_up() -> None:
    theirs = rates(CosineAnnealingLR(sgd(), 40), 41)
    assert [cosine(number / 40, warmup=0) for number in range(41)] == pytest.approx(theirs, abs=1e-9)
    warm = [cosine(progress, warmup=0.2, first=0.1, last=0.5) for progress in (0, 0.1, 0.2, 0.6, 1)]
    assert warm == pytest.approx([0.1, 0.55, 1, 0.75, 0.5])


def test_step_is_torchs() -> None:
    assert [step(number / 40) for number in range(40)] == pytest.approx(rates(MultiStepLR(sgd(), [20, 30]), 40))
    assert step(0.5, milestones=[0.4], gamma=0.5) == 0.5


@pytest.mark.parametrize("name", BY_PROGRESS)
def test_a_longer_training_can_resume(name: str) -> None:
    first = build_schedule(name, sgd(), lambda number: number / 10)["scheduler"]
    rates(first, 5)
    state = json.loads(json.dumps(first.state_dict()))  # plain values
    second = build_schedule(name, sgd(), lambda number: number / 20)["scheduler"]
    second.load_state_dict(state)
    rates(second, 1)
    assert second.get_last_lr() == [SCHEDULES[name](6 / 20)]


def test_plateau_waits_for_the_validation() -> None:
    optimizer = sgd()
    schedule = build_schedule("plateau", optimizer, lambda number: 0.0, patience=0, factor=0.5)
    assert schedule["interval"] == "epoch"
    for loss in (1.0, 1.0, 1.0):
        schedule["scheduler"].step(loss)
    assert optimizer.param_groups[0]["lr"] == 0.25


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in BY_PROGRESS if name != "constant"])
def test_a_schedule_without_an_end_to_go_by_is_refused(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train([*FEW, "--max_epochs", "-1", "--schedule", name, "--run_dir", str(tmp_path / "run")]) == 2
    message = capfd.readouterr().err
    for word in ("--max_epochs N", f"--schedule {name}", "--trainer.max_time 00:", "--schedule constant"):
        assert word in message
    assert not list(tmp_path.rglob("*.ckpt"))


def test_where_the_time_is_the_limit_the_schedule_goes_by_it(tmp_path: Path) -> None:
    limit = ["--max_epochs", "-1", "--trainer.max_time", "00:00:00:03"]
    assert train([*FEW, *limit, "--schedule", "one_cycle", "--lr", "0.1", "--run_dir", str(tmp_path / "run")]) == 0
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        lr = [float(row["lr"]) for row in csv.DictReader(file)]  # at the end of each epoch
    peak = lr.index(max(lr))
    assert lr[peak] > 0.09
    assert lr[: peak + 1] == sorted(lr[: peak + 1])
    assert lr[peak:] == sorted(lr[peak:], reverse=True)
    assert lr[-1] < 0.01  # 0.004 where it began, 4e-7 at the very end


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adm", {}, "unknown optimizer 'adm'. Did you mean "),
        ("sgd", {"momentun": 0.9}, "unknown option of sgd 'momentun'. Did you mean momentum? Allowed: momentum, "),
        ("manual_sgd", {"momentum": 0.9}, "unknown option of manual_sgd 'momentum'. Allowed: none"),
        ("adam", {"betas": 5}, "optimizer adam cannot be built with {"),
        ("onecycle", {}, "unknown schedule 'onecycle'. Did you mean one_cycle? Allowed: constant, "),
        ("cosine", {"warm_up": 0.1}, "unknown option of cosine 'warm_up'. Did you mean warmup? Allowed: warmup, "),
        ("one_cycle", {"pct_start": 1.0}, "schedule one_cycle cannot be built with {"),
    ],
)
def test_mistakes_are_named(name: str, options: dict[str, Any], message: str) -> None:
    build: Any = build_schedule if "schedule" in message or name in SCHEDULES else build_optimizer
    given = (sgd(), lambda number: 0.0) if build is build_schedule else (network().parameters(), 0.1)
    with pytest.raises(UsageError) as error:
        build(name, *given, **options)
    assert str(error.value).startswith(message)
