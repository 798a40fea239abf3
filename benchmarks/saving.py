"""What saving costs: for every epoch of a training, the seconds of its saves as a share of its own.

    python benchmarks/saving.py --data fashion_mnist --data_dir FOLDER --max_epochs 6

takes the options of scripts/train.py.
"""

import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lit_nn.engine.callbacks import Checkpoints
from lit_nn.engine.cli import LitCLI
from lit_nn.engine.console import command
from lit_nn.engine.run import running

saves: list[tuple[float, float]] = []  # of every one, when it was over and how long it took, in seconds
save = Checkpoints._save


def timed(self: Checkpoints, *args: Any, **kwargs: Any) -> None:
    """Save, and note the time."""
    began = time.perf_counter()
    save(self, *args, **kwargs)
    ended = time.perf_counter()
    saves.append((ended, ended - began))


@command
def main(words: list[str]) -> None:
    """Train, then print the shares; the first epoch, which has no save before it, is left out."""
    Checkpoints._save = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        cli = LitCLI("fit", [*words, "--run_dir", str(Path(folder) / "run")])
        with running(cli):
            cli.trainer.fit(cli.model, cli.datamodule)
        size = (Path(folder) / "run" / "checkpoints" / "last.ckpt").stat().st_size
    shares = []
    for (before, _), (after, seconds) in itertools.pairwise(saves):
        shares.append(seconds / (after - before))
        print(f"epoch of {after - before:.2f} s, saving {1000 * seconds:.1f} ms: {shares[-1]:.2%}")
    print(
        f"n = {len(shares)}, median {statistics.median(shares):.2%}, most {max(shares):.2%}; a file has {size:,} bytes"
    )


if __name__ == "__main__":
    sys.exit(main())
