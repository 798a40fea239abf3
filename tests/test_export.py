"""Every network in every format gives what its checkpoint gives, and what does not is refused and leaves no file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import Command
from numpy.typing import NDArray
from torch import Tensor, nn

from data_modules import FashionMNISTSample
from lit_nn import LitClassifier, export, models, nets
from lit_nn.export import FORMATS, Trial, main
from lit_nn.nets import NETS

NAMES = [*NETS, "torchvision/resnet18"]
SETTINGS = {
    "seed_everything": 0,
    "data": {"class_path": "data_modules.FashionMNISTSample", "init_args": {"data_dir": "/a/folder"}},
}


def save_checkpoint(path: Path, net: str, net_args: dict[str, Any] | None = None, **options: Any) -> Path:
    """What a training would leave, without the training: random weights, and statistics that BatchNorm has seen."""
    torch.manual_seed(0)
    data = FashionMNISTSample
    classifier = LitClassifier(data.class_names, data.image_shape, data.mean, data.std, net, net_args)
    for layer in classifier.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            nn.init.uniform_(layer.running_mean, -0.1, 0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    checkpoint = {"state_dict": classifier.state_dict(), "hyper_parameters": dict(classifier.hparams), **options}
    torch.save(checkpoint, path)
    return path


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images, and the check within this process; the real one is shown once by the command."""
    whole = export.trial_images

    def few(classifier: LitClassifier, data: dict[str, Any]) -> Trial:
        trial = whole(classifier, data)
        assert trial.labels is not None
        return Trial(trial.images[:40], trial.labels[:40], trial.logits[:40], trial.calibration, trial.about)

    def here(path: Path, checkpoint: Path, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        pixels, results = path.with_name("images.npy"), path.with_name("results.npz")
        np.save(pixels, images)
        models.answer(str(path), str(pixels), str(results), str(checkpoint))
        with np.load(results) as arrays:
            return dict(arrays)

    monkeypatch.setattr(export, "trial_images", few)
    monkeypatch.setattr(export, "run_again", here)


@pytest.mark.parametrize("net", NAMES)
@pytest.mark.parametrize("name", FORMATS)
def test_every_network_in_every_format(
    net: str, name: str, fast: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_checkpoint(tmp_path / "a.ckpt", net, settings=SETTINGS)
    assert main([str(path), "--format", name, "--output", str(tmp_path / "out" / "model")]) == 0
    target = tmp_path / "out" / f"model{FORMATS[name].suffix}"
    assert list((tmp_path / "out").iterdir()) == [target]
    printed = capsys.readouterr().out
    assert "largest difference of logits" in printed
    assert printed.count("accuracy") == 1
    if name == "onnx":
        assert target.stat().st_size < 1.5 * path.stat().st_size + 300_000  # the weights, once
        assert not [tensor for tensor in onnx.load(target).graph.initializer if tensor.external_data]


def test_the_command_itself(command: Command, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "v1.2.ckpt", "lenet", settings=SETTINGS)
    done = command("scripts/export.py", path, "--format", "all", "--int8", timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    files = {f"v1.2{suffix}" for suffix in (".ckpt", ".onnx", ".int8.onnx", ".pt2", ".safetensors", ".pth")}
    assert {file.name for file in tmp_path.iterdir()} == files
    assert "all 1,000 test images" in done.stdout
    assert done.stdout.count("accuracy") == 5
    assert "points" in done.stdout

    graph = onnx.load(tmp_path / "v1.2.onnx")
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(metadata["class_names"]) == FashionMNISTSample.class_names
    assert json.loads(metadata["versions"])["torch"] == torch.__version__.partition("+")[0]
    assert json.loads(metadata["data"]) == {"class": "FashionMNISTSample", "options": {"seed": 0}}  # not where it lay
    assert "uint8" in metadata["input"]
    assert float(metadata["test_accuracy"].split()[0]) < 0.5
    assert len(metadata["checkpoint_sha256"]) == 64
    (pixels,) = graph.graph.input
    assert [size.dim_param or size.dim_value for size in pixels.type.tensor_type.shape.dim] == ["batch", 1, 28, 28]

    net = NETS["lenet"](in_channels=1, num_classes=10)  # the bare network takes the .pth as it is
    net.load_state_dict(torch.load(tmp_path / "v1.2.pth", weights_only=True))
    for suffix in (".onnx", ".pt2", ".safetensors", ".ckpt"):
        model = models.open_model(tmp_path / f"v1.2{suffix}")
        assert model.class_names == FashionMNISTSample.class_names
        assert model.image_shape == (1, 28, 28)
        assert isinstance(models.data_of(model), FashionMNISTSample)


class OtherScale(export.Exported):
    """As if the pixels had been scaled outside."""

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        logits = self.classifier.net((pixels - self.classifier.mean) / self.classifier.std)
        return {"logits": logits, "probabilities": logits.softmax(1)}


class LeftInTraining(export.Exported):
    """With BatchNorm taking its statistics from the batch; a mere .train() torch's ONNX exporter would undo."""

    def __init__(self, classifier: LitClassifier) -> None:
        super().__init__(classifier)
        for layer in classifier.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.running_mean = layer.running_var = None
                layer.train()


class NoSoftmax(export.Exported):
    """What is called probabilities is none."""

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        logits = self.classifier(pixels)
        return {"logits": logits, "probabilities": logits.sigmoid()}


@pytest.mark.parametrize("wrong", [OtherScale, LeftInTraining, NoSoftmax])
@pytest.mark.parametrize("name", ["onnx", "torch_export"])
def test_an_export_that_is_wrong_is_refused(
    wrong: type[nn.Module],
    name: str,
    fast: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = save_checkpoint(tmp_path / "a.ckpt", "resnet9", {"width": 4}, settings=SETTINGS)
    target = tmp_path / f"a{FORMATS[name].suffix}"
    target.write_text("an earlier export")
    monkeypatch.setattr(export, "Exported", wrong)
    assert main([str(path), "--format", name]) == 1
    error = capsys.readouterr().err
    assert f"{target.name} is not the same model" in error
    assert {file.name for file in tmp_path.iterdir()} == {"a.ckpt", target.name}
    assert target.read_text() == "an earlier export"


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_broken_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = FORMATS[name].write

    def cut_off(classifier: LitClassifier, metadata: Mapping[str, str], path: Path) -> None:
        write(classifier, metadata, path)
        path.write_bytes(path.read_bytes()[:-2000])

    monkeypatch.setitem(FORMATS, name, export.Format(FORMATS[name].suffix, cut_off))
    path = save_checkpoint(tmp_path / "a.ckpt", "lenet")
    assert main([str(path), "--format", name]) == 1
    error = capsys.readouterr().err
    assert "cannot be loaded and run again" in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == [path]


class Depends(nn.Module):
    """Control flow that depends on the batch."""

    image_size = None

    def __init__(self, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        if x.abs().max() > 100:
            x = x / 100
        return self.linear(x)


def test_a_folder_is_no_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["."]) == 1
    assert "no such file" in capsys.readouterr().err


def test_a_network_that_no_graph_can_hold_is_refused_and_the_others_are_written(
    fast: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(nets.NETS, "depends", Depends)
    path = save_checkpoint(tmp_path / "a.ckpt", "depends", settings=SETTINGS)
    assert main([str(path), "--format", "all"]) == 1
    error = capsys.readouterr().err
    assert "net depends cannot be exported to onnx" in error
    assert "net depends cannot be exported to torch_export" in error
    assert "Python control flow" in error
    assert {file.name for file in tmp_path.iterdir()} == {"a.ckpt", "a.safetensors", "a.pth"}


def test_without_its_data_set_random_pixels_are_used_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"class_path": "data_modules.FashionMNIST", "init_args": {"data_dir": str(tmp_path / "none")}}
    path = save_checkpoint(tmp_path / "a.ckpt", "lenet", settings={"data": data})
    monkey = pytest.MonkeyPatch()
    monkey.setattr("data_modules.fashion_mnist.DEBIAN_FOLDER", tmp_path)
    with monkey.context():
        assert main([str(path), "--format", "safetensors"]) == 0
        printed = capsys.readouterr().out
        assert "random pixels" in printed
        assert "Fashion-MNIST is not on" in printed
        assert main([str(path), "--int8"]) == 2
        assert "needs the data set" in capsys.readouterr().err
    monkey.undo()


@pytest.mark.parametrize(
    ("words", "status", "named"),
    [
        (["a.ckpt", "--format", "onx"], 2, ["onx", "onnx"]),
        (["a.ckpt", "--formatt", "onnx"], 2, ["--formatt", "--format"]),
        (["a.ckpt", "--output", "b.pt2"], 2, ["b.pt2", "--format"]),
        (["a.ckpt", "--format", "pth", "--int8"], 2, ["pth", "state_dict"]),
        (["a.ckpt", "--format", "state_dict", "--int8"], 2, ["--int8", "state_dict"]),
        (["a.ckpt", "--tolerance", "-1"], 2, ["--tolerance", "-1"]),
        ([], 2, ["CKPT"]),
        (["none.ckpt"], 1, ["none.ckpt", "no such file"]),
    ],
)
def test_mistakes_end_in_one_message(
    words: list[str], status: int, named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    for word in named:
        assert word in error
