"""A model's report as one page: report.html of this folder, filled in."""

import base64
import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_nn.trained.calibrate import wilson_interval
from lit_nn.trained.predict import data_uri

if TYPE_CHECKING:
    from lit_nn.trained.evaluate import Answers

SHOWN = 30  # images in a list, and twice the pairs of classes


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


def report_page(answers: "Answers", found: dict[str, Any], title: str, figures: Mapping[str, bytes]) -> str:
    """HTML that loads nothing: what `measure` found, figures as PNG by their names, mistakes, what was not sure."""
    names, confidence, several = answers.class_names, answers.probabilities.max(1), answers.several  # confidence (N,)
    right = answers.logits.argmax(1) == (0 if several else answers.labels)  # (N,), of one label
    sure = confidence >= (0 if several else answers.threshold)  # (N,)
    wrong = np.zeros((1, 1), int) if several else answers.confusion  # (K, K)
    np.fill_diagonal(wrong, 0)
    pairs = np.argsort(-wrong, axis=None, kind="stable")[: min(SHOWN // 2, np.count_nonzero(wrong))]

    def rows(table: Iterable[Iterable[object]]) -> str:
        cells = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in table)
        return "".join(f"<tr>{row}</tr>" for row in cells)

    def cards(numbers: Iterable[int]) -> str:
        """Images beside their heat maps, and what is known of them."""
        text = ""
        for row in numbers:
            shown = "".join(f'<img src="{data_uri(pixels)}" alt="">' for pixels in answers.shown(row))
            named, true, file = (escape(find(row)) for find in (answers.said, answers.given, answers.file))
            caption = f"said <b>{named}</b>, {confidence[row]:.1%}<br>is {true}<span>{file}</span>"
            text += f"<figure><div>{shown}</div><figcaption>{caption}</figcaption></figure>"
        return text

    classes = []
    for name, row in found["per_class"].items():
        low, high = wilson_interval(row["recall"], max(row["support"], 1))
        texts = {score: f"{row[score]:.1%}" for score in found["macro"]}
        texts["recall"] += f" ({low:.0%} to {high:.0%})"
        texts |= {"threshold": f"{row['threshold']:.1%}"} if several else {}
        classes.append([name, *texts.values(), row["support"]])
    columns = ("class", *(score.replace("_", " ") for score in found["macro"]), *["threshold"] * several, "images")
    heads = (f'<th scope="col"><button>{name}</button></th>' for name in columns)
    mistakes, unsure = answers.mistakes, np.argsort(confidence, kind="stable")[: np.count_nonzero(~sure)]
    of_all, doubted = f"of {len(right):,} images", "Always sure: the training had no --accept."
    if found.get("threshold"):
        doubted = f"{len(unsure):,} {of_all}, below {answers.threshold:.2%}; the least confident first."
    maps = " Beside each: the places that speak for its answer." * bool(answers.overlays)
    values = {
        "title": escape(title),
        "numbers": "".join(
            f"<div><dt>{name}</dt><dd><b>{'</b> '.join(f'{text} '.split(' ', 1))}</dd></div>"
            for name, text in summary(found).items()
        ),
        "heads": "".join(heads),
        "classes": rows(classes),
        "pairs": rows([names[pair // len(names)], names[pair % len(names)], wrong.flat[pair]] for pair in pairs),
        "small": "small" * (max(answers.images.shape[2:]) < 100),
        "mistaken": f"{len(mistakes):,} {of_all}; the most confident first.{maps}",
        "mistakes": cards(mistakes[:SHOWN].tolist()),
        "doubted": doubted,
        "sure": rows(
            [what, *(np.count_nonzero(some & good) for good in (right, ~right))]
            for what, some in (("sure", sure), ("not sure", ~sure))
        ),
        "doubts": cards(unsure[:SHOWN].tolist()),
        "calibration": rows(
            [what, f"{found[f'{which}calibration_error']:.2%}", f"{found[f'{which}loss']:.4f}"]
            for what, which in (("before", "uncalibrated_"), (f"after, temperature {answers.temperature:.3f}", ""))
        ),
        **{f"{name}_png": f"data:image/png;base64,{base64.b64encode(png).decode()}" for name, png in figures.items()},
    }
    page, others = Path(__file__).with_name("report.html").read_text(encoding="utf-8"), "one" if several else "several"
    return Template(re.sub(f"<!-- {others} -->.*?<!-- end -->", "", page, flags=re.DOTALL)).substitute(values)
