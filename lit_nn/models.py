"""A trained model in any of its files, opened by the runtime that the file is for; an .onnx without importing torch."""

import inspect
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lit_nn.choices import look_up
from lit_nn.commands import brief
from lit_nn.flags import UsageError

if TYPE_CHECKING:
    from data_modules import ImageDataModule
    from lit_nn.classifier import LitClassifier

METADATA = "metadata.json"  # the file inside a .pt2
MODEL_HELP = "a checkpoint (.ckpt) or an export (.onnx, .safetensors, .pt2); a stranger's .pt2 can run code"
BATCH = 128  # images that go through a model at once
BATCHES = (1, 2, 17)  # sizes at which an exported file is tried, besides that

Answer = tuple[NDArray[np.float32], NDArray[np.float32]]  # logits and probabilities, (B, num_classes) each


class ModelError(Exception):
    """A file is not a model of this project; the message says what is wrong with it."""

    exit_status = 1


@dataclass(frozen=True)
class Model:
    """A model that was opened.

    Attributes:
        class_names: Name of each class, in the order of the logits.
        image_shape: Channels, height and width of the images it takes.
        data: Data set it was trained on: its "class" and "options"; empty if it is not known.
        run: uint8 images (B, C, H, W) to logits and probabilities, float32 (B, num_classes) each.
    """

    class_names: list[str]
    image_shape: tuple[int, int, int]
    data: dict[str, Any]
    run: Callable[[NDArray[np.uint8]], Answer]

    def run_all(self, images: NDArray[np.uint8]) -> Answer:
        """Run any number of images, in batches that fit into memory.

        Args:
            images: uint8 (N, C, H, W), N at least 1.

        Returns:
            Logits and probabilities, float32 (N, num_classes) each.
        """
        answers = [self.run(images[rows]) for rows in batches(len(images))]
        return np.concatenate([logits for logits, _ in answers]), np.concatenate([share for _, share in answers])


def batches(count: int) -> Iterator[slice]:
    """Cut ``count`` rows into slices of `BATCH` and one of the rest."""
    for start in range(0, count, BATCH):
        yield slice(start, start + BATCH)


def best_of_run(path: str | os.PathLike[str]) -> str:
    """What to type instead of a run's folder, for a message: its best checkpoint; "" if ``path`` is no such folder."""
    best = Path(path, "checkpoints", "best.ckpt")
    return f". Did you mean {best}?" if best.is_file() else ""


def open_model(path: Path) -> Model:
    """Open a trained model.

    Args:
        path: A checkpoint (.ckpt), or what scripts/export.py made of one (.onnx, .pt2, .safetensors).

    Raises:
        UsageError: If the file is of another kind.
        ModelError: If it is missing, damaged, or was not made by this project.
    """
    if path.suffix not in OPENERS:
        raise UsageError(f"{path} is no model: a model's file ends in {', '.join(OPENERS)}{best_of_run(path)}")
    if not path.is_file():
        raise ModelError(f"{path}: no such file; a run keeps its checkpoints in RUN_DIR/checkpoints/*.ckpt")
    model = OPENERS[path.suffix](path)
    try:  # what a file says of itself can be anything
        logits, shares = model.run(np.zeros((1, *model.image_shape), np.uint8))
        if not logits.shape == shares.shape == (1, len(model.class_names)):
            raise ValueError(f"{len(model.class_names)} classes, logits of the shape {logits.shape}")
    except Exception as error:  # every runtime has errors of its own
        raise ModelError(f"{path}: does not do what it says of itself ({brief(error)})") from error
    return model


def answer(path: str, images: str, results: str, checkpoint: str) -> None:
    """Run an exported file on images, a few and all of them; `lit_nn.export` calls it in a process of its own.

    Args:
        path: The exported file.
        images: A .npy file, uint8 (N, C, H, W).
        results: An .npz file to write: "logits" and "probabilities" of all, float32 (N, num_classes), and "batch 17",
            logits of the first 17 given as one batch, and so on.
        checkpoint: The checkpoint; only for a state_dict (.pth), which does not say what network it belongs to.
    """
    model = _with_state_dict(path, checkpoint) if path.endswith(".pth") else open_model(Path(path))
    pixels = np.load(images)
    logits, probabilities = model.run_all(pixels)
    few = {f"batch {size}": model.run(pixels[:size])[0] for size in BATCHES}
    np.savez(results, logits=logits, probabilities=probabilities, **few)  # type: ignore[arg-type]  # names are free


def _with_state_dict(path: str, checkpoint: str) -> Model:
    import torch

    from lit_nn.checkpoint import load_classifier

    classifier = load_classifier(checkpoint)
    classifier.net.load_state_dict(torch.load(path, weights_only=True))
    return classifier_model(classifier, {})


