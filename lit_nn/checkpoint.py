"""Checkpoints: written so that a complete file is always there, read as data: nothing that they name is run."""

import contextlib
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lit_nn.commands import brief
from lit_nn.models import ModelError, best_of_run

if TYPE_CHECKING:
    from lit_nn.classifier import LitClassifier

CHECKPOINT_FORMAT = 1  # of what a checkpoint holds; raised when an older program could not read a newer one
UNFINISHED = ".tmp"  # how the name of a checkpoint ends while it is written
MOST_VALUES = 1_000_000  # in one checkpoint; a large network has some thousands


class CheckpointError(ModelError):
    """A file is not a checkpoint of this project; the message says what is wrong with it."""


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name and renames it when it is complete; reads plain values only.

    So a process that is killed, or a disk that is full, leaves the previous file as it was.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Args:
            checkpoint: Tensors and plain values.
            path: Where it goes; replaced if it exists.
            storage_options: Not used.

        Raises:
            OSError: If it cannot be written; a file that was at ``path`` is then unchanged.
        """
        with _complete_or_not_at_all(Path(path)) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: _PATH, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint as `read_checkpoint` does, whatever the arguments say.

        Args:
            path: The file.
            map_location: Not used: the tensors move to the device when they are copied into the model.
            weights_only: Not used: always true.
        """
        return read_checkpoint(path)


def copy_checkpoint(source: Path, target: Path) -> None:
    """Write the checkpoint ``source`` to ``target`` as well, in a fraction of the time that saving it again takes.

    Raises:
        OSError: If it cannot be written; a file that was at ``target`` is then unchanged.
    """
    with _complete_or_not_at_all(target) as file, source.open("rb") as saved:
        shutil.copyfileobj(saved, file, 1 << 20)


