"""Checkpoints: written so that a complete file is always there, read as data: nothing that they name is run."""

import importlib.metadata
import os
import pickle
import zipfile
from collections import Counter
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from data_modules.files import atomic_path
from lit_nn import __version__
from lit_nn.errors import ModelError, brief
from lit_nn.model import ImageClassifier

CHECKPOINT_FORMAT = 1  # of what a checkpoint holds; raised when an older program could not read a newer one
PREFIX = "net."  # of the network's tensors in a checkpoint


class CheckpointError(ModelError):
    """A file is not a checkpoint of this project; the message says what is wrong with it."""


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; a process that is killed, or a full disk, leaves the file before it as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:  # torch.save puts an error of its own around that of the disk
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        before = "the file before it is unchanged" if path.exists() else "there is none from before"
        raise CheckpointError(f"{path} could not be saved ({cause.strerror}); {before}") from error


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the Trainer stored ("state_dict", "epoch", ...) as plain values on the CPU; CheckpointError if it is bad."""
    checkpoint = _read(path, is_ours=True)
    found = checkpoint if isinstance(checkpoint, dict) else {}
    if not all(isinstance(found.get(name), dict) for name in ("state_dict", "hyper_parameters")):
        raise CheckpointError(f"{path}: not a checkpoint of a LitClassifier")
    saved_as = found.get("format", CHECKPOINT_FORMAT)
    if not isinstance(saved_as, int) or saved_as > CHECKPOINT_FORMAT:
        raise CheckpointError(f"{path}: saved in format {saved_as}, newer than {CHECKPOINT_FORMAT}; update lit-nn")
    return found


def _read(path: str | os.PathLike[str], is_ours: bool) -> Any:
    """What a file holds, as plain values on the CPU; nothing that it names is run."""
    if not Path(path).is_file():
        best = Path(path, "checkpoints", "best.ckpt")
        hint = f". Did you mean {best}?" if best.is_file() else ""
        raise CheckpointError(f"{path}: no such file; a run keeps its checkpoints in RUN_DIR/checkpoints/*.ckpt{hint}")
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        if is_ours:
            with zipfile.ZipFile(path) as archive:  # torch.load itself does not compare the checksums
                if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                    raise ValueError("its records are compressed; torch.save writes none such")
                if damaged := archive.testzip():
                    raise ValueError(f"the checksum of its record {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: refused, it holds more than tensors and plain values") from error
    except Exception as error:  # damaged and hostile files provoke errors of all kinds
        raise CheckpointError(f"{path}: damaged, cut off, or not a checkpoint at all ({brief(error)})") from error


def load_classifier(path: str | os.PathLike[str], net: nn.Module | None = None) -> ImageClassifier:
    """Load a trained model from a checkpoint, with no other knowledge.

    Args:
        path: A ``.ckpt`` file.
        net: For a checkpoint of a network of one's own, which the project cannot build: an instance of it.

    Returns:
        The model on the CPU, in eval mode: uint8 images (B, C, H, W) in, logits (B, num_classes) out.

    Raises:
        CheckpointError: If the file is missing, damaged, or does not describe a network of this project.
    """
    return open_checkpoint(path, net)[1]


def open_checkpoint(
    path: str | os.PathLike[str], net: nn.Module | None = None
) -> tuple[dict[str, Any], ImageClassifier]:
    """What `read_checkpoint` reads and what `load_classifier` makes of it, of a file that is read once."""
    checkpoint = read_checkpoint(path)
    try:
        return checkpoint, build_model(checkpoint["hyper_parameters"], checkpoint["state_dict"], net)
    except ModelError as error:
        raise CheckpointError(f"{path}: {error}") from error


class _WithoutMemory(TorchFunctionMode):
    """Makes the tensors that layers are made of on the meta device, where a size is only a number.

    Not torch.device("meta"), which takes all tensors there: torchvision computes the widths of some networks with them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = {"device": "meta"} if func in (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn) else {}
        return func(*args, **{**(kwargs or {}), **device})


def build_model(
    hyper_parameters: dict[str, Any], state_dict: dict[str, Tensor], net: nn.Module | None = None
) -> ImageClassifier:
    """Build the model that hyper-parameters describe around the given tensors; `ModelError` if they do not fit.

    It is built without memory and takes the tensors as they are: no size that a file claims costs anything before it
    has been compared with a tensor that is there. Arguments of the training are passed over.
    """
    taken = {name: hyper_parameters[name] for name in signature(ImageClassifier).parameters if name in hyper_parameters}
    try:
        if net_args := taken.get("net_args"):
            taken["net_args"] = {k: v for k, v in net_args.items() if k != "freeze_backbone"}  # of older versions
        if (net_args or {}).get("weights") not in (None, "none"):
            raise ModelError("it asks for weights from elsewhere; a checkpoint has its own")
        if not all(isinstance(name, str) for name in taken["class_names"]):
            raise ModelError("class_names is not a list of names")
        if net is not None:
            taken["net"] = net
        with _WithoutMemory():
            model = ImageClassifier(**taken)
        if misfit := check_tensors(model, state_dict):
            raise ModelError(misfit)
        tensors = {name: state_dict[name].to(expected.dtype) for name, expected in model.state_dict().items()}
        model.load_state_dict(tensors, assign=True)
        if any(tensor.is_meta for tensor in model.buffers()):  # some of timm's compute tensors that no file holds
            model = ImageClassifier(**taken)
            model.load_state_dict(tensors)
        model.arrange_memory()
    except Exception as error:  # hyper-parameters can be anything
        hint = "(Of a network of your own: load_classifier(path, net=MyNet()))"
        raise ModelError(f"does not fit the networks of this project: {brief(error)}. {hint}") from error
    return model.eval()


