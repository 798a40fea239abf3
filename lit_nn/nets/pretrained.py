"""Every classification network of torchvision and timm, as ``torchvision/NAME`` and ``timm/NAME``.

Reached by these prefixes and not listed among ``NETS``. The libraries are imported inside the functions, because that
takes seconds which nobody else's start should wait for; timm is an extra.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_nn.errors import UsageError, brief, look_up

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
        name: One of `names_of` it.
        in_channels: Channels of the image, 1 or 3.
        image_size: (H, W) of the data's images in pixels.
        weights: "none"; "default" (the best) or a published tag such as "IMAGENET1K_V1" or "a1_in1k", which the library
            downloads; or the name of a file: then only size, mean and std are set for it.
        mean: Mean of each channel that the network is to be normalised with, if it is not the data's.
        std: Standard deviation, likewise.
        input_size: Side in pixels of the square that the network is given, if it is not the one of its weights:
            a smaller one is faster. Networks that are made for one size refuse it.

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
        weights: str | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        input_size: int | None = None,
    ) -> None:
        super().__init__()
        look_up(dict.fromkeys(names_of(library)), name, f"{library} network")
        if in_channels not in (1, 3):
            raise UsageError(f"net {library}/{name} takes images of 1 or 3 channels, not {in_channels}")
        build = _from_torchvision if library == "torchvision" else _from_timm
        tag = weights if weights and weights != "none" else ""
        is_file = tag.endswith(WEIGHT_FILES)
        tag, fetch = "default" if is_file else tag, bool(tag) and not is_file
        self.net, self.head_names, made = build(name, num_classes, image_size, tag, fetch)
        for layer in self.net.modules():
            if isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels:
                layer.forward = partial(_depthwise, layer.forward)  # type: ignore[method-assign]
        self.image_size: tuple[int, int] = (input_size, input_size) if input_size else made["image_size"]
        self.mean, self.std = mean or made.get("mean"), std or made.get("std")
        self.rebuild_args = {"image_size": list(self.image_size), "mean": self.mean, "std": self.std}
        self.rebuild_args |= {"input_size": input_size} if input_size else {}

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
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UsageError("net timm/NAME needs timm: pip install 'lit-nn[timm]', or pip install timm") from error
    return timm.list_models()


# A network, the names of its layers onto the classes, and "image_size", with weights also "mean" and "std".
Built = tuple[nn.Module, list[str], dict[str, Any]]


@contextmanager
def _had(name: str, source: str | None, where: str) -> Iterator[None]:
    """Say what to do where the weights of a network cannot be had from their source, if there is one."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: the file is not what its checksum says
        if source is None:
            raise
        ways = f"{where}, or give --weights FILE, or --weights none"
        raise OSError(f"the weights of {name} cannot be had from {source} ({brief(error)}). {ways}") from error


def _from_torchvision(name: str, num_classes: int, image_size: tuple[int, int], tag: str, fetch: bool) -> Built:
    from torchvision import models

    published, about = None, {"image_size": _least(name, image_size)}
    if tag:
        tags = models.get_model_weights(name).__members__
        known = look_up(tags, "DEFAULT" if tag == "default" else tag, f"weights of {name}")
        transform, published = known.transforms(), known if fetch else None
        about = {"image_size": (*transform.crop_size * 2,), "mean": transform.mean, "std": transform.std}
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # transform_input, which published weights turn on, is on without them as well: a checkpoint is rebuilt without.
        options = {"transform_input": True} | ({} if published else {"aux_logits": False, "init_weights": True})
    if name.startswith("vit"):
        options = {"image_size": about["image_size"][0]}
    url, folder = published and published.url, Path(torch.hub.get_dir()) / "checkpoints"
    with _had(f"torchvision/{name}", url, f"Put that file into {folder} as {str(url).rpartition('/')[2]}"):
        net = models.get_model(name, weights=published, **options)
    if name == "inception_v3":
        # No auxiliary output, so that forward returns a tensor in training too. torchvision refuses to leave it out
        # where weights are loaded; that of googlenet it takes away again by itself.
        net.aux_logits, net.AuxLogits = False, None
    # In every model the last linear or convolutional layer is the one onto the classes.
    head, last = [(n, layer) for n, layer in net.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))][-1]
    size: dict[str, Any] = {"kernel_size": last.kernel_size} if isinstance(last, nn.Conv2d) else {}
    net.set_submodule(head, type(last)(last.weight.shape[1], num_classes, **size, bias=last.bias is not None))
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
        height = width = min(height, width) // int(name[-2:]) * int(name[-2:])
    return (height, width)


def _from_timm(name: str, num_classes: int, image_size: tuple[int, int], tag: str, fetch: bool) -> Built:
    import timm

    if tag not in ("", "default"):
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
        name += f".{look_up(dict.fromkeys(tags), tag, f'weights of {name}')}"
    config = timm.get_pretrained_cfg(name).to_dict()  # type: ignore[union-attr]  # it has such a network
    about: dict[str, Any] = {"image_size": tuple(config["input_size"][1:])}
    if tag:
        about |= {"mean": list(config["mean"]), "std": list(config["std"])}
    elif not config.get("fixed_input_size"):
        least = (config.get("min_input_size") or (3, LEAST_SIDE, LEAST_SIDE))[1:]
        about["image_size"] = tuple(max(pair) for pair in zip(image_size, least, strict=True))
    source = (config.get("hf_hub_id") or config.get("url")) if fetch else None
    with _had(f"timm/{name}", source, "Download them elsewhere"):
        net = timm.create_model(name, pretrained=fetch, num_classes=num_classes)
    heads = [config["classifier"]] if isinstance(config["classifier"], str) else config["classifier"] or []
    for head in heads:  # some of timm's begin with weights so large for few classes that the first losses are above 4
        if isinstance(layer := net.get_submodule(head), nn.Linear):
            layer.reset_parameters()
    return net, [f"net.{head}" for head in heads], about
