"""Tensors of one network in another: what is taken, what not, and that it says why."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lit_nn import LitClassifier
from lit_nn.checkpoint import CheckpointError
from lit_nn.nets import build_net
from lit_nn.transfer import init_from


def saved(path: Path, net: str, image_shape: tuple[int, int, int] = (1, 28, 28), classes: int = 10) -> LitClassifier:
    """Write a checkpoint with weights that no fresh network has."""
    channels = image_shape[0]
    model = LitClassifier(
        [f"class {i}" for i in range(classes)], image_shape, [0.5] * channels, [0.2] * channels, net=net
    )
    with torch.no_grad():
        for tensor in model.net.state_dict().values():
            tensor += 3
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}, path)
    return model


def test_everything_but_the_head_goes_to_another_number_of_classes(tmp_path: Path) -> None:
    source = saved(tmp_path / "ten.ckpt", "lenet")
    net = build_net("lenet", 1, 3, (28, 28))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    report = init_from(net, tmp_path / "ten.ckpt")
    for name, tensor in net.state_dict().items():
        if name.startswith("fc3."):
            assert torch.equal(tensor, before[name])
            assert name in report.left
        else:
            assert torch.equal(tensor, source.net.state_dict()[name])
            assert report.taken[name] == tuple(tensor.shape)
    lines = str(report).splitlines()
    assert lines[0] == f"8 tensors taken from {tmp_path / 'ten.ckpt'}, 2 not:"
    assert "  taken      conv1.weight (6, 1, 5, 5)" in lines
    assert "  not taken  fc3.weight: (10, 84) in the checkpoint, (3, 84) in this network" in lines


def test_buffers_are_taken_too(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.ckpt", "resnet9")
    net = build_net("resnet9", 1, 10, (28, 28))
    report = init_from(net, tmp_path / "a.ckpt")
    assert not report.left
    assert torch.equal(net.get_buffer("features.0.1.running_mean"), torch.full((32,), 3.0))
    assert {name: tuple(t.shape) for name, t in source.net.state_dict().items()} == report.taken
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(net.eval()(images), source.net.eval()(images))


def test_names_of_either_side_alone_are_said(tmp_path: Path) -> None:
    saved(tmp_path / "lenet.ckpt", "lenet")
    net = nn.ModuleDict({"conv1": nn.Conv2d(1, 6, 5), "extra": nn.Linear(2, 2)})
    report = init_from(net, tmp_path / "lenet.ckpt")
    assert set(report.taken) == {"conv1.weight", "conv1.bias"}
    assert report.left["extra.bias"] == "not in the checkpoint"
    assert report.left["conv2.weight"] == "not in this network"


def test_nothing_that_fits_is_an_error(tmp_path: Path) -> None:
    saved(tmp_path / "mlp.ckpt", "mlp")
    net = build_net("lenet", 1, 10, (28, 28))
    with pytest.raises(CheckpointError, match=r"mlp\.ckpt: not one of its 6 tensors"):
        init_from(net, tmp_path / "mlp.ckpt")
    with pytest.raises(CheckpointError, match="no such file"):
        init_from(net, tmp_path / "missing.ckpt")
