"""What a user is told: one message for what was typed wrong, a traceback for what is wrong in code of one's own."""

import functools
import io
import re
import shlex
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Command, Patch, Refused, Said, images_in, patched, script
from test_train import CPU, FAST, FEW, STEPS, OwnNet, Witness, config_of, yaml_file
from torch import Tensor

from data_modules import FashionMNISTSample
from data_modules.augment import AUGMENTATIONS
from lit_nn import LitClassifier
from lit_nn.__main__ import main as lightning_cli
from lit_nn.engine import console
from lit_nn.losses import LOSSES
from lit_nn.nets import NETS

train = script("train")


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checkpoint of a run of two steps."""
    folder = tmp_path_factory.mktemp("messages") / "my run"
    assert train([*FEW, "--run_dir", str(folder)]) == 0
    return str(folder / "checkpoints" / "best.ckpt")


# --- what is typed ----------------------------------------------------------------------------------------------------

THEIRS, MONITOR = "lightning.pytorch.callbacks", "init_args: {monitor: acc_of_val}"
MISTAKES = {
    "--net lenett": ["unknown net 'lenett'. Did you mean lenet"],
    "--net resnet18": ["unknown net 'resnet18'. Did you mean torchvision/resnet18?"],
    "--net zzz": ["torchvision/NAME, timm/NAME"],
    "--net torchvision/vgg17": ["unknown torchvision network 'vgg17'. Did you mean vgg"],
    "--net timm/resnet1": ["unknown timm network 'resnet1'. Did you mean resnet18"],
    "--net mlp --model.net_args.hiden 5": ["unknown argument of net mlp 'hiden'. Did you mean hidden? Allowed: "],
    "--net mlp --model.net_args.hidden -5": ["net mlp cannot be built with {'hidden': -5, "],
    "--model.net_args.kernel_size 14": ["lenet with {'kernel_size': 14} cannot work on images (1, 32, 32): "],
    "--model.net_args.kernel_size 0": ["lenet with {'kernel_size': 0} cannot work on images (1, 32, 32): "],
    "--model.net_args.image_size [8,8]": ["unknown argument of net lenet 'image_size'. "],
    "--net resnet9 --model.net_args.activation sillu": ["'sillu'. Did you mean silu? Allowed: relu, "],
    "--weights default": ["net lenet has no published ones; give none, or a file"],
    "--net torchvision/resnet18 --weights DEFUALT": ["Did you mean DEFAULT? Allowed: IMAGENET1K_V1, DEFAULT"],
    "--net timm/resnet18 --weights a1_in2k": ["unknown weights of resnet18 'a1_in2k'. Did you mean a1_in1k"],
    "--backbone_lr -1": ["backbone_lr -1.0"],
    "--freeze_epochs -2": ["freeze_epochs -2; at least 0 and -1 are allowed"],
    "--freeze_epochs 1 --schedule plateau": ["schedule plateau would keep a learning rate of 0"],
    "--cache_features": ["add --freeze_epochs -1"],
    "--cache_features --freeze_epochs -1 --augment flip": ["--augment flip changes it; give --augment none"],
    "--cache_features --freeze_epochs -1 --augment none --net torchvision/squeezenet1_1": ["than one linear layer"],
    "--init xavier_norml": ["unknown init 'xavier_norml'. Did you mean xavier_normal", "Allowed: def"],
    "--optimizer adm": ["unknown optimizer 'adm'. Did you mean "],
    "--optimizer sgd --model.optimizer_args.momentun 1": ["'momentun'. Did you mean momentum? Allowed: momentum, "],
    "--optimizer manual_sgd --model.optimizer_args.momentum 1": ["of manual_sgd 'momentum'. Allowed: none"],
    "--monitor val_top5": ["Allowed: val_loss, val_acc, val_balanced_acc, val_f1"],
    "--schedule onecycle": ["unknown schedule 'onecycle'. Did you mean one_cycle? Allowed: constant, "],
    "--schedule cosine --model.schedule_args.warm_up 0": ["'warm_up'. Did you mean warmup? Allowed: warmup, "],
    "--data fashion": ["fashion", "fashion_mnist"],
    "--data image_folder --data_dir nowhere": ["nowhere is not a folder"],
    "--data image_folder --data.image_size big": ["image_size", "int"],
    "--data image_folder --data.image_size 0": ["image_size is 0"],
    "--data image_folder --data.channels 2": ["channels is 2"],
    "--data image_folder --data.on_error ignore": ["on_error", "ignore"],
    "--data image_folder --data.test_fraction 1.0": ["test_fraction is 1.0"],
    "--data image_folder --data.folds 1": ["folds is 1; it must be at least 2"],
    "--data image_folder --data.fold 2": ["fold is 2; it must be left out without folds"],
    "--data image_folder --data.folds 3 --data.fold 4": ["fold is 4; it must be from 1 to 3"],
    "--data image_folder --data.folds 3 --data.test_fraction 0.2": ["test_fraction is 0.2; it must be left out with"],
    "--data image_folder --data.group_by (": ["not a regular expression: missing"],
    "--data.image_size 5": ["data.image_size is an option of image_folder, image_table only"],
    "--data.sampling even": ["sampling", "even", "shuffled", "balanced"],
    "--data cifar_10": ["'cifar_10'. Did you mean cifar10?", "image_folder"],
    "--data.val_fraction 1.0": ["val_fraction"],
    "--data.batch_sise 3": ["batch_sise", "data.batch_size"],
    "--batch_size 0": ["batch_size is 0; it must be at least 1"],
    "--augment flip,cut_out": ["unknown augmentation 'cut_out'. Did you mean cutout?", *AUGMENTATIONS],
    "--augment crop,flip:scale=0.5..1": ["flip cannot have"],
    **{
        f"--augment flip,crop:{option}": [f"'{option}'", "crop:scale=0.25..1:ratio=0.75..1.33"]
        for option in ("scale=2..1", "scale=0..1", "scale=0.5..1.5", "scale=0.5", "size=3", "ratio=a..b", "0.5..1")
    },
    "--max_epoch 3": ["max_epoch", "max_epochs"],
    "--max_epochs 0": ["max_epochs is 0", "evaluate.py"],
    "--max_epochs -1 --early_stopping 3": ["max_epochs -1", "--trainer.max_time", "constant"],
    "--trainer.limit_test_batches 0": ["limit_test_batches is 0", "python -m lit_nn fit"],
    "--trainer.limit_val_batches 0 --early_stopping 2": ["--early_stopping", "limit_val_batches"],
    "--early_stopping -1": ["early_stopping is -1"],
    "--save_every_steps 0": ["save_every_steps is 0"],
    "--save_every_minutes -1": ["save_every_minutes is -1"],
    "--ema 1": ["ema is 1"],
    "--label_smoothing 10": ["label_smoothing is 10", "from 0 to 1"],
    "--weight_decay -1": ["weight_decay is -1", "0 or more"],
    "--class_weights 1,2,3": ["class_weights", "1,2,3", "balanced", "[...] with 10 numbers"],
    "--class_weights [1.0]": ["1 numbers for 10 classes"],
    "--class_weights [1,1,1,1,1,1,1,1,1,0]": ["all must be above 0"],
    "--schedule step --model.schedule_args.milestones [30,60]": ["milestones counts in shares of the training"],
    "--schedule cosine --model.schedule_args.warmup 5": ["warmup counts in shares of the training"],
    "--accept 0.9 --trainer.limit_val_batches 0": ["go by the validation"],
    "--accept 0.9 --trainer.enable_checkpointing false": ["--accept is about checkpoints"],
    "--net torchvision/alexnet --model.net_args.input_size 32": ["cannot work on images (1, 32, 32)"],
    "--clip_grad None": ["gradient_clip_val", "None"],
    "--model.net_args.depth 3": ["depth", "lenet"],
    "--model.optimizer_args.betas [0.9]": ["optimizer adamw", "betas"],
    "--lr -1": ["optimizer adamw cannot be built with {'lr': -1.0"],
    "--model.schedule_args.pct_start 1": ["one_cycle", "pct_start"],
    "--learning_rate 0.1": ["'learning_rate'. Did you mean lr?"],
    "--trainer.max_epoch 3": ["trainer.max_epoch", "trainer.max_epochs"],
    "--config missing.yaml": ["missing.yaml", "no such file"],
    "--precision 7": ["precision", "7"],
    "--seed -1": ["--seed is -1", "4294967295"],
    "--seed true": ["--seed is True", "a number from 0"],
    "--devices 0": ["devices", "0"],
    "--strategy dpp": ["strategy", "dpp", "ddp"],
    "--strategy fsdp --devices 2": ["fsdp", "GPU"],
    "--strategy ddp --devices 2 --sync_batchnorm": ["--sync_batchnorm", "GPU", "leave it out"],
    "--fast_dev_run --resume last": ["--resume"],
    "--resume nowhere": ["nowhere", "no such file"],
    "--weights nowhere.ckpt": ["nowhere.ckpt: no such file"],
    **({} if torch.cuda.is_available() else {"--accelerator gpu": ["--accelerator cpu"]}),
    "--image_size 64": ["unknown option 'image_size'. Did you mean data.image_size"],
    "--fold 2": ["unknown option 'fold'. Did you mean data.fold"],
    # Of another command.
    "prepare_data --data fashion_mnist_sampel": ["Did you mean fashion_mnist_sample?"],
    "prepare_data --batch_sice 3": ["unknown option 'batch_sice'. Did you mean batch_size?"],
    "prepare_data --batch_size many": ["\"batch_size\": Expected a <class 'int'>. Got value: many"],
    "prepare_data --data image_folder --data_dir nowhere --sheet x.abc": ["--sheet x.abc: the file's name"],
    # Only found in training.
    "--trainer.limit_test_batches 0.1 --batch_size 2000": ["limit_test_batches"],
    "--net torchvision/resnet18 --batch_size 1": ["give a larger --batch_size"],
    # A file, of which this is the text.
    "model: {nett: lenet}": ["Did you mean net"],
    "model: [1, 2": ["not a YAML file"],
    "just words": ["no options"],
    "data_dir: x": ["data.init_args.data_dir: ..."],
    "max_epochs: 3": ["trainer.max_epochs: ..."],
    "seed: 3": ["seed_everything: ..."],
    "resume: runs/a": ["--resume"],
    "ckpt_path: runs/a": ["--resume"],
    "data: {class_path: no_such.Data}": ["no_such"],
    "data: image_folder": ["data: {class_path: ImageFolder}"],
    "data: {class_path: FashionMNISTSample, init_args: {data_dir: x}}": ["reads no folder"],
    "trainer: {callbacks: {class_path: no_such.Callback}}": ["'no_such.Callback': No module named 'no_such'"],
    f"trainer: {{callbacks: [{{class_path: {THEIRS}.Timr}}]}}": ["Timr", "has no attribute 'Timr'"],
    f"trainer: {{callbacks: {{class_path: {THEIRS}.EarlyStopping, {MONITOR}}}}}": ["acc_of_val"],
    f"trainer: {{callbacks: {{class_path: {THEIRS}.ModelCheckpoint, {MONITOR}}}}}": ["acc_of_val"],
}


@pytest.mark.parametrize("given", MISTAKES)
def test_a_mistake_ends_in_one_message(given: str, tmp_path: Path, monkeypatch: Patch, refused: Refused) -> None:
    monkeypatch.chdir(tmp_path)
    if given.startswith("prepare_data"):
        said = refused(script("prepare_data"), given.split()[1:])
    else:
        words = given.split() if given.startswith("--") else ["--config", yaml_file(tmp_path, given)]
        said = refused(train, [*FEW, *words], 1, 2)
    assert [part for part in MISTAKES[given] if part not in said] == []


def test_a_checkpoint_that_keeps_no_parts_keeps_its_seed(tmp_path: Path, refused: Refused) -> None:
    old, said = str(ROOT / "tests" / "stored" / "format1.ckpt"), "leave out --seed and --data.val_fraction"
    seed = ["--seed", "7", "--max_epochs", "3", "--run_dir", str(tmp_path / "run")]
    assert said in refused(train, ["--resume", old, *seed])
    assert said in refused(lightning_cli, ["validate", "--ckpt_path", old, "--data.val_fraction", "0.3"])


def test_changed_images_tested_ones_that_were_trained_on_and_a_renamed_class_are_said(
    tmp_path: Path, capsys: Said, refused: Refused
) -> None:
    images = images_in(tmp_path / "images", "a", "b")
    words = [*FEW, "--data", "image_folder", "--data_dir", str(images), "--run_dir"]
    checkpoint = str(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert train([*words, str(tmp_path / "run")]) == 0
    assert train([*words, str(tmp_path / "same"), "--weights", checkpoint]) == 0
    assert "was trained on" not in capsys.readouterr().err
    assert train([*words, str(tmp_path / "other"), "--weights", checkpoint, "--seed", "7"]) == 0
    assert re.search(r"was trained on [12] of the images that are to be tested", capsys.readouterr().err)
    assert script("export")([checkpoint, "--format", "safetensors"]) == 0
    export = str(Path(checkpoint).with_suffix(".safetensors"))
    assert train([*words, str(tmp_path / "third"), "--weights", export, "--seed", "7"]) == 0
    assert re.search(r"was trained on [12] of the images that are to be tested", capsys.readouterr().err)
    next((images / "a").iterdir()).unlink()
    assert lightning_cli(["test", "--ckpt_path", checkpoint]) == 0
    assert "1 gone" in capsys.readouterr().out
    (images / "b").rename(images / "c")
    assert "lacking b; new c" in refused(lightning_cli, ["test", "--ckpt_path", checkpoint])
    assert "lacking b; new c" in refused(script("evaluate"), [checkpoint])
    assert re.search(r"\bb\b.*\bc\b", refused(train, ["--resume", str(tmp_path / "run"), "--max_epochs", "2"]))


def test_a_mistyped_flag_is_refused_before_torch_is_imported(command: Command) -> None:
    program = (
        f"import runpy, sys; sys.argv = ['train.py', '--lrr', '3']; path = {str(ROOT / 'scripts/train.py')!r}\n"
        "try: runpy.run_path(path, run_name='__main__')\n"
        "except SystemExit as end: print(end, 'torch' in sys.modules)"
    )
    assert command("-c", program).stdout == "2 False\n"


def test_what_would_be_ignored_is_refused(best: str, refused: Refused) -> None:
    trains = ("--compile", "--ema 0.9", "--early_stopping 3", "--weights x.ckpt", "--save_every_steps 5")
    for words in (*trains, "--flip_in_eval both"):
        for stage in ("validate", "test", "predict"):
            assert words.split()[0] in refused(lightning_cli, [stage, "--ckpt_path", best, *words.split()])
    for name, given in (
        ("train", ["--data_dir", "my images"]),
        ("train", ["--data", "FashionMNISTSample", "--data.init_args.data_dir=my images"]),
        ("evaluate", [best, "--data_dir", "my images"]),
        ("prepare_data", ["--data_dir", "my images"]),
        ("prepare_data", ["--data.data_dir=my images"]),
    ):
        assert "--data image_folder" in refused(script(name), given)
    test = ["test", "--ckpt_path", best]
    assert "--data image_folder --data_dir 'my images'" in refused(lightning_cli, [*test, "--data_dir", "my images"])
    assert re.search("airplane.*--data", refused(lightning_cli, [*test, "--data", "cifar10"]))


def test_what_torch_cannot_do_ends_in_one_message(
    best: str, tmp_path: Path, monkeypatch: Patch, refused: Refused
) -> None:
    def impossible(*_: Any) -> Tensor:
        if torch.are_deterministic_algorithms_enabled():
            return torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(LitClassifier, "training_step", impossible)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # Lightning sets it for good
    said = refused(train, [*FEW, "--run_dir", str(tmp_path / "full")], 1)
    assert "the memory of cpu is full with batches of 8 images" in said
    try:
        said = refused(train, [*FEW, "--trainer.deterministic", "true", "--run_dir", str(tmp_path / "exact")])
    finally:
        torch.use_deterministic_algorithms(False)
    assert "--trainer.deterministic warn goes on without" in said
    monkeypatch.setitem(LOSSES, "cross_entropy", lambda *_: torch.tensor(torch.nan))
    assert refused(lightning_cli, ["test", "--ckpt_path", best, *CPU], 1).startswith("error: The loss is nan")


# --- code of one's own ------------------------------------------------------------------------------------------------

PLACES = [(FashionMNISTSample, "__init__"), (FashionMNISTSample, "load"), (OwnNet, "__init__"), (OwnNet, "forward")]


@pytest.mark.parametrize("error", [ValueError, TypeError, RuntimeError, ZeroDivisionError])
@pytest.mark.parametrize(("owner", "method"), [*PLACES, (Witness, "__init__"), (Witness, "on_train_end")])
def test_an_error_in_ones_own_code_keeps_its_traceback(
    owner: type, method: str, error: type[Exception], tmp_path: Path, monkeypatch: Patch
) -> None:
    own = getattr(owner, method)

    @functools.wraps(own)
    def fails(self: Any, *args: Any, **options: Any) -> Any:
        if method == "forward" and not self.training:  # it is tried out before
            return own(self, *args, **options)
        raise error("of my own")

    monkeypatch.setitem(NETS, "own", OwnNet)
    monkeypatch.setattr(owner, method, fails)
    path = yaml_file(tmp_path, "trainer: {callbacks: {class_path: test_train.Witness}}")
    with pytest.raises(Exception, match="of my own") as caught:
        train([*FEW, "--net", "own", "--config", path, "--run_dir", str(tmp_path / "run")])
    shown = "".join(traceback.format_exception(caught.value))
    assert re.search(rf'test_messages.py", line \d+, in fails(.*\n)+{error.__name__}: of my own', shown)


def test_an_argument_that_ones_own_network_cannot_take_is_said_with_its_place(
    monkeypatch: Patch, refused: Refused
) -> None:
    class Net(OwnNet):
        def __init__(self, in_channels: int = 1, num_classes: int = 10, width: int = 4) -> None:
            raise ValueError("too wide")

    monkeypatch.setitem(NETS, "own", Net)
    said = refused(train, [*FAST, "--net", "own", "--model.net_args.width", "5"])
    assert re.search(r"net own cannot be built with .*5.*: too wide \(.*test_messages.py:\d+\)", said)


# --- how it is said ---------------------------------------------------------------------------------------------------


def test_a_tilde_is_ones_home_however_it_is_written(tmp_path: Path, monkeypatch: Patch) -> None:
    home, work, best = tmp_path / "home", tmp_path / "work", "~/by_yaml/checkpoints/best.ckpt"
    work.mkdir()
    monkeypatch.chdir(work)
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(home))
    images_in(home / "images", "cat", "dog")
    yaml_file(home, "{data: {class_path: ImageFolder, init_args: {data_dir: ~/images}}, run_dir: ~/by_yaml}")
    data = ["--data=image_folder", "--data_dir=~/images"]
    for words in (
        ["fit", *FEW, "--config=~/mine.yaml"],
        ["fit", *FEW, "--run_dir=~/by_word", *data, f"--weights={best}"],
        ["fit", "--resume=~/by_word", "--max_epochs", "2"],
        ["fit", "--resume", best, "--run_dir", "~/other", "--max_epochs", "2"],
        ["test", f"--ckpt_path={best}"],
        ["predict", f"--ckpt_path={best}", "--run_dir=~/predicted"],
    ):
        assert lightning_cli(words) == 0, words
    assert config_of(home / "by_word")["trainer"]["max_epochs"] == 2
    assert (home / "other" / "checkpoints" / "last.ckpt").exists()
    assert (home / "predicted" / "predictions.csv").exists()
    assert list(work.iterdir()) == []  # no folder called ~


def test_printed_commands_can_be_typed(tmp_path: Path, monkeypatch: Patch, capsys: Said) -> None:
    monkeypatch.chdir(tmp_path)
    assert train([*FEW, "--run_dir", "runs/my run"]) == 0
    commands = capsys.readouterr().out.partition("Next:")[2].strip().splitlines()
    for line, name in zip(commands[1:], ("evaluate", "export", "predict"), strict=True):
        assert shlex.split(line)[:3] == ["python", f"scripts/{name}.py", "runs/my run/checkpoints/best.ckpt"]
    with monkeypatch.context() as patch:
        patch.setattr(LitClassifier, "on_train_batch_end", lambda *_: signal.raise_signal(signal.SIGTERM))
        words = ["--trainer.limit_train_batches", "1", "--max_epochs", "3", "--run_dir", "runs/it's"]
        assert train([*FEW, *words]) == 143
    program, name, *words = shlex.split(capsys.readouterr().err.strip().partition("To continue: ")[2])
    assert (program, name) == ("python", "scripts/train.py")
    assert train(words) == 0


@pytest.mark.posix
def test_a_user_without_home_or_name_can_train(command: Command, monkeypatch: Patch, tmp_path: Path) -> None:
    for variable in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", "LIT_NN_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    data = ["--data", "image_folder", "--data_dir", str(images_in(tmp_path / "images", "cat", "dog"))]
    nobody = "import pwd; pwd.getpwuid = pwd.getpwnam = {}.__getitem__"  # as in a container with --user 12345
    done = command(*patched(nobody), *FEW, *data, "--run_dir", "run")
    assert done.returncode == 0, done.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("out", "err"), [(Terminal, Terminal), (io.StringIO, Terminal), (io.StringIO, io.StringIO)])
def test_an_error_stands_on_a_line_of_its_own(
    out: type[io.StringIO], err: type[io.StringIO], tmp_path: Path, monkeypatch: Patch
) -> None:
    """On a terminal below the bar, elsewhere below a line for each epoch."""

    def training_step(self: LitClassifier, batch: Any, batch_idx: int) -> Tensor:
        return step(self, batch, batch_idx) * (torch.nan if self.current_epoch == 2 else 1)

    step = LitClassifier.training_step
    monkeypatch.setattr(LitClassifier, "training_step", training_step)
    streams = out(), err()
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        monkeypatch.setattr(sys, name, stream)
    words = ["--trainer.logger", "false", "--max_epochs", "3", "--trainer.limit_train_batches", "30"]
    assert train([*STEPS, *words, "--run_dir", str(tmp_path / "run")]) == 1
    shown, said = (stream.getvalue() for stream in streams)
    assert re.fullmatch(r"error: The loss is nan.*", said.splitlines()[-1])
    assert ("\r" in shown + said) == (out is Terminal)
    epochs = re.findall(r"^epoch (\d) of 3: train_loss .*, val_loss .*, val_acc [\d.]+$", shown + said, re.MULTILINE)
    assert epochs == ([] if out is Terminal else ["1", "2"])


def test_any_name_can_be_printed_in_any_encoding(best: str, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")  # Windows, with the output in a file
    images_in(tmp_path / "bilder 猫", "猫", "dog")
    prepare = ["--data", "image_folder", "--data_dir", "bilder 猫"]
    for name, words, status in (("prepare_data", prepare, 0), ("predict", [best, "bilder 猫", "fehlt 猫"], 1)):
        for stream in ("stdout", "stderr"):
            monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), "cp1252", write_through=True))
        assert script(name)(words) == status
        assert b"\\u732b" in sys.stdout.buffer.getvalue()  # type: ignore[union-attr]


def test_an_interrupted_command_says_so_and_no_more(capsys: Said) -> None:
    @console.command
    def interrupted(words: list[str]) -> None:
        raise KeyboardInterrupt

    assert interrupted([]) == 130
    assert capsys.readouterr().err.strip() == "Interrupted."
