"""Ways to start a network's weights, by name.

After "Parameter Initialization" in Dive into Deep Learning and ``torch.nn.init``. Each function starts one layer; all
but ``default`` and ``tutorial_uniform`` set the bias to zero.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from lit_nn.choices import look_up

InitName = Literal[
    "default",
    "normal",
    "uniform",
    "xavier_uniform",
    "xavier_normal",
    "kaiming_uniform",
    "kaiming_normal",
    "orthogonal",
    "constant",
    "tutorial_normal",
    "tutorial_uniform",
]
Layer = nn.Linear | nn.Conv2d | nn.Conv3d
LAYERS: tuple[type, ...] = (nn.Linear, nn.Conv2d, nn.Conv3d)


def default(layer: Layer) -> None:
    """Leave what torch has chosen: uniform within 1 / sqrt(inputs), for weight and bias."""


def normal(layer: Layer) -> None:
    """Normal with standard deviation 0.02 (PyTorch tutorial "DCGAN")."""
    nn.init.normal_(layer.weight, std=0.02)
    _zero_bias(layer)


def uniform(layer: Layer) -> None:
    """Uniform within 0.1 (PyTorch example "word_language_model")."""
    nn.init.uniform_(layer.weight, -0.1, 0.1)
    _zero_bias(layer)


def xavier_uniform(layer: Layer) -> None:
    """Uniform, keeping the variance of signal and gradient through linear layers (Glorot and Bengio 2010)."""
    nn.init.xavier_uniform_(layer.weight)
    _zero_bias(layer)


def xavier_normal(layer: Layer) -> None:
    """Normal, keeping the variance of signal and gradient through linear layers (Glorot and Bengio 2010)."""
    nn.init.xavier_normal_(layer.weight)
    _zero_bias(layer)


def kaiming_uniform(layer: Layer) -> None:
    """Uniform, keeping the signal's variance through ReLU layers (He et al. 2015)."""
    nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    _zero_bias(layer)


def kaiming_normal(layer: Layer) -> None:
    """Normal, keeping the signal's variance through ReLU layers (He et al. 2015)."""
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    _zero_bias(layer)


def orthogonal(layer: Layer) -> None:
    """Rows (or columns) at right angles and of length 1 (Saxe et al. 2013)."""
    nn.init.orthogonal_(layer.weight)
    _zero_bias(layer)


def constant(layer: Layer) -> None:
    """All weights 1: shows why weights start at random, since all units of a layer stay equal."""
    nn.init.ones_(layer.weight)
    _zero_bias(layer)


def tutorial_normal(layer: Layer) -> None:
    """Normal with standard deviation 0.01 (``init_normal`` of Dive into Deep Learning)."""
    nn.init.normal_(layer.weight, std=0.01)
    _zero_bias(layer)


def tutorial_uniform(layer: Layer) -> None:
    """Uniform(-10, 10), with all under 5 in absolute value set to zero; the bias stays (``my_init`` of the same)."""
    nn.init.uniform_(layer.weight, -10, 10)
    with torch.no_grad():
        layer.weight *= layer.weight.abs() >= 5


INITS: dict[str, Callable[..., None]] = {
    "default": default,
    "normal": normal,
    "uniform": uniform,
    "xavier_uniform": xavier_uniform,
    "xavier_normal": xavier_normal,
    "kaiming_uniform": kaiming_uniform,
    "kaiming_normal": kaiming_normal,
    "orthogonal": orthogonal,
    "constant": constant,
    "tutorial_normal": tutorial_normal,
    "tutorial_uniform": tutorial_uniform,
}


def init_weights(net: nn.Module, name: str, layers: tuple[type, ...] = LAYERS) -> None:
    """Start all layers of the given kinds, however deep they lie in the network.

    Args:
        net: any module; its lazy layers must have their shapes already.
        name: a key of ``INITS``.
        layers: the kinds of layers to start, each with a weight and a bias or None; all others stay as they are.

    Raises:
        ValueError: no such name.
    """
    init = look_up(INITS, name, "init")
    for layer in net.modules():
        if isinstance(layer, layers):
            init(layer)


def _zero_bias(layer: Layer) -> None:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
