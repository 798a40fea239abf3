"""Tensors of one network in another: what fits is taken from a checkpoint, the rest starts as it would anyway."""

import os
from dataclasses import dataclass

from torch import nn

from lit_nn.checkpoint import CheckpointError, read_checkpoint

PREFIX = "net."  # of the network's tensors in a checkpoint


@dataclass(frozen=True)
class Transfer:
    """What became of every tensor.

    Attributes:
        source: The checkpoint.
        taken: {name: shape} of the tensors that were copied into the network.
        left: {name: why} of the network's tensors that stay as they were, and of the checkpoint's that found no place.
    """

    source: str
    taken: dict[str, tuple[int, ...]]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.taken)} tensors taken from {self.source}, {len(self.left)} not:"]
        lines += [f"  taken      {name} {shape}" for name, shape in self.taken.items()]
        lines += [f"  not taken  {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def init_from(net: nn.Module, checkpoint: str | os.PathLike[str]) -> Transfer:
    """Copy a checkpoint's parameters and buffers into a network wherever name and shape are the same.

    Transfer learning as in "Saving and loading models across devices and architectures", the PyTorch recipe
    "Warmstarting model using parameters from a different model": there ``strict=False`` skips what is missing in
    silence and fails on another shape; here both are skipped and said.

    Args:
        net: The network to change, of any kind.
        checkpoint: A ``.ckpt`` file of any network of this project.

    Returns:
        What was taken, what not and why; ``print`` shows it.

    Raises:
        CheckpointError: If the file is missing or damaged, or not one tensor fits.
    """
    saved = read_checkpoint(checkpoint)["state_dict"]
    offered = {name.removeprefix(PREFIX): tensor for name, tensor in saved.items() if name.startswith(PREFIX)}
    own = net.state_dict()
    fitting = {name: tensor for name, tensor in offered.items() if name in own and own[name].shape == tensor.shape}
    left = {name: "not in the checkpoint" for name in own if name not in offered}
    for name, tensor in offered.items():
        if name not in own:
            left[name] = "not in this network"
        elif name not in fitting:
            left[name] = f"{tuple(tensor.shape)} in the checkpoint, {tuple(own[name].shape)} in this network"
    if not fitting:
        raise CheckpointError(f"{checkpoint}: not one of its {len(offered)} tensors has the name and shape of one here")
    net.load_state_dict(fitting, strict=False)
    return Transfer(str(checkpoint), {name: tuple(tensor.shape) for name, tensor in fitting.items()}, left)
