"""Shards: what they hold, in which order they come, how a run goes on inside an epoch, and what S3 does to it."""

import itertools
import json
import random
import shlex
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Patch, Refused, Said, script
from PIL import Image
from resume_runs import assert_resumes_exactly, stopped_and_continued
from snippets import commands

from data_modules.base import SPLITS, Split
from data_modules.errors import DataError, DataNote
from data_modules.image_folder import ImageFolder
from data_modules.image_stream import ImageStream
from data_modules.images import store
from data_modules.images.shards import StreamLoader
from data_modules.images.store import Store

pytest.importorskip("litdata")
prepare, train, evaluate = script("prepare_data"), script("train"), script("evaluate")
TRAIN = 261  # images of the training part


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """324 photographs of three classes, all different, as JPEG files of several sizes."""
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(324):
        (folder / f"kind{number % 3}").mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8) // 2 + 60 * (number % 3)
        large = Image.fromarray(pixels.astype(np.uint8)).resize((20 + number % 9, 20), Image.Resampling.BICUBIC)
        large.save(folder / f"kind{number % 3}" / f"{number}.jpg")
    return folder


@pytest.fixture(scope="module")
def kinds(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shards of some twenty of these, written by the command, of both kinds."""
    folder = tmp_path_factory.mktemp("kinds")
    with Patch.context() as patch:
        patch.setenv("LIT_NN_CACHE", str(folder / "cache"))
        return {kind: Path(written(images, folder / kind, "--shards_as", kind)) for kind in ("encoded", "decoded")}


@pytest.fixture
def shards(kinds: dict[str, Path]) -> Path:
    return kinds["encoded"]


def written(images: Path, out: Path | str, *words: str) -> Path | str:
    line = ["--data", "image_folder", "--data_dir", str(images), "--shards", str(out), "--shard_mb", "0.02", *words]
    assert prepare(line) == 0
    return out


def of(place: Path | str, *words: object) -> list[str]:
    """A command line about the stream of a place."""
    return ["--data", "image_stream", "--data_dir", str(place), *" ".join(map(str, words)).split()]


def loader(data: ImageStream, part: Split = "train", rank: int = 0, world: int = 1, workers: int = 0) -> StreamLoader:
    options: dict[str, Any] = {"shuffle": part == "train", "seed": 3, "rank": rank, "world_size": world}
    made = StreamLoader(*data.split(part), 16, **options)
    made.images.use(max(1, workers), data.window)
    made.window = data.window
    return made


def ids(batches: Any) -> list[bytes]:
    """What tells the images apart: their pixels."""
    return [image.numpy().tobytes() for batch, _ in batches for image in batch]


@pytest.mark.parametrize("kind", ["encoded", "decoded"])
def test_shards_hold_what_the_folder_holds(kind: str, kinds: dict[str, Path], images: Path, capsys: Said) -> None:
    from litdata import StreamingDataset

    shards = kinds[kind]
    data, folder = ImageStream(str(shards)), ImageFolder(str(images))
    for name in ("class_names", "image_shape", "mean", "std", "levels", "fit"):
        assert getattr(data, name) == getattr(folder, name), name
    assert data.class_counts.equal(folder.class_counts)
    for part in SPLITS:
        (array, labels, rows), (stream, its_labels, _) = folder.split(part), data.split(part)
        kept, found = (
            [*zip(ids([(images, 0)]), of_each.tolist(), strict=True)]
            for images, of_each in ((array[rows], labels[rows]), (stream[:], its_labels))
        )
        assert found == kept if part != "train" else sorted(found) == sorted(kept)  # which is shuffled
        assert stream[3].equal(stream[:][3])
        theirs = StreamingDataset(str(shards / part))  # their own reader, in order
        assert [label for _, label in theirs] == its_labels.tolist()
    assert prepare(of(shards, "--sheet", shards / "sheet.png")) == 0
    assert "3 x 20 x 20" in capsys.readouterr().out


@pytest.mark.parametrize("workers", range(4))
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_image_comes_once(world: int, workers: int, shards: Path) -> None:
    data = ImageStream(str(shards), window=3)
    for part in SPLITS:
        found = [ids(loader(data, part, rank, world, workers)) for rank in range(world)]
        count, everything = Counter(itertools.chain(*found)), Counter(ids([(data.split(part)[0][:], 0)]))
        assert count.keys() <= everything.keys()
        assert set(count.values()) == {1}
        if part == "train":  # what makes no batch for all processes is left out, other images in each epoch
            assert count.total() == TRAIN - TRAIN % (16 * world)
            assert len(set(map(len, found))) == 1
        else:
            assert count == everything


def test_order_is_that_of_seed_and_epoch_whatever_the_workers(shards: Path) -> None:
    data = ImageStream(str(shards), window=3)
    one, two = loader(data), loader(data, workers=2)
    orders = []
    for epoch in (0, 1):
        one.set_epoch(epoch)
        two.set_epoch(epoch)
        orders.append(ids(one))
        assert orders[-1] == ids(two)
        shard_of = (one.order() // one.images.per_shard).tolist()
        window = 3 * one.images.per_shard
        assert len(set(shard_of[:window])) <= 4  # the last shard may be short
        assert len(set(shard_of[:16])) > 1
    assert orders[0] != orders[1]
    two.set_epoch(0)
    batches = iter(two)
    for _ in range(5):
        next(batches)
    again = loader(data)
    again.load_state_dict(two.state_dict())
    assert ids(again) == orders[0][80:]


def test_a_run_that_is_stopped_inside_an_epoch_goes_on_exactly(shards: Path, tmp_path: Path) -> None:
    options = "--data.window 3 --data.workers 1 --net cifar_cnn --trainer.limit_train_batches 8 --batch_size 16"
    assert_resumes_exactly(of(shards, options), tmp_path, [3, 10])


def test_another_window_begins_the_epoch_again(shards: Path, tmp_path: Path, capfd: Said) -> None:
    words = of(shards, "--net mlp --data.workers 0")
    for option, again in (("--data.workers=1", False), ("--data.window=2", True)):
        folder = stopped_and_continued(words, tmp_path / str(again), [2], to_the_end=False)
        assert train(["--resume", str(folder), option, "--max_epochs", "1"]) == 0
        assert ("The batches are not those of before: the epoch starts again" in capfd.readouterr().out) == again


def test_what_is_done_with_a_data_set_is_done_with_a_stream(shards: Path, tmp_path: Path) -> None:
    words = of(shards, "--max_epochs 1 --accelerator cpu --net mlp --run_dir")
    assert train([*words, str(tmp_path / "run"), "--class_weights", "balanced"]) == 0
    best = str(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert evaluate([best, "--output", str(tmp_path / "report")]) == 0
    result, report = tmp_path / "run" / "result.json", tmp_path / "report" / "metrics.json"
    assert json.loads(report.read_text())["accuracy"] == pytest.approx(json.loads(result.read_text())["test_acc"])
    frozen = ["--weights", best, "--freeze_epochs", "-1", "--cache_features", "true", "--augment", "none"]
    assert train([*words, str(tmp_path / "kept"), *frozen]) == 0
    assert train([*words, str(tmp_path / "overfit"), "--trainer.overfit_batches", "2"]) == 0


def test_the_commands_of_the_page(project: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(project)
    for line in commands(ROOT / "docs" / "stream.md"):
        name, *words = shlex.split(line)[1:]
        if line.startswith("python scripts/") and "s3://" not in line:
            few = ["--fast_dev_run", "--batch_size", "8", "--accelerator", "cpu"] if "train" in name else []
            assert script(Path(name).stem)([*words, *few]) == 0


def test_a_writer_that_was_killed_goes_on(images: Path, tmp_path: Path, monkeypatch: Patch, refused: Refused) -> None:
    whole, broken, wrote = written(images, tmp_path / "whole"), tmp_path / "broken", list[str]()
    write = Store.write

    def limited(self: Store, name: str, content: bytes) -> None:
        wrote.append(name)
        if len(wrote) == 8:
            raise OSError(28, "No space left on device", name)
        write(self, name, content)

    monkeypatch.setattr(Store, "write", limited)
    line = ["--data", "image_folder", "--data_dir", str(images), "--shards", str(broken), "--shard_mb", "0.02"]
    assert "No space left on device" in refused(prepare, line, 1)
    assert "holds no complete shards" in refused(train, of(broken), 1)
    assert "is not empty" in refused(prepare, [*line[:-1], "0.03"], 1)
    assert prepare(line) == 0
    assert max(Counter(wrote).values()) <= 2
    assert len(wrote) < 2 * len(set(wrote)) - 3  # those that were complete were not written again
    for path in Path(whole).rglob("*.*"):
        if path.name not in ("index.json", "images.json"):  # the time, and the place, are in these
            assert (broken / path.relative_to(whole)).read_bytes() == path.read_bytes()
    wrote.clear()
    assert prepare(line) == 0
    assert wrote == []
    shutil.rmtree(broken)
    wrote += ["more"] * 8  # the disk has room now
    assert prepare(line) == 0
    assert sorted(path.name for path in broken.rglob("*")) == sorted(path.name for path in Path(whole).rglob("*"))


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("--data.sampling balanced", 2, "sampling is balanced; it must be shuffled"),
        ("--data.on_device true", 2, "on_device is True; it must be left out: a stream is not kept"),
        ("--data.val_fraction 0.2", 2, "val_fraction is 0.2; it must be left out"),
        ("--data.folds 5", 2, "folds is 5; it must be left out: the shards have their parts"),
        ("--data.fit pad", 2, "fit is pad; it must be crop, as in the shards"),
        ("--data.window 0", 2, "window is 0; it must be at least 1"),
        ("--data_dir nowhere", 1, "nowhere holds no complete shards"),
    ],
)
def test_what_cannot_be_done_is_said(words: str, status: int, message: str, shards: Path, refused: Refused) -> None:
    assert message in refused(train, of(shards, words), status)


def test_a_run_of_image_files_does_not_go_on_with_shards(shards: Path, images: Path) -> None:
    stream, folder = ImageStream(str(shards)), ImageFolder(str(images))
    stream.known_parts, folder.known_parts = ImageFolder(str(images)).parts(), stream.parts()
    with pytest.raises(DataError, match="holds other shards"):
        stream.split("train")
    with pytest.raises(DataError, match="choose its own --data"):
        folder.split("train")


def test_an_index_of_another_program_is_said(tmp_path: Path, refused: Refused) -> None:
    for content in ('{"images": []}', "[]", "3"):
        (tmp_path / "images.json").write_text(content, encoding="utf-8")
        assert "holds no complete shards" in refused(train, of(tmp_path), 1)


def test_a_damaged_shard_is_said(images: Path, tmp_path: Path, refused: Refused) -> None:
    out = written(images, tmp_path / "shards")
    shard = Path(out, "train", "chunk-0-1.bin")
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(content)
    assert "chunk-0-1.bin is damaged: not what" in refused(train, of(out, "--run_dir", tmp_path / "one"), 1)
    shard.unlink()
    assert "has no train/chunk-0-1.bin" in refused(train, of(out, "--run_dir", tmp_path / "two"), 1)


def test_several_labels_are_not_kept_in_shards(images: Path, tmp_path: Path, refused: Refused) -> None:
    rows = [f"{path},{'a|b' if n % 3 else 'b'}\n" for n, path in enumerate(sorted(images.rglob("*.jpg"))[:40])]
    (tmp_path / "t.csv").write_text("file,label\n" + "".join(rows), encoding="utf-8")
    words = ["--data", "image_table", "--table", str(tmp_path / "t.csv"), "--delimiter", "|"]
    assert "--shards keeps one label for each image" in refused(prepare, [*words, "--shards", str(tmp_path / "out")], 1)
    assert not (tmp_path / "out").exists()


# --- S3 ---------------------------------------------------------------------------------------------------------------


class Storage:
    """moto's storage as a WSGI application, which lets some requests fail, or all of them for a while."""

    failing = 0.0  # share of the requests: half of them answered 500, half cut off in the middle
    outage_at = 10**9  # the request with which an outage of ten seconds begins, in which nothing answers
    outage_until = 0.0
    requests = failed = 0
    draw = random.Random(0)

    def __init__(self) -> None:
        moto = pytest.importorskip("moto.moto_server.werkzeug_app")
        self.moto = moto.DomainDispatcherApplication(moto.create_backend_app)

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        self.requests += 1
        if self.requests == self.outage_at:
            self.outage_until = time.monotonic() + 10
        drawn, is_out = self.draw.random(), time.monotonic() < self.outage_until
        self.failed += is_out or drawn < self.failing
        if is_out:
            raise ConnectionError  # the server closes the connection without an answer
        if drawn < self.failing / 2:
            start_response("500 Internal Server Error", [])
            return [b""]
        content = b"".join(self.moto(environ, start_response))
        return _cut(content) if drawn < self.failing else [content]


def _cut(content: bytes) -> Iterator[bytes]:
    yield content[: len(content) // 2]
    raise ConnectionError


@pytest.fixture
def storage(monkeypatch: Patch) -> Iterator[Storage]:
    """Served on a free port of 127.0.0.1, with an empty bucket "mine"; the usual variables name it."""
    serving = pytest.importorskip("werkzeug.serving")
    running, quiet = Storage(), type("Quiet", (serving.WSGIRequestHandler,), {"log": lambda *_: None})
    server = serving.make_server("127.0.0.1", 0, running, threaded=True, request_handler=quiet)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("ENDPOINT_URL", url)):
        monkeypatch.setenv(f"AWS_{name}", value)
    store._client.cache_clear()
    store._client().create_bucket(Bucket="mine")
    yield running
    store._client.cache_clear()
    server.shutdown()


def test_storage_that_cannot_be_reached_for_a_while(storage: Storage, monkeypatch: Patch) -> None:
    session = pytest.importorskip("botocore.httpsession").URLLib3Session
    away, send = 7, session.send

    def refused(self: Any, request: Any) -> Any:
        nonlocal away
        if away := max(0, away - 1):
            raise pytest.importorskip("botocore.exceptions").EndpointConnectionError(endpoint_url="it")
        return send(self, request)

    (place := store.Store("s3://mine/a")).write("one", b"1")
    monkeypatch.setattr(session, "send", refused)
    with pytest.warns(DataNote, match=r"Could not connect .* it is asked again for 300 s"):
        assert place.read("one") == b"1"
    away = 7
    with pytest.raises(DataError, match="look at the bucket's name"):  # never reached: a mistake in the address
        store.Store("s3://mine/a").read("one")


@pytest.mark.slow
@pytest.mark.posix
@pytest.mark.timeout(900)
def test_storage_that_fails_changes_nothing(
    storage: Storage, images: Path, cache: Path, tmp_path: Path, refused: Refused, monkeypatch: Patch
) -> None:
    import resource

    import moto.settings

    rest = "--net mlp --max_epochs 2 --accelerator cpu --batch_size 16 --trainer.logger false --data.window 4"

    def words(place: str, run: str | Path) -> list[str]:
        return of(place, rest, "--data.workers 1 --data.cache_gb 0.0001 --run_dir", run)

    here, place = str(tmp_path / "here"), "s3://mine/photos"
    written(images, here, "--shard_mb", "0.005")  # five images
    assert train(words(here, tmp_path / "one")) == 0
    storage.failing = 0.05
    written(images, place, "--shard_mb", "0.005")
    storage.outage_at = storage.requests + 30  # in the middle of the first epoch
    assert train(words(place, tmp_path / "two")) == 0
    assert storage.requests > 150
    assert storage.failed > 10
    assert sum(path.stat().st_size for path in cache.rglob("*.bin")) <= 100_000  # of 300,000 in the storage
    runs = [(tmp_path / name / "metrics.csv").read_text() for name in ("one", "two")]
    assert runs[0] == runs[1]

    storage.failing = 0.0

    def said(place: str) -> str:
        monkeypatch.setenv("LIT_NN_CACHE", tempfile.mkdtemp(dir=tmp_path))
        return refused(train, words(place, tempfile.mkdtemp(dir=tmp_path)), 1)

    assert "NoSuchBucket" in said("s3://other/photos")
    assert "s3://mine/other holds no complete shards" in said("s3://mine/other")
    client = store._client()
    name = "photos/train/chunk-0-3.bin"
    whole = client.get_object(Bucket="mine", Key=name)["Body"].read()
    client.put_object(Bucket="mine", Key=name, Body=whole[:2000] + bytes(9) + whole[2009:])
    assert "s3://mine/photos/train/chunk-0-3.bin is damaged" in said(place)
    client.put_object(Bucket="mine", Key=name, Body=whole)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))  # bytes of a file
    try:
        assert "the cache cannot be written" in said(place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0.0)  # from now on it looks at the keys
    assert "InvalidAccessKeyId" in said(place)
