"""The page of scripts/serve.py without a server: a folder in which the browser runs the model."""

import json
import shutil
from pathlib import Path

from data_modules.files import atomic_path
from lit_nn.trained.predict import open_model

RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")  # of npm's package onnxruntime-web
PLACE = "const WEB = null;"  # in page.html


def write_web(folder: Path, runtime: Path) -> None:
    """Put the page and the runtime into the folder of a model.onnx."""
    model = open_model(folder / "model.onnx")
    facts = {"class_names": model.class_names, "threshold": model.threshold}
    said = json.dumps(facts).replace("<", "\\u003c")  # a class may be called </script>
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    assert PLACE in page
    for name in RUNTIME:
        with atomic_path(folder / name) as part:
            shutil.copyfile(runtime / name, part)
    with atomic_path(folder / "index.html") as part:
        part.write_text(page.replace(PLACE, f"const WEB = {said};"), encoding="utf-8")
