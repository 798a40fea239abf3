"""What happens around the Trainer's fit, test and predict: the run folder, the result, and errors in one message."""

import contextlib
import itertools
import json
import os
import re
import shlex
import sys
import time
import warnings
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

from data_modules.base import SPLITS, ImageDataModule, Split
from data_modules.files import atomic_path, write_csv
from data_modules.images.parts import among
from lit_nn.checkpoint import CheckpointError, read_checkpoint, save_checkpoint
from lit_nn.classifier import LitClassifier
from lit_nn.engine.callbacks import to_continue
from lit_nn.engine.cli import DESCRIPTION, LitCLI
from lit_nn.engine.configuration import flat, plain_options, write_yaml
from lit_nn.engine.lean_loop import LeanEpochLoop
from lit_nn.errors import Ended, ModelError, UsageError, brief
from lit_nn.nets import count_parameters
from lit_nn.trained.calibrate import best_thresholds, calibration_error, temperature, threshold
from lit_nn.trained.predict import classifier_model, open_model

HINTS = {  # to errors of torch and Lightning that are only seen when steps are taken
    "Expected more than 1 value per channel": "give a larger --batch_size",
    "C(\\+\\+)? compiler|Compiler: cl ": "--compile needs one for C++, g++ for instance",
    "does not have a deterministic implementation": "--trainer.deterministic warn goes on without",
    "does not allow for gradient clipping": "leave out --model.optimizer_args.fused, or --clip_grad",
    "MPS framework doesn't support float64": "give another --precision",
    "Early stopping conditioned on metric": "give one of these as its monitor",
}
PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process has exited")


@contextlib.contextmanager
def running(cli: LitCLI) -> Iterator[None]:
    """Prepare a stage, hold the run folder meanwhile, and say shortly what goes wrong that a user can mend."""
    trainer, holds = cli.trainer, cli.run_dir is not None and cli.trainer.is_global_zero
    try:
        with FileLock(f"{cli.run_dir}/.lock", timeout=0) if holds else contextlib.nullcontext():
            if cli.stage == "fit":
                _prepare_training(cli)
                if mode := cli.config.compile:
                    # In place: the names of its weights stay, no checkpoint knows of it.
                    cli.model.net.compile(mode=None if mode is True else mode)
            elif changes := cli.datamodule.part_changes():
                rank_zero_only(print)(changes)
            yield
    except Timeout as error:
        text = f"{cli.run_dir} is being trained by another process; wait for it, or give another --run_dir"
        raise UsageError(text) from error
    except FloatingPointError as error:
        if cli.stage != "fit":
            raise Ended(str(error)) from error
        where = f"step {trainer.global_step}, learning rate {trainer.optimizers[0].param_groups[-1]['lr']:.3g}"
        raise Ended(f"{error} ({where}). Try a lower --lr, or --clip_grad 1") from error
    except MisconfigurationException as error:  # some options are only found not to fit together now
        raise UsageError(brief(error)) from error
    except (RuntimeError, ValueError, TypeError) as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "MPS backend out of memory" in text:
            full = f"{trainer.strategy.root_device} is full with batches of {cli.datamodule.batch_size} images"
            hint = "give a smaller --batch_size, which --trainer.accumulate_grad_batches makes up for"
            raise Ended(f"the memory of {full}; {hint}") from error
        for part, hint in HINTS.items():
            if re.search(part, text):
                raise UsageError(f"{re.split(', but| because', brief(error))[0]}; {hint}") from error
        is_gone = isinstance(error, torch.distributed.DistError) or any(word in text for word in PEER_IS_GONE)
        if trainer.world_size > 1 and is_gone:
            how = f" {to_continue(cli.run_dir)}" if cli.run_dir else ""
            raise Ended(f"another process of this run has died (killed? out of memory?).{how}") from error
        raise


