"""Initialisers: the values that they promise, in the layers that they are for."""

import math

import pytest
import torch
from torch import nn

from lit_nn.initialise import BIAS_STAYS, INITS, init_weights

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


@pytest.mark.parametrize("name", INITS)
def test_every_init(name: str) -> None:
    torch.manual_seed(0)
    linear, convs = nn.Linear(400, 600), (nn.Conv2d(1, 8, 5), nn.Conv3d(1, 8, 3, bias=False))
    net = nn.Sequential(*convs, nn.BatchNorm2d(8), nn.Sequential(nn.Sequential(linear)))
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    init_weights(net, name)
    if name in STD:  # one that somebody adds need not be in the table
        assert linear.weight.std().item() == pytest.approx(STD[name], rel=0.01)
        assert linear.weight.mean().item() == pytest.approx(float(name == "constant"), abs=0.01 * STD[name])
    assert torch.equal(linear.bias, before["3.0.0.bias"] if name in BIAS_STAYS else torch.zeros(600))
    kept = [torch.equal(net.get_parameter(f"{layer}.weight"), before[f"{layer}.weight"]) for layer in "012"]
    assert kept == [name == "default"] * 2 + [True]  # both convolutions, and the norm
    assert all(parameter.requires_grad for parameter in net.parameters())
    weight = linear.weight.detach()
    if name == "tutorial_uniform":  # no small ones
        assert ((weight == 0) | ((weight.abs() >= 5) & (weight.abs() <= 10))).all()
        assert (weight == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    if name == "orthogonal":
        torch.testing.assert_close(weight.T @ weight, torch.eye(400), atol=1e-5, rtol=0)
