"""The flat flags (``--net lenet``), each short for a dotted option of the LightningCLI. No torch here."""

import argparse
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from data_modules import DATA_SETS, option_names
from lit_nn.engine.console import CommandParser, unknown_option
from lit_nn.errors import UsageError, did_you_mean, look_up

HELP = """Each is short for a dotted option, which does as well (--model.lr is --lr). All of them: python -m lit_nn fit
--help; of a data set: python -m lit_nn fit --data.help NAME; of a network: scripts/inspect_model.py --list"""
Compile = bool | Literal["reduce-overhead", "max-autotune"]  # the modes of torch.compile; the second takes long
OTHERS = ("--help", "--print_config", "--model", "--trainer")  # flat names that the LightningCLI has itself


class Flag(NamedTuple):
    """A short name for one option."""

    name: str
    option: str  # the LightningCLI's dotted name for the same
    default: str  # as shown in the help; of "false" ones the value may be left out
    help: str
    value_type: Any = None  # of options that neither the classifier, the data set nor the Trainer has already


FLAGS = [
    Flag("net", "model.net", "lenet", "network: {nets}, torchvision/NAME or timm/NAME"),
    Flag("data", "data", "fashion_mnist_sample", f"data set: {', '.join(DATA_SETS)}"),
    Flag("data_dir", "data.data_dir", "data", "folder of the data set; what is downloaded goes there"),
    Flag("batch_size", "data.batch_size", "128", "training images per step and process"),
    Flag("fit", "data.fit", "crop", "how an image becomes one of the model's size: crop, pad (show all of it), squash"),
    Flag("augment", "data.augment", "default", "changes to training images, joined by commas, or none: {augment}"),
    Flag("max_epochs", "trainer.max_epochs", "20", "times that the training goes through all training images"),
    Flag("lr", "model.lr", "0.003", "learning rate, the highest one of the schedule"),
    Flag("optimizer", "model.optimizer", "adamw", "sgd, momentum, nesterov, adam, adamw, rmsprop, manual_sgd"),
    Flag("weight_decay", "model.weight_decay", "0.01", "decay of the weights (not of biases and norm layers)"),
    Flag("schedule", "model.schedule", "one_cycle", "of the lr: constant, one_cycle, cosine, step, plateau"),
    Flag("loss", "model.loss", "cross_entropy", "cross_entropy (of several labels: binary), mse, l1"),
    Flag("label_smoothing", "model.label_smoothing", "0.0", "share of the target spread evenly over all classes"),
    Flag("class_weights", "model.class_weights", "none", 'in the loss: none, balanced, or a list: "[1, 2.5]"'),
    Flag("init", "model.init", "default", "how the weights start, for instance kaiming_normal (lit_nn/initialise.py)"),
    Flag("weights", "model.weights", "none", "to start with: default, a published tag, or a file (.pth, .ckpt, ...)"),
    Flag("backbone_lr", "model.backbone_lr", "null", "factor of the lr for all but the last layer; 0.1 with --weights"),
    Flag("freeze_epochs", "model.freeze_epochs", "0", "epochs in which only the last layer learns; -1: all"),
    Flag("cache_features", "cache_features", "false", "compute once what a frozen network sees in each image", bool),
    Flag("accelerator", "trainer.accelerator", "auto", "cpu, gpu, mps, tpu, or auto: the best one that is here"),
    Flag("devices", "trainer.devices", "auto", "how many of them, or which"),
    Flag("num_nodes", "trainer.num_nodes", "1", "how many machines"),
    Flag("strategy", "trainer.strategy", "auto", "how several processes share the work: ddp, fsdp, auto"),
    Flag("sync_batchnorm", "trainer.sync_batchnorm", "false", "BatchNorm over the images of all GPUs, not of each"),
    Flag("precision", "trainer.precision", "32-true", "number format: 32-true, bf16-mixed, 16-mixed; auto: a fast one"),
    Flag("channels_last", "model.channels_last", "false", "order of memory that wide convolutions compute faster in"),
    Flag("compile", "compile", "false", "compile the network; for a small one on a GPU: reduce-overhead", Compile),
    Flag("flip_in_eval", "model.flip_in_eval", "false", "in use, take each image mirrored too; both: upside down, too"),
    Flag("seed", "seed_everything", "42", "of everything random: weights, split, order, augmentation"),
    Flag("clip_grad", "trainer.gradient_clip_val", "null", "largest norm of the gradient, over all parameters"),
    Flag("ema", "ema", "null", "decay of a moving average (0.99 to 0.9999) to use instead of the weights", float),
    Flag("accept", "accept", "null", 'say "not sure" so often that such a share of the rest is right, 0.95 say', float),
    Flag("monitor", "model.monitor", "default", "what is best: val_acc, val_loss, val_balanced_acc, val_f1, val_map"),
    Flag("early_stopping", "early_stopping", "null", "stop when that has not improved for so many epochs", int),
    Flag("run_dir", "run_dir", "runs/DATA-NET/TIME", "folder that gets everything the run writes", str),
    Flag("resume", "ckpt_path", "null", "continue a run: its folder, a checkpoint, or last or best of the latest", str),
    Flag("save_every_steps", "save_every_steps", "null", "save last.ckpt inside an epoch too, every N steps", int),
    Flag("save_every_minutes", "save_every_minutes", "null", "and every N minutes", float),
    Flag("fast_dev_run", "trainer.fast_dev_run", "false", "one batch of everything and no files: does it work?"),
    Flag("config", "config", "null", "YAML file with values for any options; flags win over it"),
]


