"""Writes a data set of image files as litdata's shards, in parallel, and goes on after it was killed."""

import hashlib
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
from tqdm import tqdm

from data_modules.base import SPLITS, Split
from data_modules.batches import seeded_generator
from data_modules.errors import DataError
from data_modules.image_stream import FORMAT
from data_modules.images.cache import SAMPLED, cache_folder, prepare_file
from data_modules.images.dataset import ImageFiles
from data_modules.images.shards import shard_name
from data_modules.images.store import INSTALL, Store


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
    try:
        from litdata.streaming.writer import BinaryWriter
    except ImportError as error:
        raise DataError(f"--shards needs litdata: {INSTALL}") from error
    data.keeps_images = False
    store, (channels, height, width), parts = (
        Store(out),
        data.image_shape,
        {split: data.split(split) for split in SPLITS},
    )
    paths = [Path(data.data_dir, file) for file in data.files]
    sizes = [path.stat().st_size for path in paths[:: max(1, len(paths) // SAMPLED)] if path.is_file()]
    mean_bytes = channels * height * width if kind == "decoded" else sum(sizes) / len(sizes)
    per_shard = max(1, round(megabytes * 1e6 / mean_bytes))
    index: dict[str, Any] = {"format": FORMAT, "kind": kind, "images_per_shard": per_shard}
    for name in ("class_names", "image_shape", "mean", "std", "levels", "fit"):
        index[name] = getattr(data, name)
    key = hashlib.sha256(repr((store.place, index, data.files)).encode(errors="surrogateescape"))
    for _, labels, rows in parts.values():
        key.update(labels[rows].numpy().tobytes() + rows.numpy().tobytes())
    for _, marks in sorted(data.parts().items()):  # with the fingerprints of all files
        key.update(marks.numpy().tobytes())
    index["key"] = key.hexdigest()

    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    journal = folder / f"shards-{index['key'][:16]}.jsonl"
    with FileLock(journal.with_suffix(".lock")):
        try:
            if json.loads(store.read("images.json")).get("key") == index["key"]:
                return json.loads(store.read("images.json"))
        except (FileNotFoundError, ValueError):
            pass
        if not journal.exists() and not store.is_empty():
            raise DataError(f"{out} is not empty, and holds no part of these shards; give another place to --shards")
        done: dict[tuple[str, int], Any] = {}
        for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []:
            try:
                split, number, *found = json.loads(line)
                done[split, number] = found
            except ValueError:  # it was killed while writing this line
                pass

        def write(job: tuple[Split, int, list[int]]) -> tuple[str, int, list[int], dict[str, Any]]:
            split, number, rows = job
            labels = parts[split][1]
            with tempfile.TemporaryDirectory() as place:
                writer = BinaryWriter(place, chunk_size=per_shard, chunk_index=number)
                for count, row in enumerate(rows):
                    if kind == "encoded":
                        content = paths[row].read_bytes()
                    else:
                        pixels = prepare_file(paths[row], (height, width), channels, data.levels, data.fit)
                        content = pixels.tobytes()
                    writer.add_item(count, (content, int(labels[row])))
                (chunk,) = writer.done()
                content = Path(chunk).read_bytes()
            store.write(shard_name(split, number), content)
            return split, number, [len(content), zlib.crc32(content)], writer.get_config()

        jobs: list[tuple[Split, int, list[int]]] = []
        labels_of: dict[str, Any] = {}
        for split, (_, labels, rows) in parts.items():
            if split == "train":
                rows = rows[torch.randperm(len(rows), generator=seeded_generator(data.seed))]
            labels_of[split] = labels[rows].numpy()
            jobs += [(split, number, some.tolist()) for number, some in enumerate(rows.split(per_shard))]
        missing = [job for job in jobs if job[:2] not in done]
        total, left = sum(len(job[2]) for job in jobs), sum(len(job[2]) for job in missing)
        with (
            journal.open("a", encoding="utf-8") as lines,
            ThreadPoolExecutor(os.cpu_count()) as pool,
            tqdm(total=total, initial=total - left, unit=" images", desc="writing", disable=None) as bar,
        ):
            lines.write("\n" * bool(done))  # after a line that was cut off
            for job, (split, number, *found) in zip(missing, pool.map(write, missing), strict=True):
                lines.write(json.dumps([split, number, *found]) + "\n")
                lines.flush()
                done[split, number] = found
                bar.update(len(job[2]))
        index["parts"] = {}
        for split, values in labels_of.items():
            found = [done[split, number] for number in range(-(-len(values) // per_shard))]
            chunks = [
                {"chunk_bytes": sums[0], "chunk_size": min(per_shard, len(values) - number * per_shard), "dim": None}
                | {"filename": Path(shard_name(split, number)).name}
                for number, (sums, _) in enumerate(found)
            ]
            its_index = {"chunks": chunks, "config": found[0][1], "updated_at": str(time.time())}
            store.write(f"{split}/index.json", json.dumps(its_index).encode())
            np.save(content := io.BytesIO(), values)
            store.write(f"{split}/labels.npy", content.getvalue())
            counts = np.bincount(values, minlength=len(data.class_names)).tolist()
            index["parts"][split] = {"images": len(values), "counts": counts, "shards": [sums for sums, _ in found]}
        store.write("images.json", json.dumps(index).encode())
    return index
