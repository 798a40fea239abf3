"""Export of a checkpoint for use elsewhere: the same forward, pixels in, and checked before it is called done."""

import base64
import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from timeit import timeit
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_modules import ImageDataModule
from data_modules.errors import DataError
from data_modules.files import atomic_path
from lit_nn.checkpoint import versions
from lit_nn.errors import ModelError, UsageError, brief
from lit_nn.model import ImageClassifier
from lit_nn.trained.evaluate import Answers, answer_test_images, data_of
from lit_nn.trained.predict import METADATA, METADATA_FILE, classifier_model, open_model, open_onnx, quiet

RUNS = 21  # in which the speed of a file is measured
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")  # of npm's package onnxruntime-web


class Exported(nn.Module):
    """What an exported graph computes: pixels in, probabilities out."""

    def __init__(self, classifier: ImageClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Classify uint8 (B, C, H, W): "logits" and "probabilities", float (B, num_classes) each."""
        logits = self.classifier(pixels)
        return {"logits": logits, "probabilities": self.classifier.probabilities(logits)}


def _graph(classifier: ImageClassifier, metadata: Mapping[str, str]) -> torch.export.ExportedProgram:
    channels, height, width = classifier.image_shape
    sizes = {0: torch.export.Dim.DYNAMIC}
    if metadata.get("any_size") != "false":
        sizes |= dict.fromkeys((2, 3), torch.export.Dim.DYNAMIC)
        height, width = 7 * height // 5 + 3, 9 * width // 5 + 2  # an example that equals no size in the network
    pixels = torch.zeros(2, channels, height, width, dtype=torch.uint8)  # 2, because 0 and 1 would become constants
    return torch.export.export(Exported(classifier), (pixels,), dynamic_shapes=(sizes,))


def write_onnx(classifier: ImageClassifier, metadata: Mapping[str, str], path: Path) -> None:
    """Write one ONNX file: input "pixels", outputs "logits" and "probabilities", any batch size."""
    names = {0: "batch", 2: "height", 3: "width"} if metadata.get("any_size") != "false" else {0: "batch"}
    program = torch.onnx.export(
        _graph(classifier, metadata),
        input_names=["pixels"],
        output_names=["logits", "probabilities"],
        dynamic_shapes=(names,),
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(metadata)
    program.save(path, external_data=False)


def write_torch_export(classifier: ImageClassifier, metadata: Mapping[str, str], path: Path) -> None:
    """Write a program of torch.export, which runs without this project."""
    torch.export.save(_graph(classifier, metadata), path, extra_files={METADATA_FILE: json.dumps(metadata)})


def write_safetensors(classifier: ImageClassifier, metadata: Mapping[str, str], path: Path) -> None:
    """Write all tensors and, as metadata, the arguments from which the model is built again."""
    from safetensors.torch import save

    # Clones, because the format refuses tensors that share memory.
    tensors = {name: tensor.clone().contiguous() for name, tensor in classifier.state_dict().items()}
    path.write_bytes(save(tensors, {**metadata, "hyper_parameters": json.dumps(classifier.arguments)}))


def write_state_dict(classifier: ImageClassifier, metadata: Mapping[str, str], path: Path) -> None:
    """Write the bare network's state_dict, with the names that the network's source has; it has no metadata."""
    torch.save({name: tensor.clone() for name, tensor in classifier.net.state_dict().items()}, path)


FORMATS: dict[str, tuple[str, Callable[[ImageClassifier, Mapping[str, str], Path], None]]] = {
    "onnx": (".onnx", write_onnx),
    "torch_export": (".pt2", write_torch_export),
    "safetensors": (".safetensors", write_safetensors),
    "state_dict": (".pth", write_state_dict),
}


class Export:
    """A checkpoint (.ckpt) that is written to other formats, each file checked before it gets its name."""

    def __init__(self, checkpoint: Path, any_size: bool = True) -> None:
        model = open_model(checkpoint)
        if model.classifier is None:
            raise UsageError(f"{checkpoint} is an export already; give the checkpoint (.ckpt) that it is of")
        self.classifier = model.classifier
        self.data: ImageDataModule | None = None
        try:
            data = data_of(model)
            self.expected, self.data = answer_test_images(model, data), data  # what files are compared with
            self.about = f"all {len(self.expected.labels):,} test images of {type(data).__name__}"
        except (DataError, UsageError) as error:
            noise = np.random.default_rng(0).integers(0, 256, (64, *model.image_shape), np.uint8)
            self.expected = Answers(model.class_names, noise, np.zeros(64, np.int64), *model.run(noise))
            self.about = f"64 images of random pixels, so without accuracies ({brief(error)})"
        images: Any = self.expected.images
        channels, height, width = model.image_shape
        few = [images[np.arange(count) % len(images)] for count in (1, 2, 17)]
        few += [np.random.default_rng(0).integers(0, 256, (1, channels, 61, 37), np.uint8)] if any_size else []
        self.batches = [images, *few]
        self.answers = [(self.expected.logits, self.expected.probabilities), *map(model.run, few)]
        size, colours = "height, width" if any_size else f"{height}, {width}", "gray" if channels == 1 else "RGB"
        # Where the data lay is nobody's business; what else decides on the test part goes along.
        options = {name: value for name, value in model.data.get("options", {}).items() if name != "data_dir"}
        options |= {"table": Path(options["table"]).name} if "table" in options else {}
        raw = {name: (part.shape, part.astype("<i8").tobytes()) for name, part in model.parts.items()}
        facts = model._replace(any_size=any_size, data=model.data and {**model.data, "options": options})._asdict()
        facts["parts"] = {name: (shape, base64.b64encode(data).decode()) for name, (shape, data) in raw.items()}
        self.metadata = {
            **{name: json.dumps(facts[name]) for name in METADATA},
            "format": "lit-nn 1",
            "input": f"pixels: uint8 (batch, {channels}, {size}), 0..255, {colours}, not scaled, not normalised",
            "output": "logits and probabilities: float32 (batch, classes), in the order of class_names",
            "net": self.classifier.net_name,
            "test_accuracy": f"{self.expected.accuracy:.6f} on {self.about}" if self.data else "not measured",
            "checkpoint_sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
            "versions": json.dumps(versions()),
        }

    def write(self, name: str, target: Path, tolerance: float = 1e-4) -> str:
        """Write "int8" or one of `FORMATS`, load it again by its own runtime, compare; returns what was found.

        ``target`` is replaced only if nothing differs by more than ``tolerance`` of the largest logit, else ModelError.
        """
        if name == "int8" and self.data is None:
            raise UsageError(f"--int8 needs the data set, to measure what it costs; here are only {self.about}")
        with atomic_path(target) as part:
            try:
                with quiet():
                    writer = self._write_int8 if name == "int8" else FORMATS[name][1]
                    writer(self.classifier, self.metadata, part)
                if name == "state_dict":  # which does not say what network it belongs to
                    classifier = copy.deepcopy(self.classifier)
                    classifier.net.load_state_dict(torch.load(part, weights_only=True))
                model = classifier_model(classifier) if name == "state_dict" else open_model(part)
                answers = [model.run(images) for images in self.batches]
            except Exception as error:  # torch's exporters and the runtimes raise all kinds of things
                raise ModelError(
                    f"net {self.classifier.net_name} cannot be exported to {name}, loaded again and run: {brief(error)}"
                    "\nA graph cannot hold Python control flow that depends on values: docs/add_a_network.md"
                ) from error
            scales = np.abs(self.expected.logits).max() or 1, 1  # of logits and probabilities
            differences = [
                np.abs(one - other).max() / scale
                for pair in zip(answers, self.answers, strict=True)
                for one, other, scale in zip(*pair, scales, strict=True)
            ]
            largest = np.max(differences)  # which keeps NaN
            if not largest <= tolerance and name != "int8":
                raise ModelError(
                    f"{target.name} is not the same model: its outputs differ by {largest:.1e} of the largest logit, "
                    f"{tolerance:.1e} is allowed (--tolerance). No file was left."
                )
            accuracy = self.expected._replace(logits=answers[0][0]).accuracy
            scores = f"; accuracy {accuracy:.2%}, checkpoint {self.expected.accuracy:.2%}" if self.data else ""
            scores += f"\n{self._compare_speed(part, self.expected.accuracy - accuracy)}" if name == "int8" else ""
            found = f"{part.stat().st_size:,} bytes; largest difference {largest:.1e} of the largest logit"
            return f"{target}: {found}, at batches of 1, 2, 17 and all{scores}"

    def _write_int8(self, classifier: ImageClassifier, metadata: Mapping[str, str], path: Path) -> None:
        """Write an ONNX file with 8-bit integers; the ranges of activations come from training images."""
        from onnxruntime.quantization import QuantType, quantize_static

        write_onnx(classifier, metadata, path)
        self.floats = open_onnx(path, threads=1)
        assert self.data is not None
        images, _, rows = self.data.split("train")
        some = images[rows[torch.linspace(0, len(rows) - 1, 512).long()]].split(32)
        batches = iter([{"pixels": batch.numpy()} for batch in some])
        reader = SimpleNamespace(get_next=lambda: next(batches, None))
        layers, int8 = ["Conv", "Gemm", "MatMul"], QuantType.QInt8
        quantize_static(path, path, reader, op_types_to_quantize=layers, per_channel=True, weight_type=int8)

    def _compare_speed(self, path: Path, lost: float) -> str:
        """The times of an int8 file and of the same with floats, and which to take; ``lost`` is a share of accuracy."""
        models, said, gains = (self.floats, open_onnx(path, threads=1)), [], []
        for count, name in (1, "an image"), (8, "a batch of 8"):
            batch = self.expected.images[np.arange(count) % len(self.expected.images)]
            # In turn, so that other work slows both.
            times = [[timeit(partial(model.run, batch), number=1) for model in models] for _ in range(RUNS)]
            floats, integers = 1000 * np.median(times, 0)
            said.append(f"{name} takes {floats:.3g} ms with floats, {integers:.3g} ms with int8")
            gains.append(floats / integers)
        take = "int8" if min(gains) > 1.1 and lost < 0.01 else "the .onnx with floats"
        why = f"int8 is {min(gains):.2f} times as fast here, and its accuracy differs by {-100 * lost:+.2f} points"
        return f"{'; '.join(said)} (onnxruntime, 1 thread, medians of {RUNS} runs in turn)\nTake {take}: {why}"


def write_web(folder: Path, runtime: Path) -> None:
    """Put the page of scripts/serve.py, in which the browser runs the model, and the runtime beside a model.onnx."""
    model, place = open_model(folder / "model.onnx"), "const WEB = null;"
    facts = {"class_names": model.class_names, "threshold": model.threshold}
    said = json.dumps(facts).replace("<", "\\u003c")  # a class may be called </script>
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    assert place in page
    for name in RUNTIME:
        with atomic_path(folder / name) as part:
            shutil.copyfile(runtime / name, part)
    with atomic_path(folder / "index.html") as part:
        part.write_text(page.replace(place, f"const WEB = {said};"), encoding="utf-8")
