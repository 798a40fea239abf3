"""Blocks made of blocks, after "Layers and Modules" and "Parameter Management" in Dive into Deep Learning."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MySequential(nn.Module):
    """Runs any number of blocks one after the other; results and state_dict are those of ``nn.Sequential``.

    Args:
        *blocks: the blocks in their order; the same one may come more than once.
    """

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.length = len(blocks)
        for index, block in enumerate(blocks):
            self.add_module(str(index), block)  # only names that are strings can stand in a state_dict

    def forward(self, x: Tensor) -> Tensor:
        """Give each block the output of the one before it."""
        for index in range(self.length):  # children() would leave out a block's second appearance
            x = self.get_submodule(str(index))(x)
        return x


class FixedHiddenMLP(nn.Module):
    """A layer used twice around a constant random weight, with control flow in forward.

    The constant is a buffer: no optimizer changes it, but it is saved, reloaded and moved with the network. (The book
    keeps it as a plain attribute, so a reloaded network has another one.)
    """

    rand_weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rand_weight", torch.rand(20, 20))
        self.linear = nn.Linear(20, 20)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 20) to a scalar: the sum of the last layer, halved until its absolute sum is at most 1."""
        x = self.linear(x)  # (B, 20)
        x = F.relu(x @ self.rand_weight + 1)  # (B, 20)
        x = self.linear(x)  # (B, 20), the same parameters once more
        while 1 < x.abs().sum() < torch.inf:  # infinity would be halved for ever
            x = x / 2
        return x.sum()


class NestMLP(nn.Module):
    """A Sequential inside a module: (B, 20) to (B, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.linear = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 20) to (B, 16)."""
        return self.linear(self.net(x))


def chimera() -> nn.Sequential:
    """Chain blocks of different kinds: NestMLP, a plain layer, FixedHiddenMLP; maps (B, 20) to a scalar."""
    return nn.Sequential(NestMLP(), nn.Linear(16, 20), FixedHiddenMLP())


def block1(units: int = 4, hidden: int = 8) -> nn.Sequential:
    """Linear, ReLU, Linear, ReLU: (B, units) to (B, units) over ``hidden`` units."""
    return nn.Sequential(nn.Linear(units, hidden), nn.ReLU(), nn.Linear(hidden, units), nn.ReLU())


def block2(units: int = 4, hidden: int = 8) -> nn.Sequential:
    """Four of ``block1`` one after the other, under the names block0 to block3: (B, units) to (B, units)."""
    return nn.Sequential(OrderedDict((f"block{index}", block1(units, hidden)) for index in range(4)))
