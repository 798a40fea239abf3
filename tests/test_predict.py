"""Pictures by name: any file gets a label or a reason, by every kind of model, and quickly."""

import csv
import io
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Command
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data_modules import FashionMNISTSample
from data_modules.pictures import SUFFIXES, prepare_picture
from lit_nn import LitClassifier, export, load_classifier
from lit_nn.models import OPENERS, open_model
from lit_nn.predict import main, predict
from lit_nn.report import main as evaluate

NAMES = FashionMNISTSample.class_names
HOW_MANY_DAMAGED = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of random weights in every file that can be opened, and eight pictures."""
    folder = tmp_path_factory.mktemp("predict")
    torch.manual_seed(0)
    data = FashionMNISTSample
    classifier = LitClassifier(data.class_names, data.image_shape, data.mean, data.std)
    checkpoint = {"state_dict": classifier.state_dict(), "hyper_parameters": dict(classifier.hparams)}
    torch.save(checkpoint, folder / "model.ckpt")
    for name in ("onnx", "torch_export", "safetensors"):
        assert export.main([str(folder / "model.ckpt"), "--format", name]) == 0
    (folder / "pictures" / "more").mkdir(parents=True)
    images = data().split("test")[0]
    for number in range(6):
        Image.fromarray(images[number, 0].numpy()).save(folder / "pictures" / f"{number}.png")
    Image.fromarray(images[6, 0].numpy()).convert("RGB").resize((300, 200)).save(folder / "pictures/more/a.JPG")
    Image.fromarray(images[7, 0].numpy()).save(folder / "pictures/more/[b].webp")
    (folder / "pictures" / "notes.txt").write_text("not looked at")
    return folder


@pytest.fixture
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def as_json(words: list[str], capsys: pytest.CaptureFixture[str], status: int = 0) -> list[dict[str, object]]:
    assert main([*words, "--json"]) == status
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("suffix", OPENERS)
def test_every_kind_of_model_says_the_same(suffix: str, in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json([f"model{suffix}", "pictures", "--top_k", "99"], capsys)
    assert [item["path"] for item in found] == [
        *(str(Path("pictures", f"{number}.png")) for number in range(6)),
        str(Path("pictures", "more", "[b].webp")),
        str(Path("pictures", "more", "a.JPG")),
    ]
    classifier = load_classifier("model.ckpt")
    for item in found:
        pixels = torch.from_numpy(prepare_picture(Path(str(item["path"])), 28, 1).copy())  # as training does it
        with torch.no_grad():
            shares = classifier(pixels[None]).softmax(1)[0].numpy()
        predictions = item["predictions"]
        assert isinstance(predictions, list)
        assert [entry["label"] for entry in predictions] == [NAMES[label] for label in (-shares).argsort()]
        assert [entry["probability"] for entry in predictions] == pytest.approx(-np.sort(-shares), abs=1e-5)


def test_pictures_of_a_data_set_keep_their_pixels(in_folder: Path) -> None:
    images = FashionMNISTSample().split("test")[0]
    assert np.array_equal(prepare_picture(Path("pictures/3.png"), 28, 1), images[3].numpy())


def test_table(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model.onnx", "pictures", "--top_k", "2"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert printed.err == ""
    assert len(lines) == 8
    assert len({len(line) for line in lines}) == 1  # columns stand under each other
    assert all(line.count("%") == 2 for line in lines)
    assert all(any(name in line for name in NAMES) for line in lines)


def test_csv(in_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.csv"
    assert main(["model.onnx", "pictures", "missing.png", "--top_k", "2", "--csv", str(path)]) == 1
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "label", "probability", "label_2", "probability_2", "error"]
    assert len(rows) == 9
    assert all(row["label"] in NAMES and row["label_2"] in NAMES and row["error"] == "" for row in rows[:8])
    assert rows[8] == {**dict.fromkeys(rows[0], ""), "path": "missing.png", "error": "no such file or folder"}
    assert "1 of 9 files" in capsys.readouterr().err


def test_a_csv_file_is_replaced_by_a_complete_one(
    in_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path := tmp_path / "out.csv").write_text("what was before")

    def interrupted(*_: object) -> Iterator[None]:
        yield from ()
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_nn.predict.predict_files", interrupted)
    assert main(["model.onnx", "pictures", "--csv", str(path)]) == 130
    assert path.read_text() == "what was before"
    assert [file.name for file in tmp_path.iterdir() if "out.csv" in file.name] == ["out.csv"]


def test_patterns_and_names_that_look_like_them(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(as_json(["model.onnx", "pictures/[0-2].png"], capsys)) == 3
    assert len(as_json(["model.onnx", "pictures/**/*.webp"], capsys)) == 1
    assert len(as_json(["model.onnx", "pictures/more/[b].webp"], capsys)) == 1
    for nothing in ("pictures/*.nothing", "x" * 5000):
        (error,) = as_json(["model.onnx", nothing], capsys, status=1)
        assert error == {"path": nothing, "error": "no such file or folder"}


@pytest.mark.parametrize("content", ["picture", "paths"])
def test_standard_input(content: str, folder: Path) -> None:
    path = folder / "pictures" / "0.png"
    data = path.read_bytes() if content == "picture" else f"{path}\n{folder / 'pictures' / 'more'}\n".encode()
    line = [sys.executable, str(ROOT / "scripts/predict.py"), str(folder / "model.onnx"), "-", "--json"]
    done = subprocess.run(line, input=data, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    names = [item["path"] for item in json.loads(done.stdout)]
    assert len(names) == (1 if content == "picture" else 3)
    assert names[0] == ("-" if content == "picture" else str(path))


def test_bad_files_get_a_line_and_the_others_are_predicted(
    in_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "line\nbreak\x1b[2J.png").touch()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    assert main(["model.onnx", str(tmp_path), "pictures", str(tmp_path / "none")]) == 1
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 8
    errors = printed.err.splitlines()
    assert len(errors) == 7
    assert errors[-1] == "error: 6 of 14 files could not be read"
    for words in (
        "empty.png: the file is empty",
        "text.jpg: not a picture",
        "line\\nbreak\\x1b",
        "pipe.png: not a file",
    ):
        assert words in printed.err
    assert "gone.png: No such file" in printed.err
    assert "none: no file in it ends in" in printed.err


def odd_pictures(folder: Path) -> Iterator[Path]:
    """Pictures that are damaged, strange, or none, made from a seed."""
    chance = random.Random(0)
    modes = {
        "png": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
        "jpg": ["L", "RGB", "CMYK", "YCbCr"],
        "gif": ["P", "L", "1"],
        "bmp": ["1", "L", "P", "RGB"],
        "webp": ["RGB", "RGBA"],
        "tiff": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16", "I", "F"],
    }
    formats = {"jpg": "jpeg"}
    for number in range(HOW_MANY_DAMAGED):
        kind = chance.choice(list(modes))
        mode = chance.choice(modes[kind])
        size = chance.choice([(1, 1), (1, 300), (700, 2), (28, 28), (33, 17), (64, 64), (200, 120)])
        noise = np.frombuffer(chance.randbytes(size[0] * size[1] * 4), np.uint8).reshape(size[1], size[0], 4)
        picture: Image.Image = Image.fromarray(noise, "RGBA")
        if mode in ("I", "F", "I;16"):
            picture = picture.convert("L").convert("I" if mode == "I;16" else mode)
            picture = picture.convert("I;16") if mode == "I;16" else picture
        elif mode == "LAB":
            picture = Image.frombytes("LAB", size, noise[:, :, :3].tobytes())
        else:
            picture = picture.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr") else picture.convert(mode)
        file = io.BytesIO()
        picture.save(file, formats.get(kind, kind))
        data = bytearray(file.getvalue())
        damage = chance.choice(["none", "cut", "cut", "flip", "flip", "flip", "insert", "head", "extension"])
        if damage == "cut":
            del data[chance.randrange(len(data)) :]
        elif damage == "flip":
            for _ in range(chance.choice([1, 5, 50])):
                data[chance.randrange(min(len(data), 10 ** chance.randint(1, 6)))] ^= 1 << chance.randrange(8)
        elif damage == "insert":
            place = chance.randrange(len(data))
            data[place:place] = chance.randbytes(chance.randint(1, 40))
        elif damage == "head":
            data = bytearray(chance.randbytes(8)) + data
        suffix = chance.choice(sorted(SUFFIXES)) if damage == "extension" else f".{kind}"
        path = folder / f"{number:03}_{damage}_{mode.replace(';', '')}_{size[0]}x{size[1]}{suffix}"
        path.write_bytes(data)
        yield path


def test_damaged_and_odd_pictures_get_a_label_or_a_reason(folder: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "odd").mkdir()
    paths = list(odd_pictures(tmp_path / "odd"))
    assert len(paths) >= 300
    done = command("scripts/predict.py", folder / "model.onnx", "odd")
    assert done.returncode == 1
    labelled = [line.split()[0] for line in done.stdout.splitlines()]
    refused = [line.partition(": ")[0] for line in done.stderr.splitlines()]
    assert refused.pop() == "error"
    assert sorted(labelled + refused) == sorted(str(Path("odd", path.name)) for path in paths)
    assert len(labelled) > 100
    assert len(refused) > 50
    assert all(line.partition(": ")[2] for line in done.stderr.splitlines())
    whole = [path for path in paths if "_none_" in path.name and path.name.split("_")[2] != "F"]
    assert {str(Path("odd", path.name)) for path in whole} <= set(labelled)


# --- in Python ----------------------------------------------------------------------------------------------------


def test_predict_in_python(in_folder: Path) -> None:
    classifier = load_classifier("model.ckpt").train()
    path = Path("pictures/more/large.png")
    Image.open("pictures/more/a.JPG").save(path)
    (expected,) = predict(classifier, path, top_k=10)
    assert classifier.training  # as it was
    assert expected.label == expected.labels[0]
    assert sum(expected.probabilities) == pytest.approx(1, abs=1e-5)
    picture = Image.open(path)
    pixels = prepare_picture(path, 28, 1)
    for given in (
        str(path),
        picture,
        np.asarray(picture),
        pixels,
        pixels[None],
        torch.from_numpy(pixels.copy()),
        [path],
    ):
        assert predict(classifier, given, top_k=10) == [expected], type(given)
    path.unlink()
    batch = FashionMNISTSample().split("test")[0][:300]
    assert len(predict(classifier, batch)) == 300
    assert predict(classifier, batch[:2]) == predict(classifier, ["pictures/0.png", "pictures/1.png"])
    assert predict(classifier, []) == []
    for wrong in (np.zeros((28, 28), np.float32), np.zeros((2, 28, 28), np.uint8), np.zeros((3, 2, 28, 28), np.uint8)):
        with pytest.raises(ValueError, match="pixels"):
            predict(classifier, wrong)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I;16"]
)
def test_predict_takes_pil_pictures_of_any_mode(mode: str, in_folder: Path) -> None:
    picture = Image.open("pictures/0.png").convert("RGB")
    converted = Image.new(mode, picture.size) if mode in ("LAB", "I;16") else picture.convert(mode)
    assert predict(load_classifier("model.ckpt"), converted)[0].label in NAMES


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status", "named"),
    [
        (["missing.onnx", "a.png"], 1, ["missing.onnx", "no such file"]),
        (["model.h5", "a.png"], 2, ["model.h5", ".onnx"]),
        (["mine", "a.png"], 2, ["mine", "Did you mean mine/checkpoints/best.ckpt?"]),
        (["damaged.onnx", "a.png"], 1, ["damaged.onnx", "damaged"]),
        (["damaged.pt2", "a.png"], 1, ["damaged.pt2", "damaged"]),
        (["damaged.ckpt", "a.png"], 1, ["damaged.ckpt", "damaged"]),
        (["damaged.safetensors", "a.png"], 1, ["damaged.safetensors", "damaged"]),
        (["model.onnx"], 2, ["PATH"]),
        (["model.onnx", "a.png", "--topk", "3"], 2, ["--topk", "--top_k"]),
        (["model.onnx", "a.png", "--top_k", "0"], 2, ["--top_k", "0"]),
        (["model.onnx", "a.png", "--json", "--csv", "b.csv"], 2, ["--csv", "--json"]),
        (["model.onnx", "a.png", "--csv", "no/such/b.csv"], 1, ["b.csv"]),
    ],
)
def test_mistakes_end_in_one_message(
    words: list[str], status: int, named: list[str], in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in OPENERS:
        Path(f"damaged{suffix}").write_bytes(Path(f"model{suffix}").read_bytes()[:1000])
    Path("mine", "checkpoints").mkdir(parents=True, exist_ok=True)
    Path("mine", "checkpoints", "best.ckpt").touch()
    assert main(words) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    for word in named:
        assert word in error


def test_onnx_of_someone_else_is_refused(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnx

    graph = onnx.load("model.onnx")
    del graph.metadata_props[:]
    onnx.save(graph, "foreign.onnx")
    assert main(["foreign.onnx", "pictures"]) == 1
    assert "does not say its classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("class_names", ["a", "b"], "2 classes"),
        ("class_names", 5, "does not say its classes"),
        ("image_shape", [1, -28, 28], "negative"),
        ("image_shape", [3, 32, 32], "invalid dimensions"),
        ("image_shape", ["1", 28, 28], "does not do what it says"),
    ],
)
def test_onnx_that_is_not_what_it_says_is_refused(
    key: str, value: object, named: str, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([write_metadata(Path("strange.onnx"), key, value), "pictures"]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert named in error


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (5, "choose a data set with --data"),
        ({}, "does not name a data set"),
        ({"class": []}, "does not name a data set"),
        ({"class": "FashionMNISTSample", "options": 3}, "choose a data set with --data"),
        ({"class": "FashionMNISTSample", "options": {"augment": 3}}, "choose a data set with --data"),
        ({"class": "FashionMNISTSample", "options": {"other": 3}}, "'other'"),
        ({"class": "CIFAR10", "options": {"data_dir": 5}}, "CIFAR10 has"),
        ({"class": "ImageFolder", "options": {"data_dir": "pictures", "seed": "x"}}, "pictures"),
    ],
)
def test_a_strange_data_set_is_of_no_account_or_ends_in_one_message(
    data: object, named: str, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_metadata(Path("strange.onnx"), "data", data)
    assert main([path, "pictures"]) == 0
    assert evaluate([path]) != 0
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert named in error


def write_metadata(path: Path, key: str, value: object) -> str:
    """An .onnx file with one entry of its metadata replaced."""
    import onnx

    graph = onnx.load("model.onnx")
    (entry,) = [entry for entry in graph.metadata_props if entry.key == key]
    entry.value = json.dumps(value)
    onnx.save(graph, path)
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"net": "torchvision/vgg16", "net_args": {"weights": "DEFAULT"}}, "weights from elsewhere"),
        ({"net": "mlp", "net_args": {"hidden": 10**9}}, "linear_relu_stack"),
    ],
)
def test_safetensors_can_ask_for_no_download_and_no_memory(
    arguments: dict[str, object], named: str, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with safe_open("model.safetensors", "pt") as file:
        metadata = dict(file.metadata())
    metadata["hyper_parameters"] = json.dumps(json.loads(metadata["hyper_parameters"]) | arguments)
    save_file(load_file("model.safetensors"), "foreign.safetensors", metadata)
    assert main(["foreign.safetensors", "pictures"]) == 1
    assert named in capsys.readouterr().err


# --- speed --------------------------------------------------------------------------------------------------------


def test_with_onnx_neither_torch_nor_lightning_is_imported(folder: Path) -> None:
    program = (
        "import sys; from lit_nn.predict import main;"
        f"assert main([{str(folder / 'model.onnx')!r}, {str(folder / 'pictures')!r}]) == 0;"
        "print({'torch', 'lightning', 'torchvision', 'onnx', 'matplotlib', 'rich'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.slow
def test_speed(folder: Path, tmp_path: Path, command: Command) -> None:
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        assert command("scripts/predict.py", folder / "model.onnx", folder / "pictures" / "0.png").returncode == 0
        seconds.append(time.perf_counter() - start)
    assert sorted(seconds)[4] <= 0.8

    def noisy(seed: int) -> NDArray[np.uint8]:
        return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)

    for number in range(10_000):
        Image.fromarray(noisy(number % 100)).save(tmp_path / f"{number}.jpg")
    model = open_model(folder / "model.onnx")
    assert model.image_shape == (1, 28, 28)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert command("scripts/predict.py", folder / "model.onnx", tmp_path).returncode == 0
        seconds.append(time.perf_counter() - start)
    assert 10_000 / sorted(seconds)[1] >= 3000
