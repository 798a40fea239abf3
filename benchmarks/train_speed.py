"""How long an epoch takes: this project, a loop written by hand, the tutorials' loop, stock Lightning.

    python benchmarks/train_speed.py [--net mlp lenet cifar_cnn resnet9] [--how by_hand tutorial stock] [--rounds 5]
    python benchmarks/train_speed.py --accelerator gpu

Each trains the same network from new with the same optimizer and batch size on Fashion-MNIST for one epoch (five on a
GPU) and validates it after each; in every round all four take turns. The first round only warms up.

- project: `lit_nn.engine.cli.LitCLI` as scripts/train.py runs it: metrics of training and validation, TensorBoard,
  metrics.csv, progress bar, best.ckpt and last.ckpt.
- by hand: the least one would write: the project's batches, forward, loss, backward, step, validation accuracy.
- tutorial: torchvision's data set and transforms in a DataLoader, the loop of the tutorial "Quickstart".
- stock: the same data in a DataLoader with two workers, a LightningModule that logs loss and accuracy (torchmetrics) at
  every step, and the Trainer as it is.

On a GPU the first two are compared, and the share of the project's time that the GPU computes nothing is printed.
"""

import argparse
import contextlib
import gzip
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from measure import machine, median_ratio, table, take_turns
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Subset
from torchmetrics.classification import MulticlassAccuracy

from data_modules import data_class
from data_modules.base import ImageDataModule
from data_modules.batches import BatchLoader
from data_modules.fashion_mnist import NAMES, FashionMNIST, file
from data_modules.images.fit import enlarge
from lit_nn.engine.cli import LitCLI
from lit_nn.engine.run import running
from lit_nn.nets import build_net

LR = 1e-3
HOW = ["by_hand", "tutorial", "stock"]
NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"  # Lightning sets it, which slows Adam down where there is no GPU
# Batch 64 as in the tutorials; resnet9 on the sample, or it would take hours. channels_last and bf16 where they are
# faster (without the former, torch's max_pool2d takes a quarter of LeNet's step on a CPU), in the project and by hand.
CASES: dict[str, dict[str, Any]] = {
    "mlp": {"data": "fashion_mnist", "batch_size": 64},
    "lenet": {"data": "fashion_mnist", "batch_size": 64, "channels_last": True},
    "cifar_cnn": {"data": "fashion_mnist", "batch_size": 64, "channels_last": True},
    "resnet9": {"data": "fashion_mnist_sample", "batch_size": 64, "precision": "bf16-mixed", "channels_last": True},
}
GPU_CASES: dict[str, dict[str, Any]] = {
    net: {"data": "fashion_mnist", "batch_size": 512, "precision": "bf16-mixed", "channels_last": net == "resnet9"}
    for net in CASES
}


