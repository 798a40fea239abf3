"""Writes a data set of image files as litdata's shards, in parallel, and goes on after it was killed."""

import hashlib
import importlib.util
import io
import json
import os
import shutil
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from data_modules.base import SPLITS, Split
from data_modules.batches import seeded_generator
from data_modules.errors import DataError, require
from data_modules.files import atomic_path
from data_modules.image_stream import FORMAT
from data_modules.images.cache import SAMPLED, cache_folder, prepare_file
from data_modules.images.dataset import ImageFiles
from data_modules.images.shards import shard_name
from data_modules.images.store import INSTALL, Store


def write_shards(data: ImageFiles, out: str, kind: str, megabytes: float) -> dict[str, Any]:
    """Write all parts of a data set, its training images in a random order, so that every shard has all classes.

    Shards are "encoded" (files as they are) or "decoded" (pixels at one size). ``out`` is a folder or
    ``s3://bucket/path``, empty or with a part of the same: what is complete is noted in a folder beside the caches, and
    not written again. ``images.json`` comes last, and is returned. Raises DataError.
    """
    if importlib.util.find_spec("litdata") is None:
        raise DataError(f"--shards needs litdata: {INSTALL}")
    require("shard_mb", megabytes, 0 < megabytes < 4000, "more than 0, and less than 4000")  # offsets have 32 bits
    if data.multi_label:
        raise DataError("--shards keeps one label for each image, and here are several; train from the table itself")
    data.keeps_images = False
    store, images = Store(out), dict[Split, tuple[Tensor, Tensor]]()  # rows and labels of each part
    for split in SPLITS:
        _, labels, rows = data.split(split)
        if split == "train":
            rows = rows[torch.randperm(len(rows), generator=seeded_generator(data.seed))]
        images[split] = rows, labels[rows]
    files = [Path(data.data_dir, file) for file in data.files]
    sizes = [file.stat().st_size for file in files[:: max(1, len(files) // SAMPLED)] if file.is_file()]
    mean_size = np.prod(data.image_shape) if kind == "decoded" else sum(sizes) / len(sizes)
    per_shard = max(1, round(megabytes * 1e6 / mean_size))
    index: dict[str, Any] = {"format": FORMAT, "kind": kind, "images_per_shard": per_shard}
    index |= {n: getattr(data, n) for n in ("class_names", "image_shape", "mean", "std", "levels", "fit")}
    key = hashlib.sha256(repr((store.place, index, data.files)).encode(errors="surrogateescape"))
    for tensor in (*(tensor for pair in images.values() for tensor in pair), *data.parts().values()):
        key.update(tensor.numpy().tobytes())  # with the fingerprints of all files
    index["key"] = key.hexdigest()

    notes = cache_folder() / f"shards-{index['key'][:16]}"  # a file for each complete shard
    notes.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(notes.with_suffix(".lock")):
        with suppress(FileNotFoundError, ValueError):
            there = json.loads(store.read("images.json"))
            if there.get("key") == index["key"]:
                return there
        if store.is_empty():
            shutil.rmtree(notes, ignore_errors=True)  # of shards that somebody has deleted
        elif not notes.exists():
            raise DataError(f"{out} is not empty, and holds no part of these shards; give another place to --shards")
        notes.mkdir(exist_ok=True)
        index["parts"] = {}
        for split, (rows, labels) in images.items():
            shards = _write_part(data, split, [files[row] for row in rows.tolist()], labels, index, store, notes)
            chunks = {"chunks": [shard["chunk"] for shard in shards], "config": shards[0]["config"]}
            store.write(f"{split}/index.json", json.dumps(chunks | {"updated_at": str(time.time())}).encode())
            np.save(content := io.BytesIO(), labels.numpy())
            store.write(f"{split}/labels.npy", content.getvalue())
            counts = labels.bincount(minlength=len(data.class_names)).tolist()
            sums = [[shard["chunk"]["chunk_bytes"], shard["crc32"]] for shard in shards]
            index["parts"][split] = {"images": len(rows), "counts": counts, "shards": sums}
        store.write("images.json", json.dumps(index).encode())
        shutil.rmtree(notes)
    return index


def _write_part(
    data: ImageFiles, split: Split, files: list[Path], labels: Tensor, index: dict[str, Any], store: Store, notes: Path
) -> list[dict[str, Any]]:
    """Write the shards of a part that have no note yet: CRC-32, and litdata's chunk and configuration."""
    from litdata.streaming.writer import BinaryWriter

    channels, *size = data.image_shape

    def content_of(file: Path) -> bytes:
        if index["kind"] == "encoded":
            return file.read_bytes()
        return prepare_file(file, (size[0], size[1]), channels, data.levels, data.fit).tobytes()

    def write(start: int) -> dict[str, Any]:
        number, end = start // index["images_per_shard"], start + index["images_per_shard"]
        note = notes / f"{split}-{number}.json"
        if not note.exists():
            with tempfile.TemporaryDirectory() as folder:
                writer = BinaryWriter(folder, chunk_size=end - start, chunk_index=number)
                for place, (file, label) in enumerate(zip(files[start:end], labels[start:end].tolist(), strict=True)):
                    writer.add_item(place, (content_of(file), label))
                (path,) = writer.done()
                content = Path(path).read_bytes()
                (described,) = Path(folder).glob("*index.json")
                (chunk,), config = json.loads(described.read_bytes()).values()
            store.write(shard_name(split, number), content)
            with atomic_path(note) as temporary:
                found = {"crc32": zlib.crc32(content), "chunk": chunk, "config": config}
                temporary.write_text(json.dumps(found), encoding="utf-8")
        bar.update(len(files[start:end]))
        return json.loads(note.read_bytes())

    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(files), unit=" images", desc=f"writing {split}", disable=None) as bar,
    ):
        return [*pool.map(write, range(0, len(files), index["images_per_shard"]))]
