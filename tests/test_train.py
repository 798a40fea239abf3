"""The main job through its real entry points: train, what it writes, repeat, reload, all ways to give an option."""

import contextlib
import json
import platform
import random
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from conftest import Patch, Refused, Said, images_in, rows_of, script
from filelock import FileLock
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback, ProgressBar
from resume_runs import differences
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

from data_modules import DATA_SETS, FashionMNISTSample
from data_modules.augment import AUGMENTATIONS
from lit_nn import LitClassifier, load_classifier
from lit_nn.__main__ import main as lightning_cli
from lit_nn.checkpoint import CheckpointError
from lit_nn.engine.callbacks import SIGNALS
from lit_nn.engine.cli import LitCLI
from lit_nn.engine.configuration import write_yaml
from lit_nn.engine.flags import FLAGS
from lit_nn.errors import UsageError
from lit_nn.losses import LOSSES
from lit_nn.nets import NETS
from lit_nn.optim import OPTIMIZERS, SCHEDULES

train = script("train")
CPU = ["--accelerator", "cpu"]
FAST = [*CPU, "--fast_dev_run", "--batch_size", "8"]
STEPS = [*CPU, "--batch_size", "8", "--max_epochs", "1", "--trainer.limit_train_batches", "2"]
FEW = [*STEPS, "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]  # 0.2 s
SEEN: list[Any] = []  # what `Witness` has come to know


class Witness(Callback):
    """A callback of one's own, as a YAML file names it: which progress bars are there, and what they show."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        bars = [bar for bar in trainer.callbacks if isinstance(bar, ProgressBar)]  # type: ignore[attr-defined]
        SEEN[:] = [(type(bar).__name__, bar.get_metrics(trainer, pl_module)) for bar in bars]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs on the embedded images."""
    folder = tmp_path_factory.mktemp("train") / "run"
    words = ["--max_epochs", "2", "--run_dir", str(folder), *CPU, "--seed", "7", "--trainer.log_every_n_steps", "5"]
    assert train(words) == 0
    return folder


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def config_of(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))


def yaml_file(folder: Path, text: str) -> str:
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    return str(folder / "mine.yaml")


