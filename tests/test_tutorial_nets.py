"""The tutorials' networks and blocks: with the tutorials' names and sizes, and with what is special about each."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_nn.inspect import main as inspect_main
from lit_nn.nets import build_net
from lit_nn.nets.cifar_cnn import CifarCNN
from lit_nn.nets.fixed_hidden import FixedHidden, halve
from lit_nn.nets.lenet import LeNet
from lit_nn.nets.mlp import MLP
from lit_nn.nets.nested import FixedHiddenMLP, MySequential, NestMLP, block2, chimera

# The tutorials' own classes, as they write them.


class NeuralNetwork(nn.Module):
    """Of "Build the Neural Network"."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.linear_relu_stack = nn.Sequential(
            nn.Linear(28 * 28, 512),
            nn.ReLU(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Linear(512, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.flatten(x)
        return self.linear_relu_stack(x)


class Net(nn.Module):
    """Of "Neural Networks"."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class Cifar(nn.Module):
    """Of "Training a Classifier", in one Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.cifar = nn.Sequential(
            nn.Conv2d(3, 6, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(6, 16, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(400, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.cifar(x)


@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [(MLP, NeuralNetwork, (1, 28, 28)), (LeNet, Net, (1, 32, 32)), (CifarCNN, Cifar, (3, 32, 32))],
)
def test_tutorial_classes_and_ours_exchange_weights(
    ours: type[nn.Module], theirs: type[nn.Module], shape: tuple[int, ...]
) -> None:
    x = torch.randn(4, *shape)
    for giver, taker in ((ours(), theirs()), (theirs(), ours())):
        taker.load_state_dict(giver.state_dict(), strict=True)
        assert torch.equal(giver(x), taker(x))


# The blocks.


def test_my_sequential_is_like_nn_sequential() -> None:
    shared = nn.Linear(20, 20)
    blocks = [nn.Linear(20, 20), nn.ReLU(), shared, nn.ReLU(), shared]
    mine, torchs = MySequential(*blocks), nn.Sequential(*blocks)
    x = torch.randn(2, 20)
    assert torch.equal(mine(x), torchs(x))
    assert list(mine.state_dict()) == list(torchs.state_dict())


def test_fixed_hidden_mlp_keeps_its_constant(tmp_path: Path) -> None:
    net = FixedHiddenMLP()
    assert [name for name, _ in net.named_parameters()] == ["linear.weight", "linear.bias"]
    x = torch.randn(2, 20)
    y = net(x)
    assert y.shape == ()
    assert y.abs() <= 1
    y.backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    other = FixedHiddenMLP()
    assert not torch.equal(other.rand_weight, net.rand_weight)
    other.load_state_dict(torch.load(tmp_path / "net.pth", weights_only=True))
    assert torch.equal(other.rand_weight, net.rand_weight)
    assert torch.equal(other(x), net(x))
    assert net.to(torch.float64).rand_weight.dtype == torch.float64  # moved with the network
    assert not net(torch.full((1, 20), torch.inf, dtype=torch.float64)).isfinite()  # and comes to an end


def test_chains_of_blocks() -> None:
    assert NestMLP()(torch.randn(2, 20)).shape == (2, 16)
    assert chimera()(torch.randn(2, 20)).shape == ()
    net = block2()
    assert [name for name, _ in net.named_children()] == ["block0", "block1", "block2", "block3"]
    assert net(torch.randn(2, 4)).shape == (2, 4)


def test_rows_are_halved_one_by_one() -> None:
    x = torch.tensor([[0.5, -0.25], [3.0, -5.0], [torch.inf, 0.0], [0.75, 0.25]])
    assert halve(x).tolist() == [[0.5, -0.25], [0.375, -0.625], [torch.inf, 0.0], [0.75, 0.25]]


def test_control_flow_is_exported_as_the_same_function() -> None:
    net = FixedHidden(image_size=(4, 4), hidden=8).eval()
    x = torch.randn(5, 1, 4, 4) * torch.tensor([0.01, 1, 10, 100, 1e6]).view(-1, 1, 1, 1)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.testing.assert_close(program.module()(x), net(x))
    torch.testing.assert_close(program.module()(x[:2]), net(x[:2]))


def test_lazy_network_has_ordinary_layers_once_built() -> None:
    net = build_net("lazy_cnn", in_channels=3, num_classes=5, image_size=(32, 32))
    assert {type(layer) for layer in net.modules()} >= {nn.Conv2d, nn.BatchNorm2d, nn.Linear}
    mean = net.get_buffer("features.1.running_mean")
    assert not mean.any()  # the forward that gave the shapes has left no trace
    net(torch.randn(2, 3, 32, 32))
    assert mean.any()


@pytest.mark.parametrize(
    ("name", "side", "net_args", "message"),
    [
        ("lazy_cnn", 2, {}, r"^net lazy_cnn with .* cannot work on pictures \(1, 2, 2\): .*small"),
        ("conv3d_cnn", 28, {"scales": "abc"}, r"^net conv3d_cnn cannot be built with {'scales': 'abc'}: .*'str'"),
        ("conv3d_cnn", 28, {"scales": 3}, r"^conv3d_cnn: scales is 3; it must be 4 to 64"),
        ("conv3d_cnn", 28, {"scales": 10**9}, r"^conv3d_cnn: scales is 1000000000; it must be 4 to 64"),
    ],
)
def test_what_does_not_fit_together_is_said(name: str, side: int, net_args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_net(name, 1, 10, (side, side), net_args)


def test_a_layer_used_twice_a_buffer_and_control_flow_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_main(["--net", "fixed_hidden"]) == 0
    text = re.sub(" +", " ", capsys.readouterr().out)
    assert " linear Linear (B, 256) (B, 256) 65,792" in text
    assert " linear Linear (B, 256) (B, 256) (used again)" in text
    assert "used 2 times" in text
    assert "buffer: saved, not learned" in text
    assert "DivBackward0" in text  # the halving that this input needed
