"""What happens around the Trainer's fit, test and predict: the run folder, the result, and errors in one message."""

import contextlib
import csv
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from data_modules.files import atomic_path
from data_modules.images.parts import among
from lit_nn.checkpoint import init_from, read_checkpoint
from lit_nn.classifier import LitClassifier
from lit_nn.engine import distributed
from lit_nn.engine.cli import DESCRIPTION, LitCLI
from lit_nn.engine.configuration import flat, write_yaml
from lit_nn.engine.lean_loop import LeanEpochLoop
from lit_nn.engine.previous_run import NothingToDo, PreviousRun
from lit_nn.errors import UsageError, brief
from lit_nn.nets import count_parameters

HINTS = {  # to errors of torch and Lightning that are only seen when steps are taken
    "Expected more than 1 value per channel": "give a larger --batch_size",
    "C++ compiler": "--compile needs one, g++ for instance",
    "C compiler": "--compile needs one, gcc for instance",
    "Compiler: cl is not found": "--compile needs one, that of Visual Studio",
    "does not have a deterministic implementation": "--trainer.deterministic warn goes on without",
    "does not allow for gradient clipping": "leave out --model.optimizer_args.fused, or --clip_grad",
    "MPS framework doesn't support float64": "give another --precision",
    "Early stopping conditioned on metric": "give one of these as its monitor",
}
PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process has exited")


class TrainingError(Exception):
    """A training cannot go on; the message says where and why."""

    exit_status = 1


@contextlib.contextmanager
def running(cli: LitCLI) -> Iterator[None]:
    """Prepare a stage, hold the run folder meanwhile, and say shortly what goes wrong that a user can mend."""
    trainer, lock = cli.trainer, None
    try:
        if cli.stage == "fit":
            if cli.run_dir is not None and trainer.is_global_zero:
                lock = _hold(cli.run_dir)
            _prepare_training(cli)
        elif changes := cli.datamodule.part_changes():
            rank_zero_only(print)(changes)
        yield
    except FloatingPointError as error:
        if cli.stage != "fit":
            raise TrainingError(str(error)) from error
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        saved = cli.checkpoints is not None and cli.checkpoints.last.exists()
        good = f"{cli.checkpoints.last} is from before." if cli.checkpoints and saved else "Nothing had been saved."
        raise TrainingError(
            f"{error} (step {trainer.global_step}, learning rate {lr:.3g}). {good} Try a lower --lr, or --clip_grad 1"
        ) from error
    except MisconfigurationException as error:  # some options are only found not to fit together now
        raise UsageError(brief(error)) from error
    except (RuntimeError, ValueError, TypeError) as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "MPS backend out of memory" in text:
            raise TrainingError(
                f"the memory of {trainer.strategy.root_device} is full with batches of {cli.datamodule.batch_size} "
                "images; give a smaller --batch_size, which --trainer.accumulate_grad_batches makes up for"
            ) from error
        for part, hint in HINTS.items():
            if part in text:
                raise UsageError(f"{re.split(', but| because', brief(error))[0]}; {hint}") from error
        is_gone = isinstance(error, torch.distributed.DistError) or any(word in text for word in PEER_IS_GONE)
        if trainer.world_size > 1 and is_gone:
            how = f" {distributed.to_continue(cli.run_dir)}" if cli.run_dir else ""
            raise TrainingError(f"another process of this run has died (killed? out of memory?).{how}") from error
        raise
    finally:
        if lock is not None:
            lock.release()


