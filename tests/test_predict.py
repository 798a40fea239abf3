"""Images by name: any file gets a label or a reason, by every kind of model, and quickly."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT, Command, Patch, Refused, Said, rows_of, script
from PIL import Image
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_export import save_checkpoint

from data_modules import FashionMNISTSample
from data_modules.images.decode import ImageError, decoding_threads, read_file
from lit_nn.checkpoint import load_classifier
from lit_nn.errors import UsageError
from lit_nn.trained.predict import OPENERS, keep_memory, predict

main, evaluate, export = script("predict"), script("evaluate"), script("export")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of random weights in every file that can be opened, and eight images."""
    path = tmp_path_factory.mktemp("predict") / "model.ckpt"
    save_checkpoint(path, settings={"data": {"class_path": "data_modules.FashionMNISTSample"}})
    assert export([str(path), "--format", "all"]) == 0
    images = [Image.fromarray(pixels[0].numpy()) for pixels in FashionMNISTSample().split("test")[0][:8]]
    (folder := path.parent / "images" / "more").mkdir(parents=True)
    for number in range(6):
        images[number].save(folder.parent / f"{number}.png")
    images[6].convert("RGB").resize((300, 200)).save(folder / "a.JPG")
    images[7].save(folder / "[b].webp")
    return path.parent


@pytest.fixture
def in_folder(folder: Path, monkeypatch: Patch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def as_json(words: list[str], capsys: Said, status: int = 0) -> list[dict[str, Any]]:
    assert main([*words, "--json"]) == status
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("suffix", OPENERS)
def test_every_kind_of_model_says_the_same(suffix: str, in_folder: Path, capsys: Said) -> None:
    found = as_json([f"model{suffix}", "images", "--top_k", "99"], capsys)
    names = [*(f"{number}.png" for number in range(6)), os.path.join("more", "[b].webp"), os.path.join("more", "a.JPG")]  # noqa: PTH118
    assert [item["path"] for item in found] == [str(Path("images", name)) for name in names]
    model = load_classifier("model.ckpt")
    for item in found:
        pixels = torch.from_numpy(read_file(Path(item["path"]), 1, least=(28, 28)).copy())  # as training does it
        with torch.no_grad():
            shares = model(pixels[None]).softmax(1)[0].numpy()
        assert [entry["label"] for entry in item["predictions"]] == [model.class_names[i] for i in (-shares).argsort()]
        assert [entry["probability"] for entry in item["predictions"]] == pytest.approx(-np.sort(-shares), abs=1e-5)


def test_table_and_csv_hold_the_same(in_folder: Path, tmp_path: Path, capsys: Said) -> None:
    words, path, reason = ["model.onnx", "images", "missing.png", "--top_k", "2"], tmp_path / "out.csv", "no such file"
    assert main(words) == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == "error: 1 of 9 files could not be read"
    assert printed.err.startswith(f"missing.png: {reason}")
    assert len({len(line) for line in printed.out.splitlines()}) == 1  # columns stand under each other
    assert main([*words, "--csv", str(path)]) == 1
    *rows, missing = rows_of(path)
    assert list(missing) == ["path", "label", "probability", "label_2", "probability_2", "sure", "unlike", "error"]
    assert missing.pop("error").startswith(reason)
    assert [*missing.values()] == ["missing.png", *[""] * 6]
    for line, row in zip(printed.out.splitlines(), rows, strict=True):
        shares = [f"{float(row[name]):.1%}" for name in ("probability", "probability_2")]
        assert line.split() == f"{row['path']} {row['label']} {shares[0]} {row['label_2']} {shares[1]}".split()


def test_patterns_and_names_that_look_like_them(in_folder: Path, capsys: Said) -> None:
    for pattern, count in {"images/[0-2].png": 3, "images/**/*.webp": 1, "images/more/[b].webp": 1}.items():
        assert len(as_json(["model.onnx", pattern], capsys)) == count
    (error,) = as_json(["model.onnx", "x" * 5000], capsys, status=1)
    assert error == {"path": "x" * 5000, "error": "no such file or folder"}


@pytest.mark.posix
def test_bad_files_get_a_line_and_the_others_are_predicted(in_folder: Path, tmp_path: Path, capsys: Said) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "line\nbreak\x1b[2J.png").touch()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    (tmp_path / "a.heic").touch()
    os.mkfifo(tmp_path / "pipe.png")
    assert main(["model.onnx", str(tmp_path), "images", str(tmp_path / "none")]) == 1
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 8
    *errors, last = printed.err.splitlines()
    assert last == "error: 5 of 13 files could not be read"
    assert {name: reason[:12] for name, reason in (e.rpartition("/")[2].split(": ", 1) for e in errors)} == {
        **{"none": "no file in i", "text.jpg": "not an image", "pipe.png": "not a file b", "gone.png": "No such file"},
        **{tmp_path.name: "files of oth", "line\\nbreak\\x1b[2J.png": "the file is "},
    }


