"""A trained model in use: any of our files opened, images in, names and probabilities out; an .onnx without torch."""

import base64
import ctypes
import io
import json
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_modules.errors import DataError
from data_modules.images.decode import ImageError, decoding_threads, mean_bytes, printable, read_file, read_image
from lit_nn.errors import ModelError, UsageError, brief, place

if TYPE_CHECKING:
    from lit_nn.model import ImageClassifier

FACTS = ("class_names", "image_shape", "levels", "fit", "temperature", "threshold", "multi_label")  # fields of Model
METADATA = (*FACTS, "any_size", "data", "parts")  # what exports hold as JSON, by name
METADATA_FILE = "metadata.json"  # inside a .pt2
BATCH, MOST = 128, 1 << 25  # images that go through a model at once, and bytes of their pixels
PER_PROCESS, SMALL_IMAGE = 1_000, 200_000  # files that are worth a process, and bytes of pixels that are soon sent
MODEL_HELP = "a checkpoint (.ckpt) or an export (.onnx, .safetensors, .pt2); a stranger's .pt2 can run code"

Pixels = NDArray[np.uint8]
Answer = tuple[NDArray[np.float32], NDArray[np.float32]]  # logits and probabilities, (N, num_classes) each
Run = Callable[[Pixels], Answer]
Files = list[tuple[str, str]]  # paths, each with "" or the reason why it cannot be read
Decoded = list[Pixels | str]  # of each file, or what is wrong with it


def energy(logits: NDArray[np.float32], temperature: float, several: bool = False) -> NDArray[np.float64]:
    """How unlike all training images images are, from their logits (N, K): -T log sum exp(logits / T), (N,).

    High where no class has a high logit; Liu et al., 2020, Energy-based out-of-distribution detection. Of several
    labels it is the sum of their energies, -T sum log(1 + exp(logits / T)); Wang et al., 2021.
    """
    scaled = logits.astype(np.float64) / temperature
    return -temperature * (np.logaddexp(0, scaled).sum(1) if several else np.logaddexp.reduce(scaled, 1))


def _no_overlay(_: Pixels) -> Pixels:
    raise UsageError("a heat map needs a checkpoint (.ckpt): an export gives answers only, and no gradients")


class Prediction(NamedTuple):
    """What an image shows, most probable class first; where an image may have several labels, all it has, or none."""

    labels: list[str]  # names of classes
    probabilities: list[float]  # of each, between 0 and 1
    sure: bool | None  # whether the first one reaches the threshold of the model; None where there may be several
    unlike: float = 0.0  # how unlike all training images it is: `energy`

    @property
    def label(self) -> str:
        """Name of the most probable class; "none" for an image without labels."""
        return self.labels[0] if self.labels else "none"

    @property
    def probability(self) -> float:
        """Probability of the most probable class; 0 for an image without labels."""
        return self.probabilities[0] if self.labels else 0.0

    @property
    def cells(self) -> dict[str, str]:
        """Labels and probabilities for a table, by the names of its columns."""
        cells, shares = dict[str, str](), [f"{share:.6f}" for share in self.probabilities]
        if self.sure is None:
            return {"labels": "|".join(self.labels) or "none", "probabilities": "|".join(shares)}
        for n, (label, share) in enumerate(zip(self.labels, shares, strict=True), 1):
            cells |= {f"label_{n}".removesuffix("_1"): label, f"probability_{n}".removesuffix("_1"): share}
        return cells

    @property
    def plain(self) -> dict[str, Any]:
        """All of it for JSON."""
        pairs = zip(self.labels, self.probabilities, strict=True)
        found = [{"label": label, "probability": round(share, 6)} for label, share in pairs]
        said = {"labels": self.labels} if self.sure is None else {"sure": self.sure}
        return {**said, "unlike": round(self.unlike, 4), "predictions": found}


