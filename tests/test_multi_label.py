"""Several labels per image, end to end: tables, parts, loss, metrics, thresholds, report, predict, export, resuming."""

import csv
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import CHROMIUM, chromium
from conftest import Patch, Refused, Said, noise, rows_of, script
from garments import NAMES, plain_loop, write_garments
from resume_runs import SMALL, assert_resumes_exactly
from sklearn import metrics as sk  # type: ignore[import-untyped]
from test_distributed import CPU, agree
from test_distributed import finished as together
from test_image_table import Cells, change
from test_page import RUNTIME, files_served, titles
from test_serve import serve
from torch import Tensor

from data_modules import DataError, ImageDataModule
from data_modules.augment import Augment, Draws
from data_modules.base import SPLITS
from data_modules.image_table import ImageTable
from data_modules.images.parts import OPEN, TEST, TRAIN, VAL, cut, stratified_split
from lit_nn import LitClassifier, predict
from lit_nn.checkpoint import load_classifier
from lit_nn.checkpoint import read_checkpoint as read
from lit_nn.errors import UsageError
from lit_nn.multi_label import MultiLabelMetrics, binary_cross_entropy, positive_weights
from lit_nn.nets import build_net
from lit_nn.trained.calibrate import best_thresholds, temperature
from lit_nn.trained.evaluate import answer_test_images, data_of
from lit_nn.trained.predict import OPENERS, open_model

