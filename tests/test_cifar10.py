"""CIFAR-10 from a small archive made here: read, downloaded, broken and hostile."""

import hashlib
import io
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torchvision
from conftest import Patch
from file_server import FileServer, file_server

from data_modules import CIFAR10, DataError
from data_modules.cifar10 import ARCHIVE

COUNT = 20  # images per batch
NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
IMAGES = np.random.default_rng(0).integers(256, size=(6, COUNT, 3, 32, 32), dtype=np.uint8)
LABELS = np.random.default_rng(1).integers(10, size=(6, COUNT))
BATCHES = {
    name: pickle.dumps({"labels": LABELS[i].tolist(), "data": IMAGES[i].reshape(COUNT, -1)}, 2)
    for i, name in enumerate(NAMES)
} | {"batches.meta": pickle.dumps({"label_names": CIFAR10.class_names})}


def archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in BATCHES.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


TAR = archive()


@pytest.fixture(autouse=True)
def server(monkeypatch: Patch) -> Iterator[FileServer]:
    """torchvision's server and what it knows of the published files are those of this small archive."""

    def md5(content: bytes) -> str:
        return hashlib.md5(content).hexdigest()

    source = torchvision.datasets.CIFAR10
    monkeypatch.setattr(source, "tgz_md5", md5(TAR))
    monkeypatch.setattr(source, "train_list", [[name, md5(BATCHES[name])] for name in NAMES[:5]])
    monkeypatch.setattr(source, "test_list", [["test_batch", md5(BATCHES["test_batch"])]])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": md5(BATCHES["batches.meta"])})
    with file_server() as running:
        running.files[f"/{ARCHIVE}"] = TAR
        monkeypatch.setattr(source, "url", running.url + ARCHIVE)
        yield running


def prepare(folder: Path, mirror: str | None = None) -> CIFAR10:
    data = CIFAR10(mirror=mirror, data_dir=str(folder))
    data.prepare_data()
    return data


def assert_right(data: CIFAR10) -> None:
    for split, part in {"train": slice(0, 5), "test": slice(5, 6)}.items():
        images, labels, _ = data.split(split)
        np.testing.assert_array_equal(images.numpy(), IMAGES[part].reshape(-1, 3, 32, 32))
        np.testing.assert_array_equal(labels.numpy(), LABELS[part].ravel())
        assert images.is_contiguous()  # batches are cut from it ten times as fast


def test_it_is_downloaded_once(tmp_path: Path, server: FileServer) -> None:
    assert_right(prepare(tmp_path / "new"))
    server.files.clear()
    assert_right(prepare(tmp_path / "new"))


def test_another_server_can_be_named(tmp_path: Path, server: FileServer) -> None:
    server.files["/elsewhere/x.tar.gz"] = server.files.pop(f"/{ARCHIVE}")
    assert_right(prepare(tmp_path, server.url + "elsewhere/x.tar.gz"))


@pytest.mark.parametrize("form", ["archive", "folder"])
def test_what_is_there_is_read(tmp_path: Path, server: FileServer, form: str) -> None:
    server.files.clear()
    (tmp_path / ARCHIVE).write_bytes(TAR)
    if form == "folder":
        with tarfile.open(tmp_path / ARCHIVE) as tar:
            tar.extractall(tmp_path, filter="data")
        (tmp_path / ARCHIVE).unlink()
    assert_right(prepare(tmp_path))


def test_one_message_when_it_cannot_be_had(tmp_path: Path, server: FileServer) -> None:
    with pytest.raises(DataError, match="--data cifar10"):
        CIFAR10(data_dir=str(tmp_path)).setup("fit")
    server.breaks_after = 1000
    with pytest.raises(DataError, match="could not be had") as caught:
        prepare(tmp_path)
    for part in (str(tmp_path), ARCHIVE, "cifar-10-batches-py", "--data_dir", "--data.mirror"):
        assert part in str(caught.value)
    server.breaks_after = None
    assert_right(prepare(tmp_path))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"could not be had .*file"):
        prepare(tmp_path / "file" / "data")


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.victim,)


@pytest.mark.parametrize("kind", ["hostile", "cut off", "empty"])
def test_a_batch_that_is_another_is_not_unpickled(tmp_path: Path, server: FileServer, kind: str) -> None:
    prepare(tmp_path)
    contents = {"hostile": pickle.dumps(Hostile(tmp_path / "victim")), "cut off": BATCHES["data_batch_3"][:-100]}
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(contents.get(kind, b""))
    with pytest.raises(DataError, match="is not in"):
        CIFAR10(data_dir=str(tmp_path)).setup("fit")
    server.files.clear()
    assert_right(prepare(tmp_path))  # the archive is still there
    assert not (tmp_path / "victim").exists()
