"""Tables of every kind, broken ones among them, become a data set or one clear message."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Patch, Refused, Said, noise, script
from PIL import Image
from resume_runs import differences, finished, stopped_and_continued

from data_modules import DataError, DataNote, FashionMNISTSample, OptionError
from data_modules.base import SPLITS
from data_modules.image_folder import ImageFolder
from data_modules.image_table import ImageTable
from lit_nn.trained.predict import open_model

Cells = list[list[str]]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: Patch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cells() -> Cells:
    """Header and rows of a table of 40 images in pics/, 20 ants and 20 bees."""
    Path("pics").mkdir()
    for number in range(40):
        noise(number, 6, 6).save(f"pics/{number:02}.png")
    return [["file", "label"], *([f"{number:02}.png", ("ant", "bee")[number % 2]] for number in range(40))]


def write(cells: Cells, path: str = "pics/labels.csv", delimiter: str = ",", encoding: str = "utf-8") -> str:
    with Path(path).open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows(cells)
    return path


def with_column(cells: Cells, name: str, values: list[str]) -> Cells:
    return [[*row, value] for row, value in zip(cells, [name, *values], strict=True)]


# --- what it gives ----------------------------------------------------------------------------------------------------


def test_it_trains_like_the_folder_with_the_same_images(here: Path) -> None:
    """To the same bit; some of the embedded images, so that it takes seconds."""
    sample, cells = FashionMNISTSample(), [["file", "label", "split"]]
    for split in ("train", "test"):
        images, labels, _ = sample.split(split)
        for label, name in enumerate(sample.class_names):
            folder = Path("images", split, name.replace("/", "-"))
            folder.mkdir(parents=True)
            for row in (labels == label).nonzero().flatten()[:40].tolist():
                Image.fromarray(images[row, 0].numpy()).save(folder / f"{row:04}.png")
    paths = sorted(Path("images").rglob("*.png"), key=lambda path: (path.parts[1] == "test", path.parts))
    cells += [[path.relative_to("images").as_posix(), path.parts[2], path.parts[1]] for path in paths]
    table = write(cells, "labels.csv")
    words = ["--augment", "translate", "--max_epochs", "2", "--batch_size", "32", "--accelerator", "cpu"]
    words += ["--trainer.logger", "false"]
    for name, data in (("folder", ["image_folder"]), ("table", ["image_table", "--data.table", table])):
        assert script("train")(["--data", *data, "--data_dir", "images", "--run_dir", name, *words]) == 0
    one, other = (torch.load(f"{name}/checkpoints/last.ckpt", weights_only=True) for name in ("folder", "table"))
    assert all(tensor.equal(other["state_dict"][name]) for name, tensor in one["state_dict"].items())
    assert all(table.equal(other["parts"][name]) for name, table in one["parts"].items())
    assert Path("folder/metrics.csv").read_text() == Path("table/metrics.csv").read_text()


@pytest.mark.parametrize(
    ("delimiter", "encoding", "name"),
    [(",", "utf-8", "a.csv"), (";", "utf-8-sig", "a.csv"), ("\t", "utf-16", "a.txt"), ("\t", "utf-8", "a.tsv")],
)
def test_delimiters_and_encodings_are_told_by_the_content(
    delimiter: str, encoding: str, name: str, cells: Cells
) -> None:
    shutil.move("pics/00.png", "pics/a,b; c.png")
    cells[1][0], cells[3][1], cells[5][1] = "a,b; c.png", "a\u0301nt", " \u00e1nt\n"  # one name in two spellings
    write(with_column(cells, "1,2,3,4;5;6;7", [""] * 40), f"pics/{name}", delimiter, encoding)
    data = ImageTable(f"pics/{name}")
    assert data.class_names == ["ant", "bee", "\u00e1nt"]
    assert data._listing.files == [row[0] for row in cells[1:]]
    assert Counter(data._listing.labels) == {0: 18, 1: 20, 2: 2}


def test_parquet(cells: Cells) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns: dict[str, list[Any]] = {"file": [row[0] for row in cells[1:]], "label": [0, 1] * 20}
    parquet.write_table(pyarrow.table(columns), "pics/labels.parquet")
    assert ImageTable("pics/labels.parquet").class_names == ["0", "1"]
    columns["label"][6] = None
    parquet.write_table(pyarrow.table(columns), "pics/labels.parquet")
    with pytest.raises(DataError, match=r"labels\.parquet: row 7 has no label"):
        ImageTable("pics/labels.parquet").prepare_data()


@pytest.mark.parametrize("place", ["beside", "in data_dir", "elsewhere", "absolute"])
def test_where_files_and_table_are_looked_for(place: str, cells: Cells, here: Path) -> None:
    if place == "absolute":
        cells = [cells[0], *([str(here / "pics" / file), label] for file, label in cells[1:])]
    table = write(cells, "pics/labels.csv" if place in ("beside", "in data_dir") else "labels.csv")
    options: dict[str, Any] = {} if place == "beside" else {"data_dir": "pics"}
    images, _, rows = ImageTable("labels.csv" if place == "in data_dir" else table, **options).split("train")
    with Image.open(f"pics/{rows[0]:02}.png") as first:
        assert images[rows[0]].equal(torch.from_numpy(np.asarray(first).transpose(2, 0, 1).copy()))


def test_split_group_weight_and_other_names(cells: Cells) -> None:
    parts = [("test", "train", "val", "train")[number // 2 % 4] for number in range(40)]
    groups = [f"g{number // 2 % 4}" for number in range(39)] + [""]
    cells = with_column(with_column(with_column(cells, "part", parts), "group", groups), "grams", ["3", *["0.5"] * 39])
    cells[0][:2] = ["path", "kind"]
    table = write(cells)
    words = ["--data", "image_table", "--data.table", table, "--data.columns.file", "path", "--data.columns.label=kind"]
    assert script("prepare_data")([*words, "--data.columns.split", "part", "--sheet", "x.png"]) == 0
    data = ImageTable(table, {"file": "path", "label": "kind", "split": "part", "weight": "grams"}, sampling="weighted")
    for split in SPLITS:
        assert {parts[row] for row in data.split(split)[2]} == {split}
    assert data.weights is not None
    assert data.weights[:2].tolist() == [3.0, 0.5]
    own = ImageTable(table, {"file": "path", "label": "kind"})
    with pytest.warns(DataNote, match=r"columns that are not used: part, grams"):
        own.prepare_data()
    assert sum(len({groups[row] for row in own.split(split)[2]} - {""}) for split in SPLITS) == 4


def test_weights_say_how_often_an_image_is_drawn(cells: Cells) -> None:
    data = ImageTable(write(with_column(cells, "weight", ["0", "1", "2", "5"] * 10)), sampling="weighted", batch_size=1)
    loader, counts = data.train_dataloader(), torch.zeros(40)
    for epoch in range(200):
        loader.set_epoch(epoch)
        counts += loader.order().bincount(minlength=40)
    rows = data.split("train")[2]
    weights = torch.tensor([0.0, 1, 2, 5] * 10)[rows]
    assert counts.sum() == 200 * len(rows)
    assert counts[rows] / counts.sum() == pytest.approx(weights / weights.sum(), abs=0.01)
    with pytest.raises(OptionError, match="all training images have the weight 0"):
        ImageTable(write(with_column(cells, "weight", ["0"] * 40)), sampling="weighted").train_dataloader()


# --- what is wrong with a table ---------------------------------------------------------------------------------------


def change(row: int, column: int, value: str) -> Any:
    def changed(cells: Cells) -> Cells:
        cells[row][column] = value
        return cells

    return changed


def column(name: str, *values: str) -> Any:
    """One more column, which ends with these values; the first of them stands in the rows before."""
    return lambda cells: with_column(cells, name, [values[0]] * (41 - len(values)) + [*values[1:]])


BAD: dict[str, tuple[Any, str]] = {
    "missing file": (change(6, 0, "no.png"), "row 7: no such file: pics/no.png"),
    "no file": (change(6, 0, ""), "row 7 has no file"),
    "folder": (change(6, 0, "."), "row 7: no such file: pics"),
    "empty label": (change(6, 1, " "), "row 7 has no label"),
    "twice": (change(6, 0, "../pics/01.png"), "row 7 names the file of row 3 again: ../pics/01.png"),
    "split": (column("split", "train", "dev"), "row 41: split 'dev'; allowed: train"),
    "no split": (column("split", "train", ""), "row 41: split ''; allowed: train"),
    "weight": (column("weight", "1", "0,5"), "row 41: weight '0,5'; it must be a"),
    "negative": (column("weight", "1", "-1"), "row 41: weight '-1'; it must be a"),
    "1 and 1.0": (
        lambda cells: [cells[0], *([row[0], ("1", "2", "2.0", "01")[n % 4]] for n, row in enumerate(cells[1:]))],
        "row 4: label 2.0 is 2 in row 3; write it in one way, row 5: label 01 is 1 in row 2; write it in one way",
    ),
    "columns": (change(0, 1, "kind"), "has no columns 'label' in row 1: file, kind; say which is the label: --data.co"),
    "two columns": (column("label", "x"), "has 2 columns 'label' in row 1"),
    "cells": (lambda cells: [*cells, ["a.png", "ant", "3"]], "row 42 has 3 cells, the header 2"),
    "no header": (lambda cells: cells[1:], "has no columns 'file' in row 1: 00.png, ant"),
    "no rows": (lambda cells: cells[:1], "has no rows below its header"),
    "empty": (lambda cells: [], "has no rows below its header"),
    "one label": (lambda cells: [[row[0], "label"] for row in cells], "has only one label, label; a classifier needs"),
    "many": (lambda cells: [cells[0], *([f"x{file}", label] for file, label in cells[1:])], "x09.png and 30 more"),
    "lone val": (column("split", "val"), "no training image of ant, bee; add some or remove the class"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize(("delimiter", "encoding"), [(",", "utf-8"), (";", "utf-8-sig")])
def test_one_message_for_a_bad_table(kind: str, delimiter: str, encoding: str, cells: Cells, refused: Refused) -> None:
    spoil, message = BAD[kind]
    table = write(spoil(cells), "pics/labels.csv", delimiter, encoding)
    said = refused(script("train"), ["--data", "image_table", "--data.table", table, "--run_dir", "run"], 1)
    said = said.replace("\\", "/")
    assert said.startswith(f"error: {table if kind != 'lone val' else 'pics'}")
    assert message in said
    assert not Path("run").exists()
    assert kind == "lone val" or not Path("cache").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"file,label\n1.png,caf\xe9\n", "row 2: not UTF-8 text; save the table as CSV in UTF-8"),
        (b'file,label\n1.png,"cat\n2.png,dog\n', "line 3: not CSV (unexpected end of data)"),
        (b"PK\x03\x04\x14\x00\x06\x00\x08\xff\xff", "row 1: not UTF-8 text"),
        (b"PAR1 and no more", "Parquet file"),
        (b'{"labels": "' + b"a" * 200_000, "line 1: not CSV (field larger than field limit"),
        (b"file,label,group\n1.png,cat\n", "row 2 has 2 cells, the header 3"),
        (b"file,label\n1.png,cat,\n", "row 2 has 3 cells, the header 2 (quote a cell with a delimiter)"),
        (b"\xff\xfef\x00i", "row 1: not UTF-8 text"),
    ],
)
def test_one_message_for_a_file_that_is_no_table(content: bytes, message: str, cells: Cells, refused: Refused) -> None:
    Path("labels.csv").write_bytes(content)
    said = refused(script("prepare_data"), ["--data", "image_table", "--data.table", "labels.csv"], 1)
    assert said.startswith("error: labels.csv")
    assert message in said
    assert {path.name for path in Path().iterdir()} == {"pics", "labels.csv"}


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("", 2, "image_table needs a table with the columns file and label: --data.table labels.csv"),
        ("--data.table none.csv", 1, "none.csv: no such file"),
        ("--data.table pics", 1, "pics: no such file"),
        ("--data.table pics/t.csv --data.columns.fiel path", 2, "it must be names for some of file, label, split"),
        ("--data.table pics/t.csv --data.columns.weight much", 1, "has no columns 'much' in row 1: file, label, group"),
        ("--data.table pics/t.csv --data.sampling weighted", 2, "the table has no column weight"),
        ("--data.table pics/t.csv --data.delimiter #", 2, "delimiter is None; it must be text"),
        ("--data.table pics/t.csv --data.group_by .", 2, "group_by is .; it must be left out: the table has groups"),
    ],
)
def test_one_message_for_a_mistake(words: str, status: int, message: str, cells: Cells, refused: Refused) -> None:
    write(with_column(cells, "group", [str(number // 2) for number in range(40)]), "pics/t.csv")
    line = ["--data", "image_table", *words.split(), "--run_dir", "run"]
    assert message in refused(script("train"), line, status)
    assert not Path("run").exists()


def test_long_numbers_are_classes_of_their_own(cells: Cells) -> None:
    names = ["10000000000000000", "10000000000000001"]  # one number in floating point
    rows = [[row[0], names[number % 2]] for number, row in enumerate(cells[1:])]
    assert ImageTable(write([cells[0], *rows])).class_names == names


def test_missing_files_can_be_left_out(cells: Cells) -> None:
    data = ImageTable(write([*cells, ["no.png", "ant"]]), on_error="skip")
    with pytest.warns(DataNote, match=r"1 of 41 images in pics cannot be read:\n  no.png: No such file"):
        assert sum(len(data.split(split)[2]) for split in SPLITS) == 40


# --- what becomes of it -----------------------------------------------------------------------------------------------


def test_a_run_goes_on_exactly_and_its_model_finds_its_test_images(cells: Cells, here: Path, capsys: Said) -> None:
    columns = {"group": [f"g{number // 2}" for number in range(40)], "weight": ["1", "2"] * 20}
    for name, values in columns.items():
        cells = with_column(cells, name, values)
    words = ["--data", "image_table", "--data.table", write(cells), "--net", "mlp", "--data.sampling", "weighted"]
    words += ["--monitor", "val_f1", "--schedule", "plateau", "--model.schedule_args.patience", "0"]
    words += ["--early_stopping", "5", "--data.folds", "4", "--data.fold", "2"]
    straight = finished(words, here / "straight")
    assert differences(straight, stopped_and_continued(words, here / "stopped", [2, 4, 6])) == []
    best = straight / "checkpoints" / "best.ckpt"
    assert script("export")([str(best)]) == 0
    assert open_model(best.with_suffix(".onnx")).data["options"]["table"] == "labels.csv"  # not where it lay
    for model, more in ((best, []), (best.with_suffix(".onnx"), ["--data_dir", "pics"])):
        capsys.readouterr()
        assert script("evaluate")([str(model), *more]) == 0
        assert json.loads((best.parent / f"{model.name}-report" / "metrics.json").read_text())["images"] == 10


def test_a_model_is_tried_on_another_table(cells: Cells, here: Path, capsys: Said, refused: Refused) -> None:
    groups = [f"g{number // 2}" for number in range(40)]
    weighted = with_column(with_column(cells, "group", groups), "weight", ["1"] * 40)
    words = ["--data", "image_table", "--data.table", write(weighted), "--net", "mlp", "--data.sampling", "weighted"]
    best = finished([*words, "--data.folds", "4"], here / "run") / "checkpoints" / "best.ckpt"
    for number in range(40, 70):
        noise(number, 6, 6).save(f"pics/{number}.png")
    others = [["file", "label"], *([f"{number}.png", ("ant", "bee")[number % 2]] for number in range(40, 70))]
    for table in (others, with_column(others, "split", ["test"] * 30)):  # neither weights, nor parts, nor folds
        assert script("evaluate")([str(best), "--table", write(table, "pics/others.csv")]) == 0
        assert json.loads((best.parent / "best.ckpt-report" / "metrics.json").read_text())["images"] == 30
        capsys.readouterr()
    strangers = with_column(others, "group", [f"g{number}" for number in range(30)])  # 15 of these were trained on
    with pytest.warns(DataNote, match="the groups of 15 images have the names of groups trained on"):
        assert script("evaluate")([str(best), "--table", write(strangers, "pics/others.csv")]) == 0
    assert "on 15 images" in capsys.readouterr().out
    lone = [others[0], *(row for row in others if row[1] == "ant")]
    assert "lacking bee" in refused(script("evaluate"), [str(best), "--table", write(lone, "pics/others.csv")])


def test_prepare_data_shows_groups_copies_and_sizes(cells: Cells, capsys: Said) -> None:
    noise(0, 6, 6).save("pics/copy.bmp")
    Image.new("RGB", (30, 20), "red").save("pics/41.png")
    cells = with_column([*cells, ["copy.bmp", "bee"], ["41.png", "bee"]], "group", ["a", "b"] + ["c"] * 3 + [""] * 37)
    assert script("prepare_data")(["--data", "image_table", "--data.table", write(cells), "--sheet", "x.png"]) == 0
    said = capsys.readouterr().out
    assert "duplicates:       1 images are copies of another\ncontradictions:   1 images lie in two classes\n" in said
    assert "sizes of files:   6 x 6 to 30 x 20, median 6 x 6 (width x height)\n" in said
    assert "groups:           3 of 1 to 3 images, " in said
    assert "; 37 images in no group\n" in said


def test_no_table_or_folder_replaces_the_cache_of_another(cells: Cells, here: Path) -> None:
    for file, label in cells[1:]:
        Path("both", label).mkdir(parents=True, exist_ok=True)
        shutil.move(f"pics/{file}", f"both/{label}/{file}")
    cells = [cells[0], *([f"{label}/{file}", label] for file, label in cells[1:])]
    tables = [write(cells, "both/all.csv"), write(cells[:21], "both/half.csv")]
    times = []
    for _ in range(2):
        for data in (ImageFolder("both"), *map(ImageTable, tables)):
            data.prepare_data()
        times.append({path.name: path.stat().st_mtime_ns for path in (here / "cache").glob("*.np[yz]")})
    assert times[0] == times[1]
    assert len(times[0]) == 6  # images and index of each
