"""The main job through its real entry points: train, what it writes, repeat, reload, and what happens on mistakes."""

import csv
import json
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from conftest import ROOT, Command
from filelock import FileLock
from snippets import snippets
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_modules import DATA_MODULES
from data_modules.augment import AUGMENTATIONS
from data_modules.batches import Batch
from data_modules.fashion_mnist_sample import FashionMNISTSample
from lit_nn import LitClassifier, load_classifier
from lit_nn.cli import LitCLI, quieten
from lit_nn.commands import lightning_cli, train
from lit_nn.commands import run as run_command
from lit_nn.flags import flags, listed
from lit_nn.init import INITS
from lit_nn.losses import LOSSES
from lit_nn.nets import NETS
from lit_nn.optim import OPTIMIZERS, ScheduleName

FAST = ("--fast_dev_run", "--accelerator", "cpu", "--batch_size", "8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs on the embedded images."""
    folder = tmp_path_factory.mktemp("train") / "run"
    words = ["--net", "lenet", "--max_epochs", "2", "--run_dir", str(folder), "--accelerator", "cpu", "--seed", "7"]
    assert train([*words, "--trainer.log_every_n_steps", "5"]) == 0
    return folder


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_run_folder_holds_everything(run: Path) -> None:
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.csv", "result.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt"} <= files
    assert [file for file in files if file.startswith("events.out.tfevents")]
    assert not [file for file in files if ".tmp" in file]
    result = result_of(run)
    assert result["net"] == "lenet"
    assert result["data"] == "fashion_mnist_sample"
    assert result["epochs"] == 2
    assert result["seed"] == 7
    assert result["num_params"] == 61_706  # the tutorial's LeNet on one channel
    assert result["test_acc"] > 0.5
    assert {"test_loss", "val_acc", "seconds", "versions", "git_commit"} <= result.keys()


def test_metrics_csv_has_one_row_per_epoch(run: Path) -> None:
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert [row["step"] for row in rows] == ["42", "84"]  # 5,400 images in full batches of 128
    assert all(float(value) > 0 for row in rows for name, value in row.items() if name != "epoch")
    assert max(float(row["val_acc"]) for row in rows) == result_of(run)["val_acc"]


def test_metrics_csv_leaves_out_the_validation_that_an_epoch_did_not_have(tmp_path: Path) -> None:
    few = ["--net", "mlp", "--accelerator", "cpu", "--trainer.limit_train_batches", "2", "--max_epochs", "3"]
    assert train([*few, "--trainer.check_val_every_n_epoch", "2", "--run_dir", str(tmp_path)]) == 0
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["train_loss"]) for row in rows] == [True] * 3
    assert [bool(row["val_acc"]) for row in rows] == [bool(row["val_loss"]) for row in rows] == [False, True, False]


def test_tensorboard_has_scalars_pictures_graph_and_hyperparameters(run: Path) -> None:
    found: dict[str, set[str]] = {"scalars": set(), "images": set()}
    graph = hparams = False
    for file in run.glob("events.out.tfevents*"):
        events = EventAccumulator(str(file))
        tags = events.Reload().Tags()
        found["scalars"] |= set(tags["scalars"])
        found["images"] |= set(tags["images"])
        graph |= tags["graph"]
        hparams |= "_hparams_/session_start_info" in events.summary_metadata
    wanted = {"train_loss", "train_acc", "val_loss", "val_acc", "test_loss", "test_acc", "train_loss_step", "lr"}
    assert wanted | {"final/test_acc"} <= found["scalars"]
    assert found["images"] == {"train/samples", "test/confusion", "test/mistakes"}
    assert graph
    assert hparams


def test_best_checkpoint_has_the_reported_accuracy(run: Path) -> None:
    images, labels, indices = FashionMNISTSample().split("test")
    classifier = load_classifier(run / "checkpoints" / "best.ckpt")
    with torch.no_grad():
        accuracy = (classifier(images[indices]).argmax(1) == labels[indices]).double().mean().item()
    assert accuracy == pytest.approx(result_of(run)["test_acc"], abs=1e-7)


