"""What the benchmarks share: taking turns, and saying on which machine and with which versions."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch


def machine() -> str:
    """The machine, its load and the versions, one line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpu = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "torchvision", "lightning"))
    return (
        f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
        f"{load}{gpu}; Python {platform.python_version()}, {versions}"
    )


def take_turns(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each job in every round, in which all take turns, so that a busy machine disturbs all alike.

    Every second round goes the other way round, so that none always has the same one before it.

    A job that returns a number has timed itself: its number counts. The first round only warms up and is left out.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for round_number in range(rounds + 1):
        for name, job in list(jobs.items())[:: -1 if round_number % 2 else 1]:
            began = time.perf_counter()
            own = job()
            if round_number:
                seconds[name].append(own if isinstance(own, float) else time.perf_counter() - began)
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Median of each job's seconds."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [list(header)]
    lines.append(["---"] * len(lines[0]))
    lines += [[str(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
