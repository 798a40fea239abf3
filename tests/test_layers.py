"""Custom layers, tied layers and single parameters."""

import pytest
import torch
from torch import nn

from lit_nn.layers import CenteredLayer, MyLinear
from lit_nn.nets import build_net


def test_centered_layer() -> None:
    assert CenteredLayer()(torch.tensor([1.0, 2, 3, 4, 5])).tolist() == [-2, -1, 0, 1, 2]
    assert not list(CenteredLayer().parameters())
    net = nn.Sequential(nn.Linear(8, 128), CenteredLayer())
    assert net(torch.rand(4, 8)).mean().item() == pytest.approx(0, abs=1e-6)


def test_my_linear_computes() -> None:
    layer = MyLinear(2, 3)
    layer.load_state_dict({"weight": torch.tensor([[1.0, 2, 3], [4, 5, 6]]), "bias": torch.tensor([0.0, 1, -20])})
    assert layer(torch.tensor([[1.0, 2.0]])).tolist() == [[9, 13, 0]]


def test_my_linear_learns() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(MyLinear(4, 32), MyLinear(32, 8), nn.Linear(8, 1))
    x = torch.rand(64, 4)
    target = x.sum(1, keepdim=True)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    losses = []
    for _ in range(100):
        loss = nn.functional.mse_loss(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 20


def test_tied_parameters_count_once_and_add_their_gradients() -> None:
    shared = nn.Linear(8, 8)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(8, 1))
    assert sum(p.numel() for p in net.parameters()) == (4 * 8 + 8) + (8 * 8 + 8) + (8 + 1)
    with torch.no_grad():
        shared.weight[0, 0] = 100
    assert torch.equal(net.get_parameter("2.weight"), net.get_parameter("4.weight"))

    first, second = nn.Linear(8, 8), nn.Linear(8, 8)  # the same values, but not tied
    first.load_state_dict(shared.state_dict())
    second.load_state_dict(shared.state_dict())
    untied = nn.Sequential(net[0], nn.ReLU(), first, nn.ReLU(), second, nn.ReLU(), net[6])
    x = torch.rand(3, 4)
    net(x).sum().backward()
    untied(x).sum().backward()
    assert shared.weight.grad is not None
    assert first.weight.grad is not None
    assert second.weight.grad is not None
    torch.testing.assert_close(shared.weight.grad, first.weight.grad + second.weight.grad)


def test_a_layer_used_twice_counts_once() -> None:
    net = build_net("fixed_hidden", 1, 10, (28, 28), {"hidden": 16})
    assert sum(p.numel() for p in net.parameters()) == (784 * 16 + 16) + (16 * 16 + 16) + (16 * 10 + 10)


def test_single_parameters_can_be_replaced() -> None:
    net = build_net("mlp", 1, 10, (28, 28), {"hidden": 8})
    stack = net.get_submodule("linear_relu_stack")
    assert isinstance(stack, nn.Sequential)
    with torch.no_grad():
        net.get_parameter("linear_relu_stack.4.weight").zero_()
        net.get_parameter("linear_relu_stack.4.bias")[:] = torch.arange(10.0)
    assert net(torch.rand(2, 1, 28, 28)).tolist() == [list(range(10))] * 2
    stack[4] = nn.Linear(8, 3)
    assert net(torch.rand(2, 1, 28, 28)).shape == (2, 3)