def test_both_ways_to_load_give_equal_logits(run: Path, command: Command) -> None:
    path = run / "checkpoints" / "last.ckpt"
    images = FashionMNISTSample().split("test")[0][:7]
    first, second = load_classifier(path), LitClassifier.load_from_checkpoint(path, map_location="cpu").eval()
    assert not first.training
    with torch.no_grad():
        assert torch.equal(first(images), second(images))
        expected = first(images).sum().item()
    program = (
        "import torch, lit_nn; from data_modules import FashionMNISTSample; torch.set_num_threads(1);"
        f"model = lit_nn.load_classifier({str(path)!r});"
        "print(repr(model(FashionMNISTSample().split('test')[0][:7]).sum().item()))"
    )
    assert float(command("-c", program).stdout) == expected  # in a fresh process, from the file alone


def test_checkpoint_holds_plain_values_only(run: Path) -> None:
    def check(value: object) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                assert type(key) in (str, int)
                check(item)
        elif isinstance(value, list | tuple | set):
            for item in value:
                check(item)
        else:
            assert value is None or isinstance(value, bool | int | float | str | torch.Tensor)

    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    check(dict(checkpoint))
    assert checkpoint["hyper_parameters"]["net"] == "lenet"
    assert checkpoint["hyper_parameters"]["class_names"] == FashionMNISTSample.class_names
    assert checkpoint["settings"]["trainer"]["max_epochs"] == 2
    assert torch.__version__.startswith(checkpoint["versions"]["torch"])
    assert not {name for name in checkpoint["hyper_parameters"] if name.startswith("_")}