def printed_config(words: list[str], capsys: Said) -> dict[str, Any]:
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"^0$"):
        train([*words, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


# --- what a run leaves ------------------------------------------------------------------------------------------------


def test_run_folder_holds_everything(run: Path) -> None:
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.csv", "result.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt"} <= files
    assert not [file for file in files if ".part" in file]
    result = result_of(run)
    known = {"net": "lenet", "data": "fashion_mnist_sample", "epochs": 2, "seed": 7, "num_params": 61_706}
    assert known.items() <= result.items()
    assert result["test_acc"] > 0.5
    assert {"test_loss", "val_acc", "seconds", "versions", "git_commit"} <= result.keys()
    rows = rows_of(run / "metrics.csv")
    assert [(row["epoch"], row["step"]) for row in rows] == [("0", "42"), ("1", "84")]  # 5,400 images, batches of 128
    assert all(float(value) > 0 for row in rows for name, value in row.items() if name != "epoch")
    assert max(float(row["val_acc"]) for row in rows) == result["val_acc"]


def test_tensorboard_has_scalars_images_graph_and_hyperparameters(run: Path) -> None:
    files = [EventAccumulator(str(file)).Reload() for file in run.glob("events.out.tfevents*")]
    scalars, images = ({tag for file in files for tag in file.Tags()[kind]} for kind in ("scalars", "images"))
    wanted = {"train_loss", "train_acc", "val_loss", "val_acc", "test_loss", "test_acc", "train_loss_step", "lr"}
    assert wanted | {"final/test_acc"} <= scalars
    assert images == {"train/samples", "test/confusion", "test/mistakes", "test/reliability"}
    assert any(file.Tags()["graph"] for file in files)
    assert any("_hparams_/session_start_info" in file.summary_metadata for file in files)


@pytest.mark.parametrize("averaged", [False, True])
def test_a_checkpoint_gives_the_reported_accuracy(averaged: bool, run: Path, tmp_path: Path) -> None:
    if averaged:
        assert train([*FEW, "--ema", "0.9", "--lr", "0.02", "--max_epochs", "2", "--run_dir", str(tmp_path)]) == 0
        run = tmp_path
    path = run / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["settings"]["trainer"]["max_epochs"] == 2
    assert torch.__version__.startswith(checkpoint["versions"]["torch"])
    images, labels, _ = FashionMNISTSample().split("test")
    with torch.no_grad():
        logits = load_classifier(path)(images)
        assert torch.equal(LitClassifier.load_from_checkpoint(path, map_location="cpu").eval()(images), logits)
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    assert accuracy == pytest.approx(result_of(run)["test_acc"], abs=1e-7)


def test_config_of_a_run_repeats_it_and_another_seed_does_not(run: Path, tmp_path: Path) -> None:
    for name, more in ("again", []), ("other", ["--seed", "8"]):
        words = ["--run_dir", str(tmp_path / name), "--trainer.logger", "false", *more]
        assert train(["--config", str(run / "config.yaml"), *words]) == 0
        assert (rows_of(tmp_path / name / "metrics.csv") == rows_of(run / "metrics.csv")) == (name == "again")
        assert (result_of(tmp_path / name)["test_loss"] == result_of(run)["test_loss"]) == (name == "again")


def test_lightning_cli_tests_and_predicts_a_checkpoint(run: Path, tmp_path: Path, capsys: Said) -> None:
    path, expected = str(run / "checkpoints" / "best.ckpt"), result_of(run)["test_acc"]
    assert lightning_cli(["test", "--ckpt_path", path, *CPU]) == 0
    shown = re.findall(r"test_acc\s+[│|]\s+([\d.]+)", capsys.readouterr().out)
    assert [float(value) for value in shown] == [pytest.approx(expected)]
    words = ["predict", "--ckpt_path", path, *CPU, "--run_dir", str(tmp_path)]
    assert lightning_cli(words) == 0
    names = [FashionMNISTSample.class_names[label] for label in FashionMNISTSample().split("test")[1]]
    right = [row["label"] == name for row, name in zip(rows_of(tmp_path / "predictions.csv"), names, strict=True)]
    assert sum(right) / len(right) == pytest.approx(expected)
    assert lightning_cli([*words, "--trainer.limit_predict_batches", "0"]) == 0
    assert rows_of(tmp_path / "predictions.csv") == []


def test_what_did_not_happen_is_not_in_the_tables(tmp_path: Path) -> None:
    """A validation in every epoch; checkpoints."""
    seldom, none = tmp_path / "seldom", tmp_path / "none"
    words = ["--max_epochs", "3", "--trainer.check_val_every_n_epoch", "2", "--run_dir", str(seldom)]
    assert train([*FEW, *words]) == 0
    assert [bool(row["val_acc"]) for row in rows_of(seldom / "metrics.csv")] == [False, True, False]
    assert train([*FEW, "--trainer.enable_checkpointing", "false", "--run_dir", str(none)]) == 0
    assert not (none / "checkpoints").exists()
    assert result_of(none)["val_acc"] == float(rows_of(none / "metrics.csv")[-1]["val_acc"])


@pytest.mark.parametrize("net", NETS)
def test_every_network_goes_through_the_command(net: str, tmp_path: Path, monkeypatch: Patch, capsys: Said) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(["--net", net, *FAST]) == 0
    assert "went through" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []  # fast_dev_run writes nothing


# --- flags and files --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles with a C++ compiler")
@pytest.mark.parametrize("mode", ["true", "reduce-overhead"])
def test_a_compiled_network_learns_the_same(mode: str, tmp_path: Path) -> None:
    for name, words in {"plain": [], "compiled": ["--compile", mode]}.items():
        assert train([*FEW, "--run_dir", str(tmp_path / name), *words]) == 0
    first, second = (rows_of(tmp_path / name / "metrics.csv")[0] for name in ("plain", "compiled"))
    assert float(second["val_loss"]) == pytest.approx(float(first["val_loss"]), rel=1e-4)
    assert load_classifier(tmp_path / "compiled" / "checkpoints" / "best.ckpt").class_names


def test_flat_and_dotted_flags_mean_the_same(tmp_path: Path, capsys: Said) -> None:
    flat = ["--net", "mlp", "--lr=0.5", "--data", "fashion_mnist", "--batch_size", "3", "--max_epochs", "4"]
    dotted = ["--model.net=mlp", "--model.lr", "0.5", "--data", "data_modules.FashionMNIST", "--data.batch_size=3"]
    first = printed_config(flat, capsys)
    assert first == printed_config([*dotted, "--trainer.max_epochs", "4"], capsys)
    path = yaml_file(tmp_path, yaml.safe_dump(first))
    assert first == printed_config(["--config", path], capsys)
    over = printed_config(["--config", path, "--lr", "0.25", *CPU], capsys)
    assert over == printed_config(["--lr", "0.25", "-c", path, *CPU], capsys)
    assert over["model"] == first["model"] | {"lr": 0.25}  # the command line over the file, the file over the defaults
    assert over["trainer"] == first["trainer"] | {"accelerator": "cpu"}


@pytest.mark.parametrize(
    ("known", "expected"), [({}, "32-true"), ({"avx512_bf16": True}, "bf16-mixed"), ({"amx_bf16": True}, "bf16-mixed")]
)
def test_auto_is_a_number_format_that_the_cpu_has(
    known: dict[str, bool], expected: str, tmp_path: Path, monkeypatch: Patch, capsys: Said
) -> None:
    assert {"avx512_bf16", "amx_bf16"} <= torch.cpu.get_capabilities().keys() or platform.machine() != "x86_64"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", **known})
    line = [*FEW, "--net", "lenet", "--precision"]
    for name, word in (("auto", "auto"), ("typed", expected)):
        assert train([*line, word, "--run_dir", str(tmp_path / name)]) == 0
    assert yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())["trainer"]["precision"] == expected
    assert differences(tmp_path / "auto", tmp_path / "typed") == []
    assert "This CPU has no bfloat16" not in capsys.readouterr().out
    assert train([*FAST, "--precision", "bf16-mixed"]) == 0
    assert ("This CPU has no bfloat16" in capsys.readouterr().out) == (expected == "32-true")


def test_help_names_what_there_is_with_the_true_defaults(capsys: Said) -> None:
    assert train(["--help"]) == 0
    text = capsys.readouterr().out
    choices = [*OPTIMIZERS, *SCHEDULES, "plateau", *LOSSES, *AUGMENTATIONS]
    for word in [*NETS, *DATA_SETS, *choices, *(f"--{flag.name}" for flag in FLAGS)]:
        assert re.search(rf"(?<!\w){word}(?!\w)", text), word
    config = printed_config([], capsys)
    for flag in FLAGS:
        group, _, name = flag.option.partition(".")
        if name or group == "seed_everything":
            options = config["data"]["init_args"] if group == "data" else config[group] if name else config
            shown = "32-true" if flag.name == "precision" else str(options[name or group])
            assert flag.default == {"False": "false", "None": "null"}.get(shown, shown), flag


def test_the_last_of_several_values_holds_in_whatever_way_they_are_written(run: Path, tmp_path: Path) -> None:
    a, b = str(run), str(shutil.copytree(run, tmp_path / "b"))
    for words in (["--resume", a, "--resume", b], [f"--resume={a}", "--resume", b], ["--resume", a, f"--resume={b}"]):
        cli = LitCLI("fit", [*words, "--max_epochs=9", "--max_epochs", "4"])
        assert (str(cli.run_dir), cli.trainer.max_epochs) == (b, 4)
        assert Path(cli.config.ckpt_path) == tmp_path / "b" / "checkpoints" / "last.ckpt"
    with pytest.raises(UsageError, match="holds another run"):
        LitCLI("fit", [*FEW, f"--run_dir={tmp_path / 'new'}", "--run_dir", b])


CALLBACKS = "callbacks: {class_path: lightning.pytorch.callbacks"
LOGGER = "logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: csv.d, name: my.project}}"


@pytest.mark.parametrize(
    "text",
    [
        f"{CALLBACKS}.LearningRateMonitor}}, {LOGGER}",
        f"{CALLBACKS}.ModelCheckpoint, init_args: {{filename: model.v2}}}}, logger: false",
        "plugins: {class_path: lightning.pytorch.plugins.DoublePrecision}, logger: false",
        "plugins: [{class_path: lightning.pytorch.plugins.DoublePrecision}], logger: false",
        "profiler: {class_path: SimpleProfiler, init_args: {filename: profile.txt}}, logger: false",
        "default_root_dir: my.runs, max_time: 00:01:00:00, logger: false",
    ],
)
def test_what_lightning_offers_works_in_every_command(text: str, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    assert train([*STEPS, "--config", yaml_file(tmp_path, f"trainer: {{{text}}}"), "--run_dir", "run"]) == 0
    assert train(["--config", "run/config.yaml", "--fast_dev_run"]) == 0
    for stage in ("validate", "test", "predict"):
        assert lightning_cli([stage, "--config", "run/config.yaml", "--ckpt_path", "run/checkpoints/best.ckpt"]) == 0
    trusted = ["--config", "run/config.yaml"] if "class_path" in text else []  # a checkpoint chooses no classes
    assert train([*trusted, "--resume", "run", "--max_epochs", "2"]) == 0
    assert result_of(Path("run"))["epochs"] == 2


def test_the_bar_shows_what_a_step_logs_for_it_and_ones_own_replaces_it(tmp_path: Path, monkeypatch: Patch) -> None:
    def training_step(self: LitClassifier, batch: Any, batch_idx: int) -> torch.Tensor:
        self.log_dict({"mine": 0.25}, prog_bar=True)
        self.log("hidden", 0.5)
        return step(self, batch, batch_idx)

    step = LitClassifier.training_step
    monkeypatch.setattr(LitClassifier, "training_step", training_step)
    for bar in ("RichProgressBar", "TQDMProgressBar", "ProgressBar"):  # the last one is ours, and not named
        own = f"{{class_path: lightning.pytorch.callbacks.{bar}}}, " if bar != "ProgressBar" else ""
        text = f"trainer: {{logger: false, callbacks: [{own}{{class_path: test_train.Witness}}]}}"
        assert train([*STEPS, "--config", yaml_file(tmp_path, text), "--run_dir", str(tmp_path / bar)]) == 0
        assert [(name, shown["mine"], "hidden" in shown) for name, shown in SEEN] == [(bar, 0.25, False)]
    assert {"loss", "val_loss", "val_acc"} <= SEEN[0][1].keys()


STRANGE = [
    *("1e3", "7e12345", "007", "2024-01-01", "yes", "null", ".inf", "0x1f", "#x", "~", "ünicode", "space "),
    *("a: b", "True", "1_000", "12:30:45", "[a]", "{a}", "- a", "'", "&a", "!a", "a #b", "=", "NaN", "-inf", " a", ""),
]


@pytest.mark.parametrize("name", STRANGE[::5])
def test_a_folder_may_have_any_name(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "~"))
    images_in(tmp_path / name, "cat", "dog")
    assert train([*FEW, "--data", "image_folder", f"--data_dir={name}", "--run_dir", f"run {name}"]) == 0
    for words in ([f"--resume=run {name}", "--max_epochs", "2"], ["--config", f"run {name}/config.yaml"]):
        assert train(words) == 0
        assert config_of(tmp_path / f"run {name}")["data"]["init_args"]["data_dir"] == name


def test_whatever_is_written_is_read_by_every_reader(tmp_path: Path) -> None:
    generator = random.Random(0)
    letters = "0123456789" * 2 + "eExo._-+:,'\"#~!&*%@`|>?[]{} \t\n\r\\yYnNtTfF" + "äß猫😀\0\x7f\x85\u2028\ufeff"
    texts = [*STRANGE, *("".join(generator.choices(letters, k=generator.randrange(1, 8))) for _ in range(3000))]
    numbers = [0, -1, 1e-5, 1e3, 1e22, 5e-324, float("inf"), True, False, None]
    options = {"texts": texts, "numbers": numbers, "by_name": dict.fromkeys(texts, 1)}
    path = tmp_path / "any.yaml"
    write_yaml({"options": options}, path)
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == {"options": options}
    parser = ArgumentParser()  # the command line's, which takes more words for numbers than PyYAML does
    parser.add_argument("--options", type=dict[str, Any])
    assert parser.parse_path(path).options == options


# --- around the training ----------------------------------------------------------------------------------------------


def test_two_processes_do_not_train_in_one_folder(run: Path, tmp_path: Path, refused: Refused) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != ".lock"}
    with FileLock(copy / ".lock"):
        assert "another process" in refused(train, ["--resume", str(copy), "--max_epochs", "3"])
    assert "another run" in refused(train, ["--run_dir", str(copy)])
    assert {path: path.read_bytes() for path in before} == before
    assert train(["--resume", str(copy), "--max_epochs", "3", "--trainer.logger", "false"]) == 0


