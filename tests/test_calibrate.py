"""Probabilities that mean what they say, and "not sure": found on the validation images, kept in every file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Refused, Said, images_in, rows_of, script
from PIL import Image
from resume_runs import SMALL, differences, finished, stopped_and_continued
from test_serve import serve

from data_modules import FashionMNISTSample
from data_modules.images.decode import read_file
from lit_nn import predict
from lit_nn.__main__ import main as lightning_cli
from lit_nn.checkpoint import load_classifier, read_checkpoint
from lit_nn.trained.calibrate import calibration_error, temperature, threshold
from lit_nn.trained.predict import OPENERS, open_model

train, evaluate, export, predict_files = (script(name) for name in ("train", "evaluate", "export", "predict"))
BOOT = str(ROOT / "docs" / "images" / "boot.png")


def drawn(count: int = 20_000, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, K), and labels that are drawn by just their probabilities, (N,)."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, classes, generator=generator)
    return logits, logits.softmax(1).multinomial(1, generator=generator)[:, 0]


@pytest.mark.parametrize("factor", [0.3, 1, 3])
def test_temperature_is_that_of_a_grid(factor: float) -> None:
    logits, labels = drawn()
    logits = factor * logits.double()
    found, grid = temperature(logits, labels), torch.logspace(-1.3, 1.3, 201).tolist()
    loss, *others = (F.cross_entropy(logits / t, labels).item() for t in (found, *grid))
    assert min(others) - 1e-4 < loss < min(others) + 1e-12
    assert found == pytest.approx(factor, rel=0.03)  # of logits that are too large by a factor
    assert calibration_error((logits / found).softmax(1), labels) < 0.01
    assert temperature(5 * torch.eye(3), torch.arange(3)) == 1  # no mistake says how sure it may be
    assert temperature(5 * torch.eye(3), torch.tensor([1, 2, 0])) == pytest.approx(20)  # worse than by chance


@pytest.mark.parametrize("accept", [0.7, 0.8, 0.9, 1])
def test_threshold_is_that_of_scipy(accept: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    logits, labels = drawn(1000)
    shares = (2 * logits.double()).softmax(1)
    confidence, right = shares.amax(1), shares.argmax(1) == labels
    low = {  # of the accuracy, by Clopper and Pearson, for each percent of the images
        level: stats.binomtest(int(some.sum()), len(some), alternative="greater").proportion_ci(0.95).low
        for level in confidence.sort().values[::10].tolist()
        if len(some := right[confidence >= level])
    }
    expected = min((level for level in low if low[level] >= accept), default=1)
    assert (expected == 1) == (accept == 1)
    assert threshold(shares, labels, accept) == expected


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short training in which the network learns by heart, and its best checkpoint in every format."""
    folder = tmp_path_factory.mktemp("calibrate")
    words = ["--net", "mlp", "--max_epochs", "6", "--schedule", "constant", "--augment", "none", "--accept", "0.95"]
    assert train([*words, "--accelerator", "cpu", "--trainer.logger", "false", "--run_dir", str(folder)]) == 0
    assert export([str(folder / "checkpoints" / "best.ckpt"), "--format", "all"]) == 0
    return folder / "checkpoints"


def test_training_calibrates_its_best_checkpoint(trained: Path, capsys: Said) -> None:
    arguments = read_checkpoint(trained / "best.ckpt")["hyper_parameters"]
    model, (images, labels, rows) = load_classifier(trained / "best.ckpt"), FashionMNISTSample().split("val")
    with torch.no_grad():
        logits, labels = model(images[rows]), labels[rows]
    assert arguments["temperature"] == pytest.approx(temperature(logits, labels), rel=1e-4)
    assert arguments["temperature"] > 1.05
    shares = model.probabilities(logits)
    assert calibration_error(shares, labels) <= calibration_error(logits.softmax(1), labels)
    sure = shares.amax(1) >= arguments["threshold"] - 1e-6
    assert 0.3 < sure.double().mean() < 1
    assert (shares.argmax(1) == labels)[sure].double().mean() > 0.96  # more than was asked for: it is a promise
    untouched = read_checkpoint(trained / "last.ckpt")["hyper_parameters"]
    assert (untouched["temperature"], untouched["threshold"]) == (1, 0)
    for suffix in OPENERS:
        same = open_model(trained / f"best{suffix}")
        assert (same.temperature, same.threshold) == (arguments["temperature"], arguments["threshold"])
        assert same.run(images[rows].numpy())[1] == pytest.approx(shares.numpy(), abs=1e-5)
    assert evaluate([str(trained / "best.ckpt")]) == 0
    found = json.loads((trained / "best.ckpt-report" / "metrics.json").read_text())
    assert found["calibration_error"] < found["uncalibrated_calibration_error"]
    assert found["loss"] < found["uncalibrated_loss"]
    assert found["accuracy_where_sure"] >= 0.95
    assert f"{found['accuracy_where_sure']:.2%} of these are right" in capsys.readouterr().out


