"""Shards: what they hold, in which order they come, how a run goes on inside an epoch, and what S3 does to it."""

import itertools
import json
import os
import shlex
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Patch, Refused, Said, Start, ended, script, wait_until
from PIL import Image
from resume_runs import assert_resumes_exactly, stopped_and_continued
from s3_server import Proxy, s3_server
from snippets import commands

from data_modules.base import SPLITS, Split
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


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: Patch) -> Path:
    monkeypatch.setenv("LIT_NN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def loader(data: ImageStream, part: Split = "train", rank: int = 0, world: int = 1, workers: int = 0) -> StreamLoader:
    options: dict[str, Any] = {"shuffle": part == "train", "seed": 3, "rank": rank, "world_size": world}
    made = StreamLoader(*data.split(part), 16, **options)
    made.images.pool, made.window, made.ahead = ThreadPoolExecutor(max(1, workers)), data.window, 2 * workers
    return made


def named(pair: tuple[Any, int]) -> tuple[bytes, int]:
    return pair[0].numpy().tobytes(), pair[1]


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
        assert len(stream) == len(rows)
        if part != "train":  # which is shuffled
            assert its_labels.equal(labels[rows])
            assert stream[:].equal(array[rows])
            assert stream[3].equal(array[rows[3]])
        pairs = zip(array[rows], labels[rows].tolist(), strict=True)
        found = zip(stream[:], its_labels.tolist(), strict=True)
        assert Counter(map(named, pairs)) == Counter(map(named, found))
        theirs = StreamingDataset(str(shards / part))  # their own reader, in order
        assert [label for _, label in theirs] == its_labels.tolist()
    assert prepare(["--data", "image_stream", "--data_dir", str(shards), "--sheet", str(shards / "sheet.png")]) == 0
    assert "3 x 20 x 20" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
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
    words = ["--data", "image_stream", "--data_dir", str(shards), "--data.window", "3", "--data.workers", "1"]
    words += ["--net", "cifar_cnn", "--trainer.limit_train_batches", "8", "--batch_size", "16"]
    assert_resumes_exactly(words, tmp_path, [3, 10])


@pytest.mark.slow
@pytest.mark.posix
def test_a_signal_to_all_processes_saves(shards: Path, tmp_path: Path, start: Start) -> None:
    """As Ctrl-C in a terminal and SLURM's warning are, which reach the workers too."""
    words = ["--data", "image_stream", "--data_dir", str(shards), "--data.workers", "2", "--accelerator", "cpu"]
    words += ["--save_every_steps", "1", "--batch_size", "1", "--net", "lenet", "--run_dir", str(tmp_path / "run")]
    process = start("train", *words)
    wait_until((tmp_path / "run" / "checkpoints" / "last.ckpt").exists, process)
    os.killpg(process.pid, signal.SIGINT)
    assert "SIGINT: saving after this step" in ended(process, 128 + signal.SIGINT)
    assert train(["--resume", str(tmp_path / "run"), "--max_epochs", "1"]) == 0


def test_another_window_begins_the_epoch_again(shards: Path, tmp_path: Path, capfd: Said) -> None:
    words = ["--data", "image_stream", "--data_dir", str(shards), "--net", "mlp", "--data.workers", "0"]
    folder = stopped_and_continued(words, tmp_path / "run", [2], to_the_end=False)
    assert train(["--resume", str(folder), "--data.workers", "1", "--max_epochs", "1"]) == 0
    assert "starts again" not in capfd.readouterr().out
    folder = stopped_and_continued(words, tmp_path / "other", [2], to_the_end=False)
    assert train(["--resume", str(folder), "--data.window", "2", "--max_epochs", "1"]) == 0
    assert "The batches are not those of before: the epoch starts again" in capfd.readouterr().out


def test_what_is_done_with_a_data_set_is_done_with_a_stream(shards: Path, tmp_path: Path, capfd: Said) -> None:
    words = ["--data", "image_stream", "--data_dir", str(shards), "--max_epochs", "1", "--accelerator", "cpu"]
    words += ["--net", "mlp", "--class_weights", "balanced", "--data.workers", "0", "--run_dir", str(tmp_path / "run")]
    assert train(words) == 0
    best = str(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert evaluate([best, "--output", str(tmp_path / "report")]) == 0
    result, report = tmp_path / "run" / "result.json", tmp_path / "report" / "metrics.json"
    assert json.loads(report.read_text())["accuracy"] == pytest.approx(json.loads(result.read_text())["test_acc"])


@pytest.mark.slow
def test_features_are_kept_and_few_batches_learnt_by_heart(shards: Path, tmp_path: Path) -> None:
    words = ["--data", "image_stream", "--data_dir", str(shards), "--max_epochs", "1", "--accelerator", "cpu"]
    words += ["--net", "mlp", "--data.workers", "0", "--run_dir", str(tmp_path / "run")]
    assert train(words) == 0
    best = str(tmp_path / "run" / "checkpoints" / "best.ckpt")
    frozen = ["--weights", best, "--freeze_epochs", "-1", "--cache_features", "true", "--augment", "none"]
    assert train([*words[:-1], str(tmp_path / "kept"), *frozen]) == 0
    assert train([*words[:-1], str(tmp_path / "overfit"), "--trainer.overfit_batches", "2"]) == 0


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
    assert "holds no complete shards" in refused(train, ["--data", "image_stream", "--data_dir", str(broken)], 1)
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


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("--data.sampling balanced", 2, "sampling is balanced; it must be shuffled"),
        ("--data.on_device true", 2, "on_device is True; it must be left out: a stream is not kept"),
        ("--data.val_fraction 0.2", 2, "val_fraction is 0.2; it must be left out"),
        ("--data.fit pad", 2, "fit is pad; it must be crop, as in the shards"),
        ("--data.window 0", 2, "window is 0; it must be at least 1"),
        ("--data_dir nowhere", 1, "nowhere holds no complete shards"),
    ],
)
def test_what_cannot_be_done_is_said(words: str, status: int, message: str, shards: Path, refused: Refused) -> None:
    line = ["--data", "image_stream", "--data_dir", str(shards), *words.split()]
    assert message in refused(train, line, status)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_damaged_shard_is_said(workers: str, images: Path, tmp_path: Path, refused: Refused) -> None:
    out = written(images, tmp_path / "shards")
    shard = Path(out, "train", "chunk-0-1.bin")
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(content)
    line = [
        "--data",
        "image_stream",
        "--data_dir",
        str(out),
        "--run_dir",
        str(tmp_path / "run"),
        "--accelerator",
        "cpu",
    ]
    assert "chunk-0-1.bin is damaged: not what" in refused(train, [*line, "--data.workers", workers], 1)
    shard.unlink()
    assert "has no train/chunk-0-1.bin" in refused(train, [*line[:5], str(tmp_path / "two"), "--data.workers", "0"], 1)


