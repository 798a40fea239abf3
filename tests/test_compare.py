"""Runs side by side: seeds are put together, what differs is named, and what is no run is said."""

import json
from pathlib import Path

import pytest
from PIL import Image

from lit_nn.compare import experiments, find_runs, main


def make_run(
    folder: Path,
    net: str,
    lr: float,
    seed: int,
    accuracy: float,
    data: str = "fashion_mnist_sample",
    more: str = "",
) -> None:
    folder.mkdir(parents=True)
    config = f"seed_everything: {seed}\nmodel: {{net: {net}, lr: {lr}}}\n"
    config += f"data: {{class_path: data_modules.{data.upper()}, init_args: {{batch_size: 8}}}}\n"
    (folder / "config.yaml").write_text(config + more)
    result = {"net": net, "data": data, "test_acc": accuracy, "test_loss": 1 - accuracy}
    result |= {"val_acc": accuracy, "num_params": 1234, "epochs": 2, "seconds": 1.5, "seed": seed}
    (folder / "result.json").write_text(json.dumps(result))
    lines = ["epoch,step,lr,train_loss,train_acc,val_loss,val_acc", "0,1,0.1,2,0.1,2,0.1", "1,2,0.1,1,0.5,1,0.5"]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, accuracy in enumerate((0.8, 0.9, 0.85)):
        make_run(tmp_path / f"runs/sample-lenet/{seed}", "lenet", 0.1, seed, accuracy)
    make_run(tmp_path / "runs/sample-mlp/a", "mlp", 0.1, 0, 0.95)
    make_run(tmp_path / "runs/sample-mlp/b", "mlp", 0.2, 0, 0.5)
    return tmp_path / "runs"


def test_table_and_curves(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder) for folder in sorted(runs.iterdir())]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    rows = [line.strip() for line in printed.out.splitlines()[4:7]]
    assert rows[0].startswith("net mlp, lr 0.1 ")
    assert rows[1].startswith("net lenet, lr 0.1 ")
    assert "85.00% ± 5.00%" in rows[1]
    assert "1,234" in rows[1]
    assert rows[2].startswith("net mlp, lr 0.2 ")
    assert "±" not in rows[2]
    assert "batch_size" not in printed.out
    assert "5 runs, all with data fashion_mnist_sample" in printed.out
    with Image.open("comparison.png") as picture:
        assert picture.width > 1000


def test_the_data_set_is_named_and_only_options_that_a_run_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a", "mlp", 0.1, 0, 0.9, "cifar10", "ema: 0.9\n")
    make_run(tmp_path / "b", "mlp", 0.1, 0, 0.8)
    assert main(["a", "b"]) == 0
    rows = [line.strip() for line in capsys.readouterr().out.splitlines()[4:6]]
    assert rows[0].startswith("data cifar10, ema 0.9  ")
    assert rows[1].startswith("data fashion_mnist_sample  ")


def test_much_that_differs_stands_in_a_table_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, lr in enumerate((0.1, 0.2, 0.3, 0.4, 0.5)):
        more = f"trainer: {{precision: bf16-mixed, max_epochs: {number}}}\n" if number else ""
        make_run(tmp_path / str(number), "mlp", lr, 0, 0.9 - lr, "cifar10" if number == 1 else "image_folder", more)
    assert main([str(number) for number in range(5)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["model.lr", "0.1", "0.2", "0.3", "0.4"] in rows  # the fifth is in the next table
    assert ["data", "image_folder", "cifar10", "image_folder", "image_folder"] in rows
    assert ["trainer.max_epochs", "4"] in rows
    assert ["trainer.max_epochs", "1", "2", "3"] in rows  # the first has none
    assert ["1", "1", "80.00%"] in [row[:3] for row in rows]


def test_a_run_named_twice_counts_once(runs: Path) -> None:
    found, problems = find_runs([runs, runs / "sample-lenet", runs / "sample-mlp/a"])
    assert len(found) == 5
    assert not problems
    assert [len(experiment.runs) for experiment in experiments(found)] == [1, 3, 1]


def test_what_is_no_run_is_said_and_the_others_are_compared(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "empty").mkdir()
    (runs / "sample-lenet/0/result.json").unlink()
    (runs / "sample-lenet/1/result.json").write_text("{}")
    (runs / "sample-lenet/2/metrics.csv").write_text("no\ntable\n")
    assert main(["runs/empty", "runs"]) == 0
    printed = capsys.readouterr()
    assert "2 runs" in printed.out
    lines = printed.err.splitlines()
    assert len(lines) == 4
    for line, words in zip(
        lines, ("empty: no run", "0: not a finished run, result.json", "1: cannot", "2: "), strict=True
    ):
        assert words in line


@pytest.mark.parametrize("output", ["curves.txtx", "curves"])
def test_a_name_that_is_no_pictures_is_refused_at_once(
    output: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", "--output", output]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"error: --output {output}: the file's name must end in .png, .jpg, .svg, .pdf\n"


def test_epochs_without_validation_are_left_out(runs: Path) -> None:
    folder = runs / "sample-mlp/b"
    lines = ["epoch,step,lr,train_loss,train_acc,val_loss,val_acc", "0,1,.1,2,.1,,", "1,2,.1,1.5,.2,1.2,.3"]
    (folder / "metrics.csv").write_text("\n".join([*lines, "2,3,.1,1,.4,,"]) + "\n")
    found, problems = find_runs([folder])
    assert not problems
    assert found[0].curves["val_acc"] == ([2], [0.3])
    assert found[0].curves["train_loss"] == ([1, 2, 3], [2, 1.5, 1])


def test_nothing_to_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 1
    assert "error: nothing to compare" in capsys.readouterr().err
    assert main([]) == 2
