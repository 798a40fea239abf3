"""The flat flags (``--net lenet``) of the commands, and their way into the LightningCLI's dotted ones.

Nothing here imports torch or lightning, so that ``--help`` and a mistyped flat flag are answered at once.
"""

import ast
import difflib
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
NEARLY = 0.8  # how alike (see `nearest`) a word and a flat flag must be for nothing else to be meant


class UsageError(Exception):
    """Something was typed that cannot be done; the message says what was given and what is allowed."""

    exit_status = 2


@dataclass(frozen=True)
class Flag:
    """A short name for one option.

    Attributes:
        name: As typed, without the dashes.
        option: The LightningCLI's dotted name for the same.
        default: What holds if it is not given, as shown in the help.
        help: One line of meaning.
        value_type: For options that neither the classifier, the data set nor the Trainer has already.
    """

    name: str
    option: str
    default: str
    help: str
    value_type: type | None = None


def listed(package: str) -> dict[str, str]:
    """What is on the list of a package: {file's name: class that the package's ``__init__.py`` imports from it}.

    Read from the text, because importing it takes seconds.

    Args:
        package: "lit_nn.nets" or "data_modules".
    """
    tree = ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text(encoding="utf-8"))
    found = {
        node.module.removeprefix(f"{package}."): node.names[0].name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{package}.")
    }
    return {name: cls for name, cls in found.items() if name != "base"}


def flags() -> list[Flag]:
    """All flat flags."""
    nets, data = ", ".join(listed("lit_nn.nets")), ", ".join(listed("data_modules"))
    return [
        Flag("net", "model.net", "lenet", f"network: {nets}, or torchvision/NAME (for instance torchvision/resnet18)"),
        Flag("data", "data", "fashion_mnist_sample", f"data set: {data}"),
        Flag("data_dir", "data.data_dir", "data", "folder of the data set; what is downloaded goes there"),
        Flag("batch_size", "data.batch_size", "128", "training images per step and process"),
        Flag(
            "augment",
            "data.augment",
            "default",
            "changes to training images, joined by commas: flip_alternating, flip, translate, brightness_contrast, "
            "cutout, cutmix, mixup; or none",
        ),
        Flag("max_epochs", "trainer.max_epochs", "20", "times that the training goes through all training images"),
        Flag("lr", "model.lr", "0.003", "learning rate, the highest one of the schedule"),
        Flag("optimizer", "model.optimizer", "adamw", "sgd, momentum, nesterov, adam, adamw, rmsprop, manual_sgd"),
        Flag("weight_decay", "model.weight_decay", "0.01", "decay of the weights (not of biases and norm layers)"),
        Flag(
            "schedule",
            "model.schedule",
            "one_cycle",
            "of the lr: constant, one_cycle, cosine, step, plateau",
        ),
        Flag("loss", "model.loss", "cross_entropy", "cross_entropy, mse, l1"),
        Flag("label_smoothing", "model.label_smoothing", "0.0", "share of the target spread evenly over all classes"),
        Flag(
            "class_weights",
            "model.class_weights",
            "none",
            'in the loss: none, balanced, or a list: "[1, 2.5]"',
        ),
        Flag(
            "init",
            "model.init",
            "default",
            "how the weights start: default (PyTorch's own), normal, uniform, xavier_uniform, xavier_normal, "
            "kaiming_uniform, kaiming_normal, orthogonal, constant, tutorial_normal, tutorial_uniform",
        ),
        Flag("init_from", "init_from", "null", "checkpoint whose weights are taken where names and shapes agree", str),
        Flag("accelerator", "trainer.accelerator", "auto", "cpu, gpu, mps, tpu, or auto: the best one that is here"),
        Flag("devices", "trainer.devices", "auto", "how many of them, or which"),
        Flag("num_nodes", "trainer.num_nodes", "1", "how many machines"),
        Flag("strategy", "trainer.strategy", "auto", "how several processes share the work: ddp, fsdp, auto"),
        Flag("sync_batchnorm", "trainer.sync_batchnorm", "false", "BatchNorm over the images of all GPUs, not of each"),
        Flag("precision", "trainer.precision", "32-true", "number format: 32-true, bf16-mixed, 16-mixed"),
        Flag(
            "channels_last", "model.channels_last", "false", "order of memory that wide convolutions compute faster in"
        ),
        Flag("compile", "compile", "false", "compile the network; pays for itself on a GPU or in a long run", bool),
        Flag("flip_in_eval", "model.flip_in_eval", "false", "outside of training, classify each picture mirrored too"),
        Flag("seed", "seed_everything", "42", "of everything random: weights, split, order, augmentation"),
        Flag("clip_grad", "trainer.gradient_clip_val", "null", "largest norm of the gradient, over all parameters"),
        Flag(
            "ema",
            "ema",
            "null",
            "decay of a moving average (0.99 to 0.9999) to use instead of the weights",
            float,
        ),
        Flag("early_stopping", "early_stopping", "null", "stop when val_loss has not fallen for so many epochs", int),
        Flag("run_dir", "run_dir", "runs/DATA-NET/TIME", "folder that gets everything the run writes", str),
        Flag(
            "resume", "ckpt_path", "null", "continue a run: its folder, a checkpoint, or last or best of the latest run"
        ),
        Flag("tune", "tune", "null", "find a value first: lr, or batch_size (the largest that fits into memory)", str),
        Flag("save_every_steps", "save_every_steps", "null", "save last.ckpt inside an epoch too, every N steps", int),
        Flag("save_every_minutes", "save_every_minutes", "null", "and every N minutes", float),
        Flag("fast_dev_run", "trainer.fast_dev_run", "false", "one batch of everything and no files: does it work?"),
        Flag("config", "config", "null", "YAML file with values for any options; flags win over it"),
    ]


