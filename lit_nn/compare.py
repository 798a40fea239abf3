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

from lit_nn.commands import CommandParser, command

CURVES = (("val_acc", "validation accuracy"), ("val_loss", "validation loss"), ("train_loss", "training loss"))
RESULTS = ("net", "data", "test_acc", "test_loss", "val_acc", "num_params", "epochs", "seconds")  # of result.json
MOST_CURVES = 10  # experiments in the plot, the best ones: as many as there are colours


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        result: What result.json says of it, see `RESULTS`.
        config: Its config.yaml, without the seed, by dotted names.
        curves: Its metrics.csv: a list of numbers for each column, one number for each epoch.
    """

    result: dict[str, Any]
    config: dict[str, Any]
    curves: dict[str, list[float]]


@dataclass(frozen=True)
class Experiment:
    """Runs that differ in nothing but the seed.

    Attributes:
        runs: At least one.
        differences: What sets it apart from the other experiments, by dotted names.
    """

    runs: list[Run]
    differences: dict[str, Any]

    @property
    def name(self) -> str:
        """The differences in one line; the network and the data set where there are none."""
        short = {name.rpartition(".")[2]: value for name, value in self.differences.items()}
        result = self.runs[0].result
        return ", ".join(f"{name} {value}" for name, value in short.items()) or f"{result['net']} on {result['data']}"

    def values(self, name: str) -> list[float]:
        """A number of result.json, of each run."""
        return [run.result[name] for run in self.runs]


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
        config = _flat(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
        with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        curves = {name: [float(row[name]) for row in rows] for name in ("epoch", *(curve for curve, _ in CURVES))}
        result = {name: result[name] for name in RESULTS}
    except FileNotFoundError as error:
        return f"not a finished run, {Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        return f"cannot be read: {type(error).__name__} {' '.join(str(error).split())}"
    seeds = ("seed_everything", "seed")
    return Run(result, {name: v for name, v in config.items() if name.rpartition(".")[2] not in seeds}, curves)


def _flat(value: Any, place: str = "") -> dict[str, Any]:
    """Nested options by dotted names."""
    if not isinstance(value, dict):
        return {place: value}
    return {
        name: item for key, inner in value.items() for name, item in _flat(inner, f"{place}.{key}".strip(".")).items()
    }


def experiments(runs: Sequence[Run]) -> list[Experiment]:
    """Put runs together that differ in nothing but the seed; the best experiment comes first.

    Args:
        runs: Finished runs.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.config, sort_keys=True, default=str), []).append(run)
    names = list(dict.fromkeys(name for run in runs for name in run.config))
    differing = [name for name in names if len({str(group[0].config.get(name)) for group in groups.values()}) > 1]
    found = [Experiment(group, {name: group[0].config.get(name) for name in differing}) for group in groups.values()]
    return sorted(found, key=lambda experiment: -statistics.mean(experiment.values("test_acc")))


def _table(found: Sequence[Experiment]) -> str:
    """The experiments as text, a line for each."""
    rows = [["experiment", "runs", "test accuracy", "test loss", "val accuracy", "parameters", "epochs", "seconds"]]
    rows += [
        [
            experiment.name,
            str(len(experiment.runs)),
            _spread(experiment.values("test_acc"), ".2%"),
            _spread(experiment.values("test_loss"), ".4f"),
            _spread(experiment.values("val_acc"), ".2%"),
            f"{experiment.runs[0].result['num_params']:,}",
            _spread(experiment.values("epochs"), ".4g"),
            _spread(experiment.values("seconds"), ".1f"),
        ]
        for experiment in found
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))] for row in rows
    ]
    return "\n".join("  ".join(line) for line in lines)


def _spread(values: list[float], form: str) -> str:
    """Mean and, of two values or more that differ, their standard deviation."""
    text = f"{statistics.mean(values):{form}}"
    return f"{text} ± {statistics.stdev(values):{form}}" if len(set(values)) > 1 else text


def _curves_figure(found: Sequence[Experiment]) -> Figure:
    """Accuracy and losses over the epochs: a colour for each of the first experiments, a line for each run."""
    figure = Figure((15, 5 + 0.25 * min(len(found), MOST_CURVES)), 110, layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(CURVES)), CURVES, strict=True):
        for number, experiment in enumerate(found[:MOST_CURVES]):
            for position, run in enumerate(experiment.runs):
                axes.plot(
                    [epoch + 1 for epoch in run.curves["epoch"]],
                    run.curves[name],
                    color=f"C{number}",
                    marker="." if len(run.curves["epoch"]) < 30 else "",
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
    runs, problems = find_runs(options.folders)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not runs:
        raise OSError("nothing to compare: name folders of finished runs, for instance runs/*")
    found = experiments(runs)
    same = {name: {run.result[name] for run in runs} for name in ("net", "data")}
    common = [f"{name} {values.pop()}" for name, values in same.items() if len(values) == 1]
    all_with = f", all with {' and '.join(common)}" if common else ""
    print(f"{len(runs)} runs{all_with}; ± is the standard deviation\n\n{_table(found)}")
    _curves_figure(found).savefig(options.output)
    print(f"\nCurves: {options.output}")
