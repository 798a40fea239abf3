"""Checkpoints as files: good ones load everywhere, damaged and hostile ones are refused and run nothing."""

import functools
import json
import os
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import ROOT, Patch, Refused, script
from snippets import run_snippets
from torch import Tensor, nn

from data_modules import FashionMNISTSample
from lit_nn import LitClassifier, load_classifier
from lit_nn.checkpoint import CHECKPOINT_FORMAT, CheckpointError, load_weights
from lit_nn.nets import NETS, build_net

train = script("train")
STORED = ROOT / "tests" / "stored"
FEW = [word for part in ("train", "val", "test") for word in (f"--trainer.limit_{part}_batches", "1")]
LINEAR = "net.linear_relu_stack.0.weight"  # (8, 64)
ARGUMENTS, TENSORS = "hyper_parameters", "state_dict"

# What a process does, as Python itself reports it.
HEARD = (
    *("import", "subprocess", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "ctypes.dlopen"),
    *("socket.connect", "os.remove", "os.rename", "os.mkdir", "shutil"),
)
_events: list[str] | None = None  # None: nobody listens


def _listen(event: str, args: tuple[Any, ...]) -> None:
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if _events is not None and (writes or event.startswith(HEARD)):
        _events.append(f"{event} {args[0]}")


sys.addaudithook(_listen)


@contextmanager
def doing() -> Iterator[list[str]]:
    """Imports, processes, connections and files written while this is open."""
    global _events
    events: list[str] = []
    modules, _events = set(sys.modules), events
    try:
        yield events
    finally:
        _events = None
        events += [f"imported {name}" for name in set(sys.modules) - modules]  # importlib raises no event


# --- good ones --------------------------------------------------------------------------------------------------------


def contents(**options: Any) -> dict[str, Any]:
    """A small good checkpoint."""
    torch.manual_seed(0)
    good = {"class_names": ["cat", "dog"], "image_shape": (1, 8, 8), "mean": [0.5], "std": [0.25]}
    net = {} if "net" in options else {"net": "mlp", "net_args": {"hidden": 8}}
    classifier = LitClassifier(**good | net | options)
    return {
        "state_dict": classifier.state_dict(),
        "hyper_parameters": dict(classifier.hparams),
        "epoch": 1,
        "global_step": 10,
        "format": CHECKPOINT_FORMAT,
        "pytorch-lightning_version": L.__version__,  # without it Lightning takes nothing
    }


def images(count: int, shape: tuple[int, int, int]) -> Tensor:
    """The same images each time, uint8 (count, C, H, W)."""
    pixels = torch.arange(count * shape[0] * shape[1] * shape[2]) * 37 % 251
    return pixels.to(torch.uint8).view(count, *shape)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    torch.save(contents(), path := tmp_path / "good.ckpt")
    return path


