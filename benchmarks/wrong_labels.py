"""How many wrong labels scripts/check_labels.py finds: 5 % of a folder's labels are planted wrong, several seeds each.

    python benchmarks/wrong_labels.py FOLDER [--seeds 0 1] [--share 0.05]

FOLDER has one folder of images for each class. Further options go to scripts/check_labels.py, for instance
--config configs/photos_minute.yaml --weights FILE.
"""

import argparse
import csv
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import machine, table
from time_to_accuracy import ROOT

from data_modules.images.decode import image_paths


def main() -> None:
    """Plant, check, count, then print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--share", type=float, default=0.05)
    options, further = parser.parse_known_args()
    files = list(image_paths(options.folder.absolute(), print))
    names = sorted({Path(file).parent.name for file in files})
    counted = []
    for seed in options.seeds:
        random.seed(seed)
        planted = set(random.sample(files, round(options.share * len(files))))
        labels = {file: Path(file).parent.name for file in files}
        labels |= {file: random.choice([name for name in names if name != labels[file]]) for file in sorted(planted)}
        with tempfile.TemporaryDirectory() as folder:
            (given := Path(folder) / "given.csv").write_text("file,label\n", encoding="utf-8")
            with given.open("a", encoding="utf-8", newline="") as stream:
                csv.writer(stream).writerows(labels.items())
            words = ["--data", "image_table", "--data.table", str(given), "--run_dir", f"{folder}/check", *further]
            start = time.perf_counter()
            subprocess.run([sys.executable, ROOT / "scripts" / "check_labels.py", *words], check=True)
            seconds = time.perf_counter() - start
            with Path(folder, "check", "labels.csv").open(encoding="utf-8", newline="") as stream:
                found = [(row["file"] in planted, float(row["score"]) < 0.05) for row in csv.DictReader(stream)]
        firsts = [sum(wrong for wrong, _ in found[: int(part * len(found))]) for part in (0.05, 0.1)]
        below = [wrong for wrong, is_low in found if is_low]
        shares = [
            *(f"{first / len(planted):.0%}" for first in firsts),
            len(below),
            f"{sum(below) / max(len(below), 1):.0%}",
        ]
        counted.append([seed, len(planted), *shares, f"{seconds:.0f} s"])
    header = ["seed", "planted", "in the first 5 %", "first 10 %", "below 0.05", "of these planted", "it took"]
    print(table(header, counted))
    print(machine())


if __name__ == "__main__":
    main()