SYNONYMS = {  # what other programs call an option, and what it is called here
    "learning_rate": ["lr"],
    "epochs": ["max_epochs"],
    "batch": ["batch_size"],
    "model": ["net"],
    "network": ["net"],
    "dataset": ["data"],
    "gpus": ["accelerator", "devices"],
}


def nearest(given: str, allowed: Iterable[str], cutoff: float = 0.5) -> str:
    """The allowed names most like a mistyped one, for a message: " Did you mean ...?", or "".

    Args:
        given: The mistyped name.
        allowed: All names.
        cutoff: How alike they must be, from 0 to 1.
    """
    names = list(dict.fromkeys(allowed))
    meant = [name for name in SYNONYMS.get(given, []) if name in names]
    close = meant or difflib.get_close_matches(given, names, n=3, cutoff=cutoff)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def unknown_option(name: str, hint: str, script: str = "train") -> str:
    """The message about an option that a script does not have; ``hint`` comes from `nearest`."""
    return f"unknown option '{name}'.{hint} All options: python scripts/{script}.py --help"


def to_dotted(argv: Sequence[str]) -> list[str]:
    """Write every flat flag as the dotted option that it stands for; files first, so that flags win, then the data set.

    Args:
        argv: Words of a command line.

    Returns:
        The same command line for the LightningCLI.

    Raises:
        UsageError: If ``--data`` names a data set that there is not, or a word is nearly a flat flag, or not UTF-8.
    """
    options = {"-c": "--config", **{f"--{flag.name}": f"--{flag.option}" for flag in flags()}}
    known, flat = {*options, *options.values(), "--model"}, [flag.name for flag in flags()]
    switches = {f"--{flag.option}" for flag in flags() if flag.default == "false"}  # need no value
    words: list[str] = []
    for position, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if (shown := word.encode(errors="replace").decode()) != word:
            raise UsageError(f"'{shown}' is not UTF-8, as config.yaml is; rename it, or give a link with another name")
        if words and words[-1] == "--config":
            words[-1] += f"={word}"
        elif words and words[-1] in ("--data", "--data.help"):
            words[-1] += f"={_data_class(word)}"
        elif name in ("--data", "--data.help") and equals:
            words.append(f"{name}={_data_class(value)}")
        elif name.startswith("--") and name not in known and (hint := nearest(name[2:], flat, NEARLY)):
            raise UsageError(unknown_option(name[2:], hint))  # at once; the parser knows the other names
        else:
            words.append(options.get(name, name) + equals + value)
        following = argv[position + 1] if position + 1 < len(argv) else "--"
        if words[-1] in switches and following.startswith("-"):
            words[-1] += "=true"
    subcommand = 1 if words and not words[0].startswith("-") else 0
    return words[:subcommand] + sorted(
        words[subcommand:], key=lambda word: (not word.startswith("--config="), not word.startswith("--data="))
    )


def _data_class(name: str) -> str:
    """Path of the class that a name given to ``--data`` stands for; a path of a class stays as it is."""
    known = listed("data_modules")
    if name in known:
        return f"data_modules.{known[name]}"
    if "." in name or name in known.values():
        return name
    raise UsageError(f"unknown data set '{name}'.{nearest(name, known)} Allowed: {', '.join(known)}")


def help_text(program: str, what: str) -> str:
    """The help of a command that takes the flat flags.

    Args:
        program: What the user typed to start it.
        what: One line: what it does.
    """
    lines = [f"usage: {program} [--NAME VALUE ...]", "", what, "", "options (default in brackets):"]
    for flag in flags():
        lines += textwrap.wrap(
            f"--{flag.name:<18} {flag.help} [{flag.default}]", 110, initial_indent="  ", subsequent_indent=" " * 23
        )
    return "\n".join(
        [
            *lines,
            "",
            "Each is short for a dotted option of the LightningCLI, which may be given as well (--model.lr is --lr).",
            "All dotted options:     python -m lit_nn fit --help",
            "Those of one data set:  python -m lit_nn fit --data.help NAME",
            "Those of one network:   --model.net_args.NAME VALUE, listed by python scripts/inspect_model.py --list",
        ]
    )