@pytest.mark.parametrize("path", sorted(STORED.glob("format*.ckpt")), ids=lambda path: path.stem)
def test_stored_checkpoints_of_every_format_load_and_go_on(path: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        logits = load_classifier(path)(images(4, (1, 28, 28)))
    expected = json.loads(path.with_suffix(".json").read_text())["logits"]
    torch.testing.assert_close(logits, torch.tensor(expected), atol=1e-4, rtol=1e-4)
    assert train(["--resume", str(path), "--max_epochs", "3", "--run_dir", str(tmp_path / "run"), *FEW]) == 0
    assert (STORED / f"format{CHECKPOINT_FORMAT}.ckpt").exists()  # one of today's


@pytest.mark.parametrize("net", [*NETS, "torchvision/resnet18", "torchvision/regnet_x_400mf", "torchvision/swin_t"])
def test_the_checkpoint_of_every_network_gives_the_same_logits(net: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = LitClassifier(list("abc"), (3, 32, 32), [0.5] * 3, [0.2] * 3, net=net)
    pixels = images(4, (3, 32, 32))
    with torch.no_grad():
        classifier(pixels)  # moves the statistics of BatchNorm
        expected = classifier.eval()(pixels)
        classifier.net.compile()  # in place: the names of the tensors stay
        kept = {"state_dict": classifier.state_dict(), "hyper_parameters": dict(classifier.hparams)}
        torch.save({**contents(), **kept}, tmp_path / "net.ckpt")
        loaded = load_classifier(tmp_path / "net.ckpt")
        assert not loaded.training
        assert torch.equal(loaded(pixels), expected)
        lightnings = LitClassifier.load_from_checkpoint(tmp_path / "net.ckpt", map_location="cpu")
        assert torch.equal(lightnings.eval()(pixels), expected)


def test_the_page_prints_what_it_shows(tmp_path: Path) -> None:
    names = FashionMNISTSample.class_names
    torch.save(contents(net="lenet", image_shape=(1, 28, 28), class_names=names), tmp_path / "best.ckpt")
    run_snippets(ROOT / "docs" / "checkpoints.md", tmp_path)


def test_names_of_either_side_alone_are_said_and_nothing_in_common_is_an_error(good: Path) -> None:
    same = nn.Linear(64, 8)
    lines = load_weights(nn.ModuleDict({"linear_relu_stack": nn.ModuleList([same]), "more": nn.Linear(2, 2)}), good)
    assert "  not taken  more.bias: none in the file, (2,) in this network" in lines
    assert "  not taken  linear_relu_stack.2.bias: (8,) in the file, none in this network" in lines
    assert torch.equal(same.weight, contents()["state_dict"][LINEAR])
    with pytest.raises(CheckpointError, match=r"good\.ckpt is of another network: of the 10 tensors here, only 0"):
        load_weights(build_net("lenet", 1, 10, (28, 28)), good)


# --- damaged and hostile ones -----------------------------------------------------------------------------------------


class Runs:
    """Its pickle calls a function when it is read."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


LOOP: list[Any] = []
LOOP.append(LOOP)  # holds itself
DOUBLED: Any = 0
for _ in range(60):
    DOUBLED = [DOUBLED, DOUBLED]  # 2 ** 60 values in some hundred bytes
PICKLES: dict[str, dict[str, Any]] = {
    "pickle that starts a process": {"epoch": Runs(os.system, "touch hacked")},
    "pickle that evaluates": {"epoch": Runs(eval, "open('hacked', 'w')")},
    "pickle that imports": {"epoch": Runs(__import__, "this")},
}
VGG = {"net": "torchvision/vgg16", "net_args": {"weights": "DEFAULT"}}
# What is put into a good checkpoint, and what `load_classifier` must say of it; "" if it may load it.
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    **{name: (changes, "more than tensors") for name, changes in PICKLES.items()},
    "pickled network": ({"net": nn.Linear(1, 1)}, "more than tensors"),
    "path": ({"epoch": Path("x")}, "more than tensors"),
    "class_path as network": ({ARGUMENTS: {"net": {"class_path": "os.system"}}}, "does not fit"),
    "class_path in arguments": ({ARGUMENTS: {"net_args": {"class_path": "os.system"}}}, "class_path"),
    "network from elsewhere": ({ARGUMENTS: {"net": "os.system"}}, "os.system"),
    "unknown torchvision network": ({ARGUMENTS: {"net": "torchvision/none"}}, "none"),
    "weights from elsewhere": ({ARGUMENTS: VGG}, "own"),
    "terabytes by arguments": ({ARGUMENTS: {"net_args": {"hidden": 10**9}}}, LINEAR),
    "terabytes by image shape": ({ARGUMENTS: {"image_shape": (1, 10**6, 10**6)}}, LINEAR),
    "terabytes by header": ({TENSORS: {"mean": torch.zeros(1).expand(10**6, 10**6)}}, "mean has the shape"),
    "wrong shape": ({TENSORS: {LINEAR: torch.zeros(8, 63)}}, "(8, 63)"),
    "wrong type": ({TENSORS: {"mean": torch.zeros(1, 1, 1, dtype=torch.int64)}}, "int64"),
    "sparse": ({TENSORS: {"mean": torch.zeros(1, 1, 1).to_sparse()}}, "ordinary"),
    "on no device": ({TENSORS: {"mean": torch.zeros(1, 1, 1, device="meta")}}, "mean"),
    "no tensor": ({TENSORS: {"mean": 0.5}}, "mean is not an ordinary tensor"),
    "one missing": ({TENSORS: {"mean": None}}, "mean is missing"),
    "one too many": ({TENSORS: {"more": torch.zeros(1)}}, "more is no tensor of the network"),
    "nameless": ({TENSORS: {float("nan"): torch.zeros(1)}}, "does not fit"),
    "tensors in a list": ({TENSORS: [torch.zeros(1)]}, "not a checkpoint"),
    "arguments in a list": ({ARGUMENTS: [1, 2]}, "not a checkpoint"),
    "classes by number": ({ARGUMENTS: {"class_names": [1, 2]}}, "class_names"),
    "negative size": ({ARGUMENTS: {"image_shape": (1, -8, 8)}}, "does not fit"),
    "size in words": ({ARGUMENTS: {"image_shape": "big"}}, "does not fit"),
    "means too large": ({ARGUMENTS: {"mean": [10**400]}}, "does not fit"),
    "newer format": ({"format": CHECKPOINT_FORMAT + 1}, "update"),
    # Values that nobody asks for are as good as not there.
    "_instantiator": ({ARGUMENTS: {"_instantiator": "os.system"}}, ""),
    "class_path": ({ARGUMENTS: {"class_path": "os.system", "init_args": {}}}, ""),
    "_class_path": ({ARGUMENTS: {"_class_path": "this.X"}}, ""),
    "unknown optimizer": ({ARGUMENTS: {"optimizer": "os.system"}}, ""),
    "bytes": ({"epoch": bytearray(b"x")}, ""),
    "list that holds itself": ({"epoch": LOOP}, ""),
    "list that doubles": ({"epoch": DOUBLED}, ""),
}


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint with other values; None for none."""
    checkpoint = contents()
    for name, value in changes.items():
        if isinstance(value, dict) and name in (ARGUMENTS, TENSORS):
            value = {key: each for key, each in {**checkpoint[name], **value}.items() if each is not None}
        checkpoint[name] = value
    return checkpoint


def flip(path: Path, old: bytes, new: bytes) -> None:
    path.write_bytes(path.read_bytes().replace(old, new, 1))


def repacked(path: Path, extra: Tensor, change: Callable[[bytes], bytes] = bytes, compression: int = 0) -> None:
    """A checkpoint with one more tensor, its records changed and packed again."""
    torch.save(changed({"more": extra}), path)
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, change(data))


def bomb(path: Path) -> None:
    repacked(path, torch.zeros(10_000_000), compression=zipfile.ZIP_DEFLATED)


def lying_size(path: Path) -> None:
    """A tensor whose header claims more than its record has."""
    repacked(path, torch.zeros(100_000), lambda data: data.replace(b"J\xa0\x86\x01\x00", b"J\x00\x86\x01\x7f"))


def folder(path: Path, of_a_run: bool = False) -> None:
    path.unlink()
    path.mkdir()
    if of_a_run:
        (path / "checkpoints").mkdir()
        (path / "checkpoints" / "best.ckpt").touch()


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "not a checkpoint at all"),
    "text": (lambda path: path.write_text("hello"), "not a checkpoint at all"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cut off"),
    "std flipped": (lambda path: flip(path, struct.pack("<f", 0.25), struct.pack("<f", 0.5)), "checksum"),
    "a name flipped": (lambda path: flip(path, b"linear_relu_stack.0.w", b"linear_relu_stack.0.X"), "checksum"),
    "compressed": (bomb, "compressed"),
    "lying size": (lying_size, "damaged"),
    "older kind of file": (lambda path: torch.save(contents(), path, _use_new_zipfile_serialization=False), "at all"),
    "plain pickle": (lambda path: path.write_bytes(pickle.dumps(Runs(os.system, "touch hacked"))), "not a checkpoint"),
    "list": (lambda path: torch.save([1, 2], path), "not a checkpoint"),
    "only weights": (lambda path: torch.save(contents()[TENSORS], path), "not a checkpoint"),
    "missing": (lambda path: path.unlink(), "no such file"),
    "folder": (folder, "no such file"),
    "folder of a run": (lambda path: folder(path, of_a_run=True), "Did you mean"),
}
BAD: dict[str, tuple[Any, str]] = {**HOSTILE, **DAMAGED}


