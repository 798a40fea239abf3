"""Fashion-MNIST and CIFAR-10 from small files made here: found, downloaded, broken and hostile."""

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torchvision
from conftest import Patch
from test_checkpoint import Runs

import data_modules.fashion_mnist as fashion_mnist
from data_modules import CIFAR10, DataError, FashionMNIST
from data_modules.cifar10 import ARCHIVE

Data = type[FashionMNIST] | type[CIFAR10]


RANDOM = np.random.default_rng(0)
COUNTS = {"train": 100, "test": 20}
NUMBERS = {part: [number % 10 for number in range(count)] for part, count in COUNTS.items()}  # of the classes
IMAGES: dict[Data, dict[str, Any]] = {  # uint8 (N, C, H, W)
    cls: {part: RANDOM.integers(256, size=(count, *cls.image_shape), dtype=np.uint8) for part, count in COUNTS.items()}
    for cls in (FashionMNIST, CIFAR10)
}
PIXELS, LABELS = fashion_mnist.FILES["train"]
IDX = {  # Fashion-MNIST's files, by name
    name: struct.pack(">4BI", 0, 0, 8, 1, COUNTS[part]) + bytes(NUMBERS[part])
    if "labels" in name
    else struct.pack(">4B3I", 0, 0, 8, 3, COUNTS[part], 28, 28) + IMAGES[FashionMNIST][part].tobytes()
    for part, names in fashion_mnist.FILES.items()
    for name in names
}
BATCHES = {  # CIFAR-10's files, by name
    name: pickle.dumps({"labels": NUMBERS["test"], "data": pixels.reshape(20, -1)}, 2)
    for name, pixels in zip(
        [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"],
        [*np.split(IMAGES[CIFAR10]["train"], 5), IMAGES[CIFAR10]["test"]],
        strict=True,
    )
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


class FileServer(ThreadingHTTPServer):
    files: dict[str, bytes]  # by path, "/a.gz"
    breaks_after: int | None = None  # bytes of each answer after which the connection is closed


class Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        content = self.server.files.get(self.path, b"")
        self.send_response(200 if content else 404)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: self.server.breaks_after])

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(autouse=True)
def server(monkeypatch: Patch, tmp_path: Path) -> Iterator[FileServer]:
    """torchvision's servers, and what it knows of the published files, are those of these; none is installed."""
    fashion, cifar = torchvision.datasets.FashionMNIST, torchvision.datasets.CIFAR10
    files = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in IDX.items()} | {ARCHIVE: TAR}
    sums = {name: hashlib.md5(content).hexdigest() for name, content in {**files, **BATCHES}.items()}
    batches = [[name, sums[name]] for name in BATCHES]
    with FileServer(("127.0.0.1", 0), Handler) as running:
        Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        running.files, url = {f"/{name}": files[name] for name in files}, f"http://127.0.0.1:{running.server_port}/"
        for owner, attribute, value in (
            (fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian"),
            (fashion, "mirrors", [url]),
            (fashion, "resources", [(name, sums[name]) for name in files if name != ARCHIVE]),
            (cifar, "url", url + ARCHIVE),
            (cifar, "tgz_md5", sums[ARCHIVE]),
            (cifar, "train_list", batches[:5]),
            (cifar, "test_list", batches[5:6]),
            (cifar, "meta", {**cifar.meta, "md5": sums["batches.meta"]}),
        ):
            monkeypatch.setattr(owner, attribute, value)
        yield running
        running.shutdown()


def assert_is_read(cls: Data, folder: Path, **options: Any) -> None:
    data = cls(data_dir=str(folder), **options)
    data.prepare_data()
    for part in COUNTS:
        images, labels, _ = data.split(part)
        np.testing.assert_array_equal(images, IMAGES[cls][part])
        assert labels.tolist() == NUMBERS[part]
        assert images.is_contiguous()  # batches are cut from it ten times as fast


# --- downloaded, or there ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", IMAGES)
def test_it_is_downloaded_once(cls: Data, tmp_path: Path, server: FileServer) -> None:
    assert_is_read(cls, tmp_path / "new")
    server.files.clear()
    assert_is_read(cls, tmp_path / "new")
    left = {"FashionMNIST", "fashion_mnist.lock", ARCHIVE, "cifar-10-batches-py", "cifar_10.lock"}
    assert {path.name for path in (tmp_path / "new").iterdir()} <= left


HELP: dict[Data, list[str]] = {
    FashionMNIST: ["debian", "dataset-fashion-mnist", "fashion_mnist_sample"],
    CIFAR10: [ARCHIVE, "cifar-10-batches-py", "--data_dir", "--data.mirror"],
}


@pytest.mark.parametrize(
    ("cls", "content"),
    [(CIFAR10, None), (FashionMNIST, None), (FashionMNIST, gzip.compress(b"another", mtime=0)), (FashionMNIST, b"")],
)
def test_a_failed_download_leaves_nothing_and_can_be_repeated(
    cls: Data, content: bytes | None, tmp_path: Path, server: FileServer
) -> None:
    good, empty = dict(server.files), tmp_path / "data"
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"could not be had .*file"):  # a folder that cannot be written
        cls(data_dir=str(tmp_path / "file" / "data")).prepare_data()
    with pytest.raises(DataError, match=f"--data {cls.__module__.rpartition('.')[2]}"):
        cls(data_dir=str(empty)).setup("fit")  # nothing was downloaded
    if content is None:
        server.breaks_after = 1000
    else:
        server.files[f"/{LABELS}.gz"] = content  # of which nothing is not found
    with pytest.raises(DataError, match="could not be had") as caught:
        cls(data_dir=str(empty)).prepare_data()
    assert [part for part in (str(empty), *HELP[cls]) if part not in str(caught.value)] == []
    if cls is FashionMNIST:  # torchvision looks at CIFAR-10's archive before it uses it
        assert not [path for path in empty.rglob("*") if path.is_file() and path.suffix != ".lock"]
    server.files, server.breaks_after = good, None
    assert_is_read(cls, empty)


