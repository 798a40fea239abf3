"""Images gathered into batches, each decoded and classified in one of several threads, off the event loop."""

import asyncio
import io
import logging
import math
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from data_modules.images.decode import FORMATS, pixel_count
from lit_nn.errors import brief
from lit_nn.trained.predict import Model, Pixels, data_uri

# In bytes: of smaller blocks the allocator would give nothing back to the system.
Image.core.set_block_size(1 << 26)  # type: ignore[attr-defined]

BIG = 4_000_000  # pixels; images above that have one thread for all, so that memory stays bounded


@dataclass(frozen=True)
class Limits:
    """What a server takes on; each is an option of scripts/serve.py."""

    max_bytes: int = field(default=32_000_000, metadata={"help": "largest request in bytes"})
    max_pixels: int = field(default=50_000_000, metadata={"help": "largest image in pixels"})
    max_files: int = field(default=32, metadata={"help": "most images in a request"})
    max_seconds: float = field(default=30.0, metadata={"help": "time for a request to come, and again to be answered"})
    max_queue: int = field(default=512, metadata={"help": "images that may wait"})
    max_memory: int = field(default=256_000_000, metadata={"help": "bytes of all requests together"})
    max_connections: int = field(default=900, metadata={"help": "clients at once; a process may open 1,024 files"})
    batch_size: int = field(default=8, metadata={"help": "most images that go through the model at once"})
    batch_wait: float = field(default=0.0, metadata={"help": "milliseconds that a batch waits for further images"})
    # One more than cores, so that none is idle while a thread waits for the interpreter.
    threads: int = field(default=(os.cpu_count() or 1) + 1, metadata={"help": "that decode and run the model"})


class Refusal(Exception):
    """What was asked for is not given; the message is the sentence that the client gets."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


Found = tuple[NDArray[np.float32], float, str]  # probabilities (num_classes,), `energy`, heat map as a data URI or ""


class Item(NamedTuple):
    """An image that waits."""

    file: bytes
    heat_map: bool  # whether it is asked for
    found: asyncio.Future[Found | Refusal]


class Batcher:
    """Judges what image files show, many at once."""

    def __init__(self, model: Model, limits: Limits) -> None:
        self.model, self.limits, self.waiting, self.big = model, limits, deque[Item](), ThreadPoolExecutor(1)
        self.free, self.batches, self.images = limits.threads, 0, 0
        self.loop, self.pool = asyncio.get_running_loop(), ThreadPoolExecutor(limits.threads)
        self.timer: asyncio.TimerHandle | None = None
        self.lock = Lock()  # of what both the loop and the threads change: waiting, free

    async def judge(self, files: list[bytes], heat_map: bool) -> list[Found | Refusal]:
        """What image files show, each; raises `Refusal` if the queue is full."""
        if self.waiting and len(self.waiting) + len(files) > self.limits.max_queue:  # else a large form never gets in
            raise Refusal(429, f"{len(self.waiting)} images are waiting already; try again in a second.")
        items = [Item(file, heat_map, self.loop.create_future()) for file in files]
        with self.lock:
            self.waiting += items
        if len(self.waiting) >= self.limits.batch_size or not self.limits.batch_wait:
            self._start()
        elif not self.timer:
            self.timer = self.loop.call_later(self.limits.batch_wait / 1000, self._start)
        try:
            return [await item.found for item in items]
        finally:  # there may have been no time for them
            for item in items:
                item.found.cancel()

    def _start(self) -> None:
        """Give what waits to the free threads."""
        if self.timer:
            self.timer.cancel()
            self.timer = None
        with self.lock:
            while batch := self._next(self.free) if self.free else []:
                self.free -= 1
                self.pool.submit(self._work, batch)

    def _next(self, threads: int) -> list[Item]:
        """A batch for one of so many threads that have none, in equal parts; [] if nothing waits."""
        while self.waiting:
            count = min(self.limits.batch_size, math.ceil(len(self.waiting) / threads))
            batch = [item for item in (self.waiting.popleft() for _ in range(count)) if not item.found.done()]
            if batch:
                self.batches, self.images = self.batches + 1, self.images + len(batch)
                return batch
        return []

    def _work(self, batch: list[Item]) -> None:
        """Judge one batch after the other: to ask the loop for each would leave a core idle while that is busy."""
        while batch:
            self.loop.call_soon_threadsafe(self._finish, batch, self._found(batch))
            with self.lock:
                batch = self._next(self.free + 1)
                self.free += not batch

    def _found(self, batch: list[Item]) -> list[Found | Refusal]:
        try:
            decoded = [self._decoded(item) for item in batch]
            return [
                self._shown(item, image, judged) if isinstance(image, np.ndarray) else image
                for item, image, judged in zip(batch, decoded, self.model.judge(decoded), strict=True)
            ]
        except Exception:  # the runtime can run out of memory for instance
            logging.exception("a batch of %d images failed", len(batch))
            return [Refusal(500, "The model failed; the server's log says why.") for _ in batch]

    def _shown(self, item: Item, image: Pixels, judged: tuple[NDArray[np.float32], float]) -> Found:
        return (*judged, data_uri(self.model.overlay(image)) if item.heat_map else "")

    def _big(self, item: Item, image: Image.Image) -> Found:
        """All of the work on one big image, of which nothing but the answer stays."""
        pixels = self.model.pixels(image)
        return self._shown(item, pixels, *self.model.judge([pixels]))

    def _decoded(self, item: Item) -> Pixels | Found | Refusal:
        """An image file as the model takes it, prepared as predict.py does it; of a big one already the answer."""
        file = item.file
        try:
            with Image.open(io.BytesIO(file), formats=FORMATS) as image:
                if (count := pixel_count(image)) > self.limits.max_pixels:
                    return Refusal(
                        413, f"The image has {count:,} pixels; at most {self.limits.max_pixels:,} are taken."
                    )
                side = 2 * max(self.model.image_shape[1:])
                image.draft(None, (side, side))  # a JPEG far larger than needed, at a part of its size
                if pixel_count(image) > BIG:
                    return self.big.submit(self._big, item, image).result()
                return self.model.pixels(image)
        except UnidentifiedImageError:
            return Refusal(415, f"The file is not an image in {', '.join(FORMATS)}." if file else "The file is empty.")
        except Exception as error:  # decoders raise all kinds of things at broken or hostile files
            return Refusal(422, f"The image cannot be used: {brief(error)}.")

    def _finish(self, batch: list[Item], found: list[Found | Refusal]) -> None:
        for item, result in zip(batch, found, strict=True):
            if not item.found.done():
                item.found.set_result(result)