def data_settings(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The data set that a checkpoint was trained on.

    Args:
        checkpoint: As `lit_nn.checkpoint.read_checkpoint` gives it.

    Returns:
        Its "class" and "options"; empty if the checkpoint does not say.
    """
    settings: Any = checkpoint.get("settings")
    try:
        options = {**settings["data"].get("init_args", {}), "seed": settings.get("seed_everything", 42)}
        return {"class": settings["data"]["class_path"].rpartition(".")[2], "options": options}
    except (AttributeError, KeyError, TypeError):
        return {}


def data_arguments(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the command line that choose the data set of a checkpoint, in its split and at its size.

    Args:
        checkpoint: As `lit_nn.checkpoint.read_checkpoint` gives it.

    Returns:
        "data" and "seed_everything", as in a YAML file; empty if it does not name a data set of this project.
    """
    from data_modules import DATA_MODULES

    settings = data_settings(checkpoint)
    data_class = next((cls for cls in DATA_MODULES.values() if cls.__name__ == settings.get("class")), None)
    if data_class is None:
        return {}
    options = {name: value for name, value in settings["options"].items() if name not in ("mirrors", "seed")}
    if "image_size" in inspect.signature(data_class).parameters:
        channels, height, _ = checkpoint["hyper_parameters"]["image_shape"]
        options |= {"image_size": height, "channels": channels}
    data = {"class_path": f"data_modules.{data_class.__name__}", "init_args": options}
    return {"data": data, "seed_everything": settings["options"]["seed"]}


def data_of(model: Model, name: str | None = None, data_dir: str | None = None) -> "ImageDataModule":
    """The data set to try a model on; nothing is downloaded before its ``prepare_data``.

    Args:
        model: The model.
        name: A data set as given to ``--data``; None for the one that the model was trained on.
        data_dir: Folder of the data set; None for the one that was trained from, if the model says so.

    Raises:
        UsageError: If there is no such data set, the model does not name its own, or it has other classes or images.
        DataError: If it is not on this machine or cannot be used.
    """
    from data_modules import DATA_MODULES, DataError

    options: dict[str, Any] = {}
    try:
        own = next((key for key, cls in DATA_MODULES.items() if cls.__name__ == model.data.get("class")), None)
        name = name or own
        if name is None:
            raise UsageError("the model does not name a data set of this project")
        if name == own:  # with its seed: another split would have training images in the test part
            options |= model.data.get("options", {})
            options.pop("mirrors", None)  # where to download from is not for a model's file to say
        data_class = look_up(DATA_MODULES, name, "data set")
        if "image_size" in inspect.signature(data_class).parameters:  # its pictures can be had in the model's size
            options |= {"image_size": model.image_shape[1], "channels": model.image_shape[0]}
        if data_dir is not None or "data_dir" in options:
            options["data_dir"] = str(data_dir or options["data_dir"])
        data = data_class(**options)
        sides = (list(data.class_names), model.class_names), (list(data.image_shape), list(model.image_shape))
    except (DataError, OSError):
        raise
    except Exception as error:  # what a file says of itself can be anything
        raise UsageError(f"{brief(error)}; choose a data set with --data and --data_dir") from error
    for what, (theirs, ours) in zip(("classes", "images of the shape"), sides, strict=True):
        if theirs != ours:
            raise UsageError(f"the model has the {what} {ours}, the data set {data_class.__name__} has {theirs}")
    return data


def _from_metadata(path: Path, metadata: Mapping[str, str], run: Callable[[NDArray[np.uint8]], Answer]) -> Model:
    try:
        names = [str(name) for name in json.loads(metadata["class_names"])]
        channels, height, width = json.loads(metadata["image_shape"])
        return Model(names, (channels, height, width), json.loads(metadata["data"]), run)
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(
            f"{path} does not say its classes and its image size: scripts/export.py did not make it"
        ) from error


def _open_onnx(path: Path) -> Model:
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)  # errors only
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        metadata = session.get_modelmeta().custom_metadata_map
    except Exception as error:  # onnxruntime's own kinds of errors have nothing else in common
        raise ModelError(f"{path}: damaged, or not an ONNX file at all ({brief(error)})") from error

    def run(images: NDArray[np.uint8]) -> Answer:
        logits, probabilities = session.run(["logits", "probabilities"], {"pixels": images})
        return logits, probabilities

    return _from_metadata(path, metadata, run)


def _open_program(path: Path) -> Model:
    import torch

    files = {METADATA: ""}
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not a zip archive")
        program = torch.export.load(path, extra_files=files).module()
        metadata = json.loads(files[METADATA] or "{}")
    except Exception as error:  # torch raises all kinds of things at damaged files
        raise ModelError(f"{path}: damaged, or not a program of torch.export at all ({brief(error)})") from error

    @torch.inference_mode()
    def run(images: NDArray[np.uint8]) -> Answer:
        answer = program(torch.from_numpy(np.ascontiguousarray(images)))
        return answer["logits"].numpy(), answer["probabilities"].numpy()

    return _from_metadata(path, metadata, run)


def _open_checkpoint(path: Path) -> Model:
    from lit_nn.checkpoint import load_classifier, read_checkpoint

    return classifier_model(load_classifier(path), data_settings(read_checkpoint(path)))


def _open_safetensors(path: Path) -> Model:
    from safetensors import safe_open

    from lit_nn.checkpoint import check_network
    from lit_nn.classifier import LitClassifier

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
        hyper_parameters = json.loads(metadata["hyper_parameters"])
        if misfit := check_network(hyper_parameters, tensors):
            raise ValueError(misfit)
        classifier = LitClassifier(**hyper_parameters)
        classifier.load_state_dict(tensors)
        return classifier_model(classifier, json.loads(metadata["data"]))
    except Exception as error:  # what a file says of itself can be anything
        raise ModelError(f"{path}: damaged, or not made by scripts/export.py ({brief(error)})") from error


def classifier_model(classifier: "LitClassifier", data: dict[str, Any]) -> Model:
    """A classifier as a `Model`.

    Args:
        classifier: It is put into eval mode, and stays on its device.
        data: See `Model`.
    """
    import torch

    classifier.eval()

    @torch.inference_mode()
    def run(images: NDArray[np.uint8]) -> Answer:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(classifier.device)
        logits = classifier(pixels).float().cpu()  # (B, num_classes)
        return logits.numpy(), logits.softmax(1).numpy()

    return Model(list(classifier.hparams["class_names"]), tuple(classifier.hparams["image_shape"]), data, run)


OPENERS: dict[str, Callable[[Path], Model]] = {
    ".ckpt": _open_checkpoint,
    ".onnx": _open_onnx,
    ".pt2": _open_program,
    ".safetensors": _open_safetensors,
}
"""How to open a model's file, by the end of its name."""
