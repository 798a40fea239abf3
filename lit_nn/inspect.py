"""What a network is made of: its layers, the shapes between them, its parameters, the autograd graph of its loss."""

import argparse
import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from lit_nn.autograd_graph import Operation, backward_graph, draw_graph
from lit_nn.commands import PICTURES, CommandParser, brief, check_picture, command, print_table
from lit_nn.flags import UsageError
from lit_nn.losses import LOSSES
from lit_nn.nets import NETS, TORCHVISION, build_net, count_parameters

BATCH = 2  # pictures that are sent through; shown as B
SEED = 42  # of the weights, as in training
STRUCTURAL = {"flatten", "cat", "stack", "matmul", "add", "mean", "amax"}  # steps that are not in torch.nn.functional


# --- layers ----------------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """One use of a layer, or of a function that forward calls by itself.

    Attributes:
        name: The layer's dotted name, "" for the network itself; "relu()" for a function.
        depth: How many layers it lies inside of.
        kind: The layer's class, or "function".
        taken: Shape that goes in.
        given: Shape that comes out.
        parameters: How many numbers the layer itself learns, without the layers inside it.
        again: Whether the layer has been used before in the same forward.
    """

    name: str
    depth: int
    kind: str
    taken: tuple[int, ...] | None
    given: tuple[int, ...] | None = None
    parameters: int = 0
    again: bool = False


class _Recorder(TorchFunctionMode):
    """Notes what a forward does: hooks see the layers, the function mode sees the functions between them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.open: list[tuple[nn.Module, Call]] = []  # layers whose forward is running, from the outermost
        self.names = {module: name for name, module in net.named_modules()}

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        name = self.names.get(module, "(not registered)")
        count = count_parameters(module, recurse=False)
        again = any(call.name == name for call in self.calls)
        call = Call(name, len(self.open), type(module).__name__, _shape(args), parameters=count, again=again)
        self.calls.append(call)
        self.open.append((module, call))

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.open.pop()[1].given = _shape(output)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        # The functions in a layer that has no others inside are the layer itself; but a network may have no layers.
        between_layers = len(self.open) == 1 or (self.open and any(True for _ in self.open[-1][0].children()))
        if between_layers and isinstance(output, Tensor) and (name in STRUCTURAL or getattr(F, name, None) is func):
            self.calls.append(Call(f"{name}()", len(self.open), "function", _shape(args), _shape(output)))
        return output


def layers(net: nn.Module, images: Tensor) -> list[Call]:
    """Send images through a network and note every step with its shapes.

    A table of layers alone would not show why LeNet's second convolution takes 14x14 pixels: the pooling before it is
    a function, not a layer. So functions that a container's forward calls are noted too.

    Args:
        net: Any network; it is left in eval mode.
        images: Float (B, C, H, W).

    Returns:
        The steps in the order in which they begin.
    """
    recorder = _Recorder(net)
    # Hooks for all layers that there are, as long as this block is running
    with (
        torch.no_grad(),
        recorder,
        register_module_forward_pre_hook(recorder.enter),
        register_module_forward_hook(recorder.leave),
    ):
        net.eval()(images)
    return recorder.calls


def _shape(value: Any) -> tuple[int, ...] | None:
    """Shape of a tensor, or of the first one in a tuple or list of arguments or outputs."""
    if isinstance(value, tuple | list):
        return next((shape for item in value if (shape := _shape(item)) is not None), None)
    return tuple(value.shape) if isinstance(value, Tensor) else None


# --- tables ----------------------------------------------------------------------------------------------------------


def _print_layers(calls: list[Call]) -> None:
    """Shapes before and after every step; B is the number of pictures."""

    def text(shape: tuple[int, ...] | None) -> str:
        sizes = [str(size) for size in shape or ()]
        if sizes[:1] == [str(BATCH)]:
            sizes[0] = "B"
        return "" if shape is None else f"({', '.join(sizes)})"

    rows = []
    for call in calls:
        count = "(used again)" if call.again and call.parameters else f"{call.parameters:,}" if call.parameters else ""
        name = "  " * call.depth + (call.name.rpartition(".")[2] or "the network")
        rows.append([name, call.kind, text(call.taken), text(call.given), count])
    print_table(["layer", "kind", "in", "out", "parameters"], rows, right=["parameters"], title="Shapes")


