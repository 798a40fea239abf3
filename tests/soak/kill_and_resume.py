"""Kill a training again and again at random moments, many of them inside a save, and compare its end with a quiet one.

    python tests/soak/kill_and_resume.py --folder EMPTY --kills 100

Saves after every step, and the network is large and its steps are short, so that most of the time is spent in saving.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from resume_runs import differences

TRAIN = Path(__file__).parent.parent.parent / "scripts" / "train.py"
WORDS = [
    *("--net", "mlp", "--accelerator", "cpu", "--batch_size", "16", "--augment", "flip,mixup", "--ema", "0.99"),
    *("--max_epochs", "3", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"),
]


def start(*words: str) -> "subprocess.Popen[str]":
    """Start a training that saves after every step."""
    line = [sys.executable, str(TRAIN), "--save_every_steps", "1", *words]
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(line, text=True, start_new_session=True, **pipes)


def saved(last: Path) -> float:
    """When a checkpoint was saved, 0 if none was."""
    return last.stat().st_mtime if last.exists() else 0.0


def main() -> int:
    """Do what the head of this file says; returns 1 if anything is different in the end."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder")
    parser.add_argument("words", nargs="*", help="after --: further words of the training")
    options = parser.parse_args()
    words = [*WORDS, *options.words]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    random.seed(0)
    quiet, killed = options.folder / "quiet", options.folder / "killed"
    last, inside = killed / "checkpoints" / "last.ckpt", 0
    finished = start(*words, "--run_dir", str(quiet)).communicate()[1]
    process = start(*words, "--run_dir", str(killed))
    for kill in range(options.kills):
        before, at_start = saved(last), random.random() < 0.1  # while it still starts, or between two steps
        while not at_start and process.poll() is None and saved(last) == before:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 3 if at_start else 1))
        if process.poll() is not None:
            print(f"The training was over after {kill} kills.")
            break
        os.killpg(process.pid, signal.SIGKILL)  # the other processes of the run and its workers too
        process.communicate()
        leftover = sorted(path.name for path in last.parent.glob("*.part.ckpt"))
        inside += bool(leftover)
        print(f"kill {kill + 1} left {leftover or 'nothing'}", flush=True)
        process = start("--resume", str(killed))
    said = process.communicate()[1]
    assert process.returncode == 0, finished + said
    found = differences(quiet, killed)
    print(f"{inside} kills were inside a save. Different in the end: {found or 'nothing'}")
    return 1 if found or not (inside or options.words) else 0


if __name__ == "__main__":
    sys.exit(main())
