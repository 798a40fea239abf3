"""The lean loop: the very steps of Lightning's own, and Lightning's own where a step is not a plain one."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import Patch
from resume_runs import leaves, load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_nn.classifier import LitClassifier
from lit_nn.engine.cli import LitCLI
from lit_nn.engine.run import running

WORDS = ["--net", "mlp", "--model.net_args.hidden", "16", "--accelerator", "cpu", "--max_epochs", "2"]
ON_GPU = "--accelerator gpu --devices 1 --data.on_device true --trainer.deterministic true --precision"


def train(run_dir: Path, *words: str, lean: bool = True, callbacks: tuple[L.Callback, ...] = ()) -> LitCLI:
    cli = LitCLI("fit", [*WORDS, "--run_dir", str(run_dir), *words])
    lightnings = cli.trainer.fit_loop.epoch_loop
    cli.trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]
    with running(cli):
        if not lean:
            cli.trainer.fit_loop.epoch_loop = lightnings
        cli.trainer.fit(cli.model, cli.datamodule)
    return cli


@pytest.mark.parametrize(
    ("words", "plain"),
    [
        ("--optimizer nesterov --schedule plateau --lr 0.1", True),
        ("--ema 0.9 --augment translate,mixup --label_smoothing 0.1", True),
        ("--precision bf16-mixed --early_stopping 1", True),
        ("--trainer.val_check_interval 10", False),
        ("--trainer.max_steps 30 --save_every_steps 7 --trainer.log_every_n_steps 3", True),
        ("--clip_grad 1", False),
        ("--trainer.accumulate_grad_batches 2", False),
        ("--trainer.profiler simple", False),
        pytest.param(f"{ON_GPU} bf16-mixed", True, marks=pytest.mark.gpu),
        pytest.param(f"{ON_GPU} 16-mixed", False, marks=pytest.mark.gpu),  # gradients are scaled
    ],
)
def test_it_takes_the_steps_of_lightning(words: str, plain: bool, tmp_path: Path, monkeypatch: Patch) -> None:
    def counted(self: L.LightningModule, epoch: int, batch_idx: int, *args: Any) -> None:
        steps.append(batch_idx)
        optimizer_step(self, epoch, batch_idx, *args)

    steps: list[int] = []
    optimizer_step = L.LightningModule.optimizer_step
    monkeypatch.setattr(L.LightningModule, "optimizer_step", counted)  # in a plain step nobody calls it
    for loop in ("lightning", "lean"):
        steps.clear()
        train(tmp_path / loop, *words.split(), "--trainer.limit_train_batches", "20", lean=loop == "lean")
        assert bool(steps) == (loop == "lightning" or not plain)
    for name in ("last.ckpt", "best.ckpt"):
        one, other = (load(tmp_path / loop / "checkpoints" / name) for loop in ("lightning", "lean"))
        assert one["global_step"] > 0
        assert dict(leaves(one)) == dict(leaves(other))
    tables = [(tmp_path / loop / "metrics.csv").read_text() for loop in ("lightning", "lean")]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("interval", [1, 3])
def test_loggers_get_what_lightning_gives_them(interval: int, tmp_path: Path, monkeypatch: Patch) -> None:
    def training_step(self: LitClassifier, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = step(self, batch, batch_idx)
        if batch_idx % interval == interval - 1:  # mostly at other steps than those at which loggers get anything
            self.log("mine", loss, on_step=True, on_epoch=True, batch_size=len(batch[1]))
        return loss

    step = LitClassifier.training_step
    monkeypatch.setattr(LitClassifier, "training_step", training_step)
    found = []
    for lean in (False, True):
        folder = tmp_path / str(lean)
        train(folder, "--trainer.limit_train_batches", "11", "--trainer.log_every_n_steps", "4", lean=lean)
        events = EventAccumulator(str(folder)).Reload()
        found.append({tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]})
    assert found[0] == found[1]
    assert {"mine_step", "mine_epoch", "train_loss_step", "lr"} <= found[0].keys()


class Listener(L.Callback):
    """Hooks into the end of a step; `Hooked` into its middle as well."""

    def __init__(self) -> None:
        self.outputs, self.backwards = list[Any](), 0

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.outputs.append(outputs)


class Hooked(Listener):
    def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.backwards += 1


@pytest.mark.parametrize("listener", [Listener(), Hooked()])
def test_a_step_gives_the_loss_or_a_dictionary_and_all_hooks_are_called(
    listener: Listener, tmp_path: Path, monkeypatch: Patch
) -> None:
    step = LitClassifier.training_step
    few = ("--trainer.limit_train_batches", "3", "--max_epochs", "1", "--trainer.logger", "false")
    plain = train(tmp_path / "plain", *few, callbacks=(listener,)).model
    monkeypatch.setattr(LitClassifier, "training_step", lambda *args: {"loss": step(*args), "more": 3})
    own = train(tmp_path / "own", *few, callbacks=(listener,)).model
    assert dict(leaves(dict(plain.state_dict()))) == dict(leaves(dict(own.state_dict())))
    losses = [output["loss"].item() for output in listener.outputs]
    assert losses[:3] == losses[3:]
    assert listener.outputs[-1]["more"] == 3
    assert listener.backwards == (6 if isinstance(listener, Hooked) else 0)
    for wrong in ("loss", {"los": torch.zeros(())}):
        monkeypatch.setattr(LitClassifier, "training_step", lambda *_, wrong=wrong: wrong)
        with pytest.raises(Exception, match="loss"):
            train(tmp_path / type(wrong).__name__, *few)
