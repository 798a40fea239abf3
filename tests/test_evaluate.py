"""The report's numbers are scikit-learn's, its files are complete, and every kind of model goes through it."""

import csv
import io
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Said, images_in, noise, script
from test_export import save_checkpoint

from data_modules import FashionMNISTSample, ImageFolder
from data_modules.errors import DataNote
from data_modules.sheets import drawable
from lit_nn.checkpoint import load_classifier
from lit_nn.trained.evaluate import Answers, data_of, measure
from lit_nn.trained.figures import figures_of
from lit_nn.trained.predict import open_model
from lit_nn.trained.report import write_report

main, export = script("evaluate"), script("export")


def made_up(count: int, classes: int, channels: int = 1) -> Answers:
    """Answers that are right more often than not; the last class is never there and never named."""
    random = np.random.default_rng(0)
    labels = random.integers(0, classes - 1, count)
    logits = random.normal(size=(count, classes)).astype(np.float32)
    logits[np.arange(count), labels] += 1.5
    logits[:, -1] = -5
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    images = random.integers(0, 256, (count, channels, 20, 30), np.uint8)
    return Answers([f"class {label}" for label in range(classes)], images, labels, logits, shares)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"seed_everything": 7, "data": {"class_path": "data_modules.FashionMNISTSample", "init_args": {}}}
    return save_checkpoint(tmp_path_factory.mktemp("evaluate") / "model.ckpt", "mlp", settings=settings)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label was found")
@pytest.mark.parametrize(("count", "classes"), [(1000, 10), (7, 5), (1, 2)])
def test_numbers_are_those_of_scikit_learn(count: int, classes: int, tmp_path: Path) -> None:
    score = pytest.importorskip("sklearn.metrics")
    answers = made_up(count, classes)
    assert write_report(answers, "made up", tmp_path) == measure(answers)
    found = json.loads((tmp_path / "metrics.json").read_text())
    labels, predicted, every = answers.labels, answers.logits.argmax(1), list(range(classes))
    assert found["accuracy"] == score.accuracy_score(labels, predicted)
    assert found["balanced_accuracy"] == pytest.approx(score.balanced_accuracy_score(labels, predicted))
    if classes > 3:
        top = score.top_k_accuracy_score(labels, answers.logits, k=3, labels=every)
        assert found["top_3_accuracy"] == pytest.approx(top)
    assert found["loss"] == pytest.approx(score.log_loss(labels, answers.probabilities, labels=every), abs=1e-6)
    each = score.precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0)
    for name, values in zip(("precision", "recall", "f1"), each[:3], strict=True):
        assert found["macro"][name] == pytest.approx(values.mean())
        assert [row[name] for row in found["per_class"].values()] == pytest.approx(list(values))
    assert [row["support"] for row in found["per_class"].values()] == list(each[3])
    header, *rows = csv.reader((tmp_path / "confusion.csv").read_text().splitlines())
    matrix = score.confusion_matrix(labels, predicted, labels=every).tolist()
    assert [[int(cell) for cell in row[1:]] for row in rows] == matrix
    assert header[1:] == [row[0] for row in rows] == answers.class_names
    table = csv.DictReader((tmp_path / "per_class.csv").read_text().splitlines())
    assert [float(row["f1"]) for row in table] == pytest.approx(list(each[2]))


@pytest.mark.parametrize(
    ("right", "count", "interval"),  # statsmodels.stats.proportion.proportion_confint(right, count, method="wilson")
    [(90, 100, (0.825634, 0.944771)), (0, 10, (0, 0.277533)), (10, 10, (0.722467, 1))],
)
def test_confidence_by_hand(right: int, count: int, interval: tuple[float, float]) -> None:
    labels, shares = (np.arange(count) < right).astype(np.int64), np.full((count, 2), [0.2, 0.8], np.float32)
    found = measure(Answers(["a", "b"], np.zeros((count, 1, 2, 2), np.uint8), labels, np.log(shares), shares))
    assert found["accuracy_interval_95"] == pytest.approx(interval, abs=1e-5)
    assert found["calibration_error"] == pytest.approx(abs(0.8 - right / count), abs=1e-5)


@pytest.mark.parametrize(("classes", "channels"), [(2, 1), (10, 3), (600, 1)])
def test_figures_can_be_drawn_of_anything(classes: int, channels: int) -> None:
    answers = made_up(200, classes, channels)
    names = ["$class_{^ [b]", "a very long name of a class, longer than all", "日本語のクラス", "été"][:classes]
    answers = answers._replace(class_names=names + answers.class_names[len(names) :])
    figures = figures_of(answers, measure(answers), "$x")
    shown = [tick.get_text() for tick in figures["confusion"].axes[0].get_yticklabels()]
    assert shown == drawable([name[:22] for name in answers.class_names[:: 4 if classes == 600 else 1]])
    assert max(figures["confusion"].get_size_inches()) * figures["confusion"].dpi <= 4000
    wrong = int((answers.logits.argmax(1) != answers.labels).sum())
    assert sum(len(axes.images) for axes in figures["mistakes"].axes) == min(30, wrong)
    answers = answers._replace(logits=np.eye(classes, dtype=np.float32)[answers.labels])
    none = figures_of(answers, measure(answers), "$x")["mistakes"]
    assert not none.axes
    for figure in (*figures.values(), none):
        with warnings.catch_warnings(action="error"):  # of letters that no font here has, for instance
            figure.savefig(io.BytesIO())


