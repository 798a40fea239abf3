"""Writes a data set of image files as litdata's shards, in parallel, and goes on after it was killed."""

import hashlib
import importlib.util
import io
import json
import os
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
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
from data_modules.image_stream import FORMAT
from data_modules.images.cache import SAMPLED, cache_folder, prepare_file
from data_modules.images.dataset import ImageFiles
from data_modules.images.shards import shard_name
from data_modules.images.store import INSTALL, Store

Written = dict[tuple[str, int], list[Any]]  # part and number of a shard: size and CRC-32, and litdata's configuration


def write_shards(data: ImageFiles, out: str, kind: str, megabytes: float) -> dict[str, Any]:
    """Write all parts of a data set, its training images in a random order, so that every shard has all classes.

    What is complete is listed in a file beside the caches, and not written again. ``images.json`` comes last.

    Args:
        data: The data set; its parts stay as they are.
        out: An empty folder or ``s3://bucket/path``, or one with a part of the same.
        kind: "encoded" for the files as they are, "decoded" for their pixels at one size.
        megabytes: Size of a shard, about.

    Returns:
        What ``images.json`` holds.

    Raises:
        DataError: If litdata is missing, or ``out`` holds something else or cannot be written.
    """
    if importlib.util.find_spec("litdata") is None:
        raise DataError(f"--shards needs litdata: {INSTALL}")
    require("shard_mb", megabytes, 0 < megabytes < 4000, "more than 0, and less than 4000")  # offsets have 32 bits
    if data.multi_label:
        raise DataError("--shards keeps one label for each image, and here are several; train from the table itself")
    data.keeps_images = False
    store, rows, labels = Store(out), dict[Split, Tensor](), dict[Split, Tensor]()
    for split in SPLITS:
        _, all_labels, part = data.split(split)
        order = torch.randperm(len(part), generator=seeded_generator(data.seed))
        rows[split] = part[order] if split == "train" else part
        labels[split] = all_labels[rows[split]]
    files = [Path(data.data_dir, file) for file in data.files]
    sizes = [file.stat().st_size for file in files[:: max(1, len(files) // SAMPLED)] if file.is_file()]
    mean_size = np.prod(data.image_shape) if kind == "decoded" else sum(sizes) / len(sizes)
    per_shard = max(1, round(megabytes * 1e6 / mean_size))
    index: dict[str, Any] = {"format": FORMAT, "kind": kind, "images_per_shard": per_shard}
    index |= {n: getattr(data, n) for n in ("class_names", "image_shape", "mean", "std", "levels", "fit")}
    key = hashlib.sha256(repr((store.place, index, data.files)).encode(errors="surrogateescape"))
    for tensor in (*rows.values(), *labels.values(), *data.parts().values()):  # with the fingerprints of all files
        key.update(tensor.numpy().tobytes())
    index["key"] = key.hexdigest()

    journal = cache_folder() / f"shards-{index['key'][:16]}.jsonl"
    journal.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(journal.with_suffix(".lock")):
        try:
            there = json.loads(store.read("images.json"))
            if there.get("key") == index["key"]:
                return there
        except (FileNotFoundError, ValueError):
            pass
        if not journal.exists() and not store.is_empty():
            raise DataError(f"{out} is not empty, and holds no part of these shards; give another place to --shards")
        done = _write_missing(data, files, rows, labels, index, store, journal)
        index["parts"] = {}
        for split, values in labels.items():
            shards = [done[split, number] for number in range(-(-len(values) // per_shard))]
            chunks = [
                {"chunk_bytes": size, "chunk_size": len(some), "dim": None, "filename": f"chunk-0-{number}.bin"}
                for number, ((size, _, _), some) in enumerate(zip(shards, values.split(per_shard), strict=True))
            ]
            litdata_index = {"chunks": chunks, "config": shards[0][2], "updated_at": str(time.time())}
            store.write(f"{split}/index.json", json.dumps(litdata_index).encode())
            np.save(content := io.BytesIO(), values.numpy())
            store.write(f"{split}/labels.npy", content.getvalue())
            counts = values.bincount(minlength=len(data.class_names)).tolist()
            index["parts"][split] = {"images": len(values), "counts": counts, "shards": [one[:2] for one in shards]}
        store.write("images.json", json.dumps(index).encode())
    return index


def _write_missing(
    data: ImageFiles,
    files: list[Path],
    rows: dict[Split, Tensor],
    labels: dict[Split, Tensor],
    index: dict[str, Any],
    store: Store,
    journal: Path,
) -> Written:
    """Write the shards that are not in the journal, and add them to it."""
    from litdata.streaming.writer import BinaryWriter

    per_shard, (channels, *size), done = index["images_per_shard"], data.image_shape, Written()
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []:
        try:
            part, number, *found = json.loads(line)
            done[part, number] = found
        except ValueError:  # it was killed while it wrote this line
            pass

    def content_of(file: Path) -> bytes:
        if index["kind"] == "encoded":
            return file.read_bytes()
        return prepare_file(file, (size[0], size[1]), channels, data.levels, data.fit).tobytes()

    def write(shard: tuple[Split, int]) -> list[Any]:
        split, number = shard
        which = slice(number * per_shard, (number + 1) * per_shard)
        pairs = zip(rows[split][which].tolist(), labels[split][which].tolist(), strict=True)
        with tempfile.TemporaryDirectory() as folder:
            writer = BinaryWriter(folder, chunk_size=per_shard, chunk_index=number)
            for place, (row, label) in enumerate(pairs):
                writer.add_item(place, (content_of(files[row]), label))
            (path,) = writer.done()
            content = Path(path).read_bytes()
        store.write(shard_name(split, number), content)
        return [len(content), zlib.crc32(content), writer.get_config()]

    shards = {
        (split, number): len(some) for split in SPLITS for number, some in enumerate(rows[split].split(per_shard))
    }
    missing, total = [shard for shard in shards if shard not in done], sum(shards.values())
    before = total - sum(shards[shard] for shard in missing)
    with (
        journal.open("a", encoding="utf-8") as lines,
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=total, initial=before, unit=" images", desc="writing", disable=None) as bar,
    ):
        lines.write("\n" * bool(done))  # after a line that was cut off
        for shard, found in zip(missing, pool.map(write, missing), strict=True):
            done[shard] = found
            lines.write(json.dumps([*shard, *found]) + "\n")
            lines.flush()
            bar.update(shards[shard])
    return done