def _print_parameters(net: nn.Module, uses: Counter[str]) -> None:
    """Every parameter and buffer under each of its names, and how many operations of the graph use a parameter."""
    rows = []
    first: dict[int, str] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        remarks = [f"shared: the same tensor as {first[id(parameter)]}"] if id(parameter) in first else []
        first.setdefault(id(parameter), name)
        if not parameter.requires_grad:
            remarks.append("frozen")
        if uses[name] > 1:
            remarks.append(f"used {uses[name]} times")
        count = "-" if first[id(parameter)] != name else f"{parameter.numel():,}"
        rows.append([name, str(tuple(parameter.shape)), count, *_moments(parameter), "; ".join(remarks)])
    saved = net.state_dict(keep_vars=True).keys()
    for name, buffer in net.named_buffers():
        remark = "buffer: saved, not learned" if name in saved else "buffer: not saved, not learned"
        rows.append([name, str(tuple(buffer.shape)), "", *_moments(buffer), remark])
    columns = ["name", "shape", "count", "mean", "std", "remarks"]
    print_table(columns, rows, right=["count", "mean", "std"], title="Parameters")
    trained = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    print(f"{count_parameters(net):,} parameters, {trained:,} of them trained\n")


def _moments(tensor: Tensor) -> tuple[str, str]:
    values = tensor.detach().double()
    return f"{values.mean():.4f}", f"{values.std():.4f}" if values.numel() > 1 else "-"


def _print_graph(operations: list[Operation]) -> None:
    """The operations in the order of the walk, with what each hands its gradient on to."""
    rows = [
        [str(op.number), op.name, ", ".join(str(other.number) for other in op.next), ", ".join(op.parameters)]
        for op in operations
    ]
    title = "Autograd graph, from the loss along grad_fn and next_functions"
    print_table(["#", "grad_fn", "hands on to", "gradient of"], rows, right=["#"], title=title)


def _print_networks(image_shape: tuple[int, int, int], num_classes: int) -> None:
    """Every network by name, with its own arguments and its parameters."""
    from torchvision import models

    from lit_nn.nets.torchvision_net import TorchvisionNet, torchvision_names

    def arguments(cls: type[nn.Module]) -> str:
        of_all = ("name", "in_channels", "num_classes")
        own = [a for a in inspect.signature(cls).parameters.values() if a.name not in of_all]
        return " ".join(f"{a.name}={'DATA' if a.name == 'image_size' else a.default}" for a in own)

    rows = []
    for name, cls in NETS.items():
        try:
            parameters = f"{count_parameters(build_net(name, image_shape[0], num_classes, image_shape[1:])):,}"
        except ValueError:  # it cannot work on such images
            parameters = "does not fit"
        rows.append([name, arguments(cls), parameters])
    for name in torchvision_names():  # building all of them would take minutes; what was published is on record
        published = models.get_model_weights(name).DEFAULT.meta["num_params"]
        rows.append([TORCHVISION + name, arguments(TorchvisionNet), f"{published:,}"])
    print_table(["name", "arguments", "parameters"], rows, right=["parameters"], title="Networks")
    print(
        "Use: --net NAME --model.net_args.ARGUMENT VALUE; image_size=DATA is the images' own height and width.\n"
        f"Parameters: for images {image_shape} and {num_classes} classes; "
        "those of torchvision as published, for 1000 classes."
    )


def _print_checkpoint(path: Path) -> None:
    """What a checkpoint says about itself; facts that it does not hold are left out."""
    from lit_nn.checkpoint import CheckpointError, read_checkpoint  # only here: lightning takes seconds

    checkpoint = read_checkpoint(path)
    hparams = checkpoint["hyper_parameters"]
    try:  # only what a network is built from has been checked
        scores = [f"{name} {value:.4f}" for name, value in checkpoint.get("metrics", {}).items()]
        bests = [state.get("best_score") for state in checkpoint.get("callbacks", {}).values()]
        scores += [f"best val_acc so far {best:.4f}" for best in bests if best is not None]
        settings = _without_none(checkpoint.get("settings", {}))
        facts = {
            "network": hparams["net"],
            "arguments": ", ".join(f"{name}={value}" for name, value in (hparams["net_args"] or {}).items()) or "none",
            "classes": f"{len(hparams['class_names'])}: {', '.join(hparams['class_names'])}",
            "images": f"{tuple(hparams['image_shape'])}, mean {hparams['mean']}, std {hparams['std']}",
            "training": f"epoch {checkpoint.get('epoch')} (the first is 0), step {checkpoint.get('global_step')}",
            "metrics": ", ".join(scores),
            "versions": ", ".join(f"{name} {version}" for name, version in checkpoint.get("versions", {}).items()),
            "commit": str(checkpoint.get("git_commit", "")),
            "configuration": yaml.safe_dump(settings, sort_keys=False).rstrip() if settings else "",
        }
    except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: what it says of itself cannot be read ({brief(error)})") from error
    print_table(["what", "value"], [[what, text] for what, text in facts.items() if text], title=str(path))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


# --- the command -----------------------------------------------------------------------------------------------------


