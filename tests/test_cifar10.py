"""CIFAR-10 from small archives made here: every form it comes in, broken and hostile ones, interrupted downloads."""

import _codecs
import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from file_server import FileServer, file_server

from data_modules import CIFAR10, DataError, cifar10, files
from data_modules.cifar10 import BINARY, PICKLED
from lit_nn.commands import train
from lit_nn.prepare import main

COUNT = 20  # images per batch
PYTHON, BINARY_ARCHIVE = CIFAR10.archives
IMAGES = np.random.default_rng(0).integers(256, size=(6, COUNT, 3, 32, 32), dtype=np.uint8)
LABELS = np.random.default_rng(1).integers(10, size=(6, COUNT))


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 did, in which the published batches were made."""

    def save_string(self, value: str | bytes) -> None:
        data = value if isinstance(value, bytes) else value.encode()
        self.write(b"T" + struct.pack("<i", len(data)) + data)  # type: ignore[attr-defined]
        self.memoize(value)  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[type, Any]] = {**pickle._Pickler.dispatch, str: save_string, bytes: save_string}


def pickled(batch: Any, protocol: int = 2) -> bytes:
    """A batch as the published archive has it (protocol 2), or as Python 3 writes it."""
    if protocol != 2:
        return pickle.dumps(batch, protocol)
    buffer = io.BytesIO()
    Python2Pickler(buffer, 2).dump(batch)
    return buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def python_batches(protocol: int = 2) -> dict[str, bytes]:
    return {
        name: pickled(
            {
                "batch_label": name,
                "labels": LABELS[i].tolist(),
                "data": IMAGES[i].reshape(COUNT, -1),
                "filenames": ["a.png"] * COUNT,
            },
            protocol,
        )
        for i, name in enumerate(PICKLED)
    }


def binary_batches() -> dict[str, bytes]:
    rows = [np.column_stack([LABELS[i], IMAGES[i].reshape(COUNT, -1)]).astype(np.uint8) for i in range(6)]
    return {name: rows[i].tobytes() for i, name in enumerate(BINARY)}


def archive(folder: str, batches: dict[str, bytes]) -> bytes:
    """A .tar.gz with the batches out of order and other things between them, as in the published ones."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in {"readme.html": b"<html>", **dict(reversed(batches.items()))}.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


PYTHON_TAR = archive("cifar-10-batches-py", python_batches())
BINARY_TAR = archive("cifar-10-batches-bin", binary_batches())


def checksums(python: bytes = PYTHON_TAR) -> dict[str, str]:
    return {PYTHON: hashlib.sha256(python).hexdigest(), BINARY_ARCHIVE: hashlib.sha256(BINARY_TAR).hexdigest()}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CIFAR10, "batch_images", COUNT)
    monkeypatch.setattr(CIFAR10, "archives", checksums())
    monkeypatch.setattr(cifar10, "MIRRORS", [])
    monkeypatch.setattr(files, "CHUNK", 1000)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as running:
        running.files[f"/{PYTHON}"] = PYTHON_TAR
        yield running


def write(folder: Path, contents: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def prepare(folder: Path, *mirrors: str) -> CIFAR10:
    data = CIFAR10(mirrors=list(mirrors), data_dir=str(folder))
    data.prepare_data()
    return data


def assert_right(data: CIFAR10) -> None:
    for split, part in {"train": slice(0, 5), "test": slice(5, 6)}.items():
        images, labels, _ = data.split(split)  # type: ignore[arg-type]
        np.testing.assert_array_equal(images.numpy(), IMAGES[part].reshape(-1, 3, 32, 32))
        np.testing.assert_array_equal(labels.numpy(), LABELS[part].ravel())


# --- every form -------------------------------------------------------------------------------------------------------

FORMS = {
    "python archive": {".": {PYTHON: PYTHON_TAR}},
    "binary archive": {".": {BINARY_ARCHIVE: BINARY_TAR}},
    "python folder": {"cifar-10-batches-py": python_batches()},
    "binary folder": {"cifar-10-batches-bin": binary_batches()},
    "python flat": {".": python_batches()},
    "binary flat": {".": binary_batches()},
    "written by Python 3": {".": python_batches(protocol=4)},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_published_form_is_read(tmp_path: Path, form: str) -> None:
    for folder, contents in FORMS[form].items():
        write(tmp_path / folder, contents)
    assert_right(prepare(tmp_path))


def test_protocol_2_written_by_python_3_is_read() -> None:
    batch = pickle.dumps({b"data": IMAGES[0].reshape(COUNT, -1), b"labels": LABELS[0].tolist()}, 2)
    images, labels = cifar10.read_batch(Path("data_batch_1"), batch, COUNT)
    np.testing.assert_array_equal(images, IMAGES[0])
    np.testing.assert_array_equal(labels, LABELS[0])


def test_images_are_memory_mapped_and_decoded_only_once(tmp_path: Path) -> None:
    write(tmp_path, {PYTHON: PYTHON_TAR})
    prepare(tmp_path)
    (tmp_path / PYTHON).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = prepare(tmp_path)
        images, _, indices = data.split("train")
    assert_right(data)
    assert images.dtype == torch.uint8
    with (tmp_path / "cifar10-images.npy").open("r+b") as file:
        file.seek(-IMAGES[5].nbytes - 1, os.SEEK_END)
        byte = file.read(1)[0] ^ 255
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte]))
    assert images[-1, -1, -1, -1] == byte, "a copy of the file, not the file"
    assert len(indices) < len(images)
    assert not list(tmp_path.glob("*.part*"))


