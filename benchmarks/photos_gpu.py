"""Images a second of photos_best on a GPU, against a bare loop on random tensors that are there already.

    python benchmarks/photos_gpu.py [--net timm/convnext_tiny] [--batch_size 16 128] [--rounds 3]

The project augments, keeps its moving average of the weights, logs and shows its bar; the bare loop has none of it.
Both train a network of timm from nothing, at 224 x 224 in bf16. Only the steps are timed, in the second epoch.
"""

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import timm
import torch
from augment import make_files
from measure import machine, median_ratio, table, take_turns
from time_to_accuracy import ROOT
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from lit_nn.engine.cli import LitCLI
from lit_nn.engine.run import running

FILES, SIZE = 6400, 224


class Clock(L.Callback):
    """Milliseconds of a step in the second epoch, but for its first one; and the share of them without a kernel."""

    milliseconds = idle = 0.0

    def __init__(self, profiled: bool) -> None:
        self.profiler = profile(activities=[ProfilerActivity.CUDA]) if profiled else None

    def on_train_batch_end(self, trainer: L.Trainer, *others: Any) -> None:
        """Start after the first step, stop after the last one."""
        steps, index = int(trainer.num_training_batches) - 1, others[-1]
        if trainer.current_epoch == 1 and index in (0, steps):
            torch.cuda.synchronize()
            if index == 0:
                if self.profiler:
                    self.profiler.start()
                self._began = time.perf_counter()
                return
            seconds = time.perf_counter() - self._began
            self.milliseconds = 1000 * seconds / steps
            if self.profiler:
                self.profiler.stop()
                busy = sum(event.self_device_time_total for event in self.profiler.key_averages()) / 1e6
                self.idle = 1 - busy / seconds


def project(words: list[str], profiled: bool = False) -> Clock:
    """Two epochs of photos_best."""
    clock = Clock(profiled)
    with tempfile.TemporaryDirectory() as run:
        words = ["--accelerator", "gpu", "--max_epochs", "2", "--run_dir", f"{run}/run", *words]
        cli = LitCLI("fit", ["--config", str(ROOT / "configs/photos_best.yaml"), *words])
        cli.trainer.callbacks.append(clock)  # type: ignore[attr-defined]
        with running(cli):
            cli.trainer.fit(cli.model, cli.datamodule)
    return clock


def bare(net: str, batch_size: int, steps: int) -> float:
    """Milliseconds of a step of the least that one would write."""
    model = timm.create_model(net.removeprefix("timm/"), num_classes=2).cuda().to(memory_format=torch.channels_last)
    images = torch.randn(batch_size, 3, SIZE, SIZE, device="cuda").to(memory_format=torch.channels_last)
    labels = torch.randint(2, (batch_size,), device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = cross_entropy(model(images), labels, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    for _ in range(10):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began) / steps


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="timm/convnext_tiny")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    options, further = parser.parse_known_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        os.environ["LIT_NN_CACHE"], folder = str(Path(place, "cache")), Path(place, "photographs")
        make_files(folder, FILES, (256, 256))
        for size in options.batch_size:
            words = ["--data_dir", str(folder), "--net", options.net, "--weights", "none", "--batch_size", str(size)]
            words += further
            jobs = {
                "project": lambda words=words: project(words).milliseconds,
                "bare": lambda size=size: bare(options.net, size, max(20, 3200 // size)),
            }
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                times = take_turns(jobs, options.rounds)  # type: ignore[arg-type]
                idle = project(words, profiled=True).idle
            rates = [f"{1000 * size / statistics.median(times[name]):,.0f}" for name in jobs]
            rows.append([size, *rates, f"{median_ratio(times['bare'], times['project']):.3f}", f"{idle:.0%}"])
    print(f"## photos_best on a GPU: {options.net}\n")
    print(f"`python benchmarks/photos_gpu.py`, n = {options.rounds}, alternating; {machine()}.\n")
    print(table(["batch", "images a second", "of the bare loop", "ratio", "GPU idle"], rows))


if __name__ == "__main__":
    main()
