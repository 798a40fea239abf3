"""Show what a network is made of: layers, the shapes between them, parameters; --help lists the options."""

import inspect
import re
import sys
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from lit_nn.checkpoint import build_model, read_checkpoint
from lit_nn.engine.console import CommandParser, command, print_table
from lit_nn.errors import UsageError, brief
from lit_nn.nets import NETS, build_net, count_parameters

FACTS = ("hyper_parameters", "epoch", "global_step", "metrics", "versions", "git_commit", "settings")  # of a checkpoint


def layers(net: nn.Module, images: Tensor) -> list[list[str]]:
    """Send two images (2, C, H, W) through a network: name, kind, shapes and parameters of every layer that is used."""
    names = {module: name.rpartition(".")[2] or "the network" for name, module in net.named_modules()}
    rows, counted = list[list[str]](), set[nn.Parameter]()
    running = list[list[str]]()  # the rows of layers whose forward has begun and not ended, the outermost first

    def begins(module: nn.Module, arguments: Any) -> None:
        own = set(module.parameters(recurse=False))  # without those of the layers inside it
        count = f"{sum(parameter.numel() for parameter in own - counted):,}" if own - counted else "again" * bool(own)
        counted.update(own)
        name = "  " * len(running) + names.get(module, "(not registered)")
        running.append([name, type(module).__name__, shape(arguments), "", count])
        rows.append(running[-1])

    def ends(module: nn.Module, arguments: Any, output: Any) -> None:
        running.pop()[3] = shape(output)

    with torch.no_grad(), register_module_forward_pre_hook(begins), register_module_forward_hook(ends):
        net.eval()(images)
    return rows


def shape(value: Any) -> str:
    """Shape of a tensor, or of the first of several, with B for the number of images."""
    value = value[0] if isinstance(value, tuple | list) and value else value
    return str(tuple(value.shape)).replace("(2,", "(B,", 1) if isinstance(value, Tensor) else ""


@command
def main(words: list[str]) -> None:
    parser = CommandParser("inspect_model", "Show a network: layers, shapes and parameters. No data is needed.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="all networks with their arguments")
    what.add_argument("--net", metavar="NAME", help="one network, as a training would start with it")
    what.add_argument("--ckpt", metavar="FILE", help="the network of a checkpoint, and what else it holds")
    parser.add_argument("--image_shape", metavar="C,H,W", help="of the images [1,28,28]")
    parser.add_argument("--num_classes", metavar="N", type=int, help="number of classes [10]")
    parser.add_argument("--net_args.NAME", metavar="VALUE", dest="net_args", action="append", help="one of its own")
    # As in training; each is made a line of YAML.
    text = re.sub("--(?:model[.])?net_args[.](\\w+)[=\0]", "--net_args.NAME=\\1: ", "\0".join(words))
    options = parser.parse_args(text.split("\0"))
    if not options.net and (options.image_shape or options.num_classes or options.net_args):
        raise UsageError("--image_shape, --num_classes and --net_args belong to --net NAME; a checkpoint has its own")
    if options.list:
        from lit_nn.nets.pretrained import names_of  # only here: torchvision takes a second

        print_table(["network", "arguments"], [[name, str(inspect.signature(cls))[1:-9]] for name, cls in NETS.items()])
        print("in_channels, num_classes and image_size come from the data; the others: --net_args.NAME VALUE")
        print(f"Also torchvision/NAME: {', '.join(names_of('torchvision'))}")
        print("Also timm/NAME: python -c 'import timm; print(timm.list_models())'")
        return
    if options.ckpt:
        checkpoint = read_checkpoint(options.ckpt)
        print(yaml.safe_dump({name: checkpoint[name] for name in FACTS if name in checkpoint}, sort_keys=False))
        model = build_model(checkpoint["hyper_parameters"], checkpoint["state_dict"])
        net, (channels, height, width) = model.net, model.image_shape
    else:
        try:
            channels, height, width = map(int, (options.image_shape or "1,28,28").split(","))
            if min(channels, height, width, options.num_classes or 10) < 1:
                raise ValueError("sizes and numbers of classes are at least 1")
            net_args = yaml.safe_load("\n".join(options.net_args or ["{}"]))
        except (ValueError, yaml.YAMLError) as error:
            raise UsageError(f"{brief(error)}; give for instance --image_shape 3,32,32 --net_args.NAME 16") from error
        net = build_net(options.net, channels, options.num_classes or 10, (height, width), net_args)
    print(f"{net}\n")
    images = torch.zeros(2, channels, *(getattr(net, "image_size", None) or (height, width)))  # (B, C, H, W)
    print_table(["layer", "kind", "in", "out", "parameters"], layers(net, images), right=["parameters"])
    print(f"{count_parameters(net):,} parameters")


if __name__ == "__main__":
    sys.exit(main())