# --- broken and hostile files -----------------------------------------------------------------------------------------


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def hostile_values(victim: Path) -> list[Hostile]:
    command = f"touch {victim}"
    return [
        Hostile(os.system, command),
        Hostile(eval, f"open({str(victim)!r}, 'w')"),
        Hostile(exec, f"open({str(victim)!r}, 'w')"),
        Hostile(subprocess.getoutput, command),
        Hostile(getattr, "text", "join"),
        Hostile(np.load, str(victim)),
        Hostile(Path, str(victim)),
    ]


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("which", range(7))
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path: Path, which: int, protocol: int) -> None:
    victim = tmp_path / "victim"
    value = hostile_values(victim)[which]
    batches = python_batches() | {"data_batch_3": pickle.dumps({"labels": value, "data": value}, protocol)}
    write(tmp_path / "data", batches)
    with pytest.raises(DataError, match=r"data_batch_3 .*asks for .*; it was not run"):
        prepare(tmp_path / "data")
    assert not victim.exists()
    assert not list((tmp_path / "data").glob("*.npy"))


@pytest.mark.parametrize(
    "content",
    [
        python_batches()["data_batch_1"][:-100],
        b"",
        b"<html>not found</html>",
        pickled([1, 2, 3]),
        pickled({"labels": [1] * COUNT}),
        pickled({"labels": [1] * COUNT, "data": [0] * COUNT * 3072}),
        pickled({"labels": [1] * COUNT, "data": np.zeros((COUNT - 1, 3072), np.uint8)}),
        pickled({"labels": [1] * COUNT, "data": np.zeros((COUNT, 3072), np.float32)}),
        pickled({"labels": [1] * COUNT, "data": np.array([None] * COUNT)}),
        pickled({"labels": [1] * (COUNT - 1), "data": np.zeros((COUNT, 3072), np.uint8)}),
        pickled({"labels": [10] * COUNT, "data": np.zeros((COUNT, 3072), np.uint8)}),
        pickled({"labels": [-1] * COUNT, "data": np.zeros((COUNT, 3072), np.uint8)}),
        pickled({"labels": ["cat"] * COUNT, "data": np.zeros((COUNT, 3072), np.uint8)}),
        b"\x80\x02\x8e" + struct.pack("<Q", 1 << 60),  # announces more bytes than there are
    ],
)
def test_a_broken_pickle_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, python_batches() | {"data_batch_1": content})
    with pytest.raises(DataError, match="data_batch_1 is damaged"):
        prepare(tmp_path)
    assert not list(tmp_path.glob("*.npy"))


@pytest.mark.parametrize("content", [binary_batches()["test_batch.bin"][:-1], b"", b"\xff" * COUNT * 3073])
def test_a_broken_binary_batch_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, binary_batches() | {"test_batch.bin": content})
    with pytest.raises(DataError, match=r"test_batch\.bin is damaged"):
        prepare(tmp_path)


@pytest.mark.parametrize(
    "content",
    [PYTHON_TAR[:-1000], PYTHON_TAR[:5000], b"", PYTHON_TAR + b"0"],
    ids=["end lacks", "half lacks", "empty", "too long"],  # the archives hold the time
)
def test_an_archive_with_a_wrong_checksum_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, {PYTHON: content})
    with pytest.raises(DataError, match=f"{PYTHON} is not the published archive"):
        prepare(tmp_path)


@pytest.mark.parametrize(
    "content",
    [PYTHON_TAR[:-1000], PYTHON_TAR[:5000], b"", b"no archive"],
    ids=["end lacks", "half lacks", "empty", "no archive"],
)
def test_a_broken_archive_is_refused_even_with_the_right_checksum(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CIFAR10, "archives", checksums(content))
    write(tmp_path, {PYTHON: content})
    with pytest.raises(DataError, match=f"{PYTHON} is damaged"):
        prepare(tmp_path)


