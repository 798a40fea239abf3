"""The autograd graph of a loss: the walk back from it along ``grad_fn`` and ``next_functions``, and a picture of it."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

# Lengths in a picture, in inches
ROW = 0.42  # from one row to the next
LETTER, TITLE_LETTER = 0.068, 0.09  # that a letter takes
SPACE = 0.3  # between the boxes of a row

LONGEST = 6  # rows past which an arrow is no half circle any more but flatter

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
    """

    name: str
    number: int
    next: list["Operation"] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)


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
    return list(operations.values())


def draw_graph(operations: list[Operation], net: nn.Module, path: Path, title: str) -> None:
    """Draw an autograd graph: the loss on top, then an operation in each row, with its parameters beside it.

    Args:
        operations: What `backward_graph` found.
        net: The network, for the shapes of its parameters.
        path: The file to write, in the format of its ending: PNG, JPEG, SVG or PDF.
        title: What stands on top.

    Raises:
        OSError: If the file cannot be written.
    """
    from matplotlib.figure import Figure  # only here: most uses of this module draw nothing

    shapes = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    uses = Counter(name for op in operations for name in op.parameters)
    rows = [[(f"{op.number} {op.name}", LOSS if op.number == 1 else OPERATION)] for op in operations]  # of boxes
    for op, row in zip(operations, rows, strict=True):
        row += [(f"{name} {shapes.get(name, '')}", SHARED if uses[name] > 1 else PARAMETER) for name in op.parameters]
    longest = max(other.number - op.number for op in operations for other in [*op.next, op])
    left = 0.4 + 0.5 * min(longest, LONGEST) * ROW  # room for the arrows that go past other operations
    width = left + max(len(title) * TITLE_LETTER, *(sum(len(text) * LETTER + SPACE for text, _ in row) for row in rows))
    height = ROW * (len(rows) + 2)

    figure = Figure((width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(len(rows) + 1, -1))
    axes.axis("off")
    axes.text(left, -0.3, title, fontsize=10, weight="bold")
    for op, row in zip(operations, rows, strict=True):
        x = left
        for text, colour in row:
            style = {"boxstyle": "round,pad=0.35", "facecolor": colour, "edgecolor": GRAY, "linewidth": 0.6}
            axes.text(x, op.number, text, va="center", fontsize=8, family="monospace", bbox=style)
            x += len(text) * LETTER + SPACE
        for other in op.next:
            past = other.number - op.number  # rows; straight down to the next one, else around what lies between
            arrow: dict[str, Any] = {"arrowstyle": "-|>", "color": GRAY, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
            if past > 1:
                arrow["connectionstyle"] = f"arc3,rad={min(1, LONGEST / past):.3f}"
            x, gap = (left + 0.25, 0.3) if past == 1 else (left - 0.05, 0.0)
            axes.annotate("", (x, other.number - gap), (x, op.number + gap), arrowprops=arrow)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=min(120, LARGEST / max(width, height)))