def _hold(folder: Path) -> FileLock | None:
    """Keep other processes from training in the same folder, as long as this one lives."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UsageError(
            f"{folder} is being trained by another process; wait for it, or give another --run_dir"
        ) from error
    except NotImplementedError:  # a file system without locks
        return None
    return lock


def _prepare_training(cli: LitCLI) -> None:
    """Say what will be trained and what is different in a continued run, write down the configuration."""
    trainer, model, data, config = cli.trainer, cli.model, cli.datamodule, cli.config
    trainer.fit_loop.epoch_loop = LeanEpochLoop(trainer)
    if cli.previous is not None and cli.previous.path is not None:
        _continue(cli, cli.previous)
    elif config.init_from:
        config.init_from = os.path.expanduser(config.init_from)  # noqa: PTH111 (from YAML)
        rank_zero_only(print)(init_from(model.net, config.init_from))
    if config.compile:
        model.net.compile()  # in place: the names of its weights stay, and a checkpoint does not know of it
    if not trainer.is_global_zero:
        return
    data.prepare_data()  # the other processes wait for this one
    parts = [f"{len(data.split(part)[2]):,} {part}" for part in ("train", "val", "test")]
    print(
        f"{model.net_name} ({count_parameters(model.net):,} parameters) on "
        f"{cli.data_name} ({', '.join(parts)} images, {len(data.class_names)} classes)"
    )
    if changes := data.part_changes():
        print(changes)
    if config.init_from and cli.previous is None and (tested := data.parts().get("test")) is not None:
        had = read_checkpoint(config.init_from).get("parts", {})
        seen = [had[part].numpy() for part in ("train", "val") if part in had]
        if seen and (count := among(tested.numpy(), np.concatenate(seen)).sum()):
            print(
                f"warning: {config.init_from} was trained on {count} of the images that are to be tested, or on their "
                "groups, so the test will look better than it is; give --seed and --data.test_fraction of that run, or "
                "lay out a test part"
            )
    if cli.run_dir is not None:
        if cli.previous is not None:
            cli.previous.copy_to(cli.run_dir)
        write_yaml(cli.plain_config(), cli.run_dir / "config.yaml")


def _continue(cli: LitCLI, previous: PreviousRun) -> None:
    previous.check(cli.model, cli.trainer)
    rank_zero_only(print)(previous.describe(dict(flat(cli.plain_config()))))
    if reason := previous.is_complete(cli.trainer):
        epochs, result = previous.checkpoint["epoch"], (cli.run_dir or Path()) / "result.json"
        if not cli.tests or (result.exists() and json.loads(result.read_text(encoding="utf-8"))["epochs"] >= epochs):
            raise NothingToDo(f"Nothing left to do: the run ended after {reason}.")
        cli.trainer.fit_loop.max_epochs = epochs  # only what comes after the training is missing


def test_best(cli: LitCLI) -> None:
    """Test the best checkpoint, write result.json, say what came out and what to type next."""
    trainer, model, run_dir, checkpoints = cli.trainer, cli.model, cli.run_dir, cli.checkpoints
    epochs, seconds = trainer.current_epoch, checkpoints.seconds if checkpoints else 0.0
    validated: dict[str, Any] = dict(trainer.callback_metrics)
    if isinstance(trainer.strategy, FSDPStrategy):
        model = LitClassifier(**model.hparams)  # it has taken the trained one apart
    if checkpoints:
        run_dir = checkpoints.folder.parent  # the first process's
        best = checkpoints.folder / "best.ckpt"
        if not best.exists():
            text = f"No validation has chosen a best.ckpt to test; {checkpoints.last} has the weights."
            rank_zero_only(print)(text)
            return
        found = read_checkpoint(best)
        model.load_state_dict(found["state_dict"])
        validated = found["metrics"]
    trainer.test(model, datamodule=cli.datamodule, verbose=False)
    if not trainer.is_global_zero:
        return
    if run_dir is None:
        print("fast_dev_run: one batch of training, validation and test went through.")
        return
    scores = {name: round(value.item(), 7) for name, value in trainer.callback_metrics.items()}  # float32
    result: dict[str, Any] = {
        **{name: value for name, value in scores.items() if name.startswith("test_")},
        "val_acc": 0.0,  # without any validation
        **{name: round(float(value), 7) for name, value in validated.items() if name.startswith("val_")},
        "epochs": epochs,
        "seconds": round(seconds, 2),
        "net": model.net_name,
        "data": cli.data_name,
        "num_params": count_parameters(model.net),
        "seed": cli.datamodule.seed,
        **cli.state.origin,
    }
    with atomic_path(run_dir / "result.json") as path:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if isinstance(trainer.logger, TensorBoardLogger):
        _show_in_tensorboard(cli, trainer.logger, model, result)
    print(
        f"\nTest accuracy {result['test_acc']:.2%} (loss {result['test_loss']:.4f}), "
        f"validation {result['val_acc']:.2%}; {epochs} epochs in {seconds:.1f} s "
        f"on {trainer.strategy.root_device.type}.\nRun folder: {run_dir}"
    )
    if checkpoints:
        best_file = shlex.quote(str(best))
        print(
            f"Next:\n  tensorboard --logdir {shlex.quote(str(run_dir.parent))}\n"
            f"  python scripts/evaluate.py {best_file}\n  python scripts/export.py {best_file}\n"
            f"  python scripts/predict.py {best_file} IMAGE..."
        )


def _show_in_tensorboard(cli: LitCLI, logger: TensorBoardLogger, model: LitClassifier, result: dict[str, Any]) -> None:
    """Show the run's place in the table of runs, the confusion matrix and the mistakes on the test images."""
    # matplotlib: only when something is drawn
    from lit_nn.trained.evaluate import answer_test_images, confusion_figure, mistakes_figure
    from lit_nn.trained.predict import classifier_model

    data, trainer = cli.datamodule, cli.trainer
    options = {name: value for name, value in model.hparams.items() if name not in DESCRIPTION}
    options |= {"data": cli.data_name, "batch_size": data.batch_size, "seed": data.seed}
    options |= {"max_epochs": trainer.max_epochs, "precision": str(trainer.precision)}
    logger.log_hyperparams(options, {f"final/{name}": result[name] for name in ("test_acc", "test_loss", "val_acc")})
    answers = answer_test_images(classifier_model(model.to(trainer.strategy.root_device)), data)
    title = f"{model.net_name} on the test images of {type(data).__name__}"
    logger.experiment.add_figure("test/confusion", confusion_figure(answers, title))
    logger.experiment.add_figure("test/mistakes", mistakes_figure(answers, title))
    logger.finalize("success")


def predict(cli: LitCLI) -> None:
    """Predict the test images; predictions.csv in --run_dir (default: here) gets a row for each."""
    trainer, names = cli.trainer, cli.model.class_names
    answers: list[Any] = trainer.predict(cli.model, cli.datamodule) or []
    own = torch.cat([torch.zeros(0, len(names)), *(answer.cpu() for answer in answers)])
    parts = [own] * trainer.world_size  # each of every world_size-th image, from the rank on
    if len(parts) > 1:
        torch.distributed.all_gather_object(parts, own)
    if not trainer.is_global_zero:
        return
    probabilities = torch.empty(sum(map(len, parts)), own.shape[1])  # (N, num_classes)
    for number, part in enumerate(parts):
        probabilities[number :: len(parts)] = part
    path = Path(os.path.expanduser(cli.config.run_dir or "."), "predictions.csv")  # noqa: PTH111
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "probability"])
        for row, shares in enumerate(probabilities):
            writer.writerow([row, names[int(shares.argmax())], f"{shares.max():.6f}"])
    print(f"{len(probabilities)} predictions: {path}")
