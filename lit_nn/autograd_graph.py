"""The autograd graph of a loss: the walk back from it along ``grad_fn`` and ``next_functions``, and a picture of it."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Lengths in a picture, in inches
ROW = 0.42  # from one row to the next
LETTER = 0.068  # that a letter takes
SPACE = 0.3  # between the boxes of a row
GAP = 0.55  # between two branches beside each other

OPERATION, LOSS, PARAMETER, SHARED = "#dfe8f3", "#f6c99f", "#d8ecd2", "#f7e39b"  # colours of boxes
GRAY = "#707070"  # of arrows and the edges of boxes
LARGEST = 65_000  # dots in one direction; matplotlib draws 2 ** 16 at most


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

    following: dict[Any, list[Any]] = {}  # the operations that each one hands gradients on to
    parameters: dict[Any, list[str]] = {}
    before: Counter[Any] = Counter()  # how many operations hand their gradient to this one
    nodes: list[Any] = [loss.grad_fn]
    for node in nodes:  # grows meanwhile
        following[node], parameters[node] = [], []
        for other in (other for other, _ in node.next_functions if other is not None):
            if name := parameter_behind(other):
                parameters[node].append(name)
                continue
            following[node].append(other)
            before[other] += 1
            if before[other] == 1:
                nodes.append(other)
    operations: dict[Any, Operation] = {}
    ready: list[Any] = [loss.grad_fn]
    while ready:
        node = ready.pop()
        operations[node] = Operation(node.name(), len(operations) + 1, parameters=parameters[node])
        for other in reversed(following[node]):
            before[other] -= 1
            if before[other] == 0:
                ready.append(other)
    for node, operation in operations.items():
        operation.next = [operations[other] for other in following[node]]
        for later in operation.next:
            later.rank = max(later.rank, operation.rank + 1)
    return list(operations.values())


def draw_graph(operations: list[Operation], net: nn.Module, path: Path, title: str) -> None:
    """Draw an autograd graph: the loss on top, operations below each other, parameters beside their operation.

    Args:
        operations: What `backward_graph` found.
        net: The network, for the shapes of its parameters.
        path: The file to write: PNG, SVG or PDF, by its ending.
        title: What stands on top.

    Raises:
        OSError: If the file cannot be written.
    """
    from matplotlib.figure import Figure  # only here: most uses of this module draw nothing

    shapes = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    uses = Counter(name for op in operations for name in op.parameters)
    boxes: dict[int, list[tuple[str, str]]] = {}  # text and colour of each operation's boxes, its own first
    for op in operations:
        boxes[op.number] = [(f"{op.number} {op.name}", LOSS if op.number == 1 else OPERATION)]
        for name in op.parameters:
            boxes[op.number].append((f"{name} {shapes.get(name, '')}", SHARED if uses[name] > 1 else PARAMETER))

    lanes = _lanes(operations)
    widths = [0.0] * (1 + max(lanes.values()))
    for number, lane in lanes.items():
        widths[lane] = max(widths[lane], sum(len(text) * LETTER + SPACE for text, _ in boxes[number]))
    lefts = list(accumulate([width + GAP for width in widths], initial=2 * GAP))
    width = max(lefts[-1], LETTER * 1.3 * len(title) + 2 * GAP)
    height = ROW * (4 + max(op.rank for op in operations))
    at = {op.number: (lefts[lanes[op.number]], height - ROW * (2.2 + op.rank)) for op in operations}

    figure = Figure((width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    axes.text(GAP, height - 0.6 * ROW, title, va="center", fontsize=10, weight="bold")
    for op in operations:
        first, y = at[op.number]
        x = first
        for text, colour in boxes[op.number]:
            style = {"boxstyle": "round,pad=0.35", "facecolor": colour, "edgecolor": GRAY, "linewidth": 0.6}
            axes.text(x, y, text, va="center", fontsize=8, family="monospace", bbox=style)
            last, x = x, x + len(text) * LETTER + SPACE
        axes.plot([first, last], [y, y], color="#5a8f4c", linewidth=1, zorder=0)  # behind the boxes
        for other in op.next:
            _draw_arrow(axes, at[op.number], at[other.number])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=min(120, LARGEST / max(width, height)))


def _draw_arrow(axes: "Axes", start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow from one operation down to another."""
    (x0, y0), (x1, y1) = start, end
    style = {"arrowstyle": "-|>", "color": GRAY, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
    if x0 == x1 and y0 - y1 > 1.5 * ROW:  # past other operations, on their left
        style |= {"connectionstyle": f"arc3,rad={min(0.5, 0.9 / (y0 - y1)):.3f}"}
        axes.annotate("", (x1 - 0.05, y1), (x0 - 0.05, y0), arrowprops=style)
        return
    half, between = 0.12, ROW / 2  # half the height of a box; from its middle to that of the gap below it
    x0, x1 = x0 + 0.25, x1 + 0.25
    way = [(x0, y0 - half)]
    if x0 < x1:  # a branch begins
        way += [(x0, y0 - between), (x1, y0 - between)]
    elif x0 > x1:  # a branch ends
        way += [(x0, y1 + between), (x1, y1 + between)]
    axes.plot(*zip(*way, strict=True), color=GRAY, linewidth=0.8, zorder=0)
    axes.annotate("", (x1, y1 + half), way[-1], arrowprops=style)


def _lanes(operations: list[Operation]) -> dict[int, int]:
    """Lane of each operation by its number: that of the first operation before it, or the next one free on its rank."""
    wanted: dict[int, int] = {}
    lanes: dict[int, int] = {}
    taken: set[tuple[int, int]] = set()
    for op in sorted(operations, key=lambda op: op.rank):
        lane = wanted.get(op.number, 0)
        while (op.rank, lane) in taken:
            lane += 1
        taken.add((op.rank, lane))
        lanes[op.number] = lane
        for other in op.next:
            wanted[other.number] = min(lane, wanted.get(other.number, lane))
    return lanes
