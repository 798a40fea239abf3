"""Initialisers: the values that they promise, in the layers that they are for."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from lit_nn.init import INITS, InitName, init_weights

STD = {  # of the weights of a layer with 400 inputs and 600 outputs
    "default": 1 / math.sqrt(3 * 400),
    "normal": 0.02,
    "uniform": 0.1 / math.sqrt(3),
    "xavier_uniform": math.sqrt(2 / 1000),
    "xavier_normal": math.sqrt(2 / 1000),
    "kaiming_uniform": math.sqrt(2 / 400),
    "kaiming_normal": math.sqrt(2 / 400),
    "orthogonal": 1 / math.sqrt(600),
    "constant": 0,
    "tutorial_normal": 0.01,
    "tutorial_uniform": math.sqrt((10**3 - 5**3) / 3 / 10),
}


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 5),
        nn.Conv3d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.Sequential(nn.Sequential(nn.Linear(400, 600))),
    )


def linear(net: nn.Sequential) -> tuple[Tensor, Tensor]:
    return net.get_parameter("3.0.0.weight"), net.get_parameter("3.0.0.bias")


@pytest.mark.parametrize("name", INITS)
def test_every_init(name: str, net: nn.Sequential) -> None:
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    init_weights(net, name)
    weight, bias = linear(net)
    assert weight.std().item() == pytest.approx(STD[name], rel=0.01)
    assert weight.mean().item() == pytest.approx(float(name == "constant"), abs=0.01 * STD[name])
    if name in ("default", "tutorial_uniform"):
        assert torch.equal(bias, before["3.0.0.bias"])
    else:
        assert not bias.any()
    assert torch.equal(net.get_parameter("2.weight"), before["2.weight"])  # BatchNorm
    changed = not torch.equal(net.get_parameter("0.weight"), before["0.weight"])
    assert changed == (name != "default")
    assert (not torch.equal(net.get_parameter("1.weight"), before["1.weight"])) == changed
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_tutorial_uniform_leaves_no_small_weight(net: nn.Sequential) -> None:
    init_weights(net, "tutorial_uniform")
    weight, _ = linear(net)
    assert ((weight == 0) | ((weight.abs() >= 5) & (weight.abs() <= 10))).all()
    assert (weight == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_orthogonal(net: nn.Sequential) -> None:
    init_weights(net, "orthogonal")
    weight, _ = linear(net)
    torch.testing.assert_close(weight.T @ weight, torch.eye(400), atol=1e-5, rtol=0)


def test_only_the_chosen_layers(net: nn.Sequential) -> None:
    before = net.get_parameter("0.weight").clone()
    init_weights(net, "constant", (nn.Linear,))
    assert torch.equal(net.get_parameter("0.weight"), before)
    assert (linear(net)[0] == 1).all()


def test_names() -> None:
    assert tuple(INITS) == get_args(InitName)
    with pytest.raises(
        ValueError, match=r"^unknown init 'xavier_norml': did you mean 'xavier_normal'\? Allowed: default, n"
    ):
        init_weights(nn.Linear(1, 1), "xavier_norml")
