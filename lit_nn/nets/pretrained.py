"""Every classification network of torchvision and timm, as ``torchvision/NAME`` and ``timm/NAME``.

Reached by these prefixes and not listed among ``NETS``. The libraries are imported inside the functions, because that
takes seconds which nobody else's start should wait for; timm is an extra.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_nn.errors import UsageError, look_up

WEIGHT_FILES = (".pth", ".pt", ".safetensors", ".ckpt")
"""How the name of a file ends that ``weights`` may name; `lit_nn.checkpoint.load_weights` reads it."""
# (H, W) at least, in pixels. Most networks shrink the image 32 times and pool globally what is left.
LEAST_SIDE = 32
LEAST_SIDES = {"alexnet": 63, "inception_v3": 75, "vit": 224}


class PretrainedNet(nn.Module):
    """A classification network of a library, with its last layer replaced for ``num_classes``.

    With weights, the network takes images of the size and with the mean and std that the weights were trained with.
    Without, it takes the data's own size, enlarged to the least that it can work on, and the data's mean and std. So
    training from nothing on small images is as fast as it can be, and fine-tuning sees what the weights know.

    One-channel images are repeated to three channels, with or without published weights: the first convolution stays
    as it was published, and one rule covers every architecture.

    Args:
        library: "torchvision" or "timm".
        name: As in ``torchvision.models.list_models(module=torchvision.models)`` or ``timm.list_models()``.
        in_channels: Channels of the image, 1 or 3.
        num_classes: Number of logits.
        image_size: (H, W) of the data's images in pixels.
        weights: "none"; "default" (the best) or a published tag such as "IMAGENET1K_V1" or "a1_in1k", which the library
            downloads; or the name of a file: then only size, mean and std are set for it.
        mean: Mean of each channel that the network is to be normalised with, if it is not the data's.
        std: Standard deviation, likewise.
        input_size: Side in pixels of the square that the network is given, if it is not the one of its weights:
            a smaller one is faster. Networks that are made for one size refuse it.

    Attributes:
        image_size: (H, W) in pixels that forward expects.
        head_names: Names of the layers onto the classes.
        rebuild_args: Arguments that make the same network without weights, for a checkpoint to save: loading it must
            not start a download, nor forget what the weights asked for.

    Raises:
        UsageError: If there is no such network or weights, or images have neither 1 nor 3 channels.
        OSError: If the weights could not be downloaded or read; the message says what to do.
    """

    def __init__(
        self,
        library: str,
        name: str,
        in_channels: int = 3,
        num_classes: int = 1000,
        image_size: tuple[int, int] = (224, 224),
        weights: str | None = "none",
        mean: list[float] | None = None,
        std: list[float] | None = None,
        input_size: int | None = None,
    ) -> None:
        super().__init__()
        look_up(dict.fromkeys(names_of(library)), name, f"{library} network")
        if in_channels not in (1, 3):
            raise UsageError(f"net {library}/{name} takes images of 1 or 3 channels, not {in_channels}")
        build = _from_torchvision if library == "torchvision" else _from_timm
        self.net, self.head_names, made = build(name, num_classes, image_size, weights or "none")
        for layer in self.net.modules():
            if isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels:
                layer.forward = partial(_depthwise, layer.forward)  # type: ignore[method-assign]
        self.image_size: tuple[int, int] = (input_size, input_size) if input_size else made["image_size"]
        self.mean, self.std = mean or made.get("mean"), std or made.get("std")
        self.rebuild_args = {"image_size": list(self.image_size), "mean": self.mean, "std": self.std}

    def forward(self, x: Tensor) -> Tensor:
        """Classify float images (B, in_channels, H, W): logits (B, num_classes)."""
        return self.net(x.expand(-1, 3, -1, -1))


def _depthwise(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A depthwise convolution; in training with bfloat16 on a CPU it works in float32.

    Its backward is 4 to 20 times as fast so, a training step of timm/tf_efficientnet_lite0 twice (1.21 s, 0.62 s for 16
    images of 224 x 224, median of 5, two cores of an Intel Xeon with AMX, torch 2.15.0).
    """
    if x.device.type != "cpu" or not (torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")):
        return forward(x)
    with torch.autocast("cpu", enabled=False):
        y = forward(x.float())  # (B, C, H, W)
    return y.to(torch.get_autocast_dtype("cpu"))


def names_of(library: str) -> list[str]:
    """Names of a library's classification networks."""
    if library == "torchvision":
        from torchvision import models

        return models.list_models(module=models)
    return _timm().list_models()


def _timm() -> Any:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UsageError("net timm/NAME needs timm: pip install 'lit-nn[timm]', or pip install timm") from error
    return timm


# A network, the names of its layers onto the classes, and "image_size", with weights also "mean" and "std".
Built = tuple[nn.Module, list[str], dict[str, Any]]


def _from_torchvision(name: str, num_classes: int, image_size: tuple[int, int], weights: str) -> Built:
    from torchvision import models

    published, about = None, {"image_size": _least(name, image_size)}
    if weights != "none":
        known = models.get_model_weights(name).__members__
        is_file = weights.endswith(WEIGHT_FILES)
        published = look_up(known, "DEFAULT" if is_file or weights == "default" else weights, f"weights of {name}")
        transform = published.transforms()
        about = {"image_size": (*transform.crop_size * 2,), "mean": transform.mean, "std": transform.std}
        published = None if is_file else published
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # transform_input, which published weights turn on, is on without them as well: a checkpoint is rebuilt without.
        options = {"transform_input": True}
        if published is None:
            options |= {"aux_logits": False, "init_weights": True}
    if name.startswith("vit"):
        options = {"image_size": about["image_size"][0]}
    try:
        net = models.get_model(name, weights=published, **options)
    except (OSError, RuntimeError) as error:  # RuntimeError: the file is not what its checksum says
        if published is None:
            raise
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise OSError(
            f"the weights of torchvision/{name} cannot be had from {published.url} ({error}). Put that file into"
            f" {folder} as {published.url.rpartition('/')[2]}, or give --weights FILE, or --weights none"
        ) from error
    if name == "inception_v3":
        # No auxiliary output, so that forward returns a tensor in training too. torchvision refuses to leave it out
        # where weights are loaded; that of googlenet it takes away again by itself.
        net.aux_logits, net.AuxLogits = False, None
    # In every model the last linear or convolutional layer is the one onto the classes.
    head, last = [(n, layer) for n, layer in net.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))][-1]
    bias = last.bias is not None
    if isinstance(last, nn.Conv2d):
        net.set_submodule(head, nn.Conv2d(last.in_channels, num_classes, last.kernel_size, bias=bias))  # type: ignore[arg-type]
    else:
        net.set_submodule(head, nn.Linear(last.in_features, num_classes, bias=bias))
    if name.startswith("squeezenet"):
        # In place of a ReLU after the last layer, with which logits were never negative.
        net.set_submodule("classifier.2", nn.Identity())
    return net, [f"net.{head}"], about


