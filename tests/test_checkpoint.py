"""Checkpoints as files: good ones load everywhere, damaged and hostile ones are refused and run nothing."""

import builtins
import importlib
import io
import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from snippets import broken_links, run_snippets
from torch import nn

from lit_nn import LitClassifier, load_classifier
from lit_nn.checkpoint import (
    CHECKPOINT_FORMAT,
    CheckpointError,
    SafeCheckpointIO,
    check_network,
    copy_checkpoint,
)
from lit_nn.commands import train
from lit_nn.nets import NETS

STORED = ROOT / "tests" / "stored"
PAGE = ROOT / "docs" / "checkpoints.md"
Contents = dict[str, Any]

# --- what a process does, as Python itself reports it ----------------------------------------------------------------

HEARD = (
    *("import", "subprocess", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "ctypes.dlopen"),
    *("socket.connect", "os.remove", "os.rename", "os.mkdir", "shutil"),
)
_events: list[str] | None = None  # None: nobody listens


def _listen(event: str, args: tuple[Any, ...]) -> None:
    if _events is None:
        return
    if event.startswith(HEARD):
        _events.append(f"{event} {args[0]}")
    elif event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        _events.append(f"open {args[0]} to write")


sys.addaudithook(_listen)


@contextmanager
def doing() -> Iterator[list[str]]:
    """Imports, processes, connections and files written while this is open."""
    global _events
    events: list[str] = []
    modules = set(sys.modules)
    _events = events
    try:
        yield events
    finally:
        _events = None
        events += [f"imported {name}" for name in set(sys.modules) - modules]  # importlib raises no event


def test_the_ear_hears(tmp_path: Path) -> None:
    sys.modules.pop("this", None)
    with doing() as events:
        (tmp_path / "file").write_text("x")
        os.system(":")
        importlib.import_module("this")
    assert len(events) == 3


# --- good ones --------------------------------------------------------------------------------------------------------


def contents() -> Contents:
    """A small good checkpoint."""
    torch.manual_seed(0)
    classifier = LitClassifier(["cat", "dog"], (1, 8, 8), [0.5], [0.25], net="mlp", net_args={"hidden": 8})
    return {
        "state_dict": classifier.state_dict(),
        "hyper_parameters": dict(classifier.hparams),
        "epoch": 1,
        "global_step": 10,
        "format": CHECKPOINT_FORMAT,
    }


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.ckpt"
    torch.save(contents(), path)
    return path


@pytest.mark.parametrize("path", sorted(STORED.glob("format*.ckpt")), ids=lambda path: path.stem)
def test_stored_checkpoints_of_every_format_load_and_go_on(path: Path, tmp_path: Path) -> None:
    classifier = load_classifier(path)
    images = (torch.arange(4 * 28 * 28) * 37 % 251).to(torch.uint8).view(4, 1, 28, 28)
    with torch.no_grad():
        logits = classifier(images)
    expected = json.loads(path.with_suffix(".json").read_text())["logits"]
    torch.testing.assert_close(logits, torch.tensor(expected), atol=1e-3, rtol=1e-3)
    few = [
        "--trainer.limit_train_batches",
        "2",
        "--trainer.limit_val_batches",
        "1",
        "--trainer.limit_test_batches",
        "1",
    ]
    assert train(["--resume", str(path), "--max_epochs", "3", "--run_dir", str(tmp_path / "run"), *few]) == 0


def test_there_is_a_stored_checkpoint_of_this_format() -> None:
    assert (STORED / f"format{CHECKPOINT_FORMAT}.ckpt").exists()


@pytest.mark.parametrize("net", [*NETS, "torchvision/resnet18", "torchvision/regnet_x_400mf", "torchvision/swin_t"])
def test_what_fits_is_known_without_memory_for_it(net: str) -> None:
    classifier = LitClassifier(["a", "b", "c"], (3, 32, 32), [0.5] * 3, [0.2] * 3, net=net)
    assert check_network(dict(classifier.hparams), classifier.state_dict()) is None


def test_compiled_or_not_the_names_are_the_same(good: Path) -> None:
    classifier = load_classifier(good)
    classifier.net.compile()
    assert list(classifier.state_dict()) == list(contents()["state_dict"])


def test_page_runs_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    few = ["--max_epochs", "1", "--accelerator", "cpu", "--trainer.limit_train_batches", "4"]
    assert train([*few, "--run_dir", str(tmp_path / "runs" / "mine")]) == 0
    (tmp_path / "best.ckpt").write_bytes((tmp_path / "runs/mine/checkpoints/best.ckpt").read_bytes())
    run_snippets(PAGE, tmp_path)
    assert broken_links(PAGE) == []