# --- S3 ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def storage(monkeypatch: Patch) -> Iterator[Proxy]:
    """Storage with an empty bucket "mine", which the usual variables name."""
    pytest.importorskip("moto.server")
    with s3_server() as proxy:
        for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("ENDPOINT_URL", proxy.url)):
            monkeypatch.setenv(f"AWS_{name}", value)
        store._client.cache_clear()
        store._client().create_bucket(Bucket="mine")
        yield proxy
        store._client.cache_clear()


@pytest.mark.slow
@pytest.mark.posix
@pytest.mark.timeout(900)
def test_storage_that_fails_changes_nothing(
    storage: Proxy, images: Path, cache: Path, tmp_path: Path, refused: Refused, monkeypatch: Patch
) -> None:
    import resource

    import moto.settings

    words = [
        "--net",
        "mlp",
        "--max_epochs",
        "2",
        "--accelerator",
        "cpu",
        "--batch_size",
        "16",
        "--data",
        "image_stream",
    ]
    words += ["--data.window", "4", "--data.workers", "1", "--trainer.logger", "false"]
    here, place = str(tmp_path / "here"), "s3://mine/photos"
    written(images, here, "--shard_mb", "0.005")  # five images
    assert train([*words, "--data_dir", here, "--run_dir", str(tmp_path / "one")]) == 0
    storage.failing = 0.05
    written(images, place, "--shard_mb", "0.005")
    storage.outage_at = storage.requests + 30  # in the middle of the first epoch
    words += ["--data_dir", place, "--data.cache_gb", "0.0001"]
    assert train([*words, "--run_dir", str(tmp_path / "two")]) == 0
    assert storage.requests > 150
    assert storage.failed > 10
    assert sum(path.stat().st_size for path in cache.rglob("*.bin")) <= 100_000  # of 300,000 in the storage
    runs = [(tmp_path / name / "metrics.csv").read_text() for name in ("one", "two")]
    assert runs[0] == runs[1]

    storage.failing = 0.0

    def said(place: str) -> str:
        folder = tempfile.mkdtemp(dir=tmp_path)
        return refused(train, [*words, "--data_dir", place, "--run_dir", folder], 1)

    assert "NoSuchBucket" in said("s3://other/photos")
    assert "s3://mine/other holds no complete shards" in said("s3://mine/other")
    client = store._client()
    name = "photos/train/chunk-0-3.bin"
    whole = client.get_object(Bucket="mine", Key=name)["Body"].read()
    client.put_object(Bucket="mine", Key=name, Body=whole[:2000] + bytes(9) + whole[2009:])
    shutil.rmtree(cache)
    assert "s3://mine/photos/train/chunk-0-3.bin is damaged" in said(place)
    client.put_object(Bucket="mine", Key=name, Body=whole)
    shutil.rmtree(cache)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))  # bytes of a file
    try:
        assert "the cache cannot be written" in said(place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0.0)  # from now on it looks at the keys
    assert "InvalidAccessKeyId" in said(place)


def test_several_labels_are_not_kept_in_shards(images: Path, tmp_path: Path, refused: Refused) -> None:
    paths = sorted(path for path in images.rglob("*") if path.is_file())[:40]
    rows = [f"{path.absolute()},{'a|b' if n % 3 else 'b'}" for n, path in enumerate(paths)]
    (tmp_path / "t.csv").write_text("\n".join(["file,label", *rows]), encoding="utf-8")
    words = ["--data", "image_table", "--data.table", str(tmp_path / "t.csv"), "--data.delimiter", "|"]
    words = [word.replace("--data.", "--") for word in words]
    assert "--shards keeps one label for each image" in refused(prepare, [*words, "--shards", str(tmp_path / "out")], 1)
    assert not (tmp_path / "out").exists()
