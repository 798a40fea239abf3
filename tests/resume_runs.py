"""Runs that are stopped and continued, and what is different about them in the end: nothing, one hopes."""

import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Patch, rows_of, script
from torch import Tensor

from lit_nn import LitClassifier

train = script("train")
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
    line = [*SMALL, *words, "--run_dir", str(folder)]
    left = list(stops)

    def on_train_batch_end(self: LitClassifier, *_: Any) -> None:
        if left and self.global_step == left[0]:
            left.pop(0)
            if kill:
                raise Killed
            signal.raise_signal(signal.SIGTERM)

    with Patch.context() as patch:
        patch.setattr(LitClassifier, "on_train_batch_end", on_train_batch_end)
        while left:
            if kill:
                with pytest.raises(Killed):
                    train(line)
            else:
                assert train(line) == STOPPED
            line = ["--resume", str(folder)]
        if to_the_end:
            assert train(line) == 0
    return folder


def assert_resumes_exactly(
    words: Sequence[str], folder: Path, stops: Sequence[int] = (2, 4, 6), kill: bool = False
) -> None:
    """A run that is stopped and continued must be the one that is not, to the last bit."""
    straight = finished(words, folder / "straight")
    assert differences(straight, stopped_and_continued(words, folder / "stopped", stops, kill)) == []


def differences(one: Path, other: Path) -> list[str]:
    """Where two run folders differ: everything in the checkpoints, the metrics, the result, but for times."""
    found: list[str] = []
    for name in ("last", "best"):
        first, second = (dict(leaves(load(folder / "checkpoints" / f"{name}.ckpt"))) for folder in (one, other))
        found += [f"{name}.ckpt{place}" for place in first.keys() ^ second.keys()]
        found += [f"{name}.ckpt{place}" for place in first.keys() & second.keys() if first[place] != second[place]]
    if (one / "metrics.csv").read_text() != (other / "metrics.csv").read_text():
        found.append("metrics.csv")
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    changing = {"seconds": 0, "git_commit": ""}
    return found + ([] if results[0] | changing == results[1] | changing else ["result.json"])


def assert_same_numbers(one: Path, other: Path, rel: float) -> None:
    """Two runs must have the same metrics, up to the order in which numbers were added."""
    for first, second in zip(rows(one), rows(other), strict=True):
        assert {k: float(v) for k, v in second.items()} == pytest.approx(
            {k: float(v) for k, v in first.items()}, rel=rel
        )


def load(path: Path) -> dict[str, Any]:
    """A checkpoint without what tells the time, or how often it was saved."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    del checkpoint["callbacks"]["Checkpoints"]["seconds"], checkpoint["settings"], checkpoint["git_commit"]
    return checkpoint


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Each value with its place; of tensors the bits."""
    if isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{place}/{key}")
        yield f"{place}/", type(value)
    elif isinstance(value, Tensor):
        yield place, (value.dtype, value.shape, value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    else:
        yield place, (type(value), value)


def rows(folder: Path) -> list[dict[str, str]]:
    """The table of metrics."""
    return rows_of(folder / "metrics.csv")