def test_saving_replaces_a_file_only_when_the_new_one_is_complete(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = good.read_bytes()

    def save(checkpoint: object, file: io.BufferedWriter) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match=r"good\.ckpt could not be saved \(No space left on device\); .* unchanged"):
        SafeCheckpointIO().save_checkpoint({}, good)
    assert good.read_bytes() == before
    assert list(good.parent.iterdir()) == [good]


def test_copying_replaces_a_file_only_when_the_copy_is_complete(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = good.read_bytes()
    (newer := good.with_name("newer.ckpt")).write_bytes(before + b"newer")

    def copy(source: io.BufferedReader, file: io.BufferedWriter, *_: int) -> None:
        file.write(source.read(10))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", copy)
        with pytest.raises(OSError, match=r"good\.ckpt could not be saved \(No space left on device\); .* unchanged"):
            copy_checkpoint(newer, good)
    assert good.read_bytes() == before
    copy_checkpoint(newer, good)
    assert good.read_bytes() == newer.read_bytes()
    assert {*good.parent.iterdir()} == {good, newer}


# --- damaged and hostile ones -----------------------------------------------------------------------------------------


class Runs:
    """Its pickle calls a function when it is read."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def with_values(**values: Any) -> Contents:
    return {**contents(), **values}


def with_arguments(**arguments: Any) -> Contents:
    return with_values(hyper_parameters={**contents()["hyper_parameters"], **arguments})


def with_tensors(**tensors: Any) -> Contents:
    return with_values(state_dict={**contents()["state_dict"], **tensors})


def without_tensor() -> Contents:
    checkpoint = contents()
    del checkpoint["state_dict"]["mean"]
    return checkpoint


def holding_itself() -> Contents:
    loop: list[Any] = []
    loop.append(loop)
    return with_values(epoch=loop)


def doubled() -> Contents:
    """A list of 2 ** 60 values in some hundred bytes."""
    values: list[Any] = [0]
    for _ in range(60):
        values = [values, values]
    return with_values(epoch=values)


LINEAR = "net.linear_relu_stack.0.weight"
HOSTILE: dict[str, tuple[Callable[[], Contents], str]] = {
    "pickle that starts a process": (lambda: with_values(epoch=Runs(os.system, "touch hacked")), "more than tensors"),
    "pickle that evaluates": (lambda: with_values(epoch=Runs(eval, "open('hacked', 'w')")), "more than tensors"),
    "pickle that executes": (lambda: with_values(epoch=Runs(builtins.exec, "import antigravity")), "more than tensors"),
    "pickle that imports": (lambda: with_values(epoch=Runs(__import__, "antigravity")), "more than tensors"),
    "pickled network": (lambda: with_values(net=nn.Linear(1, 1)), "more than tensors"),
    "path": (lambda: with_values(epoch=Path("x")), "more than tensors"),
    "_instantiator": (lambda: with_arguments(_instantiator="os.system"), "'_instantiator'"),
    "class_path": (lambda: with_arguments(class_path="os.system", init_args={}), "'class_path'"),
    "_class_path": (lambda: with_arguments(_class_path="antigravity.X"), "'_class_path'"),
    "class_path as network": (lambda: with_arguments(net={"class_path": "os.system"}), "does not fit"),
    "class_path in arguments": (lambda: with_arguments(net_args={"class_path": "os.system"}), "class_path"),
    "network from elsewhere": (lambda: with_arguments(net="os.system"), "os.system"),
    "unknown torchvision network": (lambda: with_arguments(net="torchvision/none"), "none"),
    "weights from elsewhere": (lambda: with_arguments(net="torchvision/vgg16", net_args={"weights": "DEFAULT"}), "own"),
    "terabytes by arguments": (lambda: with_arguments(net_args={"hidden": 10**9}), LINEAR),
    "terabytes by image shape": (lambda: with_arguments(image_shape=(1, 10**6, 10**6)), LINEAR),
    "terabytes by header": (lambda: with_tensors(mean=torch.zeros(1).expand(10**6, 10**6)), "larger than the file"),
    "wrong shape": (lambda: with_tensors(**{LINEAR: torch.zeros(8, 63)}), "(8, 63)"),
    "wrong type": (lambda: with_tensors(mean=torch.zeros(1, 1, 1, dtype=torch.int64)), "int64"),
    "complex": (lambda: with_tensors(mean=torch.zeros(1, 1, 1, dtype=torch.complex64)), "complex64"),
    "sparse": (lambda: with_tensors(mean=torch.zeros(1, 1, 1).to_sparse()), "sparse"),
    "on no device": (lambda: with_tensors(mean=torch.zeros(1, 1, 1, device="meta")), "meta"),
    "no tensor": (lambda: with_tensors(mean=0.5), "mean is no tensor"),
    "one missing": (without_tensor, "mean is missing"),
    "one too many": (lambda: with_tensors(more=torch.zeros(1)), "more is no tensor of mlp"),
    "nameless": (lambda: with_values(state_dict={float("nan"): torch.zeros(1)}), "nan"),
    "tensors in a list": (lambda: with_values(state_dict=[torch.zeros(1)]), "does not fit"),
    "arguments in a list": (lambda: with_values(hyper_parameters=[1, 2]), "does not fit"),
    "arguments missing": (lambda: with_values(hyper_parameters={}), "class_names"),
    "classes by number": (lambda: with_arguments(class_names=[1, 2]), "class_names"),
    "negative size": (lambda: with_arguments(image_shape=(1, -8, 8)), "image_shape"),
    "size in words": (lambda: with_arguments(image_shape="big"), "image_shape"),
    "means in words": (lambda: with_arguments(mean=["half"]), "does not fit"),
    "means too large": (lambda: with_arguments(mean=[10**400]), "does not fit"),
    "unknown loss": (lambda: with_arguments(loss="os.system"), "does not fit"),
    "unknown optimizer": (lambda: with_arguments(optimizer="os.system"), "os.system"),
    "bytes": (lambda: with_values(epoch=bytearray(b"x")), "bytearray"),
    "list that holds itself": (holding_itself, "1,000,000"),
    "list that doubles": (doubled, "1,000,000"),
    "newer format": (lambda: with_values(format=CHECKPOINT_FORMAT + 1), "update"),
    "format in words": (lambda: with_values(format="new"), "format new"),
    "list": (lambda: [1, 2], "not a checkpoint"),  # type: ignore[dict-item,return-value]
    "only weights": (lambda: contents()["state_dict"], "not a checkpoint"),
}


def saved(checkpoint: Contents, path: Path) -> None:
    torch.save(checkpoint, path)


def rewritten(path: Path, **options: Any) -> None:
    """Pack the records of a file again."""
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def changed(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_weight(path: Path) -> None:
    changed(path, struct.pack("<f", 0.25), struct.pack("<f", 0.5))  # std


def flip_a_name(path: Path) -> None:
    changed(path, b"linear_relu_stack.0.weight", b"linear_relu_stack.0.wXight")


def bomb(path: Path) -> None:
    torch.save(with_values(more=torch.zeros(10_000_000)), path)
    rewritten(path, compression=zipfile.ZIP_DEFLATED)


def lying_size(path: Path) -> None:
    """A tensor whose header claims more than its record has."""
    torch.save(with_values(more=torch.zeros(100_000)), path)
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data.replace(b"J\xa0\x86\x01\x00", b"J\x00\x86\x01\x7f"))


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def run_folder(path: Path) -> None:
    folder(path)
    (path / "checkpoints").mkdir()
    (path / "checkpoints" / "best.ckpt").touch()


def legacy(path: Path) -> None:
    torch.save(contents(), path, _use_new_zipfile_serialization=False)


def plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Runs(os.system, "touch hacked")))


def script(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/constants.pkl", pickle.dumps(()))
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/version", "3")


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "not a checkpoint at all"),
    "text": (lambda path: path.write_text("hello"), "not a checkpoint at all"),
    "cut off": (cut_off, "cut off"),
    "a weight flipped": (flip_a_weight, "checksum"),
    "a name flipped": (flip_a_name, "checksum"),
    "compressed": (bomb, "compressed"),
    "lying size": (lying_size, "damaged"),
    "other zip": (script, "not a checkpoint"),
    "older kind of file": (legacy, "not a checkpoint at all"),
    "plain pickle": (plain_pickle, "not a checkpoint at all"),
    "missing": (lambda path: path.unlink(), "no such file"),
    "folder": (folder, "no such file"),
    "folder of a run": (run_folder, "Did you mean"),
}


# What --resume says instead: it misses the settings before it builds the network, and takes a run's folder for one.
RESUMED = {
    "means in words": "holds no settings",
    "means too large": "holds no settings",
    "unknown loss": "holds no settings",
    "unknown optimizer": "holds no settings",
    "folder of a run": "best.ckpt: damaged",
}


@pytest.fixture(params=[*HOSTILE, *DAMAGED])
def bad(request: pytest.FixtureRequest, good: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str, str]:
    """A file that must be refused, and what the messages of `load_classifier` and of --resume must say."""
    monkeypatch.chdir(good.parent)
    path = good.rename(good.with_name("bad.ckpt"))
    if request.param in HOSTILE:
        make, said = HOSTILE[request.param]
        torch.save(make(), path)
    else:
        damage, said = DAMAGED[request.param]
        damage(path)
    return path, said, RESUMED.get(request.param, said)


def test_bad_files_are_refused_and_run_nothing(bad: tuple[Path, str, str]) -> None:
    path, said, _ = bad
    with pytest.raises(CheckpointError):  # once before, for what a refusal itself imports
        load_classifier(path)
    before = sorted(path.parent.rglob("*"))
    with doing() as events, pytest.raises(CheckpointError) as refused:
        load_classifier(path)
    assert events == []
    assert sorted(path.parent.rglob("*")) == before
    message = str(refused.value)
    assert "bad.ckpt: " in message
    assert "\n" not in message
    assert said in message, message
    with pytest.raises(Exception):  # noqa: B017, PT011 (Lightning's own way says it in its own words)
        LitClassifier.load_from_checkpoint(path, map_location="cpu")
    assert sorted(path.parent.rglob("*")) == before


def test_bad_files_end_commands_in_one_message(bad: tuple[Path, str, str], capfd: pytest.CaptureFixture[str]) -> None:
    path, _, said = bad
    before = sorted(path.parent.rglob("*"))
    assert train(["--resume", str(path)]) in (1, 2)
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert "Traceback" not in message
    assert said in message, message
    assert sorted(path.parent.rglob("*")) == before


SETTINGS: dict[str, Any] = {
    "trainer": {"max_epochs": 2, "accelerator": "cpu"},
    "model": {"net": "mlp"},
    "data": {"class_path": "data_modules.FashionMNISTSample", "init_args": {}},
}


@pytest.mark.parametrize(
    ("group", "values", "named"),
    [
        ("trainer", {"logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {}}}, "CSVLogger"),
        ("trainer", {"callbacks": [{"class_path": "antigravity.Callback"}]}, "antigravity"),
        ("trainer", {"profiler": "os.system"}, "os.system"),
        ("trainer", {"callbacks": __file__}, "test_checkpoint.py"),  # the parser would read it for more settings
        ("model", {"net_args": {"x": {"class_path": "subprocess.Popen"}}}, "subprocess.Popen"),
        ("data", {"class_path": "antigravity.Data"}, "antigravity"),
        ("data", {"class_path": "data_modules.FashionMNIST", "init_args": {"x": {"class_path": "a.B"}}}, "a.B"),
        ("trainer", {"unknown": 1}, "unknown"),
        ("trainer", {"max_epochs": torch.zeros(1)}, "settings"),
        ("trainer", None, "no settings"),
        ("data", "data_modules.FashionMNIST", "no settings"),
    ],
)
def test_settings_in_a_checkpoint_choose_no_classes(
    group: str, values: Any, named: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {**SETTINGS, group: {**SETTINGS[group], **values} if isinstance(values, dict) else values}
    torch.save(with_values(settings=settings), path := tmp_path / "hostile.ckpt")
    with doing() as events:
        assert train(["--resume", str(path)]) in (1, 2)
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert named in message
    assert not [event for event in events if "antigravity" in event or event.startswith("subprocess")]
    assert [file.name for file in tmp_path.iterdir()] == ["hostile.ckpt"]


def test_settings_in_a_checkpoint_choose_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = torch.load(STORED / f"format{CHECKPOINT_FORMAT}.ckpt", weights_only=True)
    outside = tmp_path / "outside"
    checkpoint["settings"] |= {"run_dir": str(outside), "config": str(outside), "ckpt_path": str(outside)}
    checkpoint["settings"]["trainer"]["default_root_dir"] = str(outside)
    torch.save(checkpoint, "some.ckpt")
    few = [
        "--trainer.limit_train_batches",
        "1",
        "--trainer.limit_val_batches",
        "1",
        "--trainer.limit_test_batches",
        "1",
    ]
    assert train(["--resume", "some.ckpt", "--max_epochs", "3", *few]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "some.ckpt"]
