"""Every network that is listed keeps the contract of ``lit_nn.nets``."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchvision import models

from lit_nn.nets import NETS, build_net, count_parameters, net_names
from lit_nn.nets.torchvision_net import TorchvisionNet, torchvision_names

FIRST = next(iter(NETS))  # the first one that a message names
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


@pytest.mark.parametrize("name", NETS)
def test_dropout_and_batch_norm_differ_between_train_and_eval(name: str) -> None:
    net = build(name, SHAPES[0])
    x = pictures(net, SHAPES[0], 4)
    differing = nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd
    has_such = any(isinstance(layer, differing) for layer in net.modules())
    assert torch.equal(net(x), net.eval()(x)) != has_such
    assert torch.equal(net(x), net(x))


def test_resnet9_with_another_activation() -> None:
    nets = {name: build_net("resnet9", 1, 5, (28, 28), {"width": 4, "activation": name}) for name in ("relu", "silu")}
    kinds = {name: [type(layer) for layer in net.modules()] for name, net in nets.items()}
    assert kinds["relu"].count(nn.ReLU) == kinds["silu"].count(nn.SiLU) == 8
    assert nn.ReLU not in kinds["silu"]
    nets["silu"].load_state_dict(nets["relu"].state_dict())
    x = pictures(nets["relu"], SHAPES[0], 8)
    assert not torch.allclose(nets["relu"](x), nets["silu"](x))


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


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_published_weights_with_auxiliary_outputs_lose_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    published = models.get_model(name, init_weights=False).state_dict()  # as published: with auxiliary outputs
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: published)
    net = build_net(f"torchvision/{name}", 1, 5, (28, 28), {"weights": "DEFAULT"})
    assert isinstance(net, TorchvisionNet)
    assert net(torch.randn(2, 1, *net.image_size)).shape == (2, 5)  # in training, where forward would return several
    kept = {name: tensor for name, tensor in published.items() if not name.startswith(("aux", "AuxLogits", "fc."))}
    loaded = net.net.state_dict()
    assert loaded.keys() == {*kept, "fc.weight", "fc.bias"}
    assert loaded["fc.weight"].shape[0] == 5
    first = next(name for name in kept if name.endswith("conv.weight"))
    assert torch.equal(loaded[first], kept[first])
    again = build_net(f"torchvision/{name}", 1, 5, (28, 28), net.rebuild_args)
    again.load_state_dict(net.state_dict())
    x = torch.randn(1, 1, *net.image_size)
    with torch.no_grad():
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
        ("lenett", {}, f"unknown net 'lenett': did you mean 'lenet'? Allowed: {FIRST}, "),
        ("resnet18", {}, f"unknown net 'resnet18': did you mean 'torchvision/resnet18'? Allowed: {FIRST}, "),
        ("zzz", {}, "torchvision/<name>"),
        ("torchvision/vgg17", {}, "unknown torchvision network 'vgg17': did you mean 'vgg"),
        (
            "mlp",
            {"hiden": 5},
            "unknown argument of net mlp 'hiden': did you mean 'hidden'? Allowed: image_size, hidden",
        ),
        ("mlp", {"hidden": -5}, "net mlp cannot be built with {'hidden': -5, "),
        ("lenet", {"kernel_size": 14}, "net lenet with {'kernel_size': 14} cannot work on pictures (1, 32, 32): "),
        ("lenet", {"kernel_size": 0}, "net lenet with {'kernel_size': 0} cannot work on pictures (1, 32, 32): "),
        ("lenet", {"image_size": [8, 8]}, "unknown argument of net lenet 'image_size'. Allowed: kernel_size"),
        ("resnet9", {"activation": "sillu"}, "activation of net resnet9 'sillu': did you mean 'silu'? Allowed: relu, "),
        ("torchvision/resnet18", {"weights": "DEFUALT"}, "did you mean 'DEFAULT'? Allowed: IMAGENET1K_V1, DEFAULT"),
    ],
)
def test_mistakes_are_named_in_one_line(name: str, net_args: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match="net") as error:
        build_net(name, 1, 5, (28, 28), net_args)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_pictures_too_small_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^net resnet9 cannot work on pictures \(1, 4, 4\): .*small"):
        build_net("resnet9", 1, 5, (4, 4))


class Own(nn.Module):
    """A network that somebody is writing."""

    def __init__(self, in_channels: int = 1, num_classes: int = 10, gives: str = "logits") -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.linear = nn.LazyLinear(num_classes) if gives == "lazy" else nn.Linear(in_channels, num_classes)
        self.gives = gives

    def forward(self, x: Tensor) -> Any:
        x = self.norm(x)
        if self.gives == "features":
            return x
        logits = self.linear(x.mean((2, 3)))
        return (logits, x) if self.gives == "both" else logits


def test_parameters_are_counted_once_and_of_a_layer_alone() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3, bias=False))
    net[2].weight = net[0].weight
    assert count_parameters(net) == 12
    assert count_parameters(net, recurse=False) == 0
    assert count_parameters(net[0], recurse=False) == 12


def test_a_new_network_is_tried_out_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETS, "own", Own)
    for gives, given in (("features", r"\(1, 1, 28, 28\)"), ("both", "tuple")):
        with pytest.raises(ValueError, match=rf"^net own .* gives {given} for one picture .* would be \(1, 5\)$"):
            build_net("own", 1, 5, (28, 28), {"gives": gives})
    for gives in ("logits", "lazy"):
        net = build_net("own", 1, 5, (28, 28), {"gives": gives})
        assert all(module.training for module in net.modules())
        assert not net.get_buffer("norm.num_batches_tracked")
        assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    build_net("own", 1, 5, (10**6, 10**6))  # without a picture, which would take terabytes


@pytest.mark.parametrize("name", NETS)
def test_trying_a_network_out_draws_no_random_numbers(name: str) -> None:
    net = build(name, SHAPES[0])
    after = torch.get_rng_state()
    torch.manual_seed(0)
    size = {"image_size": SHAPES[0][1:]} if "image_size" in inspect.signature(NETS[name]).parameters else {}
    alone = NETS[name](in_channels=1, num_classes=5, **size)
    if any(is_lazy(tensor) for tensor in alone.parameters()):
        alone.eval()(pictures(alone, SHAPES[0], 1))  # draws the weights
    assert torch.equal(after, torch.get_rng_state())
    assert all(torch.equal(tensor, alone.state_dict()[key]) for key, tensor in net.state_dict().items())


def test_torchvision_takes_one_or_three_channels() -> None:
    with pytest.raises(ValueError, match="1 or 3 channels, not 4"):
        build_net("torchvision/resnet18", 4, 5, (28, 28))


def test_image_size_of_the_arguments_wins() -> None:
    assert build_net("mlp", 1, 5, (28, 28), {"image_size": [8, 8]}).image_size == (8, 8)


def test_networks_are_imported_without_torchvision_and_lightning() -> None:
    code = "import sys, lit_nn.nets; print({'torchvision', 'lightning'} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