train, evaluate, export, predict_files = (script(name) for name in ("train", "evaluate", "export", "predict"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set of garments, 300 images to train on and 100 to test."""
    path = tmp_path_factory.mktemp("garments")
    write_garments(path, 300, 100)
    return path


def of_table(table: Path | str, *more: str) -> list[str]:
    return ["--data", "image_table", "--data.table", str(table), *(more or ("--data.delimiter", "|"))]


def data_words(folder: Path) -> list[str]:
    return [*of_table(folder / "labels.csv"), "--data.image_size", "[28, 56]"]


def write(rows: Cells, path: Path) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return str(path)


def rows_in(folder: Path) -> Cells:
    return [*csv.reader((folder / "labels.csv").open(encoding="utf-8"))]


@pytest.fixture
def cells(tmp_path: Path) -> Cells:
    """Header and rows of a table of 40 images: an ant, a bee, both or none of them."""
    for number in range(40):
        noise(number, 6, 6, 1).save(tmp_path / f"{number}.png")
    return [["file", "label"], *([f"{number}.png", ("ant", "bee", "bee|ant", "")[number % 4]] for number in range(40))]


def by_column(cells: Cells, yes: str = "1", no: str = "0") -> Cells:
    rows = [[row[0], *(yes if name in row[1] else no for name in ("bee", "ant"))] for row in cells[1:]]
    return [["file", "bee", "ant"], *rows]


@pytest.mark.parametrize("label", ["*", "bee,ant", "?e?,a*"])
@pytest.mark.parametrize(("yes", "no"), [("1", "0"), ("1.0", "0.0"), ("True", "False")])
def test_a_delimiter_and_columns_of_0_and_1_say_the_same(
    label: str, yes: str, no: str, cells: Cells, tmp_path: Path
) -> None:
    one = ImageTable(write(cells, tmp_path / "one.csv"), delimiter="|")
    other = ImageTable(write(by_column(cells, yes, no), tmp_path / "other.csv"), {"label": label})
    assert one.class_names == other.class_names == ["ant", "bee"]
    assert one.multi_label
    for split in SPLITS:
        assert all(mine.equal(its) for mine, its in zip(one.split(split), other.split(split), strict=True))
    _, labels, rows = one.split("train")
    assert labels.dtype == torch.float32
    assert labels[:4].tolist() == [[1, 0], [0, 1], [1, 1], [0, 0]]
    assert one.class_counts.tolist() == labels[rows].sum(0).tolist()


def test_the_command_line_knows_all_of_it(cells: Cells, tmp_path: Path, capsys: Said) -> None:
    noise(0, 6, 6, 1).save(tmp_path / "copy.bmp")
    spaced, by_space = [[file, label.replace("|", " ")] for file, label in cells], ("--data.delimiter", " ")
    copies = write([*spaced, ["copy.bmp", "bee"]], tmp_path / "copies.csv")
    assert script("prepare_data")([*of_table(copies, *by_space), "--sheet", str(tmp_path / "x.png")]) == 0
    said = capsys.readouterr().out
    assert "labels per image: 10 with 0, 21 with 1, 10 with 2\n" in said
    assert "contradictions:   1 images have other labels in another place\n" in said
    assert "1 images lie in two places with other labels, the same at 6 x 6 pixels" in said
    assert (tmp_path / "x.png").stat().st_size > 1000
    columns = of_table(write(by_column(cells), tmp_path / "columns.csv"), "--data.columns.label", "*")
    for number, words in enumerate((columns, of_table(write(spaced, tmp_path / "spaced.csv"), *by_space))):
        assert train([*words, *SMALL, "--net", "mlp", "--run_dir", str(tmp_path / str(number))]) == 0


def same(cells: Cells) -> Cells:
    return cells


def column_of_none(cells: Cells) -> Cells:
    return [[*row, "0" if number else "cow"] for number, row in enumerate(by_column(cells))]


BAD: list[tuple[Callable[[Cells], Cells], str, str]] = [
    (lambda c: change(6, 2, "2")(by_column(c)), "--data.columns.label *", "row 7: ant is '2'; allowed: 0"),
    (lambda c: change(6, 2, "")(by_column(c)), "--data.columns.label *", "row 7: ant is ''; allowed"),
    (change(6, 1, "ant|ant"), "--data.delimiter |", "row 7 has the label ant twice"),
    (change(6, 1, "ant||bee"), "--data.delimiter |", "row 7 has no label beside a |"),
    (change(6, 1, "1|1.0"), "--data.delimiter |", "row 7: label 1.0 is 1 in row 7; write it in one"),
    (same, "--data.delimiter ;", "no label has a ';', row 2 for instance is 'ant'"),
    (column_of_none, "--data.columns.label *", "row 1: no image is of the class cow; leave out the column"),
    (by_column, "--data.columns.label ant,cow", "no columns 'cow' in row 1: file, bee, ant; say which"),
    (by_column, "--data.columns.label a*", "has only one label, ant; a classifier needs two or more"),
    (same, "--data.delimiter=", "row 5 has no label"),
    (by_column, "--data.columns.label * --data.delimiter |", "delimiter is |; it must be left out"),
    (same, "--data.delimiter | --data.sampling balanced", "shuffled or weighted where"),
    (same, "--data.delimiter | --accept 0.9", "--accept is for one label for each image"),
    (same, "--data.delimiter | --loss mse", "unknown loss of several labels 'mse'."),
    (same, "--data.delimiter | --monitor val_balanced_acc", "Allowed: val_loss, val_f1"),
    (same, "--data.delimiter | --class_weights [1]", "1 numbers for 2 classes"),
]


@pytest.mark.parametrize(("spoil", "words", "message"), BAD)
def test_one_message_for_what_cannot_be(
    spoil: Callable[[Cells], Cells], words: str, message: str, cells: Cells, tmp_path: Path, refused: Refused
) -> None:
    table, before = write(spoil(cells), tmp_path / "t.csv"), {*tmp_path.iterdir()}
    assert message in refused(train, [*of_table(table, *words.split()), "--run_dir", str(tmp_path / "run")], 1, 2)
    assert {*tmp_path.iterdir()} - {tmp_path / "cache"} == before


def random_labels(random: np.random.Generator) -> tuple[Any, Any]:
    """Labels (N, K) that go together more or less, of classes common and rare, and marks (N, 4), some in groups."""
    count, classes = int(random.integers(60, 300)), int(random.integers(2, 9))
    common = random.random((count, 1))
    labels = (random.random((count, classes)) * common < random.uniform(0.02, 0.4, classes)).astype(np.float32)
    labels[random.random(count) < 0.1] = 0
    files = random.integers(1, 2**62, count)
    groups = np.where(random.random(count) < random.choice([0, 0.5]), random.integers(1, count // 2, count), 0)
    return labels, np.column_stack([files, files + 1, np.zeros(count, np.int64), groups * 7919])


@pytest.mark.parametrize("seed", range(40))
def test_parts_keep_each_class_its_share(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels, marks = random_labels(random)
    part = cut(labels, marks, np.full(len(labels), OPEN), {TEST: 0.2, VAL: 0.15}, seed)
    columns = np.column_stack([labels, labels.sum(1) == 0, np.ones(len(labels))])  # and none, and all
    largest = np.unique(marks[marks[:, 3] > 0, 3], return_counts=True)[1].max(initial=1)
    rest = columns.sum(0)
    for name, share in ((TEST, 0.2), (VAL, 0.15)):
        got = columns[part == name].sum(0)
        off = np.abs(got - share * rest) - 2 - largest - 0.1 * share * rest
        assert (off[:-1] <= 0).all(), (got, share * rest)  # images go as a whole: not all can be met at once
        assert off[-1] <= 0.1 * share * rest[-1]
        assert (got[rest > 5 * largest] > 0).all()
        rest = rest - got
    order = random.permutation(len(labels))
    again = cut(labels[order], marks[order], np.full(len(labels), OPEN), {TEST: 0.2, VAL: 0.15}, seed)
    assert (again == part[order]).all()
    assert {*part} <= {TRAIN, VAL, TEST}


def test_a_data_set_of_ones_own_is_cut_too() -> None:
    class Own(ImageDataModule):
        class_names, image_shape, mean, std = ["a", "b", "c"], (1, 2, 2), [0.5], [0.5]
        multi_label = True

        def load(self, split: str) -> Any:
            labels = made_up(200, 3)[1]
            return None if split == "val" else (torch.zeros(200, 1, 2, 2, dtype=torch.uint8), labels)

    _, labels, rows = Own().split("val")
    assert labels[rows].sum(0).min() >= 1
    assert stratified_split(labels, 0.1, 42)[1].equal(rows)
    Own.class_names = ["a", "b"]
    with pytest.raises(DataError, match=r"labels do not lie in 0..1, in the shape \(200, 2\)"):
        Own().split("train")


def made_up(count: int = 1000, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and labels (N, K); no image is of the fifth class."""
    generator = torch.Generator().manual_seed(seed)
    often = torch.tensor([0.5, 0.3, 0.1, 0.05, 0])[:classes]
    labels = (torch.rand(count, classes, generator=generator) < often).float()
    return 2 * torch.randn(count, classes, generator=generator) + 2 * labels - 1, labels


def test_the_loss_is_the_binary_one() -> None:
    logits, labels = made_up()
    shares, weight, smooth = logits.double().sigmoid(), torch.tensor([1.0, 2, 3, 4, 5]), 0.9 * labels + 0.05
    by_hand = -(weight * smooth * shares.log() + (1 - smooth) * (1 - shares).log())
    assert binary_cross_entropy(logits, labels, 0.1, weight).item() == pytest.approx(by_hand.mean().item(), rel=1e-5)
    assert binary_cross_entropy(logits.bfloat16(), labels).dtype == torch.float32
    assert positive_weights(torch.tensor([50, 10, 0]), 100).tolist() == [1, 9, 100]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.filterwarnings("ignore:No positive class found")
def test_metrics_are_those_of_scikit_learn(seed: int) -> None:
    logits, labels = made_up(seed=seed)
    stage = MultiLabelMetrics(5)
    for part in torch.arange(1000).split(7):  # two updates of the metrics, and a rest
        stage.update(torch.tensor(1.0), logits[part], labels[part])
    stage.flush()
    said, shares = logits > 0, logits.sigmoid()
    expected = {
        "loss": 1.0,
        "acc": (said == (labels > 0)).double().mean().item(),
        "map": sk.average_precision_score(labels[:, :4], shares[:, :4], average="macro"),
        "f1": sk.f1_score(labels, said, average="macro", zero_division=0),
        "micro_f1": sk.f1_score(labels, said, average="micro"),
    }
    found = {name: metric.compute().item() for name, metric in stage.by_name.items()}
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("names", ["mixup", "cutmix", "cutmix,mixup"])
def test_mixing_mixes_the_labels(names: str) -> None:
    images, labels = torch.zeros(6, 1, 8, 8, dtype=torch.uint8), made_up(6)[1]
    _, targets = Augment(names)(images, labels, 5, Draws(torch.Generator().manual_seed(0)))
    assert targets.shape == labels.shape
    assert targets.equal(targets.clamp(0, 1))
    assert targets.sum() == pytest.approx(labels.sum().item(), rel=0.9)
    assert Augment("flip")(images, labels, 5, Draws(torch.Generator()))[1].equal(labels)


@pytest.mark.parametrize("factor", [0.3, 1, 3])
def test_the_temperature_undoes_a_factor(factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 3, generator=generator)
    labels = (torch.rand(20_000, 3, generator=generator) < logits.sigmoid()).float()
    assert temperature(factor * logits, labels) == pytest.approx(factor, rel=0.03)
    assert temperature(5 * labels - 2, labels) == 1  # no mistake


@pytest.mark.parametrize("seed", range(5))
def test_thresholds_have_the_best_f1_there_is(seed: int) -> None:
    logits, labels = made_up(200, seed=seed)
    shares = (logits.sigmoid() * 20).round() / 20  # many are the same
    found = best_thresholds(shares, labels)
    assert found[4] == 0.5
    for share, label, threshold in zip(shares.T[:4], labels.T[:4], found, strict=False):
        tried = [sk.f1_score(label, share >= at, zero_division=0) for at in share.unique()]
        assert sk.f1_score(label, share >= threshold, zero_division=0) == pytest.approx(max(tried))
        assert not (share == threshold).any() or threshold == 0


# --- a training, and what becomes of it -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a short training, in every format."""
    run = tmp_path_factory.mktemp("run")
    words = [*data_words(folder), "--net", "mlp", "--augment", "none", "--max_epochs", "8", "--batch_size", "32"]
    with Patch.context() as patch:
        patch.setenv("LIT_NN_CACHE", str(folder / "cache"))
        assert train([*words, "--accelerator", "cpu", "--run_dir", str(run)]) == 0
        assert export([str(run / "checkpoints" / "best.ckpt"), "--format", "all", "--int8"]) == 0
    return run / "checkpoints"


def test_every_file_has_the_thresholds_and_gives_the_same(trained: Path) -> None:
    best, net, checkpoint = open_model(best_path := trained / "best.ckpt"), load_classifier(best_path), read(best_path)
    data = data_of(best)
    images, labels, rows = data.split("val")
    with torch.no_grad():
        logits = net(images[rows])
    assert best.temperature == pytest.approx(temperature(logits, labels[rows]), rel=1e-4)
    assert best.threshold == pytest.approx(best_thresholds(net.probabilities(logits), labels[rows]), abs=1e-5)
    assert net.probabilities(logits).numpy() == pytest.approx((logits / best.temperature).sigmoid().numpy())
    values = [float(row["val_map"]) for row in rows_of(trained.parent / "metrics.csv")]
    assert checkpoint["epoch"] - 1 == values.index(max(values))
    assert checkpoint["hyper_parameters"]["monitor"] == "val_map"
    result, answers = json.loads((trained.parent / "result.json").read_text()), answer_test_images(best, data)
    assert {"test_loss", "test_acc", "test_f1", "test_micro_f1", "val_map"} <= result.keys()
    assert result["test_map"] == pytest.approx(sk.average_precision_score(answers.labels, answers.logits), abs=1e-6)
    for suffix in OPENERS:
        same = open_model(trained / f"best{suffix}")
        assert (same.multi_label, same.threshold, same.temperature) == (True, best.threshold, best.temperature)
        assert same.run(answers.images[:])[1] == pytest.approx(answers.probabilities, abs=1e-5)
        assert predict(same, list(answers.images[:20]))[3].labels == predict(best, answers.images[3])[0].labels
    assert open_model(trained / "best.int8.onnx").multi_label


@pytest.mark.parametrize("name", ["best.ckpt", "best.onnx"])
def test_the_report_is_that_of_scikit_learn(name: str, trained: Path, folder: Path, capsys: Said) -> None:
    where = ["--data_dir", str(folder), "--table", str(folder / "labels.csv")]
    assert evaluate([str(trained / name), *where]) == 0
    report = trained / f"{name}-report"
    files, page = {path.name for path in report.iterdir()}, (report / "report.html").read_text(encoding="utf-8")
    assert {"metrics.json", "per_class.csv", "precision_recall.png"} <= files
    assert "Precision and recall" in page
    assert "confusion.png" not in files
    assert "What is taken for what" not in page
    found, model = json.loads((report / "metrics.json").read_text()), open_model(trained / name)
    answers = answer_test_images(model, data_of(model, None, where[1], where[3]))
    labels, shares = answers.labels, answers.probabilities
    said = shares >= np.array(model.threshold, np.float32)
    precisions = sk.average_precision_score(labels, shares, average=None)
    scores = sk.precision_recall_fscore_support(labels, said, average=None, zero_division=0)
    each = zip(("precision", "recall", "f1", "support"), scores, strict=True)
    for key, values in (*each, ("average_precision", precisions), ("threshold", model.threshold)):
        assert [row[key] for row in found["per_class"].values()] == pytest.approx(list(values), abs=1e-6)
    for average in ("macro", "micro"):
        scores = sk.precision_recall_fscore_support(labels, said, average=average, zero_division=0)
        assert [found[average][key] for key in ("precision", "recall", "f1")] == pytest.approx(list(scores[:3]))
    losses = [sk.log_loss(labels[:, label], shares[:, label]) for label in range(10)]
    assert found["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert found["exact_match"] == pytest.approx(sk.accuracy_score(labels, said))
    assert found["mean_average_precision"] == pytest.approx(precisions.mean(), abs=1e-6)
    assert f"mean average precision {found['mean_average_precision']:.2%} on 100 images" in capsys.readouterr().out


def test_another_table_is_evaluated(trained: Path, folder: Path, refused: Refused) -> None:
    table = write(rows_in(folder)[:341], folder / "fewer.csv")  # 40 of the 100 test images
    assert evaluate([str(trained / "best.onnx"), "--table", table, "--output", str(folder / "report")]) == 0
    assert json.loads((folder / "report" / "metrics.json").read_text())["images"] == 40
    words = [str(trained / "best.ckpt"), "--data", "fashion_mnist_sample"]
    assert "fashion_mnist_sample reads no table" in refused(evaluate, [*words, "--table", table])
    assert "has one label for each image where the model has several" in refused(evaluate, words)


def with_threshold(checkpoint: Path, value: float, path: Path) -> Path:
    """A checkpoint with another threshold for all classes."""
    found = read(checkpoint)
    found["hyper_parameters"]["threshold"] = [value] * 10
    torch.save(found, path)
    return path


def test_predict_names_all_labels_or_none(
    trained: Path, folder: Path, tmp_path: Path, capsys: Said, refused: Refused
) -> None:
    model, paths = open_model(trained / "best.onnx"), [str(folder / f"test/{number}.png") for number in range(60)]
    shares = model.run(np.stack([model.pixels(path) for path in paths]))[1]
    for row, answer in zip(shares, predict(model, paths), strict=True):
        assert answer.labels == [model.class_names[k] for k in np.argsort(-row) if row[k] >= model.threshold[k]]
    least = float(shares.max(1).min()) + 1e-4  # so that one says nothing of the image it is least sure of
    strict = with_threshold(trained / "best.ckpt", least, tmp_path / "strict.ckpt")
    none, many = int(shares.max(1).argmin()), int(np.sort(shares)[:, -2].argmax())
    labels = predict(open_model(strict), paths[many])[0].labels
    assert len(labels) > 1
    words = [str(strict), paths[many], paths[none]]
    assert predict_files(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(label in lines[0] for label in labels)
    assert lines[1].endswith("  none")
    assert predict_files([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [row["labels"] for row in said] == [labels, []]
    assert [len(row["predictions"]) for row in said] == [len(labels), 0]
    assert "--top_k is for one label per image" in refused(predict_files, [*words, "--top_k", "2"])
    assert predict_files([*words, str(folder / "labels.csv"), "--csv", str(tmp_path / "x.csv")]) == 1
    table = rows_of(tmp_path / "x.csv")
    assert [row["labels"] for row in table] == ["|".join(labels), "none", ""]
    assert table[0]["probabilities"].count("|") == len(labels) - 1


def test_the_server_names_all_labels_or_none(trained: Path, folder: Path) -> None:
    with serve(trained / "best.onnx") as served:
        for number in range(12):
            path = folder / "test" / f"{number}.png"
            (result,) = served.ask("/predict", body := path.read_bytes())[1]["results"]
            expected = predict(open_model(trained / "best.onnx"), path)[0].labels
            assert result["labels"] == expected == [one["label"] for one in result["predictions"]]
            assert "sure" not in result
        (result,) = served.ask("/predict?threshold=0&top_k=1", body)[1]["results"]
        assert sorted(result["labels"]) == sorted(NAMES)  # all with their probabilities
        assert served.ask("/predict?threshold=1", body)[1]["results"][0]["labels"] == []


@pytest.mark.posix
@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed: apt-get install chromium")
def test_the_page_names_all_labels_or_none(trained: Path, folder: Path, tmp_path: Path) -> None:
    shares = answer_test_images(model := open_model(trained / "best.ckpt"), data_of(model)).probabilities
    some = float(np.quantile(shares[:12].max(1), 0.3))  # of which some images get none
    half = with_threshold(trained / "best.ckpt", some, tmp_path / "half.ckpt")
    assert export([str(half)]) == 0
    paths = [folder / "test" / f"{number}.png" for number in range(12)]
    expected = [", ".join(one.labels) or "None" for one in predict(open_model(half.with_suffix(".onnx")), paths)]
    assert "None" in expected
    assert any("," in title for title in expected)
    with chromium(tmp_path / "chromium") as tab, ExitStack() as served:
        addresses = [served.enter_context(serve(half.with_suffix(".onnx"))).url]
        if RUNTIME.is_dir():  # else without the page that has no server
            words = ["--format", "web", "--output", str(tmp_path / "web"), "--onnxruntime_web", str(RUNTIME)]
            assert export([str(half), *words]) == 0
            addresses.append(served.enter_context(files_served(tmp_path / "web")))
        for address in addresses:
            tab.open(address)
            tab.drop(*paths)
            assert titles(tab, 12) == expected


def test_a_run_goes_on_exactly(folder: Path, tmp_path: Path) -> None:
    table = write([row[:2] for row in rows_in(folder)], folder / "unsplit.csv")
    words = [*data_words(folder), "--net", "mlp", "--augment", "flip,mixup,cutmix", "--class_weights", "balanced"]
    words += ["--label_smoothing", "0.1", "--schedule", "plateau", "--early_stopping", "5", "--data.fold", "2"]
    words += ["--data.folds", "3", "--data.table", table]
    assert_resumes_exactly(words, tmp_path / "stopped")
    assert_resumes_exactly([*words, "--save_every_steps", "1"], tmp_path / "killed", kill=True)


def test_a_run_does_not_go_on_with_one_label(trained: Path, folder: Path, refused: Refused) -> None:
    names, *rows = rows_in(folder)
    single = [[file, label.partition("|")[0] or NAMES[0], split] for file, label, split in rows]
    words = ["--data.table", write([names, *single], folder / "single.csv"), "--data.delimiter", ""]
    said = refused(train, ["--resume", str(trained / "last.ckpt"), *words, "--max_epochs", "9"])
    assert "one label for each image where the model has several" in said


@pytest.mark.posix
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_are_one_run(folder: Path, tmp_path: Path) -> None:
    words = [*CPU, *data_words(folder), "--net", "mlp", "--augment", "flip", "--class_weights", "balanced"]
    words += ["--max_epochs", "2", "--schedule", "constant", "--optimizer", "momentum", "--lr", "0.01"]
    together("lightning", [*words, "--batch_size", "16", "--run_dir", "two"], tmp_path)
    assert train([*words, "--batch_size", "32", "--run_dir", str(tmp_path / "one")]) == 0
    agree(tmp_path / "one", tmp_path / "two")
    again = ["--trainer.max_steps", "12", "--batch_size", "16", "--save_every_steps", "2", "--run_dir", "three"]
    together("lightning", [*words, *again], tmp_path)  # which ends inside of an epoch
    alone = ["--devices", "1", "--strategy", "auto", "--batch_size", "32", "--trainer.max_steps", "-1"]
    assert train(["--resume", str(tmp_path / "three"), *alone]) == 0
    agree(tmp_path / "one", tmp_path / "three")


def test_thresholds_must_fit() -> None:
    arguments: dict[str, Any] = {"class_names": ["a", "b"], "image_shape": (1, 8, 8), "mean": [0.5], "std": [0.5]}
    assert LitClassifier(**arguments, net="mlp", multi_label=True).threshold == [0.5, 0.5]
    for threshold, several in (([0.5], True), ([0.5, 0.5], False), ([0.5, 1.5], True)):
        with pytest.raises(UsageError, match="threshold"):
            LitClassifier(**arguments, net="mlp", threshold=threshold, multi_label=several)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_recipe_is_as_good_as_a_plain_loop(tmp_path: Path, capsys: Said) -> None:
    """Three seeds each, with the same images, network, and number of epochs, and no augmentation; prints both."""
    table = str(write_garments(tmp_path, 3000, 1000))
    data = ImageTable(table, delimiter="|", image_size=[28, 56])
    (images, labels, own), (tests, given, rows) = data.split("train"), data.split("test")
    found: dict[str, list[float]] = {"recipe": [], "plain": []}
    for seed in range(3):
        words = [*data_words(tmp_path), "--seed", str(seed), "--augment", "none", "--accelerator", "cpu"]
        assert train([*words, "--trainer.logger", "false", "--run_dir", str(tmp_path / str(seed))]) == 0
        found["recipe"].append(json.loads((tmp_path / str(seed) / "result.json").read_text())["test_map"])
        torch.manual_seed(seed)
        net = build_net("lenet", 1, 10, (28, 56))
        found["plain"].append(plain_loop(net, (images[own], labels[own]), (tests[rows], given[rows]), 20))
    with capsys.disabled():
        print(found)
    assert np.mean(found["recipe"]) >= np.mean(found["plain"]) - 0.01
