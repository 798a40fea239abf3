"""Find images whose labels are probably wrong; --help lists the options, docs/wrong_labels.md says what comes out.

All images are cut into folds, and each fold is judged by a model that was trained on the others. Such a training is
one of scripts/train.py, in RUN_DIR/fold-K. After a kill the same command goes on where it was.
"""

import json
import shlex
import statistics
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from data_modules.errors import some
from data_modules.files import atomic_path
from data_modules.images.decode import digest
from lit_nn.engine.console import CommandParser, command, print_table
from lit_nn.engine.flags import to_dotted
from lit_nn.errors import Ended


def begin(words: list[str], folds: int, folder: Path) -> Any:
    """Build the first of the trainings; UsageError if it, or going on in the folder, could judge no labels."""
    from lit_nn.engine.cli import LitCLI  # only now: it imports Lightning, which takes seconds
    from lit_nn.engine.configuration import plain_options
    from lit_nn.engine.option_checks import refuse

    given = [word.partition("=")[0] for word in to_dotted(words)[1]]
    for name in ("--data.folds", "--data.fold", "--ckpt_path"):
        refuse(name in given, f"{name} is chosen here; give --folds and --run_dir only")
    cli = LitCLI("fit", [*words, f"--data.folds={folds}", "--data.fold=1"], tests=True)
    refuse(cli.run_dir is None, "--fast_dev_run trains nothing that could judge; leave it out")
    refuse(cli.trainer.world_size > 1, "labels are checked by one process; give --devices 1")
    data = cli.datamodule
    labels, names = data.split("train")[1], data.class_names
    refuse(labels.ndim > 1, "images with several labels each cannot be checked, only those with one")
    counts = labels.bincount(minlength=len(names)).tolist()
    few = some(f"{name} {count}" for name, count in zip(names, counts, strict=True) if count < folds)
    refuse(few, f"classes with fewer images than the {folds} folds: {few}; give a smaller --folds, or more images")
    path = folder / "check.json"
    check = {"options": plain_options(cli.parser, cli.config), "images": fingerprint(data)}
    other = path.exists() and json.loads(path.read_text(encoding="utf-8")) != check
    refuse(other, f"{folder} holds a check with other options or of other images; give another --run_dir")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(check), encoding="utf-8")
    return cli


def fingerprint(data: Any) -> int:
    """Of the images, whatever fold they are in: what is said of them, and their contents."""
    parts = data.parts()
    contents = sorted(
        tuple(marks) for part in {"train", "val", "test"} & parts.keys() for marks in parts[part].tolist()
    )
    return digest(repr((data.described(), data.split("train")[1].tolist(), contents)).encode())


def train(run: Path, words: list[str], images: int) -> None:
    """Train a fold, or go on with it, and keep what its best checkpoint says of images it was not trained on."""
    from lit_nn.engine.cli import LitCLI
    from lit_nn.engine.option_checks import refuse
    from lit_nn.engine.run import calibrate_best, logits_of, running, test_best

    if (run / "config.yaml").exists():  # it has begun
        (run / "result.json").unlink(missing_ok=True)  # it ended, but for the answers
        words = ["--config", str(run / "config.yaml"), "--resume", str(run)]
    cli = LitCLI("fit", [*words, "--run_dir", str(run)], tests=True)
    refuse(fingerprint(cli.datamodule) != images, "the images are others than when the check began; begin another one")
    with running(cli):
        try:
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config.ckpt_path)
        except Ended as end:  # by a signal, or because the loss is no number
            goes_on = "Stopped. What was under way is saved. To go on, type the same command again"
            raise Ended(goes_on, end.exit_status) if end.exit_status > 128 else end from None
        test_best(cli, calibrate_best(cli))
    shares = cli.model.probabilities(logits_of(cli, cli.model, "test")[0])
    with atomic_path(run / "answers.npz") as path:
        np.savez(path, rows=cli.datamodule.split("test")[2].numpy(), shares=shares.numpy())


@command
def main(words: list[str]) -> None:
    """Train the folds that are not trained yet; write and print what their models think of the labels."""
    parser = CommandParser("check_labels", "Find images whose labels are probably wrong.")
    parser.epilog = "Every other OPTION is one of scripts/train.py: --data image_folder --data_dir my_pictures"
    parser.add_argument("--folds", type=int, default=5, metavar="K", help="each judged by a training on the rest [5]")
    parser.add_argument("--run_dir", type=Path, default="runs/labels", metavar="DIR", help="folder [runs/labels]")
    options, rest = parser.parse_known_args(words)
    folds, folder = options.folds, options.run_dir
    cli = begin(rest, folds, folder)
    data, accuracies = cli.datamodule, list[float]()
    labels, images = data.split("train")[1].numpy(), fingerprint(data)
    shares, fold_of = np.zeros((len(labels), len(data.class_names))), np.zeros(len(labels), np.int64)
    fixed = [*rest, f"--seed={cli.config.seed_everything}", f"--data.folds={folds}"]
    for fold in range(1, folds + 1):
        run = folder / f"fold-{fold}"
        if not (run / "answers.npz").exists():
            with run.with_suffix(".txt").open("a", encoding="utf-8") as log, redirect_stdout(log):
                train(run, [*fixed, f"--data.fold={fold}"], images)
        with np.load(run / "answers.npz") as answers:
            rows = answers["rows"]
            shares[rows], fold_of[rows] = answers["shares"], fold
        accuracies.append(float((shares[rows].argmax(1) == labels[rows]).mean()))
        print(f"[{fold}/{folds}] accuracy {accuracies[-1]:.2%} on {len(rows):,} images", flush=True)
    from lit_nn.trained.wrong_labels import write_findings

    rows = np.flatnonzero(fold_of)  # without those that cannot be read
    table, wrong, near = write_findings(data, rows, shares[rows], fold_of[rows], folder)
    print_table(["file", "given", "likely", "score", "fold"], table[:10], ["score"], "The least believed labels")
    spread = f"{statistics.mean(accuracies):.2%} ± {statistics.stdev(accuracies):.2%}"
    print(f"Cross-validated accuracy {spread} ({folds} folds, {min(accuracies):.2%} to {max(accuracies):.2%})")
    print(f"{wrong:,} of {len(rows):,} labels are probably wrong, the first rows of {folder / 'labels.csv'}")
    print(f"Look at {folder / 'worst.png'}, and at {near:,} pairs of images in {folder / 'near_copies.csv'}")
    if (corrected := folder / "corrected.csv").exists():
        print(f"Labels changed in {corrected}: {wrong:,}. Change there what you see otherwise, then train from it:")
        print(f"  python scripts/train.py --data image_table --data.table {shlex.quote(str(corrected))}")


if __name__ == "__main__":
    sys.exit(main())
