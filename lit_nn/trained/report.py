"""A model's report: numbers, tables, figures, and all of them on one page, which is report.html of this folder."""

import base64
import csv
import io
import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader

from data_modules.files import atomic_path
from lit_nn.trained.calibrate import wilson_interval
from lit_nn.trained.evaluate import SHOWN, Answers, measure
from lit_nn.trained.figures import figures_of
from lit_nn.trained.predict import data_uri


def summary(found: dict[str, Any]) -> dict[str, str]:
    """What comes first of the numbers that `measure` found, as text."""
    on, before = f"on {found['images']:,} images", found["uncalibrated_calibration_error"]
    without = f"without the temperature of {found['temperature']:.3f}:"
    if "micro" in found:  # several labels
        texts = {
            "mean average precision": f"{found['mean_average_precision']:.2%} {on}",
            **{f"{kind} F1": f"{found[kind]['f1']:.2%}" for kind in ("macro", "micro")},
            "right answers": f"{found['accuracy']:.2%} (all of an image's right: {found['exact_match']:.2%})",
        }
    else:
        low, high = found["accuracy_interval_95"]
        texts = {
            "accuracy": f"{found['accuracy']:.2%} (95 % interval {low:.2%} to {high:.2%}) {on}",
            "balanced accuracy": f"{found['balanced_accuracy']:.2%}",
            "top 3 accuracy": f"{found['top_3_accuracy']:.2%}",
        }
    texts["loss"] = f"{found['loss']:.4f} ({without} {found['uncalibrated_loss']:.4f})"
    texts["calibration error"] = f"{found['calibration_error']:.2%} ({without} {before:.2%})"
    if found.get("threshold"):
        right = f"{found['accuracy_where_sure']:.2%} of these are right"
        texts["sure of"] = f"{found['sure']:.2%} of the images, from {found['threshold']:.2%} on; {right}"
    if unlike := found.get("unlike"):
        told = f"{unlike['above_cut']:.2%} of them and 5 % of the test images score above {unlike['cut']:.4f}"
        texts["AUROC"] = f"{unlike['auroc']:.4f} of {unlike['images']:,} images of other things; {told}"
    return texts


def report_page(answers: Answers, found: dict[str, Any], title: str, figures: dict[str, bytes]) -> str:
    """HTML that loads nothing: what `measure` found, figures as PNG by their names, mistakes, what was not sure."""
    confidence, said, given = answers.probabilities.max(1), answers.said, answers.given  # (N,), (N, K) twice
    values: dict[str, Any] = {"confidence": confidence, "said": said, "given": given, "mistakes": answers.mistakes}
    if not answers.several:
        right, sure = (said & given).any(1), (confidence >= answers.threshold) & (answers.threshold != 1)  # (N,)
        values["sure"] = [[np.count_nonzero(some & good) for good in (right, ~right)] for some in (sure, ~sure)]
        values["doubts"] = np.argsort(confidence, kind="stable")[: np.count_nonzero(~sure)]
        names, wrong = answers.class_names, answers.confusion
        np.fill_diagonal(wrong, 0)
        pairs = np.argsort(-wrong, axis=None, kind="stable")[: min(SHOWN // 2, np.count_nonzero(wrong))]
        places = zip(*np.unravel_index(pairs, wrong.shape), strict=True)
        values["confusions"] = [(names[one], names[other], wrong[one, other]) for one, other in places]
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters |= {"percent": "{:.{}%}".format, "data_uri": data_uri}
    values |= {"answers": answers, "found": found, "title": title, "summary": summary(found)}
    drawn = {name: f"data:image/png;base64,{base64.b64encode(png).decode()}" for name, png in figures.items()}
    return environment.get_template("report.html").render(**values, figures=drawn, interval=wilson_interval, most=SHOWN)


def write_report(answers: Answers, title: str, folder: Path) -> dict[str, Any]:
    """Write a page, metrics.json, tables and figures in place of an earlier report's, together; returns `measure`'s."""
    found, names = measure(answers), answers.class_names
    rows = [*found["per_class"].values()]
    files = {"metrics.json": json.dumps({"title": title, **found}, indent=2, ensure_ascii=False).encode() + b"\n"}
    files["per_class.csv"] = _table(["class", *rows[0]], names, [row.values() for row in rows])
    if not answers.several:
        files["confusion.csv"] = _table(["true class \\ predicted class", *names], names, answers.confusion.tolist())
    drawn = {}
    for name, figure in figures_of(answers, found, title).items():
        figure.savefig(png := io.BytesIO())
        drawn[name] = files[f"{name}.png"] = png.getvalue()
    files["report.html"] = report_page(answers, found, title, drawn).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as complete:
        for name, content in files.items():
            complete.enter_context(atomic_path(folder / name)).write_bytes(content)
    return found


def _table(header: list[str], names: list[str], rows: Iterable[Iterable[object]]) -> bytes:
    csv.writer(text := io.StringIO()).writerows(
        [header, *([name, *row] for name, row in zip(names, rows, strict=True))]
    )
    return text.getvalue().encode()