def test_every_kind_of_model_gets_the_same_report(checkpoint: Path, capsys: Said) -> None:
    assert export([str(checkpoint)]) == 0
    reports, tables = [], {"metrics.json", "report.html", "per_class.csv", "confusion.csv"}
    for name in ("model.ckpt", "model.onnx"):
        folder = checkpoint.with_name(f"{name}-report")  # each its own
        assert main([str(checkpoint.with_name(name))]) == 0
        assert {file.name for file in folder.iterdir()} == tables | {"confusion.png", "mistakes.png", "reliability.png"}
        reports.append(json.loads((folder / "metrics.json").read_text()))
    assert data_of(open_model(checkpoint), "fashion_mnist_sample").seed == 7  # the split it was trained with
    first, second = reports
    assert first["images"] == second["images"] == 1000
    assert first["loss"] == pytest.approx(second["loss"], abs=1e-5)
    assert first["per_class"] == second["per_class"]
    images, labels, _ = FashionMNISTSample().split("test")
    with torch.no_grad():
        right = load_classifier(checkpoint)(images).argmax(1) == labels
    assert first["accuracy"] == pytest.approx(right.double().mean().item())
    assert f"accuracy {first['accuracy']:.2%} (95 % interval" in capsys.readouterr().out


@pytest.mark.posix
@pytest.mark.parametrize("name", ["evaluate", "predict"])
def test_files_are_replaced_by_complete_ones_only(name: str, checkpoint: Path, tmp_path: Path) -> None:
    import resource

    write_report(made_up(50, 5), "before", tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    words = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), str(checkpoint)]
    boots = [str(ROOT / "docs" / "images" / "boot.png")] * 1000
    words += ["--output", str(tmp_path)] if name == "evaluate" else [*boots, "--csv", str(tmp_path / "per_class.csv")]
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731 (as a full disk)
    done = subprocess.run(words, preexec_fn=full, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_no_image_that_was_trained_on_is_tested(tmp_path: Path, capsys: Said) -> None:
    place = str(images_in(tmp_path / "my images", "cat", "dog", count=30, channels=1))
    data = ImageFolder(place, seed=3)
    settings = {"seed_everything": 3, "data": {"class_path": "ImageFolder", "init_args": {"data_dir": place}}}
    arguments = {"class_names": data.class_names, "image_shape": data.image_shape}
    path = save_checkpoint(tmp_path / "a.ckpt", "mlp", arguments, settings=settings, parts=data.parts())
    assert export([str(path)]) == 0
    images, _, rows = data.split("train")
    trained = {images[row].numpy().tobytes() for row in rows}
    for seed, name in enumerate(("cat", "dog")):  # which moves the parts of a new run
        noise(9000 + seed, channels=1).save(Path(place, name, "new.png"))
        next(Path(place, name).glob("*4.png")).rename(Path(place, name, "renamed.png"))
    for words in (["a.ckpt"], ["a.onnx", "--data_dir", place]):
        images, _, rows = data_of(open_model(tmp_path / words[0]), None, place).split("test")
        assert not trained & {images[row].numpy().tobytes() for row in rows}
        capsys.readouterr()
        assert main([str(tmp_path / words[0]), *words[1:]]) == 0
        assert "2 new" in capsys.readouterr().out
        assert json.loads((tmp_path / f"{words[0]}-report" / "metrics.json").read_text())["images"] == len(rows)
    files = [f"{path},{path.parent.name}\n" for path in sorted(Path(place).rglob("*.png"))]
    (tmp_path / "labels.csv").write_text("file,label\n" + "".join(files), encoding="utf-8")
    images, _, rows = data_of(open_model(path), "image_table", None, str(tmp_path / "labels.csv")).split("test")
    assert len(rows)
    assert not trained & {images[row].numpy().tobytes() for row in rows}  # whatever names the same images
    other = images_in(tmp_path / "other images", "cat", "dog", count=0)
    for seed in range(5000, 5040):
        noise(seed, channels=1).save(other / ("cat", "dog")[seed % 2] / f"{seed}.png")
    (other / "cat" / "broken.png").write_bytes(b"no image")
    with pytest.warns(DataNote, match="broken.png"):  # images of which none was there: all are tested
        assert main([str(path), "--data_dir", str(other)]) == 0
    assert json.loads((tmp_path / "a.ckpt-report" / "metrics.json").read_text())["images"] == 40
    capsys.readouterr()
    assert main([str(tmp_path / "a.onnx")]) == 1
    assert capsys.readouterr().err.startswith("error: the model does not say where its images lie: give --data_dir")
