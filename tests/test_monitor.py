"""What best.ckpt, early stopping and plateau go by, on classes of which one is fifty times rarer than the other."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import script
from PIL import Image
from resume_runs import load, rows
from sklearn.metrics import balanced_accuracy_score, f1_score  # type: ignore[import-untyped]

from lit_nn.metrics import StageMetrics

train = script("train")
WORDS = ["--net", "mlp", "--data.sampling", "balanced", "--accelerator", "cpu", "--trainer.logger", "false"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command line with 1,000 dark images and 20 somewhat brighter ones, under much noise."""
    folder, random = tmp_path_factory.mktemp("rare"), np.random.default_rng(0)
    for name, count, level in (("common", 1000, 110), ("rare", 20, 130)):
        (folder / name).mkdir()
        for number in range(count):
            pixels = random.normal(level, 60, (4, 4)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return [*WORDS, "--data", "image_folder", "--data_dir", str(folder), "--data.val_fraction", "0.3"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_NN_CACHE", str(tmp_path_factory.getbasetemp() / "rare-cache"))


def best_epoch(folder: Path) -> int:
    return load(folder / "checkpoints" / "best.ckpt")["epoch"] - 1


def test_the_best_epoch_is_that_of_the_monitor(words: list[str], tmp_path: Path) -> None:
    best = {}
    for monitor, better in (("val_acc", max), ("val_loss", min), ("val_balanced_acc", max), ("val_f1", max)):
        folder = tmp_path / monitor
        more = [] if monitor == "val_acc" else ["--monitor", monitor]  # the default
        assert train([*words, *more, "--max_epochs", "5", "--run_dir", str(folder)]) == 0
        values = [float(row[monitor]) for row in rows(folder)]
        best[monitor] = best_epoch(folder)
        assert best[monitor] == values.index(better(values))
        result, row = json.loads((folder / "result.json").read_text()), rows(folder)[best[monitor]]
        for name in ("val_acc", "val_loss", "val_balanced_acc", "val_f1"):  # of the weights that were tested
            assert result[name] == pytest.approx(float(row[name]), rel=1e-6)
        assert {"test_balanced_acc", "test_f1"} <= result.keys()
    assert best["val_acc"] != best["val_balanced_acc"]
    assert script("evaluate")([str(folder / "checkpoints" / "best.ckpt")]) == 0
    report = json.loads((folder / "checkpoints" / "best.ckpt-report" / "metrics.json").read_text())
    assert report["balanced_accuracy"] == pytest.approx(result["test_balanced_acc"], abs=1e-6)
    assert report["macro"]["f1"] == pytest.approx(result["test_f1"], abs=1e-6)


def test_early_stopping_and_plateau_follow(words: list[str], tmp_path: Path) -> None:
    """The best balanced accuracy is that of the first epoch."""
    follow = ["--monitor", "val_balanced_acc", "--schedule", "plateau", "--model.schedule_args.patience", "0"]
    line = [*words, *follow, "--early_stopping", "2", "--max_epochs", "9", "--run_dir", str(tmp_path / "run")]
    assert train(line) == 0
    epochs = rows(tmp_path / "run")
    scores, rates = ([float(row[name]) for row in epochs] for name in ("val_balanced_acc", "lr"))
    first = scores.index(max(scores))
    assert len(epochs) == first + 3
    assert rates[first + 2] == pytest.approx(rates[first] / 100)  # lowered after each of the two
    assert train(["--resume", str(tmp_path / "run"), "--monitor", "val_loss", "--early_stopping", "9"]) == 2


def test_plateau_looks_only_where_there_was_a_validation(words: list[str], tmp_path: Path) -> None:
    line = [*words, "--schedule", "plateau", "--model.schedule_args", '{"patience": 0, "threshold": 9}']
    line += ["--trainer.check_val_every_n_epoch", "2", "--max_epochs", "5", "--run_dir", str(tmp_path / "run")]
    assert train(line) == 0
    rates = [float(row["lr"]) for row in rows(tmp_path / "run")]
    tenth = pytest.approx(rates[0] / 10)
    assert rates == [*rates[:1] * 3, tenth, tenth]  # the second validation, in the fourth epoch, is no better


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_scikit_learn(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (1000,), generator=generator).clamp(max=3)  # no image of the last class
    logits = torch.randn(1000, 5, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 5)
    metrics = StageMetrics(5)
    for part in torch.arange(1000).split(7):  # two updates of the metrics, and a rest
        metrics.update(torch.tensor(1.0), logits[part], labels[part])
    metrics.flush()
    found, said = {name: metric.compute().item() for name, metric in metrics.by_name.items()}, logits.argmax(1)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert found["balanced_acc"] == pytest.approx(balanced_accuracy_score(labels, said), abs=1e-6)
    f1 = f1_score(labels, said, labels=range(5), average="macro", zero_division=0)
    assert found["f1"] == pytest.approx(f1, abs=1e-6)