def flag_parser(nets: Iterable[str] = (), augment: Iterable[str] = ()) -> CommandParser:
    """The parser of scripts/train.py, which takes each flag by its flat name and by its dotted one."""
    more: dict[str, Any] = {"add_help": False, "argument_default": argparse.SUPPRESS, "epilog": HELP}
    parser = CommandParser("train", "Train an image classifier, then test its best checkpoint.", **more)
    parser.usage = "%(prog)s [--NAME VALUE ...]"
    for flag in (*FLAGS, Flag("data.help", "data.help", "", "")):
        more = {"nargs": "?", "const": "true"} if flag.default == "false" else {}
        more |= {"action": "append"} if flag.name == "config" else {}
        text = flag.help.format(nets=", ".join(nets), augment=", ".join(augment))
        text = f"{text} [{flag.default}]" if text else argparse.SUPPRESS
        for name in dict.fromkeys([flag.name, flag.option]):
            parser.add_argument(f"--{name}", dest=flag.option, metavar="X", help=text, **more)
            text = argparse.SUPPRESS
    return parser


def to_dotted(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What a command line gives for the flags, by their dotted names; and all of it as the LightningCLI takes it.

    Files come first, so that flags win, then the data set. Refuses flat names that are no flags.
    """
    words = ["--config" if word == "-c" else word.replace("--data.init_args.", "--data.", 1) for word in argv]
    parser = flag_parser()
    found, rest = parser.parse_known_args(words)
    for word in rest:
        name = word.partition("=")[0]
        if name.startswith("--") and "." not in name and name not in OTHERS:
            names = [flag.name for flag in FLAGS]
            if not did_you_mean(name[2:], names, 0.8):  # which are known at once; for the others torch is imported
                names += sorted({f"data.{option}" for data in DATA_SETS for option in option_names(data)})
            raise UsageError(unknown_option(name[2:], names))
    given = vars(found)
    for option in {"data", "data.help"} & given.keys():  # a class, by its path, is also allowed
        if "." not in (name := given[option]) and name not in DATA_SETS.values():
            given[option] = f"data_modules.{look_up(DATA_SETS, name, 'data set')}"
    files = [f"--config={file}" for file in given.get("config", [])]
    return given, [*files, *(f"--{n}={given[n]}" for n in sorted(given, key="data".__ne__) if n != "config"), *rest]