def check_tensors(model: nn.Module, state_dict: dict[str, Tensor]) -> str:
    """The first thing in which tensors do not fit a model; "" if they do."""
    expected = model.state_dict()
    for name in (*expected, *state_dict):
        if name not in state_dict:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is no tensor of the network"
        found, wanted = state_dict[name], expected[name]
        if not isinstance(found, Tensor) or found.layout != torch.strided or found.is_meta:
            return f"{name} is not an ordinary tensor"
        if found.shape != wanted.shape:
            return f"{name} has the shape {tuple(found.shape)}, in the network it is {tuple(wanted.shape)}"
        if found.is_floating_point() != wanted.is_floating_point() or found.is_complex():
            return f"{name} holds {found.dtype}, in the network it is {wanted.dtype}"
    return ""


def versions() -> dict[str, str]:
    """Versions of this project and of the packages that decide its numbers."""
    packages = ("torch", "torchvision", "lightning", "torchmetrics", "numpy")
    return {"lit-nn": __version__} | {name: importlib.metadata.version(name) for name in packages}


def data_settings(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The data set that a checkpoint was trained on: its "class" and "options"; empty if it does not say."""
    settings: Any = checkpoint.get("settings")
    try:
        options = {**settings["data"].get("init_args", {}), "seed": settings.get("seed_everything", 42)}
        return {"class": settings["data"]["class_path"].rpartition(".")[2], "options": options}
    except (AttributeError, KeyError, TypeError):
        return {}


def load_weights(net: nn.Module, path: str | os.PathLike[str]) -> str:
    """Copy the tensors of anybody's file into a network wherever name and shape are the same; says what was not.

    What stands before all names ("module.", "model.", "net.") is found out. Raises CheckpointError if the file cannot
    be read or holds zeros, or fewer than half of the network's tensors have their like in it.
    """
    offered, own = _tensors_in(os.path.expanduser(path)), net.state_dict()  # noqa: PTH111 (without a home, too)
    known = {name.removeprefix(PREFIX): name for name in own} | {name: name for name in own}
    starts = Counter(
        name[:at] for name in offered for at, sign in enumerate(f".{name}") if sign == "." and name[at:] in known
    )
    start = max(starts, key=starts.__getitem__, default="")
    ends = {name[len(start) :]: tensor for name, tensor in offered.items() if name.startswith(start)}
    offered = {known.get(end, end): tensor for end, tensor in ends.items()}
    taken = {name: offered[name] for name in own if name in offered and own[name].shape == offered[name].shape}
    if 2 * len(taken) < sum(not name.endswith("num_batches_tracked") for name in own):
        found = f"of the {len(own)} tensors here, only {len(taken)} have the name and shape of one in the file"
        lacking = f"lacking is for instance {min(own.keys() - taken.keys())}"
        raise CheckpointError(f"{path} is of another network: {found}; {lacking}")
    weights = [tensor for tensor in taken.values() if tensor.ndim > 1]
    if not any(weight.any() for weight in weights) or not all(tensor.isfinite().all() for tensor in taken.values()):
        raise CheckpointError(f"{path} holds zeros or undefined numbers where the weights should be")
    net.load_state_dict(taken, strict=False)
    lines = [f"{len(taken)} of {len(own)} tensors taken from {path}"]
    for name in sorted((own.keys() | offered.keys()) - taken.keys()):
        there, here = (f"{tuple(tensors[name].shape)}" if name in tensors else "none" for tensors in (offered, own))
        lines.append(f"  not taken  {name}: {there} in the file, {here} in this network")
    return "\n".join([*lines[:11], *([f"  and {len(lines) - 11} more"] if len(lines) > 11 else [])])


def _tensors_in(path: str) -> dict[str, Tensor]:
    """All tensors of anybody's file of weights, by name."""
    found = _read(path, is_ours=False)
    while isinstance(found, dict) and not any(isinstance(value, Tensor) for value in found.values()):
        inner = [name for name in ("state_dict", "model_state_dict", "model") if isinstance(found.get(name), dict)]
        found = found[inner[0]] if inner else None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: it holds no weights by name, no state_dict")
    return {str(name): tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