@pytest.mark.parametrize("name", PICKLES)
def test_such_a_pickle_would_run_something(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(PICKLES[name], "bad.ckpt")
    monkeypatch.delitem(sys.modules, "this", raising=False)
    with doing() as events, suppress(Exception):
        torch.load("bad.ckpt", weights_only=False)
    assert [event for event in events if "hacked" in event or "this" in event]


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_and_run_nothing(name: str, good: Path, monkeypatch: Patch, refused: Refused) -> None:
    monkeypatch.chdir(good.parent)
    path = good.rename(good.with_name("bad.ckpt"))
    change, said = BAD[name]
    if callable(change):
        change(path)
    else:
        torch.save(changed(change), path)
    before = sorted(path.parent.rglob("*"))
    for load in (load_classifier, functools.partial(LitClassifier.load_from_checkpoint, map_location="cpu")):
        with suppress(Exception):  # once before, for what a refusal itself imports
            load(path)
        error: Exception | None = None
        with doing() as events:
            try:
                load(path)
            except Exception as raised:
                error = raised
        assert events == []
        if said:
            assert isinstance(error, CheckpointError)
            assert re.fullmatch(rf"{re.escape(str(path))}: .*{re.escape(said)}.*", str(error))
        else:
            assert error is None or load is not load_classifier  # Lightning may refuse what is not asked for
    assert "bad.ckpt" in refused(train, ["--resume", str(path)], 1, 2)
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
        ("trainer", {"callbacks": [{"class_path": "this.Callback"}]}, "this.Callback"),
        ("trainer", {"profiler": "os.system"}, "os.system"),
        ("trainer", {"callbacks": __file__}, "test_checkpoint.py"),  # the parser would read it for more settings
        ("model", {"net_args": {"x": {"class_path": "subprocess.Popen"}}}, "subprocess.Popen"),
        ("data", {"class_path": "this.Data"}, "this.Data"),
        ("data", {"class_path": "data_modules.FashionMNIST", "init_args": {"x": {"class_path": "a.B"}}}, "a.B"),
        ("trainer", {"unknown": 1}, "unknown"),
        ("trainer", {"max_epochs": torch.zeros(1)}, "settings"),
        ("trainer", None, "no settings"),
        ("data", "data_modules.FashionMNIST", "no settings"),
    ],
)
def test_settings_in_a_checkpoint_choose_no_classes(
    group: str, values: Any, named: str, tmp_path: Path, refused: Refused
) -> None:
    settings = {**SETTINGS, group: {**SETTINGS[group], **values} if isinstance(values, dict) else values}
    torch.save(changed({"settings": settings}), path := tmp_path / "hostile.ckpt")
    with doing() as events:
        assert named in refused(train, ["--resume", str(path)], 1, 2)
    assert not [event for event in events if event.endswith(" this") or event.startswith("subprocess")]
    assert [file.name for file in tmp_path.iterdir()] == ["hostile.ckpt"]