def test_another_server_can_be_named(tmp_path: Path, server: FileServer) -> None:
    server.files["/elsewhere/x.tar.gz"] = server.files.pop(f"/{ARCHIVE}")
    assert_is_read(CIFAR10, tmp_path, mirror=f"http://127.0.0.1:{server.server_port}/elsewhere/x.tar.gz")


@pytest.mark.parametrize("layout", ["data", "data/FashionMNIST/raw", "debian", "data/cifar-10-batches-py"])
@pytest.mark.parametrize("packed", [True, False])
def test_published_files_are_found(tmp_path: Path, layout: str, packed: bool, server: FileServer) -> None:
    server.files.clear()
    (tmp_path / layout).mkdir(parents=True)
    if "cifar" in layout and packed:
        (tmp_path / "data" / ARCHIVE).write_bytes(TAR)
    for name, content in (IDX if "cifar" not in layout else {} if packed else BATCHES).items():
        path = tmp_path / layout / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)
    assert_is_read(CIFAR10 if "cifar" in layout else FashionMNIST, tmp_path / "data")


# --- broken and hostile -----------------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "cut off": (PIXELS, lambda content: content[:-1]),
    "too long": (LABELS, lambda content: content + b"0"),
    "empty": (LABELS, lambda content: b""),
    "another kind": (PIXELS, lambda content: b"\0\0\x09" + content[3:]),
    "another size": (PIXELS, lambda content: struct.pack(">4B3I", 0, 0, 8, 3, 100, 56, 14) + content[16:]),
    "labels for images": (PIXELS, lambda content: IDX[LABELS]),
    "labels of the other part": (LABELS, lambda content: IDX[fashion_mnist.NAMES[3]]),
    "cut off.gz": (PIXELS, lambda content: gzip.compress(content)[:-20]),
    "wrong checksum.gz": (PIXELS, lambda content: gzip.compress(content)[:-8] + bytes(8)),
    "a page.gz": (PIXELS, lambda content: b"<html>"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused(tmp_path: Path, case: str) -> None:
    broken, damage = BROKEN[case]
    for name, content in IDX.items():
        path = tmp_path / (f"{name}{Path(case).suffix}" if name == broken else name)
        path.write_bytes(damage(content) if name == broken else content)
    data = FashionMNIST(str(tmp_path))
    data.prepare_data()
    with pytest.raises(DataError, match=r"is damaged|images are torch"):
        data.setup("fit")


@pytest.mark.parametrize("kind", ["hostile", "cut off", "empty"])
def test_a_batch_that_is_another_is_not_unpickled(tmp_path: Path, server: FileServer, kind: str) -> None:
    CIFAR10(data_dir=str(tmp_path)).prepare_data()
    hostile = pickle.dumps(Runs(Path.touch, tmp_path / "victim"))
    contents = {"hostile": hostile, "cut off": BATCHES["data_batch_3"][:-100], "empty": b""}
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(contents[kind])
    with pytest.raises(DataError, match="is not in"):
        CIFAR10(data_dir=str(tmp_path)).setup("fit")
    server.files.clear()
    assert_is_read(CIFAR10, tmp_path)  # the archive is still there
    assert not (tmp_path / "victim").exists()
