"""Export of a checkpoint for use elsewhere: the same forward, pixels in, and checked before it is called done."""

import hashlib
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_modules import DataError
from lit_nn.callbacks import versions
from lit_nn.checkpoint import load_classifier, read_checkpoint
from lit_nn.classifier import LitClassifier
from lit_nn.commands import CommandParser, brief, command
from lit_nn.flags import UsageError
from lit_nn.models import BATCHES, METADATA, classifier_model, data_of, data_settings

RANDOM_IMAGES = 64  # where there are no real ones
CALIBRATION_IMAGES = 512  # training images from which int8 learns the ranges of the activations


class ExportError(Exception):
    """A checkpoint cannot be exported in a format, or what came out is not the same model; the message says why."""

    exit_status = 1


class Exported(nn.Module):
    """What an exported graph computes: pixels in, labelled probabilities out.

    Args:
        classifier: In eval mode.
    """

    def __init__(self, classifier: LitClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Classify uint8 (B, C, H, W): "logits" and "probabilities", float (B, num_classes) each."""
        logits = self.classifier(pixels)
        return {"logits": logits, "probabilities": logits.softmax(1)}


@dataclass(frozen=True)
class Trial:
    """Images to try an exported file on, and what the checkpoint says of them.

    Attributes:
        images: uint8 (N, C, H, W).
        labels: int64 (N,); None for random pixels.
        logits: Of the checkpoint, float32 (N, num_classes).
        calibration: Training images, uint8 (M, C, H, W); None where there is no data set.
        about: What the images are, for people.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    logits: NDArray[np.float32]
    calibration: NDArray[np.uint8] | None
    about: str

    def accuracy(self, logits: NDArray[np.float32]) -> float:
        """Share of the images of which ``logits`` name the right class; only where there are labels."""
        return float((logits.argmax(1) == self.labels).mean())


# --- the formats --------------------------------------------------------------------------------------------------


def write_onnx(classifier: LitClassifier, metadata: Mapping[str, str], path: Path) -> None:
    """Write one ONNX file: input "pixels", outputs "logits" and "probabilities", any batch size.

    Args:
        classifier: In eval mode.
        metadata: Goes into the file's metadata_props.
        path: Where it goes.

    Raises:
        Exception: Of any kind, if the network does things that no ONNX graph can hold.
    """
    program = torch.onnx.export(
        _graph(classifier),
        dynamo=True,
        external_data=False,
        input_names=["pixels"],
        output_names=["logits", "probabilities"],
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(metadata)
    program.save(path, external_data=False)


def write_torch_export(classifier: LitClassifier, metadata: Mapping[str, str], path: Path) -> None:
    """Write a program of torch.export, which runs without this project; arguments as in `write_onnx`."""
    torch.export.save(_graph(classifier), path, extra_files={METADATA: json.dumps(dict(metadata))})


def write_safetensors(classifier: LitClassifier, metadata: Mapping[str, str], path: Path) -> None:
    """Write all tensors and, as metadata, the arguments from which `LitClassifier` is built again."""
    from safetensors.torch import save

    # Clones, because the format refuses tensors that share memory.
    tensors = {name: tensor.clone().contiguous() for name, tensor in classifier.state_dict().items()}
    path.write_bytes(save(tensors, {**metadata, "hyper_parameters": json.dumps(dict(classifier.hparams))}))


def write_state_dict(classifier: LitClassifier, metadata: Mapping[str, str], path: Path) -> None:
    """Write the bare network's state_dict, with the names that the network's source has; it has no metadata."""
    torch.save({name: tensor.clone() for name, tensor in classifier.net.state_dict().items()}, path)


def _graph(classifier: LitClassifier) -> torch.export.ExportedProgram:
    # A batch of two, because torch.export takes the sizes 0 and 1 for constants.
    pixels = torch.zeros(2, *classifier.hparams["image_shape"], dtype=torch.uint8)
    return torch.export.export(Exported(classifier), (pixels,), dynamic_shapes=({0: torch.export.Dim("batch")},))


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        suffix: How the names of its files end.
        write: Writes a classifier, with metadata, to a path.
    """

    suffix: str
    write: Callable[[LitClassifier, Mapping[str, str], Path], None]


FORMATS = {
    "onnx": Format(".onnx", write_onnx),
    "torch_export": Format(".pt2", write_torch_export),
    "safetensors": Format(".safetensors", write_safetensors),
    "state_dict": Format(".pth", write_state_dict),
}
"""What a checkpoint can be exported to, by the name that ``--format`` takes."""


# --- the check ----------------------------------------------------------------------------------------------------


def run_again(path: Path, checkpoint: Path, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    """Load an exported file in a fresh process, by its own runtime, and run it on images.

    Args:
        path: The exported file.
        checkpoint: What it was exported from.
        images: uint8 (N, C, H, W).

    Returns:
        See `lit_nn.models.answer`.

    Raises:
        ExportError: If it cannot be loaded and run.
    """
    with TemporaryDirectory() as folder:
        pixels, results = Path(folder) / "images.npy", Path(folder) / "results.npz"
        np.save(pixels, images)
        program = "import sys; from lit_nn.models import answer; answer(*sys.argv[1:])"
        line = [sys.executable, "-c", program, *map(str, (path, pixels, results, checkpoint))]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise ExportError(
                f"{path.name} was written but cannot be loaded and run again: {reason}. No file was left."
            )
        with np.load(results, allow_pickle=False) as arrays:
            return dict(arrays)


def _compare(name: str, found: Mapping[str, NDArray[np.float32]], trial: Trial, tolerance: float) -> str:
    """Compare what an exported file gives with what the checkpoint gives.

    Args:
        name: The exported file, for messages.
        found: See `lit_nn.models.answer`.
        trial: The images, and the checkpoint's logits.
        tolerance: Largest difference of a logit that is allowed, relative to the largest logit.

    Returns:
        What was found, one line.

    Raises:
        ExportError: If they differ by more.
    """
    expected = trial.logits
    scale = float(np.abs(expected).max()) or 1.0
    shares = np.exp(expected - expected.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    difference = max(
        float(np.abs(logits - expected[: len(logits)]).max()) for key, logits in found.items() if key != "probabilities"
    )
    relative = max(difference / scale, float(np.abs(found["probabilities"] - shares).max()))
    if not relative <= tolerance:  # so that NaN is refused too
        raise ExportError(
            f"{name} is not the same model: its outputs differ by {relative:.1e} of the largest logit, "
            f"{tolerance:.1e} is allowed (--tolerance). No file was left."
        )
    sizes = ", ".join(map(str, BATCHES))
    line = f"largest difference of logits {difference:.1e}, relative {relative:.1e}, at batches of {sizes} and all"
    if trial.labels is not None:
        line += f"; accuracy {trial.accuracy(found['logits']):.2%}, checkpoint {trial.accuracy(expected):.2%}"
    return line


def trial_images(classifier: LitClassifier, data: dict[str, Any]) -> Trial:
    """Test images of the data set that a checkpoint was trained on, or random pixels where it is not at hand.

    Args:
        classifier: In eval mode.
        data: See `lit_nn.models.data_settings`.
    """
    model = classifier_model(classifier, data)
    labels: NDArray[np.int64] | None = None
    calibration: NDArray[np.uint8] | None = None
    try:
        source = data_of(model)
        tensors, targets, rows = source.split("test")
        images, labels = tensors[rows].numpy(), targets[rows].numpy()
        about = f"all {len(images):,} test images of {type(source).__name__}"
        tensors, _, rows = source.split("train")
        calibration = tensors[rows[torch.linspace(0, len(rows) - 1, min(len(rows), CALIBRATION_IMAGES)).long()]].numpy()
    except (DataError, UsageError) as error:
        random = np.random.default_rng(0)
        images = random.integers(0, 256, (RANDOM_IMAGES, *model.image_shape), dtype=np.uint8)
        reason = str(error).partition("\n")[0]
        about = f"{RANDOM_IMAGES} images of random pixels, so without accuracies ({reason})"
    return Trial(images, labels, model.run_all(images)[0], calibration, about)


# --- the command --------------------------------------------------------------------------------------------------


def _describe(checkpoint: Path, classifier: LitClassifier, data: dict[str, Any], trial: Trial) -> dict[str, str]:
    """What an exported file says of itself, all of it text; for ``data`` see `lit_nn.models.data_settings`."""
    channels, height, width = classifier.hparams["image_shape"]
    # Where the data lay is nobody's business; what else decides on the test part goes along.
    options = {name: value for name, value in data.get("options", {}).items() if name != "data_dir"}
    measured = trial.labels is not None
    accuracy = f"{trial.accuracy(trial.logits):.6f} on {trial.about}" if measured else "not measured"
    return {
        "format": "lit-nn 1",
        "class_names": json.dumps(classifier.hparams["class_names"]),
        "image_shape": json.dumps([channels, height, width]),
        "input": f"pixels: uint8 (batch, {channels}, {height}, {width}), 0..255, {'gray' if channels == 1 else 'RGB'}, "
        "as they are: scaling and normalisation are inside",
        "output": "logits and probabilities: float32 (batch, classes), in the order of class_names",
        "net": classifier.hparams["net"],
        "data": json.dumps({"class": data["class"], "options": options} if data else {}),
        "test_accuracy": accuracy,
        "checkpoint_sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "versions": json.dumps(versions()),
    }


def _export(checkpoint: Path, formats: Sequence[str], output: Path, tolerance: float, int8: bool) -> None:
    """Write files, each of which gets its name only after it was loaded again and found to give the same.

    Raises:
        ExportError: If something went wrong; the files that went well are there nevertheless.
    """
    classifier = load_classifier(checkpoint)
    data = data_settings(read_checkpoint(checkpoint))
    trial = trial_images(classifier, data)
    if not np.isfinite(trial.logits).all():
        raise ExportError(f"{checkpoint}: the network's logits are not finite, so there is nothing to compare")
    if int8 and trial.calibration is None:
        raise UsageError(f"--int8 needs the data set, to measure what it costs; here are only {trial.about}")
    metadata = _describe(checkpoint, classifier, data, trial)
    print(f"Exported files are tried on {trial.about}.")
    output.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    with TemporaryDirectory(prefix=".export-", dir=output.parent) as folder:  # the same disk: renaming is atomic there
        for name in formats:
            target = Path(f"{output}{FORMATS[name].suffix}")
            temporary = Path(folder) / target.name
            try:
                _write(name, classifier, metadata, temporary)
                found = _compare(target.name, run_again(temporary, checkpoint, trial.images), trial, tolerance)
                _give_name(temporary, target, found)
                if name == "onnx" and int8:
                    small = Path(folder) / f"{output.name}.int8.onnx"
                    _quantise(target, small, trial)
                    logits = run_again(small, checkpoint, trial.images)["logits"]
                    _give_name(small, target.with_name(small.name), _cost(logits, trial))
            except ExportError as error:
                failures.append(str(error))
    if failures:
        raise ExportError("\n".join(failures))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch and onnxruntime say about their own insides off the terminal."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _write(name: str, classifier: LitClassifier, metadata: Mapping[str, str], path: Path) -> None:
    """Write a file in a format, without what torch says about its own insides.

    Raises:
        ExportError: If the format cannot hold the network.
    """
    try:
        with _quiet():
            FORMATS[name].write(classifier, metadata, path)
    except OSError:
        raise
    except Exception as error:  # torch's exporters raise all kinds of things
        raise ExportError(
            f"net {classifier.hparams['net']} cannot be exported to {name}: {brief(error)}\n"
            "A graph cannot hold Python control flow that depends on the values in a batch; write it with torch.where, "
            "or give the network another way under torch.compiler.is_exporting(). The formats safetensors and "
            "state_dict take every network."
        ) from error


def _give_name(temporary: Path, target: Path, found: str) -> None:
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())  # else a power cut can leave the name on an empty file
    size = temporary.stat().st_size
    temporary.replace(target)
    print(f"{target}: {size:,} bytes; {found}")


def _quantise(source: Path, target: Path, trial: Trial) -> None:
    """Make an int8 model of an ONNX file: weights and activations of convolutions and linear layers.

    Static quantisation by onnxruntime, https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html,
    whose ranges come from training images.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    assert trial.calibration is not None
    parts = np.array_split(trial.calibration, max(1, len(trial.calibration) // 32))
    inputs = iter([{"pixels": images} for images in parts])

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            return next(inputs, None)

    with _quiet():  # it advises to optimise the graph first, which torch's exporter has done
        quantize_static(
            source,
            target,
            Reader(),
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )


def _cost(logits: NDArray[np.float32], trial: Trial) -> str:
    """What quantisation costs, one line; ``logits`` are those of the int8 model."""
    before, after = trial.accuracy(trial.logits), trial.accuracy(logits)
    return f"accuracy {after:.2%}, checkpoint {before:.2%}: {100 * (after - before):+.2f} points"


@command
def main(words: list[str]) -> None:
    """Export a checkpoint: ``python scripts/export.py``."""
    parser = CommandParser(
        "export", "Export a checkpoint for use elsewhere; each file is checked before it gets its name."
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CKPT", help="checkpoint of a run: RUN_DIR/checkpoints/best.ckpt"
    )
    parser.add_argument(
        "--format",
        default="onnx",
        choices=[*FORMATS, "all"],
        help="what to write [onnx]; a torch_export file (.pt2) is unpickled when it is opened, which can run code: "
        "open no stranger's",
    )
    parser.add_argument("--output", type=Path, help="name of the file; --format all adds the suffixes [that of CKPT]")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="difference of logits allowed, relative to the largest [1e-4]"
    )
    parser.add_argument("--int8", action="store_true", help="write OUTPUT.int8.onnx too, with 8-bit integers")
    options = parser.parse_args(words)
    formats = list(FORMATS) if options.format == "all" else [options.format]
    if options.int8 and "onnx" not in formats:
        raise UsageError(f"--int8 is a kind of ONNX: it goes with --format onnx or all, not {options.format}")
    if not options.tolerance >= 0:
        raise UsageError(f"--tolerance is {options.tolerance}; it must be 0 or more, for instance 1e-4")
    output = options.output or Path(os.path.splitext(options.checkpoint)[0])  # noqa: PTH122 ("." has no suffix)
    if output.suffix in {made.suffix for made in FORMATS.values()}:  # which may be left out
        if formats != [name for name in FORMATS if FORMATS[name].suffix == output.suffix]:
            raise UsageError(f"--output {output} does not fit --format: give it without the suffix {output.suffix}")
        output = output.with_suffix("")
    _export(options.checkpoint, formats, output, options.tolerance, options.int8)
