"""What inspect_model says about networks and checkpoints, with numbers that can be checked by hand."""

import re
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
import torch.nn.functional as F
from conftest import Command
from torch import Tensor, nn
from torchvision import models

from lit_nn import LitClassifier
from lit_nn.autograd_graph import backward_graph
from lit_nn.inspect import inspect_net, layers, main
from lit_nn.nets import NETS, build_net


def shown(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command prints, with runs of spaces as one."""
    assert main(words) == 0
    return re.sub(" +", " ", capsys.readouterr().out)


def test_list_names_every_network_with_arguments_and_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(["--list"], capsys)
    for name in NETS:
        assert f"\n {name} " in text
    for name in models.list_models(module=models):
        assert f" torchvision/{name} weights=None freeze_backbone=False" in text.replace("image_size=DATA ", "")
    assert " lenet kernel_size=5 61,706" in text
    assert " mlp image_size=DATA hidden=512 669,706" in text  # 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10
    assert "138,357,544" in text  # vgg16, from the paper's 138 million


def test_list_says_which_networks_cannot_work_on_such_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--image_shape", "1,4,4"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(" resnet9 "))
    assert row.endswith(" does not fit ")


def test_lenet_from_a_process_of_its_own(command: Command, tmp_path: Path) -> None:
    done = command("scripts/inspect_model.py", "--net", "lenet", "--graph", "lenet.png")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    text = re.sub(" +", " ", done.stdout)
    assert "(fc3): Linear(in_features=84, out_features=10, bias=True)" in text  # the tree
    assert "61,706 parameters, 61,706 of them trained" in text
    for line in (
        "conv1 Conv2d (B, 1, 32, 32) (B, 6, 28, 28) 156",
        "max_pool2d() function (B, 6, 28, 28) (B, 6, 14, 14)",
        "conv2 Conv2d (B, 6, 14, 14) (B, 16, 10, 10) 2,416",
        "flatten() function (B, 16, 5, 5) (B, 400)",
        "fc1 Linear (B, 400) (B, 120) 48,120",
        "fc3 Linear (B, 84) (B, 10) 850",
        "conv1.weight (6, 1, 5, 5) 150",
        "1 NllLossBackward0 2",
        "3 AddmmBackward0 4 fc3.bias, fc3.weight",
        "14 ConvolutionBackward0 conv1.weight, conv1.bias",
    ):
        assert f" {line}" in text
    picture = matplotlib.image.imread(tmp_path / "lenet.png")
    assert picture.shape[0] > 400
    assert picture.shape[1] > 400
    assert 0.5 < (picture[..., :3] == 1).all(-1).mean() < 0.98  # paper, and something on it


@pytest.mark.parametrize("net", NETS)
def test_every_network_can_be_looked_into(net: str) -> None:
    network: Any = build_net(net, 1, 10, (28, 28))
    images = torch.zeros(2, 1, *(network.image_size or (28, 28)))
    calls = layers(network, images)
    assert calls[0].given == (2, 10)
    called = {call.name for call in calls}
    assert {name for name, module in network.named_modules() if list(module.parameters(recurse=False))} <= called
    assert sum(call.parameters for call in calls if not call.again) == sum(p.numel() for p in network.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    operations = backward_graph(network(images).sum(), network)
    assert {name for op in operations for name in op.parameters} == {name for name, _ in network.named_parameters()}
    assert all(op.number < following.number for op in operations for following in op.next)


@pytest.mark.parametrize("ending", ["svg", "pdf", "png", "jpg"])
def test_graphs_of_larger_networks_are_drawn(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / f"graph.{ending}"
    text = shown(
        ["--model.net=resnet9", "--net_args.width", "4", "--image_shape", "3,32,32", "--graph", str(path)], capsys
    )
    assert str(path) in text
    assert path.stat().st_size > 10_000
    if ending == "svg":
        drawing = path.read_text()
        assert drawing.lstrip().startswith("<?xml")
        assert "resnet9" in drawing


def test_own_arguments_change_the_network(capsys: pytest.CaptureFixture[str]) -> None:
    flat = shown(["--net", "mlp", "--net_args.hidden", "16", "--image_shape", "3,8,8", "--num_classes", "5"], capsys)
    dotted = shown(["--model.net=mlp", "--model.net_args.hidden=16", "--image_shape=3,8,8", "--num_classes=5"], capsys)
    assert flat == dotted
    assert "3,445 parameters" in flat  # 192 * 16 + 16 + 16 * 16 + 16 + 16 * 5 + 5


class Tied(nn.Module):
    """Two layers with one weight."""

    image_size = (2, 2)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x.flatten(1))))


def test_a_tied_parameter_counts_once_and_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    inspect_net(Tied(), (2, 2), 1, "cross_entropy")
    text = re.sub(" +", " ", capsys.readouterr().out)
    assert "24 parameters, 24 of them trained" in text
    assert " second.weight (4, 4) - " in text
    assert "shared: the same tensor as first.weight" in text
    assert "used 2 times" in text


def test_a_frozen_backbone_shows(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--net", "torchvision/squeezenet1_1", "--net_args.freeze_backbone", "true", "--image_shape", "3,32,32"]
    text = shown(words, capsys)
    assert "727,626 parameters, 5,130 of them trained" in text  # 512 * 10 + 10 in the last convolution
    assert "frozen" in text


def test_a_checkpoint_tells_what_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = LitClassifier(
        ["cat", "dog"], (3, 8, 8), [0.5] * 3, [0.2] * 3, net="mlp", net_args={"hidden": 16}, loss="mse"
    )
    path = tmp_path / "best.ckpt"
    torch.save(
        {
            "state_dict": model.state_dict(),
            "hyper_parameters": dict(model.hparams),
            "epoch": 3,
            "global_step": 40,
            "callbacks": {
                "Checkpoints": {"best_score": 0.75, "best_epoch": 1, "seconds": 2.0},
            },
            "metrics": {"val_loss": 0.25, "val_acc": 0.5},
            "versions": {"torch": "2.15.0"},
            "git_commit": "c0ffee",
            "settings": {"model": {"net": "mlp", "init": None}, "seed_everything": 7},
        },
        path,
    )
    text = shown(["--ckpt", str(path)], capsys)
    for fact in (
        "network mlp",
        "arguments hidden=16",
        "classes 2: cat, dog",
        "images (3, 8, 8)",
        "epoch 3",
        "step 40",
        "val_loss 0.2500, val_acc 0.5000, best val_acc so far 0.7500",
        "torch 2.15.0",
        "c0ffee",
        "seed_everything: 7",
        "MseLossBackward0",
        "3,394 parameters, 3,394 of them trained",  # 192 * 16 + 16 * 16 + 16 * 2 and 16 + 16 + 2
    ):
        assert fact in text
    assert "init" not in text
    weight = model.net.get_parameter("linear_relu_stack.4.bias").double()
    assert f"linear_relu_stack.4.bias (2,) 2 {weight.mean():.4f} {weight.std():.4f}" in text  # the saved weights


@pytest.mark.parametrize(
    ("words", "status", "named"),
    [
        ([], 2, ["--list", "--net", "--ckpt"]),
        (["--nett", "lenet", "--list"], 2, ["--nett", "--net"]),
        (["--net", "lenett"], 2, ["lenett", "'lenet'", "resnet9"]),
        (["--net", "torchvision/resnet81"], 2, ["resnet81", "resnet18"]),
        (["--net", "mlp", "--net_args.hiden", "3"], 2, ["hiden", "'hidden'"]),
        (["--net", "mlp", "--net_args.hidden"], 2, ["--net_args.hidden", "value"]),
        (["--list", "--net_args.hidden", "3"], 2, ["--net NAME"]),
        (["--net", "mlp", "--image_shape", "28x28"], 2, ["28x28", "3,32,32"]),
        (["--net", "mlp", "--graph", "graph.gif"], 2, ["graph.gif", ".png", ".svg"]),
        (["--net", "mlp", "--num_classes", "0"], 2, ["--num_classes", "at least 1"]),
        (["--ckpt", "a.ckpt", "--image_shape", "3,32,32"], 2, ["--image_shape", "a checkpoint has its own"]),
        (["--ckpt", "a.ckpt", "--num_classes", "10"], 2, ["--num_classes", "a checkpoint has its own"]),
        (["--ckpt", "missing.ckpt"], 1, ["missing.ckpt", "no such file"]),
    ],
)
def test_mistakes_end_in_one_message(
    words: list[str], status: int, named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == status
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1
    for word in named:
        assert word in message
