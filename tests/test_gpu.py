"""What only a GPU shows: nothing waits for it, its numbers are those of the CPU, its checkpoints travel."""

import re
import shlex
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import ROOT, Command, Said, script
from resume_runs import assert_resumes_exactly, assert_same_numbers, load, rows

import lit_nn
from data_modules import FashionMNISTSample
from data_modules.augment import AUGMENTATIONS
from lit_nn.engine.cli import LitCLI
from lit_nn.engine.run import running
from lit_nn.nets import NETS

pytestmark = pytest.mark.gpu
train = script("train")

GPU = ["--accelerator", "gpu", "--devices", "1", "--trainer.enable_progress_bar", "false"]
ALL_AUGMENTATIONS = f"--augment {','.join(AUGMENTATIONS)}"
SMALL_RESNET = "--net resnet9 --model.net_args.width 8"
INEXACT = {"conv3d_cnn"}  # the gradient of AvgPool3d has no deterministic kernel


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
        "",
        f"--data.on_device true --data.sampling balanced {ALL_AUGMENTATIONS}",
        f"{SMALL_RESNET} --precision bf16-mixed --channels_last {ALL_AUGMENTATIONS}",
        "--optimizer nesterov --class_weights balanced --ema 0.99",
        "--compile",
        "--compile reduce-overhead",
    ],
)
def test_between_logging_no_step_waits_for_the_gpu(words: str, tmp_path: Path) -> None:
    callback = NoWaiting()
    few = ["--batch_size", "32", "--max_epochs", "1", "--run_dir", str(tmp_path / "run")]
    cli = LitCLI("fit", [*GPU, *few, *words.split()])
    cli.trainer.callbacks.append(callback)  # type: ignore[attr-defined]
    with running(cli):
        cli.trainer.fit(cli.model, cli.datamodule)
    assert callback.guarded == 38
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device="cuda").item()


@pytest.mark.parametrize("optimizer", ["adamw", "nesterov", "rmsprop"])
def test_a_run_moves_from_gpu_to_cpu_and_back(optimizer: str, tmp_path: Path) -> None:
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    words = [*GPU, "--precision", "64-true", "--optimizer", optimizer, "--schedule", "constant", "--lr", "0.001"]
    words += ["--trainer.limit_train_batches", "5"]
    assert train([*words, "--accelerator", "cpu", "--max_epochs", "3", "--run_dir", str(straight)]) == 0
    assert train([*words, "--max_epochs", "1", "--run_dir", str(moved)]) == 0
    for epochs, accelerator in [(2, "cpu"), (3, "gpu")]:
        assert train(["--resume", str(moved), "--max_epochs", str(epochs), "--accelerator", accelerator]) == 0
    assert_same_numbers(straight, moved, rel=1e-5)


def test_what_a_gpu_trained_serves_anywhere(tmp_path: Path) -> None:
    words = f"{SMALL_RESNET} --precision bf16-mixed --channels_last --compile --data.on_device true --max_epochs 1"
    assert train([*GPU, *words.split(), "--run_dir", str(tmp_path)]) == 0
    path = tmp_path / "checkpoints" / "best.ckpt"
    model = lit_nn.load_classifier(path)
    images = FashionMNISTSample().split("test")[0][:64]
    assert lit_nn.predict(model, list(images[:3, 0].numpy()))[0].label in model.class_names
    with torch.no_grad():
        on_cpu = model(images)
        on_gpu = model.cuda()(images.cuda())
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=2e-2, atol=2e-2)  # TF32 has ten bits
    assert script("export")([str(path)]) == 0
    assert lit_nn.LitClassifier.load_from_checkpoint(path).device.type == "cuda"  # where it was saved


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("net", [net for net in NETS if net not in INEXACT])
def test_a_stopped_run_goes_on_to_the_last_bit(net: str, precision: str, tmp_path: Path) -> None:
    words = [*GPU, "--net", net, "--precision", precision, "--trainer.deterministic", "true"]
    words += ALL_AUGMENTATIONS.split()
    assert_resumes_exactly(words, tmp_path, [1, 4, 6])


@pytest.mark.parametrize(
    ("gigabytes", "words", "named"),
    [
        (0.5, ["--net", "resnet9", "--batch_size", "2000"], "with batches of 2000 images; give a smaller --batch_size"),
        (0.001, ["--data.on_device", "true", "--net", "mlp"], "leave out --data.on_device"),
    ],
)
def test_full_memory_is_said(gigabytes: float, words: list[str], named: str, tmp_path: Path, capsys: Said) -> None:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / torch.cuda.get_device_properties(0).total_memory)
    assert train([*GPU, *words, "--run_dir", str(tmp_path / "run")]) == 1
    assert named in capsys.readouterr().err


def test_gradients_are_scaled_and_clipped_and_then_no_more(tmp_path: Path, capsys: Said) -> None:
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
    assert max(losses[1:]) < losses[0]


PAGE = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "words",
    [
        *re.findall(r"python scripts/train.py (.*--accelerator gpu.*--devices 1.*)", PAGE),
        "--precision 16-mixed --clip_grad 1",
        "--trainer.deterministic true --net resnet9",
        "--strategy ddp",
        "--ema 0.99 --trainer.benchmark true",
        "--net torchvision/resnet18 --trainer.limit_train_batches 5",
        "--fast_dev_run",
    ],
)
def test_the_command_line_trains_on_a_gpu(words: str, command: Command) -> None:
    done = command("scripts/train.py", *GPU, "--max_epochs", "1", *shlex.split(words, comments=True))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "set_float32_matmul_precision" not in done.stderr  # Lightning's advice
    assert "on cuda" in done.stdout or "--fast_dev_run" in words
