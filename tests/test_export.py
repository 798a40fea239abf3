"""Every network in every format gives what its checkpoint gives, and what does not is refused and leaves no file."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import Command, Patch, Said, script
from PIL import Image
from torch import Tensor, nn

from data_modules import FashionMNISTSample
from data_modules.images.fit import FITS
from lit_nn.checkpoint import load_classifier
from lit_nn.model import ImageClassifier
from lit_nn.nets import NETS
from lit_nn.trained import export
from lit_nn.trained.evaluate import data_of
from lit_nn.trained.export import FORMATS
from lit_nn.trained.predict import open_model

main = script("export")
PARTS = {"train": [[-(2**63), 5]], "test": [2**63 - 1]}


def save_checkpoint(path: Path, net: str = "lenet", arguments: Any = (), **values: Any) -> Path:
    """What a training would leave, without the training: random weights, and statistics that BatchNorm has seen."""
    torch.manual_seed(0)
    data = {name: getattr(FashionMNISTSample, name) for name in ("class_names", "image_shape", "mean", "std")}
    model = ImageClassifier(**{**data, "net": net, **dict(arguments)})
    for name, buffer in model.net.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            nn.init.uniform_(buffer, 0.5, 1.5)
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": model.arguments, **values}, path)
    return path


@pytest.mark.parametrize("net", [*NETS, "torchvision/resnet18"])
def test_every_network_in_every_format(net: str, tmp_path: Path, capfd: Said) -> None:
    path = save_checkpoint(tmp_path / "a.ckpt", net)  # random pixels: the whole test set takes large networks minutes
    assert main([str(path), "--format", "all", "--output", str(tmp_path / "out" / "model")]) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    assert "random pixels" in printed.out
    assert printed.out.count("at batches of 1, 2, 17 and all\n") == len(FORMATS)  # and no accuracies
    targets = {tmp_path / "out" / f"model{suffix}" for suffix, _ in FORMATS.values()}
    assert set((tmp_path / "out").iterdir()) == targets
    target = tmp_path / "out" / "model.onnx"
    assert target.stat().st_size < 1.5 * path.stat().st_size + 300_000  # the weights, once
    assert not [tensor for tensor in onnx.load(target).graph.initializer if tensor.external_data]


def test_the_command_itself(command: Command, tmp_path: Path) -> None:
    data = {"class_path": "data_modules.FashionMNISTSample", "init_args": {"data_dir": "/a/folder"}}
    settings, parts = {"seed_everything": 0, "data": data}, {name: torch.tensor(part) for name, part in PARTS.items()}
    path = save_checkpoint(tmp_path / "v1.2.ckpt", "lenet", {"levels": 4095}, settings=settings, parts=parts)
    done = command("scripts/export.py", path, "--format", "all", "--int8", timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    suffixes = (".ckpt", ".onnx", ".int8.onnx", ".pt2", ".safetensors", ".pth")
    assert {file.name for file in tmp_path.iterdir()} == {f"v1.2{suffix}" for suffix in suffixes}
    assert "all 1,000 test images" in done.stdout
    assert done.stdout.count("; accuracy") == 5
    times, advice = done.stdout.splitlines()[-2:]
    assert "(onnxruntime, 1 thread, medians of 21 runs in turn)" in times
    one, one_int8, batch, batch_int8 = (float(number) for number in re.findall(r"([\d.]+) ms", times))
    gain = float(re.findall(r"int8 is ([\d.]+) times as fast", advice)[0])
    assert gain == pytest.approx(min(one / one_int8, batch / batch_int8), rel=0.03)
    assert advice.startswith("Take int8" if gain > 1.1 else "Take the .onnx with floats")

    graph = onnx.load(tmp_path / "v1.2.onnx")
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(metadata["class_names"]) == FashionMNISTSample.class_names
    assert json.loads(metadata["versions"])["torch"] == torch.__version__.partition("+")[0]
    assert json.loads(metadata["data"]) == {"class": "FashionMNISTSample", "options": {"seed": 0}}  # not where it lay
    assert "uint8" in metadata["input"]
    assert metadata["checkpoint_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    sizes = [size.dim_param or size.dim_value for size in graph.graph.input[0].type.tensor_type.shape.dim]
    assert sizes == ["batch", 1, "height", "width"]
    net = NETS["lenet"](in_channels=1, num_classes=10)  # the bare network takes the .pth as it is
    net.load_state_dict(torch.load(tmp_path / "v1.2.pth", weights_only=True))
    images, labels, _ = FashionMNISTSample().split("test")
    for suffix in suffixes[:-1]:
        model = open_model(tmp_path / f"v1.2{suffix}")
        assert model.levels == 4095
        assert {name: part.tolist() for name, part in model.parts.items()} == PARTS
        assert isinstance(data_of(model), FashionMNISTSample)
        accuracy = float((model.run(images.numpy())[0].argmax(1) == labels.numpy()).mean())
        assert float(metadata["test_accuracy"].split()[0]) == pytest.approx(accuracy, abs=0.02 * (suffix[1:4] == "int"))


def of_the_batch(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The other images have a say, as in a BatchNorm that was left in training."""
    return logits - logits.mean(0), (logits - logits.mean(0)).softmax(1)