class Clock(L.Callback):
    """Seconds from the start of the first epoch until everything that follows the last one is done.

    Args:
        profiler: What is to run in that time.
    """

    def __init__(self, profiler: profile | None = None) -> None:
        self.profiler, self.seconds = profiler, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start."""
        _wait_for_gpu()
        if self.profiler is not None:
            self.profiler.start()
        self._began = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop; this callback is the last in the list, so the checkpoints are saved."""
        _wait_for_gpu()
        self.seconds = time.perf_counter() - self._began
        if self.profiler is not None:
            self.profiler.stop()


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Competition:
    """The four ways to train one network, each a method that returns seconds.

    Args:
        net: Name of the network.
        case: Data set, batch size, and how the project and the loop by hand compute.
        accelerator: "cpu" or "gpu".
        folder: For everything that is written.
    """

    def __init__(self, net: str, case: dict[str, Any], accelerator: str, folder: Path) -> None:
        self.net, self.case, self.accelerator, self.folder = net, case, accelerator, folder
        self.device = torch.device("cuda" if accelerator == "gpu" else "cpu")
        self.bf16 = case.get("precision") == "bf16-mixed"
        self.epochs = 5 if accelerator == "gpu" else 1
        self.data: ImageDataModule = data_class(case["data"])(batch_size=case["batch_size"], augment="none", seed=0)
        self.accuracy: dict[str, list[float]] = {}
        self.runs = 0

    def new_net(self) -> nn.Module:
        """The network with new weights."""
        channels, height, width = self.data.image_shape
        return build_net(self.net, channels, 10, (height, width))

    # --- the project ------------------------------------------------------------------------------------------------

    def project(self, profiler: profile | None = None) -> float:
        """Seconds an epoch of this project's Trainer, with everything that is on by default."""
        self.runs += 1
        clock = Clock(profiler)

        class TimedCLI(LitCLI):
            def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
                trainer = super().instantiate_trainer(**kwargs)
                trainer.callbacks.append(clock)  # type: ignore[attr-defined]
                return trainer

        options = {
            "net": self.net, **self.case, "augment": "none", "optimizer": "adam", "schedule": "constant", "lr": LR,
            "weight_decay": 0, "max_epochs": self.epochs, "accelerator": self.accelerator, "devices": 1,
            "seed": self.runs, "run_dir": self.folder / f"{self.net}-{self.runs}",
        }  # fmt: skip
        if self.accelerator == "gpu":
            options["data.on_device"] = True
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        cli = TimedCLI("fit", words)
        with running(cli):
            cli.trainer.fit(cli.model, cli.datamodule)
        self._note("project", cli.trainer.callback_metrics["val_acc"].item())
        return clock.seconds / self.epochs

    # --- by hand ----------------------------------------------------------------------------------------------------

    def by_hand(self) -> float:
        """Seconds an epoch of a loop that one would write oneself, over the same batches."""
        device = self.device
        net = self.new_net().to(device)
        if self.case.get("channels_last"):
            net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        mean, std = torch.tensor(self.data.mean, device=device), torch.tensor(self.data.std, device=device)
        train, val = (self._batches(part) for part in ("train", "val"))
        optimizer = torch.optim.Adam(net.parameters(), lr=LR, fused=True)
        size = getattr(net, "image_size", None)

        def forward(images: Tensor) -> Tensor:
            x = images.float() / 255
            if size and size != x.shape[-2:]:
                x = enlarge(x, size)
            return net((x - mean) / std)

        _wait_for_gpu()
        began = time.perf_counter()
        for epoch in range(self.epochs):
            train.set_epoch(epoch)
            net.train()
            for images, labels in train:
                with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                    loss = F.cross_entropy(forward(images), labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            net.eval()
            right = torch.zeros((), device=device)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                for images, labels in val:
                    right += (forward(images).argmax(1) == labels).sum()
            accuracy = right.item() / len(val.indices)
        seconds = (time.perf_counter() - began) / self.epochs
        self._note("by hand", accuracy)
        return seconds

    def _batches(self, part: Any) -> BatchLoader:
        images, labels, indices = self.data.split(part)
        size, training = self.case["batch_size"], part == "train"
        images, labels = images.to(self.device), labels.to(self.device)
        return BatchLoader(images, labels, indices, size if training else 4 * size, shuffle=training, seed=self.runs)

    # --- as the tutorials do it, and as Lightning comes -------------------------------------------------------------

    def _torchvision(self, workers: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """The same images through torchvision: loaders of training and validation."""
        from torchvision import datasets, transforms

        root = self.folder / "torchvision"
        raw = root / "FashionMNIST" / "raw"
        if not raw.exists():
            raw.mkdir(parents=True)
            data = FashionMNIST()
            data.prepare_data()
            folder = data.folder()
            assert folder is not None
            for name in NAMES:
                source = file(folder, name)
                content = source.read_bytes()
                (raw / name).write_bytes(gzip.decompress(content) if source.suffix == ".gz" else content)
        size = getattr(self.new_net(), "image_size", None) or (28, 28)
        transform = transforms.Compose([transforms.Pad((size[0] - 28) // 2), transforms.ToTensor()])
        published = datasets.FashionMNIST(root, transform=transform)
        parts = [self.data.split(part)[2].tolist() for part in ("train", "val")]
        train, val = (Subset(published, rows) for rows in parts)
        options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
        batch = self.case["batch_size"]
        return DataLoader(train, batch, shuffle=True, **options), DataLoader(val, batch, **options)

    def tutorial(self) -> Callable[[], float]:
        """An epoch of the loop of the tutorial "Quickstart"."""
        train, val = self._torchvision(workers=0)

        def epoch() -> float:
            model, loss_fn = self.new_net(), nn.CrossEntropyLoss()
            optimizer = torch.optim.Adam(model.parameters(), lr=LR)
            began = time.perf_counter()
            model.train()
            for batch, (x, y) in enumerate(train):
                loss = loss_fn(model(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if batch % 100 == 0:
                    print(f"loss: {loss.item():>7f}  [{(batch + 1) * len(x):>5d}]")
            model.eval()
            test_loss, correct = 0.0, 0.0
            with torch.no_grad():
                for x, y in val:
                    pred = model(x)
                    test_loss += loss_fn(pred, y).item()
                    correct += (pred.argmax(1) == y).type(torch.float).sum().item()
            seconds = time.perf_counter() - began
            self._note("tutorial", correct / len(val.dataset))  # type: ignore[arg-type]
            return seconds

        return epoch

    def stock(self) -> Callable[[], float]:
        """An epoch of Lightning as its own tutorials use it."""
        train, val = self._torchvision(workers=2)

        def epoch() -> float:
            clock = Clock()
            os.environ[NVML_CHECK] = "1"  # as Lightning leaves it
            trainer = L.Trainer(
                max_epochs=1, accelerator="cpu", devices=1, default_root_dir=self.folder / "stock", callbacks=[clock]
            )
            trainer.fit(Stock(self.new_net()), train, val)
            os.environ[NVML_CHECK] = "0"
            self._note("stock", trainer.callback_metrics["val_acc"].item())
            return clock.seconds

        return epoch

    # --- measuring --------------------------------------------------------------------------------------------------

    def jobs(self, how: Sequence[str]) -> dict[str, Callable[[], object]]:
        """What takes turns: those of the given names, the project first."""
        jobs: dict[str, Callable[[], object]] = {"project": self.project}
        if "by_hand" in how:
            jobs["by hand"] = self.by_hand
        if "tutorial" in how:
            jobs["tutorial"] = self.tutorial()
        if "stock" in how:
            jobs["stock"] = self.stock()
        return jobs

    def _note(self, name: str, accuracy: float) -> None:
        self.accuracy.setdefault(name, []).append(accuracy)


class Stock(L.LightningModule):
    """A LightningModule as one writes it after the documentation."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.train_acc, self.val_acc = MulticlassAccuracy(10, average="micro"), MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss and logged accuracy of a batch."""
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.train_acc(logits, y)
        self.log("train_loss", loss, prog_bar=True)
        self.log("train_acc", self.train_acc, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        x, y = batch
        logits = self.net(x)
        self.val_acc(logits, y)
        self.log("val_loss", F.cross_entropy(logits, y), prog_bar=True)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, as in the tutorials."""
        return torch.optim.Adam(self.parameters(), lr=LR)


def idle_share(competition: Competition) -> float:
    """Share of the project's training in which the GPU computes nothing."""
    profiler = profile(activities=[ProfilerActivity.CUDA])
    seconds = competition.project(profiler) * competition.epochs
    busy = sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6
    return 1 - busy / seconds


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--how", nargs="+", default=HOW, choices=HOW, help="what the project is compared with")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"])
    options = parser.parse_args()
    how = options.how if options.accelerator == "cpu" else ["by_hand"]
    os.environ[NVML_CHECK] = "0"  # a loop by hand does not import Lightning
    rows = []
    for net in options.net:
        case = (CASES if options.accelerator == "cpu" else GPU_CASES)[net]
        with tempfile.TemporaryDirectory() as folder:
            competition = Competition(net, case, options.accelerator, Path(folder))
            # The bars are drawn, but where nobody looks: a terminal's speed is not what is measured.
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                seconds = take_turns(competition.jobs(how), options.rounds)
                idle = idle_share(competition) if options.accelerator == "gpu" else None
        images = len(competition.data.split("train")[2])
        for name, values in seconds.items():
            median = statistics.median(values)
            accuracy = statistics.mean(competition.accuracy[name][1:])
            ratio = median_ratio(values, seconds["project"])
            inverse = f" ({median_ratio(seconds['project'], values):.3f})" if name == "by hand" else ""
            share = f", GPU idle {idle:.0%}" if name == "project" and idle is not None else ""
            rows.append(
                [
                    net, case["batch_size"], name + share, f"{median:.2f} s ({min(values):.2f} to {max(values):.2f})",
                    f"{images / median:,.0f}", f"{ratio:.2f}{inverse}", f"{accuracy:.1%}",
                ]
            )  # fmt: skip
            print(f"{net}: {name} {median:.2f} s, {ratio:.2f}", file=sys.stderr)
    header = ("network", "batch", "how", "epoch, median (least to most)", "images/s", "times the project's", "val_acc")
    print("## An epoch of training and validation" + ("" if how == HOW else f", against {' and '.join(how)}") + "\n")
    words = " ".join(["python benchmarks/train_speed.py", *sys.argv[1:]])
    print(f"`{words}`, n = {options.rounds}, alternating; {machine()}.")
    print("Ratios are medians over the rounds; in brackets: project / by hand. val_acc is the mean in the end.\n")
    print(table(header, rows))


if __name__ == "__main__":
    main()