@pytest.mark.parametrize(("ends", "status"), [("well", 0), ("SIGTERM", 143), ("SIGINT", 130), ("nan", 1), ("error", 9)])
def test_signals_are_given_back_however_it_ends(
    ends: str, status: int, tmp_path: Path, monkeypatch: Patch, capsys: Said
) -> None:
    def on_train_batch_end(self: LitClassifier, *_: Any) -> None:
        if ends.startswith("SIG") and self.global_step == 1:  # the second one would end the process at once
            signal.raise_signal(signal.Signals[ends])
        elif ends == "error":
            raise LookupError

    if ends == "nan":
        monkeypatch.setitem(LOSSES, "cross_entropy", lambda logits, *_: logits.sum() * torch.nan)
    monkeypatch.setattr(LitClassifier, "on_train_batch_end", on_train_batch_end)
    before = [signal.getsignal(signum) for signum in SIGNALS]
    with pytest.raises(LookupError) if ends == "error" else contextlib.nullcontext():
        assert train([*FEW, "--run_dir", str(tmp_path / "run")]) == status
    assert [signal.getsignal(signum) for signum in SIGNALS] == before
    said = capsys.readouterr().err
    assert ("Stopped. To continue" in said) == ends.startswith("SIG")
    assert ("The loss is nan" in said) == (ends == "nan")


