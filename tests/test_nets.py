"""Every network that is listed keeps the contract of ``lit_nn.nets``, whoever adds one or takes some away."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Patch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchvision import models

from lit_nn.errors import UsageError
from lit_nn.model import ImageClassifier
from lit_nn.nets import NETS, build_net
from lit_nn.nets.pretrained import PretrainedNet, names_of

NAMES = [*NETS, "torchvision/resnet18", "torchvision/squeezenet1_1"]
SHAPES = [(1, 28, 28), (3, 32, 32), (3, 40, 48)]


def build(name: str, shape: tuple[int, int, int] = SHAPES[0]) -> ImageClassifier:
    """A classifier with five classes for images (C, H, W), always the same."""
    torch.manual_seed(0)
    channels = shape[0]
    return ImageClassifier(list("abcde"), shape, [0.5] * channels, [0.25] * channels, net=name)


def images(count: int, shape: tuple[int, int, int] = SHAPES[0]) -> Tensor:
    """Random images, uint8 (count, C, H, W)."""
    return torch.randint(256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_images_of_any_size_give_logits_and_gradients(name: str, shape: tuple[int, int, int]) -> None:
    assert name not in NETS or isinstance(NETS[name](), nn.Module)  # all arguments have defaults
    model = build(name, shape)
    assert not any(is_lazy(tensor) for tensor in model.parameters())
    logits = model(images(8, shape))
    assert logits.shape == (8, 5)
    assert logits.isfinite().all()
    assert (logits < 0).any()
    F.cross_entropy(logits, torch.arange(8) % 5).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_an_images_logits_do_not_depend_on_its_batch(name: str) -> None:
    model, pixels = build(name).eval(), images(7)
    with torch.no_grad():
        together = model(pixels)
        assert torch.equal(model(pixels), together)  # nothing is random
        alone = torch.cat([model(image[None]) for image in pixels])
        none = model(pixels[:0])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    assert none.shape == (0, 5)  # what a process of a distributed evaluation may get


@pytest.mark.parametrize("name", NAMES)
def test_learns_eight_images_by_heart(name: str) -> None:
    pixels, labels, losses = images(8), torch.arange(8) % 5, list[float]()
    for lr in (1e-3, 1e-2):  # one of them suits the network
        model = build(name)
        optimizer = torch.optim.Adam(model.parameters(), lr)
        for _ in range(150):
            loss = F.cross_entropy(model(pixels), labels)
            losses.append(loss.item())
            if losses[-1] < losses[0] / 5:
                return
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    pytest.fail(f"the loss is {min(losses):.3f}, from {losses[0]:.3f}")


# --- torchvision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["squeezenet1_1", "googlenet", "inception_v3"])  # two have auxiliary outputs, at first
def test_hand_placed_weights_are_used_and_not_needed_again(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    published = models.get_model(name, **({} if name == "squeezenet1_1" else {"init_weights": False})).state_dict()
    file = tmp_path / "hub" / "checkpoints" / models.get_model_weights(name).DEFAULT.url.rpartition("/")[2]
    with pytest.raises(OSError, match=rf"{file.name}, or give --weights FILE, or --weights none"):
        build_net(f"torchvision/{name}", 1, 5, (28, 28), {"weights": "default"})
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(published, file)
    net = build_net(f"torchvision/{name}", 1, 5, (28, 28), {"weights": "default"})
    file.unlink()
    assert isinstance(net, PretrainedNet)
    loaded, head = net.net.state_dict(), ("aux", "AuxLogits", "fc.", "classifier.1.")
    kept = {key: tensor for key, tensor in published.items() if not key.startswith(head)}
    assert kept.keys() == {key for key in loaded if not key.startswith(("fc.", "classifier.1."))}
    assert all(torch.equal(loaded[key], tensor) for key, tensor in kept.items())
    x = torch.randn(2, 1, *net.image_size)
    assert net(x).shape == (2, 5)  # in training, where some have further outputs
    again = build_net(f"torchvision/{name}", 1, 5, (28, 28), net.rebuild_args)
    assert again.image_size == net.image_size
    again.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(net.eval()(x), again.eval()(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", names_of("torchvision"))
def test_every_torchvision_network(name: str) -> None:
    model = build(f"torchvision/{name}")
    with torch.no_grad():
        assert model(images(2)).shape == (2, 5)  # in training, where some have further outputs
        assert model.eval()(images(2)).isfinite().all()


# --- what a user gets wrong -------------------------------------------------------------------------------------------


class Own(nn.Module):
    """A network that somebody is writing."""

    def __init__(self, in_channels: int = 1, num_classes: int = 10, gives: str = "logits") -> None:
        super().__init__()
        self.norm, self.linear, self.gives = nn.BatchNorm2d(in_channels), nn.LazyLinear(num_classes), gives

    def forward(self, x: Tensor) -> Any:
        features = self.norm(x).mean((2, 3))
        logits = self.linear(features)
        return {"logits": logits, "features": features, "both": (logits, features)}[self.gives]


def test_a_new_network_is_tried_out_without_a_trace(monkeypatch: Patch) -> None:
    monkeypatch.setitem(NETS, "own", Own)
    for gives, given in (("features", r"\(1, 1\)"), ("both", "tuple")):
        with pytest.raises(UsageError, match=rf"^net own .* gives {given} for one image .* would be \(1, 5\)$"):
            build_net("own", 1, 5, (28, 28), {"gives": gives})
    net = build_net("own", 1, 5, (28, 28))
    assert all(module.training for module in net.modules())
    assert not net.get_buffer("norm.num_batches_tracked")
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


# --- a project that somebody has changed ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_tests_stay_green_without_the_tutorials(tmp_path: Path) -> None:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, capture_output=True, encoding="utf-8", check=True, cwd=ROOT).stdout.split("\0")
    for name in (name for name in names if (ROOT / name).is_file()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for folder in ("lit_nn/nets/tutorials", "tests/tutorials"):
        shutil.rmtree(tmp_path / folder)
    (tmp_path / "docs" / "tour.md").unlink()
    parts = ("nets", "losses", "initialise", "optim", "checkpoint", "imports", "docs", "readme", "inspect", "tour")
    tests = [str(path) for part in parts for path in sorted((tmp_path / "tests").rglob(f"test_{part}*.py"))]

    def python(*words: str) -> str:
        line, environment = [sys.executable, *words], {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr
        return done.stdout

    assert python("-c", "import lit_nn; print(lit_nn.__file__)").strip() == str(tmp_path / "lit_nn" / "__init__.py")
    python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests)