def _prepare_training(cli: LitCLI) -> None:
    """Say what will be trained and what is different in a continued run, write down the configuration."""
    trainer, model, data, config, start = cli.trainer, cli.model, cli.datamodule, cli.config, cli.start
    trainer.fit_loop.epoch_loop = LeanEpochLoop(trainer)
    if start.path is not None:
        _continue(cli)
    elif model.account:
        rank_zero_only(print)(model.account)
    if not trainer.is_global_zero:
        return
    data.prepare_data()  # the other processes wait for this one
    net, parts = model.net_name, ", ".join(f"{len(data.split(part)[2]):,} {part}" for part in SPLITS)
    images = f"{cli.data_name} ({parts} images, {len(data.class_names)} classes)"
    print(f"{net} ({count_parameters(model.net):,} parameters) on {images}")
    if changes := data.part_changes():
        print(changes)
    height, width = model.image_shape[1:]
    if min(height, width) >= 64 and model.net_size and 2 * max(model.net_size) <= min(height, width):
        sizes = f"{width} x {height} pixels at {model.net_size[1]} x {model.net_size[0]}"
        print(f"{net} looks at images of {sizes}; for photographs: --config configs/photos_minute.yaml")
    if model.account and (tested := data.parts().get("test")) is not None:
        had: Any = {}
        file = Path(os.path.expanduser(config.model.weights))  # noqa: PTH111
        with contextlib.suppress(CheckpointError, ModelError):  # other weights do not say what they were trained on
            had = open_model(file).parts if file.suffix == ".safetensors" else read_checkpoint(file).get("parts", {})
        seen = [np.asarray(had[part]) for part in ("train", "val") if part in had]
        if seen and (count := among(tested.numpy(), np.concatenate(seen)).sum()):
            text = f"{config.model.weights} was trained on {count} of the images that are to be tested (or groups)"
            hint = "give --seed and --data.test_fraction of that run, or lay out a test part"
            print(f"warning: {text}, so the test will look better than it is; {hint}", file=sys.stderr)
    if cli.run_dir is not None:
        start.copy_to(cli.run_dir)
        write_yaml(cli.options, cli.run_dir / "config.yaml")
    if isinstance(trainer.logger, TensorBoardLogger):
        _show_what_goes_in(trainer.logger, model, data)


def _show_what_goes_in(logger: TensorBoardLogger, model: LitClassifier, data: ImageDataModule) -> None:
    """Show a sheet of training images, and the graph of the network."""
    from data_modules.sheets import sample_sheet  # matplotlib: only when something is drawn

    logger.experiment.add_figure("train/samples", sample_sheet(*data.split("train"), data.class_names))
    example = torch.zeros(2, len(model.mean), *(model.net_size or data.image_shape[1:]))
    with warnings.catch_warnings(action="ignore"):  # TensorBoard's writer traces; what shapes the graph is constant
        try:
            logger.experiment.add_graph(model.net.eval(), example)  # eval: zeros must not move any running mean
        except Exception as error:  # tracing fails in many ways, and a figure must not end a training
            print(f"TensorBoard gets no graph of this network: {error}")
    model.net.train()


def _continue(cli: LitCLI) -> None:
    start = cli.start
    start.check(cli.model, cli.trainer)
    options = dict(flat(plain_options(cli.parser, cli.config)))
    options["model.backbone_lr"] = cli.model.hparams["backbone_lr"]  # None stands for what the weights say
    rank_zero_only(print)(start.describe(options))
    if reason := start.is_complete(cli.trainer):
        epochs, folder = start.checkpoint["epoch"], cli.run_dir or Path()
        result, best = folder / "result.json", folder / "checkpoints" / "best.ckpt"
        if cli.tests:
            is_done = result.exists() and json.loads(result.read_text(encoding="utf-8"))["epochs"] >= epochs
        else:  # 1 is where the temperature begins
            is_done = not best.exists() or read_checkpoint(best)["hyper_parameters"].get("temperature", 1.0) != 1.0
        if is_done:
            raise Ended(f"Nothing left to do: the run ended after {reason}.", exit_status=0)
        cli.trainer.fit_loop.max_epochs = epochs  # only what comes after the training is missing


