"""The lean loop: the very steps of Lightning's own, and Lightning's own where a step is not a plain one."""

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_nn.classifier import LitClassifier
from lit_nn.cli import LitCLI
from lit_nn.loop import NOT_CALLED, LeanEpochLoop

WORDS = ["fit", "--net", "mlp", "--model.net_args.hidden", "16", "--accelerator", "cpu", "--max_epochs", "2"]
ON_GPU = ["--accelerator", "gpu", "--devices", "1", "--data.on_device", "true", "--precision", "bf16-mixed"]


def train(run_dir: Path, *words: str) -> LitCLI:
    return LitCLI([*WORDS, "--run_dir", str(run_dir), *words])


def lightning_loop(trainer: L.Trainer) -> _TrainingEpochLoop:
    return trainer.fit_loop.epoch_loop


def assert_equal(one: Any, other: Any, place: str = "") -> None:
    """Every tensor and value, wherever it stands, but for the times."""
    assert type(one) is type(other), place
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one.keys() - {"seconds"}:
            assert_equal(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{place}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    else:
        assert one == other, place


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--optimizer", "nesterov", "--schedule", "plateau", "--lr", "0.1"],
        ["--optimizer", "manual_sgd", "--schedule", "constant"],
        ["--ema", "0.9", "--augment", "translate,mixup", "--label_smoothing", "0.1"],
        ["--precision", "bf16-mixed", "--early_stopping", "1", "--trainer.val_check_interval", "10"],
        ["--trainer.max_steps", "30", "--save_every_steps", "7", "--trainer.log_every_n_steps", "3"],
        pytest.param([*ON_GPU, "--trainer.deterministic", "true"], marks=pytest.mark.gpu),
    ],
    ids=" ".join,
)
def test_it_takes_the_steps_of_lightning(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*words, "--trainer.limit_train_batches", "20"]
    with monkeypatch.context() as patch:
        patch.setattr("lit_nn.cli.LeanEpochLoop", lightning_loop)
        train(tmp_path / "lightning", *words)
    with monkeypatch.context() as patch:
        patch.setattr(_AutomaticOptimization, "run", None)  # Lightning's step would fail
        train(tmp_path / "lean", *words)
    for name in ("last.ckpt", "best.ckpt"):
        checkpoints = [
            torch.load(tmp_path / loop / "checkpoints" / name, weights_only=True) for loop in ("lightning", "lean")
        ]
        assert checkpoints[0]["global_step"] == checkpoints[1]["global_step"] > 0
        assert_equal(*checkpoints)
    tables = [(tmp_path / loop / "metrics.csv").read_text() for loop in ("lightning", "lean")]
    assert tables[0] == tables[1]


