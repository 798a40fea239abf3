"""How long one waits for a command: seconds of whole processes, beside the imports that they cannot do without.

    python benchmarks/startup.py [--rounds 9]

All take turns. LeNet on the embedded sample, in a folder that is thrown away.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from measure import machine, median_ratio, table, take_turns

ROOT = Path(__file__).parents[1]
IMPORT = "import lightning.pytorch"
COMMANDS = {
    "import torch": ["-c", "import torch"],
    IMPORT: ["-c", IMPORT],
    "predict.py best.onnx": ["scripts/predict.py", "best.onnx", "docs/images/boot.png"],
    "predict.py best.ckpt": ["scripts/predict.py", "best.ckpt", "docs/images/boot.png"],
    "inspect_model.py --net lenet": ["scripts/inspect_model.py", "--net", "lenet"],
    "evaluate.py best.ckpt": ["scripts/evaluate.py", "best.ckpt"],
    "export.py best.ckpt": ["scripts/export.py", "best.ckpt"],
    "prepare_data.py": ["scripts/prepare_data.py"],
    "train.py --fast_dev_run": ["scripts/train.py", "--fast_dev_run"],
}


def run(words: list[str], folder: str) -> None:
    """Run a Python command line in a folder; the paths of the project are made whole."""
    words = [str(ROOT / word) if word.startswith(("scripts/", "docs/")) else word for word in words]
    subprocess.run([sys.executable, *words], cwd=folder, check=True, capture_output=True)


def main() -> None:
    """Train once, then let all commands take turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        run(["scripts/train.py", "--max_epochs", "1", "--run_dir", "run"], folder)
        (Path(folder) / "run" / "checkpoints" / "best.ckpt").rename(Path(folder) / "best.ckpt")
        run(["scripts/export.py", "best.ckpt"], folder)
        seconds = take_turns({name: partial(run, words, folder) for name, words in COMMANDS.items()}, rounds)
    rows = []
    for name, values in seconds.items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        rows.append(
            [f"`{name}`", f"{statistics.median(values):.2f} s", spread, f"{median_ratio(values, seconds[IMPORT]):.2f}"]
        )
    print("## From the command to its end\n")
    print(f"`python benchmarks/startup.py --rounds {rounds}`, alternating; {machine()}.\n")
    print(table(["command", f"median, n = {rounds}", "least to most", f"times `{IMPORT}`"], rows))


if __name__ == "__main__":
    main()