def _image_shape(text: str) -> tuple[int, int, int]:
    try:
        channels, height, width = (int(number) for number in text.strip("[]()").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not CHANNELS,HEIGHT,WIDTH, for instance 3,32,32") from None
    return channels, height, width


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "inspect_model", "Show a network: layers, shapes, parameters, the autograd graph of its loss."
    )
    parser.epilog = (
        "A network's own arguments are given as in training: --model.net_args.NAME VALUE. No data is needed."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="all networks with their arguments and parameter counts")
    what.add_argument("--net", metavar="NAME", help="one network, with the weights that a training would start from")
    what.add_argument("--ckpt", metavar="FILE", type=Path, help="the trained network of a checkpoint")
    parser.add_argument(
        "--image_shape",
        metavar="C,H,W",
        type=_image_shape,
        help="channels, height and width of the images [1,28,28]",
    )
    parser.add_argument("--num_classes", metavar="N", type=int, help="number of classes [10]")
    parser.add_argument("--graph", metavar="FILE", type=Path, help=f"draw the autograd graph: {', '.join(PICTURES)}")
    return parser


def _parse(words: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Read a command line: the options, and the network's own arguments.

    Raises:
        UsageError: If it cannot be done, with the nearest names.
    """
    parser = _parser()
    # The LightningCLI's names of the same options begin with "model.".
    options, others = parser.parse_known_args(["--" + w[8:] if w.startswith("--model.") else w for w in words])
    net_args: dict[str, Any] = {}
    while others:
        name, equals, value = others.pop(0).partition("=")
        if not name.startswith("--net_args."):
            parser.error(f"unrecognized arguments: {name}")
        if not equals and not others:
            raise UsageError(f"{name} needs a value")
        text = value if equals else others.pop(0)
        try:
            net_args[name.removeprefix("--net_args.")] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"{name} is '{text}', which is no value") from error
    if net_args and not options.net:
        raise UsageError("--net_args belong to --net NAME")
    if options.graph and options.list:
        raise UsageError("--graph draws one network: give --net NAME or --ckpt FILE")
    if options.graph:
        check_picture("--graph", options.graph)
    if options.ckpt and (options.image_shape, options.num_classes) != (None, None):
        raise UsageError("--image_shape and --num_classes belong to --net NAME and --list; a checkpoint has its own")
    options.image_shape = options.image_shape or (1, 28, 28)
    options.num_classes = 10 if options.num_classes is None else options.num_classes
    if options.num_classes < 1 or min(options.image_shape) < 1:
        raise UsageError("--num_classes and the numbers of --image_shape must be at least 1")
    return options, net_args


def inspect_net(net: nn.Module, image_size: tuple[int, int], in_channels: int, loss: str) -> list[Operation]:
    """Print everything about one network.

    Args:
        net: The network.
        image_size: (H, W) of the data's images in pixels, for a network that takes any size.
        in_channels: Channels of the images.
        loss: Name of the loss, one of `lit_nn.losses.LOSSES`.

    Returns:
        The autograd graph of the loss.
    """
    torch.manual_seed(SEED)
    size = getattr(net, "image_size", None) or image_size
    images = torch.randn(BATCH, in_channels, *size)  # (B, C, H, W), normalised
    print(f"{net}\n")
    _print_layers(layers(net, images))
    logits = net.train()(images)  # (B, num_classes); in train mode, as the graph is in training
    operations = backward_graph(LOSSES[loss](logits, torch.zeros(BATCH, dtype=torch.int64)), net)
    _print_parameters(net, Counter(name for operation in operations for name in operation.parameters))
    _print_graph(operations)
    return operations


@command
def main(words: list[str]) -> None:
    """Show a network: ``python scripts/inspect_model.py``."""
    options, net_args = _parse(words)
    if options.list:
        _print_networks(options.image_shape, options.num_classes)
        return
    if options.ckpt:
        from lit_nn.checkpoint import load_classifier

        classifier = load_classifier(options.ckpt)
        _print_checkpoint(options.ckpt)
        net, name, loss = classifier.net, classifier.hparams["net"], classifier.hparams["loss"]
        channels, height, width = classifier.hparams["image_shape"]
    else:
        name, loss = options.net, "cross_entropy"
        channels, height, width = options.image_shape
        torch.manual_seed(SEED)
        try:
            net = build_net(name, channels, options.num_classes, (height, width), net_args)
        except ValueError as error:
            raise UsageError(str(error)) from error
    operations = inspect_net(net, (height, width), channels, loss)
    if options.graph:
        draw_graph(operations, net, options.graph, f"Autograd graph of {name}: gradients flow along the arrows")
        print(f"Autograd graph: {options.graph}")
