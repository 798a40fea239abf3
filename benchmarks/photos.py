"""Which fit, which augmentation, how much they bring on a few photographs: validation accuracy, several seeds each.

    python benchmarks/photos.py FOLDER [--weights FILE] [--seeds 0 1 2] [--epochs 6]

FOLDER has one folder of images for each class. The fits are compared on kept features (photos_minute), which takes a
minute each; the augmentations by fine-tuning (photos_best), which takes hours. Further options go to scripts/train.py,
for instance --model.net_args.input_size 128, which takes less than half the time.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from measure import machine, table
from time_to_accuracy import ROOT, train

AUGMENTATIONS = [
    *("none", "flip", "flip,translate", "crop,flip", "crop,flip,color", "crop,flip,trivial", "crop,flip,trivial,erase"),
    *("flip,brightness_contrast", "flip,vertical_flip,quarter_turn,brightness_contrast"),
]


def main() -> None:
    """Train with every way and seed, then print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--weights", default="default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", default="6", help="of fine-tuning")
    parser.add_argument("--fit", nargs="*", default=["crop", "pad", "squash"])
    parser.add_argument("--augment", nargs="*", default=AUGMENTATIONS)
    options, further = parser.parse_known_args()
    ways = [("photos_minute", ["--fit", fit]) for fit in options.fit]
    ways += [("photos_best", ["--augment", names, "--max_epochs", options.epochs]) for names in options.augment]
    rows = []
    for recipe, words in ways:
        accuracies, seconds = [], []
        for seed in options.seeds:
            line = [*words, "--data_dir", options.folder, "--weights", options.weights, *further]
            with tempfile.TemporaryDirectory() as folder:
                result, _ = train(ROOT / "configs" / f"{recipe}.yaml", seed, Path(folder) / "run", line)
            print(f"{recipe} {' '.join(words)}, seed {seed}: {json.dumps(result)}", file=sys.stderr)
            accuracies.append(100 * result["val_acc"])
            seconds.append(result["seconds"])
        spread = f"{min(accuracies):.1f} to {max(accuracies):.1f}"
        name = f"{recipe} {' '.join(words)}"
        rows.append([name, f"{statistics.mean(accuracies):.1f} %", spread, f"{statistics.median(seconds):.0f} s"])
    print(table(["way", f"validation accuracy, mean of {len(options.seeds)} seeds", "from, to", "median"], rows))
    print(machine())


if __name__ == "__main__":
    main()
