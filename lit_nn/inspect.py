"""What a network is made of: its layers, the shapes between them, its parameters, the autograd graph of its loss."""

import argparse
import inspect
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_nn.commands import CommandParser, run
from lit_nn.flags import UsageError

BATCH = 2  # pictures that are sent through; shown as B
SEED = 42  # of the weights, as in training
PICTURES = (".png", ".svg", ".pdf")
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
        self.seen: set[str] = set()
        self.names = {module: name for name, module in net.named_modules()}
        self.handles = [hook for module in self.names for hook in self._watch(module)]

    def _watch(self, module: nn.Module) -> Iterator[Any]:
        yield module.register_forward_pre_hook(self._enter)
        yield module.register_forward_hook(self._leave)

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        name = self.names[module]
        count = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        again = name in self.seen
        self.seen.add(name)
        call = Call(name, len(self.open), type(module).__name__, _shape(args), parameters=count, again=again)
        self.calls.append(call)
        self.open.append((module, call))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
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
    recorder = _Recorder(net.eval())
    try:
        with torch.no_grad(), recorder:
            net(images)
    finally:
        for handle in recorder.handles:
            handle.remove()
    return recorder.calls


def _shape(value: Any) -> tuple[int, ...] | None:
    """Shape of a tensor, or of the first one in a tuple or list of arguments or outputs."""
    if isinstance(value, tuple | list):
        return next((shape for item in value if (shape := _shape(item)) is not None), None)
    return tuple(value.shape) if isinstance(value, Tensor) else None


# --- the autograd graph ----------------------------------------------------------------------------------------------


@dataclass
class Operation:
    """One node of the autograd graph: a function that turns the gradient of its output into those of its inputs.

    Attributes:
        name: For instance "ConvolutionBackward0".
        number: Place in the walk, from 1, the loss.
        next: The operations that it hands gradients on to.
        parameters: Names of the parameters that it gives a gradient to.
        rank: Steps from the loss on the longest way.
    """

    name: str
    number: int
    next: list["Operation"] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    rank: int = 0


def backward_graph(loss: Tensor, net: nn.Module) -> list[Operation]:
    """Walk back from a loss along ``grad_fn`` and ``next_functions`` to the parameters.

    Args:
        loss: What was computed from the network's output.
        net: The network, for the names of its parameters.

    Returns:
        Operations, the loss first, each before those that it hands gradients on to. A parameter's AccumulateGrad node,
        and a mere transposition before it, are part of the operation that uses the parameter.
    """
    names = {id(parameter): name for name, parameter in net.named_parameters()}

    def parameter_behind(node: Any) -> str | None:
        while len(node.next_functions) == 1 and node.next_functions[0][0] is not None:
            node = node.next_functions[0][0]
        return names.get(id(node.variable), "input") if hasattr(node, "variable") else None

    def followers(node: Any) -> list[Any]:
        return [following for following, _ in node.next_functions if following is not None]

    waiting: Counter[Any] = Counter()  # how many operations hand their gradient to this one
    found, seen = [loss.grad_fn], {loss.grad_fn}
    for node in found:  # grows meanwhile
        for following in followers(node):
            if parameter_behind(following) is None:
                waiting[following] += 1
                if following not in seen:
                    seen.add(following)
                    found.append(following)
    operations: dict[Any, Operation] = {}
    ready: list[Any] = [loss.grad_fn]
    while ready:
        node = ready.pop()
        operations[node] = Operation(node.name(), len(operations) + 1)
        for following in reversed(followers(node)):
            if parameter_behind(following) is None:
                waiting[following] -= 1
                if not waiting[following]:
                    ready.append(following)
    for node, operation in operations.items():
        for following in followers(node):
            if name := parameter_behind(following):
                operation.parameters.append(name)
            else:
                operation.next.append(operations[following])
                operations[following].rank = max(operations[following].rank, operation.rank + 1)
    return list(operations.values())