class Model(NamedTuple):
    """A trained model, whatever file it comes from."""

    class_names: list[str]  # in the order of the logits
    image_shape: tuple[int, int, int]  # channels, height and width of the images it was trained on
    levels: int  # largest gray level of 16-bit files, which becomes 255 when a file is read
    fit: str  # how images of other sizes become such images
    temperature: float  # by which logits are divided before they become probabilities
    threshold: Any  # probability below which it is not sure; or a list of those from which on it says each label
    multi_label: bool  # whether it may give an image several labels, or none
    run_batch: Run
    any_size: bool = True  # whether it fits images itself, or takes those of its size only
    data: dict[str, Any] = {}  # "class" and "options" of the data set it was trained on; empty if it is not known
    parts: dict[str, NDArray[np.int64]] = {}  # what its run remembers of its data; empty if it is not known
    overlay: Callable[[Pixels], Pixels] = _no_overlay  # one image (C, H, W) under its heat map, (*image_shape[1:], 3)
    classifier: "ImageClassifier | None" = None  # of a checkpoint

    def run(self, images: Pixels) -> Answer:
        """Logits and probabilities of pixels 0..255, uint8 (N, C, H, W), in batches that fit into memory; N > 0."""
        size = images_at_once(math.prod(images.shape[1:]))
        answers = [self.run_batch(images[start : start + size]) for start in range(0, len(images), size)]
        logits, probabilities = zip(*answers, strict=True)
        return np.concatenate(logits), np.concatenate(probabilities)

    def judge(self, images: Sequence[Any]) -> list[Any]:
        """Probabilities (num_classes,) and `energy` of each image (C, H, W), of any size; what is none stays itself."""
        found, rows_of = list(images), dict[Any, list[int]]()
        for row, image in enumerate(images):
            if isinstance(image, np.ndarray):
                rows_of.setdefault(image.shape, []).append(row)
        for rows in rows_of.values():  # images of one size go through together
            logits, probabilities = self.run(np.stack([images[row] for row in rows]))
            scores = energy(logits, self.temperature, self.multi_label).tolist()
            for row, *judged in zip(rows, probabilities, scores, strict=True):
                found[row] = judged
        return found

    def read(
        self, shares: NDArray[np.float32], top_k: int = 1, threshold: Any = None, unlike: float = 0.0
    ) -> Prediction:
        """What the probabilities of an image say, (num_classes,): its ``top_k`` most probable classes.

        Where it may have several labels, they are all that reach their thresholds, whatever ``top_k`` is.
        """
        top_k, least = min(top_k, len(shares)), np.array(self.threshold if threshold is None else threshold)
        # To sort all of many classes takes longer than all the rest.
        best = shares.argmax(0, keepdims=True) if top_k == 1 else np.argpartition(-shares, top_k - 1)[:top_k]
        order = np.flatnonzero(shares >= least) if self.multi_label else best
        if len(order) > 1:
            order = order[np.lexsort((order, -shares[order]))]
        sure = None if self.multi_label else bool(least < 1 and shares[order[0]] >= least)
        return Prediction([self.class_names[label] for label in order], shares[order].tolist(), sure, unlike)

    def pixels(self, image: Any) -> Pixels:
        """One image of any kind, decoded as in training, (C, H, W) of its own size."""
        channels, *size = self.image_shape
        if not isinstance(image, str | os.PathLike | Image.Image):
            array = np.asarray(image.cpu() if hasattr(image, "cpu") else image)
            if array.dtype != np.uint8:
                raise UsageError(f"pixels are {array.dtype}; pass them as uint8, 0..255: the model scales them")
            if array.shape == self.image_shape:
                return array
            if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
                raise UsageError(f"pixels have the shape {array.shape}, not {self.image_shape}, (H, W), (H, W, 3 or 4)")
            image = Image.fromarray(array)
        if channels not in (1, 3):
            raise UsageError(f"the model takes {self.image_shape}; files become images of 1 or 3 channels only")
        if isinstance(image, Image.Image):
            # Reading may turn an image, hence the copy; a TIFF turns itself, and a copy of it would lose its tags.
            pixels = read_image(image if hasattr(image, "tag_v2") else image.copy(), channels, self.levels)
        else:
            pixels = read_file(os.fspath(image), channels, self.levels, (size[0], size[1]))
        if not self.any_size and pixels.shape != self.image_shape:
            raise UsageError(
                f"this export takes images of {size[1]} x {size[0]} pixels only, and here is one of "
                f"{pixels.shape[2]} x {pixels.shape[1]}; export the checkpoint again without --input fixed"
            )
        return pixels