def test_an_archive_writes_nothing_but_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in ("../victim", str(tmp_path / "victim"), "cifar-10-batches-py/../../victim"):
            tar.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    monkeypatch.setattr(CIFAR10, "archives", checksums(buffer.getvalue()))
    folder = tmp_path / "a" / "b"
    write(folder, {PYTHON: buffer.getvalue()})
    with pytest.raises(DataError, match="lacks data_batch_1, "):
        prepare(folder)
    assert {path.name for path in tmp_path.rglob("*")} <= {"a", "b", PYTHON, "cifar10.lock"}


def test_bytes_come_only_from_text(tmp_path: Path) -> None:
    batch = {
        "labels": LABELS[0].tolist(),
        "data": IMAGES[0].reshape(COUNT, -1),
        "more": Hostile(_codecs.encode, 1 << 20),
    }
    with pytest.raises(DataError, match="data_batch_1 is damaged"):
        cifar10.read_batch(Path("data_batch_1"), pickle.dumps(batch, 2), COUNT)


@pytest.mark.parametrize("name", ["cifar10-images.npy", "cifar10-labels.npy"])
def test_a_lost_cache_is_made_again(tmp_path: Path, name: str) -> None:
    write(tmp_path, {PYTHON: PYTHON_TAR})
    prepare(tmp_path)
    (tmp_path / name).unlink()
    assert_right(prepare(tmp_path))


@pytest.mark.parametrize("name", ["cifar10-images.npy", "cifar10-labels.npy"])
def test_a_damaged_cache_is_refused_by_name(tmp_path: Path, name: str) -> None:
    write(tmp_path, {PYTHON: PYTHON_TAR})
    data = prepare(tmp_path)
    os.truncate(tmp_path / name, 300)
    with pytest.raises(DataError, match=f"{name} cannot be read .*delete it"):
        data.split("train")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file" / "data", tmp_path / "file"):
        with pytest.raises(DataError, match=r"cannot be prepared in .*file.*--data_dir names a folder"):
            prepare(folder)


# --- downloads --------------------------------------------------------------------------------------------------------


def ranges(server: FileServer) -> list[str | None]:
    return [asked for _, asked in server.requests]


def test_download_from_a_folder_or_an_address(tmp_path: Path, server: FileServer) -> None:
    assert_right(prepare(tmp_path / "a", server.url))
    assert_right(prepare(tmp_path / "b", server.url + PYTHON))
    assert_right(prepare(tmp_path / "b", server.url))  # what is there is not downloaded again
    assert len(server.requests) == 2


def test_one_mirror_is_typed_as_it_is(tmp_path: Path, server: FileServer) -> None:
    folder, sheet = str(tmp_path), str(tmp_path / "sheet.png")
    words = ["--data", "cifar10", "--data_dir", folder, "--data.mirrors", server.url, "--sheet", sheet]
    assert main(words) == 0
    words[5] = json.dumps([server.url + "nowhere/", server.url])
    (tmp_path / PYTHON).unlink()
    (tmp_path / "cifar10-labels.npy").unlink()
    assert main(words) == 0
    assert [path for path, _ in server.requests] == [f"/{PYTHON}", f"/nowhere/{PYTHON}", f"/{PYTHON}"]


def test_training_fetches_what_it_needs(tmp_path: Path, server: FileServer, capsys: pytest.CaptureFixture[str]) -> None:
    folder, run_dir = tmp_path / "new", tmp_path / "run"
    words = ["--data", "cifar10", "--data_dir", str(folder), "--net", "mlp", "--batch_size", "16", "--max_epochs", "1"]
    words += ["--accelerator", "cpu", "--run_dir", str(run_dir), "--data.mirrors", server.url]
    assert train([*words[:-1], server.url + "nowhere/"]) == 1
    message = capsys.readouterr().err
    assert f"{server.url}nowhere/" in message
    assert "Traceback" not in message
    assert train(words) == 0
    assert json.loads((run_dir / "result.json").read_text())["data"] == "cifar10"
    assert_right(CIFAR10(data_dir=str(folder)))


def test_a_download_that_breaks_off_is_taken_up_again(tmp_path: Path, server: FileServer) -> None:
    server.breaks_after = len(PYTHON_TAR) // 3
    assert_right(prepare(tmp_path, server.url))
    step = server.breaks_after
    assert ranges(server)[:3] == [None, f"bytes={step}-", f"bytes={2 * step}-"]


