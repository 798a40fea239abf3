"""Ways to start a network's weights, by name, after "Dive into Deep Learning" and ``torch.nn.init``."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lit_nn.errors import look_up

LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d)


def _tutorial_uniform(weight: Tensor) -> None:
    nn.init.uniform_(weight, -10, 10)
    weight *= weight.abs() >= 5


INITS: dict[str, Callable[[Tensor], object]] = {
    "default": lambda weight: None,  # what torch has chosen: uniform within 1 / sqrt(inputs), for weight and bias
    "normal": partial(nn.init.normal_, std=0.02),  # PyTorch tutorial "DCGAN"
    "uniform": partial(nn.init.uniform_, a=-0.1, b=0.1),  # PyTorch example "word_language_model"
    # The variance of signal and gradient stays through linear layers (Glorot and Bengio 2010) ...
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    # ... and that of the signal through ReLU layers (He et al. 2015)
    "kaiming_uniform": partial(nn.init.kaiming_uniform_, nonlinearity="relu"),
    "kaiming_normal": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "orthogonal": nn.init.orthogonal_,  # rows (or columns) at right angles and of length 1 (Saxe et al. 2013)
    "constant": nn.init.ones_,  # shows why weights start at random: all units of a layer stay equal
    "tutorial_normal": partial(nn.init.normal_, std=0.01),  # init_normal of Dive into Deep Learning
    "tutorial_uniform": _tutorial_uniform,  # my_init of the same: within 10, all under 5 set to zero
}
"""What becomes of a layer's weight, by name; biases start at zero, except with `BIAS_STAYS`."""

BIAS_STAYS = ("default", "tutorial_uniform")


def init_weights(net: nn.Module, name: str) -> None:
    """Start all `LAYERS` of a network, however deep they lie, in a way that ``INITS`` names; lazy ones need shapes."""
    init = look_up(INITS, name, "init")
    with torch.no_grad():
        for layer in (layer for layer in net.modules() if isinstance(layer, LAYERS)):
            init(layer.weight)
            if layer.bias is not None and name not in BIAS_STAYS:
                layer.bias.zero_()