def test_predict_in_python(in_folder: Path, tmp_path: Path) -> None:
    model = load_classifier("model.ckpt").train()
    Image.open("images/more/a.JPG").save(path := tmp_path / "large.png")
    (expected,) = predict(model, path, top_k=10)
    assert model.training  # as it was
    image, pixels = Image.open(path), read_file(path, 1)
    for given in (str(path), image, np.asarray(image), pixels[0], torch.from_numpy(pixels[0].copy()), [path]):
        assert predict(model, given, top_k=10) == [expected], type(given)
    batch = FashionMNISTSample().split("test")[0][:300]
    assert len(predict(model, batch)) == 300
    assert predict(model, batch[:2]) == predict(model, ["images/0.png", "images/1.png"])
    assert predict(model, []) == []


def test_what_is_no_image_is_refused_and_named(in_folder: Path, tmp_path: Path) -> None:
    model, floats = load_classifier("model.ckpt"), torch.rand(2, 1, 28, 28)  # as ToTensor gives them
    (broken := tmp_path / "broken.png").write_bytes(Path("images/0.png").read_bytes()[:60])
    for wrong in (floats, floats.numpy(), floats[0], [floats[0]], floats.to(torch.int32)):
        with pytest.raises(UsageError, match="pass them as uint8"):
            predict(model, wrong)
    for shape in ((2, 28, 28), (3, 2, 28, 28), (28,)):
        with pytest.raises(UsageError, match="pixels have the shape"):
            predict(model, np.zeros(shape, np.uint8))
    with pytest.raises(ImageError, match=r"broken\.png: "):
        predict(model, ["images/1.png", broken])


@pytest.mark.parametrize("mode", ["1", "LA", "RGBA", "CMYK", "LAB", "I;16", "I;16 with white for zero"])
def test_an_opened_image_is_what_its_file_is(mode: str, in_folder: Path, tmp_path: Path) -> None:
    image = Image.frombytes(mode[:4], (50, 40), np.random.default_rng(0).bytes(4 * 50 * 40))
    image.save(path := tmp_path / "a.tiff", tiffinfo={PHOTOMETRIC_INTERPRETATION: 0} if "white" in mode else {})
    model = load_classifier("model.ckpt")
    assert predict(model, Image.open(path), top_k=10) == predict(model, path, top_k=10)