@contextlib.contextmanager
def _complete_or_not_at_all(target: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which becomes ``target`` when all of it is on the disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}{UNFINISHED}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except (OSError, RuntimeError) as error:  # torch.save puts an error of its own around that of the disk
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        before = "the file before it is unchanged" if target.exists() else "there is none from before"
        raise OSError(f"{target} could not be saved ({cause.strerror}); {before}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint file as plain values, onto the CPU.

    Args:
        path: A ``.ckpt`` file.

    Returns:
        What the Trainer stored: among others "state_dict", "hyper_parameters", "epoch" and "global_step".

    Raises:
        CheckpointError: If there is no such file, it is damaged, holds anything but tensors and plain values, was
            saved by a newer version, or does not fit the network that it names.
    """
    if not Path(path).is_file():
        raise CheckpointError(
            f"{path}: no such file; a run keeps its checkpoints in RUN_DIR/checkpoints/*.ckpt{best_of_run(path)}"
        )
    _check_archive(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: refused, it holds more than tensors and plain values") from error
    except Exception as error:  # damaged and hostile files provoke errors of all kinds
        raise CheckpointError(f"{path}: damaged, or not a checkpoint at all ({brief(error)})") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "hyper_parameters"} <= checkpoint.keys():
        raise CheckpointError(f"{path}: not a checkpoint of a LitClassifier")
    if refused := _not_plain(checkpoint, most_bytes=Path(path).stat().st_size):
        raise CheckpointError(f"{path}: refused, it holds {refused}")
    saved_as = checkpoint.get("format", CHECKPOINT_FORMAT)
    if not isinstance(saved_as, int) or saved_as > CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{path}: saved in format {saved_as}, this version of lit-nn reads up to {CHECKPOINT_FORMAT}; update it"
        )
    try:
        misfit = check_network(checkpoint["hyper_parameters"], checkpoint["state_dict"])
    except Exception as error:  # likewise
        misfit = brief(error)
    if misfit:
        raise CheckpointError(f"{path}: does not fit the networks of this project: {misfit}")
    return checkpoint


def _check_archive(path: str | os.PathLike[str]) -> None:
    """Look at the file as the zip archive that it should be; torch.load itself does not compare the checksums.

    Raises:
        CheckpointError: If it is none, or has records that are compressed (torch.save has none) or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise CheckpointError(f"{path}: refused, its records are compressed; torch.save writes none such")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged, cut off, or not a checkpoint at all ({brief(error)})") from error
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged, the checksum of its record {damaged} is wrong")


def _not_plain(checkpoint: dict[Any, Any], most_bytes: int) -> str | None:
    """What in a checkpoint is neither a tensor nor a plain value, or larger than the whole file; None if nothing."""
    values: list[Any] = [checkpoint]
    seen = 0
    while values:
        value = values.pop()
        seen += 1
        if seen > MOST_VALUES:  # a list that holds itself, or lists of lists of lists
            return f"more than {MOST_VALUES:,} values"
        if isinstance(value, dict):
            if wrong := [key for key in value if type(key) not in (str, int)]:
                return f"a name that is neither text nor a whole number: {wrong[0]!r}"
            values += value.values()
        elif isinstance(value, list | tuple | set):
            values += value
        elif isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
                return f"a tensor that is not an ordinary one ({value.layout}, {value.dtype}, {value.device})"
            if value.numel() * value.element_size() > most_bytes:
                return f"a tensor {tuple(value.shape)} that is larger than the file"
        elif not (value is None or isinstance(value, bool | int | float | str)):
            return f"a value of the type {type(value).__name__}"
    return None


class _WithoutMemory(TorchFunctionMode):
    """Makes the tensors that layers are made of on the meta device, where a size is only a number.

    Not torch.device("meta"), which takes all tensors there: torchvision computes the widths of some networks with them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = {"device": "meta"} if func in (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn) else {}
        return func(*args, **{**(kwargs or {}), **device})


def check_network(hyper_parameters: dict[str, Any], state_dict: dict[str, Tensor]) -> str | None:
    """Compare tensors with the network they are said to belong to, which is built without any memory for its weights.

    Args:
        hyper_parameters: Arguments of a LitClassifier.
        state_dict: Its tensors, by name.

    Returns:
        The first thing that does not fit; None if all does.

    Raises:
        Exception: Of any kind, if the hyper-parameters are not such arguments.
    """
    from inspect import signature

    from lit_nn.classifier import LitClassifier
    from lit_nn.nets import build_net

    taken = signature(LitClassifier).parameters
    for name in hyper_parameters:
        if name not in taken:
            return f"{name!r} among the hyper-parameters"
    class_names, net_args = hyper_parameters["class_names"], hyper_parameters.get("net_args")
    channels, height, width = shape = hyper_parameters["image_shape"]
    if not class_names or not all(isinstance(name, str) for name in class_names):
        return "class_names is not a list of names"
    if not all(isinstance(side, int) and side > 0 for side in shape):
        return f"image_shape is {shape}"
    if (net_args or {}).get("weights") is not None:
        return "it asks for weights from elsewhere; a checkpoint has its own"
    net_name = hyper_parameters.get("net", taken["net"].default)
    with _WithoutMemory():
        net = build_net(net_name, channels, len(class_names), (height, width), net_args)
    expected = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    expected |= {name: torch.empty(channels, 1, 1, device="meta") for name in ("mean", "std")}
    for name in (*expected, *state_dict):
        if name not in state_dict:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is no tensor of {net_name}"
        found, wanted = state_dict[name], expected[name]
        if not isinstance(found, Tensor):
            return f"{name} is no tensor"
        if found.shape != wanted.shape:
            return f"{name} has the shape {tuple(found.shape)}, in {net_name} it is {tuple(wanted.shape)}"
        if found.is_floating_point() != wanted.is_floating_point() or found.is_complex():
            return f"{name} holds {found.dtype}, in {net_name} it is {wanted.dtype}"
    return None


def load_classifier(path: str | os.PathLike[str]) -> "LitClassifier":
    """Load a trained classifier from a checkpoint, with no other knowledge.

    Args:
        path: A ``.ckpt`` file.

    Returns:
        The classifier on the CPU, in eval mode: uint8 images (B, C, H, W) in, logits (B, num_classes) out.

    Raises:
        CheckpointError: If the file is missing, damaged, or does not describe a network of this project.
    """
    from lit_nn.classifier import LitClassifier

    checkpoint = read_checkpoint(path)
    try:
        classifier = LitClassifier(**checkpoint["hyper_parameters"])
        classifier.load_state_dict(checkpoint["state_dict"])
    except Exception as error:  # likewise
        raise CheckpointError(f"{path}: does not fit the networks of this project: {brief(error)}") from error
    return classifier.eval()
