"""What a recipe reaches and how long it takes: trains it with several seeds and prints the first lines of its YAML.

    python benchmarks/time_to_accuracy.py configs/fashion_mnist_lenet.yaml [--seeds 42 1 2] [--target 0.92]

Further options go to scripts/train.py, for instance --data_dir FOLDER.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import machine

ROOT = Path(__file__).parents[1]


def train(config: Path, seed: int, run_dir: Path, options: list[str]) -> tuple[dict[str, Any], list[float]]:
    """Train a recipe with one seed.

    Returns:
        What is in its result.json, and the validation accuracy after each epoch, nan where it had none.
    """
    line = [sys.executable, ROOT / "scripts" / "train.py", "--config", config, "--seed", str(seed)]
    subprocess.run([*line, "--run_dir", run_dir, *options], check=True, stdout=sys.stderr)
    with (run_dir / "metrics.csv").open(newline="") as file:
        val_accs = [float(row["val_acc"] or "nan") for row in csv.DictReader(file)]
    return json.loads((run_dir / "result.json").read_text()), val_accs


def main() -> None:
    """Train with every seed, then print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="the recipe")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 1, 2])
    parser.add_argument("--target", type=float, help="validation accuracy whose time is asked for, 0 to 1")
    options, further = parser.parse_known_args()
    results, to_target = [], []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            result, val_accs = train(options.config, seed, Path(folder) / "run", further)
        print(f"seed {seed}: {json.dumps(result)}", file=sys.stderr)
        results.append(result)
        reached = [epoch for epoch, val_acc in enumerate(val_accs, 1) if val_acc >= (options.target or 0)]
        to_target.append(result["seconds"] * reached[0] / result["epochs"] if reached else None)
    test, val = ([100 * result[name] for result in results] for name in ("test_acc", "val_acc"))
    seconds = statistics.median(result["seconds"] for result in results)
    print(
        f"# Test accuracy {statistics.mean(test):.2f} % (n = {len(test)}, {min(test):.2f} to {max(test):.2f}), "
        f"validation {statistics.mean(val):.2f} %, {results[0]['num_params']:,} parameters,"
    )
    print(f"# {results[0]['epochs']} epochs in {seconds:.0f} s (median) on {machine()}.")
    seeds = " ".join(str(seed) for seed in options.seeds)
    print(f"# Measured with: python benchmarks/time_to_accuracy.py {options.config} --seeds {seeds}")
    if options.target:
        times = ", ".join("never" if time is None else f"{time:.0f} s" for time in to_target)
        print(f"# Validation accuracy {options.target:.1%} after {times}")


if __name__ == "__main__":
    main()