def no_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    return logits, logits.sigmoid()


WRONG = [("onnx", of_the_batch), ("onnx", no_softmax), ("torch_export", of_the_batch)]


@pytest.mark.parametrize(("name", "wrong"), [*WRONG, *((name, None) for name in FORMATS)])
def test_what_is_broken_or_another_model_is_refused(
    name: str, wrong: Any, tmp_path: Path, monkeypatch: Patch, capsys: Said
) -> None:
    suffix, write = FORMATS[name]

    def forward(exported: export.Exported, pixels: Tensor) -> dict[str, Tensor]:
        return dict(zip(("logits", "probabilities"), wrong(exported.classifier(pixels)), strict=True))

    def cut_off(classifier: ImageClassifier, metadata: Mapping[str, str], path: Path) -> None:
        write(classifier, metadata, path)
        path.write_bytes(path.read_bytes()[:-2000])

    if wrong:
        monkeypatch.setattr(export.Exported, "forward", forward)
    else:
        monkeypatch.setitem(FORMATS, name, (suffix, cut_off))
    path = save_checkpoint(tmp_path / "a.ckpt")
    (target := tmp_path / f"a{suffix}").write_text("an earlier export")
    assert main([str(path), "--format", name]) == 1
    refused = f"{target.name} is not the same model" if wrong else f"cannot be exported to {name}, loaded again and run"
    assert refused in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == {path, target}
    assert target.read_text() == "an earlier export"


class Depends(nn.Linear):
    """Control flow that depends on the batch."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        return super().forward(x / 100 if x.abs().max() > 100 else x)


def test_what_no_graph_can_hold_is_refused_and_the_others_are_written(
    tmp_path: Path, monkeypatch: Patch, capsys: Said
) -> None:
    monkeypatch.setitem(NETS, "depends", lambda in_channels, num_classes: Depends(in_channels, num_classes))
    path = save_checkpoint(tmp_path / "a.ckpt", "depends")
    assert main([str(path), "--format", "all"]) == 1
    error = capsys.readouterr().err
    for name in ("onnx", "torch_export"):
        assert f"net depends cannot be exported to {name}" in error
    assert "Python control flow" in error
    assert {file.name for file in tmp_path.iterdir()} == {"a.ckpt", "a.safetensors", "a.pth"}


EVERY = [pytest.param(net, fit, marks=[pytest.mark.slow] * (net != "lenet")) for net in NETS for fit in FITS]


@pytest.mark.parametrize(("net", "fit"), EVERY)
def test_images_of_every_size(net: str, fit: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "a.ckpt", net, {"fit": fit})
    assert main([str(path), "--format", "onnx"]) == main([str(path), "--format", "torch_export"]) == 0
    model, draw = load_classifier(path), np.random.default_rng(0)
    exports = [open_model(path.with_suffix(suffix)) for suffix in (".onnx", ".pt2")]
    for height, width in [(1, 1), (1, 60), (60, 1), (28, 28), (400, 3), *draw.integers(2, 200, (25, 2)).tolist()]:
        images = draw.integers(0, 256, (2, 1, height, width), np.uint8)
        with torch.no_grad():
            expected = model(torch.from_numpy(images)).numpy()
        for exported in exports:
            assert np.abs(exported.run(images)[0] - expected).max() <= 1e-4 * np.abs(expected).max(), (height, width)


def test_an_export_for_one_size_says_so(tmp_path: Path, capsys: Said) -> None:
    path = save_checkpoint(tmp_path / "one.ckpt")
    assert main([str(path), "--input", "fixed"]) == 0
    Image.new("L", (28, 28)).save(tmp_path / "same.png")
    Image.new("L", (30, 28)).save(tmp_path / "other.png")
    assert script("predict")([str(path.with_suffix(".onnx")), str(tmp_path / "same.png")]) == 0
    assert script("predict")([str(path.with_suffix(".onnx")), str(tmp_path / "other.png")]) == 2
    assert "takes images of 28 x 28 pixels only, and here is one of 30 x 28" in capsys.readouterr().err