class _Picture:
    """Draws an autograd graph: the loss on top, operations below each other, parameters beside their operation.

    Branches lie beside each other, and long graphs go on in a further column, as in a newspaper. Lengths are in inches.
    """

    ROW, LETTER, GAP = 0.42, 0.068, 0.55
    FILLS: ClassVar = {"operation": "#dfe8f3", "loss": "#f6c99f", "parameter": "#d8ecd2", "shared": "#f7e39b"}

    def __init__(self, operations: list[Operation], shapes: dict[str, str], title: str) -> None:
        from matplotlib.figure import Figure

        self.operations, self.shapes = operations, shapes
        self.uses = Counter(name for operation in operations for name in operation.parameters)
        self.ranks = 1 + max(op.rank for op in operations)
        lanes = self._lanes()
        starts = self._columns(1 + max(lanes.values()))
        # Every (column, lane) is as wide as its widest operation with its parameters.
        self.column = {op.number: sum(op.rank >= start for start in starts) - 1 for op in operations}
        widths: dict[tuple[int, int], float] = {}
        for op in operations:
            place = (self.column[op.number], lanes[op.number])
            widths[place] = max(widths.get(place, 0), self._width(op))
        left, lefts = self.GAP, {}
        for place in sorted(widths):
            lefts[place] = left = left + (self.GAP if place[1] == 0 else 0)
            left += widths[place] + self.GAP
        height = self.ROW * (3 + max(b - a for a, b in zip(starts, [*starts[1:], self.ranks], strict=True)))
        self.height = height
        self.at = {
            op.number: (
                lefts[self.column[op.number], lanes[op.number]],
                height - self.ROW * (2.2 + op.rank - starts[self.column[op.number]]),
            )
            for op in operations
        }
        width = max(left, self.LETTER * 1.3 * len(title) + 2 * self.GAP)
        self.figure = Figure(figsize=(width, height))
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
        self.axes.axis("off")
        self.axes.text(self.GAP, height - 0.6 * self.ROW, title, va="center", fontsize=10, weight="bold")
        for op in operations:
            self._draw(op)

    def _columns(self, lanes: int) -> list[int]:
        """First rank of each column; a column ends where as few arrows as possible have to cross to the next."""
        rows = max(24, math.isqrt(6 * self.ranks * lanes))  # so many make a picture about twice as wide as high
        crossing: Counter[int] = Counter()  # arrows that enter or pass each rank
        for op in self.operations:
            for following in op.next:
                crossing.update(range(op.rank + 1, following.rank + 1))
        starts = [0]
        while (left := self.ranks - starts[-1]) > rows:
            latest = starts[-1] + math.ceil(left / math.ceil(left / rows))  # columns of about the same height
            starts.append(min(range(latest, latest - rows // 4, -1), key=lambda rank: crossing[rank]))
        return starts

    def _lanes(self) -> dict[int, int]:
        """Lane of each operation: that of the first operation before it, or the next one free on its rank."""
        wanted: dict[int, int] = {}
        lanes: dict[int, int] = {}
        taken: set[tuple[int, int]] = set()
        for op in sorted(self.operations, key=lambda op: op.rank):
            lane = wanted.get(op.number, 0)
            while (op.rank, lane) in taken:
                lane += 1
            taken.add((op.rank, lane))
            lanes[op.number] = lane
            for following in op.next:
                wanted[following.number] = min(lane, wanted.get(following.number, lane))
        return lanes

    def _label(self, op: Operation) -> str:
        return f"{op.number} {op.name}"

    def _leaf(self, name: str) -> str:
        return f"{name} {self.shapes.get(name, '')}"

    def _width(self, op: Operation) -> float:
        leaves = sum(len(self._leaf(name)) * self.LETTER + 0.3 for name in op.parameters)
        return len(self._label(op)) * self.LETTER + 0.2 + leaves

    def _box(self, x: float, y: float, text: str, fill: str) -> float:
        """Draw a box whose left side is at x; returns where its right side is."""
        style = {"boxstyle": "round,pad=0.35", "facecolor": self.FILLS[fill], "edgecolor": "#808080", "linewidth": 0.6}
        self.axes.text(x, y, text, va="center", fontsize=8, family="monospace", bbox=style)
        return x + len(text) * self.LETTER + 0.1

    def _draw(self, op: Operation) -> None:
        x, y = self.at[op.number]
        right = self._box(x, y, self._label(op), "loss" if op.number == 1 else "operation")
        for name in op.parameters:
            self.axes.plot([right - 0.05, right + 0.2], [y, y], color="#5a8f4c", linewidth=1, zorder=0)
            right = self._box(right + 0.2, y, self._leaf(name), "shared" if self.uses[name] > 1 else "parameter")
        far = []  # operations in other columns, too far away for an arrow
        for following in op.next:
            if self.column[op.number] == self.column[following.number] or op.rank + 1 == following.rank:
                self._arrow(op, following)
            else:
                far.append(following.number)
        if far:
            text = f"-> {', '.join(map(str, far[:6]))}{', ...' if len(far) > 6 else ''}"
            self.axes.text(right + 0.1, y, text, va="center", fontsize=8, family="monospace", color="#a04020")

    def _arrow(self, op: Operation, following: Operation) -> None:
        (x0, y0), (x1, y1) = self.at[op.number], self.at[following.number]
        style = {"arrowstyle": "-|>", "color": "#606060", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
        half, between = 0.12, self.ROW / 2  # half the height of a box; from its middle to that of the gap below it
        if x0 == x1 and op.rank + 1 < following.rank:  # past other operations, on their left
            style |= {"connectionstyle": f"arc3,rad={min(0.5, 0.9 / (y0 - y1)):.3f}"}
            self.axes.annotate("", (x1 - 0.05, y1), (x0 - 0.05, y0), arrowprops=style)
            return
        x0, x1 = x0 + 0.25, x1 + 0.25
        way = [(x0, y0 - half)]
        if self.column[op.number] != self.column[following.number]:  # down, up between the columns, and down again
            gutter, bottom, top = x1 - 0.25 - 1.5 * self.GAP, 0.4 * self.ROW, self.height - 1.4 * self.ROW
            way += [(x0, bottom), (gutter, bottom), (gutter, top), (x1, top)]
        elif x0 < x1:  # a branch begins
            way += [(x0, y0 - between), (x1, y0 - between)]
        elif x0 > x1:  # a branch ends
            way += [(x0, y1 + between), (x1, y1 + between)]
        self.axes.plot(*zip(*way, strict=True), color="#606060", linewidth=0.8, zorder=0)
        self.axes.annotate("", (x1, y1 + half), way[-1], arrowprops=style)


def draw_graph(operations: list[Operation], net: nn.Module, path: Path, title: str) -> None:
    """Draw an autograd graph into a file.

    Args:
        operations: What `backward_graph` found.
        net: The network, for the shapes of its parameters.
        path: PNG, SVG or PDF, by its ending.
        title: What stands on top.

    Raises:
        OSError: If the file cannot be written.
    """
    shapes = {name: str(tuple(parameter.shape)) for name, parameter in net.named_parameters()}
    path.parent.mkdir(parents=True, exist_ok=True)
    _Picture(operations, shapes, title).figure.savefig(path, dpi=120)


# --- tables ----------------------------------------------------------------------------------------------------------


def table(title: str, *columns: str, right: Sequence[str] = ()) -> Table:
    """Make an empty table.

    Args:
        title: What stands above it.
        *columns: Headings.
        right: Those of columns whose values stand at the right.
    """
    made = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def layer_table(calls: list[Call]) -> Table:
    """Shapes before and after every step; B is the number of pictures."""

    def text(shape: tuple[int, ...] | None) -> str:
        sizes = [str(size) for size in shape or ()]
        if sizes[:1] == [str(BATCH)]:
            sizes[0] = "B"
        return "" if shape is None else f"({', '.join(sizes)})"

    made = table("Shapes", "layer", "kind", "in", "out", "parameters", right=["parameters"])
    for call in calls:
        count = "(used again)" if call.again and call.parameters else f"{call.parameters:,}" if call.parameters else ""
        name = "  " * call.depth + (call.name.rpartition(".")[2] or "the network")
        made.add_row(name, call.kind, text(call.taken), text(call.given), count)
    return made


def parameter_table(net: nn.Module, uses: Counter[str]) -> Table:
    """Every parameter and buffer under each of its names.

    Args:
        net: The network.
        uses: How many operations of the autograd graph use each parameter.
    """
    columns = ("name", "shape", "count", "mean", "std", "remarks")
    made = table("Parameters", *columns, right=["count", "mean", "std"])
    first: dict[int, str] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        remarks = [f"shared: the same tensor as {first[id(parameter)]}"] if id(parameter) in first else []
        first.setdefault(id(parameter), name)
        if not parameter.requires_grad:
            remarks.append("frozen")
        if uses[name] > 1:
            remarks.append(f"used {uses[name]} times")
        count = "-" if first[id(parameter)] != name else f"{parameter.numel():,}"
        made.add_row(name, str(tuple(parameter.shape)), count, *_moments(parameter), "; ".join(remarks))
    saved = net.state_dict(keep_vars=True).keys()
    for name, buffer in net.named_buffers():
        remark = "buffer: saved, not learned" if name in saved else "buffer: not saved, not learned"
        made.add_row(name, str(tuple(buffer.shape)), "", *_moments(buffer), remark)
    return made


def _moments(tensor: Tensor) -> tuple[str, str]:
    values = tensor.detach().double()
    return f"{values.mean():.4f}", f"{values.std():.4f}" if values.numel() > 1 else "-"


def graph_table(operations: list[Operation]) -> Table:
    """The operations in the order of the walk, with what each hands its gradient on to."""
    title = "Autograd graph, from the loss along grad_fn and next_functions"
    made = table(title, "#", "grad_fn", "hands on to", "gradient of", right=["#"])
    for op in operations:
        following = ", ".join(str(other.number) for other in op.next)
        made.add_row(str(op.number), op.name, following, ", ".join(op.parameters))
    return made


def network_table(image_shape: tuple[int, int, int], num_classes: int) -> Table:
    """Every network by name, with its own arguments and its parameters.

    Args:
        image_shape: Channels, height and width of the images that the project's own networks are built for.
        num_classes: Number of logits of those.
    """
    from torchvision import models

    from lit_nn.nets import NETS, TORCHVISION, build_net
    from lit_nn.nets.torchvision_net import TorchvisionNet, torchvision_names

    def arguments(cls: type[nn.Module]) -> str:
        own = [
            a
            for a in inspect.signature(cls).parameters.values()
            if a.name not in ("name", "in_channels", "num_classes")
        ]
        return " ".join(f"{a.name}={'DATA' if a.name == 'image_size' else a.default}" for a in own)

    made = table("Networks", "name", "arguments", "parameters", right=["parameters"])
    for name, cls in NETS.items():
        net = build_net(name, image_shape[0], num_classes, image_shape[1:])
        made.add_row(name, arguments(cls), f"{_count(net):,}")
    for name in torchvision_names():  # building all of them would take minutes; what was published is on record
        made.add_row(
            TORCHVISION + name,
            arguments(TorchvisionNet),
            f"{models.get_model_weights(name).DEFAULT.meta['num_params']:,}",
        )
    return made


def _count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def checkpoint_facts(checkpoint: dict[str, Any]) -> dict[str, str]:
    """What a checkpoint says about itself.

    Args:
        checkpoint: As `lit_nn.checkpoint.read_checkpoint` returns it.

    Returns:
        {what: text}; facts that the checkpoint does not hold are left out.
    """
    hparams = checkpoint["hyper_parameters"]
    monitors = [state for state in checkpoint.get("callbacks", {}).values() if "monitor" in state]
    scores = [
        f"{state['monitor']} {state['current_score']:.4f} (best so far {state['best_model_score']:.4f})"
        for state in monitors
        if state.get("current_score") is not None
    ]
    facts = {
        "network": hparams["net"],
        "arguments": ", ".join(f"{name}={value}" for name, value in (hparams["net_args"] or {}).items()) or "none",
        "classes": f"{len(hparams['class_names'])}: {', '.join(hparams['class_names'])}",
        "images": f"{tuple(hparams['image_shape'])}, mean {hparams['mean']}, std {hparams['std']}",
        "training": f"epoch {checkpoint.get('epoch')} (the first is 0), step {checkpoint.get('global_step')}",
        "metrics": ", ".join(scores),
        "versions": ", ".join(f"{name} {version}" for name, version in checkpoint.get("versions", {}).items()),
        "commit": checkpoint.get("git_commit", ""),
        "configuration": yaml.safe_dump(_without_none(checkpoint.get("settings", {})), sort_keys=False).rstrip(),
    }
    return {what: text for what, text in facts.items() if text and text != "{}"}


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
    parser.epilog = "A network's own arguments are given as in training: --net_args.NAME VALUE. No data is needed."
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="all networks with their arguments and parameter counts")
    what.add_argument("--net", metavar="NAME", help="one network, with the weights that a training would start from")
    what.add_argument("--ckpt", metavar="FILE", type=Path, help="the trained network of a checkpoint")
    parser.add_argument(
        "--image_shape",
        metavar="C,H,W",
        type=_image_shape,
        default=(1, 28, 28),
        help="channels, height and width of the images [1,28,28]",
    )
    parser.add_argument("--num_classes", metavar="N", type=int, default=10, help="number of classes [10]")
    parser.add_argument("--graph", metavar="FILE", type=Path, help="draw the autograd graph: a .png, .svg or .pdf file")
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
        net_args[name.removeprefix("--net_args.")] = yaml.safe_load(value if equals else others.pop(0))
    if net_args and not options.net:
        raise UsageError("--net_args belong to --net NAME")
    if options.graph and options.list:
        raise UsageError("--graph draws one network: give --net NAME or --ckpt FILE")
    if options.graph and options.graph.suffix.lower() not in PICTURES:
        raise UsageError(f"--graph {options.graph}: the file's name must end in {', '.join(PICTURES)}")
    if options.num_classes < 1 or min(options.image_shape) < 1:
        raise UsageError("--num_classes and the numbers of --image_shape must be at least 1")
    return options, net_args


def inspect_net(
    net: nn.Module, image_size: tuple[int, int], in_channels: int, loss: str, console: Console
) -> list[Operation]:
    """Print everything about one network.

    Args:
        net: The network.
        image_size: (H, W) of the data's images in pixels, for a network that takes any size.
        in_channels: Channels of the images.
        loss: Name of the loss, one of `lit_nn.losses.LOSSES`.
        console: Where to.

    Returns:
        The autograd graph of the loss.
    """
    from lit_nn.losses import LOSSES

    torch.manual_seed(SEED)
    size = getattr(net, "image_size", None) or image_size
    images = torch.randn(BATCH, in_channels, *size)  # (B, C, H, W), normalised
    console.print(f"{net}\n", soft_wrap=True)
    console.print(layer_table(layers(net, images)))
    logits = net.train()(images)  # (B, num_classes); in train mode, as the graph is in training
    operations = backward_graph(LOSSES[loss](logits, torch.zeros(BATCH, dtype=torch.int64)), net)
    uses = Counter(name for operation in operations for name in operation.parameters)
    console.print(parameter_table(net, uses))
    trained = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    console.print(f"{_count(net):,} parameters, {trained:,} of them trained\n")
    console.print(graph_table(operations))
    return operations


def main(argv: Sequence[str] | None = None) -> int:
    """Show a network: ``python scripts/inspect_model.py``.

    Args:
        argv: Words of the command line; those of this process if None.

    Returns:
        Exit status.
    """

    def command() -> None:
        options, net_args = _parse(sys.argv[1:] if argv is None else argv)
        console = Console(width=None if sys.stdout.isatty() else 120, markup=False, highlight=False)
        channels, *size = options.image_shape
        loss, name = "cross_entropy", options.net
        if options.list:
            console.print(network_table(options.image_shape, options.num_classes))
            console.print(
                "Use: --net NAME --net_args.ARGUMENT VALUE; image_size=DATA is the images' own height and width.\n"
                f"Parameters: for images {options.image_shape} and {options.num_classes} classes; "
                "those of torchvision as published, for 1000 classes.",
                soft_wrap=True,
            )
            return
        if options.ckpt:
            from lit_nn.checkpoint import load_classifier, read_checkpoint

            facts = table(str(options.ckpt), "what", "value")
            for what, text in checkpoint_facts(read_checkpoint(options.ckpt)).items():
                facts.add_row(what, text)
            classifier = load_classifier(options.ckpt)
            console.print(facts)
            net, hparams = classifier.net, classifier.hparams
            (channels, *size), loss, name = hparams["image_shape"], hparams["loss"], hparams["net"]
        else:
            from lit_nn.nets import build_net

            torch.manual_seed(SEED)
            try:
                net = build_net(options.net, channels, options.num_classes, (size[0], size[1]), net_args)
            except ValueError as error:
                raise UsageError(str(error)) from error
        operations = inspect_net(net, (size[0], size[1]), channels, loss, console)
        if options.graph:
            draw_graph(operations, net, options.graph, f"Autograd graph of {name}: gradients flow along the arrows")
            console.print(f"Autograd graph: {options.graph}", soft_wrap=True)

    return run(command)