def test_config_of_a_run_repeats_it(run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert train(["--config", str(run / "config.yaml"), "--run_dir", str(again)]) == 0
    assert (again / "metrics.csv").read_text() == (run / "metrics.csv").read_text()
    first, second = result_of(run), result_of(again)
    assert (first["test_acc"], first["test_loss"]) == (second["test_acc"], second["test_loss"])


def test_another_seed_gives_another_run(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert train(["--config", str(run / "config.yaml"), "--run_dir", str(other), "--seed", "8"]) == 0
    assert result_of(other)["test_loss"] != result_of(run)["test_loss"]


def test_lightning_cli_tests_and_predicts_a_checkpoint(
    run: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run / "checkpoints" / "best.ckpt"
    tested = command("-m", "lit_nn", "test", "--ckpt_path", path, "--accelerator", "cpu")
    assert tested.returncode == 0, tested.stderr
    accuracy = re.search(r"test_acc\s+│\s+([\d.]+)", tested.stdout)
    assert accuracy
    assert float(accuracy[1]) == pytest.approx(result_of(run)["test_acc"], abs=1e-6)
    words = ["lit-nn", "predict", "--ckpt_path", str(path), "--accelerator", "cpu", "--run_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    assert lightning_cli() == 0
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    labels = FashionMNISTSample().split("test")[1]
    right = [row["label"] == FashionMNISTSample.class_names[label] for row, label in zip(rows, labels, strict=True)]
    assert sum(right) / len(right) == pytest.approx(result_of(run)["test_acc"])


# --- every network, every data set -------------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
def test_every_network_goes_through_the_command(net: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(["--net", net, *FAST]) == 0
    assert "went through" in capsys.readouterr().out


@pytest.mark.parametrize("words", [("scripts/train.py",), ("-m", "lit_nn", "fit")])
def test_commands_run_in_a_process_of_their_own(words: tuple[str, ...], command: Command, tmp_path: Path) -> None:
    done = command(*words, *FAST)
    assert done.returncode == 0, done.stderr
    for advert in ("Tip:", "litlogger", "Warning"):
        assert advert not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []  # fast_dev_run writes nothing


# --- flags ---------------------------------------------------------------------------------------------------------


def printed_config(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stop:
        train([*words, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_flat_and_dotted_flags_mean_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat = ["--net", "mlp", "--lr=0.5", "--data", "fashion_mnist", "--batch_size", "3", "--max_epochs", "4"]
    dotted = ["--model.net=mlp", "--model.lr", "0.5", "--data", "data_modules.FashionMNIST", "--data.batch_size=3"]
    first = printed_config(flat, capsys)
    assert first == printed_config([*dotted, "--trainer.max_epochs", "4"], capsys)
    assert first == printed_config([*flat[:3], *dotted[1:], "--max_epochs=4"], capsys)
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(first))
    assert first == printed_config(["--config", str(path)], capsys)
    over = printed_config(["--config", str(path), "--lr", "0.25", "--accelerator", "cpu"], capsys)
    assert over == printed_config(["--lr", "0.25", "-c", str(path), "--accelerator", "cpu"], capsys)
    assert over["model"]["lr"] == 0.25  # the command line over the file
    assert over["model"]["net"] == "mlp"  # the file over the defaults
    assert over["trainer"]["max_epochs"] == 4
    assert over["trainer"]["accelerator"] == "cpu"


def test_help_names_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(["--help"]) == 0
    text = capsys.readouterr().out
    assert list(listed("lit_nn.nets")) == list(NETS)
    assert list(listed("data_modules")) == list(DATA_MODULES)
    choices = [*OPTIMIZERS, *get_args(ScheduleName), *LOSSES, *INITS, *AUGMENTATIONS]
    for word in [*NETS, *DATA_MODULES, *choices, *(f"--{flag.name}" for flag in flags())]:
        assert word in text


def test_help_shows_the_true_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config([], capsys)
    for flag in flags():
        group, _, name = flag.option.partition(".")
        if group in ("model", "trainer"):
            value = config[group][name]
        elif group == "data" and name:
            value = config["data"]["init_args"][name]
        elif group == "seed_everything":
            value = config["seed_everything"]
        else:
            continue
        shown = "32-true" if flag.name == "precision" and value is None else str(value)
        assert flag.default == {"False": "false", "None": "null"}.get(shown, shown), flag


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--net", "lenett"], ["lenett", "lenet"]),
        (["--data", "fashion"], ["fashion", "fashion_mnist"]),
        (["--max_epoch", "3"], ["max_epoch", "max_epochs"]),
        (["--max_epochs", "0"], ["max_epochs is 0", "evaluate.py"]),
        (["--trainer.limit_train_batches", "0"], ["limit_train_batches is 0"]),
        (["--trainer.limit_test_batches", "0"], ["limit_test_batches is 0", "python -m lit_nn fit"]),
        (["--trainer.limit_val_batches", "0", "--early_stopping", "2"], ["--early_stopping", "limit_val_batches"]),
        (["--trainer.limit_val_batches", "0", "--schedule", "plateau"], ["--schedule plateau", "limit_val_batches"]),
        (["--label_smoothing", "10"], ["label_smoothing is 10", "from 0 to 1"]),
        (["--weight_decay", "-1"], ["weight_decay is -1", "0 or more"]),
        (["--net", "conv3d_cnn", "--channels_last"], ["conv3d_cnn", "channels_last"]),  # tutorial
        (["--model.optimizer_args.betas", "[0.9]"], ["optimizer adamw", "betas"]),
        (["--learning_rate", "0.1"], ["'learning_rate'. Did you mean lr? "]),
        (["--gpus", "2"], ["'gpus'. Did you mean accelerator or devices? "]),
        (["--model", "lenet"], ["'lenet'", "Did you mean net?"]),
        (["--sampling", "balanced"], ["Did you mean data.sampling?"]),
        (["--trainer.max_epoch", "3"], ["trainer.max_epoch", "trainer.max_epochs"]),
        (["--data.batch_sise", "3"], ["data.batch_sise", "data.batch_size"]),
        (["--batch_size", "many"], ["batch_size", "many", "expected int"]),
        (["--batch_size", "0"], ["error: batch_size is 0; it must be at least 1"]),
        (["--augment", "flipp"], ["error: unknown augmentation 'flipp': did you mean 'flip'?", *AUGMENTATIONS]),
        (["--data.sampling", "even"], ["--data.sampling is 'even'. Allowed: shuffled, balanced"]),
        (["--data.image_size", "big", "--data", "image_folder"], ["--data.image_size is 'big', expected int"]),
        (["--data_dir", "\udcffictures"], ["'?ictures' is not UTF-8"]),
        (["--optimizer", "adamm"], ["adamm", "adam", "rmsprop"]),
        (["--schedule", "onecycle"], ["onecycle", "one_cycle"]),
        (["--loss", "crossentropy"], ["crossentropy", "cross_entropy"]),
        (["--init", "xavier"], ["xavier", "xavier_uniform"]),
        (["--model.net_args.depth", "3"], ["depth", "lenet"]),
        (["--model.optimizer_args.momentumm", "3"], ["momentumm"]),
        (["--config", "missing.yaml"], ["missing.yaml", "no such file"]),
        (["--precision", "7"], ["precision", "7"]),
        (["--class_weights", "[1.0, 2.0]"], ["2 numbers", "10 classes"]),
        (["--schedule", "one_cycle", "--model.schedule_args.pct_start", "1"], ["one_cycle", "pct_start"]),
        (["--seed", "-1"], ["--seed is -1", "4294967295"]),
        (["--devices", "0"], ["devices", "0"]),
        (["--devices", "two"], ["devices", "int > 0"]),
        (["--num_nodes", "0"], ["num_nodes", "0"]),
        (["--num_nodes", "1.5"], ["num_nodes", "1.5", "expected int"]),
        (["--strategy", "dpp"], ["strategy", "dpp", "ddp"]),
        (["--strategy", "ddp_spawn", "--devices", "2"], ["ddp_spawn", "--strategy ddp"]),
    ],
)
def test_mistakes_end_in_one_message(words: list[str], named: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train([*words, "--accelerator", "cpu"]) == 2
    messages = [line for line in capsys.readouterr().err.splitlines() if line and line != "Seed set to 42"]
    assert len(messages) == 1
    message = messages[0]
    assert message.startswith("error: ")
    for word in named:
        assert word in message


def test_a_mistyped_flag_is_refused_before_torch_is_imported(command: Command) -> None:
    program = "import sys; from lit_nn.commands import train; print(train(['--lrr', '3']), 'torch' in sys.modules)"
    assert command("-c", program).stdout == "2 False\n"


def test_a_warning_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # to be put back
    quieten()
    assert warnings.formatwarning("so it is", UserWarning, "somewhere.py", 3) == "warning: so it is\n"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model:\n  nett: lenet\n", "model.net"),
        ("model: [1, 2\n", "not a YAML file"),
        ("just words\n", "no options"),
        ("data:\n  class_path: antigravity.Data\n", "antigravity"),
        ("trainer:\n  logger: os.system\n", "os.system"),
        ("trainer:\n  callbacks:\n  - class_path: subprocess.Popen\n", "subprocess.Popen"),
        ("data: /tmp/other.yaml\n", "/tmp/other.yaml"),
        ("data: other\n", "data names the file other"),
        ("trainer: other\n", "trainer names the file other"),
        ("trainer:\n  callbacks: other\n", "trainer.callbacks names the file other"),
        ("trainer:\n  callbacks:\n  - sub/other.yaml\n", "trainer.callbacks.0 names the file sub/other.yaml"),
        (f"trainer:\n  callbacks: {'x' * 5000}\n", "trainer.callbacks"),
    ],
)
def test_wrong_yaml_is_refused_and_runs_nothing(
    text: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    (tmp_path / "sub").mkdir()
    for other in ("other", "sub/other.yaml"):  # the parser would read these as well
        (tmp_path / other).write_text("- class_path: antigravity.Callback\n")
    sys.modules.pop("antigravity", None)
    assert train(["--config", str(path)]) == 2
    assert named in capsys.readouterr().err
    nested = tmp_path / "nested.yaml"
    nested.write_text("fit:\n" + "".join(f"  {line}\n" for line in text.splitlines()))
    assert lightning_cli(["--config", str(nested), "fit"]) == 2
    assert "--config stands before the subcommand" in capsys.readouterr().err
    assert "antigravity" not in sys.modules


def test_a_checkpoint_in_a_yaml_file_is_not_passed_over(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "more.yaml"
    path.write_text(f"ckpt_path: {run}/checkpoints/last.ckpt\n")
    assert train(["--config", str(path), "--max_epochs", "3"]) == 2
    assert "--resume" in capsys.readouterr().err


def test_a_checkpoint_is_tested_on_the_split_that_it_was_trained_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--net", "mlp", "--accelerator", "cpu", "--trainer.limit_train_batches", "2", "--max_epochs", "1"]
    split = ["--seed", "3", "--data.val_fraction", "0.3"]
    assert train([*words, *split, "--run_dir", str(tmp_path / "run")]) == 0
    best = ["--ckpt_path", str(tmp_path / "run" / "checkpoints" / "best.ckpt"), "--accelerator", "cpu"]
    for more, seed in ([], 3), (["--seed", "4"], 4), (["--config", str(tmp_path / "run" / "config.yaml")], 3):
        cli = LitCLI(["validate", *more, *best])
        assert (cli.datamodule.seed, cli.datamodule.val_fraction) == (seed, 0.3)
        if seed == 3:
            expected = float((tmp_path / "run" / "metrics.csv").read_text().splitlines()[-1].rpartition(",")[2])
            assert cli.trainer.callback_metrics["val_acc"].item() == pytest.approx(expected, abs=1e-6)
    assert lightning_cli(["test", *best, "--data", "cifar10"]) == 2
    assert "knows the classes" in capsys.readouterr().err


def test_two_processes_do_not_train_in_one_folder(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != ".lock"}
    with FileLock(copy / ".lock"):
        assert train(["--resume", str(copy), "--max_epochs", "3"]) == 2
        assert "another process" in capsys.readouterr().err
        assert train(["--run_dir", str(copy.with_name("other")), *FAST]) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert train(["--resume", str(copy), "--max_epochs", "3"]) == 0


def test_what_is_only_found_in_training_ends_in_one_message(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["--net", "mlp", "--accelerator", "cpu", "--trainer.limit_train_batches", "2", "--max_epochs", "2"]
    words = ["--schedule", "plateau", "--trainer.check_val_every_n_epoch", "2", "--run_dir", str(tmp_path / "a")]
    assert train([*few, *words]) == 2
    assert "val_loss which is not available" in capsys.readouterr().err.splitlines()[-1]

    assert train([*few, "--trainer.limit_test_batches", "0.1", "--run_dir", str(tmp_path / "b")]) == 2
    assert "limit_test_batches" in capsys.readouterr().err.splitlines()[-1]
    assert train(["--net", "torchvision/resnet18", "--batch_size", "1", "--fast_dev_run", "--accelerator", "cpu"]) == 2
    assert "give a larger --batch_size" in capsys.readouterr().err.splitlines()[-1]

    monkeypatch.setitem(LOSSES, "cross_entropy", lambda *_: torch.tensor(torch.nan))
    checkpoint = str(run / "checkpoints" / "best.ckpt")
    assert lightning_cli(["test", "--ckpt_path", checkpoint, "--trainer.accelerator", "cpu"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: The loss is nan")


def test_nothing_is_logged_inside_an_epoch_where_that_is_asked_for(tmp_path: Path) -> None:
    few = ["--net", "mlp", "--accelerator", "cpu", "--trainer.limit_train_batches", "2", "--max_epochs", "1"]
    assert train([*few, "--trainer.log_every_n_steps", "0", "--run_dir", str(tmp_path)]) == 0
    events = EventAccumulator(str(tmp_path)).Reload()
    assert "train_loss" in events.Tags()["scalars"]
    assert "train_loss_step" not in events.Tags()["scalars"]


def test_an_interrupted_command_says_so_and_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert run_command(interrupted) == 130
    assert capsys.readouterr().err.strip() == "Interrupted."


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_is_said_in_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(["--accelerator", "gpu"]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert "--accelerator cpu" in message.splitlines()[-1]


def test_a_run_folder_is_never_overwritten(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "result.json").read_bytes()
    assert train(["--run_dir", str(run)]) == 2
    assert "another run" in capsys.readouterr().err
    assert (run / "result.json").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_what_is_no_checkpoint_is_refused(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.ckpt"
    path.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["lit-nn", "test", "--ckpt_path", str(path)])
    assert lightning_cli() == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert "bad.ckpt" in message.splitlines()[-1]


# --- one's own network ---------------------------------------------------------------------------------------------


def test_a_network_is_one_file_and_one_import_line(command: Command, tmp_path: Path) -> None:
    for name in ("lit_nn", "data_modules", "scripts", "tests", "pyproject.toml"):
        source = ROOT / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path)
    _, module, import_line = (snippet.code for snippet in snippets(ROOT / "README.md"))
    (tmp_path / "lit_nn/nets/tiny.py").write_text(module)
    with (tmp_path / "lit_nn/nets/__init__.py").open("r+") as file:
        text = file.read().replace("\nNETS:", f"{import_line}\nNETS:", 1)
        file.seek(0)
        file.write(text)
    words = ["--net", "tiny", "--max_epochs", "1", "--accelerator", "cpu", "--run_dir", str(tmp_path / "run")]
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from lit_nn.commands import train\n"
        "import lit_nn\n"
        f"assert train(['--help']) == 0 and train({words}) == 0\n"
        f"print(lit_nn.load_classifier({str(tmp_path / 'run/checkpoints/best.ckpt')!r}).net)\n"
    )
    done = command("-c", program)
    assert done.returncode == 0, done.stderr
    assert "tiny" in done.stdout.partition("--data")[0]  # in the help
    assert "Tiny(" in done.stdout  # out of its checkpoint
    assert result_of(tmp_path / "run")["net"] == "tiny"
    tests = command("-m", "pytest", "-q", "--collect-only", "tests/test_nets.py", "-p", "no:cacheprovider")
    assert "tiny" in tests.stdout


def test_tune_lr_takes_the_suggestion_and_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The value found is the one that is trained with, and the run is that of the same value given by hand."""
    words = ["--max_epochs", "1", "--trainer.limit_train_batches", "5", "--accelerator", "cpu"]
    assert train([*words, "--tune", "lr", "--run_dir", str(tmp_path / "tuned")]) == 0
    found = re.search(r"--tune lr: (\S+) ", capsys.readouterr().out)
    assert found is not None
    assert 1e-5 < float(found[1]) < 0.1
    assert (tmp_path / "tuned" / "lr_find.png").stat().st_size > 5000
    config = yaml.safe_load((tmp_path / "tuned" / "config.yaml").read_text())
    assert config["model"]["lr"] == float(found[1])
    assert train([*words, "--lr", found[1], "--run_dir", str(tmp_path / "given")]) == 0
    tuned, given = (load_classifier(tmp_path / name / "checkpoints" / "best.ckpt") for name in ("tuned", "given"))
    assert tuned.hparams == given.hparams
    assert all(map(torch.equal, tuned.state_dict().values(), given.state_dict().values()))
    assert train(["--resume", str(tmp_path / "tuned"), "--max_epochs", "2"]) == 0  # and goes on without tuning again


def test_tune_batch_size_stops_at_what_fits(tmp_path: Path) -> None:
    """The largest of the doubled sizes that the training images can fill, and no larger one than was tried."""
    words = ["--max_epochs", "1", "--tune", "batch_size", "--accelerator", "cpu"]
    for name, val_fraction, size in (("all", "0.1", 1024), ("few", "0.9", 512)):  # of 6,000 images
        folder = tmp_path / name
        assert train([*words, "--data.val_fraction", val_fraction, "--run_dir", str(folder)]) == 0
        assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["init_args"]["batch_size"] == size


def test_tune_lr_looks_at_the_weights_that_are_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--max_epochs", "1", "--accelerator", "cpu", "--trainer.limit_train_batches", "20"]
    assert train([*words, "--lr", "0.01", "--run_dir", str(tmp_path / "first")]) == 0
    best = tmp_path / "first" / "checkpoints" / "best.ckpt"
    found = []
    for name, more in (("new", []), ("taken_over", ["--init_from", str(best)])):
        assert train([*words, "--tune", "lr", *more, "--run_dir", str(tmp_path / name)]) == 0
        found += re.findall(r"--tune lr: (\S+) ", capsys.readouterr().out)
    assert len(set(found)) == 2


def test_overfit_batches_shows_the_same_images_in_every_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def training_step(self: LitClassifier, batch: Batch, batch_idx: int) -> torch.Tensor:
        seen.append((self.current_epoch, batch[0].clone(), batch[1]))
        return step(self, batch, batch_idx)

    step = LitClassifier.training_step
    monkeypatch.setattr(LitClassifier, "training_step", training_step)
    words = ["--trainer.overfit_batches", "2", "--max_epochs", "3", "--augment", "none", "--accelerator", "cpu"]
    assert train([*words, "--run_dir", str(tmp_path / "run")]) == 0
    assert [epoch for epoch, *_ in seen] == [0, 0, 1, 1, 2, 2]
    for place, (_, images, labels) in enumerate(seen[2:], 2):
        assert torch.equal(images, seen[place % 2][1])
        assert torch.equal(labels, seen[place % 2][2])
    assert len(seen[0][2].unique()) > 5  # not the first images of a sorted data set


def test_full_memory_of_a_gpu_ends_in_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def training_step(self: LitClassifier, batch: Batch, batch_idx: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(LitClassifier, "training_step", training_step)
    assert train(["--accelerator", "cpu", "--batch_size", "96", "--run_dir", str(tmp_path / "run")]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: the memory of cpu is full with batches of 96 images")
    assert "--batch_size" in message


def test_what_cannot_be_deterministic_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def training_step(self: LitClassifier, batch: Batch, batch_idx: int) -> torch.Tensor:
        return torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))

    monkeypatch.setattr(LitClassifier, "training_step", training_step)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # Lightning sets it for good
    words = ["--accelerator", "cpu", "--trainer.deterministic", "true", "--run_dir", str(tmp_path / "run")]
    try:
        assert train(words) == 2
    finally:
        torch.use_deterministic_algorithms(False)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: put_ does not have a deterministic implementation; --trainer.deterministic warn")


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--tune", "lt"], "Did you mean lr?"), (["--tune", "lr", "--fast_dev_run"], "start of a run")],
)
def test_tune_is_refused(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train([*words, "--run_dir", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err