def calibrate_best(cli: LitCLI) -> dict[str, Any]:
    """After a training, give the best checkpoint its temperature and, if ``--accept`` asks for it, its threshold.

    Returns what is in the checkpoint; nothing where it was not read.
    """
    trainer, model, checkpoints = cli.trainer, cli.model, cli.checkpoints
    best = checkpoints.folder / "best.ckpt" if checkpoints and trainer.is_global_zero else None
    if best and best.exists() and not isinstance(trainer.strategy, FSDPStrategy):  # maybe too large for one device
        found = read_checkpoint(best)
        model.load_state_dict(found["state_dict"])
        print(_calibrate(cli, model))
        found["hyper_parameters"] |= {"temperature": model.temperature, "threshold": model.threshold}
        save_checkpoint(found, best)
        return found
    return {}


def test_best(cli: LitCLI, found: dict[str, Any]) -> None:
    """Test the best checkpoint, ``found`` or yet to be read, write result.json, say what came out and what is next."""
    trainer, model, run_dir, checkpoints, best = cli.trainer, cli.model, cli.run_dir, cli.checkpoints, None
    begun: Any = trainer.fit_loop.epoch_progress.current
    epochs, seconds = begun.started, time.monotonic() - cli.began
    validated: dict[str, Any] = dict(trainer.callback_metrics)
    if isinstance(trainer.strategy, FSDPStrategy):
        model = LitClassifier(**model.hparams)  # it has taken the trained one apart
    if checkpoints:
        run_dir, best = checkpoints.folder.parent, checkpoints.folder / "best.ckpt"  # the first process's
        seconds = checkpoints.seconds
        if not best.exists():
            rank_zero_only(print)(f"No validation has chosen a best.ckpt to test; {checkpoints.last} has the weights.")
            return
        found = found or read_checkpoint(best)
        model.load_state_dict(found["state_dict"])
        validated = found["metrics"]
    trainer.test(model, datamodule=cli.datamodule, verbose=False)
    if not trainer.is_global_zero:
        return
    if run_dir is None:
        print("fast_dev_run: one batch of training, validation and test went through.")
        return
    scores = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("test_")}
    scores |= {"val_acc": 0.0} | {name: value for name, value in validated.items() if name.startswith("val_")}
    result: dict[str, Any] = {name: round(float(value), 7) for name, value in scores.items()}  # they are float32
    result |= {"epochs": epochs, "seconds": round(seconds, 2), "net": model.net_name, "data": cli.data_name}
    result |= {"num_params": count_parameters(model.net), "seed": cli.datamodule.seed, **cli.state.origin}
    with atomic_path(run_dir / "result.json") as path:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if isinstance(trainer.logger, TensorBoardLogger):
        _show_in_tensorboard(cli, trainer.logger, model, result)
    what, name = ("mean average precision", "map") if model.multi_label else ("accuracy", "acc")
    reached = f"{result[f'test_{name}']:.2%} (loss {result['test_loss']:.4f})"
    spent = f"{epochs} epochs in {seconds:.1f} s on {trainer.strategy.root_device.type}"
    validation = f"validation {result.get(f'val_{name}', 0):.2%}"
    print(f"\nTest {what} {reached}, {validation}; {spent}.\nRun folder: {run_dir}")
    if best is not None:
        runs, file = shlex.quote(str(run_dir.parent)), shlex.quote(str(best))
        scripts = [f"python scripts/{name}.py {file}" for name in ("evaluate", "export", "predict")]
        print("\n  ".join(["Next:", f"tensorboard --logdir {runs}", *scripts]), "IMAGE...")