def _least(name: str, image_size: tuple[int, int]) -> tuple[int, int]:
    """Find the (H, W) in pixels that a network of torchvision can work on, nearest to that of the images."""
    if name.startswith("maxvit"):
        return (224, 224)  # its windows fit no other
    least = next((side for prefix, side in LEAST_SIDES.items() if name.startswith(prefix)), LEAST_SIDE)
    height, width = (max(least, side) for side in image_size)
    if name.startswith("vit"):  # a square of whole patches, whose side ends the name
        side = min(height, width) // int(name[-2:]) * int(name[-2:])
        return (side, side)
    return (height, width)


def _from_timm(name: str, num_classes: int, image_size: tuple[int, int], weights: str) -> Built:
    timm = _timm()
    is_file, tag = weights.endswith(WEIGHT_FILES), ""
    if weights not in ("none", "default") and not is_file:
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
        tag = f".{look_up(dict.fromkeys(tags), weights, f'weights of {name}')}"
    config = timm.get_pretrained_cfg(name + tag).to_dict()
    size, least = config["input_size"][1:], (config.get("min_input_size") or (3, LEAST_SIDE, LEAST_SIDE))[1:]
    about: dict[str, Any] = {"image_size": tuple(size)}
    if weights != "none":
        about |= {"mean": list(config["mean"]), "std": list(config["std"])}
    elif not config.get("fixed_input_size"):
        about["image_size"] = tuple(max(pair) for pair in zip(image_size, least, strict=True))
    try:
        net = timm.create_model(name + tag, pretrained=weights != "none" and not is_file, num_classes=num_classes)
    except (OSError, RuntimeError) as error:
        if weights == "none" or is_file:
            raise
        raise OSError(
            f"the weights of timm/{name} cannot be downloaded ({str(error).partition(chr(10))[0]}). Download "
            f"{config.get('hf_hub_id') or config.get('url')} elsewhere and give --weights FILE, or --weights none"
        ) from error
    found = config["classifier"] or []
    heads = [found] if isinstance(found, str) else found
    for head in heads:  # some of timm's begin with weights so large for few classes that the first losses are above 4
        if isinstance(layer := net.get_submodule(head), nn.Linear):
            layer.reset_parameters()
    return net, [f"net.{head}" for head in heads], about
