"""The tutorials' networks, blocks and layers: with the tutorials' names and sizes, and what is special about each."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Said, script
from resume_runs import assert_resumes_exactly
from torch import nn

from lit_nn.errors import UsageError
from lit_nn.nets import build_net, count_parameters
from lit_nn.nets.cifar_cnn import CifarCNN
from lit_nn.nets.lenet import LeNet
from lit_nn.nets.mlp import MLP
from lit_nn.nets.tutorials.fixed_hidden import FixedHidden, halve
from lit_nn.nets.tutorials.layers import MyLinear
from lit_nn.nets.tutorials.nested import FixedHiddenMLP, MySequential

# The tutorials' networks, layer by layer, and the names that they give to those with weights.
DENSE = [nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
TUTORIALS: dict[type[nn.Module], tuple[tuple[int, int, int], list[nn.Module], list[str]]] = {
    MLP: (  # "Build the Neural Network"
        (1, 28, 28),
        [nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)],
        ["linear_relu_stack.0", "linear_relu_stack.2", "linear_relu_stack.4"],
    ),
    LeNet: (  # "Neural Networks"
        (1, 32, 32),
        [nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), *DENSE],
        ["conv1", "conv2", "fc1", "fc2", "fc3"],
    ),
    CifarCNN: (  # "Training a Classifier", in one Sequential
        (3, 32, 32),
        [nn.Conv2d(3, 6, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(6, 16, 5), nn.MaxPool2d(2), nn.ReLU(), *DENSE],
        ["cifar.0", "cifar.3", "cifar.7", "cifar.9", "cifar.11"],
    ),
}


@pytest.mark.parametrize("ours", TUTORIALS)
def test_a_state_dict_of_the_tutorial_gives_the_same_logits(ours: type[nn.Module]) -> None:
    shape, layers, names = TUTORIALS[ours]
    x, weights = torch.randn(4, *shape), [layer.state_dict() for layer in layers if list(layer.parameters())]
    state = {f"{name}.{key}": tensor for name, own in zip(names, weights, strict=True) for key, tensor in own.items()}
    net = ours()
    net.load_state_dict(state, strict=True)
    assert torch.equal(net(x), nn.Sequential(*layers)(x))


def test_my_sequential_is_like_nn_sequential() -> None:
    shared, x = nn.Linear(20, 20), torch.randn(2, 20)
    mine, torchs = (kind(nn.ReLU(), shared, nn.ReLU(), shared) for kind in (MySequential, nn.Sequential))
    assert torch.equal(mine(x), torchs(x))
    assert list(mine.state_dict()) == list(torchs.state_dict())


def test_fixed_hidden_mlp_keeps_its_constant() -> None:
    net, other = FixedHiddenMLP(), FixedHiddenMLP()
    net(x := torch.randn(2, 20)).backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    assert not torch.equal(other.rand_weight, net.rand_weight)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))
    assert net.to(torch.float64).rand_weight.dtype == torch.float64  # moved with the network
    assert not net(torch.full((1, 20), torch.inf, dtype=torch.float64)).isfinite()  # and comes to an end


def test_my_linear_computes_and_learns() -> None:
    layer = MyLinear(2, 3)
    layer.load_state_dict({"weight": torch.tensor([[1.0, 2, 3], [4, 5, 6]]), "bias": torch.tensor([0.0, 1, -20])})
    y = layer(torch.tensor([[1.0, 2.0]]))
    assert y.tolist() == [[9, 13, 0]]
    y.sum().backward()  # of the last one, below zero, nothing comes back
    assert layer.weight.grad is not None
    assert layer.weight.grad.tolist() == [[1, 1, 0], [2, 2, 0]]


def test_rows_are_halved_one_by_one() -> None:
    x = torch.tensor([[0.5, -0.25], [3.0, -5.0], [torch.inf, 0.0], [0.75, 0.25]])
    assert halve(x).tolist() == [[0.5, -0.25], [0.375, -0.625], [torch.inf, 0.0], [0.75, 0.25]]


def test_control_flow_is_exported_as_the_same_function() -> None:
    net = FixedHidden(image_size=(4, 4), hidden=8).eval()
    x = torch.randn(5, 1, 4, 4) * torch.tensor([0.01, 1, 10, 100, 1e6]).view(-1, 1, 1, 1)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.testing.assert_close(program.module()(x), net(x))
    torch.testing.assert_close(program.module()(x[:2]), net(x[:2]))


def test_a_layer_used_twice_is_shown_twice_and_counted_once(capsys: Said) -> None:
    net = build_net("fixed_hidden", 1, 10, (28, 28), {"hidden": 16})
    assert count_parameters(net) == (784 * 16 + 16) + (16 * 16 + 16) + (16 * 10 + 10)
    assert script("inspect_model")(["--net", "fixed_hidden", "--net_args.hidden", "16"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[-1] for line in lines if line[:2] == ["linear", "Linear"]] == ["272", "again"]


def test_lazy_network_has_ordinary_layers_once_built() -> None:
    net = build_net("lazy_cnn", in_channels=3, num_classes=5, image_size=(32, 32))
    assert {type(layer) for layer in net.modules()} >= {nn.Conv2d, nn.BatchNorm2d, nn.Linear}
    mean = net.get_buffer("features.1.running_mean")
    assert not mean.any()  # the forward that gave the shapes has left no trace
    net(torch.randn(2, 3, 32, 32))
    assert mean.any()


@pytest.mark.parametrize("words", ["--net lazy_cnn --ema 0.9", "--net conv3d_cnn --clip_grad 1"])
def test_stopped_and_continued_is_the_same_run(words: str, tmp_path: Path) -> None:
    assert_resumes_exactly(words.split(), tmp_path)


@pytest.mark.parametrize(
    ("name", "side", "net_args", "message"),
    [
        ("lazy_cnn", 2, {}, r"^net lazy_cnn with .* cannot work on images \(1, 2, 2\): .*small"),
        ("conv3d_cnn", 28, {"scales": "abc"}, r"^net conv3d_cnn cannot be built with {'scales': 'abc'}: .*'str'"),
        ("conv3d_cnn", 28, {"scales": 3}, r"conv3d_cnn: scales is 3; it must be 4 to 64"),
        ("conv3d_cnn", 28, {"scales": 10**9}, r"conv3d_cnn: scales is 1000000000; it must be 4 to 64"),
    ],
)
def test_what_does_not_fit_together_is_said(name: str, side: int, net_args: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_net(name, 1, 10, (side, side), net_args)