@pytest.mark.parametrize(
    ("run", "words", "status", "named"),
    [
        (main, ["missing.onnx", "a.png"], 1, ["missing.onnx", "no such file"]),
        (main, ["model.h5", "a.png"], 2, ["model.h5", ".onnx"]),
        (main, ["mine", "a.png"], 2, ["mine", f"Did you mean {Path('mine', 'checkpoints', 'best.ckpt')}?"]),
        *((main, [f"damaged{suffix}", "a.png"], 1, [f"damaged{suffix}: damaged"]) for suffix in OPENERS),
        (main, ["model.onnx", "a.png", "--top_k", "0"], 2, ["--top_k", "0"]),
        (main, ["model.onnx", "a.png", "--csv", "no/such/b.csv"], 2, ["no/such/b.csv", "folder"]),
        (evaluate, ["model.onnx", "--data", "cifar10"], 2, ["airplane"]),
        (evaluate, ["model.onnx", "--data_dir", "my"], 2, ["--data_dir my: fashion_mnist_sample reads no folder"]),
        (export, ["model.ckpt", "--format", "web"], 2, ["--onnxruntime_web", "npm install onnxruntime-web"]),
        (export, ["model.ckpt", "--format=state_dict", "--tolerance=-1"], 1, ["-1.0e+00 is allowed (--tolerance)"]),
        (export, ["other.ckpt", "--int8"], 2, ["needs the data set", "none is not a folder"]),
        (
            export,
            ["nan.ckpt", "--format=safetensors"],
            1,
            ["nan.safetensors is not the same model: its outputs differ by nan"],
        ),
        (main, ["model.onnx", "images", "--heatmaps", "m"], 2, ["a heat map needs a checkpoint"]),
        (main, ["nan.ckpt", "images", "--heatmaps", "m"], 2, ["net mlp has no layer"]),
        (export, ["."], 2, [". is no model"]),
        (export, ["model.onnx"], 2, ["model.onnx is an export already; give the checkpoint"]),
    ],
)
def test_mistakes_end_in_one_message(
    run: Any, words: list[str], status: int, named: list[str], in_folder: Path, refused: Refused
) -> None:
    for suffix in OPENERS:
        Path(f"damaged{suffix}").write_bytes(Path(f"model{suffix}").read_bytes()[:1000])
    Path("mine", "checkpoints").mkdir(parents=True, exist_ok=True)
    Path("mine", "checkpoints", "best.ckpt").touch()
    elsewhere = {"class_path": "data_modules.ImageFolder", "init_args": {"data_dir": "none"}}
    save_checkpoint(Path("other.ckpt"), settings={"data": elsewhere})
    save_checkpoint(Path("nan.ckpt"), "mlp", {"std": [0.0]})
    said = refused(run, words, status)
    assert [part for part in named if part not in said] == []


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("class_names", None, "'class_names'"),
        ("class_names", ["a", "b"], "2 classes"),
        ("image_shape", [1, -28, 28], "negative"),
        ("image_shape", [3, 32, 32], "invalid dimensions"),
        ("image_shape", [1, 10**9, 10**9], "images of the shape"),
        ("levels", "many", "invalid literal"),
        ("parts", {"train": [[1, 1], "!"]}, "base64"),
        ("parts", {"train": [[1], "AAAA"]}, "buffer size"),
        ("data", 5, "does not name a data set"),
        ("data", {"class": "FashionMNISTSample", "options": 3}, "choose a data set with --data"),
        ("data", {"class": "FashionMNISTSample", "options": {"other": 3}}, "'other'"),
        ("data", {"class": "ImageFolder", "options": {"data_dir": "images", "seed": "x"}}, "images"),
    ],
)
def test_what_an_onnx_says_of_itself_ends_in_one_message_at_worst(
    key: str, value: object, named: str, in_folder: Path, refused: Refused
) -> None:
    graph = onnx.load("model.onnx")
    (entry,) = [entry for entry in graph.metadata_props if entry.key == key]
    entry.value = json.dumps(value)
    if value is None:
        graph.metadata_props.remove(entry)
    onnx.save(graph, "strange.onnx")
    if key == "data":  # of no account before it is needed
        assert main(["strange.onnx", "images"]) == 0
        assert named in refused(evaluate, ["strange.onnx"], 1, 2)
    else:
        said = refused(main, ["strange.onnx", "images"], 1)
        assert "strange.onnx: damaged, or not made by scripts/export.py (" in said
        assert named in said


def test_a_safetensors_can_ask_for_no_memory(in_folder: Path, refused: Refused) -> None:
    with safe_open("model.safetensors", "pt") as file:
        metadata = dict(file.metadata())
    arguments = json.loads(metadata["hyper_parameters"]) | {"net": "mlp", "net_args": {"hidden": 10**9}}
    metadata["hyper_parameters"] = json.dumps(arguments)
    save_file(load_file("model.safetensors"), "foreign.safetensors", metadata)
    assert "linear_relu_stack" in refused(main, ["foreign.safetensors", "images"], 1)


