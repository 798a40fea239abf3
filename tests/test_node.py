"""An exported model gives the same labels outside of Python: in Node, from pixels and the file's own metadata."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from data_modules import FashionMNISTSample
from lit_nn import LitClassifier, export
from lit_nn.models import open_model
from lit_nn.predict import ranked

SCRIPT = ROOT / "tests" / "node" / "classify.cjs"


@pytest.fixture(scope="module")
def node() -> str:
    """Path of Node, if it is here and finds onnxruntime-web, in tests/node/node_modules or along NODE_PATH."""
    path = shutil.which("node")
    if path is None:
        pytest.skip("Node is not installed")
    found = subprocess.run(
        [path, "-p", "require.resolve('onnxruntime-web')"], cwd=SCRIPT.parent, capture_output=True, check=False
    )
    if found.returncode != 0:
        pytest.skip("onnxruntime-web is not installed: npm install --prefix tests/node")
    return path


@pytest.mark.parametrize(
    "net",
    [
        "lenet",
        "resnet9",
        "fixed_hidden",  # control flow  # tutorial
    ],
)
def test_node_gives_the_same_labels(net: str, node: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = FashionMNISTSample
    classifier = LitClassifier(data.class_names, data.image_shape, data.mean, data.std, net=net)
    checkpoint = tmp_path / "model.ckpt"
    torch.save({"state_dict": classifier.state_dict(), "hyper_parameters": dict(classifier.hparams)}, checkpoint)
    assert export.main([str(checkpoint)]) == 0
    images = data().split("test")[0][:100].numpy()
    (tmp_path / "pixels.bin").write_bytes(images.tobytes())
    line = [node, str(SCRIPT), str(tmp_path / "model.onnx"), str(tmp_path / "pixels.bin")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    model = open_model(tmp_path / "model.onnx")
    expected = ranked(model.run_all(images)[1], model.class_names, 1)
    assert [item["label"] for item in found] == [prediction.label for prediction in expected]
    shares = [prediction.probability for prediction in expected]
    assert [item["probability"] for item in found] == pytest.approx(shares, abs=1e-5)
