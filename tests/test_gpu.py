"""What only a GPU shows: nothing waits for it, its numbers are those of the CPU, its checkpoints travel."""

import inspect
import shlex
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import ROOT, Command
from resume_runs import differences, finished, load, rows, stopped_and_continued

from data_modules import FashionMNISTSample
from data_modules.augment import AUGMENTATIONS
from lit_nn import LitClassifier, load_classifier
from lit_nn.cli import LitCLI
from lit_nn.commands import train
from lit_nn.export import main as export
from lit_nn.nets import NETS

pytestmark = pytest.mark.gpu

GPU = ["--accelerator", "gpu", "--devices", "1", "--trainer.enable_progress_bar", "false"]
ALL_AUGMENTATIONS = ["--augment", ",".join(AUGMENTATIONS)]
SMALL_RESNET = ["--net", "resnet9", "--model.net_args.width", "8"]
INEXACT: set[str] = set()
INEXACT |= {"conv3d_cnn"}  # the gradient of AvgPool3d has no deterministic kernel  # tutorial


def only(gigabytes: float) -> None:
    """Let this process have no more of the GPU's memory than so much."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / torch.cuda.get_device_properties(0).total_memory)


class NoWaiting(L.Callback):
    """Makes every operation of the steps 3 to 40 that waits for the GPU an error."""

    guarded = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        guard = 2 <= trainer.global_step < 40
        self.guarded += guard
        torch.cuda.set_sync_debug_mode("error" if guard else "default")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--data.on_device", "true"],
        ["--data.on_device", "true", "--data.sampling", "balanced", *ALL_AUGMENTATIONS],
        [*SMALL_RESNET, "--precision", "bf16-mixed", "--channels_last", *ALL_AUGMENTATIONS],
        ["--optimizer", "nesterov", "--class_weights", "balanced"],
        ["--label_smoothing", "0.1", "--ema", "0.99"],
        ["--compile"],
    ],
    ids=" ".join,
)
def test_between_logging_no_step_waits_for_the_gpu(words: list[str], tmp_path: Path) -> None:
    callback = NoWaiting()

    class Guarded(LitCLI):
        def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
            trainer = super().instantiate_trainer(**kwargs)
            trainer.callbacks.append(callback)  # type: ignore[attr-defined]
            return trainer

    Guarded(["fit", *GPU, "--batch_size", "32", "--max_epochs", "1", "--run_dir", str(tmp_path / "run"), *words])
    assert callback.guarded == 38
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device="cuda").item()


@pytest.mark.parametrize("net", NETS)
def test_it_trains_like_the_cpu(net: str, tmp_path: Path) -> None:
    words = ["--net", net, "--precision", "64-true", "--augment", "flip_alternating,flip,translate"]
    words += ["--batch_size", "32", "--max_epochs", "2", "--trainer.limit_train_batches", "10"]
    if "dropout" in inspect.signature(NETS[net]).parameters:  # which draws on the device
        words += ["--model.net_args.dropout", "0"]
    for accelerator in ("cpu", "gpu"):
        assert train([*GPU, *words, "--accelerator", accelerator, "--run_dir", str(tmp_path / accelerator)]) == 0
    assert_same_numbers(tmp_path / "cpu", tmp_path / "gpu")


def assert_same_numbers(one: Path, other: Path) -> None:
    """Two runs, up to the order in which numbers were added."""
    for first, second in zip(rows(one), rows(other), strict=True):
        for name, value in first.items():
            assert float(second[name]) == pytest.approx(float(value), rel=1e-5), name


@pytest.mark.parametrize("optimizer", ["adamw", "nesterov", "rmsprop"])
def test_a_run_moves_from_gpu_to_cpu_and_back(optimizer: str, tmp_path: Path) -> None:
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    words = [*GPU, "--precision", "64-true", "--optimizer", optimizer, "--schedule", "constant", "--lr", "0.001"]
    words += ["--trainer.limit_train_batches", "5"]
    assert train([*words, "--accelerator", "cpu", "--max_epochs", "3", "--run_dir", str(straight)]) == 0
    assert train([*words, "--max_epochs", "1", "--run_dir", str(moved)]) == 0
    for epochs, accelerator in [(2, "cpu"), (3, "gpu")]:
        assert train(["--resume", str(moved), "--max_epochs", str(epochs), "--accelerator", accelerator]) == 0
    assert_same_numbers(straight, moved)


def test_what_a_gpu_trained_serves_anywhere(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = ["--precision", "bf16-mixed", "--channels_last", "--compile", "--data.on_device", "true"]
    assert train([*GPU, *SMALL_RESNET, *words, "--max_epochs", "1", "--run_dir", str(run_dir)]) == 0
    path = run_dir / "checkpoints" / "best.ckpt"
    classifier = load_classifier(path)
    assert classifier.state_dict().keys() == LitClassifier(**classifier.hparams).state_dict().keys()
    images = FashionMNISTSample().split("test")[0][:64]
    with torch.no_grad():
        on_cpu = classifier(images)
        on_gpu = classifier.cuda()(images.cuda())
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=2e-2, atol=2e-2)  # TF32 has ten bits
    assert classifier.predict(list(images[:3, 0].numpy()))[0].label in classifier.hparams["class_names"]
    assert export([str(path)]) == 0
    again = LitClassifier.load_from_checkpoint(path)
    assert again.device.type == "cuda"  # where it was saved


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("net", [net for net in NETS if net not in INEXACT])
def test_a_stopped_run_goes_on_to_the_last_bit(net: str, precision: str, tmp_path: Path) -> None:
    words = [*GPU, "--net", net, "--precision", precision, "--trainer.deterministic", "true", *ALL_AUGMENTATIONS]
    one = finished(words, tmp_path / "straight")
    other = stopped_and_continued(words, tmp_path / "stopped", [1, 4, 6])
    assert differences(one, other) == []


def test_full_memory_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only(0.5)
    words = [*GPU, "--net", "resnet9", "--batch_size", "2000"]
    assert train([*words, "--run_dir", str(tmp_path / "full")]) == 1
    assert "with batches of 2000 images; give a smaller --batch_size" in capsys.readouterr().err
    assert train([*words, "--tune", "batch_size", "--max_epochs", "1", "--run_dir", str(tmp_path / "tuned")]) == 0
    found = int(capsys.readouterr().out.partition("--tune batch_size: ")[2].split()[0])
    assert found in (64, 128, 256, 512)


def test_data_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only(0.001)
    assert train([*GPU, "--data.on_device", "true", "--net", "mlp", "--run_dir", str(tmp_path / "run")]) == 1
    assert "leave out --data.on_device" in capsys.readouterr().err


def test_gradients_are_scaled_and_clipped_and_then_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    words = ["--precision", "16-mixed", "--clip_grad", "0.1", "--schedule", "constant", "--lr", "0.001"]
    fused = ["--model.optimizer_args.fused", "true", "--run_dir", str(tmp_path / "fused")]
    assert train([*GPU, *words, *fused]) == 2
    assert "leave out --model.optimizer_args.fused" in capsys.readouterr().err
    assert train([*GPU, *words, "--max_epochs", "1", "--run_dir", str(run_dir)]) == 0
    assert train(["--resume", str(run_dir), "--max_epochs", "2", "--precision", "bf16-mixed", "--clip_grad", "0"]) == 0
    assert train(["--resume", str(run_dir), "--max_epochs", "3", "--precision", "16-mixed", "--clip_grad", "0.1"]) == 0
    state = load(run_dir / "checkpoints" / "last.ckpt")
    steps = {int(weight["step"]) for weight in state["optimizer_states"][0]["state"].values()}
    assert len(steps) == 1
    assert state["global_step"] - 5 < steps.pop() <= state["global_step"]  # too large a scale costs a step or two
    losses = [float(row["train_loss"]) for row in rows(run_dir)]
    assert losses[0] > losses[1] > losses[2]


def readme_line() -> list[str]:
    """The README's command for a GPU."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    return shlex.split(next(line for line in lines if "--accelerator gpu" in line and "--compile" in line))[2:]


@pytest.mark.parametrize(
    "words",
    [
        readme_line(),
        ["--precision", "16-mixed", "--clip_grad", "1"],
        ["--trainer.deterministic", "true", "--net", "resnet9"],
        ["--strategy", "ddp"],
        ["--ema", "0.99", "--trainer.benchmark", "true"],
        ["--net", "torchvision/resnet18", "--trainer.limit_train_batches", "5"],
        ["--tune", "lr"],
        ["--fast_dev_run"],
    ],
    ids=" ".join,
)
def test_the_command_line_trains_on_a_gpu(words: list[str], command: Command) -> None:
    done = command("scripts/train.py", *GPU, "--max_epochs", "1", *words)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "set_float32_matmul_precision" not in done.stderr  # Lightning's advice
    assert "on cuda" in done.stdout or "--fast_dev_run" in words
