"""How much faster several processes train than one: the same images per step, shared out.

    python benchmarks/scaling.py [--net lenet resnet9] [--batch_size 128] [--steps 20] [--rounds 5]
    python benchmarks/scaling.py --accelerator gpu --processes 1 2 4 8 --batch_size 2048 --data fashion_mnist

Options that are not its own go to the training, which else is of the embedded pictures without augmentation. On the CPU
every process computes with one thread; one process with as many threads as there are processes at most is measured
too, which is what to compare with on one machine. All take turns, each in new processes; the first quarter of the steps
is not measured.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
from measure import machine, median_ratio, medians, table, take_turns

from lit_nn.engine.cli import LitCLI
from lit_nn.engine.console import command
from lit_nn.engine.run import running
from lit_nn.nets import count_parameters


class Clock(L.Callback):
    """Writes the seconds of the steps from a given one on into a file, and the number of parameters.

    Args:
        first: Number of steps before.
        path: The file.
    """

    def __init__(self, first: int, path: Path) -> None:
        self.first, self.path = first, path

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start or stop."""
        if trainer.strategy.root_device.type == "cuda":
            outputs["loss"].item()  # the GPU is through
        if batch_idx + 1 == self.first:
            self.began = time.perf_counter()
        elif batch_idx + 1 == trainer.num_training_batches and trainer.is_global_zero:
            seconds = time.perf_counter() - self.began
            self.path.write_text(f"{seconds} {batch_idx + 1 - self.first} {count_parameters(pl_module)}")


@command
def one(words: list[str]) -> None:
    """Train, and write down the time: what runs in each of the measured processes; the first words are its own."""
    first, path, *words = words

    class TimedCLI(LitCLI):
        def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
            trainer = super().instantiate_trainer(**kwargs)
            trainer.callbacks.append(Clock(int(first), Path(path)))  # type: ignore[attr-defined]
            return trainer

    cli = TimedCLI("fit", words)
    with running(cli):
        cli.trainer.fit(cli.model, cli.datamodule)


class Case:
    """A number of processes with a number of threads, to be measured.

    Args:
        net: Name of the network.
        processes: How many.
        threads: Of each of them.
        options: The command line.
    """

    def __init__(self, net: str, processes: int, threads: int, options: argparse.Namespace) -> None:
        self.net, self.processes, self.threads, self.options = net, processes, threads, options
        self.words: list[str] = options.words
        self.steps = self.parameters = 0

    def __call__(self) -> float:
        """Seconds of the steps that count."""
        options = self.options
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "seconds"
            words = [
                *(sys.executable, __file__, "--one", str(options.steps // 4), str(path), "--net", self.net),
                *("--batch_size", str(options.batch_size // self.processes), "--augment", "none", "--max_epochs", "1"),
                *("--trainer.limit_train_batches", str(options.steps), "--trainer.limit_val_batches", "0"),
                *("--trainer.logger", "false", "--trainer.enable_progress_bar", "false"),
                *("--accelerator", options.accelerator, "--devices", str(self.processes)),
                *("--strategy", "ddp" if self.processes > 1 else "auto", "--run_dir", str(Path(folder) / "run")),
                *self.words,
            ]
            environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
            done = subprocess.run(words, env=environment, capture_output=True, encoding="utf-8", check=False)
            if done.returncode:
                sys.exit(done.stderr)
            seconds, steps, parameters = path.read_text().split()
        self.steps, self.parameters = int(steps), int(parameters)
        return float(seconds)


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", nargs="+", default=["lenet", "resnet9"])
    parser.add_argument("--batch_size", type=int, default=128, help="images per step, over all processes")
    parser.add_argument("--steps", type=int, default=20, help="of which the first quarter is not measured")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"])
    options, words = parser.parse_known_args()
    options.words = words
    rows = []
    for net in options.net:
        cases = [Case(net, processes, 1, options) for processes in options.processes]
        if options.accelerator == "cpu":
            cases.append(Case(net, 1, max(options.processes), options))
        named = {f"{case.processes} x {case.threads}": case for case in cases}
        seconds = take_turns(dict(named), options.rounds)
        alone = seconds[next(iter(named))]
        for name, case in named.items():
            values, median = seconds[name], medians(seconds)[name]
            times = f"{median:.2f} s ({min(values):.2f} to {max(values):.2f})"
            rate = f"{case.steps * options.batch_size / median:,.0f}"
            rows.append(
                [net, f"{case.parameters:,}", name, case.steps, times, rate, f"{median_ratio(alone, values):.2f}"]
            )
            print(*rows[-1], sep=" | ", file=sys.stderr)
    command = " ".join(["python benchmarks/scaling.py", *sys.argv[1:]])
    print(f"## Several processes\n\n`{command}`, n = {options.rounds}, alternating; {machine()}.")
    print(
        f"{options.batch_size} images per step over all processes; of {options.steps} steps the last three quarters "
        "are measured. Medians, least and most; the last column is the median over the rounds.\n"
    )
    header = ("network", "parameters", "processes x threads", "steps", "time", "images/s", "times the first")
    print(table(header, rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        sys.exit(one(sys.argv[2:]))
    main()