@pytest.mark.parametrize(("interval", "asked"), [("1.0", 2), ("0.5", 40)])
def test_only_a_step_that_something_may_follow_asks_what_does(
    interval: str, asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def on_advance_end(self: _TrainingEpochLoop, data_fetcher: Any) -> None:
        calls.append(self.batch_idx)
        original(self, data_fetcher)

    original = _TrainingEpochLoop.on_advance_end
    monkeypatch.setattr(_TrainingEpochLoop, "on_advance_end", on_advance_end)
    train(tmp_path, "--trainer.limit_train_batches", "20", "--trainer.val_check_interval", interval)
    assert len(calls) == asked
    assert calls[-1] == 19


class Hooked(L.Callback):
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.calls = getattr(self, "calls", 0) + 1


@pytest.mark.parametrize(
    "words",
    [
        ["--clip_grad", "1"],
        ["--trainer.accumulate_grad_batches", "2"],
        ["--trainer.profiler", "simple"],
        pytest.param(["--accelerator", "gpu", "--precision", "16-mixed"], marks=pytest.mark.gpu),  # scales gradients
    ],
    ids=" ".join,
)
def test_lightning_takes_the_steps_that_are_not_plain(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    run = _AutomaticOptimization.run

    def counted(self: _AutomaticOptimization, optimizer: Any, batch_idx: int, kwargs: Any) -> Any:
        calls.append(batch_idx)
        return run(self, optimizer, batch_idx, kwargs)

    monkeypatch.setattr(_AutomaticOptimization, "run", counted)
    train(tmp_path, *words, "--trainer.limit_train_batches", "4")
    assert calls == [0, 1, 2, 3] * 2


def test_a_hook_in_the_middle_of_a_step_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hooked = Hooked()

    class WithHook(LitCLI):
        def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
            trainer = super().instantiate_trainer(**kwargs)
            trainer.callbacks.append(hooked)  # type: ignore[attr-defined]
            return trainer

    WithHook([*WORDS, "--run_dir", str(tmp_path), "--trainer.limit_train_batches", "4"])
    assert hooked.calls == 8


def test_what_is_logged_at_every_step_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = LitClassifier.training_step
    losses: list[float] = []

    def training_step(self: LitClassifier, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = step(self, batch, batch_idx)
        losses.append(loss.item())
        self.log("mine", loss, on_step=True, on_epoch=True, batch_size=len(batch[1]))
        return loss

    monkeypatch.setattr(LitClassifier, "training_step", training_step)
    cli = train(tmp_path, "--max_epochs", "1", "--trainer.limit_train_batches", "5")
    assert cli.trainer.callback_metrics["mine_step"].item() == pytest.approx(losses[-1])
    assert cli.trainer.callback_metrics["mine_epoch"].item() == pytest.approx(sum(losses) / 5)


@pytest.mark.parametrize("interval", [2, 3, 4])
def test_loggers_get_what_lightning_gives_them(interval: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = LitClassifier.training_step

    def training_step(self: LitClassifier, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = step(self, batch, batch_idx)
        if batch_idx % interval == 1:  # mostly at other steps than those at which loggers get anything
            self.log("mine", loss)
        return loss

    monkeypatch.setattr(LitClassifier, "training_step", training_step)
    words = ["--trainer.limit_train_batches", "11", "--trainer.log_every_n_steps", "4"]
    found = []
    for loop in (lightning_loop, LeanEpochLoop):
        with monkeypatch.context() as patch:
            patch.setattr("lit_nn.cli.LeanEpochLoop", loop)
            train(tmp_path / loop.__name__, *words)
        events = EventAccumulator(str(tmp_path / loop.__name__)).Reload()
        found.append({tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]})
    assert found[0] == found[1]
    assert {"mine", "train_loss_step", "lr"} <= found[0].keys()
    assert len(found[0]["mine"]) >= 4


def test_a_schedule_may_move_at_every_other_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure = LitClassifier.configure_optimizers

    def configure_optimizers(self: LitClassifier) -> Any:
        found: Any = configure(self)
        found["lr_scheduler"]["frequency"] = 2
        return found

    monkeypatch.setattr(LitClassifier, "configure_optimizers", configure_optimizers)
    cli = train(tmp_path, "--max_epochs", "1", "--trainer.limit_train_batches", "6")
    assert cli.trainer.lr_scheduler_configs[0].scheduler.last_epoch == 3


def test_a_training_step_that_gives_no_tensor_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LitClassifier, "training_step", lambda *_: {"loss": torch.zeros(())})
    with pytest.raises(TypeError, match="training_step gave a dict"):
        train(tmp_path)


def test_every_hook_of_a_step_is_known() -> None:
    """A Lightning with a further hook would make the list incomplete."""
    of_a_step = re.compile(
        r"on_train_batch_\w+|on_(before|after)_\w+|optimizer_\w+|backward|lr_scheduler_\w+|\w+_clipping"
    )
    found = {name for owner in (L.LightningModule, L.Callback) for name in dir(owner) if of_a_step.fullmatch(name)}
    assert found == {*NOT_CALLED, "on_train_batch_end", "on_after_batch_transfer"}
    hooks_of_data = {
        name for name in dir(L.LightningDataModule) if name.endswith("batch_transfer") or "batch_to" in name
    }
    assert hooks_of_data == {"on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"}
