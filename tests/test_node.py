"""An exported model gives the same labels outside of Python: in Node, from image files and the file's own metadata."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, script
from test_export import save_checkpoint
from test_serve import write_clothes

from lit_nn.nets import NETS
from lit_nn.trained.predict import open_model, predict

SCRIPT = ROOT / "tests" / "node" / "classify.cjs"


@pytest.fixture(scope="module")
def node() -> str:
    """Path of Node, if it finds onnxruntime-web and sharp, in tests/node/node_modules or along NODE_PATH."""
    path, needs = shutil.which("node") or sys.executable, "require.resolve('onnxruntime-web'), require.resolve('sharp')"
    if subprocess.run([path, "-p", needs], cwd=SCRIPT.parent, capture_output=True, check=False).returncode != 0:
        pytest.skip("Node, onnxruntime-web or sharp is not installed: npm install --prefix tests/node")
    return path


@pytest.mark.parametrize("net", [net for net in NETS if net in ("lenet", "resnet9", "fixed_hidden")])
def test_node_gives_the_same_labels(net: str, node: str, tmp_path: Path) -> None:
    assert script("export")([str(save_checkpoint(tmp_path / "model.ckpt", net))]) == 0
    paths = write_clothes(tmp_path)
    words = [node, str(SCRIPT), str(tmp_path / "model.onnx"), *map(str, paths)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found, expected = json.loads(done.stdout), predict(open_model(tmp_path / "model.onnx"), paths)
    assert [item["label"] for item in found] == [prediction.label for prediction in expected]
    shares = [prediction.probability for prediction in expected]
    assert [item["probability"] for item in found] == pytest.approx(shares, abs=0.01)  # decoders differ by a level
