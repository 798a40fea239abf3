"""Runs side by side: seeds and folds are put together, what differs is named, and what is no run is said."""

import json
from pathlib import Path

import pytest
from conftest import Patch, Refused, Said, script

main = script("compare")


def make_run(
    folder: Path, net: str, lr: float, seed: int, accuracy: float, data: str = "sample", more: str = ""
) -> None:
    folder.mkdir(parents=True)
    config = f"seed_everything: {seed}\nmodel: {{net: {net}, lr: {lr}}}\ndata:\n  class_path: data_modules.{data}\n"
    config += f"  init_args: {{folds: 3, fold: {seed + 1}, batch_size: 8, seed: {seed}}}\n"
    (folder / "config.yaml").write_text(config + more, encoding="utf-8")
    result = {"net": net, "data": data, "test_acc": accuracy, "test_loss": 1 - accuracy}
    result |= {"val_acc": accuracy, "num_params": 1234, "epochs": 2, "seconds": 1.5, "seed": seed}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    lines = ["epoch,step,lr,train_loss,train_acc,val_loss,val_acc", "0,1,0.1,2,0.1,,", "1,2,0.1,1,0.5,1,0.5"]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: Patch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, accuracy in enumerate((0.8, 0.9, 0.85)):
        make_run(tmp_path / f"runs/sample-lenet/{seed}", "lenet", 0.1, seed, accuracy)
    make_run(tmp_path / "runs/sample-mlp/a", "mlp", 0.1, 0, 0.95)
    make_run(tmp_path / "runs/sample-mlp/b", "mlp", 0.2, 0, 0.5)
    return tmp_path / "runs"


@pytest.mark.parametrize("words", [["runs"], ["runs/*/*"], ["runs/sample-*", "runs/sample-mlp/a"]])
def test_table_and_curves(words: list[str], runs: Path, capsys: Said) -> None:
    assert main(words) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    rows = [" ".join(line.split()) for line in printed.out.splitlines()[4:10]]
    assert rows[::2] == [
        "net mlp 1 95.00% 0.0500 95.00% 1,234 2 1.5",
        "net lenet 3 85.00% ± 5.00% 0.1500 ± 0.0500 85.00% ± 5.00% 1,234 2 1.5",
        "net mlp 1 50.00% 0.5000 50.00% 1,234 2 1.5",
    ]
    assert rows[1::2] == ["lr 0.1", "lr 0.1", "lr 0.2"]
    assert f"The best run: {Path('runs/sample-mlp/a')}" in printed.out
    assert Path("comparison.png").stat().st_size > 10_000


def test_runs_with_several_labels_go_by_their_mean_average_precision(tmp_path: Path, capsys: Said) -> None:
    for name, lr, accuracy, precision in (("says_no", 0.1, 0.96, 0.21), ("good", 0.2, 0.94, 0.88)):
        make_run(tmp_path / name, "lenet", lr, 0, accuracy)
        path = tmp_path / name / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"test_map": precision}), encoding="utf-8")
    assert main([str(tmp_path), "--output", str(tmp_path / "curves.png")]) == 0
    said = capsys.readouterr().out
    assert f"The best run: {tmp_path / 'good'}" in said.replace("\n", "")
    assert "test_map" in said


def test_what_is_no_run_is_said_and_the_others_are_compared(runs: Path, capsys: Said) -> None:
    make_run(runs / "other", "mlp", 0.1, 0, 0.9, "cifar10", "ema: 0.9\n")  # another data set and one option more
    (runs / "sample-lenet/0/result.json").unlink()
    (runs / "sample-lenet/1/result.json").write_text("{}", encoding="utf-8")
    (runs / "sample-lenet/2/metrics.csv").write_text("no\ntable\n", encoding="utf-8")
    assert main(["none", "runs"]) == 0
    printed = capsys.readouterr()
    assert "none is not a finished run" in printed.err
    for number, reason in enumerate(("result.json", "data", "val_acc")):
        assert any(f"{number} is not" in line and reason in line for line in printed.err.splitlines())
    labels = [line.split()[:2] for line in printed.out.splitlines()[4:13]]
    assert labels[3:6] == [["data", "cifar10"], ["lr", "0.1"], ["ema", "0.9"]]
    assert labels[6:] == [["data", "sample"], ["lr", "0.2"], ["ema", "-"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs", "--output", "curves.txt"], "--output curves.txt: the file's name must end in .png, .jpg, .svg, .pdf"),
        (["none"], "nothing to compare: name folders of finished runs"),
        ([], "the following arguments are required: DIR"),
    ],
)
def test_one_message_for_a_mistake(words: list[str], message: str, runs: Path, refused: Refused) -> None:
    assert refused(main, words).startswith(f"error: {message}")
