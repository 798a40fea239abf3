"""The only list of networks: one is one file here and one import line below; docs/add_a_network.md has its contract.

The file's name is the network's name: what ``--net`` takes, what a checkpoint holds, the key in ``NETS``.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lit_nn.errors import UsageError, look_up, options_of, place
from lit_nn.nets.cifar_cnn import CifarCNN as CifarCNN
from lit_nn.nets.lenet import LeNet as LeNet
from lit_nn.nets.mlp import MLP as MLP
from lit_nn.nets.resnet9 import ResNet9 as ResNet9

with suppress(ModuleNotFoundError):  # a folder that may be deleted
    from lit_nn.nets.tutorials import *  # noqa: F403

NETS: dict[str, type[nn.Module]] = {
    cls.__module__.rpartition(".")[2]: cls
    for cls in list(globals().values())
    if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__.startswith(f"{__name__}.")
}
LIBRARIES = ("torchvision", "timm")  # of which each network is LIBRARY/NAME


def build_net(
    name: str, in_channels: int, num_classes: int, image_size: tuple[int, int], net_args: dict[str, Any] | None = None
) -> nn.Module:
    """Build a network by name, with ordinary parameters only: lazy ones are given their shapes.

    One of ``NETS`` is tried out on an image, so that what does not fit together is said here and not in the training.
    ``name`` is a key of it, ``torchvision/NAME`` or ``timm/NAME``. ``image_size``, (H, W) of the images in pixels, is
    given to networks that take it, unless it is among ``net_args``, the network's further arguments.

    Raises:
        UsageError: If there is no such network or argument, or it does not go together with the arguments or images.
        OSError: If pretrained weights were asked for and cannot be had.
    """
    make, args = _find(name), dict(net_args or {})
    if "image_size" in options_of(make, args, {"in_channels", "num_classes"}, f"argument of net {name}"):
        args["image_size"] = tuple(args.get("image_size", image_size))  # YAML and JSON have lists only
    try:
        net = make(in_channels=in_channels, num_classes=num_classes, **args)
    except (TypeError, RuntimeError, ValueError) as error:
        if isinstance(error, UsageError) or not net_args:
            raise
        raise UsageError(f"net {name} cannot be built with {args}: {error} ({place(error)})") from error
    tensors = [*net.parameters(), *net.buffers()]
    # On the meta device only the shapes are wanted, and nothing can be computed.
    is_tried = name in NETS or "input_size" in args  # which some libraries' networks cannot change
    if any(map(is_lazy, tensors)) or (is_tried and not any(tensor.is_meta for tensor in tensors)):
        shape = (in_channels, *(getattr(net, "image_size", None) or image_size))
        _try_out(net, f"net {name}{f' with {args}' if args else ''}", shape, num_classes)
    return net.train()


def _find(name: str) -> Callable[..., nn.Module]:
    """What builds a network."""
    if name in NETS:
        return NETS[name]
    from lit_nn.nets.pretrained import PretrainedNet, names_of  # only now: torchvision takes a second

    library, _, its_name = name.partition("/")
    if library in LIBRARIES:
        return partial(PretrainedNet, library, its_name)
    if name in names_of("torchvision"):
        raise UsageError(f"unknown net '{name}'. Did you mean torchvision/{name}?")
    return look_up(NETS | dict.fromkeys([f"{known}/NAME" for known in LIBRARIES], PretrainedNet), name, "net")  # raises


def _try_out(net: nn.Module, what: str, shape: tuple[int, ...], num_classes: int) -> None:
    """Send an image (C, H, W) of zeros through a network; it must give (1, num_classes)."""
    try:
        with torch.no_grad():  # in eval mode, so that no BatchNorm counts the zeros and no Dropout draws numbers
            logits = net.eval()(torch.zeros(1, *shape))
    except (AssertionError, TypeError, RuntimeError, ValueError) as error:
        raise UsageError(f"{what} cannot work on images {shape}: {error} ({place(error)})") from error
    given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if given != (1, num_classes):
        raise UsageError(f"{what} gives {given} for one image {shape}; logits would be (1, {num_classes})")


def count_parameters(net: nn.Module) -> int:
    """How many numbers a network learns; a tensor used twice counts once."""
    return sum(parameter.numel() for parameter in net.parameters())
