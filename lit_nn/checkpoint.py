"""Checkpoints: written so that a complete file is always there, read without running anything that they name."""

import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH

if TYPE_CHECKING:
    from lit_nn.classifier import LitClassifier


class CheckpointError(Exception):
    """A file is not a checkpoint of this project; the message says what is wrong with it."""

    exit_status = 1


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
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except OSError as error:
            raise OSError(f"{target} could not be saved ({error.strerror}); the file before it is unchanged") from error
        finally:
            temporary.unlink(missing_ok=True)

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


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint file as plain values, onto the CPU.

    Args:
        path: A ``.ckpt`` file.

    Returns:
        What the Trainer stored: among others "state_dict", "hyper_parameters", "epoch" and "global_step".

    Raises:
        CheckpointError: If there is no such file or it is no checkpoint of a LitClassifier.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file; a run keeps its checkpoints in RUN_DIR/checkpoints/*.ckpt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: refused, it is damaged or holds more than tensors and plain values") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: damaged, or not a checkpoint at all ({reason})") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "hyper_parameters"} <= checkpoint.keys():
        raise CheckpointError(f"{path}: not a checkpoint of a LitClassifier")
    return checkpoint


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
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: does not fit the networks of this project: {reason[:300]}") from error
    return classifier.eval()
