"""Compare finished runs: what differs in their options, numbers, and curves; --help lists the options."""

import csv
import glob
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from lit_nn.engine.configuration import flat
from lit_nn.engine.console import CommandParser, check_figure, command, print_table

CURVES = ("val_acc", "val_loss", "train_loss")
FORMS = {"test_map": ".2%", "test_acc": ".2%", "test_loss": ".4f", "val_acc": ".2%", "num_params": ","}
FORMS |= {"epochs": ".4g", "seconds": ".1f"}


def read_run(folder: Path) -> dict[str, Any]:
    """Read the options, curves and numbers of a finished run; an error of any kind says why it is none."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    config = flat(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    one_of_many = ("data.class_path", "data.init_args.fold")  # folds and seeds repeat one configuration
    options = {"data": result["data"]} | {n: str(v) for n, v in config if "seed" not in n and n not in one_of_many}
    rows = [*csv.DictReader((folder / "metrics.csv").read_text(encoding="utf-8").splitlines())]
    curves = {name: {int(row["epoch"]) + 1: float(row[name]) for row in rows if row[name]} for name in CURVES}
    numbers = {name: result[name] for name in FORMS if name in result or name != "test_map"}  # of several labels only
    return {"folder": folder, "options": options, "numbers": numbers, **curves}


def spread(runs: list[dict[str, Any]], name: str) -> str:
    """Mean of a number and, where it differs, its standard deviation."""
    values = [run["numbers"][name] for run in runs]
    return " ± ".join(f"{of(values):{FORMS[name]}}" for of in (statistics.mean, statistics.stdev)[: len({*values})])


@command
def main(words: list[str]) -> None:
    parser = CommandParser("compare", "Compare finished runs; those that differ in seed or fold only count as one.")
    parser.add_argument("folders", nargs="+", metavar="DIR", help="runs, folders with runs in them, or patterns")
    parser.add_argument("--output", type=Path, default="comparison.png", metavar="FILE", help="curves [comparison.png]")
    options = parser.parse_args(words)
    check_figure("--output", options.output)
    found: dict[Path, dict[str, Any]] = {}
    for given in options.folders:
        inside = glob.glob(f"{given}/**/config.yaml", recursive=True)  # noqa: PTH207 (a pattern of any kind)
        for folder in [Path(path).parent for path in inside] or [Path(given)]:
            try:
                found[folder.resolve()] = read_run(folder)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
                print(f"{folder} is not a finished run ({type(error).__name__}: {error})", file=sys.stderr)
    if not found:
        parser.error("nothing to compare: name folders of finished runs, for instance runs/*")
    forms = [name for name in FORMS if all(name in run["numbers"] for run in found.values())]
    runs = sorted(found.values(), key=lambda run: (-run["numbers"][forms[0]], run["folder"]))
    names = dict.fromkeys(name for run in runs for name in run["options"])
    differing = [name for name in names if len({run["options"].get(name) for run in runs}) > 1]
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        label = "\n".join(f"{name.rpartition('.')[2]} {run['options'].get(name, '-')}" for name in differing)
        groups.setdefault(label or "the seed or fold", []).append(run)
    rows = [[label, str(len(same)), *(spread(same, name) for name in forms)] for label, same in groups.items()]
    print_table(["what differs", "runs", *forms], rows, right=["runs", *forms], title="± is the standard deviation")
    figure = Figure((15, 6), 110, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(CURVES)), CURVES, strict=True):
        for number, (label, same) in enumerate([*groups.items()][:10]):  # as many as there are colours
            lines = [axes.plot([*run[name]], [*run[name].values()], f"C{number}.-")[0] for run in same]
            lines[0].set_label(label)
        axes.set(title=name, xlabel="epoch")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize=9)
    figure.savefig(options.output)
    print(f"Curves: {options.output}. The best run: {runs[0]['folder']}")


if __name__ == "__main__":
    sys.exit(main())
