"""Runs that are stopped and continued, and what is different about them in the end: nothing, one hopes."""

import csv
import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_nn import LitClassifier
from lit_nn.commands import train

SMALL = [
    *("--accelerator", "cpu", "--batch_size", "8", "--max_epochs", "2", "--trainer.limit_train_batches", "4"),
    *("--trainer.limit_val_batches", "2", "--trainer.limit_test_batches", "1", "--trainer.logger", "false"),
    *("--trainer.enable_progress_bar", "false"),
]
STOPPED = 128 + signal.SIGTERM


class Killed(Exception):
    """Stands for SIGKILL: nothing of the run goes on after it."""


def finished(words: Sequence[str], folder: Path) -> Path:
    """A run from its beginning to its end."""
    assert train([*SMALL, *words, "--run_dir", str(folder)]) == 0
    return folder


def stopped_and_continued(
    words: Sequence[str], folder: Path, stops: Sequence[int], kill: bool = False, to_the_end: bool = True
) -> Path:
    """The same, but ended after each of the given numbers of steps, and continued each time.

    By a SIGTERM, after which the run saves at the next chance it has; with ``kill`` by an exception, after which it
    goes on from where it had saved last.
    """
    with pytest.MonkeyPatch.context() as patch:
        started = False
        for stop in [*stops, *[None] * to_the_end]:

            def on_train_batch_end(self: LitClassifier, *_: Any, stop: int | None = stop) -> None:
                if self.trainer.global_step == stop and not self.trainer.fit_loop.epoch_loop._should_accumulate():
                    if kill:
                        raise Killed
                    signal.raise_signal(signal.SIGTERM)

            patch.setattr(LitClassifier, "on_train_batch_end", on_train_batch_end)
            line = ["--resume", str(folder)] if started else [*SMALL, *words, "--run_dir", str(folder)]
            started = True
            if kill and stop is not None:
                with pytest.raises(Killed):
                    train(line)
            else:
                assert train(line) == (0 if stop is None else STOPPED)
    return folder


def differences(one: Path, other: Path) -> list[str]:
    """Where two run folders differ: everything in the checkpoints, the metrics, the result, but for times."""
    found: list[str] = []
    for name in ("last", "best"):
        first, second = (load(folder / "checkpoints" / f"{name}.ckpt") for folder in (one, other))
        found += [f"{name}.ckpt: {place}" for place in unequal(first, second)]
    if (one / "metrics.csv").read_text() != (other / "metrics.csv").read_text():
        found.append("metrics.csv")
    results = [
        json.loads((folder / "result.json").read_text()) | {"seconds": 0, "git_commit": ""} for folder in (one, other)
    ]
    return found + ([] if results[0] == results[1] else ["result.json"])


def load(path: Path) -> dict[str, Any]:
    """A checkpoint without what tells the time, or how often it was saved."""
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["callbacks"]["Checkpoints"]["seconds"], checkpoint["settings"], checkpoint["git_commit"]
    return checkpoint


def unequal(one: Any, other: Any, place: str = "") -> Iterator[str]:
    """Names of the values that are not equal to the last bit."""
    if type(one) is not type(other):
        yield place
    elif isinstance(one, Tensor):
        if one.dtype != other.dtype or not torch.equal(one, other):
            yield place
    elif isinstance(one, dict):
        if one.keys() != other.keys():
            yield f"{place}: {one.keys() ^ other.keys()}"
        for name in one.keys() & other.keys():
            yield from unequal(one[name], other[name], f"{place}/{name}")
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            yield place
        for index, (first, second) in enumerate(zip(one, other, strict=False)):
            yield from unequal(first, second, f"{place}/{index}")
    elif one != other:
        yield f"{place}: {one}, {other}"


def rows(folder: Path) -> list[dict[str, str]]:
    """The table of metrics."""
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))