POPEN = {"class_path": "subprocess.Popen", "init_args": {"args": "touch hacked", "shell": True}}


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, {"net_args": {"hidden": POPEN}}),
        ({}, {"backbone_lr": json.dumps(POPEN)}),
        ({"optimizer_args": {"x": [json.dumps({"y": json.dumps(POPEN)})]}}, {}),
        ({"optimizer_args": "run/evil.yaml"}, {}),
        ({"net": "run/evil.yaml"}, {}),
    ],
)
def test_what_a_checkpoint_says_of_its_network_starts_nothing(
    options: dict[str, Any], arguments: dict[str, Any], tmp_path: Path, monkeypatch: Patch, refused: Refused
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/evil.yaml").write_text(json.dumps(POPEN), encoding="utf-8")
    settings = {**SETTINGS, "model": SETTINGS["model"] | options}
    torch.save(changed({"settings": settings, ARGUMENTS: arguments}), "hostile.ckpt")
    with doing() as events:
        refused(train, ["--resume", "hostile.ckpt", "--max_epochs", "3", *FEW], 1, 2)
    assert not [event for event in events if event.startswith("subprocess")]
    assert not Path("hacked").exists()


def test_no_class_of_a_checkpoint_gets_into_config_yaml(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = torch.load(STORED / f"format{CHECKPOINT_FORMAT}.ckpt", weights_only=True)
    checkpoint["settings"]["model"]["backbone_lr"] = POPEN
    torch.save(checkpoint, "some.ckpt")
    Path("mine.yaml").write_text("trainer: {max_epochs: 3}", encoding="utf-8")
    assert train(["--resume", "some.ckpt", "--config", "mine.yaml", "--run_dir", "run", *FEW]) == 0
    assert "subprocess" not in Path("run/config.yaml").read_text(encoding="utf-8")


def test_weights_that_a_checkpoint_names_are_not_read(tmp_path: Path) -> None:
    torch.save(changed({ARGUMENTS: {"weights": str(tmp_path / "nowhere.pth")}}), path := tmp_path / "a.ckpt")
    assert LitClassifier.load_from_checkpoint(path).account == ""


def test_a_file_with_the_name_of_a_network_is_not_read(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lenet").write_text("class_path: this.Net", encoding="utf-8")
    assert train(["--net", "lenet", "--fast_dev_run", "--accelerator", "cpu"]) == 0


def test_settings_in_a_checkpoint_choose_no_folder(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = torch.load(STORED / f"format{CHECKPOINT_FORMAT}.ckpt", weights_only=True)
    outside = tmp_path / "outside"
    checkpoint["settings"] |= {"run_dir": str(outside), "config": str(outside), "ckpt_path": str(outside)}
    checkpoint["settings"]["trainer"]["default_root_dir"] = str(outside)
    torch.save(checkpoint, "some.ckpt")
    assert train(["--resume", "some.ckpt", "--max_epochs", "3", *FEW]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "some.ckpt"]
