"""Every network that is listed keeps the contract of ``lit_nn.nets``."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lit_nn.nets import NETS, build_net, net_names
from lit_nn.nets.cifar_cnn import CifarCNN
from lit_nn.nets.fixed_hidden import FixedHidden, halve
from lit_nn.nets.lenet import LeNet
from lit_nn.nets.mlp import MLP
from lit_nn.nets.nested import FixedHiddenMLP, MySequential, NestMLP, block2, chimera
from lit_nn.nets.torchvision_net import TorchvisionNet, torchvision_names

NAMES = [*NETS, "torchvision/resnet18", "torchvision/squeezenet1_1"]
SHAPES = [(1, 28, 28), (3, 32, 32), (3, 40, 48)]


def build(name: str, shape: tuple[int, int, int]) -> nn.Module:
    """Build a network for pictures (C, H, W) and five classes, always the same."""
    torch.manual_seed(0)
    return build_net(name, shape[0], 5, shape[1:])


def pictures(net: nn.Module, shape: tuple[int, int, int], count: int) -> Tensor:
    """Random pictures (count, C, H, W) of the network's own size."""
    height, width = getattr(net, "image_size", None) or shape[1:]
    return torch.randn(count, shape[0], height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients(name: str, shape: tuple[int, int, int]) -> None:
    net = build(name, shape)
    assert net.training
    assert not any(is_lazy(tensor) for tensor in net.parameters())
    logits = net(pictures(net, shape, 8))
    assert logits.shape == (8, 5)
    assert logits.isfinite().all()
    assert (logits < 0).any()
    F.cross_entropy(logits, torch.arange(8) % 5).backward()
    for parameter_name, parameter in net.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_a_pictures_logits_do_not_depend_on_its_batch(name: str) -> None:
    net = build(name, SHAPES[0]).eval()
    x = pictures(net, SHAPES[0], 7)
    with torch.no_grad():
        together = net(x)
        alone = torch.cat([net(picture[None]) for picture in x])
        none = net(x[:0])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    assert none.shape == (0, 5)  # what a process of a distributed evaluation may get


@pytest.mark.parametrize("name", NAMES)
def test_overfits_eight_pictures(name: str) -> None:
    net = build(name, SHAPES[0])
    x, labels = pictures(net, SHAPES[0], 8), torch.arange(8) % 5
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(150):
        loss = F.cross_entropy(net(x), labels)
        if loss < 0.1:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pytest.fail(f"loss is still {loss:.3f}")


@pytest.mark.parametrize("name", NAMES)
def test_reloaded_state_gives_equal_logits(name: str, tmp_path: Path) -> None:
    net = build(name, SHAPES[0])
    x = pictures(net, SHAPES[0], 4)
    net(x)  # moves BatchNorm's statistics
    torch.save(net.state_dict(), tmp_path / "net.pth")
    torch.manual_seed(5)
    other = build_net(name, 1, 5, (28, 28))
    other.load_state_dict(torch.load(tmp_path / "net.pth", weights_only=True))
    with torch.no_grad():
        assert torch.equal(net.eval()(x), other.eval()(x))


@pytest.mark.parametrize("name", NETS)
def test_every_class_says_what_it_is_and_has_defaults(name: str) -> None:
    assert NETS[name].__doc__
    assert isinstance(NETS[name](), nn.Module)
    assert name in net_names()


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
    net = build("lazy_cnn", SHAPES[1])
    assert {type(layer) for layer in net.modules()} >= {nn.Conv2d, nn.BatchNorm2d, nn.Linear}
    mean = net.get_buffer("features.1.running_mean")
    assert not mean.any()  # the forward that gave the shapes has left no trace
    net(pictures(net, SHAPES[1], 2))
    assert mean.any()


def test_dropout_and_batch_norm_differ_between_train_and_eval() -> None:
    for name in ("lazy_cnn", "conv3d_cnn", "resnet9"):
        net = build(name, SHAPES[0])
        x = pictures(net, SHAPES[0], 4)
        assert not torch.equal(net(x), net.eval()(x))
        assert torch.equal(net(x), net(x))


# torchvision.


def test_hand_placed_weights_are_used_and_not_needed_again(tmp_path: Path) -> None:
    from torchvision.models import squeezenet1_1

    published = squeezenet1_1()
    hub = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path)
    try:
        with pytest.raises(OSError, match=r"squeezenet1_1-b8a52dc0\.pth, or train without weights"):
            TorchvisionNet("squeezenet1_1", 1, 5, weights="DEFAULT")
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        torch.save(published.state_dict(), tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
        net = build_net("torchvision/squeezenet1_1", 1, 5, (28, 28), {"weights": "DEFAULT", "freeze_backbone": True})
        (tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth").unlink()
        assert isinstance(net, TorchvisionNet)
        assert net.image_size == (224, 224)
        assert torch.equal(net.state_dict()["net.features.0.weight"], published.state_dict()["features.0.weight"])
        again = build_net("torchvision/squeezenet1_1", 1, 5, (28, 28), net.rebuild_args)
    finally:
        torch.hub.set_dir(hub)
    assert again.image_size == (224, 224)
    again.load_state_dict(net.state_dict())
    x = torch.randn(1, 1, 224, 224)
    assert torch.equal(net.eval()(x), again.eval()(x))


def test_frozen_backbone_trains_its_head_only() -> None:
    net = build_net("torchvision/resnet18", 1, 5, (28, 28), {"freeze_backbone": True})
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["net.fc.weight", "net.fc.bias"]
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.train()(torch.randn(4, 1, 32, 32)).sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net.get_parameter("net.fc.weight").grad is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision_names())
def test_every_torchvision_network(name: str) -> None:
    net = build_net(f"torchvision/{name}", 1, 7, (28, 28))
    x = pictures(net, SHAPES[0], 2)
    with torch.no_grad():
        assert net(x).shape == (2, 7)  # in training, where some have further outputs
        assert net.eval()(x).isfinite().all()


# What a user gets wrong.


@pytest.mark.parametrize(
    ("name", "net_args", "message"),
    [
        ("lenett", {}, "unknown net 'lenett': did you mean 'lenet'? Allowed: cifar_cnn, "),
        ("resnet18", {}, "unknown net 'resnet18': did you mean 'torchvision/resnet18'? Allowed: cifar_cnn, "),
        ("zzz", {}, "torchvision/<name>"),
        ("torchvision/vgg17", {}, "unknown torchvision network 'vgg17': did you mean 'vgg"),
        (
            "mlp",
            {"hiden": 5},
            "unknown argument of net mlp 'hiden': did you mean 'hidden'? Allowed: image_size, hidden",
        ),
        ("mlp", {"hidden": -5}, "net mlp cannot be built with {'hidden': -5, "),
        ("lenet", {"image_size": [8, 8]}, "unknown argument of net lenet 'image_size'. Allowed: kernel_size"),
        ("torchvision/resnet18", {"weights": "DEFUALT"}, "did you mean 'DEFAULT'? Allowed: IMAGENET1K_V1, DEFAULT"),
    ],
)
def test_mistakes_are_named_in_one_line(name: str, net_args: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match="net") as error:
        build_net(name, 1, 5, (28, 28), net_args)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_torchvision_takes_one_or_three_channels() -> None:
    with pytest.raises(ValueError, match="1 or 3 channels, not 4"):
        build_net("torchvision/resnet18", 4, 5, (28, 28))


def test_image_size_of_the_arguments_wins() -> None:
    assert build_net("mlp", 1, 5, (28, 28), {"image_size": [8, 8]}).image_size == (8, 8)


def test_networks_are_imported_without_torchvision_and_lightning() -> None:
    code = "import sys, lit_nn.nets; print({'torchvision', 'lightning'} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