def test_what_is_never_sure_is_not_sure_of_a_probability_of_one(trained: Path) -> None:
    model = open_model(trained / "best.onnx")._replace(threshold=1.0)
    shares = np.eye(10, dtype=np.float32)[0]
    assert model.read(shares).sure is False
    assert model._replace(threshold=0.999).read(shares).sure is True


def test_predict_and_serve_say_not_sure(trained: Path, tmp_path: Path, capsys: Said) -> None:
    noise = tmp_path / "noise.png"
    model, pixels = open_model(trained / "best.onnx"), FashionMNISTSample().split("test")[0].numpy()
    doubtful = pixels[model.run(pixels)[1].max(1).argmin()]
    Image.fromarray(doubtful[0]).save(noise)
    assert [one.sure for one in predict(model, [BOOT, noise])] == [True, False]
    words = [str(trained / "best.onnx"), BOOT, str(noise)]
    assert predict_files(words) == 0
    boot, other = capsys.readouterr().out.splitlines()
    assert "(not sure)" not in boot
    assert other.endswith("%  (not sure)")
    with serve(trained / "best.onnx") as served:
        answers = [served.ask("/predict", Path(file).read_bytes())[1]["results"][0] for file in (BOOT, noise)]
    assert [answer["sure"] for answer in answers] == [True, False]
    assert predict_files([*words, "--json"]) == 0
    assert [row["sure"] for row in json.loads(capsys.readouterr().out)] == [True, False]
    assert predict_files([*words, "--csv", str(tmp_path / "found.csv")]) == 0
    assert [row["sure"] for row in rows_of(tmp_path / "found.csv")] == ["True", "False"]


def test_the_score_of_unlike_images(trained: Path, tmp_path: Path, capsys: Said) -> None:
    score = pytest.importorskip("sklearn.metrics")
    folder = images_in(tmp_path, "noise", count=40, height=28, width=28, channels=1) / "noise"
    files, model = sorted(folder.iterdir()), load_classifier(trained / "best.ckpt")
    others = torch.from_numpy(np.stack([read_file(file, 1) for file in files]))
    with torch.no_grad():
        own, expected = (
            -model.temperature * (model(images) / model.temperature).logsumexp(1).double().numpy()
            for images in (FashionMNISTSample().split("test")[0], others)
        )
    for suffix in OPENERS:
        found = [one.unlike for one in predict(open_model(trained / f"best{suffix}"), files)]
        assert found == pytest.approx(expected, rel=1e-4)
    assert predict_files([str(trained / "best.onnx"), str(folder), "--json"]) == 0
    assert [row["unlike"] for row in json.loads(capsys.readouterr().out)] == pytest.approx(expected, abs=2e-4)
    assert evaluate([str(trained / "best.onnx"), "--unlike", str(folder)]) == 0
    report = json.loads((trained / "best.onnx-report" / "metrics.json").read_text())["unlike"]
    assert report["auroc"] == pytest.approx(score.roc_auc_score(np.arange(1040) >= 1000, [*own, *expected]), abs=1e-5)
    assert (own > report["cut"]).mean() == pytest.approx(0.05)
    assert (expected > report["cut"]).mean() == pytest.approx(report["above_cut"])
    (folder / "broken.png").write_bytes(b"none")
    assert evaluate([str(trained / "best.ckpt"), "--unlike", str(folder)]) == 1
    assert "broken.png" in capsys.readouterr().err


def test_resumed_runs_are_calibrated_alike(tmp_path: Path) -> None:
    words = ["--accept", "0.5", "--data.val_fraction", "0.05"]
    straight = finished(words, tmp_path / "straight")
    assert differences(straight, stopped_and_continued(words, tmp_path / "stopped", [2, 4, 6])) == []
    before = read_checkpoint(straight / "checkpoints" / "best.ckpt")["hyper_parameters"]
    assert before["temperature"] != 1
    fitted = ["fit", *SMALL, *words, "--run_dir", str(tmp_path / "fitted")]
    assert lightning_cli(fitted) == 0
    longer = ["--max_epochs", "3", "--lr", "0"]  # the best stays: found again, and the same
    assert train(["--resume", str(straight), *longer]) == 0
    assert lightning_cli(["fit", "--resume", str(tmp_path / "fitted"), *longer]) == 0
    for folder in (straight, tmp_path / "fitted"):
        assert read_checkpoint(folder / "checkpoints" / "best.ckpt")["hyper_parameters"] == before


@pytest.mark.parametrize("words", [["--accept", "0"], ["--accept", "95"], ["--model.temperature", "0"]])
def test_what_cannot_be_is_refused(words: list[str], refused: Refused) -> None:
    assert words[0].rpartition(".")[2].removeprefix("--") in refused(train, [*SMALL, *words])
