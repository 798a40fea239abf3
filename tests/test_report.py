"""The report's numbers are scikit-learn's, its files are complete, and every kind of model goes through it."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from data_modules import FashionMNISTSample
from lit_nn import LitClassifier, export, load_classifier
from lit_nn.models import data_of, open_model
from lit_nn.report import (
    Answers,
    confusion_figure,
    main,
    metrics,
    mistakes_figure,
    reliability_figure,
    wilson_interval,
    write_report,
)

FILES = {"metrics.json", "per_class.csv", "confusion.csv", "confusion.png", "mistakes.png", "reliability.png"}


def made_up(count: int, classes: int, seed: int = 0) -> Answers:
    """Answers that are right more often than not; the last class is never there and never named."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes - 1, count)
    logits = random.normal(size=(count, classes)).astype(np.float32)
    logits[np.arange(count), labels] += 1.5
    logits[:, -1] = -5
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return Answers([f"class {label}" for label in range(classes)], labels, logits, shares)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "model.ckpt"
    torch.manual_seed(0)
    data = FashionMNISTSample
    classifier = LitClassifier(data.class_names, data.image_shape, data.mean, data.std, net="mlp")
    settings = {"seed_everything": 0, "data": {"class_path": "data_modules.FashionMNISTSample", "init_args": {}}}
    hparams = dict(classifier.hparams)
    torch.save({"state_dict": classifier.state_dict(), "hyper_parameters": hparams, "settings": settings}, path)
    return path


def test_a_report_is_replaced_by_a_complete_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.zeros((50, 1, 8, 8), np.uint8)
    write_report(made_up(50, 5), images, "first", tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def interrupted(*_: object) -> Figure:
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_nn.report.reliability_figure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_report(made_up(50, 5, seed=1), images, "second", tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_matrix_of_many_classes_still_fits_on_a_screen() -> None:
    figure = confusion_figure(made_up(2000, 600), "many")
    assert max(figure.get_size_inches()) * figure.dpi <= 8001


@pytest.mark.parametrize(("count", "classes"), [(1000, 10), (7, 5), (300, 3), (1, 2)])
def test_numbers_are_those_of_scikit_learn(count: int, classes: int, tmp_path: Path) -> None:
    score = pytest.importorskip("sklearn.metrics")
    answers = made_up(count, classes)
    images = np.zeros((count, 1, 8, 8), np.uint8)
    write_report(answers, images, "made up", tmp_path)
    found = json.loads((tmp_path / "metrics.json").read_text())
    labels, predicted, every = answers.labels, answers.predicted, list(range(classes))
    assert found["accuracy"] == pytest.approx(score.accuracy_score(labels, predicted))
    if classes > 3:
        top = score.top_k_accuracy_score(labels, answers.logits, k=3, labels=every)
        assert found["top_3_accuracy"] == pytest.approx(top)
    assert found["loss"] == pytest.approx(score.log_loss(labels, answers.probabilities, labels=every), abs=1e-6)
    each = score.precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0)
    macro = score.precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0, average="macro")
    for place, name in enumerate(("precision", "recall", "f1")):
        assert found["macro"][name] == pytest.approx(macro[place])
        assert [row[name] for row in found["per_class"].values()] == pytest.approx(list(each[place]))
    assert [row["support"] for row in found["per_class"].values()] == list(each[3])
    matrix = score.confusion_matrix(labels, predicted, labels=every).tolist()
    with (tmp_path / "confusion.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert [[int(cell) for cell in row[1:]] for row in rows[1:]] == matrix
    assert rows[0][1:] == [row[0] for row in rows[1:]] == answers.class_names
    with (tmp_path / "per_class.csv").open(newline="") as file:
        assert [float(row["f1"]) for row in csv.DictReader(file)] == pytest.approx(list(each[2]))


def test_calibration_error_is_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_calibration_error

    answers = made_up(1000, 10)
    shares, labels = torch.from_numpy(answers.probabilities), torch.from_numpy(answers.labels)
    expected = multiclass_calibration_error(shares, labels, 10, n_bins=15, norm="l1").item()
    assert metrics(answers)["calibration_error"] == pytest.approx(expected, abs=1e-5)


def test_wilson_interval() -> None:
    # Values of statsmodels.stats.proportion.proportion_confint(right, count, method="wilson")
    assert wilson_interval(90, 100) == pytest.approx((0.825634, 0.944771), abs=1e-5)
    assert wilson_interval(0, 10) == pytest.approx((0, 0.277533), abs=1e-5)
    assert wilson_interval(10, 10) == pytest.approx((0.722467, 1), abs=1e-5)


def test_every_kind_of_model_gets_the_same_report(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([str(checkpoint), "--format", "onnx"]) == 0
    reports = []
    for name in ("model.ckpt", "model.onnx"):
        folder = checkpoint.with_name(f"{name}-report")  # each its own
        assert main([str(checkpoint.with_name(name))]) == 0
        assert {file.name for file in folder.iterdir()} == FILES
        for file in folder.glob("*.png"):
            with Image.open(file) as picture:
                assert min(picture.size) > 300
        reports.append(json.loads((folder / "metrics.json").read_text()))
    first, second = reports
    assert first["images"] == second["images"] == 1000
    assert first["loss"] == pytest.approx(second["loss"], abs=1e-5)
    assert first["per_class"] == second["per_class"]
    images, labels, _ = FashionMNISTSample().split("test")
    with torch.no_grad():
        right = load_classifier(checkpoint)(images).argmax(1) == labels
    assert first["accuracy"] == pytest.approx(right.double().mean().item())
    assert f"accuracy {first['accuracy']:.2%}" in capsys.readouterr().out


def test_another_data_set_with_the_same_classes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(checkpoint), "--output", str(tmp_path / "out")]
    assert main([*words, "--data", "fashion_mnist_sample"]) == 0
    capsys.readouterr()
    assert main([*words, "--data", "cifar10"]) == 2
    assert "airplane" in capsys.readouterr().err
    assert main([*words, "--data", "fashion"]) == 2
    assert "fashion_mnist" in capsys.readouterr().err


@pytest.mark.parametrize("name", [None, "fashion_mnist_sample"])
def test_a_model_is_tested_on_the_split_it_was_trained_with(name: str | None, checkpoint: Path) -> None:
    model = open_model(checkpoint)
    model.data["options"]["seed"] = 7
    assert data_of(model, name).seed == 7


@pytest.mark.parametrize("classes", [2, 10, 60])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_can_be_drawn_of_anything(classes: int, channels: int, tmp_path: Path) -> None:
    answers = made_up(200, classes)
    names = [f"${name}_{{^ [b]" * (1 + label % 2) for label, name in enumerate(answers.class_names)]  # no formulas
    answers = Answers(names, answers.labels, answers.logits, answers.probabilities)
    images = np.random.default_rng(0).integers(0, 256, (200, channels, 20, 30), np.uint8)
    figures: list[Figure] = [confusion_figure(answers, "$x"), reliability_figure(answers, "$x")]
    figures.append(mistakes_figure(answers, images, "$x"))
    right = np.eye(classes, dtype=np.float32)[answers.labels]
    figures.append(mistakes_figure(Answers(names, answers.labels, right, right), images, "no mistakes"))
    for number, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{number}.png")
