"""The flat flags (``--net lenet``), and their way into the dotted ones of the LightningCLI. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass

from data_modules import DATA_SETS
from lit_nn.errors import UsageError, did_you_mean, look_up

NEARLY = 0.8  # how alike a word and a flat flag must be for nothing else to be meant


@dataclass(frozen=True)
class Flag:
    """A short name for one option."""

    name: str
    option: str  # the LightningCLI's dotted name for the same
    default: str  # as shown in the help
    help: str
    value_type: type | None = None  # of options that neither the classifier, the data set nor the Trainer has already


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
    Flag(
        "weights",
        "model.weights",
        "none",
        "to start with: default, a published tag, or a file (.pth, .safetensors, ...)",
    ),
    Flag(
        "backbone_lr", "model.backbone_lr", "null", "factor of the lr for all layers but the last [0.1 with --weights]"
    ),
    Flag("freeze_epochs", "model.freeze_epochs", "0", "epochs in which only the last layer learns; -1: all"),
    Flag("cache_features", "cache_features", "false", "compute once what a frozen network sees in each image", bool),
    Flag("accelerator", "trainer.accelerator", "auto", "cpu, gpu, mps, tpu, or auto: the best one that is here"),
    Flag("devices", "trainer.devices", "auto", "how many of them, or which"),
    Flag("num_nodes", "trainer.num_nodes", "1", "how many machines"),
    Flag("strategy", "trainer.strategy", "auto", "how several processes share the work: ddp, fsdp, auto"),
    Flag("sync_batchnorm", "trainer.sync_batchnorm", "false", "BatchNorm over the images of all GPUs, not of each"),
    Flag("precision", "trainer.precision", "32-true", "number format: 32-true, bf16-mixed, 16-mixed"),
    Flag("channels_last", "model.channels_last", "false", "order of memory that wide convolutions compute faster in"),
    Flag("compile", "compile", "false", "compile the network; pays for itself on a GPU or in a long run", bool),
    Flag(
        "flip_in_eval",
        "model.flip_in_eval",
        "false",
        "outside of training, classify each image mirrored too; both: upside down, too",
    ),
    Flag("seed", "seed_everything", "42", "of everything random: weights, split, order, augmentation; true: any"),
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
SYNONYMS = {"learning_rate": "lr", "model": "net", "gpus": "devices"}  # what other programs call an option


def unknown_option(name: str, allowed: Sequence[str], script: str = "train", cutoff: float = 0.5) -> str:
    """The message about an option that a script does not have; "" if none is as alike as ``NEARLY`` asks."""
    hint = f" Did you mean {SYNONYMS[name]}?" if name in SYNONYMS else did_you_mean(name, allowed, cutoff)
    nothing = not hint and cutoff == NEARLY
    return "" if nothing else f"unknown option '{name}'.{hint} All options: python scripts/{script}.py --help"


def to_dotted(argv: Sequence[str]) -> list[str]:
    """The same command line for the LightningCLI: dotted options, each with its value in one word: ``--model.lr=0.1``.

    Files come first, so that flags win, then the data set. Refuses what is nearly a flat flag.
    """
    options = {"-c": "--config", **{f"--{flag.name}": f"--{flag.option}" for flag in FLAGS}}
    known, flat = {*options, *options.values(), "--model"}, [flag.name for flag in FLAGS]
    switches = {f"--{flag.option}" for flag in FLAGS if flag.default == "false"}  # need no value
    words = [""]
    for word in argv:
        if (shown := word.encode(errors="replace").decode()) != word:
            raise UsageError(f"'{shown}' is not UTF-8, as config.yaml is; rename it, or give a link with another name")
        waits = words[-1].startswith("-") and "=" not in words[-1]  # the last word does, for its value
        if waits and not word.startswith("-" if words[-1] in switches else "--"):
            words[-1] += f"={word}"
            continue
        name, equals, value = word.replace("--data.init_args.", "--data.", 1).partition("=")
        if name.startswith("--") and name not in known and (text := unknown_option(name[2:], flat, cutoff=NEARLY)):
            raise UsageError(text)  # at once; the parser knows the other names
        words.append(options.get(name, name) + equals + value)
    words = [_with_data_class(f"{word}=true" if word in switches else word) for word in words[1:]]
    return sorted(words, key=lambda word: (not word.startswith("--config="), not word.startswith("--data=")))


def _with_data_class(word: str) -> str:
    """Replace the name of a data set by the path of its class; a path of a class stays as it is."""
    option, _, name = word.partition("=")
    if option not in ("--data", "--data.help") or "." in name or name in DATA_SETS.values():
        return word
    return f"{option}=data_modules.{look_up(DATA_SETS, name, 'data set')}"


def values_of(option: str, words: Sequence[str]) -> list[str]:
    """Every value that a command line, as `to_dotted` gives it, has for an option, in order."""
    return [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]