def test_a_later_run_takes_a_download_up_again(tmp_path: Path, server: FileServer) -> None:
    server.breaks_after = 1000
    with pytest.raises(DataError, match="broke off after 5,000 of"):
        prepare(tmp_path, server.url)
    server.breaks_after = None
    assert_right(prepare(tmp_path, server.url))
    assert ranges(server)[-1] == "bytes=5000-"


def test_a_server_that_knows_no_ranges_sends_everything_again(tmp_path: Path, server: FileServer) -> None:
    server.knows_ranges = False
    write(tmp_path, {f"{PYTHON}.part": PYTHON_TAR[:5000]})
    assert_right(prepare(tmp_path, server.url))


@pytest.mark.parametrize(
    "part", [PYTHON_TAR, PYTHON_TAR + b"0", b"0" * 5000, b""], ids=["all", "too long", "another", "empty"]
)
def test_whatever_was_left_behind_the_checksum_decides(tmp_path: Path, server: FileServer, part: bytes) -> None:
    write(tmp_path, {f"{PYTHON}.part": part})
    assert_right(prepare(tmp_path, server.url))


def test_the_next_mirror_goes_on(tmp_path: Path, server: FileServer) -> None:
    with file_server() as lame:
        lame.files[f"/{PYTHON}"], lame.breaks_after = PYTHON_TAR, 1000
        assert_right(prepare(tmp_path, "http://127.0.0.1:1/", server.url + "elsewhere/", lame.url, server.url))
    assert server.requests == [(f"/elsewhere/{PYTHON}", None), (f"/{PYTHON}", "bytes=5000-")]


def test_a_wrong_checksum_is_refused(tmp_path: Path, server: FileServer) -> None:
    server.files[f"/{PYTHON}"] = BINARY_TAR
    with pytest.raises(DataError, match=f"{PYTHON}: wrong checksum") as caught:
        prepare(tmp_path, server.url)
    for part in (str(tmp_path), BINARY_ARCHIVE, "cifar-10-batches-bin", "--data_dir", "--data.mirrors"):
        assert part in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["cifar10.lock"]


def test_before_preparation(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data cifar10"):
        CIFAR10(data_dir=str(tmp_path)).setup("fit")


# --- killed at any moment ---------------------------------------------------------------------------------------------

KILLED = """
import json, os, signal, sys
from pathlib import Path
import numpy as np
from data_modules import CIFAR10, files

settings = json.loads(sys.argv[1])
CIFAR10.batch_images, CIFAR10.archives, files.CHUNK = settings["count"], settings["archives"], 1000

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def die_at_call(number, function):
    def call(*arguments, **options):
        nonlocal number
        number -= 1
        return die() if number == 0 else function(*arguments, **options)
    return call

def half_written(path, array):
    path.write_bytes(b"0" * 1000)
    die()

for point in settings["points"]:
    if (child := os.fork()) == 0:
        action, number = point.split()
        if action == "chunk":
            files.tqdm.update = die_at_call(int(number), files.tqdm.update)
        elif action == "rename":
            Path.replace = die_at_call(int(number), Path.replace)
        elif action == "save":
            save, saves = np.save, int(number)
            np.save = half_written if saves == 1 else lambda *a: (save(*a), setattr(np, "save", half_written))
        CIFAR10(mirrors=[settings["url"]], data_dir=os.path.join(settings["root"], point)).prepare_data()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, point
"""
# chunks of the download; renaming: the archive, the images, the labels; half-written: the images, the labels
POINTS = ["chunk 1", "chunk 5", "rename 1", "save 1", "rename 2", "save 2", "rename 3"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, FileServer]]:
    """For every point a folder in which a process was killed there; forked from one, which imports only once."""
    root = tmp_path_factory.mktemp("killed")
    with file_server() as running:
        running.files[f"/{PYTHON}"] = PYTHON_TAR
        settings = {
            "count": COUNT,
            "archives": checksums(),
            "points": POINTS,
            "root": str(root),
            "url": running.url,
        }
        subprocess.run(
            [sys.executable, "-c", KILLED, json.dumps(settings)], check=True, timeout=120, cwd=Path(__file__).parents[1]
        )
        yield root, running


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_leaves_nothing_that_looks_complete(killed: tuple[Path, FileServer], point: str) -> None:
    root, running = killed
    folder = root / point
    assert (folder / PYTHON).exists() == (point not in ("chunk 1", "chunk 5", "rename 1"))
    with pytest.raises(DataError, match="was not prepared"):
        CIFAR10(data_dir=str(folder)).setup("fit")

    running.requests.clear()
    assert_right(prepare(folder, running.url))
    assert not list(folder.glob("*.part*"))
    if point == "chunk 5":
        assert ranges(running)[0] is not None, "it did not go on where it was killed"
