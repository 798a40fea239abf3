"""Finished runs side by side: mean and spread over seeds, what differs in their configurations, and their curves."""

import csv
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lit_nn.choices import flat
from lit_nn.commands import CommandParser, check_picture, command, print_table

CURVES = (("val_acc", "validation accuracy"), ("val_loss", "validation loss"), ("train_loss", "training loss"))
NUMBERS = {  # of result.json, and how they are written, by the column
    "test accuracy": ("test_acc", ".2%"),
    "test loss": ("test_loss", ".4f"),
    "val accuracy": ("val_acc", ".2%"),
    "parameters": ("num_params", ",.0f"),
    "epochs": ("epochs", ".4g"),
    "seconds": ("seconds", ".1f"),
}
LONGEST_NAME = 40  # letters up to which the names of experiments stand in the table
BESIDE = 4  # experiments beside each other in the table of what differs
MOST_CURVES = 10  # experiments in the plot, the best ones: as many as there are colours


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        result: What result.json says of it: "net", "data", and `NUMBERS`.
        config: Its config.yaml, without the seed, by dotted names.
        curves: Its metrics.csv: for each column the epochs that have a number, counted from 1, and the numbers.
    """

    result: dict[str, Any]
    config: dict[str, Any]
    curves: dict[str, tuple[list[int], list[float]]]


@dataclass(frozen=True)
class Experiment:
    """Runs that differ in nothing but the seed.

    Attributes:
        options: What sets it apart from the other experiments, by the options' dotted names.
        runs: At least one.
    """

    options: dict[str, Any]
    runs: list[Run]

    @property
    def name(self) -> str:
        """What sets it apart, in one line; the network and the data set where nothing does."""
        result = self.runs[0].result
        pairs = [f"{option.rpartition('.')[2]} {value}" for option, value in self.options.items()]
        return ", ".join(pairs) or f"{result['net']} on {result['data']}"

    def mean(self, number: str) -> float:
        """Mean over the runs of a number of result.json."""
        return statistics.mean(run.result[number] for run in self.runs)

    def spread(self, number: str, form: str) -> str:
        """The mean and, of two values or more that differ, their standard deviation, as text."""
        values = [run.result[number] for run in self.runs]
        text = f"{self.mean(number):{form}}"
        return f"{text} ± {statistics.stdev(values):{form}}" if len(set(values)) > 1 else text


def find_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Read all finished runs in some folders and the folders within them.

    Args:
        folders: For instance runs/, runs/fashion_mnist-lenet/ or a run itself.

    Returns:
        The runs, in the order of their folders' names, and what cannot be compared, with the reason.
    """
    runs: dict[Path, Run] = {}
    problems = []
    for folder in folders:
        found = sorted({path.parent for name in ("config.yaml", "result.json") for path in folder.rglob(name)})
        if not found:
            problems.append(
                f"{folder}: no run in it (a run's folder holds config.yaml and, when it is done, result.json)"
            )
        for place in found:
            run = _read(place)
            if isinstance(run, Run):
                runs[place.resolve()] = run
            else:
                problems.append(f"{place}: {run}")
    return list(runs.values()), problems


def _read(folder: Path) -> Run | str:
    """A run, or why it cannot be compared."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        config = dict(flat(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))))
        with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        curves = {}
        for name, _ in CURVES:
            known = [row for row in rows if row[name] != ""]
            curves[name] = [int(row["epoch"]) + 1 for row in known], [float(row[name]) for row in known]
        result = {name: result[name] for name in ("net", "data", *(number for number, _ in NUMBERS.values()))}
    except FileNotFoundError as error:
        return f"not a finished run, {Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        return f"cannot be read: {type(error).__name__} {' '.join(str(error).split())}"
    seeds = ("seed_everything", "seed")
    return Run(result, {name: v for name, v in config.items() if name.rpartition(".")[2] not in seeds}, curves)


def experiments(runs: Sequence[Run]) -> list[Experiment]:
    """Put runs together that differ in nothing but the seed; the best experiment comes first.

    Args:
        runs: Finished runs.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.config, sort_keys=True, default=str), []).append(run)
    options = list(dict.fromkeys(option for run in runs for option in run.config))
    differing = [o for o in options if len({str(group[0].config.get(o)) for group in groups.values()}) > 1]
    found = []
    for group in groups.values():
        config = group[0].config | {"data.class_path": group[0].result["data"]}  # the name that --data takes
        names = {option: option.removesuffix(".class_path").replace(".init_args", "") for option in differing}
        found.append(Experiment({name: config[option] for option, name in names.items() if option in config}, group))
    return sorted(found, key=lambda experiment: -experiment.mean("test_acc"))


def _curves_figure(found: Sequence[Experiment]) -> Figure:
    """Accuracy and losses over the epochs: a colour for each of the first experiments, a line for each run."""
    figure = Figure((15, 5 + 0.25 * min(len(found), MOST_CURVES)), 110, layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(CURVES)), CURVES, strict=True):
        for number, experiment in enumerate(found[:MOST_CURVES]):
            for position, run in enumerate(experiment.runs):
                epochs, values = run.curves[name]
                axes.plot(
                    epochs,
                    values,
                    color=f"C{number}",
                    marker="." if len(epochs) < 30 else "",
                    linewidth=1.2,
                    alpha=0.8,
                    label=f"{experiment.name} ({len(experiment.runs)})" if position == 0 else None,
                )
        axes.set_title(label)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if name.endswith("acc"):
            axes.yaxis.set_major_formatter(PercentFormatter(1))
    handles, labels = axes.get_legend_handles_labels()
    shown = f"the best {MOST_CURVES} of {len(found)} experiments" if len(found) > MOST_CURVES else "experiment"
    legend = figure.legend(handles, labels, loc="outside lower center", title=f"{shown} (runs)", fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


@command
def main(words: list[str]) -> None:
    """Compare runs: ``python scripts/compare.py``."""
    parser = CommandParser("compare", "Compare finished runs; those that differ in the seed only count as one.")
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="runs, or folders with runs in them")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("comparison.png"),
        metavar="FILE",
        help="picture of the curves [comparison.png]",
    )
    options = parser.parse_args(words)
    check_picture("--output", options.output)
    runs, problems = find_runs(options.folders)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not runs:
        raise OSError("nothing to compare: name folders of finished runs, for instance runs/*")
    found = experiments(runs)
    same = {name: {run.result[name] for run in runs} for name in ("net", "data")}
    common = [f"{name} {values.pop()}" for name, values in same.items() if len(values) == 1]
    all_with = f", all with {' and '.join(common)}" if common else ""
    print(f"{len(runs)} runs{all_with}; ± is the standard deviation")
    names = [experiment.name for experiment in found]
    if max(map(len, names)) > LONGEST_NAME:
        names = [str(number) for number in range(1, len(found) + 1)]
        differing = list(dict.fromkeys(option for experiment in found for option in experiment.options))
        for start in range(0, len(found), BESIDE):
            beside = slice(start, start + BESIDE)
            cells = [[option, *(str(e.options.get(option, "")) for e in found[beside])] for option in differing]
            print_table(["experiment", *names[beside]], cells)
    rows = [
        [name, str(len(e.runs)), *(e.spread(number, form) for number, form in NUMBERS.values())]
        for name, e in zip(names, found, strict=True)
    ]
    print_table(["experiment", "runs", *NUMBERS], rows, right=["runs", *NUMBERS])
    _curves_figure(found).savefig(options.output)
    print(f"Curves: {options.output}")
