"""Lightning's finders of a learning rate and of a batch size, run on a copy before the training: ``--tune``."""

import copy
import logging
import math
import tempfile
from pathlib import Path

import lightning as L
from lightning.pytorch.tuner.tuning import Tuner
from lightning.pytorch.utilities.seed import isolate_rng

from data_modules import ImageDataModule
from lit_nn.callbacks import ProgressBar
from lit_nn.checkpoint import SafeCheckpointIO
from lit_nn.classifier import LitClassifier
from lit_nn.flags import UsageError
from lit_nn.resume import leave_signals_alone

TUNED = ("lr", "batch_size")
STEPS = 100  # of the search for a learning rate, which grows by the same factor at each
SMALLEST_BATCH = 16  # the first that is tried
LARGEST_BATCH = {"cpu": 1024}  # a CPU that runs out of memory ends the process; a GPU only says so
LARGEST_BATCH_ELSEWHERE = 8192


def tune(what: str, classifier: LitClassifier, data: ImageDataModule, trainer: L.Trainer, plot: Path) -> float:
    """Look for the value of an option; only a copy is trained, so the run starts as if nothing had been.

    Args:
        what: "lr": raised from 1e-8 to 1 over 100 steps, the one is suggested at which the loss falls fastest (L.
            Smith, "Cyclical Learning Rates for Training Neural Networks", 2017). "batch_size": doubled until the
            memory is full, at most to 8,192 on a GPU, 1,024 on a CPU, and the number of training images.
        classifier: What is to be trained.
        data: What it is to be trained on.
        trainer: Where and with what precision.
        plot: For "lr", the file that gets the loss over the learning rate.

    Returns:
        The value found.

    Raises:
        UsageError: If there are several processes, or no value is better than the others.
    """
    if trainer.world_size > 1:
        raise UsageError(
            "--tune works in one process; find the value with --devices 1 first, then give it as an option"
        )
    device = trainer.strategy.root_device
    classifier = copy.deepcopy(classifier)
    logging.getLogger("lightning.pytorch.tuner").setLevel(logging.WARNING)  # it speaks of its own checkpoints
    with isolate_rng(), tempfile.TemporaryDirectory() as folder:
        own = L.Trainer(
            accelerator="cpu" if device.type == "cpu" else "auto",
            devices=1 if device.index is None else [device.index],
            precision=trainer.precision,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=[ProgressBar()],
            plugins=[SafeCheckpointIO()],
            default_root_dir=folder,
        )
        leave_signals_alone(own)
        tuner = Tuner(own)
        if what == "batch_size":
            data.prepare_data()
            images = len(data.split("train")[2])
            most = min(LARGEST_BATCH.get(device.type, LARGEST_BATCH_ELSEWHERE), images)
            if most < SMALLEST_BATCH:
                raise UsageError(f"--tune batch_size begins at {SMALLEST_BATCH}; there are {images} training images")
            largest = SMALLEST_BATCH * 2 ** int(math.log2(most / SMALLEST_BATCH))  # that the doubling comes to
            before, found = data.batch_size, None
            try:  # it gives the double of what it tried last, if memory was left then
                found = tuner.scale_batch_size(
                    classifier, datamodule=data, init_val=SMALLEST_BATCH, max_val=2 * largest
                )
            finally:
                data.batch_size = before
            return min(found or before, largest)
        finder = tuner.lr_find(classifier, datamodule=data, num_training=STEPS, update_attr=False)
    assert finder is not None
    lr = finder.suggestion()
    if lr is None:
        raise UsageError("--tune lr found no learning rate at which the loss falls; give one with --lr")
    from matplotlib import pyplot as plt  # only when something is drawn

    figure = finder.plot(suggest=True)
    assert figure is not None
    plot.parent.mkdir(parents=True, exist_ok=True)
    figure.axes[0].set_title(f"suggested: {lr:.2g}")
    figure.savefig(plot, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return float(f"{lr:.3g}")