class OwnNet(torch.nn.Module):
    """A network that the project does not know."""

    def __init__(self, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(28 * 28, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, 1, 28, 28)
        return self.linear(x.flatten(1))  # (B, 10)


def test_a_module_and_a_loader_of_ones_own(tmp_path: Path) -> None:
    """They are trained; only what must know the classes beforehand wants a data module."""
    data = FashionMNISTSample(batch_size=32)
    images, labels, _ = data.split("test")
    description = (data.class_names, data.image_shape, data.mean, data.std)
    loader = DataLoader(TensorDataset(images, labels), 100)
    cases: list[tuple[Any, Any]] = [(data, "balanced"), (loader, [1.0] * 10)]
    for given, weights in cases:
        classifier = LitClassifier(*description, net=OwnNet(), class_weights=weights)
        trainer = L.Trainer(accelerator="cpu", fast_dev_run=3, enable_progress_bar=False)
        trainer.fit(classifier, given)
        trainer.save_checkpoint(tmp_path / "own.ckpt")
        with torch.no_grad():
            loaded = load_classifier(tmp_path / "own.ckpt", net=OwnNet())
            assert torch.equal(loaded(images), classifier.eval()(images))
        LitClassifier.load_from_checkpoint(tmp_path / "own.ckpt", net=OwnNet(), weights_only=False)  # which it never is
        with pytest.raises(CheckpointError, match=r"OwnNet.*load_classifier\(path, net=MyNet\(\)\)"):
            load_classifier(tmp_path / "own.ckpt")
    classifier = LitClassifier(*description, net=OwnNet(), class_weights="balanced")
    for own in ({"train_dataloaders": loader}, {"datamodule": L.LightningDataModule.from_datasets(loader.dataset)}):
        with pytest.raises(UsageError, match=r"balanced needs an ImageDataModule.*give a list"):
            trainer.fit(classifier, **own)
    with pytest.raises(TypeError, match="uint8"):
        L.Trainer(accelerator="cpu", fast_dev_run=True).fit(
            LitClassifier(*description), DataLoader(TensorDataset(images.float(), labels))
        )


class WithScale(LitClassifier):
    """A classifier of one's own with one more weight, which is neither the body's nor the head's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) * self.scale


def test_one_classifier_is_trained_again_whatever_ended_it_before() -> None:
    data = FashionMNISTSample(batch_size=100)
    quick: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    quick |= {"enable_checkpointing": False, "enable_model_summary": False}
    classifier = WithScale(data.class_names, data.image_shape, data.mean, data.std, net="mlp", lr=1e18)
    good = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    with pytest.raises(FloatingPointError):
        L.Trainer(max_epochs=1, **quick).fit(classifier, data)
    classifier.load_state_dict(good)
    classifier.hparams["lr"] = 1e-3
    L.Trainer(max_epochs=-1, max_time={"seconds": 1}, **quick).fit(classifier, data)  # the schedule goes by the time
    classifier.load_state_dict(good)
    trainer = L.Trainer(max_epochs=2, **quick)
    trainer.fit(classifier, data)
    assert trainer.callback_metrics["val_acc"] > 0.7  # which wants a learning rate
    assert classifier.scale != good["scale"]