def test_an_onnx_needs_no_torch_and_a_checkpoint_no_lightning(in_folder: Path) -> None:
    program = """
import runpy, sys
sys.modules.update(dict.fromkeys(["torch", "lightning", "torchvision", "onnx", "matplotlib", "rich"]))  # refused
main = runpy.run_path(sys.argv[1])["main"]
assert main(["model.onnx", "images"]) == 0
import lit_nn.trained.serve
for name in ("torch", "torchvision"):
    del sys.modules[name]
import lit_nn
print(lit_nn.predict(lit_nn.load_classifier("model.ckpt"), "images/0.png")[0].label)
"""
    words = [sys.executable, "-c", program, str(ROOT / "scripts" / "predict.py")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *lines, label = done.stdout.splitlines()
    assert len(lines) == 8
    assert label in lines[0]


def test_large_files_are_decoded_in_threads_with_the_same_answers(
    in_folder: Path, tmp_path: Path, capsys: Said
) -> None:
    for number in range(5):
        noise = np.random.default_rng(number).integers(0, 256, (150, 150, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    (paths := sorted(tmp_path.iterdir()))[2].write_bytes(paths[2].read_bytes()[:9000])
    assert decoding_threads(paths) == os.cpu_count()
    assert decoding_threads(sorted(Path("images").glob("*.png"))) == 1
    alone = [as_json(["model.onnx", str(path)], capsys, status=int(path == paths[2]))[0] for path in paths]
    assert as_json(["model.onnx", str(tmp_path)], capsys, status=1) == alone
    assert ["error" in item for item in alone] == [False, False, True, False, False]


@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) == 1, reason="there are no processes then")
def test_many_small_files_are_decoded_in_processes_that_leave_nothing_behind(
    in_folder: Path, tmp_path: Path, capsys: Said
) -> None:
    few = [*sorted(Path("images").glob("*.png")), tmp_path / "broken.png"]
    few[-1].write_bytes(few[0].read_bytes()[:100])
    alone = [as_json(["model.onnx", str(path)], capsys, status=int(path == few[-1]))[0] for path in few]
    (many := tmp_path / "many").mkdir()
    for number in range(2100):
        (many / f"{number:04}.png").hardlink_to(few[number % 7].absolute())
    found = as_json(["model.onnx", str(many)], capsys, status=1)
    assert found == [{**alone[number % 7], "path": str(many / f"{number:04}.png")} for number in range(2100)]
    words = [sys.executable, str(ROOT / "scripts" / "predict.py"), "model.onnx", *[str(many)] * 20]
    kill = signal.SIGKILL
    for whom, stop, status in (("all", signal.SIGINT, 130), ("parent", kill, -kill), ("child", kill, 1)):
        program = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        os.read(program.stdout.fileno(), 1)  # type: ignore[union-attr]  # now all of them are there
        children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
        assert len(children) == min(len(os.sched_getaffinity(0)), 8)
        if whom == "all":  # as Ctrl-C does it
            os.killpg(program.pid, stop)
        else:
            os.kill(int(children[0]) if whom == "child" else program.pid, stop)
        said = program.communicate(timeout=20)[1]  # which ends when the last of them has ended
        assert b"Traceback" not in said
        assert (program.returncode, b"images was ended" in said) == (status, whom == "child")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_many_large_images_take_the_memory_of_few(in_folder: Path, tmp_path: Path) -> None:
    cores = os.cpu_count() or 1  # which decode at the same time
    for number in range(10 * cores):  # 18 MB of pixels each
        Image.new("RGB", (3000, 2000), (number, 100, 50)).save(tmp_path / f"{number}.png", compress_level=1)
    program = "import re, runpy, sys; sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0])['main'](sys.argv[1:]);"
    program += "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    peaks = []
    for count in (4 * cores, 10 * cores):
        files = [str(tmp_path / f"{number}.png") for number in range(count)]
        words = [sys.executable, "-c", program, str(ROOT / "scripts" / "predict.py"), "model.onnx", *files]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < 1.3 * peaks[0]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_memory_that_tensors_free_is_taken_again() -> None:
    resource = pytest.importorskip("resource")
    keep_memory()
    sizes = torch.randint(1 << 23, 1 << 24, (20, 3), generator=torch.Generator().manual_seed(0))  # 32 to 64 MB
    for number, row in enumerate(sizes.tolist()):
        if number == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        _ = [torch.ones(size) for size in row]
    pages = 4 * sizes[10:].sum().item() / resource.getpagesize()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < pages / 10


@pytest.mark.slow
@pytest.mark.parametrize(("count", "seconds"), [(1, 0.8), (10_000, 3.3)])
def test_speed(count: int, seconds: float, folder: Path, tmp_path: Path, command: Command) -> None:
    for number in range(count):
        noise = np.random.default_rng(number % 100).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.jpg")
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        assert command("scripts/predict.py", folder / "model.onnx", tmp_path).returncode == 0
        taken.append(time.perf_counter() - start)
    assert sorted(taken)[2] <= seconds, taken
