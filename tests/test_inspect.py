"""What inspect_model says about networks and checkpoints, with numbers that can be checked by hand."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Command, Refused, Said, script
from test_checkpoint import contents

from lit_nn.nets import NETS, build_net

main = script("inspect_model")
layers = sys.modules["scripts.inspect_model"].layers


def shown(words: list[str], capsys: Said) -> str:
    """What the command prints, with runs of spaces as one."""
    assert main(words) == 0
    return re.sub(" +", " ", capsys.readouterr().out)


def test_list_names_every_network_with_its_arguments(capsys: Said) -> None:
    text = shown(["--list"], capsys)
    parts = [*(f"\n {name} in_channels" for name in NETS), "kernel_size: int = 5 \n", "torchvision/NAME", " resnet18,"]
    assert [part for part in parts if part not in text] == []


def test_lenet_from_a_process_of_its_own(command: Command) -> None:
    done = command("-X", "importtime", ROOT / "scripts" / "inspect_model.py", "--net", "lenet")
    assert done.returncode == 0, done.stderr
    text = re.sub("[ |]+", " ", done.stdout)  # | is what rich draws where the encoding is an old one
    assert "(fc3): Linear(in_features=84, out_features=10, bias=True)" in text  # the tree
    assert "61,706 parameters" in text
    for line in (
        "the network LeNet (B, 1, 32, 32) (B, 10)",
        "conv1 Conv2d (B, 1, 32, 32) (B, 6, 28, 28) 156",
        "conv2 Conv2d (B, 6, 14, 14) (B, 16, 10, 10) 2,416",
        "fc1 Linear (B, 400) (B, 120) 48,120",
        "fc3 Linear (B, 84) (B, 10) 850",
    ):
        assert f" {line}" in text
    slow = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()} & {"lightning", "torchvision"}
    assert not slow  # each takes seconds


@pytest.mark.parametrize("net", NETS)
def test_every_network_can_be_looked_into(net: str) -> None:
    network: Any = build_net(net, 1, 10, (28, 28))
    rows = layers(network, torch.zeros(2, 1, *(network.image_size or (28, 28))))
    assert rows[0][3] == "(B, 10)"
    counts = [int(row[4].replace(",", "")) for row in rows if row[4] not in ("", "again")]
    assert sum(counts) == sum(parameter.numel() for parameter in network.parameters())


def test_own_arguments_change_the_network(capsys: Said) -> None:
    flat = shown(["--net", "mlp", "--net_args.hidden", "16", "--image_shape", "3,8,8", "--num_classes", "5"], capsys)
    dotted = shown(["--net=mlp", "--model.net_args.hidden=16", "--image_shape=3,8,8", "--num_classes=5"], capsys)
    assert flat == dotted
    assert "3,445 parameters" in flat  # 192 * 16 + 16 + 16 * 16 + 16 + 16 * 5 + 5
    assert "727,626 parameters" in shown(["--net", "torchvision/squeezenet1_1", "--image_shape", "3,32,32"], capsys)


def test_a_checkpoint_tells_what_it_holds(tmp_path: Path, capsys: Said) -> None:
    more = {"epoch": 3, "metrics": {"val_acc": 0.5}, "settings": {"model": {"net": "mlp", "init": None}}}
    torch.save(contents(net_args={"hidden": 16}) | more, tmp_path / "best.ckpt")
    text = shown(["--ckpt", str(tmp_path / "best.ckpt")], capsys)
    for fact in ("net: mlp", "hidden: 16", "- cat\n - dog", "epoch: 3", "val_acc: 0.5"):
        assert fact in text
    assert "1,346 parameters" in text  # 64 * 16 + 16 * 16 + 16 * 2 and 16 + 16 + 2


MISTAKES = {
    "": ["--list", "--net", "--ckpt"],
    "--nett lenet --list": ["unknown option 'nett'. Did you mean net"],
    "--net lenett": ["lenett", "Did you mean lenet", "resnet9"],
    "--net mlp --net_args.hiden 3": ["hiden", "Did you mean hidden"],
    "--net mlp --net_args.hidden [1": ["--net_args", "3,32,32"],
    "--list --net_args.hidden 3": ["--net_args belong to --net NAME"],
    "--net mlp --image_shape 28x28": ["28x28", "3,32,32"],
    "--net mlp --num_classes -3": ["at least 1"],
    "--ckpt missing.ckpt": ["missing.ckpt", "no such file"],
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_end_in_one_message(words: str, refused: Refused) -> None:
    said = refused(main, words.split(), 1 if "missing" in words else 2)
    assert [part for part in MISTAKES[words] if part not in said] == []
