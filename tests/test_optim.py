"""Optimizers and schedules against torch's own."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import Refused, rows_of, script
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR

from lit_nn import optim
from lit_nn.nets import build_net
from lit_nn.optim import OPTIMIZERS, SCHEDULES, ManualSGD, build_optimizer, build_schedule

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
def test_every_optimizer_trains(name: str) -> None:
    net = network()
    after = trained(net, build_optimizer(name, net.parameters(), 1e-2, 0.1))
    assert after.isfinite().all()
    assert not torch.isclose(after, nn.utils.parameters_to_vector(network().parameters())).all()


def test_options_reach_the_optimizer() -> None:
    net = network()
    for name, options, given in (
        ("adamw", {}, {"fused": True}),
        ("adam", {"foreach": True}, {"fused": None}),
        ("adam", {"may_fuse": False}, {"fused": None}),
        ("momentum", {}, {"momentum": 0.9}),
        ("nesterov", {"momentum": 0.8}, {"momentum": 0.8, "nesterov": True, "lr": 0.1}),
    ):
        assert given.items() <= build_optimizer(name, net.parameters(), 0.1, **options).param_groups[0].items()
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


def test_schedules_are_torchs() -> None:
    peak = (0.3 * 50 - 1) / 49  # torch counts the peak's place from 1 and the steps from 0
    one_cycle = [optim.one_cycle(n / 49, pct_start=peak) for n in range(50)]
    for ours, theirs in (
        (one_cycle, OneCycleLR(sgd(), 1.0, 50, cycle_momentum=False)),
        ([optim.cosine(n / 40, warmup=0) for n in range(41)], CosineAnnealingLR(sgd(), 40)),
        ([optim.step(n / 40) for n in range(40)], MultiStepLR(sgd(), [20, 30])),
    ):
        assert ours == pytest.approx(rates(theirs, len(ours)), rel=1e-9, abs=1e-9)
    warm = [optim.cosine(progress, warmup=0.2, first=0.1, last=0.5) for progress in (0, 0.1, 0.2, 0.6, 1)]
    assert warm == pytest.approx([0.1, 0.55, 1, 0.75, 0.5])
    assert optim.step(0.5, milestones=[0.4], gamma=0.5) == 0.5


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


# --- without a number of epochs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in BY_PROGRESS if name != "constant"])
def test_a_schedule_without_an_end_to_go_by_is_refused(name: str, tmp_path: Path, refused: Refused) -> None:
    said = refused(train, [*FEW, "--max_epochs", "-1", "--schedule", name, "--run_dir", str(tmp_path / "run")])
    for word in ("--max_epochs N", f"--schedule {name}", "--trainer.max_time 00:", "--schedule constant"):
        assert word in said
    assert not list(tmp_path.rglob("*.ckpt"))


def test_where_the_time_is_the_limit_the_schedule_goes_by_it(tmp_path: Path) -> None:
    limit = ["--max_epochs", "-1", "--trainer.max_time", "00:00:00:03"]
    assert train([*FEW, *limit, "--schedule", "one_cycle", "--lr", "0.1", "--run_dir", str(tmp_path / "run")]) == 0
    lr = [float(row["lr"]) for row in rows_of(tmp_path / "run" / "metrics.csv")]  # at the end of each epoch
    peak = lr.index(max(lr))
    assert lr[peak] > 0.09
    assert lr[: peak + 1] == sorted(lr[: peak + 1])
    assert lr[peak:] == sorted(lr[peak:], reverse=True)
    assert lr[-1] < 0.01  # 0.004 where it began, 4e-7 at the very end