def images_at_once(pixels: int) -> int:
    """How many images of so many bytes go through a model together: fewer, where they are large."""
    return max(1, min(BATCH, MOST // max(pixels, 1)))


def open_model(path: str | os.PathLike[str]) -> Model:
    """Open a checkpoint (.ckpt), or what scripts/export.py made of one (.onnx, .pt2, .safetensors).

    Raises UsageError if the file is of another kind, ModelError if it is missing, damaged or not made by this project.
    """
    path = Path(path)
    if path.suffix not in OPENERS:
        hint = f". Did you mean {best}?" if (best := path / "checkpoints" / "best.ckpt").is_file() else ""
        raise UsageError(f"{path} is no model: a model's file ends in {', '.join(OPENERS)}{hint}")
    if not path.is_file():
        raise ModelError(f"{path}: no such file; a run keeps its checkpoints in RUN_DIR/checkpoints/*.ckpt")
    try:  # what a file says of itself can be anything, and every runtime has errors of its own
        model = OPENERS[path.suffix](path)
        if np.prod(model.image_shape) > 1 << 26:
            raise ValueError(f"it takes images of the shape {model.image_shape}")
        logits, probabilities = model.run(np.zeros((1, *model.image_shape), np.uint8))
        if not logits.shape == probabilities.shape == (1, len(model.class_names)):
            raise ValueError(f"{len(model.class_names)} classes, logits of the shape {logits.shape}")
    except Exception as error:
        if path.suffix == ".ckpt" and isinstance(error, ModelError):
            raise  # it names the file
        reason = f"{brief(error)}, {place(error)}" if path.suffix == ".ckpt" else brief(error)  # in anybody's network
        raise ModelError(f"{path}: damaged, or not made by scripts/export.py ({reason})") from error
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what torch and onnxruntime say about their own insides off the terminal; what matters is an exception."""
    with warnings.catch_warnings(action="ignore"):
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def keep_memory() -> None:
    """Let this process keep the memory that tensors free, for the next ones, up to 2 GB.

    glibc would give it back and ask for it again, page by page, at every layer. With the command of docs/photos.md,
    EfficientNet-Lite0 and ``--augment flip,brightness_contrast`` a step takes 0.75 s, not 0.90, and `Model.run` of
    128 images, in four views, 6.5 s, not 14.2 (medians of 3, alternating; two cores of an Intel Xeon).
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None:
        # What malloc.h calls M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD.
        for option, value in ((-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 1 << 26)):
            mallopt(option, value)


def open_onnx(path: Path, threads: int = 0) -> Model:
    """Open an .onnx, with as many threads as cores if ``threads`` is 0; `open_model` says what is wrong with a file."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)  # errors only
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # busy waiting would slow decoding
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    run: Run = lambda images: session.run(["logits", "probabilities"], {"pixels": images})  # noqa: E731
    any_size = isinstance(session.get_inputs()[0].shape[2], str)  # the name of a size that is free
    return _described(session.get_modelmeta().custom_metadata_map, run)._replace(any_size=any_size)


def _open_program(path: Path) -> Model:
    import torch

    files = {METADATA_FILE: ""}
    with quiet():
        program = torch.export.load(path, extra_files=files).module()

    @torch.inference_mode()
    def run(images: Pixels) -> Answer:
        answer = program(torch.from_numpy(images))
        return answer["logits"].numpy(), answer["probabilities"].numpy()

    return _described(json.loads(files[METADATA_FILE]), run)


def _open_checkpoint(path: Path) -> Model:
    from lit_nn.checkpoint import data_settings, open_checkpoint

    checkpoint, classifier = open_checkpoint(path)
    parts = {name: part.numpy() for name, part in checkpoint.get("parts", {}).items()}
    return classifier_model(classifier)._replace(data=data_settings(checkpoint), parts=parts)


def _open_safetensors(path: Path) -> Model:
    from safetensors import safe_open

    from lit_nn.checkpoint import build_model

    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
    model = classifier_model(build_model(json.loads(metadata["hyper_parameters"]), tensors))
    return _described(metadata, model.run_batch)._replace(any_size=True)


OPENERS = {".ckpt": _open_checkpoint, ".onnx": open_onnx, ".pt2": _open_program, ".safetensors": _open_safetensors}


def classifier_model(classifier: "ImageClassifier") -> Model:
    """A classifier as a `Model`, on the device where it is."""
    import torch

    def show(image: Pixels) -> Pixels:
        from lit_nn.trained.explain import overlay

        return overlay(classifier, image)

    @torch.inference_mode()
    def run(images: Pixels) -> Answer:
        was_training = classifier.training
        logits = classifier.eval()(torch.from_numpy(images).to(classifier.mean.device)).float().cpu()  # (B, K)
        classifier.train(was_training)
        return logits.numpy(), classifier.probabilities(logits).numpy()

    keep_memory()
    facts = {name: getattr(classifier, name) for name in FACTS if name != "levels"}
    return Model(**facts, levels=classifier.arguments["levels"], run_batch=run, overlay=show, classifier=classifier)


def data_uri(pixels: Pixels) -> str:
    """An image (H, W, 3) as an address that holds it, for pages."""
    Image.fromarray(pixels).save(file := io.BytesIO(), "WebP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _described(metadata: Mapping[str, str], run: Run) -> Model:
    """The model that an export says it is, which can be anything."""
    said: dict[str, Any] = {"levels": 65535, "fit": "crop", "temperature": 1, "threshold": 0, "parts": {}}
    said |= {"multi_label": False, "any_size": False}  # as in older ones, which lack some
    said |= {name: json.loads(metadata[name]) for name in METADATA if name in metadata}
    (channels, height, width), names = said["image_shape"], [*map(str, said["class_names"])]
    several, threshold = said["multi_label"] is True, np.array(said["threshold"], float)
    is_right = threshold.shape == ((len(names),) if several else ()) and ((threshold >= 0) & (threshold <= 1)).all()
    if not (is_right and said["temperature"] > 0):
        raise ValueError(f"temperature {said['temperature']}, threshold {said['threshold']}")
    parts = {
        str(name): np.frombuffer(base64.b64decode(text, validate=True), "<i8").reshape(shape)
        for name, (shape, text) in said["parts"].items()
    }
    data = said["data"] if isinstance(said["data"], dict) else {}
    said |= {"class_names": names, "image_shape": (channels, height, width), "levels": int(said["levels"])}
    said |= {"threshold": threshold.tolist(), "multi_label": several, "data": data, "parts": parts}
    return Model(**said, run_batch=run)


def predict(model: "ImageClassifier | Model", images: Any, top_k: int = 1) -> list[Prediction]:
    """Classify images, in eval mode and without gradients, on the device where the model is.

    Args:
        model: A classifier, or what `open_model` opened.
        images: An image, a list or a batch of them: path of a file, PIL image, or uint8 array or tensor, (H, W) gray,
            (H, W, 3) RGB or (H, W, 4) with transparency, of any size: the model itself makes them what it was trained
            on (large JPEGs may differ by a level from arrays: files are decoded at a fraction of their size). Or pixels
            (C, H, W) of the model's shape.
        top_k: How many classes to name for each image, if it can have one label only.

    Returns:
        A prediction for each image, in their order; a list also for a single one.

    Raises:
        ImageError: If a file cannot be read as an image; the message names the file.
        UsageError: If an array is neither an image nor pixels of the right shape, or is not uint8.
    """
    model = model if isinstance(model, Model) else classifier_model(model)
    pixels = []
    for image in images if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4 else [images]:
        try:
            pixels.append(model.pixels(image))
        except ImageError as error:
            raise ImageError(f"{printable(str(image))}: {error}") from error
    return [model.read(shares, top_k, unlike=unlike) for shares, unlike in model.judge(pixels)]


def predict_files(model: Model, files: Files, top_k: int = 1) -> Iterator[tuple[str, Pixels | str, Prediction | None]]:
    """Name, pixels or what is wrong, what is shown, of each file; what is wrong with it may be known already."""
    paths = [path for path, _ in files]
    threads, mean = decoding_threads(paths), mean_bytes(paths)
    size = max(threads, images_at_once(mean))
    batches = [files[start : start + size] for start in range(0, len(files), size)] or [[]]
    pipes = list[Connection]()
    if sys.platform == "linux" and threads == 1 and mean < SMALL_IMAGE:  # elsewhere a process imports everything again
        pipes = _start(min(len(os.sched_getaffinity(0)), 8, len(files) // PER_PROCESS), model, batches)
    decoded = _from_processes(pipes, len(batches)) if pipes else _from_threads(threads, model, batches)
    with closing(decoded):
        for batch, items in zip(batches, decoded, strict=True):
            for (path, _), item, judged in zip(batch, items, model.judge(items), strict=True):
                found = None if isinstance(item, str) else model.read(judged[0], top_k, unlike=judged[1])
                yield printable(path), item, found


def _decode(model: Model, file: tuple[str, str]) -> Pixels | str:
    """Pixels of a file, or what is wrong with it."""
    path, reason = file
    try:
        return reason or model.pixels(path)
    except ImageError as error:
        return str(error)


def _from_threads(threads: int, model: Model, batches: list[Files]) -> Generator[Decoded]:
    """Batches, decoded by threads, the next one while what came before is used."""
    with ThreadPoolExecutor(threads) as pool:
        coming = pool.map(partial(_decode, model), batches[0])
        for later in [*batches[1:], []]:
            items = list(coming)
            coming = pool.map(partial(_decode, model), later)
            yield items


def _start(count: int, model: Model, batches: list[Files]) -> list[Connection]:
    """Pipes from so many new processes, which decode the batches in turn; none if they would be one or cannot start."""
    context, pipes = get_context("fork"), list[Connection]()
    try:
        for number in range(count if count > 1 else 0):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (receiver, sender, model, batches[number::count])
            context.Process(target=_send, args=arguments, daemon=True).start()
            sender.close()  # the pipe ends with that process
            pipes.append(receiver)
    except (OSError, AssertionError):  # no more processes are allowed, or none here
        pipes.clear()  # which ends those that wait to send
    return pipes


def _send(receiver: Connection, sender: Connection, model: Model, batches: list[Files]) -> None:
    """Decode batches in a process of its own, and send them, or the exception that one raises."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that receives them
    receiver.close()  # so that this one ends when that one has ended
    with suppress(BrokenPipeError):
        for batch in batches:
            try:
                sender.send([_decode(model, file) for file in batch])
            except UsageError as error:
                sender.send(error)


def _from_processes(pipes: list[Connection], count: int) -> Generator[Decoded]:
    """So many batches, from the processes of `_start`."""
    try:
        for number in range(count):
            items = pipes[number % len(pipes)].recv()
            if isinstance(items, UsageError):
                raise items
            yield items
    except (EOFError, OSError) as error:
        raise DataError("a process that decodes images was ended; is there enough memory?") from error
    finally:
        for pipe in pipes:
            pipe.close()