@torch.no_grad()
def logits_of(cli: LitCLI, model: LitClassifier, part: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a whole part, whatever of it was validated or tested, float64 (N, num_classes), and labels (N,)."""
    data, device = cli.datamodule, cli.trainer.strategy.root_device
    images, labels, rows = data.split(part)
    inputs, batches = data.features.get(part, images), rows.split(4 * data.batch_size)  # as validation has them
    model.to(device).eval()
    with cli.trainer.precision_plugin.forward_context():  # float32 may take several times as long
        logits = torch.cat([model.logits(inputs[some].to(device)).cpu().double() for some in batches])
    return logits, labels.cpu()[rows]


def _calibrate(cli: LitCLI, model: LitClassifier) -> str:
    """Calibrate a trained model on all validation images; returns what was found."""
    accept, (logits, labels) = cli.config.accept, logits_of(cli, model, "val")  # (N, num_classes), (N,) or (N, K)
    model.temperature = 1.0
    before = model.probabilities(logits)
    model.temperature = temperature(logits, labels)
    shares = model.probabilities(logits)
    errors = " -> ".join(f"{calibration_error(one, labels):.2%}" for one in (before, shares))
    text = f"On {len(labels):,} validation images: temperature {model.temperature:.3f}, calibration error {errors}"
    if model.multi_label:
        model.threshold = limits = best_thresholds(shares, labels)
        return f"{text}; thresholds of the classes {min(limits):.2f} to {max(limits):.2f}"
    model.threshold = least = threshold(shares, labels, accept) if accept else 0.0
    if accept and least == 1:
        return f"{text}; --accept {accept:g} is out of reach, so the model is never sure"
    sure = (shares.amax(1) >= least).double().mean().item()
    return text + (f"; sure from {least:.2%} on, about {sure:.2%} of the images" if accept else "")


def _show_in_tensorboard(cli: LitCLI, logger: TensorBoardLogger, model: LitClassifier, result: dict[str, Any]) -> None:
    """Show the run's place in the table of runs, the confusion matrix and the mistakes on the test images."""
    # matplotlib: only when something is drawn
    from lit_nn.trained.evaluate import answer_test_images, measure
    from lit_nn.trained.figures import figures_of

    data, trainer = cli.datamodule, cli.trainer
    options = {name: value for name, value in model.hparams.items() if name not in DESCRIPTION}
    options |= {"data": cli.data_name, "batch_size": data.batch_size, "seed": data.seed}
    options |= {"max_epochs": trainer.max_epochs, "precision": str(trainer.precision)}
    logger.log_hyperparams(options, {f"final/{name}": result[name] for name in ("test_acc", "test_loss", "val_acc")})
    if not data.features:  # else the test went by these: figures of all images are evaluate.py's work
        with trainer.precision_plugin.forward_context():
            answers = answer_test_images(classifier_model(model.to(trainer.strategy.root_device)), data)
        title = f"{model.net_name} on the test images of {type(data).__name__}"
        for name, figure in figures_of(answers, measure(answers), title).items():
            logger.experiment.add_figure(f"test/{name}", figure)
    logger.finalize("success")


def predict(cli: LitCLI) -> None:
    """Predict the test images; predictions.csv in --run_dir (default: here) gets a row for each."""
    trainer, names = cli.trainer, cli.model.class_names
    answers: list[Any] = trainer.predict(cli.model, cli.datamodule) or []
    own = torch.cat([torch.zeros(0, len(names)), *(answer.cpu() for answer in answers)])  # (N, num_classes)
    parts = [own] * trainer.world_size  # each of every world_size-th image, from the rank on
    if len(parts) > 1:
        torch.distributed.all_gather_object(parts, own)
    if not trainer.is_global_zero:
        return
    rows = [row for rows in itertools.zip_longest(*parts) for row in rows if row is not None]
    model = classifier_model(cli.model)
    path = Path(os.path.expanduser(cli.config.run_dir or "."), "predictions.csv")  # noqa: PTH111
    path.parent.mkdir(parents=True, exist_ok=True)
    header = ["image", *model.read(np.zeros(len(names), np.float32)).cells]
    write_csv(path, [header, *([number, *model.read(row.numpy()).cells.values()] for number, row in enumerate(rows))])
    print(f"{len(rows)} predictions: {path}")
